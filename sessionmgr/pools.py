"""Pools that are watched: what their classes gain, and the events that tell their monitors."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from . import forking
from .greenlets import in_greenlet
from .sqlite import is_memory, roll_back

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.orm import Session, SessionTransaction
    from sqlalchemy.pool import ConnectionPoolEntry, ManagesConnection, PoolProxiedConnection

    from .monitor import PoolMonitor
    from .severing import OpenConnection

__all__ = ("INFO", "WatchedPool", "leave_nothing", "open_connection", "record_info", "watched")

#: The key of the OpenConnection in the ``record_info`` of a pool's record.
INFO = "sessionmgr"


class WatchedPool(Pool):
    """What a pool class gains by :func:`watched`; a pool that has no monitor yet is plain."""

    monitor: PoolMonitor | None = None
    #: whether another pool has taken this one's place
    superseded = False

    def connect(self) -> PoolProxiedConnection:
        """Check out a connection; in a process that inherited the pool, settle there first."""
        monitor = self.monitor
        if monitor is None or monitor.settled is forking.process:
            return super().connect()
        return monitor.checkout(self, super().connect)

    def _create_connection(self) -> ConnectionPoolEntry:
        """Connect, and let the ``connect`` listeners have it: the first initialises the dialect.

        A fork in the midst of that would leave the child's copy of the dialect half done.
        """
        with forking.gate.section():
            return super()._create_connection()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        """Take a connection back, or close it where none is to stay.

        In a superseded pool it may have been made since: a thread that is held back by a fork has
        the pool already.
        """
        connection = record.record_info.get(INFO)  # type: ignore[union-attr]  # a record's is a dict
        if connection is not None:
            connection.monitor.on_checkin(connection, record)
        if self.superseded and (connection is None or not connection.users):  # threads may share it
            record.close()
        super()._do_return_conn(record)

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        """Close a connection; a fork in the midst of it would let the child inherit the rest.

        Every close goes through here. Of the pool's events, ``close`` comes too early, and
        none comes when a ``connect`` listener failed.
        """
        with forking.gate.section():
            try:
                if self._dialect.is_async and not in_greenlet():
                    self._cut_connection(connection)
                else:
                    self._close_in_order(connection, terminate)
            except asyncio.CancelledError:
                self._cut_connection(connection)
                raise
            finally:
                if self.monitor is not None:
                    self.monitor.on_close(connection)

    def _close_in_order(self, connection: DBAPIConnection, terminate: bool) -> None:
        try:
            if getattr(self._dialect, "name", "") == "sqlite":
                roll_back(connection)
        finally:  # a task may be cancelled while it waits for that
            super()._close_connection(connection, terminate=terminate)

    def _cut_connection(self, connection: DBAPIConnection) -> None:
        """Close a connection of an asynchronous driver where nothing can be awaited any more."""
        if self.monitor is not None:
            self.monitor.cut(connection)

    def recreate(self) -> Pool:
        """Make a pool like this one, under the same monitor."""
        pool = super().recreate()
        if self.monitor is not None:
            pool.monitor = self.monitor  # type: ignore[attr-defined]  # of this very class
            self.superseded = True
        return pool


@functools.cache
def watched(pool_class: type[Pool]) -> type[Pool]:
    """Give the watched form of a pool class: a subclass of the same name.

    Events are listened to by the class. Listeners of each pool of its own would take half as
    much memory as the rest of its engine.
    """
    if issubclass(pool_class, WatchedPool):
        return pool_class
    # SQLAlchemy names the pool's logger after its class and module.
    names = {"__module__": pool_class.__module__, "__doc__": pool_class.__doc__}
    return type(pool_class.__name__, (WatchedPool, pool_class), names)


def open_connection(holder: ManagesConnection) -> OpenConnection | None:
    """Find what is known of the connection that a pool's record, or its proxy, has.

    :return: ``None`` where it is another engine's, or could not be made.
    """
    return record_info(holder).get(INFO)


def leave_nothing(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    """Have the connection of a short-lived session closed at its checkin.

    It listens to ``after_begin`` of such sessions.
    """
    opened = open_connection(connection.connection)
    # in memory the one connection is the database
    if opened is not None and not is_memory(connection.engine.url):
        opened.leaves = True


def record_info(holder: ManagesConnection) -> dict[str, Any]:
    """Give the notes on a pool's record; a detached connection's proxy has none."""
    info = holder.record_info
    return {} if info is None else info


@event.listens_for(WatchedPool, "invalidate")
def _on_invalidate(
    dbapi_connection: DBAPIConnection,
    entry: ConnectionPoolEntry,
    error: BaseException | None,
) -> None:
    connection = open_connection(entry)
    if connection is not None:
        connection.monitor.on_invalidate()


@event.listens_for(WatchedPool, "detach")
def _on_detach(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    connection = open_connection(entry)  # or one that has taken its place in the record since
    if connection is not None:
        connection.monitor.on_detach(dbapi_connection)

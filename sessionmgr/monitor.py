"""Watches the pool of one Engine: liveness, leave-taking, counts, and the pool's own forks."""

from __future__ import annotations

import functools
import os
import weakref
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import NullPool, Pool, QueuePool, SingletonThreadPool

from . import exits, forking
from .errors import ForkedSQLiteError
from .severing import OpenConnection, forked_files, open_connections
from .sqlite import roll_back
from .stats import PoolCounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
    from sqlalchemy.pool import ConnectionPoolEntry, ManagesConnection, PoolProxiedConnection

__all__ = ("PoolMonitor", "WatchedPool", "open_connection", "watched")

# The key of the OpenConnection in the ``record_info`` of a pool's record.
_INFO = "sessionmgr"

# Guards the fields of every monitor. It is taken when a connection is made or closed only.
_lock = forking.ProcessLock()


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
        """Take a connection back, or close it where it would stay open in a superseded pool.

        It may have been made since: a thread that is held back by a fork has the pool already.
        """
        if self.superseded:
            connection = open_connection(record)
            if connection is None or not connection.users:  # threads may share it
                record.close()
        super()._do_return_conn(record)

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        """Close a connection; a fork in the midst of it would let the child inherit the rest.

        Every close goes through here. Of the pool's events, ``close`` comes too early, and
        none comes when a ``connect`` listener failed.
        """
        with forking.gate.section():
            if getattr(self._dialect, "name", "") == "sqlite":
                roll_back(connection)
            try:
                super()._close_connection(connection, terminate=terminate)
            finally:
                if self.monitor is not None:
                    self.monitor.on_close(connection)

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


class PoolMonitor:
    """Attends to the connections of one Engine, from before they are made until they are closed."""

    __slots__ = (
        "_create",
        "_dialect",
        "_engine",
        "_home",
        "_name",
        "_open",
        "_past",
        "_ping_if_idle",
        "_retired",
        "_turns",
        "last_used",
        "settled",
    )

    def __init__(self, engine: Engine, name: str, ping_if_idle: float | None) -> None:
        """Begin to watch an engine that has not connected yet.

        :param engine: an engine whose pool's class is a watched one; it is not kept alive.
        :param name: how error texts call its database.
        :param ping_if_idle: seconds idle after which a connection is tested at checkout;
            ``None`` for never.
        """
        self._engine = weakref.ref(engine)
        self._name = name
        self._dialect: Dialect = engine.dialect
        self._ping_if_idle = float("inf") if ping_if_idle is None else ping_if_idle
        self._open: tuple[OpenConnection, ...] = ()  # a set would take thrice the memory
        self._past = PoolCounts()
        self._retired = False
        # Held by checkouts and closes, where threads share a connection and do not take it
        # from a queue. NullPool has none that is idle, SingletonThreadPool each its thread's.
        queued = isinstance(engine.pool, (QueuePool, NullPool, SingletonThreadPool))
        self._turns = None if queued else forking.ProcessLock()
        #: time.monotonic() of the last checkout or checkin.
        self.last_used = monotonic()
        self._home = forking.process
        #: the process for which the pool was made; None where checkouts take turns
        self.settled: forking.Process | None = self._home if queued else None

        pool: Any = engine.pool
        pool.monitor = self
        # No event comes before a connection is made. The attribute is kept by recreate().
        self._create: Callable[[ConnectionPoolEntry], DBAPIConnection] = pool._invoke_creator
        pool._creator = self._connect

    # -- making connections

    def _connect(self, entry: ConnectionPoolEntry) -> DBAPIConnection:
        """Make a connection; no fork comes between that and our knowing of it."""
        with forking.gate.section():
            dbapi_connection = self._create(entry)
            try:
                self._remember(entry, dbapi_connection)
            except BaseException:
                self._dialect.do_close(dbapi_connection)
                raise
        exits.register()
        return dbapi_connection

    def _remember(self, entry: ConnectionPoolEntry, dbapi_connection: DBAPIConnection) -> None:
        self._present()  # forgets what was let go without being closed
        connection = OpenConnection(entry, dbapi_connection, self._dialect, self)
        if connection.file is not None and connection.file in forked_files:
            raise ForkedSQLiteError(
                f"database {self._name}: a parent of process {os.getpid()} had a connection to"
                " this SQLite file in use when it forked, and SQLite would take the parent's"
                " locks for this process's own. End sessions on the file before forking, or"
                " start this process by spawn"
            )
        _record_info(entry)[_INFO] = connection
        open_connections.add(connection)
        with _lock():
            self._open += (connection,)
            self._past.connects += 1

    def checkout(
        self, pool: Pool, checkout: Callable[[], PoolProxiedConnection]
    ) -> PoolProxiedConnection:
        """Check out for the first time in a process, or from a pool where checkouts take turns.

        Only the latter hold forks back, for they do not wait for a connection.
        """
        self._settle(pool)
        if self._turns is None:
            self.settled = self._home
            return checkout()
        with forking.gate.section(), self._turns():
            return checkout()

    def _settle(self, pool: Pool) -> None:
        """Make an inherited pool one of this process, in place.

        Its locks may be held by threads that exist in the parent only, and its records are
        the parent's. In place, because engines, their ``execution_options`` variants and
        inherited sessions all refer to this very object.
        """
        if self._home is forking.process:
            return
        with _lock():
            if self._home is not forking.process:
                fresh = vars(pool.recreate())
                memoized = vars(pool).keys() - fresh.keys()
                vars(pool).update(fresh)
                for name in memoized:
                    del vars(pool)[name]
                self._open = ()
                self._past = PoolCounts()
                self._home = forking.process

    # -- the pool's events

    def on_checkout(
        self,
        connection: OpenConnection,
        dbapi_connection: DBAPIConnection,
        proxy: PoolProxiedConnection,
    ) -> None:
        """Test a connection that was idle for too long, and count its checkout."""
        now = self.last_used = monotonic()
        if connection.idle_since is not None and now - connection.idle_since >= self._ping_if_idle:
            connection.tests += 1
            if not self._is_alive(dbapi_connection):
                with _lock():
                    self._past.replaced += 1
                # The pool closes it, and every other one made before now, and connects anew.
                raise InvalidatePoolError
        connection.fresh = None
        connection.proxy = weakref.ref(proxy)
        connection.checkouts += 1
        connection.users += 1

    def _is_alive(self, dbapi_connection: DBAPIConnection) -> bool:
        try:
            return self._dialect.do_ping(dbapi_connection)
        except self._dialect.loaded_dbapi.Error as error:
            if self._dialect.is_disconnect(error, dbapi_connection, None):
                return False
            raise

    def on_checkin(
        self,
        connection: OpenConnection,
        dbapi_connection: DBAPIConnection | None,
        entry: ConnectionPoolEntry,
    ) -> None:
        """Note since when a connection is idle, or close it where none is to stay."""
        if self._home is not forking.process:
            # an inherited session ends here; its record goes back into a pool of this process
            engine = self._engine()
            if engine is not None:
                self._settle(engine.pool)
        if dbapi_connection is None:  # it was invalidated
            return
        with nullcontext() if self._turns is None else self._turns():
            connection.users -= 1
        if connection.users == 0 and (self._retired or connection.leaves):
            # Closed here, the record goes back empty, and the pool fills it when it is wanted.
            entry.close()
        connection.idle_since = self.last_used = monotonic()

    def on_invalidate(self) -> None:
        """Count a connection that was given up."""
        with _lock():
            self._past.invalidated += 1

    def on_detach(self, dbapi_connection: DBAPIConnection) -> None:
        """Follow a connection that leaves its pool for good."""
        for connection in self._open:
            if connection.dbapi_connection is dbapi_connection:
                connection.detach()

    def on_close(self, dbapi_connection: DBAPIConnection) -> None:
        """Drop a connection that was closed, and keep what it counted."""
        for connection in self._open:
            if connection.dbapi_connection is dbapi_connection:
                self._forget(connection)

    def _forget(self, connection: OpenConnection) -> None:
        open_connections.discard(connection)
        with _lock():
            if connection in self._open:
                self._open = tuple(c for c in self._open if c is not connection)
                self._past.checkouts += connection.checkouts
                self._past.tests += connection.tests

    # -- for the registry

    @property
    def in_use(self) -> int:
        """How many connections are checked out."""
        return sum(connection.users > 0 for connection in self._present())

    def close_idle_files(self, deadline: float) -> None:
        """Close idle connections to SQLite files, which a child must not inherit.

        :param deadline: by ``time.monotonic()``; what another thread is checking out then stays.
        """
        if not any(c.file is not None and not c.users for c in self._present()):
            return
        if self._turns is None:
            self._close_idle()
            return
        turns = self._turns()
        if turns.acquire(timeout=max(0.0, deadline - monotonic())):
            try:
                self._close_idle()
            finally:
                turns.release()

    def retire(self) -> None:
        """Close idle connections now, and each of the others when its session ends.

        The engine stays usable for whoever still has it, without keeping connections.
        """
        self._retired = True
        if self._home is forking.process:
            self._close_idle()

    def _close_idle(self) -> None:
        engine = self._engine()
        if engine is None:
            return
        pool = engine.pool
        if isinstance(pool, QueuePool):
            if not self._was_used():
                # There is none idle. The first may be in the making: its thread initialises the
                # dialect, and in another pool nobody would wait for that.
                return
            # Threads that have connections of the old pool keep them until their checkin.
            engine.dispose(close=False)
            pool.dispose()
        elif self._turns is not None:
            for connection in self._present():
                self._close_if_idle(connection)
        elif isinstance(pool, SingletonThreadPool):
            # Another thread's cannot be told to be idle for long: it is closed at its checkin.
            record: Any = getattr(pool._conn, "current", lambda: None)()
            known = None if record is None else open_connection(record)
            if known is not None and known.users == 0:
                record.close()

    def _was_used(self) -> bool:
        """Tell whether a connection was ever checked out in this process."""
        with _lock():
            return self._past.checkouts > 0 or any(c.checkouts for c in self._open)

    def _close_if_idle(self, connection: OpenConnection) -> None:
        """Close a connection of a pool that has no queue to take it from first."""
        assert self._turns is not None
        with self._turns():
            owner = connection.owner()
            if connection.users == 0 and owner is not None:
                owner.close()

    def _present(self) -> list[OpenConnection]:
        """List the open connections, dropping those that were let go without being closed."""
        with _lock():
            connections = self._open if self._home is forking.process else ()
        for connection in connections:
            if connection.dbapi_connection is None:
                self._forget(connection)
        return [c for c in connections if c.dbapi_connection is not None]

    def counts(self) -> PoolCounts:
        """Give the counts of this process so far."""
        present = self._present()
        past = self._past if self._home is forking.process else PoolCounts()
        return PoolCounts(
            connects=past.connects,
            checkouts=past.checkouts + sum(c.checkouts for c in present),
            tests=past.tests + sum(c.tests for c in present),
            replaced=past.replaced,
            invalidated=past.invalidated,
            checked_out=sum(c.users > 0 for c in present),
            idle=sum(c.users == 0 for c in present),
        )


def open_connection(holder: ManagesConnection) -> OpenConnection | None:
    """Find what is known of the connection that a pool's record, or its proxy, has.

    :return: ``None`` where it is another engine's, or could not be made.
    """
    return _record_info(holder).get(_INFO)


def _record_info(holder: ManagesConnection) -> dict[str, Any]:
    info = holder.record_info
    return {} if info is None else info  # the proxy of a detached connection has none


@event.listens_for(WatchedPool, "checkout")
def _on_checkout(
    dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection
) -> None:
    connection = open_connection(entry)
    if connection is not None:
        connection.monitor.on_checkout(connection, dbapi_connection, proxy)


@event.listens_for(WatchedPool, "checkin")
def _on_checkin(dbapi_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
    connection = open_connection(entry)
    if connection is not None:
        connection.monitor.on_checkin(connection, dbapi_connection, entry)


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

"""Watches the pool of one Engine: liveness, leave-taking, counts, and the pool's own forks."""

from __future__ import annotations

import asyncio
import os
import weakref
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import NullPool, QueuePool, SingletonThreadPool

from . import exits, forking
from .errors import EventLoopError, ForkedSQLiteError
from .firstuse import FirstUse
from .greenlets import TaskLock
from .pools import INFO, WatchedPool, open_connection, record_info
from .severing import OpenConnection, forked_files, open_connections
from .sqlite import named_file
from .stats import PoolCounts

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
    from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

    from .sqlite import FileIdentity

__all__ = ("PoolMonitor",)

_NOTHING = nullcontext()

# Guards the fields of every monitor. It is taken when a connection is made or closed only.
_lock = forking.ProcessLock()


class PoolMonitor:
    """Attends to the connections of one Engine, from before they are made until they are closed."""

    __slots__ = (
        "_create",
        "_dialect",
        "_engine",
        "_first_use",
        "_home",
        "_loop",
        "_making",
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
        self._first_use: FirstUse | None = None
        # Held by checkouts and closes, where threads share a connection and do not take it
        # from a queue. NullPool has none that is idle, SingletonThreadPool each its thread's.
        queued = isinstance(engine.pool, (QueuePool, NullPool, SingletonThreadPool))
        self._turns = None if queued else forking.ProcessLock()
        #: time.monotonic() of the last checkout or checkin.
        self.last_used = monotonic()
        self._home = forking.process
        #: the process for which the pool was made; None where each checkout is attended to
        self.settled: forking.Process | None = self._home if queued else None
        self._loop: AbstractEventLoop | None = None
        self._making = TaskLock() if engine.dialect.is_async and not queued else _NOTHING

        pool: Any = engine.pool
        pool.monitor = self
        # No event comes before a connection is made. The attribute is kept by recreate().
        self._create: Callable[[ConnectionPoolEntry], DBAPIConnection] = pool._invoke_creator
        pool._creator = self._connect

    def before_first_checkout(self, work: Callable[[Engine], object]) -> None:
        """Have work done once, before the first connection is checked out.

        :param work: is given the engine, and may check out connections of it. When it raises, the
            checkout fails, and the next one tries again.
        """
        self._first_use = FirstUse(work, is_async=self._dialect.is_async)
        self.settled = None

    # -- making connections

    def _connect(self, entry: ConnectionPoolEntry) -> DBAPIConnection:
        """Make a connection; no fork comes between that and our knowing of it."""
        with forking.gate.section():
            engine = self._engine()
            if forked_files and engine is not None:
                # Opened, SQLite might wait for good for a mutex that a thread of the parent held.
                self._refuse_forked(named_file(engine.url))
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
        self._refuse_forked(connection.file)
        record_info(entry)[INFO] = connection
        open_connections.add(connection)
        with _lock():
            self._open += (connection,)
            self._past.connects += 1

    def _refuse_forked(self, file: FileIdentity | None) -> None:
        if file is not None and file in forked_files:
            raise ForkedSQLiteError(
                f"database {self._name}: a parent of process {os.getpid()} had a connection to"
                " this SQLite file in use when it forked, and SQLite would take the parent's"
                " locks for this process's own. End sessions on the file before forking, or"
                " start this process by spawn"
            )

    def checkout(
        self, pool: Pool, checkout: Callable[[], PoolProxiedConnection]
    ) -> PoolProxiedConnection:
        """Check out for the first time in a process, or from a pool where checkouts take turns.

        Only the latter hold forks back, for they do not wait for a connection.

        :raises EventLoopError: when the engine belongs to another event loop.
        """
        self._settle(pool)
        self.check_loop()
        if (
            self._loop is None
            and self._turns is None
            and (self._first_use is None or self._first_use.done)
        ):
            self.settled = self._home
        if self._first_use is not None and not self._first_use.done:
            engine = self._engine()
            if engine is not None:
                self._first_use(engine)
        if self._turns is None:
            return checkout()
        with forking.gate.section(), self._making, self._turns():
            return checkout()

    def attach(self, loop: AbstractEventLoop) -> None:
        """Let the engine be used in one event loop only, until it is retired."""
        self._loop = loop
        self.settled = None

    def check_loop(self) -> None:
        """Raise where the engine belongs to another event loop.

        :raises EventLoopError: when it does.
        """
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            raise EventLoopError(
                f"database {self._name}: this AsyncEngine belongs to another event loop, whose"
                " connections cannot be used here. Ask the manager for the engine, sessionmaker or"
                " session of this loop"
            )

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

    def test(self, connection: OpenConnection, dbapi_connection: DBAPIConnection) -> None:
        """Ask a server whether a connection is still there.

        :raises InvalidatePoolError: when it is not. The pool closes it, and every other one made
            before now, and connects anew.
        """
        connection.tests += 1
        if not self._is_alive(dbapi_connection):
            with _lock():
                self._past.replaced += 1
            raise InvalidatePoolError

    def _is_alive(self, dbapi_connection: DBAPIConnection) -> bool:
        try:
            return self._dialect.do_ping(dbapi_connection)
        except self._dialect.loaded_dbapi.Error as error:
            if self._dialect.is_disconnect(error, dbapi_connection, None):
                return False
            raise

    def on_checkin(self, connection: OpenConnection, entry: ConnectionPoolEntry) -> None:
        """Note since when a connection is idle, or close it where none is to stay."""
        if self._home is not forking.process:
            # an inherited session ends here; its record goes back into a pool of this process
            engine = self._engine()
            if engine is not None:
                self._settle(engine.pool)
        if entry.dbapi_connection is None:  # it was invalidated, or detached
            return
        if self._turns is None:
            connection.users -= 1
        else:
            with self._turns():
                # but for the one who checks in, unless he was collected
                collected = connection.proxy is None or connection.proxy() is None
                connection.users = connection.count_users() - (not collected)
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
        self._loop = None
        if self._home is forking.process:
            self._close_idle()

    @property
    def retired(self) -> bool:
        """Whether the engine keeps no connections any more."""
        return self._retired

    def finish(self) -> None:
        """Close what is left when the engine's event loop ends, or was closed.

        While it ends, other asynchronous generators may still be at work with a connection. A
        connection that tasks share is closed nevertheless: SQLAlchemy tells of the first of its
        overlapping checkins only, so that it seems to be in use.
        """
        loop = self._loop
        self.retire()
        if self._turns is None and loop is not None and not loop.is_closed():
            return
        self._close_present()

    def leave(self) -> None:
        """Close every connection, at the process's end, for nobody uses one any more."""
        self.retire()
        self._close_present()

    def _close_present(self) -> None:
        for connection in self._present():
            owner = connection.owner()
            if owner is not None:
                owner.close()

    def cut(self, dbapi_connection: DBAPIConnection) -> None:
        """Close a connection of an asynchronous driver where nothing can be awaited."""
        for connection in self._open:
            if connection.dbapi_connection is dbapi_connection:
                connection.cut(dbapi_connection)

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
            _dispose(pool)
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
            elif self._turns is not None:
                connection.users = connection.count_users()
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


def _dispose(pool: Pool) -> None:
    """Close all idle connections of a pool.

    A cancellation, or what a signal's handler raises, breaks off the goodbye of one of them only.
    """
    try:
        pool.dispose()
    except BaseException:
        _dispose(pool)
        raise


@event.listens_for(WatchedPool, "checkout")
def _on_checkout(
    dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection
) -> None:
    """Test a connection that was idle for too long, and count its checkout."""
    connection = entry.record_info.get(INFO)  # type: ignore[union-attr]  # a record's is a dict
    if connection is None:
        return
    monitor = connection.monitor
    now = monitor.last_used = monotonic()
    if connection.idle_since is not None and now - connection.idle_since >= monitor._ping_if_idle:
        monitor.test(connection, dbapi_connection)
    connection.fresh = None
    connection.proxy = weakref.ref(proxy)
    connection.checkouts += 1
    connection.users += 1
    if monitor._turns is not None:
        connection.share(proxy)

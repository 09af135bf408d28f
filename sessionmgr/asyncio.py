"""AsyncSessionManager: the asynchronous twin of SessionManager, with engines by event loop."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)

from .base import BaseManager
from .engines import EngineEntry, EngineRegistry, make_async_engine
from .errors import EngineOptionsError
from .greenlets import await_only, check_greenlet, greenlet_spawn
from .loops import LoopRegistries, LoopRegistry, begin_task
from .options import async_dialect, check_async_session_options, check_count, check_scope
from .pools import leave_nothing
from .routing import routed
from .schema import create_tables, has_tables
from .scopes import forget_at_fork
from .transactions import AsyncTransaction, run_async_transaction
from .urls import DatabaseKey, hide_secrets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import Engine, MetaData
    from typing_extensions import Self

__all__ = ("AsyncSessionManager",)

Result = TypeVar("Result")
Maker = async_sessionmaker[AsyncSession]
Entry = EngineEntry[AsyncEngine, Maker]


class AsyncSessionManager(BaseManager[AsyncEngine, Maker]):
    """Asynchronous sessions, over any number of databases, safe across fork and event loops.

    It is configured like a SessionManager, may be made anywhere, and is used in coroutines::

        manager = AsyncSessionManager()

        async with manager.begin("postgresql+asyncpg://app@db/orders") as session:
            session.add(Order(...))

    Each event loop has engines of its own, whose connections are closed at its end: by
    ``async with manager:``, or by ``asyncio.run``, which closes every asynchronous generator that
    was begun in the loop. ``engine_callback`` is given the ``sync_engine`` of each AsyncEngine;
    it must not connect, which takes an ``await``.
    """

    _in_loops = True
    _check_session_options = staticmethod(check_async_session_options)
    _dialect = staticmethod(async_dialect)

    def _set_up(self) -> None:
        check_greenlet()
        self._loops = LoopRegistries(self._max_engines)
        weakref.finalize(self, self._loops.orphan).atexit = False  # exits does it there

    def _registries(self) -> list[EngineRegistry[AsyncEngine, Maker]]:
        return [*self._loops.all()]

    def _abandon(self) -> None:
        self._loops.abandon()

    def _leave(self) -> None:
        self._loops.leave()

    # -- engines and sessions

    def get_engine(self, dburi: str | URL, **kwargs: Any) -> AsyncEngine:
        """Return the running loop's engine of a database, the same one in each call.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param kwargs: options of ``create_async_engine``, over the manager's and the bind's.
        :return: the engine. It belongs to the manager: do not dispose of it, ``invalidate``.
        :raises EventLoopError: when no event loop is running.
        :raises DatabaseURLError: when ``dburi`` cannot be read.
        :raises NoSuchBindError: when it is a bind key without an entry.
        :raises EngineOptionsError: when an option is unknown, contradicts another, or differs
            from that of the engine that is there, or the driver is no asynchronous one.
        :raises ManagerClosedError: after ``close()``.
        """
        return self._entry(self._loops.current(), self._key(dburi), kwargs).bind

    def create_session(
        self, dburi: str | URL, short_lived_sessions: bool = False, **kwargs: Any
    ) -> tuple[AsyncEngine, Maker]:
        """Return the running loop's engine and sessionmaker of a database.

        The database's tables are not looked at; ``session_factory`` does that.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param short_lived_sessions: give a sessionmaker of the caller's own whose sessions
            leave no connection behind: each closes its own when it ends.
        :param kwargs: as for :meth:`get_engine`, which also tells what is raised.
        """
        entry = self._entry(self._loops.current(), self._key(dburi), kwargs)
        if not short_lived_sessions:
            return entry.bind, self._factory(entry)
        short_lived: Any = self._short_lived().kw["sync_session_class"]
        return entry.bind, self._make_sessionmaker(bind=entry.bind, sync_session_class=short_lived)

    async def session_factory(self, dburi: str | URL, **kwargs: Any) -> AsyncSession:
        """Open a session on a database whose tables are there.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param kwargs: as for :meth:`create_session`, which also tells what is raised.
        :return: a session; close it, or use it in an ``async with`` statement, which does.
        """
        if not kwargs:
            try:
                ready = self._loops.current().ready.get(dburi)
            except TypeError:  # not hashable: it is told below what a database is named by
                ready = None
            if ready is not None:
                session: AsyncSession = self._make_session(ready)
                return session
        return await self._open(dburi, **kwargs)

    async def _open(
        self, dburi: str | URL, short_lived_sessions: bool = False, **kwargs: Any
    ) -> AsyncSession:
        registry = self._loops.current()
        entry = self._entry(registry, self._key(dburi), kwargs)
        await self._prepare(registry, entry)
        if short_lived_sessions:
            return self._short_lived()(bind=entry.bind)
        registry.mark_ready(dburi, entry)
        session: AsyncSession = self._make_session(entry)
        return session

    async def prepare_models(self, engine: AsyncEngine) -> None:
        """Create the tables that the engine's database lacks.

        They are looked for once for an engine of this manager, and at each call for another.
        Tables that are there need no right to create any. Missing ones are created under a lock
        that the database gives, so any number of processes may do this at once.

        :param engine: an engine of this manager, or another.
        :raises SchemaLockError: when a server does not grant the lock within 60 s.
        """
        if not isinstance(engine, AsyncEngine):
            raise EngineOptionsError(
                f"prepare_models takes an AsyncEngine, not {type(engine).__name__};"
                " session_factory(url) prepares by itself"
            )
        registry = self._loops.current()
        entry = registry.find_engine(engine)
        if entry is not None:
            await self._prepare(registry, entry)
        elif not await greenlet_spawn(has_tables, engine.sync_engine, self.metadata):
            name = DatabaseKey(engine.url).describe()
            await greenlet_spawn(create_tables, engine.sync_engine, self.metadata, name)

    # -- sessions over several databases

    def session(self, **options: Any) -> AsyncSession:
        """Open a session that picks the engine of each statement by its tables' bind key.

        The key is ``metadata.info["bind_key"]``; without one it is ``"default"``. Tables that a
        database lacks are created before the first statement on one of its metadata's. A
        :class:`sessionmgr.routing.RoutedSession` tells what a commit over several databases is.

        :param options: options of the session; with ``bind`` it is for that engine alone.
        :return: a session; close it, or use it in an ``async with`` statement, which does.
        :raises EngineOptionsError: when an option is unknown, or is one of the manager's only.
        """
        maker = self._routed_maker
        if maker is None or options:
            maker = self._routed(options)
        return maker(**options)

    def scoped(self, scope: Callable[[], Hashable]) -> async_scoped_session[AsyncSession]:
        """Give an ``async_scoped_session`` of such sessions.

        A process that is forked begins with none: the parent's are the parent's.

        :param scope: gives what has one session: ``asyncio.current_task``, say.
        """
        check_scope(scope)
        routed = self._routed({})
        factory = async_sessionmaker(class_=routed.class_, **routed.kw)
        return forget_at_fork(lambda: async_scoped_session(factory, scopefunc=scope))

    def _find_engine(self, *wanted: Any) -> Engine:
        return self._route(self._loops.current(), *wanted)

    # -- units of work

    def begin(
        self, dburi: str | URL, *, write: bool = True, **kwargs: Any
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Open a session in a transaction, for an ``async with`` statement.

        The end of the block commits, an exception rolls back; both close the session.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param write: on SQLite, take the lock for writing at once (BEGIN IMMEDIATE). With False a
            block that begins by reading holds up no writer; should it write afterwards, and
            another have written since, it is told "database is locked". On other databases it
            changes nothing.
        :param kwargs: as for :meth:`session_factory`.
        """
        return AsyncTransaction(lambda: self.session_factory(dburi, **kwargs), write=write)

    async def run(
        self,
        dburi: str | URL,
        work: Callable[[AsyncSession], Awaitable[Result]],
        *,
        attempts: int = 5,
        write: bool = True,
        **kwargs: Any,
    ) -> Result:
        """Do work in a transaction, again with a new session when it failed by a passing error.

        Passing are deadlocks, serialization failures, locks not granted in time, and lost
        connections. After one of these the work may be done twice, should the connection be
        lost in the commit itself. Waits between attempts are random, growing from 10 ms to 1 s.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param work: is called with the session, and awaited; it must not commit by itself.
        :param attempts: how often to try at most.
        :param write: as for :meth:`begin`. With False, work that reads before it writes is done
            again when another transaction has written in between.
        :param kwargs: as for :meth:`session_factory`.
        :return: what ``work`` returned. Objects of the session are expired by its commit unless
            ``session_options`` has ``expire_on_commit=False``.
        :raises EngineOptionsError: when ``attempts`` is not a whole number of at least 1.
        """
        check_count("attempts", attempts)
        if not callable(work):
            raise EngineOptionsError(f"work must be callable, not {hide_secrets(work)}")
        return await run_async_transaction(
            lambda: self.begin(dburi, write=write, **kwargs),
            work,
            attempts,
            lambda: self._key(dburi).describe(),
        )

    # -- letting go

    async def invalidate(self, dburi: str | URL) -> None:
        """Forget one database: its engines, its sessionmakers, and that its tables are there.

        Sessions in use finish; then their connections close. Other databases are not touched.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :raises DatabaseURLError: when ``dburi`` cannot be read.
        :raises NoSuchBindError: when it is a bind key without an entry.
        """
        key = self._key(dburi)

        def forget(registry: LoopRegistry) -> None:
            entry = registry.find(key)
            if entry is not None:
                self._drop(registry, entry, tables=True)

        self._prepared.discard(key)
        await self._everywhere(forget)

    async def remove_bind(self, bind_key: str) -> None:
        """Take a database away from this process, as ``invalidate`` does, with its bind key.

        :param bind_key: a key of ``binds``, or an added one. Without it the resolver is asked.
        :raises NoSuchBindError: when it is none.
        """
        await self.invalidate(self._take_bind(bind_key))

    async def dispose(self) -> None:
        """Close the pools of this process. The manager stays usable, with new ones."""
        await self._everywhere(EngineRegistry.clear)

    async def close(self) -> None:
        """Close the pools of this process for good: no session can be opened any more.

        ``async with manager:`` closes those of the running loop only.
        """
        self._loops.close()
        await self._everywhere(EngineRegistry.close)

    async def _everywhere(self, action: Callable[[LoopRegistry], None]) -> None:
        """Do something with the registry of each loop, in that loop.

        Other threads' loops are not waited for: they may be waiting for this one.
        """
        for loop, registry in self._loops.others():
            try:
                if loop.is_running():
                    loop.call_soon_threadsafe(begin_task, action, registry)
                else:
                    action(registry)
            except RuntimeError:  # it was closed in between, and its pools with it
                if not loop.is_closed():
                    raise
        await greenlet_spawn(action, self._loops.current())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Close the pools of the running loop. Other loops are not touched, nor those to come."""
        await greenlet_spawn(EngineRegistry.clear, self._loops.current())

    # -- inside

    def _make_engine(self, *arguments: Any, **options: Any) -> Entry:
        entry = make_async_engine(*arguments, **options)
        entry.monitor.attach(asyncio.get_running_loop())
        return entry

    def _make_sessionmaker(self, **arguments: Any) -> Maker:
        return async_sessionmaker(**{**self._session_options, **arguments})

    def _make_short_lived(self) -> Maker:
        """Make sessions whose synchronous halves are of a class that is listened to."""
        options = self._session_options
        half = options.get("sync_session_class") or self._session_class.sync_session_class
        listened = type(half.__name__, (half,), {})
        event.listen(listened, "after_begin", leave_nothing)
        return self._make_sessionmaker(sync_session_class=listened)

    def _make_routed(self) -> Maker:
        options = self._session_options
        half = options.get("sync_session_class") or self._session_class.sync_session_class
        return self._make_sessionmaker(sync_session_class=routed(half, self._find_engine))

    def _prepare_tables(self, registry: Any, entry: Entry, metadata: MetaData) -> None:
        """Do as :meth:`_prepare` does, in the greenlet of a session's statement."""
        own = metadata is self.metadata
        if own and self._is_prepared(entry):
            return
        lock = registry.preparing(entry.key)
        await_only(lock.acquire())
        try:
            if not has_tables(entry.engine, metadata):
                create_tables(entry.engine, metadata, entry.key.describe())
            if own:
                self._mark_prepared(registry, entry)
        finally:
            lock.release()

    async def _prepare(self, registry: LoopRegistry, entry: Entry) -> None:
        if self._is_prepared(entry):
            return
        async with registry.preparing(entry.key):
            if not self._is_prepared(entry):
                await greenlet_spawn(self._create_missing, entry)
                self._mark_prepared(registry, entry)

    def _create_missing(self, entry: Entry) -> None:
        if not has_tables(entry.engine, self.metadata):
            create_tables(entry.engine, self.metadata, entry.key.describe())

"""Puts every database of a manager into a transaction that is rolled back, for tests."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from . import forking
from .base import BaseManager
from .errors import IsolationError
from .greenlets import greenlet_spawn, in_greenlet
from .isolation_database import IsolatedDatabase
from .isolation_pool import isolate_engine
from .schema import create_tables, has_tables
from .sqlite import is_memory
from .urls import hide_secrets

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from .engines import EngineEntry, EngineRegistry

    Manager = BaseManager[Any, Any]
    Entry = EngineEntry[Any, Any]
    Registry = EngineRegistry[Any, Any]

__all__ = ("Isolation", "isolated")

#: Seconds for another thread's event loop to roll a connection back.
_END_WAIT = 30.0


def isolated(*managers: Manager) -> Isolation:
    """Have everything undone that is done in a block on the databases of managers.

    ::

        with isolated(manager):
            ...

    Each database is in one transaction from its first use, whose connection all sessions, engines
    and threads share, also those that were there before; commits become savepoints. For an
    AsyncSessionManager use ``async with``.

    :param managers: SessionManagers and AsyncSessionManagers, without sessions in use.
    :raises IsolationError: when the block begins: when one is isolated already, or has connections
        checked out.
    """
    return Isolation(managers)


class Isolation:
    """A block, or the time between :meth:`begin` and :meth:`end`, that is undone."""

    def __init__(self, managers: tuple[Manager, ...]) -> None:
        """Do nothing yet.

        :param managers: the managers whose databases are isolated.
        """
        if not managers:
            raise IsolationError("isolated() takes the managers whose databases are isolated")
        self._managers = managers
        self._isolations: list[ManagerIsolation] = []

    def begin(self) -> None:
        """Isolate all databases; connect to none.

        :raises IsolationError: as for :func:`isolated`.
        """
        with ExitStack() as undo:
            for manager in self._managers:
                isolation = ManagerIsolation(manager)
                isolation.begin()
                undo.callback(isolation.restore)
                self._isolations.append(isolation)
            undo.pop_all()

    def end(self) -> None:
        """Undo everything.

        A connection that belongs to an event loop is rolled back in there, and closed where that
        loop is closed, or runs in this very thread.
        """
        with ExitStack() as each:
            while self._isolations:
                each.callback(self._isolations.pop(0).end)

    async def end_in_loop(self) -> None:
        """Undo everything, from a coroutine."""
        await greenlet_spawn(self.end)

    def __enter__(self) -> Self:
        if _running_loop() is not None and any(manager._in_loops for manager in self._managers):
            raise IsolationError(
                "an AsyncSessionManager's databases are rolled back by awaiting that: use 'async"
                " with isolated(...)' in a coroutine"
            )
        self.begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    async def __aenter__(self) -> Self:
        self.begin()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.end_in_loop()


class ManagerIsolation:
    """The isolated databases of one manager."""

    # _lock guards the lists.

    def __init__(self, manager: Manager) -> None:
        """Take note of what the manager believes now.

        :raises IsolationError: when it is no manager.
        """
        if not isinstance(manager, BaseManager):
            raise IsolationError(
                "isolated() takes SessionManagers and AsyncSessionManagers, not"
                f" {hide_secrets(manager)}"
            )
        self._manager = manager
        self._lock = forking.ProcessLock()
        #: registry, entry, its database
        self._databases: list[tuple[Registry, Entry, IsolatedDatabase]] = []
        self._restores: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Isolate the engines that there are, and have the manager isolate those to come."""
        manager = self._manager
        with manager._lock():
            if manager._isolation is not None:
                raise IsolationError(
                    f"{manager!r} is isolated already; one isolation of a manager at a time"
                )
            self._check_unused()
            self._prepared = set(manager._prepared)
            manager._isolation = self
        try:
            for registry in manager._registries():
                for entry in registry.entries():
                    self.add(registry, entry)
        except BaseException:
            self.restore()
            raise

    def _check_unused(self) -> None:
        for entry in self._manager._entries():
            used = entry.monitor.in_use
            if used:
                raise IsolationError(
                    f"database {entry.key.describe()}: connections checked out: {used}; what is"
                    " done on them would not be undone. End their sessions, or application"
                    " contexts, before the isolation begins"
                )

    def add(self, registry: Registry, entry: Entry) -> None:
        """Isolate an engine, unless it is."""
        with self._lock():
            if any(known is entry for _, known, _ in self._databases):
                return
            database = self._shared(registry, entry) or IsolatedDatabase(
                entry.key.describe(), is_async=entry.engine.dialect.is_async
            )
            before = entry.prepared
            restore = isolate_engine(
                entry.engine, database, entry.monitor, lambda: self._prepare(registry, entry)
            )
            registry.isolation = self
            self._databases.append((registry, entry, database))
            self._restores.append(lambda: self._restore(entry, before, restore))

    def _shared(self, registry: Registry, entry: Entry) -> IsolatedDatabase | None:
        """Find the connection that another engine of the same database has in the same loop.

        Two would not see each other's rows, and would wait for each other's locks.
        """
        if is_memory(entry.key.url):
            return None
        for home, other, database in self._databases:
            same = other.key.url == entry.key.url and other.requested == entry.requested
            if home is registry and same and database.home is forking.process:
                return database
        return None

    def _prepare(self, registry: Registry, entry: Entry) -> None:
        """Create the manager's tables where DDL could not be undone, and would end everything."""
        manager = self._manager
        commits = entry.engine.dialect.name in ("mysql", "mariadb")
        if not commits or not manager.metadata.tables or manager._is_prepared(entry):
            return
        if not has_tables(entry.engine, manager.metadata):
            create_tables(entry.engine, manager.metadata, entry.key.describe())
        manager._mark_prepared(registry, entry)

    def _restore(self, entry: Entry, prepared: bool, restore: Callable[[], None]) -> None:
        restore()
        if entry.engine.dialect.name not in ("mysql", "mariadb"):  # else its tables are there yet
            entry.prepared = prepared

    def restore(self) -> None:
        """Put the engines back, and what the manager believes of its tables."""
        manager = self._manager
        with self._lock(), manager._lock():
            manager._isolation = None
            for restore in self._restores:
                restore()
            manager._prepared = self._prepared
            for registry in manager._registries():
                registry.forget_tables()
                registry.isolation = None

    def end(self) -> None:
        """Undo everything; in a greenlet where there is a loop to wait for."""
        try:
            with ExitStack() as each:
                for database in {id(d): d for _, _, d in self._databases}.values():
                    each.callback(_end, database)
        finally:
            self.restore()

    def finish(self, registry: Registry) -> None:
        """Undo what was done in an event loop that ends, in there."""
        for home, _, database in self._databases:
            if home is registry:
                _end(database)


def _end(database: IsolatedDatabase) -> None:
    if database.home is not forking.process:  # the parent's, who ends it
        return
    loop = database.loop
    here = loop is not None and loop is _running_loop()
    if loop is None or (here and in_greenlet()):
        database.end()
    elif here or loop.is_closed():  # nothing can be awaited; the server rolls back
        database.cut()
    elif loop.is_running():
        ending = asyncio.run_coroutine_threadsafe(_ended(database), loop)
        ending.result(_END_WAIT)
    else:
        loop.run_until_complete(_ended(database))


async def _ended(database: IsolatedDatabase) -> None:
    await greenlet_spawn(database.end)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None

"""The session of a request, committed before its response is sent."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastapi import Depends
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.requests import HTTPConnection  # noqa: TC002 - FastAPI reads the annotation
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from sessionmgr.base import BaseManager
from sessionmgr.manager import SessionManager
from sessionmgr.sqlite_transactions import WRITES

from .asking import Asking, Probe, ThreadAsking, check_seconds, in_thread
from .start import prepare_all
from .turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

    from sqlalchemy import URL

    from sessionmgr.stats import DatabaseStats
    from sessionmgr.urls import DatabaseKey

__all__ = ("RequestSessions", "Sessions")

#: Those that are to change nothing: https://www.rfc-editor.org/rfc/rfc9110#section-9.2.1
_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))

EngineT = TypeVar("EngineT", Engine, AsyncEngine)
SessionT = TypeVar("SessionT")
ManagerT = TypeVar("ManagerT", bound=BaseManager[Any, Any])


class RequestSessions(ABC, Generic[ManagerT, SessionT]):
    """What :class:`Sessions` and its async twin have in common."""

    def __init__(self, manager: ManagerT, *, start_timeout: float = 30.0) -> None:
        """Begin without dependencies; nothing is connected or created yet.

        :param manager: whose sessions the requests get. It is made where the application is,
            at module level, also for a server with many processes.
        :param start_timeout: seconds that :meth:`lifespan` gives the databases at the start.
        :raises EngineOptionsError: when that is not a positive number.
        """
        check_seconds("start_timeout", start_timeout)
        self._manager = manager
        self._start_timeout = start_timeout
        self._dependencies: dict[
            tuple[DatabaseKey, bool | None], Callable[..., Awaitable[SessionT]]
        ] = {}
        self._probes: dict[DatabaseKey, Probe] = {}

    def get(
        self, dburi: str | URL, *, write: bool | None = None
    ) -> Callable[..., Awaitable[SessionT]]:
        """Give the dependency on a database's session, for ``Depends``.

        All that depend on the same database in one request share its session. When the path
        operation returns, the session commits, before the response is sent: a commit that fails
        is an error of the request. When it raises, also an ``HTTPException``, the session rolls
        back. Both close it for good: who uses it later, in a streamed response or a background
        task, gets an ``InvalidRequestError``.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param write: on SQLite, take the lock for writing with the first statement, also where
            that reads, as ``begin`` does. Default: unless the request's method is a safe one (GET,
            HEAD, OPTIONS, TRACE) or it is a websocket, which may stay for long. On other
            databases it changes nothing.
        :return: the same callable in each call with the same arguments, so that it can be
            overridden in ``app.dependency_overrides``.
        :raises DatabaseURLError: when ``dburi`` cannot be read.
        :raises NoSuchBindError: when it is a bind key without an entry.
        """
        key = self._manager._key(dburi)
        found = self._dependencies.get((key, write))
        if found is None:
            made = _before_response(self._opener(key, write))
            found = self._dependencies.setdefault((key, write), made)
        return found

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Keep connections from now on, prepare the binds' tables, and close the pools at the end.

        For ``FastAPI(lifespan=sessions.lifespan)``, or as ``async with sessions.lifespan(app)``
        in a lifespan of the application's own. The manager stays usable: an application may be
        started again, as tests do.

        :param app: the application, which is not looked at.
        :raises DatabasesNotReadyError: when a bind's tables cannot be prepared in time, or at
            all; the application then does not start.
        """
        self._manager.mark_worker()
        try:
            binds = self._manager._binds.databases()
            await prepare_all(
                {key: self._prepare(key) for key in binds}, timeout=self._start_timeout
            )
            yield
        finally:
            await self._dispose()

    def _asked(self) -> list[Probe]:
        """List the probes of all binds, and of every other database that has an engine."""
        keys = dict.fromkeys(self._manager._binds.databases())
        keys.update(dict.fromkeys(self._manager._engines))
        return [self._probes.setdefault(key, Probe(key, self._ask)) for key in keys]

    def _pools(self, key: DatabaseKey) -> list[DatabaseStats]:
        """Give the numbers of a database's pools in this process."""
        found = self._manager.stats().databases
        return [numbers for numbers in found if numbers.database == key.name]

    @abstractmethod
    def _opener(
        self, key: DatabaseKey, write: bool | None
    ) -> Callable[..., AsyncIterator[SessionT]]:
        """Give the generator function that opens, commits and closes a database's session."""

    @abstractmethod
    def _prepare(self, key: DatabaseKey) -> asyncio.Future[None]:
        """Begin to prepare a database's tables."""

    @abstractmethod
    def _ask(self, key: DatabaseKey) -> Asking:
        """Begin to ask a database whether it answers."""

    @abstractmethod
    async def _dispose(self) -> None:
        """Close the pools."""


def _before_response(opener: Callable[..., AsyncIterator[Any]]) -> Callable[..., Awaitable[Any]]:
    """Give a dependency on a generator function which ends before the response is sent.

    Used by itself, a generator ends after it: https://fastapi.tiangolo.com/tutorial/dependencies/
    dependencies-with-yield/#early-exit-and-scope. Users would have to say ``scope="function"`` at
    each ``Depends``, and a commit that fails after a 200 goes unnoticed where one forgets.
    """
    around_the_function = Depends(opener, scope="function")

    async def session(opened: Any = around_the_function) -> Any:
        return opened

    return session


class Sessions(RequestSessions[SessionManager, Session]):
    """Sessions of a :class:`~sessionmgr.SessionManager` as dependencies of path operations.

    They block: for path operations that are no coroutines (``def``), which FastAPI runs in
    threads. As many requests at once have a session on a database as its pool has connections;
    others wait for them, for ``pool_timeout`` seconds at most, and hold no thread meanwhile.
    """

    def __init__(self, manager: SessionManager, *, start_timeout: float = 30.0) -> None:
        """Begin without dependencies, as :class:`RequestSessions` does."""
        super().__init__(manager, start_timeout=start_timeout)
        self._turns = Turns()

    def _opener(
        self, key: DatabaseKey, write: bool | None
    ) -> Callable[..., AsyncIterator[Session]]:
        @contextmanager
        def begun(connection: HTTPConnection) -> Iterator[Session]:
            engine, factory = self._manager.create_session(key)
            self._manager.prepare_models(engine)
            bind = for_request(engine, connection, write)
            with factory(bind=bind, **closing_for_good(factory.kw)) as session:
                yield session
                session.commit()

        # A websocket stays for long, and holds no connection where it commits after each message.
        async def open_session(connection: HTTPConnection) -> AsyncIterator[Session]:
            async with AsyncExitStack() as ends:
                if connection.scope["type"] == "http":
                    turn = self._turns.take(key, lambda: self._manager.get_engine(key))
                    await ends.enter_async_context(turn)
                session = contextmanager_in_threadpool(begun(connection))
                yield await ends.enter_async_context(session)

        return open_session

    def _prepare(self, key: DatabaseKey) -> asyncio.Future[None]:
        def prepare() -> None:
            self._manager.prepare_models(self._manager.get_engine(key))

        return asyncio.wrap_future(in_thread(prepare))

    def _ask(self, key: DatabaseKey) -> Asking:
        return ThreadAsking(lambda: self._manager.get_engine(key))

    async def _dispose(self) -> None:
        await asyncio.to_thread(self._manager.dispose)


def for_request(engine: EngineT, connection: HTTPConnection, write: bool | None) -> EngineT:
    """Give the engine in the form in which a request's session has it.

    :param engine: an Engine or AsyncEngine.
    :param connection: the request, or a websocket.
    :param write: as for :meth:`RequestSessions.get`.
    """
    if engine.dialect.name != "sqlite":
        return engine
    if write is None:
        write = connection.scope.get("method", "GET") not in _SAFE_METHODS
    return engine.execution_options(**{WRITES: True}) if write else engine


def closing_for_good(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the option by which a session that was closed cannot be used again.

    Otherwise it would take a connection again, in the midst of a streamed response, say, which
    nobody gives back.

    :param options: of the sessionmaker. What they say counts.
    """
    return {} if "close_resets_only" in options else {"close_resets_only": False}

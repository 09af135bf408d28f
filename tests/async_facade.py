"""Runs the cases of SessionManager for AsyncSessionManager: each in one of SQLAlchemy's greenlets.

In there the synchronous halves of AsyncEngine and AsyncSession work as any Engine and Session do,
and the event loop goes on while they wait: a test needs neither proxies nor a copy with ``await``
in it. What it does in threads it does in tasks then, and a forked child has a loop of its own.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine

from sessionmgr.asyncio import AsyncSessionManager
from sessionmgr.greenlets import await_only, greenlet_spawn, in_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator

    from sqlalchemy import URL, Engine
    from sqlalchemy.ext.asyncio import async_sessionmaker
    from sqlalchemy.orm import Session
    from typing_extensions import Self

    from sessionmgr import SessionManager

    ManagerClass = type[SessionManager | "BlockingManager"]

T = TypeVar("T")

_loop: asyncio.AbstractEventLoop | None = None
"""The loop of the test that is running, for what it does before and after its greenlet."""


@contextmanager
def event_loop() -> Iterator[None]:
    """Have a loop for one test; at its end no task is left in it."""
    global _loop
    _loop = loop = asyncio.new_event_loop()
    try:
        yield
        left = asyncio.all_tasks(loop)
        if left:  # those that close what was collected may be at work yet
            loop.run_until_complete(asyncio.wait(left, timeout=10.0))
        left = asyncio.all_tasks(loop)
        assert not left, f"tasks left behind: {left}"
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        _loop = None


def in_test_loop(function: Callable[[], T]) -> T:
    """Call a function in a greenlet, in the loop of :func:`event_loop`."""
    assert _loop is not None
    return _loop.run_until_complete(greenlet_spawn(function))


def in_new_loop(function: Callable[[], T]) -> T:
    """Call a function in a greenlet, in a loop of its own: in a child that was just forked."""

    async def main() -> T:
        return await greenlet_spawn(function)

    return asyncio.run(main())


def in_tasks(functions: Iterable[Callable[[], T]], timeout: float) -> list[T]:
    """Call each function in a task of its own, all at once, and return their results.

    :param timeout: seconds until all must have returned.
    :raises BaseException: the first that one of them raised.
    """

    async def gather() -> list[T]:
        calls = (greenlet_spawn(function) for function in functions)
        return await asyncio.wait_for(asyncio.gather(*calls), timeout)

    return await_only(gather())


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine, in a greenlet or before and after the test's."""
    if in_greenlet():
        return await_only(coroutine)
    assert _loop is not None
    return _loop.run_until_complete(coroutine)


def call_in_coroutine(function: Callable[[], T]) -> T:
    """Call what users call in coroutines, where no greenlet awaits anything for it."""

    async def call() -> T:
        return function()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return wait_for(call())
    return wait_for(call()) if in_greenlet() else function()


def twin(url: str | URL) -> str | URL:
    """Return a URL with an asynchronous driver, or the one that is chosen where none is named."""
    if not isinstance(url, str):
        return url.set(drivername=str(twin(f"{url.drivername}:")).rstrip(":"))
    return re.sub(r"(sqlite|mysql|postgres(?:ql)?)(?:\+(\w+))?(?=:)", _twin_dialect, url, count=1)


def _twin_dialect(found: re.Match[str]) -> str:
    drivers = {"sqlite": "aiosqlite", "mysql": "asyncmy", "psycopg2": "psycopg"}
    return f"{found[1]}+{drivers.get(found[2]) or drivers.get(found[1], 'asyncpg')}"


@dataclass(frozen=True)
class SessionMaker:
    """An async_sessionmaker that gives the synchronous halves."""

    maker: async_sessionmaker[Any]

    def __call__(self, **arguments: Any) -> Session:
        return self.maker(**arguments).sync_session

    @property
    def kw(self) -> dict[str, Any]:
        """The arguments of each session."""
        return self.maker.kw


class BlockingManager:
    """An AsyncSessionManager with the methods of a SessionManager."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.manager = AsyncSessionManager(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Give what both kinds of manager have: ``stats``, ``prepared``, ``mark_worker``..."""
        return getattr(self.manager, name)

    def __reduce__(self) -> tuple[Any, ...]:
        make, (_, configuration) = self.manager.__reduce__()
        return make, (type(self), configuration)

    def __enter__(self) -> Self:
        wait_for(self.manager.__aenter__())
        return self

    def __exit__(self, *exception: object) -> None:
        wait_for(self.manager.close())

    def get_engine(self, dburi: str | URL, **kwargs: Any) -> Engine:
        return call_in_coroutine(lambda: self.manager.get_engine(dburi, **kwargs)).sync_engine

    def create_session(self, dburi: str | URL, *args: Any, **kwargs: Any) -> tuple[Engine, Any]:
        engine, maker = call_in_coroutine(
            lambda: self.manager.create_session(dburi, *args, **kwargs)
        )
        return engine.sync_engine, SessionMaker(maker)

    def session_factory(self, dburi: str | URL, **kwargs: Any) -> Session:
        return wait_for(self.manager.session_factory(dburi, **kwargs)).sync_session

    def session(self, **options: Any) -> Session:
        return call_in_coroutine(lambda: self.manager.session(**options)).sync_session

    def remove_bind(self, bind_key: str) -> None:
        wait_for(self.manager.remove_bind(bind_key))

    def prepare_models(self, engine: Engine) -> None:
        own = (entry.bind for entry in self._registry.entries() if entry.engine is engine)
        wait_for(self.manager.prepare_models(next(own, None) or AsyncEngine(engine)))

    @contextmanager
    def begin(self, dburi: str | URL, **kwargs: Any) -> Iterator[Session]:
        context = self.manager.begin(dburi, **kwargs)
        session = wait_for(context.__aenter__())
        try:
            yield session.sync_session
        except BaseException as error:
            if not wait_for(context.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            wait_for(context.__aexit__(None, None, None))

    def run(self, dburi: str | URL, work: Callable[[Session], T], **kwargs: Any) -> T:
        async def awaited(session: Any) -> T:
            return await greenlet_spawn(work, session.sync_session)

        return wait_for(self.manager.run(dburi, awaited, **kwargs))

    def invalidate(self, dburi: str | URL) -> None:
        wait_for(self.manager.invalidate(dburi))

    def dispose(self) -> None:
        wait_for(self.manager.dispose())

    def close(self) -> None:
        wait_for(self.manager.close())

    @property
    def _registry(self) -> Any:
        return call_in_coroutine(self.manager._loops.current)

    @property
    def _engines(self) -> dict[Any, Engine]:
        return {key: engine.sync_engine for key, engine in self.manager._engines.items()}

    @property
    def _sessions(self) -> dict[Any, SessionMaker]:
        return {key: SessionMaker(maker) for key, maker in self.manager._sessions.items()}

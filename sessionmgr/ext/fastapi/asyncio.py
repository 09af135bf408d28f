"""The awaited session of a request: the async twin of the sessions."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING

from fastapi.requests import HTTPConnection  # noqa: TC002 - FastAPI reads the annotation
from sqlalchemy.ext.asyncio import AsyncSession

from sessionmgr.asyncio import AsyncSessionManager

from .asking import QUESTION, Asking, asked
from .sessions import RequestSessions, closing_for_good, for_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from sessionmgr.urls import DatabaseKey

__all__ = ("AsyncSessions",)


class AsyncSessions(RequestSessions[AsyncSessionManager, AsyncSession]):
    """Sessions of an :class:`~sessionmgr.asyncio.AsyncSessionManager` as dependencies.

    For path operations that are coroutines (``async def``).
    """

    def _opener(
        self, key: DatabaseKey, write: bool | None
    ) -> Callable[..., AsyncIterator[AsyncSession]]:
        async def open_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
            engine, factory = self._manager.create_session(key)
            await self._manager.prepare_models(engine)
            bind = for_request(engine, connection, write)
            async with factory(bind=bind, **closing_for_good(factory.kw)) as session:
                yield session
                await session.commit()

        return open_session

    def _prepare(self, key: DatabaseKey) -> asyncio.Future[None]:
        async def prepare() -> None:
            await self._manager.prepare_models(self._manager.get_engine(key))

        return asyncio.ensure_future(prepare())

    def _ask(self, key: DatabaseKey) -> Asking:
        return TaskAsking(lambda: self._manager.get_engine(key))

    async def _dispose(self) -> None:
        await self._manager.dispose()


class TaskAsking(Asking):
    """Asks a database in a task of the running loop."""

    def __init__(self, get_engine: Callable[[], AsyncEngine]) -> None:
        """Begin to ask.

        :param get_engine: gives the engine.
        """
        super().__init__()
        self._get_engine = get_engine
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._question())

    def is_over(self) -> bool:
        """Tell whether it has ended, or is another loop's."""
        return self._task.done() or self._loop is not asyncio.get_running_loop()

    def answer(self) -> asyncio.Future[float]:
        """Give the future seconds that it took."""
        return self._task

    def give_up(self) -> None:
        """Break the connection off, or cancel the task that is still connecting.

        In the midst of an answer a broken connection is the lesser evil: psycopg waits seconds for
        a server to cancel its query.
        """
        if not self.break_off():
            self._task.cancel()

    async def _question(self) -> float:
        begun = perf_counter()
        asked.set(self)
        async with self._get_engine().connect() as connection:
            await connection.execute(QUESTION)
            self.note(None)
        return perf_counter() - begun

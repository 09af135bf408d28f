"""Lets as many requests at once have sessions on a database as its pool has connections."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import RunVar
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sqlalchemy import Engine

    from sessionmgr.urls import DatabaseKey

__all__ = ("Turns",)


class Turns:
    """Has requests wait for a connection before they take a thread.

    FastAPI calls path operations, and checks what they return, in a limited number of threads (40).
    If these all wait for a connection, then those who have one get no thread to go on in, and
    nobody gets anything until ``pool_timeout``. Requests that wait here hold neither.
    """

    def __init__(self) -> None:
        # an event loop's own; requests of several loops in one process share the pool unseen
        self._turns: RunVar[dict[DatabaseKey, _Turn]] = RunVar("sessionmgr_turns")

    @asynccontextmanager
    async def take(self, key: DatabaseKey, get_engine: Callable[[], Engine]) -> AsyncIterator[None]:
        """Have a turn on a database for the time of a block.

        :param key: the database.
        :param get_engine: gives its engine; called in a thread, for it may import a driver.
        :raises sqlalchemy.exc.TimeoutError: when none was free for as long as the pool waits.
        """
        turns = self._turns.get(None)
        if turns is None:
            turns = {}
            self._turns.set(turns)
        turn = turns.get(key)
        if turn is None:
            engine = await run_in_threadpool(get_engine)
            turn = turns.setdefault(key, _Turn(key, engine))
        async with turn.taken():
            yield


class _Turn:
    """The turns on one database: as many as its pool has connections at most."""

    def __init__(self, key: DatabaseKey, engine: Engine) -> None:
        self._key = key
        self._semaphore: anyio.Semaphore | None = None
        pool: Any = engine.pool
        # Pools of other classes have nobody wait. max_overflow has no public name; -1 is no limit.
        if isinstance(pool, QueuePool) and pool._max_overflow >= 0:
            self._timeout = pool.timeout()
            self._count = pool.size() + pool._max_overflow
            self._semaphore = anyio.Semaphore(self._count)

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        if self._semaphore is None:
            yield
            return
        try:
            with anyio.fail_after(self._timeout):
                await self._semaphore.acquire()
        except TimeoutError:
            raise PoolTimeoutError(
                f"database {self._key.describe()}: {self._count} requests have all connections of"
                f" the pool, and none ended in {self._timeout:g} s (pool_timeout). Make pool_size"
                " or max_overflow larger, or the requests shorter"
            ) from None
        try:
            yield
        finally:
            self._semaphore.release()

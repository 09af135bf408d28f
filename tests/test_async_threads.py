"""Threads with an event loop each, on one manager at the same time."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, event, func, insert, select

from sessionmgr import AsyncSessionManager
from tests.async_helpers import ASYNC_DRIVERS, AsyncDatabase, make_async_database
from tests.concurrency import in_threads
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.servers import Database

THREADS = 8

TASKS = 3
"""Tasks of each loop that use one database at the same time: more than its pool has connections."""

TINY = {"pool_size": 2, "max_overflow": 0}

MEETING = 60.0
"""Seconds that threads wait for each other before they give up."""


class Loops:
    """What happens in the loops of :data:`THREADS` threads, on one manager and two databases."""

    def __init__(self, databases: list[AsyncDatabase]) -> None:
        self.databases = databases
        self.made: list[Engine] = []
        self.emitted: list[int] = []
        self.loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
        self.meeting = threading.Barrier(THREADS)
        metadata = MetaData()
        self.table = Table("once", metadata, Column("id", Integer, primary_key=True))
        event.listen(
            self.table, "before_create", lambda *_, **__: self.emitted.append(threading.get_ident())
        )
        self.manager = AsyncSessionManager(
            self.made.append, pooling="always", metadata=metadata, engine_options=TINY
        )

    async def use(self, database: AsyncDatabase) -> AsyncEngine:
        """Add a row, and return the engine."""
        async with self.manager.begin(database.url) as session:
            await session.execute(insert(self.table))
        return self.manager.get_engine(database.url)

    async def run(self) -> list[int]:
        """Use both databases, and return how many connections they have while all loops run."""
        self.loops.append(weakref.ref(asyncio.get_running_loop()))
        used = await asyncio.gather(*(self.use(d) for d in self.databases * TASKS))
        assert len(set(used)) == len(self.databases)
        await asyncio.to_thread(self.meeting.wait, MEETING)
        connected = [len(database.connections()) for database in self.databases]
        assert sum(stats.connects for stats in self.manager.stats().databases) == sum(connected)
        await asyncio.to_thread(self.meeting.wait, MEETING)
        return connected

    async def count(self) -> list[int | None]:
        """Return how many rows there are."""
        counts = []
        for database in self.databases:
            async with await self.manager.session_factory(database.url) as session:
                counts.append(await session.scalar(select(func.count()).select_from(self.table)))
        return counts


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
def test_threads_with_loops_have_engines_each_and_tables_once(
    driver: str, make_database: Callable[..., Database], tmp_path: Path
) -> None:
    """Eight threads with a loop each: an engine per loop and database, one CREATE TABLE for all."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    loops = Loops([make_async_database(driver, make_database, folder) for folder in folders])
    connected = in_threads([lambda: asyncio.run(loops.run())] * THREADS, timeout=2 * MEETING)
    assert len(set(map(tuple, connected))) == 1
    assert all(THREADS <= count <= 2 * THREADS for count in connected[0])
    assert len(loops.emitted) == len(loops.databases)
    assert len(loops.made) == len(loops.databases) * THREADS

    assert loops.manager.stats().databases == ()
    wait_until(lambda: not any(database.connections() for database in loops.databases))
    assert asyncio.run(loops.count()) == [THREADS * TASKS] * len(loops.databases)
    loops.made.clear()
    gc.collect()
    assert [loop for loop in loops.loops if loop() is not None] == []

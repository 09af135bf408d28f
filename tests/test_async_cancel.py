"""Cancellation, at any await: nothing stays checked out or in a transaction, no lock is held."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, insert, select, text, update

from sessionmgr import AsyncSessionManager
from tests.async_helpers import ASYNC_DRIVERS, make_async_database, scalar
from tests.helpers import wait_until
from tests.items import Item, ItemBase, open_transactions
from tests.sqlite_helpers import ADD, can_write, counted, make_file, manage_async

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncSession

    from tests.servers import Database

ROWS = 4


async def write(session: AsyncSession, row: int) -> None:
    """Lock a row for some round trips."""
    await session.execute(update(Item).where(Item.id == row).values(count=Item.count + 1))
    await session.execute(text("SELECT 1"))


async def in_begin(manager: AsyncSessionManager, url: URL, row: int) -> None:
    """Write in a transaction."""
    async with manager.begin(url) as session:
        await write(session, row)


async def in_run(manager: AsyncSessionManager, url: URL, row: int) -> None:
    """Write in a transaction that is done again."""
    await manager.run(url, lambda session: write(session, row))


async def in_session(manager: AsyncSessionManager, url: URL, row: int) -> None:
    """Write in a savepoint of a session, and have it rolled back with the rest."""
    async with await manager.session_factory(url) as session:
        async with session.begin_nested():
            await write(session, row)
        await session.execute(text("SELECT 1"))


WAYS = (in_begin, in_run, in_session)


async def cancel_again_and_again(url: URL, times: int, left: Callable[[], set[int]]) -> None:
    """Cancel units of work at random moments, and look at what they leave behind.

    :param times: how many to cancel.
    :param left: gives the server's connections that are in a transaction.
    """
    manager = AsyncSessionManager(pooling="always", metadata=ItemBase.metadata)
    async with manager:
        async with manager.begin(url) as session:
            await session.execute(
                insert(Item), [{"id": row, "name": f"{row}"} for row in range(1, ROWS + 1)]
            )
        began = monotonic()
        await asyncio.gather(*(way(manager, url, 1) for way in WAYS))
        usual = monotonic() - began
        cancelled = 0
        while cancelled < times:
            tasks = [
                asyncio.ensure_future(random.choice(WAYS)(manager, url, row))
                for row in range(1, ROWS + 1)
            ]
            for task in tasks:
                asyncio.get_running_loop().call_later(random.random() * usual, task.cancel)
            await asyncio.wait(tasks)
            cancelled += sum(task.cancelled() for task in tasks)
            assert not [task for task in tasks if not task.cancelled() and task.exception()]
        await asyncio.to_thread(wait_until, lambda: not left())
        [stats] = manager.stats().databases
        assert stats.checked_out == 0
        async with manager.begin(url) as session:  # no lock is held
            await session.execute(update(Item).values(count=0))
            assert list(await session.scalars(select(Item.count))) == [0] * ROWS


@pytest.mark.parametrize("times", [80, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
def test_cancelled_units_of_work(
    driver: str, times: int, make_database: Callable[..., Database], tmp_path: Path
) -> None:
    """Units of work are cancelled at random, four at a time: one thousand of them in the soak."""
    there = make_async_database(driver, make_database, tmp_path)
    database = there.database
    asyncio.run(
        cancel_again_and_again(
            there.url, times, lambda: set() if database is None else open_transactions(database)
        )
    )
    # what the drivers were just connecting is the garbage collector's
    wait_until(lambda: gc.collect() >= 0 and not there.connections())


def test_cancelled_writer_lets_the_lock_go(tmp_path: Path) -> None:
    """A task that has written is cancelled in the midst of a statement: others need not wait.

    Its error is kept, and with it the driver's cursor, but not SQLite's lock.
    """
    path = tmp_path / "one.db"
    make_file(path)
    asked, answer = threading.Event(), threading.Event()

    def wait() -> int:
        asked.set()
        return int(answer.wait(30.0))

    async def add(manager: AsyncSessionManager) -> None:
        async with manager.begin(f"sqlite+aiosqlite:///{path}") as session:
            connection = await (await session.connection()).get_raw_connection()
            driver: Any = connection.driver_connection
            await driver.create_function("wait", 0, wait)
            await session.execute(ADD)
            await session.execute(text("SELECT wait()"))

    async def main() -> None:
        async with manage_async() as manager:
            task = asyncio.ensure_future(add(manager))
            await asyncio.to_thread(asked.wait, 30.0)
            task.cancel()
            answer.set()
            with pytest.raises(asyncio.CancelledError) as kept:
                await task
            assert can_write(path)
            assert kept.traceback
            assert counted(path) == 0

    asyncio.run(main())


async def let_go(manager: AsyncSessionManager, way: str, url: URL) -> None:
    """Have a manager close the running loop's pools."""
    if way == "async with":
        async with manager:
            pass
    elif way == "invalidate":
        await manager.invalidate(url)
    else:
        await getattr(manager, way)()


@pytest.mark.parametrize("way", ["async with", "close", "dispose", "invalidate"])
@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
def test_cancelled_while_it_closes_the_pools(
    driver: str, way: str, make_database: Callable[..., Database], tmp_path: Path
) -> None:
    """The loop's main task is cancelled as it closes the pools: no connection is left open."""
    there = make_async_database(driver, make_database, tmp_path)
    pools: list[Any] = []  # kept, for the collector might close what is left of them

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        manager = AsyncSessionManager(pooling="always", metadata=ItemBase.metadata)
        sessions = [await manager.session_factory(there.url) for _ in range(3)]
        await asyncio.gather(*map(scalar, sessions))
        for session in sessions:
            await session.close()
        pools.append(manager.get_engine(there.url).pool)
        assert pools[0].checkedin() == 3
        event.listen(pools[0], "close", lambda *_: task.cancel(), once=True)
        await let_go(manager, way, there.url)
        await asyncio.sleep(0)  # where a driver closes at once, this is what is cancelled

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    wait_until(lambda: not there.connections(), 10.0)

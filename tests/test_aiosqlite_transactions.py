"""Transactions on SQLite through aiosqlite: the same as through the blocking driver."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import MetaData, inspect, text
from sqlalchemy.exc import OperationalError

from sessionmgr import AsyncSessionManager
from sessionmgr.transient import is_contention
from tests.concurrency import in_children
from tests.sqlite_helpers import ADD, READ, another, can_write, counted, manage_async

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncSession


pytest_plugins = ["tests.sqlite_fixtures"]


def run_async(path: Path, work: Callable[[Any], Any], **options: Any) -> Any:
    """Call ``await work(engine)`` with a manager's engine, in a loop of its own."""

    async def use() -> Any:
        async with manage_async(**options) as manager:
            engine = manager.get_engine(f"sqlite+aiosqlite:///{path}")
            return await asyncio.wait_for(work(engine), 30)

    return asyncio.run(use())


def test_aiosqlite_has_the_same_transactions(path: Path) -> None:
    """DDL and savepoints belong to the transaction; reads begin deferred, and see one state."""

    async def work(engine: Any) -> None:
        async with engine.connect() as connection:
            assert await connection.scalar(READ) == 0
            assert can_write(path)
            with another(path) as other:
                other.execute("UPDATE counter SET n = 5")
            assert await connection.scalar(READ) == 0
            with pytest.raises(OperationalError, match="database is locked") as caught:
                await connection.execute(ADD)
            assert is_contention(caught.value)
            await connection.rollback()
            await connection.execute(text("CREATE TABLE made (a)"))
            assert not can_write(path)
            await connection.rollback()
            async with connection.begin_nested():
                await connection.execute(ADD)
            await connection.rollback()
            rows = [{"a": 1}, {"a": 2}]
            await connection.execute(text("UPDATE counter SET n = n + :a"), rows)
            assert not can_write(path)
            await connection.commit()
            names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
            assert names == ["counter"]
            assert await connection.scalar(READ) == 8

    run_async(path, work)


def test_aiosqlite_streams_within_a_transaction(path: Path) -> None:
    """A streamed result may be what a transaction begins with."""

    async def work(engine: Any) -> list[int]:
        async with engine.connect() as connection:
            with another(path) as other:
                other.execute("INSERT INTO counter VALUES (1), (2)")
            result = await connection.stream(text("SELECT n FROM counter ORDER BY n"))
            found = [n async for n in result.scalars()]
            with another(path) as other:
                other.execute("DELETE FROM counter")
            assert await connection.scalar(text("SELECT count(*) FROM counter")) == 3
            return found

    assert run_async(path, work) == [0, 1, 2]


def test_aiosqlite_begins_nothing_in_autocommit(path: Path) -> None:
    """In autocommit, each statement is a transaction of its own."""

    async def work(engine: Any) -> None:
        async with engine.connect() as connection:
            connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(ADD)
            assert counted(path) == 1

    run_async(path, work)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit is new in Python 3.12")
@pytest.mark.parametrize("autocommit", [False, True])
def test_aiosqlite_keeps_the_drivers_new_transactions(path: Path, autocommit: bool) -> None:
    """Where the driver's ``autocommit`` is set, a commit is a commit, and each statement is one."""

    async def work(engine: Any) -> None:
        async with engine.connect() as connection:
            await connection.execute(ADD)
            assert counted(path) == int(autocommit)
            await connection.commit()
            assert counted(path) == 1

    run_async(path, work, connect_args={"autocommit": autocommit})


def test_aiosqlite_tasks_share_a_memory_database() -> None:
    """Tasks at the same time are in one transaction, on one connection, and none meets an error.

    The first who ends it commits what there is by then, his own row at least. A later one's may
    be rolled back by another's end, which is all that is promised.
    """
    used: set[Any] = set()

    async def use() -> int:
        async with manage_async() as manager:
            engine = manager.get_engine("sqlite+aiosqlite://")

            async def add() -> None:
                async with engine.connect() as connection:
                    await connection.execute(text("INSERT INTO made VALUES (1)"))
                    used.add((await connection.get_raw_connection()).driver_connection)
                    await connection.commit()

            async with engine.begin() as connection:
                await connection.execute(text("CREATE TABLE made (a)"))
            await asyncio.gather(*(add() for _ in range(8)))
            [stats] = manager.stats().databases
            assert stats.connects == len(used) == 1
            assert (stats.checked_out, stats.idle) == (0, 1)
            async with engine.connect() as connection:
                return await connection.scalar(text("SELECT count(*) FROM made")) or 0

    assert 1 <= asyncio.run(asyncio.wait_for(use(), 30)) <= 8
    [connection] = used
    with pytest.raises(ValueError, match="no active connection"):  # it was closed
        _ = connection.in_transaction


async def count_up(session: AsyncSession) -> None:
    """Read the counter, and write it back with one more."""
    count = await session.scalar(READ)
    assert count is not None
    await session.execute(text("UPDATE counter SET n = :n"), {"n": count + 1})


@pytest.mark.parametrize(
    "each", [50, pytest.param(1000, marks=(pytest.mark.soak, pytest.mark.timeout(300)))]
)
@pytest.mark.parametrize("write", [True, False])
def test_no_update_is_lost(path: Path, each: int, write: bool) -> None:
    """8 processes read a counter and write it back, through ``run``: all of it counts."""
    attempts = 5 if write else 1000  # deferred ones lose a race as often as not
    each = each if write else each // 10

    async def use() -> None:
        manager = AsyncSessionManager(metadata=MetaData(), pooling="always")
        for _ in range(each):
            await manager.run(
                f"sqlite+aiosqlite:///{path}", count_up, attempts=attempts, write=write
            )

    in_children([lambda: asyncio.run(use())] * 8, timeout=280)
    assert counted(path) == 8 * each

"""Forks in a running event loop: the parent's loop and connections go on, the child has its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import URL, delete, select

from sessionmgr import AsyncSessionManager, ForkedSQLiteError
from tests.async_helpers import SERVER_DRIVERS, identity, make_async_database
from tests.fork_helpers import fork, run_program, run_program_for_each
from tests.items import Item, ItemBase

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncSession

    from tests.servers import Database

WAYS = ("os.fork", "multiprocessing", "billiard", "nested")

STATES = ("idle", "transaction")
"""What the parent's connection is at the fork."""


async def names(session: AsyncSession) -> list[str]:
    """Return the names of the items there are."""
    return sorted(await session.scalars(select(Item.name)))


async def use_own(manager: AsyncSessionManager, url: URL) -> dict[str, Any]:
    """In a child, open two sessions one after the other."""
    async with await manager.session_factory(url) as session:
        first, there = await identity(session), await names(session)
    async with await manager.session_factory(url) as session:
        second = await identity(session)
    return {"ids": {first, second}, "names": there, "forked": manager.forked}


async def fork_and_go_on(url: URL, state: str, way: str) -> tuple[Any, dict[str, Any]]:
    """Fork while the connection is in a state, let the child end, and go on in the parent."""
    async with AsyncSessionManager(pooling="always", metadata=ItemBase.metadata) as manager:
        async with manager.begin(url) as session:
            await session.execute(delete(Item))
        session = await manager.session_factory(url)
        before = await identity(session)
        if state == "transaction":
            session.add(Item(name="uncommitted"))
            await session.flush()
        else:
            await session.close()
        child = fork(way, lambda: asyncio.run(use_own(manager, url))).end()
        assert child.noise == ""
        after = await identity(session)
        await session.commit()
        await session.close()
        async with manager.begin(url) as session:
            left = await names(session)
        return child.result, {"before": before, "after": after, "names": left}


def run(url: URL, state: str, way: str) -> tuple[Any, dict[str, Any]]:
    """Run the above in an event loop."""
    return asyncio.run(fork_and_go_on(url, state, way))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("driver", SERVER_DRIVERS)
def test_child_has_its_own_loop_and_connection_and_parent_keeps_its(
    driver: str, state: str, make_database: Callable[..., Database], tmp_path: Path
) -> None:
    """However a process forks in a coroutine, neither touches the other's connection."""
    url = make_async_database(driver, make_database, tmp_path).url
    for way, (result, parent) in run_program_for_each(WAYS, run, url, state).items():
        assert parent["after"] == parent["before"], way
        assert parent["names"] == (["uncommitted"] if state == "transaction" else [])
        open_here = {parent["before"]}
        for child in result if isinstance(result, list) else [result]:
            assert child["forked"]
            assert child["names"] == []
            assert not child["ids"] & open_here


async def share_a_file(url: URL, held: bool) -> tuple[Any, list[str]]:
    """Fork with a connection to a SQLite file that is idle, or in use; return both sides' rows."""
    async with AsyncSessionManager(pooling="always", metadata=ItemBase.metadata) as manager:
        session = await manager.session_factory(url)
        session.add(Item(name="before"))
        await session.commit()
        if held:
            await names(session)
        else:
            await session.close()
        child = fork("os.fork", lambda: asyncio.run(add(manager, url, "of the child"))).end()
        await session.close()
        await add(manager, url, "after")
        async with await manager.session_factory(url) as session:
            return child.result, await names(session)


async def add(manager: AsyncSessionManager, url: URL, name: str) -> str | None:
    """Add a row; return the error that forbids it."""
    try:
        async with manager.begin(url) as session:
            session.add(Item(name=name))
    except ForkedSQLiteError as error:
        return str(error)
    return None


def test_child_may_use_a_file_that_was_idle(tmp_path: Path) -> None:
    """The parent's idle connection is closed before the fork, and nothing is lost."""
    url = URL.create("sqlite+aiosqlite", database=str(tmp_path / "file.db"))
    refused, left = run_program(run_share, url, False)
    assert refused is None
    assert left == ["after", "before", "of the child"]


def test_child_is_refused_a_file_that_was_in_use(tmp_path: Path) -> None:
    """SQLite would take the parent's locks for the child's own."""
    url = URL.create("sqlite+aiosqlite", database=str(tmp_path / "file.db"))
    refused, left = run_program(run_share, url, True)
    assert "End sessions on the file before forking" in refused
    assert left == ["after", "before"]


def run_share(url: URL, held: bool) -> tuple[Any, list[str]]:
    """Run the above in an event loop."""
    return asyncio.run(share_a_file(url, held))

"""A program whose children use databases in event loops and end, as do those of tests.exiting.

It forks a child for each database, by ``os.fork`` and by multiprocessing, uses all of them itself,
and every one of these processes ends in the same way, one of :data:`ENDINGS`::

    python -m tests.async_exiting ENDING URL...
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING

from sqlalchemy import select

from sessionmgr import AsyncSessionManager
from tests.exiting import end

if TYPE_CHECKING:
    from collections.abc import Sequence

MANAGER = AsyncSessionManager(pooling="always")

ENDINGS = ("return", "sys.exit", "exception", "open loop")
"""How the processes end: after ``asyncio.run``, from within its coroutine by one of two ways, or
with a loop that was left as it was when its coroutine had returned."""

PROCESSES = 3
"""How many processes use each of the databases."""

kept: list[object] = []


async def warm_up(urls: Sequence[str]) -> None:
    """Import here, once for all children, what the databases need. Nothing connects."""
    for url in urls:
        MANAGER.get_engine(url)


async def use(urls: Sequence[str], ending: str) -> None:
    """Use each database, and leave connections in its pool; then end from in here, or return."""
    for url in urls:
        async with MANAGER.begin(url) as session, MANAGER.begin(url) as other:
            assert await session.scalar(select(7)) == await other.scalar(select(7)) == 7
        if ending == "open loop":
            session = await MANAGER.session_factory(url)
            await session.execute(select(7))
            kept.append(session)
    async with MANAGER.begin(urls[0]) as session:
        await session.execute(select(7))
        end(ending)


def live(urls: Sequence[str], ending: str) -> None:
    """Use each database in an event loop, and end, unless the process ends after this anyway."""
    if ending == "open loop":
        loop = asyncio.new_event_loop()
        kept.append(loop)
        loop.run_until_complete(use(urls, ending))
    else:
        asyncio.run(use(urls, ending))


def main(ending: str, *urls: str) -> None:
    """Start the children, wait for all of them, and live like them."""
    asyncio.run(warm_up(urls))
    forked = []
    for url in urls:
        forked.append(os.fork())
        if forked[-1] == 0:
            live([url], ending)
            return
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=live, args=([url], ending)) for url in urls]
    for process in processes:
        process.start()
    for pid in forked:
        os.waitpid(pid, 0)
    for process in processes:
        process.join()
    live(urls, ending)


if __name__ == "__main__":
    main(*sys.argv[1:])

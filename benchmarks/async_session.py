"""An asynchronous session in a forked worker: made and closed, and in a unit of work.

``sessionmgr`` is ``await AsyncSessionManager.session_factory(url)`` with its defaults, of a manager
made before the fork; ``SQLAlchemy`` is ``async_sessionmaker(create_async_engine(url))()`` of an
engine and a sessionmaker that are kept. Both were used before. The unit of work opens a session by
``async with``, asks, fetches and closes. Twenty are measured at a time: what it takes to enter the
event loop is not the sessions'.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from sessionmgr import AsyncSessionManager
from tests.servers import MissingServerError

from .contenders import SELECT_ONE, exposed
from .report import Panel, Report, Target
from .timing import Plan, alternate
from .worker import in_worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSession

    from .context import Context

TARGETS = (Target("sessionmgr", "SQLAlchemy", 1.05),)

DRIVERS = {"asyncpg": "postgresql+asyncpg", "psycopg": "postgresql+psycopg"}
"""Driver -> SQLAlchemy's name for its dialect."""

AT_A_TIME = 20


def run(context: Context) -> Report:
    """Measure sessions on a SQLite file, to which they do not connect, and on PostgreSQL."""
    report = context.report("async_session", __doc__)
    plan = Plan(3, 0.001) if context.quick else Plan(201, 0.01)
    with tempfile.TemporaryDirectory() as directory:
        times = _measure(f"sqlite+aiosqlite:///{Path(directory) / 'one.db'}", plan, _close)
    samples = {name: [1e6 * time / AT_A_TIME for time in rounds] for name, rounds in times.items()}
    report.panels.append(Panel("session made and closed", "us", samples, TARGETS))
    plan = Plan(3, 0.01) if context.quick else Plan(101, 0.05)
    for driver, name in DRIVERS.items():
        try:
            url = context.url("PostgreSQL", "psycopg").set(drivername=name)
        except MissingServerError as error:
            report.missing.append(f"PostgreSQL, {driver}: {error}")
            continue
        times = _measure(exposed(url), plan, _ask)
        samples = {
            name: [1e3 * time / AT_A_TIME for time in rounds] for name, rounds in times.items()
        }
        report.panels.append(Panel(f"unit of work, PostgreSQL, {driver}", "ms", samples, TARGETS))
    context.add_versions(report, [("PostgreSQL", "psycopg")])
    return report


def _measure(
    url: str, plan: Plan, use: Callable[[AsyncSession], Awaitable[None]]
) -> dict[str, list[float]]:
    ours = AsyncSessionManager()

    def work() -> dict[str, list[float]]:
        assert ours.forked
        loop = asyncio.new_event_loop()
        engine = create_async_engine(url)
        maker = async_sessionmaker(engine)

        async def managed() -> None:
            for _ in range(AT_A_TIME):
                await use(await ours.session_factory(url))

        async def plain() -> None:
            for _ in range(AT_A_TIME):
                await use(maker())

        measured: dict[str, list[float]] = alternate(
            {
                "sessionmgr": lambda: loop.run_until_complete(managed()),
                "SQLAlchemy": lambda: loop.run_until_complete(plain()),
            },
            plan,
        )
        loop.run_until_complete(engine.dispose())
        loop.run_until_complete(ours.close())
        loop.close()
        return measured

    return in_worker(work)


async def _close(session: AsyncSession) -> None:
    await session.close()


async def _ask(session: AsyncSession) -> None:
    async with session:
        await session.scalar(SELECT_ONE)

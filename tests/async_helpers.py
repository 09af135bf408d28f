"""What tests of asynchronous sessions share: databases, as an asynchronous driver sees them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, text

from tests import servers
from tests.items import connection_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncSession

    from tests.servers import Database

SERVER_DRIVERS = list(servers.ASYNC_DRIVERS)

ASYNC_DRIVERS = [*SERVER_DRIVERS, "aiosqlite"]


@dataclass(frozen=True)
class AsyncDatabase:
    """A test's database.

    :param url: its URL, with an asynchronous driver.
    :param database: the database as it is on its server; None for a SQLite file.
    """

    url: URL
    database: Database | None

    def connections(self) -> set[int]:
        """Return what there is of connections: the server's ids, or descriptors of the file."""
        if self.database is not None:
            return self.database.connections()
        found = set()
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # it was the one that lists them
                if str(descriptor.readlink()) == self.url.database:
                    found.add(int(descriptor.name))
        return found


def make_async_database(
    driver: str, make_database: Callable[..., Database], folder: Path
) -> AsyncDatabase:
    """Make a database for a driver.

    :param driver: one of :data:`ASYNC_DRIVERS`.
    :param folder: where a SQLite file goes.
    """
    if driver == "aiosqlite":
        return AsyncDatabase(URL.create("sqlite+aiosqlite", database=f"{folder}/file.db"), None)
    database = make_database(driver)
    return AsyncDatabase(database.url, database)


async def identity(session: AsyncSession) -> int:
    """Return the server's id of a session's connection."""
    return await session.run_sync(connection_id)


async def scalar(session: AsyncSession, statement: str = "SELECT 1") -> Any:
    """Return the one value of a statement."""
    return await session.scalar(text(statement))

"""Counts of what a database has seen, taken on its server."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.helpers import wait_until
from tests.servers.mariadb import MariaDB

if TYPE_CHECKING:
    import pytest

    from tests.servers import Database

Count = Callable[[], int]

PINGS = ("statement: SELECT 1", "statement: ;", "statement: BEGIN; statement: ROLLBACK;")
"""How the log shows the liveness tests of SQLAlchemy's dialects for psycopg2, psycopg and asyncpg.

What asyncpg's has between these two is empty, and not logged."""


def database_to_count(request: pytest.FixtureRequest, driver: str) -> Database:
    """Create a database for a test whose server counts what only this test does to it.

    PostgreSQL counts by database, MariaDB by server: that one is the test's own.
    """
    server = None if driver.startswith("psycopg") else request.getfixturevalue("private_mariadb")
    return request.getfixturevalue("make_database")(driver, server)


def session_counts(database: Database) -> tuple[int, int]:
    """Return how many connections a PostgreSQL database has had, and how many were lost.

    A connection is counted for certain once it has ended, so this waits for all to end.
    """
    wait_until(lambda: not database.connections())
    [counts] = database.server.query(
        "SELECT sessions, sessions_abandoned FROM pg_stat_database WHERE datname = %s",
        database.name,
    )
    return counts


def connection_counter(database: Database) -> Count:
    """Return a function that tells how many connections were opened since now.

    :param database: of :func:`database_to_count`.
    """
    server = database.server
    if isinstance(server, MariaDB):
        before = server.status("Connections")
        return lambda: server.status("Connections") - before - 1  # looking takes one
    opened_before, _ = session_counts(database)
    return lambda: session_counts(database)[0] - opened_before


@contextmanager
def ping_counter(database: Database) -> Iterator[Count]:
    """Give a function that tells how many liveness tests the server got since now.

    :param database: of :func:`database_to_count`. On PostgreSQL, where a test is a statement of
        :data:`PINGS`, nobody is to use these otherwise.
    """
    server = database.server
    if isinstance(server, MariaDB):
        before = server.status("Com_admin_commands")  # of those only pings come here
        yield lambda: server.status("Com_admin_commands") - before
        return
    # for connections made from now on
    server.query(f"ALTER DATABASE {database.name} SET log_statement = 'all'")
    mark = server.log_mark()
    yield lambda: count_pings(server.log_text(mark), database.name)


def count_pings(log: str, name: str) -> int:
    """Return how many liveness tests of a database stand in PostgreSQL's log."""
    found, before = 0, defaultdict[str, str](str)
    for backend, line in re.findall(rf"\[(\d+)\] \S+@{name} LOG:  (.*)", log):
        found += f"{before[backend]} {line}".endswith(PINGS)
        before[backend] = line
    return found

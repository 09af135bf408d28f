"""Fixtures: applications with sessions on databases of their own, and no thread left behind."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.fastapi_apps import ASYNC_DRIVERS, Application, asking_threads
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database

TWINS = ("psycopg", "sqlite", "asyncpg", "aiosqlite")
"""Drivers of applications: the first two for sessions that block, the others for awaited ones."""


@pytest.fixture
def make_application(
    make_database: Callable[..., Database], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Application]]:
    """Return a function that makes an :class:`Application` with new databases.

    ``make_application(driver, *keys, **options)``
    """
    with ExitStack() as ends:

        def make(driver: str, *keys: str, **options: Any) -> Application:
            base = ASYNC_DRIVERS.get(driver, (driver, ""))[0]
            urls: dict[str, URL | str] = {}
            for key in keys or ("users", "logs"):
                sqlite = f"sqlite:///{tmp_path / key}.db"
                urls[key] = sqlite if base == "sqlite" else make_database(base).url
            made = Application(driver, urls, **options)
            if base != "sqlite":
                kind = "mariadb" if "my" in base else "postgresql"
                made.server = request.getfixturevalue(kind)
            ends.callback(made.looker.close)
            return made

        yield make


@pytest.fixture(params=TWINS)
def application(
    request: pytest.FixtureRequest, make_application: Callable[..., Application]
) -> Application:
    """Make an application with the databases users and logs, once with each of :data:`TWINS`."""
    return make_application(request.param)


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a thread behind in which a database is asked."""
    yield
    wait_until(lambda: not asking_threads(), message="end of the threads that ask")

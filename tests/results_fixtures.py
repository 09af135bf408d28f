"""Fixtures: stores of task results, on each kind of database and in a SQLite file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sessionmgr import ResultStore
from tests.results_helpers import RESULT_DRIVERS
from tests.schema_helpers import database_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database


@pytest.fixture(params=RESULT_DRIVERS)
def url(
    request: pytest.FixtureRequest, make_database: Callable[..., Database], tmp_path: Path
) -> URL | str:
    """Return the URL of an empty database, once with each driver."""
    return database_url(request.param, make_database, tmp_path)


@pytest.fixture
def store(url: URL | str) -> Iterator[ResultStore]:
    """Open a store on it."""
    with ResultStore(url) as opened:
        yield opened


@pytest.fixture
def local(tmp_path: Path) -> Iterator[ResultStore]:
    """Open a store in a SQLite file, for what no driver has a part in."""
    with ResultStore(f"sqlite:///{tmp_path / 'local.db'}") as opened:
        yield opened

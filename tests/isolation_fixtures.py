"""Fixtures: an empty database of the test's driver, and a manager of it that has one item."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sessionmgr import SessionManager
from tests.isolation_helpers import fill, make_url
from tests.items import ItemBase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database


@pytest.fixture
def blank_url(
    driver: str, make_database: Callable[..., Database], tmp_path: Path, sqlite: str
) -> str | URL:
    """Return the URL of an empty database of the test's driver."""
    return make_url(driver, make_database, tmp_path, sqlite)


@pytest.fixture
def filled(blank_url: str | URL) -> Iterator[SessionManager]:
    """Return a manager whose database of the test's driver has one item."""
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, blank_url)
        yield manager

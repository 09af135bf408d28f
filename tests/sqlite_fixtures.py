"""Fixtures: a SQLite file with a counter, and a manager that keeps connections to it.

A module that names these in `pytest_plugins` gives them to all modules: no two such files may use
one name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.sqlite_helpers import make_file, manage_pooled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sessionmgr import SessionManager


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file with a counter at 0."""
    path = tmp_path / "one.db"
    make_file(path)
    return path


@pytest.fixture
def file_url(path: Path) -> str:
    """Return its URL."""
    return f"sqlite:///{path}"


@pytest.fixture
def manager() -> Iterator[SessionManager]:
    """Return a manager with the default settings."""
    with manage_pooled() as manager:
        yield manager

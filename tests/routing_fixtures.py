"""Fixtures: managers of two databases, by bind key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sessionmgr import SessionManager
from tests.routed_models import MainBase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.async_facade import ManagerClass
    from tests.servers import Database


@pytest.fixture
def databases(
    drivers: tuple[str, str] | None,
    make_database: Callable[..., Database],
    tmp_path: Path,
    sqlite: str,
) -> dict[str, Any]:
    """Return the URLs of two databases, by bind key."""
    if drivers is None:
        return {key: f"{sqlite}:///{tmp_path / key}.db" for key in ("default", "users")}
    return dict(zip(("default", "users"), (make_database(d).url for d in drivers), strict=True))


@pytest.fixture
def router(manager_class: ManagerClass, databases: dict[str, Any]) -> Iterator[SessionManager]:
    """Return a manager of both."""
    with manager_class(metadata=MainBase.metadata, binds=databases, pooling="always") as manager:
        yield manager


@pytest.fixture
def files(tmp_path: Path) -> Iterator[SessionManager]:
    """Return a manager of two SQLite files."""
    binds = {key: f"sqlite:///{tmp_path / key}.db" for key in ("default", "users")}
    with SessionManager(metadata=MainBase.metadata, binds=binds, pooling="always") as manager:
        yield manager

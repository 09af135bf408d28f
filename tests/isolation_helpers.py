"""What tests of isolation share: a block that is undone, for managers of both kinds."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sessionmgr.greenlets import in_greenlet
from sessionmgr.isolation import isolated
from tests.async_facade import wait_for
from tests.items import Item, item_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL
    from sqlalchemy.orm import Session

    from tests.servers import Database

BEFORE = ["before"]
"""The items that a database of :func:`fill` has, before an isolation and after it."""


@contextmanager
def undone(*managers: Any) -> Iterator[None]:
    """Isolate managers, or facades of asynchronous ones, for a block."""
    isolation = isolated(*(getattr(manager, "manager", manager) for manager in managers))
    if not in_greenlet():
        with isolation:
            yield
        return
    isolation.begin()
    try:
        yield
    finally:
        wait_for(isolation.end_in_loop())


def make_url(
    driver: str, make_database: Callable[..., Database], folder: Path, sqlite: str
) -> str | URL:
    """Return the URL of an empty database.

    :param driver: one of a server, or ``file`` or ``memory`` for SQLite.
    :param folder: where a file goes.
    :param sqlite: what the URLs of SQLite begin with.
    """
    if driver == "memory":
        return f"{sqlite}://"
    return f"{sqlite}:///{folder}/file.db" if driver == "file" else make_database(driver).url


def fill(manager: Any, url: str | URL) -> None:
    """Give a database one item, which stays."""
    add(manager, url, *BEFORE)


def add(manager: Any, url: str | URL, *names: str) -> None:
    """Add items in a transaction of their own."""
    with manager.begin(url) as session:
        session.add_all([Item(name=name) for name in names])


def names(manager: Any, url: str | URL) -> list[str]:
    """Return the names of the items, as a session of its own sees them."""
    with manager.session_factory(url) as session:
        return item_names(session)


def write(session: Session, name: str) -> None:
    """Write an item, and leave the transaction open."""
    session.add(Item(name=name))
    session.flush()

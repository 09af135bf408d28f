"""SQLite files, what connections to them are set to, and who else uses them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData, text
from sqlalchemy.orm import Session

from sessionmgr import AsyncSessionManager, SessionManager
from tests.concurrency import in_child
from tests.servers import MissingServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Connection

NOBODY = 65534
"""The id of a user who may do little."""

READ = text("SELECT n FROM counter")
ADD = text("UPDATE counter SET n = n + 1")

PRAGMAS = ("foreign_keys", "journal_mode", "busy_timeout", "synchronous")


def manage(**options: Any) -> SessionManager:
    """Make a manager without tables."""
    return SessionManager(metadata=MetaData(), engine_options=options)


def manage_pooled(**options: Any) -> SessionManager:
    """Make a manager without tables that keeps connections."""
    return SessionManager(metadata=MetaData(), pooling="always", engine_options=options)


def pragmas(session: Session | Connection) -> tuple[Any, ...]:
    """Return what :data:`PRAGMAS` are for the connection of a session."""
    return tuple(session.scalar(text(f"PRAGMA {name}")) for name in PRAGMAS)


def found(url: str | URL, **options: Any) -> tuple[Any, ...]:
    """Return what a connection of a manager with some options is set to."""
    with manage(**options) as manager, manager.session_factory(url) as session:
        return pragmas(session)


def raw(session: Session | Connection) -> sqlite3.Connection:
    """Return the driver's connection of a session."""
    connection = session.connection() if isinstance(session, Session) else session
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


class Recorded(sqlite3.Connection):
    """A connection whose statements are kept, from the first on."""

    seen: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_trace_callback(self.seen.append)


def recorded() -> tuple[type[Recorded], list[str]]:
    """Return a class for the driver's ``factory``, and the statements that its objects execute."""
    seen: list[str] = []
    return type("Recorded", (Recorded,), {"seen": seen}), seen


def make_file(path: Path, *statements: str) -> None:
    """Make a database in SQLite's own journal mode, with one table and one row."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE counter (n INTEGER); INSERT INTO counter VALUES (0)")
        for statement in statements:
            connection.execute(statement)


@contextmanager
def another(path: Path, timeout: float = 0.0) -> Iterator[sqlite3.Connection]:
    """Connect as a program that knows nothing of this library, without waiting for locks."""
    connection = sqlite3.connect(
        path, timeout=timeout, isolation_level=None, check_same_thread=False
    )
    with closing(connection):
        yield connection


def can_write(path: Path) -> bool:
    """Return whether somebody else could have the lock for writing at once."""
    with another(path) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            assert "database is locked" in str(error)  # noqa: PT017 - nothing else is expected
            return False
        connection.execute("ROLLBACK")
        return True


def counted(path: Path) -> int:
    """Return what is committed."""
    with another(path, timeout=5.0) as connection:
        return int(connection.execute("SELECT n FROM counter").fetchone()[0])


def as_nobody(function: Callable[[], Any]) -> Any:
    """Call a function in a forked child that has no rights of its own."""

    def call() -> Any:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        return function()

    return in_child(call)


@contextmanager
def public_folder() -> Iterator[Path]:
    """Make a folder that every user may look into; pytest's own are root's alone."""
    if os.geteuid() != 0:
        raise MissingServerError("the right to be another user (root)")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def manage_async(**options: Any) -> AsyncSessionManager:
    """Make the twin of :func:`manage_pooled`, for aiosqlite.

    :raises MissingServerError: when aiosqlite is not installed.
    """
    if importlib.util.find_spec("aiosqlite") is None:
        raise MissingServerError("driver aiosqlite")
    return AsyncSessionManager(metadata=MetaData(), pooling="always", engine_options=options)

"""SQLite databases that may not be written to: they are read, and nothing else."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError

from sessionmgr.sqlite import is_read_only
from tests.concurrency import in_both_phases
from tests.sqlite_helpers import (
    as_nobody,
    found,
    make_file,
    manage,
    pragmas,
    public_folder,
    recorded,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file that is not there yet."""
    return tmp_path / "one.db"


@pytest.mark.parametrize(
    "query",
    ["mode=ro&uri=true", "immutable=1&uri=true", "immutable=Yes&uri=true", "nolock=1&uri=true"],
)
@in_both_phases
def test_read_only_uris_are_read(path: Path, query: str, call: Callable) -> None:
    """A URI that says so is asked for no WAL, whoever asks, and begins transactions that read."""
    make_file(path)

    def use() -> list[str]:
        factory, seen = recorded()
        with manage(connect_args={"factory": factory}) as manager:
            dburi = f"sqlite:///file:{path}?{query}"
            for write in (False, True):
                with manager.begin(dburi, write=write) as session, session.begin_nested():
                    assert session.scalar(text("SELECT n FROM counter")) == 0
            with manager.session_factory(dburi) as session:
                assert session.scalar(text("PRAGMA journal_mode")) == "delete"
        return [statement for statement in seen if "=" in statement]

    assert set(call(use)) == {"PRAGMA foreign_keys=1"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///file:/tmp/one.db?mode=ro&uri=true", True),
        ("sqlite:///file:/tmp/one.db?immutable=1&uri=true", True),
        ("sqlite:///file:/tmp/one.db?immutable=on&uri=true", True),
        ("sqlite:///file:/tmp/one.db?immutable=0&uri=true", False),
        ("sqlite:///file:/tmp/one.db?nolock=1&uri=true", True),
        ("sqlite:///file:/tmp/one.db?mode=rw&uri=true", False),
        (make_url("sqlite://").set(database="file:/tmp/one.db?mode=ro"), True),
        ("sqlite:////tmp/mode=ro", False),
        ("sqlite://", False),
    ],
    ids=str,
)
def test_is_read_only_knows_every_spelling(url: str | URL, expected: bool) -> None:
    """Each spelling is known, and similar names are none."""
    assert is_read_only(make_url(url)) is expected


def lay_out(folder: Path, rights: str) -> Path:
    """Make a database that others may read, in a folder of its own.

    :param rights: which of ``"file"`` and ``"folder"`` others may write to; ``"wal"`` beside them
        makes it a file in WAL mode whose log is the owner's.
    """
    inner = folder / "inner"
    inner.mkdir()
    path = inner / "one.db"
    make_file(path, *(["PRAGMA journal_mode=WAL"] if "wal" in rights else []))
    if "wal" in rights:
        # A reader that cannot write leaves the log and its index behind.
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
            reader.execute("SELECT * FROM counter").fetchall()
    path.chmod(0o666 if "file" in rights else 0o644)
    inner.chmod(0o777 if "folder" in rights else 0o755)
    return path


@pytest.mark.parametrize("rights", ["", "file", "folder", "wal", "wal file", "wal folder"])
def test_files_without_the_right_to_write_are_read(rights: str) -> None:
    """Who may not write reads all the same, and is told by the statement that writes."""
    with public_folder() as folder, manage() as manager:
        path = lay_out(folder, rights)
        warm = folder / "warm.db"
        found(f"sqlite:///{warm}")  # imports what a child could not

        def use() -> tuple[Any, ...]:
            url = f"sqlite:///{path}"
            for write in (False, True):
                with manager.begin(url, write=write) as session, session.begin_nested():
                    assert session.scalar(text("SELECT n FROM counter")) == 0
            with (
                manager.session_factory(url) as session,
                pytest.raises(OperationalError, match="readonly") as caught,
            ):
                session.execute(text("UPDATE counter SET n = 1"))
            assert caught.value.statement == "UPDATE counter SET n = 1"
            with manager.session_factory(url) as session:
                return pragmas(session)

        mode = "wal" if "wal" in rights else "delete"
        assert as_nobody(use) == (1, mode, 5000, 1 if mode == "wal" else 2)

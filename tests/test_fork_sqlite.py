"""Fork with SQLite files open: no row is lost, and no process believes to hold another's locks."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from sessionmgr import ForkedSQLiteError, SessionManager
from tests.fork_helpers import (
    CHILD_TIMEOUT,
    LEAVES,
    fork,
    run_program,
    run_program_for_each,
    status_of,
)
from tests.items import Item, ItemBase, count_items, item_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

    from sqlalchemy import Engine

LOOK = """
import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as connection:
    print(connection.execute("PRAGMA integrity_check").fetchone()[0])
    for (name,) in connection.execute("SELECT name FROM item ORDER BY name"):
        print(name)
"""
"""A program that is no relative of ours and knows nothing of this library."""

in_both_journals = pytest.mark.parametrize("journal", ["wal", "delete"])
in_both_poolings = pytest.mark.parametrize("pooling", ["always", "forked"])


def look(path: Path) -> list[str]:
    """Return what a third process sees: the result of the integrity check, then every row."""
    command = [sys.executable, "-c", LOOK, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def make_file(path: Path, journal: str) -> None:
    """Make a database with a journal mode; WAL stays with the file, the other is the default."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)


def manage(pooling: Any) -> SessionManager:
    """Make a manager of items, which leaves files in the journal mode that they have."""
    options = {"sqlite_journal_mode": None}
    return SessionManager(pooling=pooling, metadata=ItemBase.metadata, engine_options=options)


def url_of(path: Path) -> str:
    """Return the URL of a file."""
    return f"sqlite:///{path}"


def add(manager: SessionManager, path: Path, name: str) -> None:
    """Commit a row."""
    with manager.begin(url_of(path)) as session:
        session.add(Item(name=name))


def hear(channel: Connection) -> None:
    """Wait until the process at the other end has said something."""
    assert channel.poll(CHILD_TIMEOUT)
    channel.recv()


def commit_twice(manager: SessionManager, path: Path, channel: Connection) -> str | None:
    """In a child, commit before and after the parent closes, then live on until told to end."""
    with manager.session_factory(url_of(path)) as session:
        journal = session.scalar(text("PRAGMA journal_mode"))
    for name in ("child 1", "child 2"):
        add(manager, path, name)
        channel.send("committed")
        hear(channel)
    return journal


def fork_with_idle_connection(folder: Path, pooling: str, journal: str, leave: str) -> Any:
    """Fork with the parent's connection idle; both processes write, and the parent closes."""
    path = folder / f"{pooling} {journal} {leave}.db"
    make_file(path, journal)
    ours, theirs = Pipe()
    with manage(pooling) as manager:
        add(manager, path, "parent 1")
        child = fork("os.fork", lambda: commit_twice(manager, path, theirs), leave)
        hear(ours)
        add(manager, path, "parent 2")
        between = look(path)
        manager.close()
        ours.send("closed")
        hear(ours)
        alive = look(path)
        ours.send("end")
        ended = child.end()
        return ended, between, alive, look(path)


@in_both_poolings
@in_both_journals
def test_no_row_is_lost_when_idle_at_fork(tmp_path: Path, journal: str, pooling: str) -> None:
    """What a child commits is there before and after its parent closes, and when it has ended."""
    outcomes = run_program_for_each(LEAVES, fork_with_idle_connection, tmp_path, pooling, journal)
    for leave, (ended, between, alive, after) in outcomes.items():
        assert ended.result == journal
        assert (ended.noise, ended.status) == ("", status_of(leave))
        assert between == ["ok", "child 1", "parent 1", "parent 2"]
        assert alive == after == ["ok", "child 1", "child 2", "parent 1", "parent 2"]


def refusal(call: Callable[[], object]) -> str:
    """Call what must be refused because a parent had the file in use, and return the text."""
    with pytest.raises(ForkedSQLiteError) as caught:
        call()
    return str(caught.value)


def try_files(manager: SessionManager, path: Path, other: Path, channel: Connection) -> list[str]:
    """In a child, try a file that the parent has in use, another file, and the first again."""
    kept = manager.get_engine(url_of(path))
    link = path.with_name(f"link to {path.name}")
    link.symlink_to(path)

    def write() -> None:
        add(manager, path, "child")

    refusals = [refusal(write), refusal(kept.connect), refusal(lambda: add(manager, link, "link"))]
    add(manager, other, "child")
    channel.send("tried")
    hear(channel)  # the parent has committed
    grandchild = fork("os.fork", lambda: refusal(write)).end()
    add(manager, other, "child again")
    return [*refusals, refusal(write), grandchild.result]


def fork_with_transaction(folder: Path, pooling: str, kind: str, journal: str) -> Any:
    """Fork with a transaction open on one file, while the child tries that file and another."""
    path, other = (folder / f"{pooling} {kind} {journal} {number}.db" for number in (1, 2))
    ours, theirs = Pipe()
    with manage(pooling) as manager:
        for file in (path, other):
            make_file(file, journal)
            add(manager, file, "parent 1")
        with manager.session_factory(url_of(path)) as session:
            assert item_names(session) == ["parent 1"]
            if kind == "writing":
                session.add(Item(name="parent 2"))
                session.flush()
            child = fork("os.fork", lambda: try_files(manager, path, other, theirs), "sys.exit")
            hear(ours)
            before = look(path)
            assert item_names(session)[0] == "parent 1"
            session.commit()
        ours.send("committed")
        ended = child.end()
        add(manager, path, "parent 3")
        return ended, before, look(path), look(other)


@in_both_poolings
@pytest.mark.parametrize("kind", ["reading", "writing"])
def test_file_in_use_at_fork_is_the_parents(tmp_path: Path, pooling: str, kind: str) -> None:
    """A child is refused a file that was in use at the fork, for good, and no other."""
    outcomes = run_program_for_each(
        ("wal", "delete"), fork_with_transaction, tmp_path, pooling, kind
    )
    written = ["parent 2"] if kind == "writing" else []
    for ended, before, after, other in outcomes.values():
        assert (ended.noise, ended.status) == ("", 0)
        assert len(ended.result) == 5
        assert all("End sessions on the file before forking" in text for text in ended.result)
        assert before == ["ok", "parent 1"]
        assert after == ["ok", "parent 1", *written, "parent 3"]
        assert other == ["ok", "child", "child again", "parent 1"]


def open_nothing(folder: Path, spelling: str) -> Any:
    """Fork with a file in use, and count what the child has the driver open of it."""
    path = folder / "a file.db"
    opened = 0

    class Counted(sqlite3.Connection):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal opened
            opened += 1
            super().__init__(*args, **kwargs)

    url = {
        "path": f"sqlite:///{path}",
        "URI": f"sqlite:///{path.as_uri().replace('///', '/')}?uri=true",
    }[spelling]
    with manage("always") as manager:

        def make_engine() -> Engine:
            return manager.get_engine(url, connect_args={"factory": Counted})

        def try_it() -> int:
            before = opened
            with pytest.raises(ForkedSQLiteError):
                make_engine().connect()
            return opened - before

        make_engine()
        with manager.begin(url) as session:
            assert item_names(session) == []
            assert opened > 0
            return fork("os.fork", try_it).end()


@pytest.mark.parametrize("spelling", ["path", "URI"])
def test_file_in_use_at_fork_is_not_even_opened(tmp_path: Path, spelling: str) -> None:
    """A thread of the parent may have been inside a mutex of the file: to open it could hang."""
    ended = run_program(open_nothing, tmp_path, spelling)
    assert (ended.noise, ended.status, ended.result) == ("", 0, 0)


def replace_file(folder: Path) -> Any:
    """Fork with a file in use, delete it, and have the child make files in its place."""
    path = folder / "file.db"
    ours, theirs = Pipe()

    def make_files() -> int:
        theirs.send(refusal(lambda: add(manager, path, "child")))
        hear(theirs)
        for _ in range(3):  # ext4 gives the inode that was freed last
            manager.invalidate(url_of(path))
            add(manager, path, "child")
            path.unlink()
        return 3

    with manage("always") as manager:
        with manager.begin(url_of(path)) as session:
            session.add(Item(name="parent"))
            session.flush()
            child = fork("os.fork", make_files)
            hear(ours)
        manager.invalidate(url_of(path))
        path.unlink()
        ours.send("deleted")
        return child.end()


def test_file_in_place_of_one_that_was_in_use_is_anybodys(tmp_path: Path) -> None:
    """A child may use a new file where its parent has deleted the one that it had in use."""
    ended = run_program(replace_file, tmp_path)
    assert (ended.result, ended.noise) == (3, "")


def use_inherited(session: Any) -> str:
    """In a child, use the parent's session and end it."""
    with pytest.raises(DBAPIError) as caught:
        session.execute(select(Item))
    assert caught.value.connection_invalidated
    session.rollback()
    return refusal(lambda: session.execute(select(Item)))


def inherit_session(folder: Path, journal: str, leave: str) -> Any:
    """Fork within a transaction on a file, which the child leaves by its ``with`` block."""
    path = folder / f"{journal} {leave}.db"
    make_file(path, journal)
    with manage("always") as manager:
        with manager.session_factory(url_of(path)) as session:
            session.add(Item(name="parent"))
            session.flush()
            ended = fork("os.fork", lambda: use_inherited(session), leave).end()
            assert item_names(session) == ["parent"]
            session.commit()
        return ended, look(path)


@in_both_journals
def test_inherited_session_is_disconnected_in_child(tmp_path: Path, journal: str) -> None:
    """A session on a file fails in the child as one whose connection was closed does."""
    outcomes = run_program_for_each(LEAVES, inherit_session, tmp_path, journal)
    for leave, (ended, rows) in outcomes.items():
        assert (ended.noise, ended.status) == ("", status_of(leave))
        assert "when it forked" in ended.result
        assert rows == ["ok", "parent"]


def use_memory(manager: SessionManager, url: str) -> tuple[int, int, list[str]]:
    """In a child, look into an in-memory database, and write to it."""
    with manager.session_factory(url) as session:
        fresh = count_items(session)
    with manager.begin(url) as session:
        session.add(Item(name="child"))
    with manager.session_factory(url) as session:
        return fresh, count_items(session), item_names(session)


def fork_with_memory(url: str) -> Any:
    """Fork with a row in an in-memory database, idle and with a transaction open."""
    with manage("forked") as manager:
        with manager.begin(url) as session:
            session.add(Item(name="parent"))
        idle = fork("os.fork", lambda: use_memory(manager, url), "sys.exit").end()
        with manager.begin(url) as session:
            session.add(Item(name="uncommitted"))
            session.flush()
            in_use = fork("os.fork", lambda: use_memory(manager, url), "sys.exit").end()
        with manager.session_factory(url) as session:
            return idle, in_use, item_names(session)


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "sqlite:///file:name?mode=memory&uri=true"],
    ids=["empty", "memory", "named"],
)
def test_memory_database_of_child_is_fresh_and_prepared(url: str) -> None:
    """A child's in-memory database has its tables and no rows; the parent's keeps its rows."""
    idle, in_use, names = run_program(fork_with_memory, url)
    for ended in (idle, in_use):
        assert (ended.noise, ended.status) == ("", 0)
        assert ended.result == (0, 1, ["child"])
    assert names == ["parent", "uncommitted"]

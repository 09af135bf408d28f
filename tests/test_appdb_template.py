"""The template of an application's database: copied whole, once, and by whoever is first."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import inspect

from sessionmgr import ApplicationDatabase, TemplateError
from sessionmgr.template import copy_template
from tests.appdb_helpers import (
    NOBODY,
    AppBase,
    add_client,
    as_nobody,
    client_names,
    make_template,
    names_in,
)
from tests.concurrency import in_child, in_children
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

PROCESSES = 16
LARGE = 30_000_000
"""Bytes: more than are copied between two looks into a folder."""


def database(folder: Path, template: str | Path | None) -> ApplicationDatabase:
    """Make a database with a template, in a folder that may not be there yet."""
    path = folder / "app.db"
    return ApplicationDatabase("App", url=f"sqlite:///{path}", template=template, base=AppBase)


def integrity(path: Path) -> str:
    """Return what SQLite finds wrong with a file, or "ok"."""
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def write_first(folder: Path, template: Path | None, name: str) -> Callable[[], list[str]]:
    """Return a function that opens the database, writes a row and returns what it sees."""

    def write() -> list[str]:
        with database(folder, template) as db:
            add_client(db, name)
            return client_names(db)

    return write


def test_file_begins_as_a_copy(tmp_path: Path) -> None:
    """The first use makes the file, its folder, and the tables that the template has not."""
    template = make_template(tmp_path / "template.db", "Ada")
    with database(tmp_path / "new", template) as db:
        assert client_names(db) == ["Ada"]
        assert set(inspect(db.engine).get_table_names()) == {"client", "legacy"}
    assert names_in(tmp_path / "new") == {"app.db"}


def test_missing_tables_are_created_and_others_left(tmp_path: Path) -> None:
    """A template that is older than the models gets what it lacks; nothing of it is altered."""
    with closing(sqlite3.connect(tmp_path / "template.db")) as connection:
        connection.execute("CREATE TABLE legacy (x)")
    with database(tmp_path, tmp_path / "template.db") as db:
        assert client_names(db) == []
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    with closing(sqlite3.connect(narrow / "app.db")) as connection:
        connection.execute("CREATE TABLE client (id INTEGER PRIMARY KEY, name TEXT)")
    with database(narrow, None) as db:
        columns = inspect(db.engine).get_columns("client")
        assert [column["name"] for column in columns] == ["id", "name"]
        db.init_db()
        db.ensure_schema()
        assert len(inspect(db.engine).get_columns("client")) == 2


def test_template_of_a_file_that_is_there_is_not_looked_at(tmp_path: Path) -> None:
    """The template matters once."""
    with database(tmp_path, make_template(tmp_path / "template.db", "Ada")) as db:
        add_client(db, "Grace")
    (tmp_path / "template.db").write_text("no database any more")
    with database(tmp_path, tmp_path / "template.db") as db:
        assert client_names(db) == ["Ada", "Grace"]


def test_relative_template_is_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for in the project's root, in a frozen program among its data files."""
    monkeypatch.delenv("DB_PATH", raising=False)
    (tmp_path / "data").mkdir()
    make_template(tmp_path / "data" / "dev.db", "Ada")

    def options() -> dict[str, Any]:
        return {"template": "data/dev.db", "base": AppBase}

    with ApplicationDatabase("App", root=tmp_path, **options()) as db:
        assert client_names(db) == ["Ada"]
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_MEIPASS", str(tmp_path), raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    with ApplicationDatabase("App", root="/nowhere", **options()) as db:
        assert client_names(db) == ["Ada"]
        assert db.path == tmp_path / "home" / "App" / "app.db"


@pytest.mark.parametrize("with_template", [True, False], ids=["template", "empty"])
def test_many_processes_start_at_once(with_template: bool, tmp_path: Path) -> None:
    """They end with one good file that has the template's rows and every process's own."""
    names = [f"own {number:02}" for number in range(PROCESSES)]
    template, rows = None, []
    if with_template:
        # large enough for the last copy to be made while there are rows in the first
        rows = [f"template {number:03} {'x' * 10_000}" for number in range(300)]
        template = make_template(tmp_path / "template.db", *rows)
    seen = in_children(write_first(tmp_path / "new", template, name) for name in names)
    for name, found in zip(names, seen, strict=True):
        assert name in found
        assert set(rows) <= set(found)
    with database(tmp_path / "new", None) as db:
        assert client_names(db) == names + rows
    assert integrity(tmp_path / "new" / "app.db") == "ok"
    assert names_in(tmp_path / "new") == {"app.db"}


def test_many_processes_where_there_are_no_hard_links(tmp_path: Path) -> None:
    """On FAT, say, a copy is renamed instead, and replaces nothing either.

    No such file system can be mounted here, so the system call is made to refuse.
    """
    template = make_template(tmp_path / "template.db", "Ada")
    refusals = tmp_path / "refusals"
    refusals.touch()

    def without_links(write: Callable[[], list[str]]) -> list[str]:
        def link(*_: object) -> None:
            with refusals.open("a") as file:
                file.write(".")
            raise PermissionError(1, "Operation not permitted")

        os.link = link  # type: ignore[assignment]  # in a child of ours, which ends then
        return write()

    names = [f"own {number}" for number in range(8)]
    writes = [write_first(tmp_path / "new", template, name) for name in names]
    in_children(lambda write=write: without_links(write) for write in writes)
    with database(tmp_path / "new", None) as db:
        assert client_names(db) == ["Ada", *names]
    assert refusals.read_text()
    assert names_in(tmp_path / "new") == {"app.db"}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_copy_replaces_no_file(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that comes to be while the copy is made is kept, with what was written to it."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    template = make_template(tmp_path / "template.db", "Ada")
    path = tmp_path / "app.db"
    with closing(sqlite3.connect(template)) as lock, ThreadPoolExecutor() as threads:
        lock.execute("BEGIN EXCLUSIVE")  # which the copy waits for
        copied = threads.submit(copy_template, template, path)
        wait_until(lambda: len(list(tmp_path.glob(".app.db.*.new"))) == 1)
        path.write_text("another's")
        lock.rollback()
        copied.result(30)
    assert path.read_text() == "another's"
    assert {path.name for path in tmp_path.iterdir()} == {"app.db", "template.db"}


def kill_amidst_copy(template: Path, path: Path) -> Path | None:
    """Kill a process while it copies a template; return its half copy, ``None`` if it was done."""
    child = os.fork()
    if child == 0:
        copy_template(template, path)
        os._exit(0)
    deadline = monotonic() + 30
    while not any(path.parent.iterdir()):  # without a sleep: all is done in 30 ms
        assert monotonic() < deadline
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if path.exists():
        path.unlink()
        return None
    [half] = path.parent.iterdir()
    return half


def test_killed_process_leaves_no_half_file(tmp_path: Path) -> None:
    """A process killed while it copies leaves no database; the next one makes it, and cleans up."""
    template = make_template(tmp_path / "template.db", "Ada")
    with closing(sqlite3.connect(template)) as connection:
        connection.execute("INSERT INTO legacy VALUES (zeroblob(?))", (LARGE,))
        connection.commit()
    folder = tmp_path / "new"
    folder.mkdir()
    attempts = (kill_amidst_copy(template, folder / "app.db") for _ in range(10))
    half = next(filter(None, attempts))
    assert [path.name for path in folder.iterdir()] == [half.name]
    assert half.stat().st_size < LARGE
    with database(folder, template) as db:
        assert client_names(db) == ["Ada"]
    assert names_in(folder) == {"app.db"}
    assert integrity(folder / "app.db") == "ok"
    assert (folder / "app.db").stat().st_size > LARGE


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A copy that cannot be finished is removed, and the error says why."""
    template = make_template(tmp_path / "template.db", *["Ada" * 1000] * 500)
    (tmp_path / "new").mkdir()

    def copy() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        with pytest.raises(TemplateError) as caught:
            copy_template(template, tmp_path / "new" / "app.db")
        return str(caught.value)

    assert "Nothing was left" in in_child(copy)
    assert list((tmp_path / "new").iterdir()) == []


def test_wal_of_an_open_template_is_copied(tmp_path: Path) -> None:
    """Rows that are still in a template's ``-wal`` are in the copy, and the template stays."""
    template = make_template(tmp_path / "template.db", "Ada", journal_mode="wal")
    with closing(sqlite3.connect(template)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.executemany("INSERT INTO client (name) VALUES (?)", [("Grace",)] * 500)
        connection.commit()
        before = template.read_bytes()
        assert b"Grace" not in before
        with database(tmp_path / "new", template) as db:
            assert client_names(db) == ["Ada"] + ["Grace"] * 500
        assert template.read_bytes() == before


def test_wal_of_a_killed_program_is_copied(tmp_path: Path) -> None:
    """So are those that a program has left in it when it was killed."""
    template = make_template(tmp_path / "template.db", "Ada", journal_mode="wal")

    def write() -> None:
        connection = sqlite3.connect(template)
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute("INSERT INTO client (name) VALUES ('Grace')")
        connection.commit()
        os._exit(0)

    with pytest.raises(AssertionError, match="was killed"):
        in_child(write)
    assert Path(f"{template}-wal").stat().st_size > 0
    with database(tmp_path / "new", template) as db:
        assert client_names(db) == ["Ada", "Grace"]


CHANGES = """
import itertools, sqlite3, sys
for number in itertools.count(1):
    connection = sqlite3.connect(sys.argv[1])
    connection.execute("UPDATE first SET n = ?", (number,))
    connection.execute("UPDATE last SET n = ?", (number,))
    connection.commit()
    connection.close()
"""
"""A program that changes both ends of a file in each transaction, and closes it in between."""


def test_template_that_is_changed_meanwhile_is_copied_whole(tmp_path: Path) -> None:
    """A template that others open, change and close all the time is copied as one of its states."""
    template = tmp_path / "template.db"
    with closing(sqlite3.connect(template)) as connection:
        connection.execute("PRAGMA journal_mode=wal")
        connection.executescript("CREATE TABLE first (n); INSERT INTO first VALUES (0)")
        connection.execute("CREATE TABLE middle (x)")
        connection.execute("INSERT INTO middle VALUES (zeroblob(?))", (LARGE,))
        connection.commit()
        connection.executescript("CREATE TABLE last (n); INSERT INTO last VALUES (0)")
    copied = []
    with subprocess.Popen([sys.executable, "-c", CHANGES, template]) as program:
        try:
            for number in range(20):
                copy = tmp_path / f"{number}.db"
                copy_template(template, copy)
                with closing(sqlite3.connect(copy)) as connection:
                    [state] = connection.execute("SELECT first.n, last.n FROM first, last")
                copied.append(state)
                copy.unlink()
        finally:
            program.kill()
    assert [first for first, last in copied if first != last] == []
    assert len(set(copied)) > 1  # it was changed meanwhile


def test_copy_left_by_a_killed_process_is_removed_later(tmp_path: Path) -> None:
    """Also where another process has made the file before it was killed."""
    template = make_template(tmp_path / "template.db", "Ada")
    folder = tmp_path / "new"
    with database(folder, template) as db:
        assert client_names(db) == ["Ada"]
    (folder / ".app.db.0123456789abcdef.new").touch()
    with database(folder, template) as db:
        assert client_names(db) == ["Ada"]
    assert names_in(folder) == {"app.db"}


def test_copy_is_in_no_mode_of_the_template(tmp_path: Path) -> None:
    """The copy of a template in WAL mode is an ordinary file, alone; engines set their own mode."""
    template = make_template(tmp_path / "template.db", "Ada", journal_mode="wal")
    (tmp_path / "new").mkdir()
    copy_template(template, tmp_path / "new" / "app.db")
    header = (tmp_path / "new" / "app.db").read_bytes()[:20]
    assert header[18:] == b"\x01\x01"  # of the legacy journal; WAL is 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["app.db"]
    # and reading the template has left nothing beside it
    assert {path.name for path in tmp_path.iterdir()} == {"template.db", "new"}


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
def test_template_in_a_read_only_folder(journal_mode: str) -> None:
    """A template is read where nothing may be written, as in an installed program."""
    home = Path(tempfile.mkdtemp(prefix="sessionmgr-"))
    folder, own = home / "program", home / "user"
    folder.mkdir()
    own.mkdir()
    try:
        template = make_template(folder / "template.db", "Ada", journal_mode=journal_mode)
        if os.geteuid() == 0:
            os.chown(own, NOBODY, NOBODY)
        for path, mode in ((template, 0o444), (folder, 0o555), (home, 0o755)):
            path.chmod(mode)

        def copy() -> bool:
            with pytest.raises(PermissionError):
                (folder / "x").touch()
            copy_template(template, own / "app.db")
            return os.access(own / "app.db", os.W_OK)

        assert as_nobody(copy)
        assert integrity(own / "app.db") == "ok"
    finally:
        folder.chmod(0o755)
        shutil.rmtree(home)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"there is no template .*template\.db that can be read: No such file.*root"),
        ("folder", r"no template .*template\.db that can be read: Is a directory"),
        (b"", r"the template .*template\.db is no SQLite database"),
        (b"just some text" * 100, r"the template .*template\.db is no SQLite database"),
        (b"SQLite format 3\0" + b"\1" * 4000, r"cannot copy the template .*template\.db to .*app"),
    ],
    ids=["missing", "folder", "empty", "text", "broken"],
)
def test_bad_templates_raise(content: bytes | str | None, match: str, tmp_path: Path) -> None:
    """The error names the template; nothing is left, and the next use tries again."""
    template = tmp_path / "template.db"
    if content == "folder":
        template.mkdir()
    elif isinstance(content, bytes):
        template.write_bytes(content)
    with database(tmp_path / "new", template) as db:
        engine = db.engine
        for _ in range(2):
            with pytest.raises(TemplateError, match=match):
                engine.connect()
        assert list((tmp_path / "new").iterdir()) == []
        if template.is_dir():
            template.rmdir()
        template.unlink(missing_ok=True)
        make_template(template, "Ada")
        assert client_names(db) == ["Ada"]


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_remains_of_a_deleted_file_are_not_applied(suffix: str, tmp_path: Path) -> None:
    """Where only a ``-wal`` is left of a database, a copy beside it would be another's spoil."""
    template = make_template(tmp_path / "template.db", "Ada")
    remains = tmp_path / f"app.db{suffix}"
    remains.write_bytes(b"x")
    with database(tmp_path, template) as db:
        with pytest.raises(TemplateError, match=rf"app\.db is not there, but .*app\.db{suffix} is"):
            client_names(db)
        assert names_in(tmp_path) - {remains.name} == {"template.db"}
        remains.unlink()
        assert client_names(db) == ["Ada"]


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    """Only copies that were left are removed, by the names that they alone have."""
    template = make_template(tmp_path / "template.db", "Ada")
    others = {"app.db.new", ".app.db.0123456789abcdef.old", ".other.db.0123456789abcdef.new"}
    for name in (*others, ".app.db.0123456789abcdef.new", ".app.db.0123456789abcdef.new-wal"):
        (tmp_path / name).touch()
    with database(tmp_path, template) as db:
        assert client_names(db) == ["Ada"]
    wait_until(lambda: names_in(tmp_path) == {"app.db", "template.db", *others})


def test_template_that_stays_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that another program has locked is waited for, and not for ever."""
    monkeypatch.setattr("sessionmgr.template._LOCK_WAIT", 0.2)
    template = tmp_path / "template.db"
    with closing(sqlite3.connect(template, isolation_level=None)) as writer:
        writer.execute("CREATE TABLE a (b)")
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TemplateError, match="another program has locked it"):
            copy_template(template, tmp_path / "app.db")
        assert list(tmp_path.glob("*app.db*")) == []
        writer.execute("COMMIT")
    copy_template(template, tmp_path / "app.db")
    assert (tmp_path / "app.db").exists()

"""What connections to SQLite are set to, and where they are left alone."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import ForeignKey, Integer, MetaData, QueuePool, text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sessionmgr import EngineOptionsError, SessionManager, sqlite
from sessionmgr.transient import is_transient
from tests.concurrency import in_both_phases, in_children, in_threads
from tests.helpers import wait_until
from tests.sqlite_helpers import another, found, make_file, manage, manage_async, pragmas, recorded
from tests.test_memory_databases import in_each_spelling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database

DEFAULTS = (1, "wal", 5000, 1)
"""Foreign keys, journal mode, milliseconds, NORMAL."""


class Base(DeclarativeBase):
    """Base of this module's tables."""


class Node(Base):
    """A row that may refer to another."""

    __tablename__ = "node"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    parent: Mapped[int | None] = mapped_column(ForeignKey("node.id"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file that is not there yet."""
    return tmp_path / "one.db"


@pytest.fixture
def url(path: Path) -> str:
    """Return its URL."""
    return f"sqlite:///{path}"


@in_both_phases
def test_files_get_all_settings(url: str, call: Callable) -> None:
    """Foreign keys, WAL, a busy timeout, and NORMAL."""
    assert call(lambda: found(url)) == DEFAULTS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sqlite_foreign_keys": False}, (0, "wal", 5000, 1)),
        ({"sqlite_foreign_keys": None}, (0, "wal", 5000, 1)),
        ({"sqlite_journal_mode": "truncate"}, (1, "truncate", 5000, 2)),
        ({"sqlite_journal_mode": None}, (1, "delete", 5000, 2)),
        ({"sqlite_busy_timeout": 0.25}, (1, "wal", 250, 1)),
        ({"sqlite_busy_timeout": 0}, (1, "wal", 0, 1)),
        ({"sqlite_busy_timeout": None}, (1, "wal", 5000, 1)),
        ({"sqlite_synchronous": "Full"}, (1, "wal", 5000, 2)),
        ({"sqlite_synchronous": "EXTRA"}, (1, "wal", 5000, 3)),
        ({"sqlite_synchronous": None}, (1, "wal", 5000, 2)),
        ({"sqlite_synchronous": "NORMAL", "sqlite_journal_mode": "DELETE"}, (1, "delete", 5000, 1)),
        ({"connect_args": {"timeout": 60}}, (1, "wal", 60_000, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("level", ["manager", "bind", "call"])
def test_each_setting_is_an_option(
    url: str, options: dict[str, Any], expected: tuple[Any, ...], level: str
) -> None:
    """Each may be changed or left alone, for all databases, one, or by a call."""
    given = {name: options if name == level else {} for name in ("manager", "bind", "call")}
    with (
        SessionManager(
            metadata=MetaData(),
            binds={"one": {"url": url, **given["bind"]}},
            engine_options=given["manager"],
        ) as manager,
        manager.session_factory("one", **given["call"]) as session,
    ):
        assert pragmas(session) == expected


def test_timeout_in_the_url_is_kept(url: str) -> None:
    """The driver's own argument in the URL is the busy timeout."""
    assert found(f"{url}?timeout=7") == (1, "wal", 7000, 1)


def test_normal_is_for_wal_only(path: Path, url: str) -> None:
    """Where SQLite cannot have WAL, the default does not risk the file."""
    make_file(path)
    found_mode = found(f"sqlite:///file:{path}?vfs=unix-none&uri=true")
    assert found_mode[1:] == ("delete", 5000, 2)


@in_each_spelling
def test_memory_is_asked_for_no_wal(url: str | URL) -> None:
    """Databases in memory have foreign keys, and hear nothing of journals."""
    factory, seen = recorded()
    assert found(url, connect_args={"factory": factory})[0] == 1
    settings = [statement for statement in seen if "=" in statement]
    assert settings == ["PRAGMA foreign_keys=1"]


@in_each_spelling
def test_foreign_keys_are_checked_in_memory(url: str | URL) -> None:
    """A row that refers to none is refused."""
    with (
        SessionManager(metadata=Base.metadata) as manager,
        pytest.raises(IntegrityError, match="FOREIGN KEY"),
        manager.begin(url) as session,
    ):
        session.add(Node(id=1, parent=2))


def test_foreign_keys_are_checked_in_files(url: str) -> None:
    """A row that refers to none is refused, unless that is switched off."""
    with SessionManager(metadata=Base.metadata) as manager:
        with pytest.raises(IntegrityError, match="FOREIGN KEY"), manager.begin(url) as session:
            session.add(Node(id=1, parent=2))
        manager.invalidate(url)
        with manager.begin(url, sqlite_foreign_keys=False) as session:
            session.add(Node(id=1, parent=2))


# -- turning WAL on while others use the file


def test_processes_that_start_at_once_all_get_wal(tmp_path: Path) -> None:
    """32 processes that open a new file at the same time, time and again, meet no error."""
    with manage() as manager:

        def use() -> set[Any]:
            journals = set()
            for number in range(5):
                with manager.session_factory(f"sqlite:///{tmp_path}/{number}.db") as session:
                    journals.add(session.scalar(text("PRAGMA journal_mode")))
            return journals

        assert in_children([use] * 32) == [{"wal"}] * 32


def attempts(seen: list[str]) -> int:
    """Return how often WAL was asked for."""
    return seen.count("PRAGMA journal_mode=WAL")


@pytest.mark.parametrize("lock", ["SHARED", "IMMEDIATE", "EXCLUSIVE"])
def test_change_of_the_journal_mode_waits_for_others(path: Path, url: str, lock: str) -> None:
    """Who finds a file in use tries for as long as the busy timeout says."""
    make_file(path)
    factory, seen = recorded()
    options = {"sqlite_busy_timeout": 20.0, "connect_args": {"factory": factory}}
    with another(path) as other, manage(**options) as manager:
        take_lock(other, lock)
        manager.get_engine(url)

        def let_go() -> None:
            # SQLite waits by itself for some locks, and for others it is asked again.
            wait_until(lambda: "PRAGMA foreign_keys=1" in seen)
            if lock == "IMMEDIATE":
                wait_until(lambda: attempts(seen) >= 2)
            other.execute("ROLLBACK")

        def use() -> str:
            with manager.session_factory(url) as session:
                return str(session.scalar(text("PRAGMA journal_mode")))

        assert in_threads([use, let_go])[0] == "wal"


def take_lock(connection: sqlite3.Connection, lock: str) -> None:
    """Take one of SQLite's locks."""
    if lock == "SHARED":
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM counter").fetchall()
    else:
        connection.execute(f"BEGIN {lock}")


@pytest.mark.parametrize("lock", ["SHARED", "IMMEDIATE", "EXCLUSIVE"])
@pytest.mark.parametrize("timeout", [0, 0.05])
def test_journal_mode_that_cannot_be_changed_in_time(
    path: Path, url: str, lock: str, timeout: float
) -> None:
    """The driver's error passes, with what to do, and the same work may be tried again."""
    make_file(path)
    with another(path) as other, manage(sqlite_busy_timeout=timeout) as manager:
        take_lock(other, lock)
        with (
            pytest.raises(OperationalError, match="database is locked") as caught,
            manager.get_engine(url).connect() as connection,
        ):
            pragmas(connection)
        assert is_transient(caught.value)
        if sys.version_info >= (3, 11):
            [told] = caught.value.orig.__notes__
            assert "sqlite_journal_mode=None" in told
        other.execute("ROLLBACK")
        with manager.session_factory(url) as session:
            assert pragmas(session)[1] == "wal"


def test_files_in_wal_mode_are_opened_beside_a_writer(path: Path, url: str) -> None:
    """A writer holds up nobody who opens the file, once it is in WAL mode."""
    make_file(path, "PRAGMA journal_mode=WAL")
    with another(path) as other:
        other.execute("BEGIN IMMEDIATE")
        assert found(url, sqlite_busy_timeout=0) == (1, "wal", 0, 1)


# -- threads, and connections that others make


def test_pooled_connections_may_change_threads(path: Path, url: str) -> None:
    """A pool may give a connection to another thread than the one that made it."""
    shared = "sqlite:///file:threads?mode=memory&cache=shared&uri=true"
    for dburi, options in ((url, {}), (shared, {"poolclass": QueuePool})):
        with SessionManager(metadata=MetaData(), pooling="always") as manager:
            before = manager.get_engine(dburi, **options).connect()
            before.close()

            def use(manager: SessionManager = manager, dburi: str = dburi) -> int:
                with manager.session_factory(dburi) as session:
                    return int(session.scalar(text("SELECT 1")) or 0)

            assert in_threads([use]) == [1]
            [stats] = manager.stats().databases
            assert stats.connects == 1


@pytest.mark.parametrize("dburi", ["file", "sqlite://"])
def test_check_same_thread_is_the_callers(url: str, dburi: str) -> None:
    """Who wants the driver to check the thread gets it."""
    dburi = url if dburi == "file" else dburi
    options = {"connect_args": {"check_same_thread": True}}
    with SessionManager(metadata=MetaData(), pooling="always", engine_options=options) as manager:
        connection = manager.get_engine(dburi).connect()

        def use() -> None:
            with pytest.raises(ProgrammingError, match="created in a thread"):
                connection.exec_driver_sql("SELECT 1")

        in_threads([use])
        connection.close()


def test_creators_connections_are_set_up(path: Path, url: str) -> None:
    """Connections that a ``creator`` makes get the settings, but for the timeout it gave them."""
    given = {"creator": lambda: sqlite3.connect(path, timeout=3)}
    assert found(url, **given) == (1, "wal", 3000, 1)
    assert found(url, **given, sqlite_busy_timeout=2.0) == (1, "wal", 2000, 1)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit is new in Python 3.12")
@pytest.mark.parametrize("autocommit", [False, True])
def test_settings_beside_the_drivers_new_transactions(url: str, autocommit: bool) -> None:
    """With ``autocommit=False`` a connection is in a transaction always, and is set up first."""
    options = {"connect_args": {"autocommit": autocommit}}
    with manage(**options) as manager, manager.session_factory(url) as session:
        assert pragmas(session) == DEFAULTS
        session.scalar(text("SELECT 1"))
        raw: Any = session.connection().connection.driver_connection
        assert raw.in_transaction is not autocommit


# -- wrong and contradictory values


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("sqlite_foreign_keys", 1, "True, False or None"),
        ("sqlite_foreign_keys", "on", "True, False or None"),
        ("sqlite_transactions", "IMMEDIATE", "True, False, 'writes' or None"),
        ("sqlite_journal_mode", "WALL", "one of DELETE, TRUNCATE, PERSIST, MEMORY, WAL, OFF"),
        ("sqlite_journal_mode", True, "one of DELETE"),
        ("sqlite_journal_mode", "WAL; DROP TABLE t", "one of DELETE"),
        ("sqlite_synchronous", 1, "one of OFF, NORMAL, FULL, EXTRA"),
        ("sqlite_busy_timeout", -1, "a number of seconds from 0 to 2147483"),
        ("sqlite_busy_timeout", "5", "a number of seconds"),
        ("sqlite_busy_timeout", True, "a number of seconds"),
        ("sqlite_busy_timeout", float("nan"), "a number of seconds"),
        ("sqlite_busy_timeout", float("inf"), "a number of seconds"),
    ],
    ids=str,
)
def test_wrong_values_raise_when_they_are_given(option: str, value: Any, expected: str) -> None:
    """The manager, a bind and a call say what the value must be, whatever the database."""
    pattern = f"{option} must be {expected}.*, not "
    with pytest.raises(EngineOptionsError, match=pattern):
        manage(**{option: value})
    with pytest.raises(EngineOptionsError, match=f"(?s)one.*{pattern}"):
        SessionManager(binds={"one": {"url": "psycopg://h/d", option: value}})
    with manage() as manager, pytest.raises(EngineOptionsError, match=f"this call: {pattern}"):
        manager.get_engine("sqlite://", **{option: value})


def test_unknown_settings_are_refused() -> None:
    """A name that is none of the settings' raises, as any unknown option."""
    with (
        manage(sqlite_jornal_mode="WAL") as manager,
        pytest.raises(EngineOptionsError, match="sqlite_jornal_mode"),
    ):
        manager.get_engine("sqlite://")


@pytest.mark.parametrize("query", ["", "?timeout=3"])
def test_two_busy_timeouts_contradict_each_other(url: str, query: str) -> None:
    """Named as sessionmgr's option and as the driver's, neither is taken."""
    options: dict[str, Any] = {"sqlite_busy_timeout": 2.0}
    if not query:
        options["connect_args"] = {"timeout": 3}
    told = r"sqlite_busy_timeout=2\.0, and timeout='?3"
    with manage(**options) as manager, pytest.raises(EngineOptionsError, match=told):
        manager.get_engine(url + query)


def test_calls_are_compared_with_the_engine_that_is_there(url: str) -> None:
    """A call that names other settings is told both; in another spelling they are the same."""
    with manage(sqlite_journal_mode="wal", connect_args={"timeout": 3}) as manager:
        engine = manager.get_engine(url)
        same = {"sqlite_journal_mode": "Wal", "sqlite_foreign_keys": True}
        assert manager.get_engine(url, **same, sqlite_busy_timeout=3) is engine
        other: dict[str, Any]
        for other in (
            {"sqlite_journal_mode": "DELETE"},
            {"sqlite_busy_timeout": 5.0},
            {"sqlite_transactions": False},
        ):
            with pytest.raises(EngineOptionsError, match=next(iter(other))):
                manager.get_engine(url, **other)


@pytest.mark.parametrize("database", ["psycopg"], indirect=True)
def test_settings_are_set_aside_for_other_databases(database: Database) -> None:
    """A manager of several kinds of databases may have them for all."""
    options = {
        "sqlite_foreign_keys": False,
        "sqlite_journal_mode": "DELETE",
        "sqlite_busy_timeout": 1,
        "sqlite_synchronous": "FULL",
        "sqlite_transactions": False,
    }
    with manage(**options) as manager, manager.begin(database.url, write=True) as session:
        assert session.scalar(text("SELECT 1")) == 1


# -- aiosqlite


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Return an event loop, which the test runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_aiosqlite_gets_the_same_settings(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    """The asynchronous driver's connections are set to the same."""

    async def use(url: str, **options: Any) -> tuple[Any, ...]:
        async with (
            manage_async(**options) as manager,
            manager.get_engine(url).connect() as connection,
        ):
            return await connection.run_sync(pragmas)

    assert loop.run_until_complete(use(f"sqlite+aiosqlite:///{path}")) == DEFAULTS
    memory = loop.run_until_complete(use("sqlite+aiosqlite://"))
    assert memory == (1, "memory", 5000, 2)
    changed = use(f"sqlite+aiosqlite:///{path}", sqlite_busy_timeout=1, sqlite_synchronous="FULL")
    assert loop.run_until_complete(changed) == (1, "wal", 1000, 2)


def test_aiosqlite_waits_without_holding_up_the_loop(
    path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one task waits for the journal mode, others go on, and let the file go."""
    monkeypatch.delattr(sqlite, "sleep")  # it would hold up all tasks
    make_file(path)
    factory, seen = recorded()

    async def use() -> tuple[Any, ...]:
        async with (
            manage_async(connect_args={"factory": factory}) as manager,
            manager.get_engine(f"sqlite+aiosqlite:///{path}").connect() as connection,
        ):
            return await connection.run_sync(pragmas)

    async def let_go(other: sqlite3.Connection) -> None:
        while attempts(seen) < 2:  # noqa: ASYNC110 - another thread's doing
            await asyncio.sleep(0.001)
        other.execute("ROLLBACK")

    async def both(other: sqlite3.Connection) -> tuple[Any, ...]:
        found, _ = await asyncio.wait_for(asyncio.gather(use(), let_go(other)), 20)
        return found

    with another(path) as other:
        take_lock(other, "IMMEDIATE")
        assert loop.run_until_complete(both(other)) == DEFAULTS

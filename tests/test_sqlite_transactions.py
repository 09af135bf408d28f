"""How transactions begin on SQLite, what belongs to them, and whose are somebody else's."""

from __future__ import annotations

import functools
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import StaticPool, event, inspect, text

from sessionmgr import ResultStore, SessionManager
from sessionmgr.results.sent import _is_watched
from sessionmgr.sqlite_transactions import begin_for
from tests.concurrency import in_threads
from tests.items import Item, ItemBase, item_names
from tests.sqlite_helpers import (
    ADD,
    READ,
    another,
    can_write,
    counted,
    manage_pooled,
    raw,
    recorded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy.orm import Session


pytest_plugins = ["tests.sqlite_fixtures"]


@pytest.fixture(params=["file", "memory"])
def session(
    request: pytest.FixtureRequest, file_url: str, manager: SessionManager
) -> Iterator[Session]:
    """Open a session on a counter in a file, and on one in memory."""
    dburi = file_url if request.param == "file" else "sqlite://"
    with manager.session_factory(dburi) as session:
        if request.param == "memory":
            session.execute(text("CREATE TABLE counter (n INTEGER)"))
            session.execute(text("INSERT INTO counter VALUES (0)"))
            session.commit()
        yield session


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT 1", "BEGIN"),
        ("  \n\tselect 1", "BEGIN"),
        ("-- of what\n-- it is\nSELECT 1", "BEGIN"),
        ("/* INSERT ** / */ /**/SELECT 1", "BEGIN"),
        ("VALUES (1)", "BEGIN"),
        ("EXPLAIN QUERY PLAN DELETE FROM t", "BEGIN"),
        ("WITH a AS (SELECT replace(x, 'a', 'b') FROM t) SELECT * FROM a", "BEGIN"),
        ("WITH a AS (SELECT updated, deleted FROM inserts) SELECT * FROM a", "BEGIN"),
        ("WITH a AS (SELECT 1) INSERT INTO t SELECT * FROM a", "BEGIN IMMEDIATE"),
        ("with a as (select 1)\nreplace into t select * from a", "BEGIN IMMEDIATE"),
        ("WITH a AS (SELECT 1) INSERT OR IGNORE INTO t SELECT 1", "BEGIN IMMEDIATE"),
        ("WITH a AS (SELECT 1) UPDATE t SET a = 1", "BEGIN IMMEDIATE"),
        ("WITH a AS (SELECT 1) DELETE FROM t", "BEGIN IMMEDIATE"),
        ("INSERT INTO t VALUES (1)", "BEGIN IMMEDIATE"),
        ("REPLACE INTO t VALUES (1)", "BEGIN IMMEDIATE"),
        ("/* SELECT */ UPDATE t SET a = 1", "BEGIN IMMEDIATE"),
        ("-- SELECT\nDELETE FROM t", "BEGIN IMMEDIATE"),
        ("CREATE TABLE t (a)", "BEGIN IMMEDIATE"),
        ("drop table t", "BEGIN IMMEDIATE"),
        ("ALTER TABLE t ADD b", "BEGIN IMMEDIATE"),
        ("ANALYZE", "BEGIN IMMEDIATE"),
        ("SAVEPOINT a", "BEGIN"),
        ("; INSERT INTO a VALUES (1)", "BEGIN IMMEDIATE"),
        ("\ufeffINSERT INTO a VALUES (1)", "BEGIN IMMEDIATE"),
        ("WITH b AS (SELECT 1) DELETE/**/FROM a", "BEGIN IMMEDIATE"),
        ("PRAGMA foreign_keys=ON", None),
        ("VACUUM", None),
        ("ATTACH 'other.db' AS other", None),
        ("DETACH other", None),
        ("BEGIN IMMEDIATE", None),
        ("BEGIN", None),
        ("COMMIT", None),
        ("END", None),
        ("ROLLBACK TO a", None),
        ("RELEASE a", None),
        ("", None),
        ("-- nothing", None),
        ("/* not ended SELECT", None),
        (" /* a */ -- b" * 5000, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_first_statement_tells_how_a_transaction_begins(
    statement: str, expected: str | None
) -> None:
    """What reads begins deferred, what writes IMMEDIATE, and what has no place in one neither."""
    assert begin_for(statement) == expected


# -- what belongs to a transaction


def test_ddl_is_rolled_back(session: Session) -> None:
    """Tables that a transaction made are gone with it."""
    session.execute(text("CREATE TABLE made (a)"))
    session.execute(text("INSERT INTO made VALUES (1)"))
    session.execute(text("DROP TABLE counter"))
    session.rollback()
    assert inspect(session.connection()).get_table_names() == ["counter"]


def test_nested_rollback_keeps_the_rest(session: Session) -> None:
    """What a savepoint undoes is undone alone, also where it was the first statement."""
    with session.begin_nested() as nested:
        session.execute(ADD)
        nested.rollback()
    session.execute(ADD)
    with session.begin_nested() as nested:
        session.execute(ADD)
        nested.rollback()
    with session.begin_nested():
        session.execute(ADD)
    session.commit()
    assert session.scalar(READ) == 2


def test_released_savepoint_is_rolled_back_with_the_rest(session: Session) -> None:
    """The end of a savepoint commits nothing, also where it was the first statement."""
    with session.begin_nested():
        session.execute(ADD)
    session.rollback()
    assert session.scalar(READ) == 0


def test_transaction_reads_one_state(path: Path, file_url: str, manager: SessionManager) -> None:
    """What others commit after a transaction's first read, it does not see."""
    with manager.session_factory(file_url) as session:
        assert session.scalar(READ) == 0
        with another(path) as other:
            other.execute("UPDATE counter SET n = 5")
        assert session.scalar(READ) == 0
        session.rollback()
        assert session.scalar(READ) == 5


@pytest.mark.parametrize("first", ["VACUUM", "ATTACH ':memory:' AS other", "PRAGMA optimize"])
def test_what_has_no_place_in_a_transaction_works(session: Session, first: str) -> None:
    """Statements that SQLite refuses in a transaction work as the first of a session."""
    session.execute(text(first))
    assert not raw(session).in_transaction
    session.execute(ADD)
    session.commit()
    assert session.scalar(READ) == 1


def test_own_begin_is_kept(path: Path, file_url: str, manager: SessionManager) -> None:
    """A BEGIN of the caller's own is not doubled."""
    with manager.get_engine(file_url).connect() as connection:
        connection.exec_driver_sql("BEGIN EXCLUSIVE")
        connection.execute(ADD)
        connection.commit()
    assert counted(path) == 1


# -- whose transactions are somebody else's


CONTROLS: dict[str, dict[str, Any]] = {
    "off": {"sqlite_transactions": False},
    "none": {"sqlite_transactions": None},
    "isolation_level": {"connect_args": {"isolation_level": None}},
    "AUTOCOMMIT": {"isolation_level": "AUTOCOMMIT"},
    "execution_options": {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
}


@pytest.mark.parametrize("options", CONTROLS.values(), ids=CONTROLS)
def test_other_ways_to_begin_are_kept(path: Path, file_url: str, options: dict[str, Any]) -> None:
    """Where the caller has transactions begin otherwise, or not at all, nothing begins here."""
    with manage_pooled(**options) as manager:
        with manager.begin(file_url) as session:
            assert can_write(path)
            session.scalar(READ)
            assert not raw(session).in_transaction
            session.execute(text("CREATE TABLE made (a)"))
            assert not raw(session).in_transaction
            session.execute(ADD)
            assert raw(session).in_transaction is ("sqlite_transactions" in options)
        assert counted(path) == 1
        assert manager.run(file_url, lambda session: session.scalar(READ)) == 1


def test_drivers_own_isolation_level_is_kept(file_url: str) -> None:
    """An ``isolation_level`` that tells the driver how to begin is not overruled."""
    factory, seen = recorded()
    arguments = {"isolation_level": "EXCLUSIVE", "factory": factory}
    with manage_pooled(connect_args=arguments) as manager, manager.begin(file_url) as session:
        session.execute(ADD)
        begins = [statement.strip() for statement in seen if statement.startswith("BEGIN")]
        assert begins == ["BEGIN EXCLUSIVE"]


def test_autocommit_of_one_connection_ends_with_it(
    path: Path, file_url: str, manager: SessionManager
) -> None:
    """A connection that was in autocommit for a while begins transactions again afterwards."""
    engine = manager.get_engine(file_url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(ADD)
        assert not raw(connection).in_transaction
    assert counted(path) == 1
    with engine.connect() as connection:
        connection.execute(ADD)
        assert raw(connection).in_transaction
    assert counted(path) == 1
    [stats] = manager.stats().databases
    assert stats.connects == 1


def test_listeners_to_the_dialect_are_asked_first(file_url: str, manager: SessionManager) -> None:
    """A listener that executes statements itself begins transactions itself."""
    seen: list[str] = []

    def execute(cursor: Any, statement: str, parameters: Any, _: object) -> bool:
        seen.append(statement)
        cursor.execute(statement, parameters)
        return True

    event.listen(manager.get_engine(file_url), "do_execute", execute)
    with manager.session_factory(file_url) as session:
        session.scalar(READ)
        assert not raw(session).in_transaction
    assert seen == [str(READ)]


@pytest.mark.parametrize("own", [True, False])
def test_stores_send_their_upserts_themselves(file_url: str, own: bool) -> None:
    """Nobody is taken for a listener whom the statements of a ResultStore have to be shown to."""
    with (
        manage_pooled() as manager,
        ResultStore(file_url, manager=None if own else manager) as store,
    ):
        assert store.store("1", "SUCCESS", b"result")
        with store.manager.get_engine(store.dburi).connect() as connection:
            assert not _is_watched(connection)
        assert not store.store("1", "FAILURE", b"other")


# -- connections that threads share


@pytest.mark.parametrize("dburi", ["sqlite://", "file"])
def test_threads_read_from_one_connection(file_url: str, dburi: str) -> None:
    """Threads that read from one connection at the same time get in nobody's way."""
    options = {} if dburi == "sqlite://" else {"poolclass": StaticPool}
    dburi = dburi if dburi == "sqlite://" else file_url
    with manage_pooled(**options) as manager:
        manager.session_factory(dburi).close()

        def use(number: int) -> None:
            for count in range(50):
                with manager.session_factory(dburi) as session:
                    assert session.scalar(text(f"SELECT {number} + {count}")) == number + count
                    assert not raw(session).in_transaction

        in_threads([functools.partial(use, number) for number in range(8)])
        [stats] = manager.stats().databases
        assert (stats.connects, stats.checked_out, stats.idle) == (1, 0, 1)


class Overtaken(sqlite3.Connection):
    """A connection on which another thread begins a transaction just after one has looked."""

    race = False

    @property
    def in_transaction(self) -> bool:
        """Tell what was."""
        was = super().in_transaction
        if self.race and not was:
            self.execute("BEGIN")
        return was


def test_who_finds_a_transaction_begun_is_part_of_it() -> None:
    """Of two threads that begin at the same time, one does, and both go on."""
    with manage_pooled(connect_args={"factory": Overtaken}) as manager:
        with manager.begin("sqlite://") as session:
            session.execute(text("CREATE TABLE counter (n)"))
            overtaken: Any = raw(session)
        overtaken.race = True
        with manager.begin("sqlite://") as session:
            session.execute(text("INSERT INTO counter VALUES (1)"))
        with manager.begin("sqlite://", write=False) as session:
            session.execute(ADD)
        overtaken.race = False
        with manager.session_factory("sqlite://") as session:
            assert session.scalar(READ) == 2


def test_memory_database_of_several_connections(manager: SessionManager) -> None:
    """With ``cache=shared`` and a pool, transactions in memory are each connection's own."""
    url = "sqlite:///file:several?mode=memory&cache=shared&uri=true"
    with SessionManager(metadata=ItemBase.metadata, pooling="never") as keeper:
        keeper.session_factory(url).close()
        with (
            SessionManager(
                metadata=ItemBase.metadata, engine_options={"connect_args": {}}
            ) as manager,
            manager.begin(url) as session,
        ):
            session.add(Item(name="kept"))
        with keeper.session_factory(url) as session:
            assert item_names(session) == ["kept"]

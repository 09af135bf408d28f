"""Interrupts between the statements of a transaction, and connections left amidst a statement."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from sessionmgr import ResultStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database

pytest_plugins = ["tests.results_fixtures"]


class TimeIsUp(Exception):  # noqa: N818 - as Celery's soft time limit, no error of the program
    """What a signal's handler raises."""


def interrupt_once(monkeypatch: pytest.MonkeyPatch, word: str, moment: str) -> None:
    """Raise an interrupt before or after the next statement that begins with a word."""
    execute, pending = Connection.exec_driver_sql, [TimeIsUp()]

    def interrupted(self: Connection, statement: str, *args: Any, **options: Any) -> Any:
        strikes = statement.startswith(word) and bool(pending)
        if strikes and moment == "before":
            raise pending.pop()
        result = execute(self, statement, *args, **options)
        if strikes:
            raise pending.pop()
        return result

    monkeypatch.setattr(Connection, "exec_driver_sql", interrupted)


@pytest.mark.parametrize(("word", "moment"), [("BEGIN", "after"), ("COMMIT", "before")])
def test_interrupted_transaction_is_not_left_open(
    store: ResultStore, url: URL | str, monkeypatch: pytest.MonkeyPatch, word: str, moment: str
) -> None:
    """What the next call on that connection stores is seen by others, and locks nothing."""
    store.prepare()
    interrupt_once(monkeypatch, word, moment)
    with pytest.raises(TimeIsUp):
        store.chords.part_returned(
            "g", "1", 0, "SUCCESS", b"1", lambda: store.store("1", "SUCCESS")
        )
    assert store.get("1") is None
    assert store.store("2", "SUCCESS") is True
    with ResultStore(url, attempts=1) as other:
        assert other.exists("2")
        assert other.store("3", "SUCCESS") is True
    assert store.access.lent is None


def test_transaction_that_cannot_begin_costs_no_connection(tmp_path: Path) -> None:
    """While somebody else writes to the file, the connection stays: of memory it would be all."""
    path = tmp_path / "locked.db"
    options = {"connect_args": {"timeout": 0}}
    with (
        ResultStore(f"sqlite:///{path}", attempts=1, engine_options=options) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        store.store("1", "SUCCESS")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            store.chords.part_returned("g", "1", 0, "SUCCESS", b"1")
        other.execute("ROLLBACK")
        store.chords.part_returned("g", "1", 0, "SUCCESS", b"1")
        [stats] = store.manager.stats().databases
        assert stats.connects == 1


def test_connection_amidst_a_statement_is_given_up(make_database: Callable[..., Database]) -> None:
    """Psycopg takes it for open, and refuses every statement: it serves nobody again."""
    with ResultStore(make_database("psycopg").url, attempts=1) as store:
        store.store("1", "FAILURE")
        connection = store.manager.get_engine(store.dburi).raw_connection()
        driver: Any = connection.driver_connection
        driver.pgconn.send_query(b"SELECT 1")  # whose answer nobody takes
        connection.close()
        with pytest.raises(OperationalError) as caught:
            store.store("1", "FAILURE")
        assert caught.value.connection_invalidated
        assert store.store("1", "FAILURE") is True

"""Upgrades of a store's tables beside those who use them."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import pytest
from sqlalchemy import text

from sessionmgr import ResultStore, SchemaLockError, TaskResult, serverlock
from sessionmgr.results import access, preparation
from sessionmgr.schema import upgrade_tables
from sessionmgr.serverlock import server_lock
from tests.concurrency import in_threads
from tests.helpers import wait_until
from tests.results_helpers import columns_of, make_celery_tables, plain_engine
from tests.schema_helpers import database_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database


def upgraded_in_thread(store: ResultStore) -> tuple[threading.Thread, list[str]]:
    """Begin an upgrade; give its thread, and the list that gets its statements."""
    engine, done = store.manager.get_engine(store.dburi), []

    def run() -> None:
        done.extend(upgrade_tables(engine, store.tables.metadata, "it", whole=True))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, done


def test_nobody_waits_for_an_index_of_another_table(make_database: Callable[..., Database]) -> None:
    """While an index waits for a writer, all read, and write to the tables that have theirs."""
    database = make_database("psycopg")
    url = database.url
    make_celery_tables(url, "4.4")
    waiting = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database WHERE"
    waiting += " datname = %s AND mode = 'ShareLock' AND NOT granted"
    with (
        ResultStore(url, create_tables=False) as store,
        plain_engine(url) as engine,
        engine.connect() as writer,
        engine.connect() as other,
    ):
        writer.execute(text("INSERT INTO celery_tasksetmeta (id, taskset_id) VALUES (1, 'open')"))
        thread, done = upgraded_in_thread(store)
        wait_until(lambda: database.server.query(waiting, database.name) == [(1,)])
        other.execute(text("SET lock_timeout = '2s'"))
        assert other.execute(text("SELECT * FROM celery_tasksetmeta")).all() == []
        assert other.execute(text("SELECT children, stamps FROM celery_taskmeta")).all() == []
        other.execute(text("INSERT INTO celery_taskmeta (id, task_id) VALUES (1, '1')"))
        other.commit()
        writer.commit()
        thread.join(30.0)
    assert [each.split()[0] for each in done[-3:]] == ["ALTER", "CREATE", "CREATE"]


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_upgrades_at_once_share_the_steps(
    make_database: Callable[..., Database], tmp_path: Path, driver: str
) -> None:
    """Of three that begin at once none fails, and each statement is run by one of them."""
    url = database_url(driver, make_database, tmp_path)
    make_celery_tables(url, "4.4")
    with ResultStore(url, create_tables=False) as store:
        engine, metadata = store.manager.get_engine(url), store.tables.metadata

        def upgrade() -> list[str]:
            return upgrade_tables(engine, metadata, "it", whole=True)

        done = [each for statements in in_threads([upgrade] * 3) for each in statements]
        assert len(done) == len(set(done)) > 10
        assert upgrade() == []
    assert {"children", "stamps"} <= columns_of(url)


# -- somebody else has the lock


@contextmanager
def schema_lock(url: URL) -> Iterator[None]:
    """Hold the lock on changes of a database's tables."""
    with (
        plain_engine(url) as engine,
        engine.begin() as connection,
        server_lock(connection, "schema", "another's"),
    ):
        yield


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
@pytest.mark.parametrize("create_tables", [True, "missing"])
def test_store_works_without_the_lock(
    make_database: Callable[..., Database],
    driver: str,
    create_tables: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It warns, goes on with the columns there are, and looks again when the time has come."""
    monkeypatch.setattr(serverlock, "LOCK_TIMEOUT", 1)
    monkeypatch.setattr(access, "_AGAIN", 0.0)
    url = make_database(driver).url
    make_celery_tables(url, "5.2")
    with ResultStore(url, create_tables=create_tables) as store:
        with schema_lock(url):
            assert store.store("1", "SUCCESS", b"1", children=b"[]")
            assert store.get("1") == TaskResult("1", "SUCCESS", b"1", date_done=ANY)
            assert len(caplog.records) == 2
            assert "holds the schema lock since 1 s" in caplog.text
        assert store.store("2", "SUCCESS", b"2", children=b"[]")
        assert (store.get("2").children == b"[]") is (create_tables is True)  # type: ignore[union-attr]
        assert len(caplog.records) == 2
        store.chords.begin("new")


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_short_wait_where_columns_are_missing(
    make_database: Callable[..., Database],
    driver: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where all tables can be used, a store does not wait for the lock as long as elsewhere."""
    monkeypatch.setattr(preparation, "_SHORT", 1)
    url = make_database(driver).url
    make_celery_tables(url, "5.2")
    with ResultStore(url, create_tables="missing") as first:
        first.prepare()
    with schema_lock(url), ResultStore(url) as store:
        for number in range(3):
            assert store.store(f"{number}", "SUCCESS")
        assert store.chords.supported()
    assert [each.getMessage().count("since 1 s") for each in caplog.records] == [1]


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_without_a_table_the_lock_is_needed(
    make_database: Callable[..., Database], driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to go on with: the error says who has the lock, and later it works."""
    monkeypatch.setattr(serverlock, "LOCK_TIMEOUT", 1)
    url = make_database(driver).url
    with ResultStore(url) as store:
        with schema_lock(url), pytest.raises(SchemaLockError, match="the schema lock since 1 s"):
            store.store("1", "SUCCESS")
        assert store.store("1", "SUCCESS")

"""``prepare_models`` where it fails: hopeless errors raise at once, passing ones do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    Engine,
    NullPool,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from sessionmgr import SchemaLockError, serverlock
from tests.items import ItemBase
from tests.schema_helpers import (
    database_url,
    fail_always,
    powerless_role,
    rich_metadata,
)
from tests.servers import DRIVERS
from tests.servers.server import APP_PASSWORD, APP_USER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.async_facade import ManagerClass
    from tests.servers import Database


def test_missing_right_is_the_drivers_error_at_once(
    database: Database, manager_class: ManagerClass
) -> None:
    """A role that may not create the missing tables gets the driver's error from one attempt."""
    metadata = rich_metadata()
    attempts = fail_always(metadata, lambda _: None)
    with powerless_role(database) as url, manager_class(metadata=metadata) as manager:
        with pytest.raises((OperationalError, ProgrammingError), match=r"denied") as caught:
            manager.session_factory(url)
        assert len(attempts) == 1
        assert isinstance(caught.value.orig, database.url.get_dialect().import_dbapi().Error)
        assert manager.prepared == frozenset()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"password": "wrong_password"}, r"authentication failed|Access denied"),
        ({"database": "no_such_database"}, r"does not exist|Unknown database|Access denied"),
    ],
    ids=["password", "database"],
)
def test_hopeless_connects_are_not_retried(
    database: Database,
    change: dict[str, str],
    match: str,
    manager_class: ManagerClass,
) -> None:
    """A wrong password and a missing database give the driver's error after one connect."""
    connects: list[str] = []

    def count(engine: Engine) -> None:
        event.listen(engine, "do_connect", lambda *_: connects.append("connect"))

    with manager_class(count, metadata=ItemBase.metadata) as manager:
        with pytest.raises(DBAPIError, match=match):
            manager.session_factory(database.url.set(**change))
        assert len(connects) == 1
        assert manager.prepared == frozenset()


def fail_as_a_race(connection: Any) -> None:
    """Create a table twice, as two processes at once would."""
    for _ in range(2):
        connection.execute(text("CREATE TABLE twice (id INTEGER)"))


def fail_as_contention(connection: Any) -> None:
    """Raise what a deadlock raises."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$"))
    connection.execute(text("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'x'"))


@pytest.mark.parametrize(
    ("driver", "fail"),
    [
        ("psycopg", fail_as_a_race),
        ("psycopg2", fail_as_contention),
        ("pymysql", fail_as_a_race),
        ("mysqlclient", fail_as_contention),
        ("sqlite", fail_as_a_race),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.twin_cases(driver=["psycopg", "pymysql"])
def test_passing_failures_are_tried_eleven_times(
    make_database: Callable[..., Database],
    tmp_path: Path,
    driver: str,
    fail: Callable[..., None],
    manager_class: ManagerClass,
    sqlite: str,
) -> None:
    """A ``create_all`` that always fails in a passing way is tried 11 times, and then raises."""
    metadata = rich_metadata()
    attempts = fail_always(metadata, fail)
    with manager_class(metadata=metadata) as manager:
        with pytest.raises(DBAPIError):
            manager.session_factory(database_url(driver, make_database, tmp_path, sqlite))
        assert len(attempts) == 11
        assert manager.prepared == frozenset()


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_passing_failure_that_passes_costs_nothing(
    make_database: Callable[..., Database],
    tmp_path: Path,
    driver: str,
    manager_class: ManagerClass,
    sqlite: str,
) -> None:
    """Tables are there in the end when the third attempt succeeds."""
    metadata = rich_metadata()

    def fail_twice(connection: Any) -> None:
        if len(attempts) < 3:
            connection.execute(text("CREATE TABLE person (id INTEGER)"))
            connection.execute(text("CREATE TABLE person (id INTEGER)"))
        connection.execute(text("DROP TABLE IF EXISTS person"))  # MySQL keeps what failed

    attempts = fail_always(metadata, fail_twice)
    with manager_class(metadata=metadata) as manager:
        url = database_url(driver, make_database, tmp_path, sqlite)
        with manager.session_factory(url) as session:
            assert set(inspect(session.connection()).get_table_names()) >= {"other"}
        assert len(attempts) == 3


@pytest.mark.parametrize("driver", list(DRIVERS))
def test_schema_lock_that_is_not_granted_raises(
    make_database: Callable[..., Database],
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    manager_class: ManagerClass,
) -> None:
    """Where another connection keeps the lock for longer than the limit, the error says so."""
    database = make_database(driver)
    monkeypatch.setattr(serverlock, "LOCK_TIMEOUT", 1)
    holder = create_engine(database.url, poolclass=NullPool)
    with manager_class(metadata=rich_metadata()) as manager, holder.connect() as connection:
        with connection.begin(), serverlock.server_lock(connection, "schema", "it"):
            with pytest.raises(SchemaLockError, match="since 1 s") as caught:
                manager.session_factory(database.url)
            shown = str(caught.value)
            mine = "pg_backend_pid" if driver.startswith("psycopg") else "connection_id"
            find = shown.partition("Find it with ")[2]
            pids = connection.exec_driver_sql(find).scalars().all()
            assert pids == [connection.scalar(text(f"SELECT {mine}()"))]
        assert database.name in shown
        assert APP_USER in shown
        assert APP_PASSWORD not in shown
        with manager.session_factory(database.url) as session:
            if driver.startswith("psycopg"):
                assert session.scalar(text("SHOW lock_timeout")) == "0"
        with connection.begin(), serverlock.server_lock(connection, "schema", "it", 0):
            pass


def test_lock_timeout_of_the_user_is_for_all_other_locks(
    make_database: Callable[..., Database],
) -> None:
    """On PostgreSQL the time for the schema lock is for that alone, within the transaction too."""
    engine = create_engine(make_database("psycopg").url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("SET lock_timeout = '4321ms'"))
        with serverlock.server_lock(connection, "schema", "it"):
            assert connection.scalar(text("SHOW lock_timeout")) == "4321ms"

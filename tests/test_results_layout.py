"""Tables that are there: of every version of Celery, with and without what was added later."""

from __future__ import annotations

import logging
import pickle
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from celery.backends.database import DatabaseBackend
from sqlalchemy import event, inspect, make_url

from sessionmgr import ResultStore, ResultTooLongError, TaskResult
from sessionmgr.schema import upgrade_tables
from tests.concurrency import in_children
from tests.results_helpers import (
    EXTENDED_COLUMNS,
    columns_of,
    counted_statements,
    make_celery_tables,
    plain_engine,
    rows_of,
)
from tests.schema_helpers import database_url, powerless_role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database

WHEN = datetime(2021, 5, 4, 3, 2, 1)  # noqa: DTZ001 - as the table has it

# Each driver's database with ids from another place.
IDS = {
    "psycopg": "sequence",
    "psycopg2": "auto",
    "pymysql": "sequence",
    "mysqlclient": "auto",
    "sqlite": "auto",
}


@pytest.fixture
def url(driver: str, make_database: Callable[..., Database], tmp_path: Path) -> URL | str:
    """Return the URL of an empty database."""
    return database_url(driver, make_database, tmp_path)


def celery_backend(url: URL | str, *, extended: bool = False) -> DatabaseBackend:
    """Return Celery's own backend for a database."""
    app = Celery(set_as_current=False)
    app.conf.update(result_extended=extended, database_short_lived_sessions=True)
    text = make_url(url).render_as_string(hide_password=False)
    return DatabaseBackend(dburi=text, app=app)


# -- rows of Celery's


@pytest.mark.parametrize(
    ("driver", "version", "create_tables"),
    [
        ("psycopg", "4.4", True),
        ("psycopg", "5.7", False),
        ("psycopg2", "5.2", False),
        ("psycopg2", "5.6", True),
        ("pymysql", "4.4", False),
        ("pymysql", "5.7", True),
        ("mysqlclient", "5.6", False),
        ("mysqlclient", "5.2", True),
        ("sqlite", "4.4", False),
        ("sqlite", "5.2", True),
        ("sqlite", "5.6", False),
        ("sqlite", "5.7", False),
    ],
)
def test_old_tables_are_read_and_written(
    url: URL | str, driver: str, version: str, create_tables: bool
) -> None:
    """Rows of a version's tables come back as they are, and new ones get ids after theirs."""
    payload = b'{"a": 1}' if version == "5.7" else pickle.dumps('{"a": 1}')
    metadata = make_celery_tables(url, version, ids=IDS[driver])
    task, group = (metadata.tables[name] for name in ("celery_taskmeta", "celery_tasksetmeta"))
    old = {"status": "FAILURE", "result": payload, "date_done": WHEN, "traceback": "text"}
    with plain_engine(url) as engine, engine.begin() as connection:
        for task_id in ("one", "two"):
            connection.execute(task.insert(), {"task_id": task_id, **old})
        connection.execute(
            group.insert(), {"taskset_id": "g", "result": payload, "date_done": WHEN}
        )
    with ResultStore(url, create_tables=create_tables) as store:
        assert store.get("one") == TaskResult("one", "FAILURE", payload, "text", WHEN)
        assert store.restore_group("g") == (payload, WHEN)
        assert store.store("two", "SUCCESS", b"2", children=b"[]", date_done=WHEN) is True
        assert store.store("two", "FAILURE", b"3") is False
        assert store.store("three", "STARTED") is True
        store.store_many([TaskResult("four", "SUCCESS", b"4"), TaskResult("one", "RETRY")])
        store.save_group("g", b"new")
        store.save_group("h", b"new")
        children = b"[]" if create_tables or version == "5.7" else None
        two = TaskResult("two", "SUCCESS", b"2", date_done=WHEN, children=children)
        assert store.get("two") == two
        found = store.get_many(["one", "three", "four"])
        assert {each.task_id: each.status for each in found.values()} == {
            "one": "RETRY",
            "three": "STARTED",
            "four": "SUCCESS",
        }
        assert store.restore_group("g")[0] == b"new"  # type: ignore[index]
    rows = rows_of(url, "SELECT id, task_id FROM celery_taskmeta")
    ids = {task_id: number for number, task_id in rows}
    assert (ids["one"], ids["two"]) == (1, 2), "rows keep their ids"
    assert len(rows) == len({number for number, _ in rows}) == 4


@pytest.mark.parametrize(
    ("driver", "version", "there"),
    [
        ("psycopg", "4.4", True),
        ("psycopg2", "5.7", False),
        ("pymysql", "5.7", True),
        ("mysqlclient", "4.4", False),
        ("sqlite", "4.4", True),
        ("sqlite", "5.7", True),
    ],
)
def test_extended_store_on_tables_of_any_kind(
    url: URL | str, driver: str, version: str, there: bool
) -> None:
    """An extended store keeps what the table has columns for, and all once they are added."""
    make_celery_tables(url, version, ids=IDS[driver], extended=there)
    given: dict[str, Any] = {
        "name": "tasks.add", "args": b"1", "kwargs": b"2", "worker": "w", "retries": 1,
        "queue": "q", "stamps": b"3",
    }  # fmt: skip
    has = EXTENDED_COLUMNS if there else ()
    has = (*has, "stamps") if there and version == "5.7" else has
    with ResultStore(url, extended=True, create_tables=False) as store:
        store.store("1", "SUCCESS", b"1", date_done=WHEN, **given)
        kept = {name: given[name] for name in has}
        assert store.get("1") == TaskResult("1", "SUCCESS", b"1", date_done=WHEN, **kept)
        store.store_many([TaskResult("2", "SUCCESS", **given)])
        store.forget("1")
    with ResultStore(url, extended=True) as store:
        store.store("1", "SUCCESS", b"1", date_done=WHEN, **given)
        assert store.get("1") == TaskResult("1", "SUCCESS", b"1", date_done=WHEN, **given)


@pytest.mark.parametrize(
    ("driver", "extended"),
    [
        ("psycopg", True),
        ("psycopg2", False),
        ("pymysql", False),
        ("mysqlclient", True),
        ("sqlite", True),
        ("sqlite", False),
    ],
)
def test_celerys_backend_and_the_store_share_rows(url: URL | str, extended: bool) -> None:
    """What Celery's own backend stores the store reads, and the other way round."""
    celery = celery_backend(url, extended=extended)
    celery.store_result("1", {"sum": 3}, "SUCCESS")
    celery.store_result("2", ValueError("no"), "FAILURE", traceback="Traceback")
    celery.store_result("3", None, "STARTED")
    with ResultStore(url, extended=extended) as store:
        found = store.get_many(["1", "2", "3"])
        assert [found[i].status for i in "123"] == ["SUCCESS", "FAILURE", "STARTED"]
        assert celery.decode(found["1"].result) == {"sum": 3}
        assert found["2"].traceback == "Traceback"
        assert store.store("1", "FAILURE") is False
        assert store.store("3", "SUCCESS", celery.encode([1, 2]).encode()) is True
        assert store.store("4", "SUCCESS", celery.encode("new").encode()) is True
        store.save_group("g", celery.encode([1]).encode())
    for task_id, value in {"1": {"sum": 3}, "3": [1, 2], "4": "new"}.items():
        assert celery.get_task_meta(task_id)["result"] == value
    celery.store_result("4", "late", "FAILURE")
    celery.store_result("5", 5, "SUCCESS")
    assert celery.get_task_meta("4")["status"] == "SUCCESS"
    assert celery.get_task_meta("5")["result"] == 5
    assert rows_of(url, "SELECT taskset_id FROM celery_tasksetmeta") == [("g",)]


@pytest.mark.parametrize("driver", ["pymysql", "mysqlclient"])
def test_celerys_backend_uses_tables_of_the_store(url: URL | str) -> None:
    """It reads and writes those with fractions of seconds, and its cleanup goes by them."""
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    with ResultStore(url) as store:
        store.store("1", "SUCCESS", b"1", date_done=now)
        store.store("2", "SUCCESS", b"2", date_done=now - timedelta(days=2))
        celery = celery_backend(url)
        celery.store_result("3", 3, "SUCCESS")
        assert celery.get_task_meta("1")["date_done"] == now
        assert now <= store.get("3").date_done  # type: ignore[union-attr, operator]
        celery.cleanup()
        assert store.get_many(list("123")).keys() == {"1", "3"}


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_ids_may_be_identities(url: URL | str) -> None:
    """Tables whose ids PostgreSQL makes itself, by an identity, are written without sequences."""
    make_celery_tables(url, "5.7", ids="identity")
    with ResultStore(url) as store:
        assert [store.store("1", state) for state in ("STARTED", "SUCCESS", "RETRY")] == [
            True,
            True,
            False,
        ]
        store.store_many([TaskResult("2", "SUCCESS"), TaskResult("1", "STARTED")])
        store.save_group("g", b"1")
        assert [store.get(i).status for i in "12"] == ["SUCCESS"] * 2  # type: ignore[union-attr]


# -- what is missing


@pytest.mark.parametrize("driver", ["psycopg2", "mysqlclient", "sqlite"])
def test_missing_columns_are_found_once(url: URL | str, driver: str) -> None:
    """A store looks at the tables at its first call, and at none of the next thousand."""
    make_celery_tables(url, "5.2", ids=IDS[driver])
    with ResultStore(url, create_tables=False) as store, counted_statements(store) as statements:
        store.store("1", "STARTED", children=b"[]")
        looked = len(statements)
        for number in range(50):
            store.store(f"{number}", "STARTED", children=b"[]")
            store.get(f"{number}")
        assert len(statements) == looked + 100
        assert not any("children" in each for each in statements if "celery_taskmeta" in each)
    assert "children" not in columns_of(url)


@pytest.mark.parametrize("driver", ["psycopg", "mysqlclient", "sqlite"])
def test_columns_are_added_once_where_that_is_asked_for(url: URL | str, driver: str) -> None:
    """create_tables adds every column that may be NULL, keeps the rows, and has no more to do."""
    make_celery_tables(url, "4.4", ids=IDS[driver])
    rows_of(url, "INSERT INTO celery_taskmeta (id, task_id, status) VALUES (1000, 'old', 'RETRY')")
    changes: list[str] = []

    def note(*args: Any) -> None:
        if args[2].lstrip().upper().startswith(("ALTER", "CREATE", "DROP")):
            changes.append(args[2])

    with ResultStore(url) as store:
        event.listen(store.manager.get_engine(url), "before_cursor_execute", note)
        store.prepare()
        assert {"children", "stamps", *EXTENDED_COLUMNS} <= columns_of(url)
        assert sum(each.startswith("ALTER TABLE celery_taskmeta ADD") for each in changes) == 8
        assert store.get("old") == TaskResult("old", "RETRY")
        store.store("old", "SUCCESS", children=b"[]")
    changes.clear()
    with ResultStore(url, extended=True) as store:
        event.listen(store.manager.get_engine(url), "before_cursor_execute", note)
        assert store.get("old").children == b"[]"  # type: ignore[union-attr]
    assert changes == []


@pytest.mark.parametrize(
    ("driver", "old"),
    [("psycopg", True), ("psycopg", False), ("pymysql", True), ("sqlite", True)],
)
def test_eight_processes_prepare_at_once(
    url: URL | str, driver: str, old: bool, request: pytest.FixtureRequest
) -> None:
    """All of them store at once into tables that lack columns; PostgreSQL logs no error."""
    if old:
        make_celery_tables(url, "5.2", ids=IDS[driver])
    store = ResultStore(url, extended=True)
    server = request.getfixturevalue("postgresql") if driver == "psycopg" else None
    mark = server.log_mark() if server else 0

    def start(number: int) -> Callable[[], bool]:
        return lambda: store.store(f"{number}", "SUCCESS", b"1", children=b"[]", stamps=b"1")

    assert in_children([start(number) for number in range(8)]) == [True] * 8
    found = store.get_many(f"{number}" for number in range(8))
    assert [each.stamps for each in found.values()] == [b"1"] * 8
    store.close()
    if server:
        name = f"@{make_url(url).database} "
        lines = [line for line in server.log_text(mark).splitlines() if name in line]
        assert not [line for line in lines if "ERROR:" in line or "FATAL:" in line]


@pytest.mark.parametrize("driver", ["psycopg", "mysqlclient"])
def test_role_without_the_right_uses_what_is_there(
    make_database: Callable[..., Database], driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A role that may not change tables gets one warning, with the next step, and works."""
    database = make_database(driver)
    make_celery_tables(database.url, "5.2", ids=IDS[driver])
    with (
        powerless_role(database) as url,
        granted(database, url),
        caplog.at_level(logging.WARNING, "sessionmgr"),
        ResultStore(url) as store,
    ):
        for number in range(3):
            assert store.store("1", "STARTED", str(number).encode(), children=b"[]")
        assert store.store("1", "SUCCESS", b"1") is True
        assert store.store("1", "SUCCESS", b"2") is False
        assert store.get("1").result == b"1"  # type: ignore[union-attr]
        store.save_group("g", b"1")
    [record] = caplog.records
    message = record.getMessage()
    assert "python -m sessionmgr results ddl" in message
    assert database.name in message
    assert str(url.password) not in message
    assert "children" not in columns_of(database.url)


@contextmanager
def granted(database: Database, url: URL) -> Iterator[None]:
    """Give a role what a store does with the tables that are there."""
    role = url.username
    if database.driver == "mysqlclient":
        database.server.query(f"GRANT UPDATE, DELETE ON {database.name}.* TO {role}")
        yield
        return
    rows_of(database.url, f"GRANT UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    rows_of(database.url, f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}")
    yield
    rows_of(database.url, f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM {role}")


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_role_without_the_right_and_without_tables_gets_the_error(
    make_database: Callable[..., Database], driver: str
) -> None:
    """Without any table for results there is nothing to go on with: the driver's error says so."""
    with powerless_role(make_database(driver)) as url, ResultStore(url) as store:
        for number in ("1", "2"):
            with pytest.raises(Exception, match="denied"):
                store.store(number, "STARTED")


@pytest.mark.parametrize("driver", ["psycopg", "mysqlclient", "sqlite"])
def test_without_create_tables_missing_ones_are_the_drivers_error(url: URL | str) -> None:
    """create_tables=False creates nothing; once somebody else has, the store works."""
    with ResultStore(url, create_tables=False) as store:
        with pytest.raises(Exception, match="celery_taskmeta"):
            store.store("1", "STARTED")
        make_celery_tables(url, "5.2")
        assert store.store("1", "SUCCESS", b"1", children=b"[]")
        assert store.get("1").result == b"1"  # type: ignore[union-attr]


@pytest.mark.parametrize("driver", ["psycopg", "sqlite"])
def test_invalidate_looks_again(url: URL | str, driver: str) -> None:
    """What was added since is used after invalidate()."""
    make_celery_tables(url, "5.2", ids=IDS[driver])
    with ResultStore(url, create_tables=False) as store:
        store.store("1", "STARTED", children=b"[]")
        with ResultStore(url) as adding:
            adding.prepare()
        assert store.get("1").children is None  # type: ignore[union-attr]
        store.invalidate()
        store.store("1", "SUCCESS", children=b"[]")
        assert store.get("1").children == b"[]"  # type: ignore[union-attr]


# -- long results


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql", "mysqlclient", "sqlite"])
def test_new_tables_hold_long_results(url: URL | str) -> None:
    """Tables made by the store hold 2 MB of result and 100 kB of traceback, and give them back."""
    result, traceback = bytes(range(256)) * 8192, "x" * 100_000
    with ResultStore(url) as store:
        store.store("1", "FAILURE", result, traceback=traceback, children=result)
        assert store.store("1", "SUCCESS", result) is True
        store.store_many([TaskResult("2", "FAILURE", result, traceback)])
        store.save_group("g", result)
        found = store.get_many(["1", "2"])
        assert found["1"].result == found["2"].result == result
        assert found["2"].traceback == traceback
        assert store.restore_group("g")[0] == result  # type: ignore[index]


@pytest.mark.parametrize(("driver", "strict"), [("pymysql", True), ("mysqlclient", False)])
def test_result_too_long_for_an_old_table_is_an_error(
    make_database: Callable[..., Database], driver: str, strict: bool
) -> None:
    """70 kB into a BLOB raises, whatever sql_mode is, and stores nothing, until it is widened."""
    url = make_database(driver).url
    make_celery_tables(url, "5.7", ids=IDS[driver])
    mode = "STRICT_TRANS_TABLES" if strict else ""
    options = {"connect_args": {"init_command": f"SET sql_mode = '{mode}'"}}
    long = b"x" * 70_000
    with ResultStore(url, engine_options=options) as store:
        store.store("1", "STARTED", b"short")
        with pytest.raises(ResultTooLongError, match=r"70,000.* holds 65,535\. .*results upgrade"):
            store.store("1", "SUCCESS", long)
        with pytest.raises(ResultTooLongError, match="traceback of '2'"):
            store.store("2", "FAILURE", traceback="\N{SNOWMAN}" * 30_000)
        with pytest.raises(ResultTooLongError, match="result of '4'"):
            store.store_many([TaskResult("3", "SUCCESS"), TaskResult("4", "SUCCESS", long)])
        with pytest.raises(ResultTooLongError, match="'g'"):
            store.save_group("g", long)
        assert store.get_many(list("1234")).keys() == {"1"}
        assert store.get("1") == TaskResult("1", "STARTED", b"short")
        assert store.restore_group("g") is None
        upgrade_tables(store.manager.get_engine(url), store.tables.metadata, "it", whole=True)
        store.invalidate()
        assert store.store("1", "SUCCESS", long, traceback="x" * 70_000) is True
        store.save_group("g", long)
        assert store.get("1").result == long  # type: ignore[union-attr]
    indexes = rows_of(url, "SHOW INDEX FROM celery_taskmeta WHERE Column_name = 'date_done'")
    assert len(indexes) == 1


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_whole_upgrade_adds_indexes_and_has_no_more_to_do(url: URL | str, driver: str) -> None:
    """The index of date_done is there after upgrade_tables(whole=True), and a second is a look."""
    metadata = make_celery_tables(url, "4.4", ids=IDS[driver])
    with ResultStore(url, create_tables=False) as store:
        engine = store.manager.get_engine(url)
        for _ in range(2):
            with counted_statements(store) as statements:
                upgrade_tables(engine, store.tables.metadata, "it", whole=True)
        changes = ("ALTER", "CREATE", "DROP")
        assert not [each for each in statements if each.lstrip().upper().startswith(changes)]
        names = {table.name for table in store.tables.metadata.sorted_tables}
    assert names > set(metadata.tables)
    with plain_engine(url) as engine, engine.connect() as connection:
        indexes = inspect(connection).get_indexes("celery_taskmeta")
    assert ["date_done"] in [each["column_names"] for each in indexes]

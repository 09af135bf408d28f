"""What a ResultStore is given by mistake: an error says what, and what to do instead."""

from __future__ import annotations

import uuid
from datetime import date, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest

from sessionmgr import (
    DatabaseURLError,
    EngineOptionsError,
    NoSuchBindError,
    ResultArgumentError,
    ResultStore,
    ResultTooLongError,
    SessionManager,
    TaskResult,
)
from sessionmgr.results.tables import NAMES, OTHER_NAMES
from tests.schema_helpers import database_url

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL as DatabaseURL  # noqa: N811 - URL is a text here

    from tests.servers import Database

pytest_plugins = ["tests.results_fixtures"]

PASSWORD = "s3cr3t-w0rd"
URL = f"postgresql+psycopg://app:{PASSWORD}@nowhere.invalid/results"


TRANSLATED: dict[str, Any] = {
    "execution_options": {"schema_translate_map": {None: "mine"}, "other": 1}
}

FIRST = datetime.min.replace(tzinfo=timezone(timedelta(hours=5)))
"""The first moment of a time zone, before those of UTC."""


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"manager": URL}, ResultArgumentError, "manager is a SessionManager"),
        ({"manager": {"password": PASSWORD}}, ResultArgumentError, "manager is a SessionManager"),
        ({"attempts": 0}, EngineOptionsError, "attempts must be a whole number of at least 1"),
        ({"table_names": "mine"}, ResultArgumentError, "table_names is a mapping"),
        ({"table_names": URL}, ResultArgumentError, "table_names is a mapping"),
        ({"table_names": {"tasks": "x"}}, ResultArgumentError, "'tasks'; name 'group', 'task'"),
        ({"table_names": {"task": 5}}, ResultArgumentError, "'task' is 5, not a name"),
        ({"table_names": {"task": "x", "group": "x"}}, ResultArgumentError, "name of its own"),
        ({"table_names": {"task": "sessionmgr_chord"}}, ResultArgumentError, "name of its own"),
        ({"table_schemas": {"chord": "x"}}, ResultArgumentError, "there is no table 'chord'"),
        ({"table_schemas": ["x"]}, ResultArgumentError, "table_schemas is a mapping"),
        ({"engine_options": 5}, EngineOptionsError, "a mapping of name -> value"),
        ({"engine_options": TRANSLATED}, EngineOptionsError, "name the schemas in table_schemas="),
        ({"engine_options": {"pool_size": "x"}}, EngineOptionsError, "pool_size must be a whole"),
    ],
)
def test_configuration_is_checked_at_once(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """What cannot be raises where it is given, without connecting, and shows no password."""
    with pytest.raises(error) as caught:
        ResultStore(URL, **options)
    assert text in str(caught.value)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("database", "options", "text"),
    [
        ("postgresql", {"table_names": {"task": "x" * 64}}, "'x+' is too long .* 63 bytes"),
        ("postgresql", {"table_names": {"chord": "ä" * 32}}, "'ä+' is too long .* 63 bytes"),
        ("postgresql", {"table_names": {"task_sequence": "x" * 64}}, "'x+' is too long"),
        ("postgresql", {"table_schemas": {"group": "x" * 64}}, "'x+' is too long"),
        ("mysql", {"table_names": {"group": "ä" * 65}}, "'ä+' is too long .* 64 characters"),
        ("mariadb", {"table_names": {"part": "ä" * 65}}, "'ä+' is too long .* 64 characters"),
        ("postgresql", {"table_names": {"task": "excluded"}}, "'excluded' has a meaning"),
        ("sqlite", {"table_names": {"part": "Excluded"}}, "'Excluded' has a meaning"),
    ],
)
def test_names_that_the_database_does_not_take(
    database: str, options: dict[str, Any], text: str
) -> None:
    """They are refused without connecting, also where the database is named by a key."""
    url = f"{database}:///nowhere"
    with SessionManager(binds={"key": url}) as manager:
        for given in ({"dburi": url}, {"dburi": "key", "manager": manager}):
            with pytest.raises(ResultArgumentError, match=text):
                ResultStore(**given, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_longest_names(make_database: Callable[..., Database], tmp_path: Path, driver: str) -> None:
    """Names as long as the database takes them are created, found, and written to."""
    url = database_url(driver, make_database, tmp_path)
    end = {"psycopg": "ä" * 30, "pymysql": "ä" * 61, "sqlite": "ä" * 100}[driver]
    names = {kind: f"{number:03}{end}" for number, kind in enumerate((*NAMES, *OTHER_NAMES))}
    for _ in range(2):
        with ResultStore(url, table_names=names) as store:
            store.store("1", "SUCCESS", b"1")
            store.save_group("g", b"1")
            store.chords.begin("g")
            assert store.exists("1")


@pytest.mark.parametrize("origin", ["manager", "bind", "callback"])
def test_map_of_schemas_that_the_engine_has(origin: str, tmp_path: Path) -> None:
    """Where it comes from elsewhere it is refused before anything is stored or created."""
    url = f"sqlite:///{tmp_path / 'local.db'}"
    given: dict[str, Any] = {
        "manager": {"binds": {"key": url}, "engine_options": TRANSLATED},
        "bind": {"binds": {"key": {"url": url, **TRANSLATED}}},
        "callback": {
            "binds": {"key": url},
            "engine_callback": lambda engine: engine.update_execution_options(
                **TRANSLATED["execution_options"]
            ),
        },
    }[origin]
    with (
        SessionManager(pooling="always", **given) as manager,
        pytest.raises(EngineOptionsError, match=r"schema_translate_map.*table_schemas"),
    ):
        ResultStore("key", manager=manager).store("1", "SUCCESS")
    assert not (tmp_path / "local.db").exists()


@pytest.mark.parametrize("dburi", ["key", None, 5, f"mysql//app:{PASSWORD}@host"])
def test_database_that_cannot_be_read(dburi: Any) -> None:
    """A store without a manager names its database by a URL."""
    with pytest.raises(DatabaseURLError) as caught:
        ResultStore(dburi)
    assert PASSWORD not in str(caught.value)


def test_bind_key_that_is_not_there() -> None:
    """A key that the manager does not have is named, with those that it has."""
    manager = SessionManager(binds={"results": URL})
    with pytest.raises(NoSuchBindError, match=r"'result'.*'results'"):
        ResultStore("result", manager=manager)


def test_nothing_that_is_shown_has_a_password() -> None:
    """repr, the name and the driver's error of a store are without it."""
    with ResultStore(URL, attempts=1) as store:
        with pytest.raises(Exception, match="resolve host") as caught:
            store.get("1")
        for shown in (repr(store), store.describe(), str(caught.value), repr(caught.value)):
            assert PASSWORD not in shown
    with pytest.raises(EngineOptionsError, match="no_such_option") as unknown:
        ResultStore(URL, engine_options={"no_such_option": PASSWORD}).get("1")
    assert PASSWORD not in str(unknown.value)


@pytest.mark.parametrize(
    "task_id", [None, "", 5, 0, b"5", uuid.UUID(int=5), "5\0", "5\udc80", ["5"]], ids=ascii
)
def test_id_that_is_none(local: ResultStore, task_id: Any) -> None:
    """Every method refuses what cannot be an id, by name."""
    for call in (
        lambda: local.store(task_id, "SUCCESS"),
        lambda: local.store_many([TaskResult(task_id, "SUCCESS")]),
        lambda: local.get(task_id),
        lambda: local.exists(task_id),
        lambda: local.get_many([task_id]),
        lambda: local.wait([task_id]),
        lambda: local.forget([task_id]),
    ):
        with pytest.raises(ResultArgumentError, match="task_id is a text"):
            call()
    for group in (lambda: local.save_group(task_id, b""), lambda: local.save_group("g", "text")):
        with pytest.raises(ResultArgumentError):
            group()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("task_ids", ["abc", None, 5, b"abc"], ids=repr)
def test_ids_that_are_none(local: ResultStore, task_ids: Any) -> None:
    """No method takes one text for its characters, nor what holds nothing."""
    for call in (local.get_many, local.wait):
        with pytest.raises(ResultArgumentError, match="task_ids is a list"):
            call(task_ids)


@pytest.mark.parametrize("driver", ["pymysql", "mysqlclient"])
def test_numbers_are_no_ids_on_mysql(make_database: Callable[..., Database], driver: str) -> None:
    """MySQL would take 0 for every id without digits in front, and 5 for those with a 5."""
    with ResultStore(make_database(driver).url) as store:
        store.store_many([TaskResult("5abc", "SUCCESS"), TaskResult("abc", "SUCCESS")])
        for number in (0, 5):
            for call in (store.get, store.exists, store.forget):
                with pytest.raises(ResultArgumentError):
                    call(number)  # type: ignore[operator]
            with pytest.raises(ResultArgumentError):
                store.forget([number])  # type: ignore[list-item]
        assert store.get_many(["5abc", "abc"]).keys() == {"5abc", "abc"}


def test_id_too_long(store: ResultStore) -> None:
    """More than 155 characters: PostgreSQL's own error, ResultTooLongError where MySQL may cut."""
    store.prepare()
    if "sqlite" in store.describe():
        assert store.store("x" * 156, "SUCCESS")  # which has no limit
        return
    error = ResultTooLongError if "mysql" in store.describe() else Exception
    for call in (
        lambda: store.store("x" * 156, "SUCCESS"),
        lambda: store.store_many([TaskResult("x" * 156, "SUCCESS")]),
        lambda: store.store("1", "S" * 51),
        lambda: store.save_group("x" * 156, b""),
    ):
        with pytest.raises(error, match=r"too long|takes 156.*shorter|takes 51.*shorter"):
            call()
    assert store.get("x" * 156) is None
    assert store.get("1") is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"status": ""}, "status is a text"),
        ({"status": None}, "status is a text"),
        ({"result": "text"}, "result of task '1' is bytes, not str: encode it"),
        ({"result": {"a": 1}}, "result of task '1' is bytes, not dict"),
        ({"children": []}, "children of task '1' is bytes"),
        ({"date_done": "2024-01-01"}, "date_done of task '1' is a datetime, not str"),
        ({"date_done": date(2024, 1, 1)}, "date_done of task '1' is a datetime, not date"),
        ({"date_done": FIRST}, "date_done of task '1': 0001-01-01T00:00:00+05:00 is out of the"),
        ({"traceback": b"text"}, "traceback of task '1' is a text, not bytes"),
        ({"nmae": "x"}, "no field 'nmae'; name 'args'"),
        ({"name": "x"}, "'name': this store is not extended; make it with extended=True"),
    ],
)
def test_value_of_a_wrong_kind(local: ResultStore, values: dict[str, Any], text: str) -> None:
    """The error names the field, the task, what it is to be, and what it was."""
    given: dict[str, Any] = {"status": "SUCCESS", **values}
    with pytest.raises(ResultArgumentError) as caught:
        local.store("1", **given)
    assert text in str(caught.value)
    if "nmae" not in values:
        with pytest.raises(ResultArgumentError) as caught:
            local.store_many([TaskResult("0", "SUCCESS"), TaskResult("1", **given)])
        assert text in str(caught.value)
    assert local.get_many(["0", "1"]) == {}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"name": b"text"}, "name of task '1' is a text, not bytes"),
        ({"worker": 5}, "worker of task '1' is a text, not int"),
        ({"queue": ["q"]}, "queue of task '1' is a text, not list"),
        ({"retries": "5"}, "retries of task '1' is a whole number, not str"),
        ({"retries": True}, "retries of task '1' is a whole number, not bool"),
    ],
)
def test_extended_value_of_a_wrong_kind(tmp_path: Path, values: dict[str, Any], text: str) -> None:
    """Extended fields are checked as well: SQLite would keep anything, PostgreSQL cast it."""
    with ResultStore(f"sqlite:///{tmp_path / 'local.db'}", extended=True) as store:
        for call in (
            lambda: store.store("1", "FAILURE", **values),
            lambda: store.store_many([TaskResult("1", "FAILURE", **values)]),
        ):
            with pytest.raises(ResultArgumentError) as caught:
                call()
            assert text in str(caught.value)


def test_cleanup_before_all_time(local: ResultStore) -> None:
    """A time that UTC has no date for is refused."""
    with pytest.raises(ResultArgumentError, match="before: 0001-01-01"):
        local.cleanup(FIRST)


def test_extended_text_of_any_kind_is_kept(url: DatabaseURL | str) -> None:
    """What a database refuses in a text is written out here too."""
    with ResultStore(url, extended=True) as store:
        store.store("1", "FAILURE", name="a\0b", worker="\udcff", queue="ü")
        found = store.get("1")
    assert found is not None
    assert (found.name, found.worker, found.queue) == ("a\\x00b", "\\udcff", "ü")


def test_store_many_takes_results(local: ResultStore) -> None:
    """Anything else among them is refused, and nothing stored."""
    with pytest.raises(ResultArgumentError, match="not a TaskResult"):
        local.store_many([TaskResult("0", "SUCCESS"), ("1", "SUCCESS")])  # type: ignore[list-item]
    assert local.get("0") is None


def test_traceback_of_any_text_is_kept(store: ResultStore) -> None:
    """What a database refuses in a text is written out: file names may have it."""
    store.store("1", "FAILURE", traceback="a\0b \udcff c")
    store.store_many([TaskResult("2", "FAILURE", traceback="\0")])
    found = store.get_many(["1", "2"])
    assert found["1"].traceback == "a\\x00b \\udcff c"
    assert found["2"].traceback == "\\x00"

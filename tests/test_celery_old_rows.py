"""Tables and rows of real versions of Celery, as they were recorded, read by the backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from celery.result import GroupResult
from sqlalchemy import inspect, make_url

from tests.celery_records import VERSIONS, make_recorded_tables, recorded_parts
from tests.results_helpers import make_celery_tables, plain_engine
from tests.schema_helpers import database_url

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from celery import Celery
    from sqlalchemy import URL

    from tests.servers import Database

pytest_plugins = ["tests.celery_fixtures"]

TABLES = ("celery_taskmeta", "celery_tasksetmeta")


@pytest.fixture(params=["psycopg", "pymysql", "sqlite"])
def driver(request: pytest.FixtureRequest) -> str:
    """Return a driver of each kind of database."""
    driver: str = request.param
    return driver


@pytest.fixture
def url(driver: str, make_database: Callable[..., Database], tmp_path: Path) -> URL:
    """Return the URL of an empty database."""
    return make_url(database_url(driver, make_database, tmp_path))


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_results_are_read(
    url: URL, version: str, serializer: str, make_reader: Callable[..., Celery]
) -> None:
    """A value, and a failure's type, text and traceback, come back; new rows follow the old."""
    make_recorded_tables(url, version)
    app = make_reader(serializer)
    result = app.AsyncResult(f"{serializer}-success")
    assert (result.get(timeout=10.0), result.state) == ({"sum": 5}, "SUCCESS")
    assert result.date_done is not None
    failed = app.AsyncResult(f"{serializer}-failure")
    with pytest.raises(LookupError, match=r"^no such thing$"):
        failed.get(timeout=10.0)
    assert failed.state == "FAILURE"
    assert failed.traceback.endswith("LookupError: no such thing\n")
    app.backend.store_result(failed.id, 1, "SUCCESS")
    app.backend.store_result("new", 2, "SUCCESS")
    app.backend.store_result(result.id, 3, "FAILURE")
    found = [app.AsyncResult(task_id).get() for task_id in (failed.id, "new", result.id)]
    assert found == [1, 2, {"sum": 5}]


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_extended_results_are_read(
    url: URL, version: str, serializer: str, make_reader: Callable[..., Celery]
) -> None:
    """What a version stored of the request comes back."""
    make_recorded_tables(url, version)
    app = make_reader(serializer, result_extended=True)
    result = app.AsyncResult(f"{serializer}-extended-success")
    assert result.get(timeout=10.0) == {"sum": 5}
    assert (result.name, result.args, result.kwargs) == ("recorded.add", [2], {"y": 3})
    assert (result.worker, result.retries, result.queue) == ("worker@host", 2, "celery")
    failed = app.AsyncResult(f"{serializer}-extended-failure")
    with pytest.raises(LookupError, match="no such thing"):
        failed.get(timeout=10.0)
    assert (failed.name, failed.args) == ("recorded.fail", ["no such thing"])
    assert app.AsyncResult(f"{serializer}-success").name is None


@pytest.mark.parametrize(
    ("version", "reader", "serializer"),
    [
        (version, reader, serializer)
        for version in VERSIONS
        for reader in ("json", "pickle")
        for serializer in ("json", "pickle")
        if (version, reader, serializer) != ("5.7", "pickle", "json")  # 5.7 pickles no JSON
    ],
)
def test_recorded_groups_are_read(
    url: URL, version: str, reader: str, serializer: str, make_reader: Callable[..., Celery]
) -> None:
    """The parts of a group are the app's, with its backend, whatever was pickled with them."""
    make_recorded_tables(url, version)
    app = make_reader(reader)
    group = GroupResult.restore(f"{serializer}-group", backend=app.backend, app=app)
    assert group.id == f"{serializer}-group"
    assert [part.id for part in group.results] == recorded_parts(url, version, serializer)
    assert all(each.app is app and each.backend is app.backend for each in (group, *group.results))
    assert [part.state for part in group.results] == ["SUCCESS", "SUCCESS", "FAILURE"]
    first, second, error = group.get(timeout=10.0, propagate=False)
    assert (first, second) == ({"sum": 2}, {"sum": 4})
    assert (type(error), str(error)) == (LookupError, "part")
    group.save(backend=app.backend)
    assert GroupResult.restore(group.id, backend=app.backend, app=app) == group


@pytest.mark.parametrize("version", VERSIONS)
def test_described_tables_are_those_of_celery(
    url: URL, driver: str, version: str, make_database: Callable[..., Database], tmp_path: Path
) -> None:
    """The tables by which the other tests stand for a version's have its columns and indexes."""
    make_recorded_tables(url, version, rows=False)
    (tmp_path / "other").mkdir()
    other = database_url(driver, make_database, tmp_path / "other")
    # SQLAlchemy 1.3, of Celery 4.4's days, knew no sequences of MariaDB
    ids = "auto" if driver == "pymysql" and version == "4.4" else "sequence"
    make_celery_tables(other, version, ids=ids, extended=True)
    assert shape_of(other) == shape_of(url)


def shape_of(url: URL | str) -> list[Any]:
    """Return the columns, the indexes and the sequences of a database's tables."""
    with plain_engine(url) as engine:
        looking = inspect(engine)
        columns = [
            sorted((each["name"], str(each["type"]), each["nullable"], each.get("autoincrement"))
                   for each in looking.get_columns(table))
            for table in TABLES
        ]  # fmt: skip
        indexes = [
            sorted((each["column_names"], each["unique"]) for each in looking.get_indexes(table))
            for table in TABLES
        ]
        sequences = [] if engine.name == "sqlite" else sorted(looking.get_sequence_names())
        return [columns, indexes, sequences]

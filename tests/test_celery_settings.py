"""The settings of Celery's database backend, and what its users find on the backend object."""

from __future__ import annotations

import json
import pickle
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import BackendStoreError, ImproperlyConfigured
from celery.exceptions import TimeoutError as CeleryTimeoutError
from sqlalchemy import event, inspect, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import defer
from sqlalchemy.pool import QueuePool

from sessionmgr.errors import ResultArgumentError
from tests.counting import ping_counter
from tests.results_helpers import columns_of, make_celery_tables, plain_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Engine

    from sessionmgr.ext.celery import DatabaseBackend
    from tests.servers import Database

engines: list[Engine] = []
"""What :func:`note_engine` was given in this process."""


def note_engine(engine: Engine) -> None:
    """Note an engine, as a ``database_engine_callback``."""
    engines.append(engine)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path / 'results.db'}"


@pytest.fixture
def make_backend(url: str) -> Iterator[Callable[..., DatabaseBackend]]:
    """Return a function that makes the backend of an app of its own, with settings."""
    made: list[tuple[Celery, DatabaseBackend]] = []

    def make(**settings: Any) -> DatabaseBackend:
        app = Celery("sessionmgr-settings", set_as_current=False)
        app.conf.update({"result_backend": f"sessionmgr+{url}", **settings})
        made.append((app, app.backend))
        return made[-1][1]

    yield make
    for app, backend in made:
        backend.store.close()
        app.close()


def tables_of(url: str) -> set[str]:
    """Return the names of a database's tables."""
    with plain_engine(url) as engine:
        return set(inspect(engine).get_table_names())


def raw_result(backend: DatabaseBackend, task_id: str) -> bytes:
    """Return a result as it stands in the table."""
    found = backend.store.get(task_id)
    assert found is not None
    assert found.result is not None
    return found.result


@pytest.mark.parametrize(
    "spelling",
    [
        "sessionmgr+{url}",
        "sessionmgr+db+{url}",
        "sessionmgr.ext.celery:DatabaseBackend+{url}",
        "sessionmgr",
        "sessionmgr://",
    ],
    ids=["url", "db", "class", "setting", "empty"],
)
def test_database_url(
    make_backend: Callable[..., DatabaseBackend], url: str, spelling: str
) -> None:
    """The database stands in ``result_backend``, as after ``db+``, or in ``database_url``."""
    backend = make_backend(result_backend=spelling.format(url=url), database_url=url)
    backend.mark_as_done("1", 42)
    with plain_engine(url) as engine, engine.connect() as connection:
        assert len(connection.execute(select(backend.store.tables.task)).all()) == 1


def test_without_a_database(make_backend: Callable[..., DatabaseBackend]) -> None:
    """Without a URL the error says where to put it."""
    with pytest.raises(ImproperlyConfigured, match="database_url"):
        make_backend(result_backend="sessionmgr")


def test_engine_options(make_backend: Callable[..., DatabaseBackend]) -> None:
    """``database_engine_options`` reach the engine, and add to the defaults of the pool."""
    backend = make_backend(database_engine_options={"pool_size": 3, "echo_pool": True})
    pool = backend.session_manager.get_engine(backend.url).pool
    assert isinstance(pool, QueuePool)
    assert (pool.size(), pool.echo) == (3, True)
    assert pool._recycle == 3600
    assert pool._pool.use_lifo is True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "recycle", "tests"),
    [
        ({"pool_size": 3}, 3600, 1),
        ({"pool_pre_ping": False, "pool_recycle": None}, -1, 0),
        ({"pool_pre_ping": True, "pool_recycle": 60}, 60, 1),
    ],
    ids=["others", "switched-off", "set"],
)
def test_engine_options_for_idle_connections(
    options: dict[str, Any],
    recycle: int,
    tests: int,
    make_backend: Callable[..., DatabaseBackend],
    make_database: Callable[..., Database],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Celery's manual gives to disable the defaults, disables them; all else leaves them.

    The test of a connection that was idle is seen on the server.
    """
    now = [1000.0]
    monkeypatch.setattr("sessionmgr.monitor.monotonic", lambda: now[0])
    database = make_database("psycopg")
    url = database.url.render_as_string(hide_password=False)
    with ping_counter(database) as pings:
        backend = make_backend(result_backend=f"sessionmgr+{url}", database_engine_options=options)
        backend.mark_as_done("1", 42)
        before = pings()
        now[0] += 2.0
        assert backend.get_result("1") == 42
        assert pings() - before == tests
    assert backend.session_manager.get_engine(backend.url).pool._recycle == recycle


@pytest.mark.parametrize("short_lived", [True, False], ids=["short-lived", "kept"])
def test_short_lived_sessions(
    make_backend: Callable[..., DatabaseBackend], short_lived: bool
) -> None:
    """With ``database_short_lived_sessions`` no connection stays open, after sessions neither."""
    backend = make_backend(database_short_lived_sessions=short_lived)
    backend.mark_as_done("1", 42)
    with backend.ResultSession() as session:
        assert session.scalar(select(backend.task_cls.status)) == "SUCCESS"
    stats = backend.session_manager.stats().databases[0]
    assert (stats.checked_out, stats.idle) == (0, 0 if short_lived else 1)


def test_table_names(make_backend: Callable[..., DatabaseBackend], url: str) -> None:
    """``database_table_names`` name the tables, for each app its own."""
    names = {"task": "my_tasks", "group": "my_groups"}
    named, other = make_backend(database_table_names=names), make_backend()
    named.mark_as_done("1", 42)
    assert {"my_tasks", "my_groups", "celery_taskmeta", "celery_tasksetmeta"} <= tables_of(url)
    assert other.get_state("1") == "PENDING"
    assert named.task_cls.__table__.name == "my_tasks"
    assert named.taskset_cls.__table__.name == "my_groups"
    assert other.task_cls.__table__.name == "celery_taskmeta"
    with named.ResultSession() as session:
        assert session.scalars(select(named.task_cls.task_id)).all() == ["1"]


def test_table_schemas(
    make_backend: Callable[..., DatabaseBackend], make_database: Callable[..., Database]
) -> None:
    """``database_table_schemas`` put the tables, with their sequences, into schemas."""
    database_url = make_database("psycopg").url
    with plain_engine(database_url) as engine, engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA one")
        connection.exec_driver_sql("CREATE SCHEMA two")
    backend = make_backend(
        result_backend=f"sessionmgr+{database_url.render_as_string(hide_password=False)}",
        database_table_schemas={"task": "one", "group": "two"},
    )
    backend.mark_as_done("1", 42)
    assert backend.get_result("1") == 42
    with plain_engine(database_url) as engine:
        assert inspect(engine).get_table_names(schema="one") == ["celery_taskmeta"]
        assert "celery_tasksetmeta" in inspect(engine).get_table_names(schema="two")
    with backend.ResultSession() as session:
        session.add(backend.task_cls("2"))
        session.commit()
        assert session.scalars(select(backend.task_cls.id)).all() == [1, 2]


def test_create_tables_at_setup(make_backend: Callable[..., DatabaseBackend], url: str) -> None:
    """By default the tables are there as soon as there is a backend, with all columns."""
    make_celery_tables(url, "5.2")
    backend = make_backend()
    assert "celery_tasksetmeta" in tables_of(url)
    assert "children" in columns_of(url)
    assert backend.get_state("1") == "PENDING"


def test_create_tables_at_first_use(make_backend: Callable[..., DatabaseBackend], url: str) -> None:
    """Without ``database_create_tables_at_setup`` tables are created by the first call."""
    backend = make_backend(database_create_tables_at_setup=False)
    assert tables_of(url) == set()
    backend.mark_as_done("1", 42)
    assert {"celery_taskmeta", "celery_tasksetmeta"} <= tables_of(url)
    assert backend.get_result("1") == 42


def test_first_use_changes_no_table(make_backend: Callable[..., DatabaseBackend], url: str) -> None:
    """Without ``database_create_tables_at_setup`` no column is added; what is there is used."""
    make_celery_tables(url, "5.2")
    backend = make_backend(database_create_tables_at_setup=False)
    backend.mark_as_done("1", 42)
    assert backend.get_result("1") == 42
    assert "children" not in columns_of(url)


@pytest.mark.parametrize(
    "callback", [note_engine, f"{__name__}:note_engine"], ids=["function", "dotted-path"]
)
def test_engine_callback(
    make_backend: Callable[..., DatabaseBackend], callback: Callable[..., None] | str
) -> None:
    """``database_engine_callback`` gets each engine once, and each that follows it."""
    engines.clear()
    backend = make_backend(database_engine_callback=callback)
    backend.mark_as_done("1", 42)
    assert engines == [backend.session_manager.get_engine(backend.url)]
    backend.session_manager.invalidate(backend.url)
    backend.mark_as_done("2", 42)
    assert len(engines) == 2


def test_engine_callback_comes_first(make_backend: Callable[..., DatabaseBackend]) -> None:
    """The callback is called before there is a connection; its listeners see the first one."""
    seen: list[str] = []

    def listen(engine: Engine) -> None:
        seen.append("callback")
        event.listen(engine, "do_connect", lambda *_: seen.append("connect"))

    make_backend(database_engine_callback=listen)
    assert seen[:2] == ["callback", "connect"]


def test_engine_callback_that_is_none(make_backend: Callable[..., DatabaseBackend]) -> None:
    """A callback that cannot be called is an error at once."""
    with pytest.raises(ImproperlyConfigured, match="callable"):
        make_backend(database_engine_callback=42)


@pytest.mark.parametrize("extended", [True, False], ids=["extended", "plain"])
def test_result_extended(make_backend: Callable[..., DatabaseBackend], extended: bool) -> None:
    """With ``result_extended`` what is known of the request is stored, else nothing of it."""
    backend = make_backend(result_extended=extended)
    request = Context(
        task="add",
        args=[1, 2],
        kwargs={},
        retries=3,
        hostname="w@1",
        delivery_info={"routing_key": "q"},
        stamped_headers=["run"],
        stamps={"run": "42"},
    )
    backend.store_result("1", 3, "SUCCESS", request=request)
    found = backend.get_task_meta("1")
    names = ("name", "args", "kwargs", "retries", "worker", "queue", "stamped_headers", "run")
    expected = ("add", [1, 2], {}, 3, "w@1", "q", ["run"], "42")
    assert tuple(found.get(name) for name in names) == (expected if extended else (None,) * 8)
    assert hasattr(backend.task_cls, "stamps") is extended


@pytest.mark.parametrize(
    ("expires", "left"),
    [(3600, {"new"}), (timedelta(hours=3), {"new", "old"}), (None, {"new", "old"})],
    ids=["number", "timedelta", "never"],
)
def test_result_expires(
    make_backend: Callable[..., DatabaseBackend], expires: object, left: set[str]
) -> None:
    """``cleanup`` deletes what is older than ``result_expires``, in any time zone."""
    backend = make_backend(result_expires=expires, timezone="Asia/Tokyo")
    now = datetime.now(timezone.utc)
    backend.store.store("old", "SUCCESS", b"1", date_done=now - timedelta(hours=2))
    backend.store.store("new", "SUCCESS", b"1", date_done=now - timedelta(minutes=30))
    backend.cleanup()
    assert set(backend.store.get_many(["old", "new"])) == left


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_result_serializer(make_backend: Callable[..., DatabaseBackend], serializer: str) -> None:
    """``result_serializer`` makes the bytes of results and groups."""
    backend = make_backend(result_serializer=serializer, result_accept_content=[serializer])
    backend.mark_as_done("1", {"answer": 42})
    raw = raw_result(backend, "1")
    assert raw[:1] == b"\x80" if serializer == "pickle" else json.loads(raw) == {"answer": 42}
    assert backend.get_result("1") == {"answer": 42}


def test_result_compression(make_backend: Callable[..., DatabaseBackend]) -> None:
    """``result_compression`` compresses results, which are read whatever the setting is."""
    compressing, plain = make_backend(result_compression="gzip"), make_backend()
    compressing.mark_as_done("1", "x" * 10_000)
    assert len(raw_result(compressing, "1")) < 1000
    assert plain.get_result("1") == "x" * 10_000


@pytest.mark.parametrize(
    ("settings", "attempts"),
    [
        ({}, 4),
        ({"result_backend_max_retries": 1}, 2),
        ({"result_backend_always_retry": False}, 1),
    ],
    ids=["default", "once-more", "never"],
)
def test_retries(
    make_backend: Callable[..., DatabaseBackend],
    tmp_path: Path,
    settings: dict[str, Any],
    attempts: int,
) -> None:
    """Passing errors are tried again as ``result_backend_always_retry``/``max_retries`` say."""
    tries: list[str] = []
    backend = make_backend(
        database_engine_options={"connect_args": {"timeout": 0}},
        result_backend_base_sleep_between_retries_ms=1,
        result_backend_max_sleep_between_retries_ms=2,
        **settings,
    )
    engine = backend.session_manager.get_engine(backend.url)
    event.listen(engine, "before_cursor_execute", lambda *args: tries.append(args[2]))
    with closing(sqlite3.connect(tmp_path / "results.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises((DatabaseError, BackendStoreError)):
            backend.mark_as_done("1", 42)
    assert len(tries) == attempts


# -- beyond settings


@pytest.mark.parametrize("interval", [0, 0.0, None])
def test_waits_with_any_interval(
    make_backend: Callable[..., DatabaseBackend], interval: float | None
) -> None:
    """``get(interval=0)``, which Celery's backend takes for no pause, is the shortest there is."""
    backend = make_backend()
    backend.mark_as_done("1", 42)
    assert backend.app.AsyncResult("1").get(interval=interval) == 42
    with pytest.raises(CeleryTimeoutError):
        backend.app.AsyncResult("2").get(interval=interval, timeout=0.05)


def test_interval_below_zero(make_backend: Callable[..., DatabaseBackend]) -> None:
    """It is no pause of any kind."""
    with pytest.raises(ResultArgumentError, match="max_interval"):
        make_backend().app.AsyncResult("1").get(interval=-1)


def test_rows_by_the_mapped_classes(make_backend: Callable[..., DatabaseBackend]) -> None:
    """Rows written in a ResultSession by the mapped classes are results, and the other way."""
    backend = make_backend()
    with backend.ResultSession() as session:
        task = backend.task_cls("1")
        task.status, task.result = "SUCCESS", b"42"
        session.add_all([task, backend.task_cls("2"), backend.taskset_cls("3", b"[]")])
        session.commit()
        assert task.to_dict().keys() == {
            *("task_id", "status", "result", "traceback", "date_done", "children")
        }
        assert abs(datetime.now(timezone.utc).replace(tzinfo=None) - task.date_done).seconds < 600
        assert (repr(task), repr(session.get(backend.taskset_cls, 1))) == (
            "<Task 1 state: SUCCESS>",
            "<TaskSet: 3>",
        )
    assert backend.get_result("1") == 42
    assert backend.get_state("2") == "PENDING"
    assert backend.store.restore_group("3") is not None


def test_columns_that_are_not_there(make_backend: Callable[..., DatabaseBackend], url: str) -> None:
    """``to_dict`` of a row of an old table gives None for what that has no column for."""
    make_celery_tables(url, "5.2")
    backend = make_backend(database_create_tables_at_setup=False)
    backend.mark_as_done("1", 42)
    task = backend.task_cls
    with backend.ResultSession() as session:
        found = session.get_one(task, 1, options=[defer(task.children)])
        assert found.to_dict()["children"] is None
        assert found.to_dict()["result"] == b"42"


def test_old_pickles_are_told_of(
    make_backend: Callable[..., DatabaseBackend], caplog: pytest.LogCaptureFixture
) -> None:
    """A result that Celery before 5.7 has pickled is read, with a warning."""
    backend = make_backend()
    backend.store.store("1", "SUCCESS", pickle.dumps({"answer": 42}))
    assert backend.get_result("1") == {"answer": 42}
    assert "pickle" in caplog.text


def test_cache_keeps_what_no_other_run_replaces(
    make_backend: Callable[..., DatabaseBackend],
) -> None:
    """With ``result_cache_max``, the SUCCESS of a run after a failed one is seen."""
    backend = make_backend(result_cache_max=10)
    backend.store_result("1", LookupError("x"), "FAILURE")
    assert isinstance(backend.app.AsyncResult("1").get(propagate=False), LookupError)
    backend.mark_as_done("1", 42)
    assert backend.app.AsyncResult("1").state == "SUCCESS"
    assert backend.app.AsyncResult("1").get() == 42
    assert backend.is_cached("1")


def test_update_state_wherever_celery_allows_it(
    make_backend: Callable[..., DatabaseBackend],
) -> None:
    """A task may leave out the state, and may be called as a function, without an id."""
    backend = make_backend()

    @backend.app.task(bind=True, shared=False)
    def report(self: Any) -> int:
        self.update_state(meta={"done": 1})
        self.update_state(state="PROGRESS", meta={"done": 2})
        return 42

    assert report() == 42
    report.update_state("1", meta={"done": 1})
    result = backend.app.AsyncResult("1")
    assert (result.state, result.info) == ("PENDING", {"done": 1})

"""Celery's backend and database servers: rows of either backend, rights, lost connections."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any

import pytest
from celery import chord, uuid
from celery.exceptions import BackendStoreError
from celery.result import GroupResult
from sqlalchemy import NullPool, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from sessionmgr.ext.celery import DatabaseBackend, restarts
from tests.celery_workers import serving
from tests.concurrency import in_threads
from tests.counting import connection_counter, database_to_count
from tests.helpers import wait_until
from tests.results_helpers import counted_statements, rows_of
from tests.schema_helpers import database_url, powerless_role
from tests.servers import DRIVERS
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from celery import Celery
    from sqlalchemy import URL

    from sessionmgr import ResultStore
    from tests.servers import Database
    from tests.servers.redis import Redis

pytest_plugins = ["tests.celery_fixtures"]

SECRET = "sesame-open-4711"

PREFIXES = ("sessionmgr+", "sessionmgr+db+", "sessionmgr.ext.celery:DatabaseBackend+", "db+")
"""How ``result_backend`` names the backend; the last is Celery's own."""

POOL_SIZE = 15
"""How many connections a backend opens, and keeps, unless it is told otherwise."""

DRIVER = pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql", "mysqlclient"])


class CountingBackend(DatabaseBackend):
    """A backend that counts the errors after which it tries again.

    :ivar after_errors: number of errors -> what is done then.
    """

    after_errors: dict[int, Callable[[], object]]
    errors = 0

    def on_backend_retryable_error(self, exc: BaseException) -> None:
        super().on_backend_retryable_error(exc)
        self.errors += 1
        self.after_errors.get(self.errors, int)()


def text_of(url: URL) -> str:
    """Return a URL with its password."""
    return url.render_as_string(hide_password=False)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_either_backend_reads_what_the_other_wrote(
    prefix: str, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """A worker and a client may have this backend, in any spelling, or Celery's own."""
    database = make_database("psycopg")
    url = text_of(database.url)
    with serving(redis_server, "threads", database, result_backend=f"{prefix}{url}") as service:
        sent = service.app.send_task("echo", ({"a": [1]},))
        assert sent.get(timeout=60.0) == {"a": [1]}
        failed = service.app.send_task("fail", ("no such thing",))
        with pytest.raises(LookupError):
            failed.get(timeout=60.0)
        for other in PREFIXES:
            app = service.client(result_backend=f"{other}{url}")
            assert app.AsyncResult(sent.id).get(timeout=60.0) == {"a": [1]}
            with pytest.raises(LookupError, match="no such thing"):
                app.AsyncResult(failed.id).get(timeout=60.0)


def test_chord_of_a_client_with_celerys_backend(
    redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """Workers that have this backend finish chords of clients that do not have it yet."""
    database = make_database("psycopg")
    with serving(redis_server, "fork", database) as service:
        service.call("echo", 0)
        app = service.client(result_backend=f"db+{text_of(database.url)}")
        parts = [app.signature("add", (number, 1)) for number in range(5)]
        assert chord(parts, app=app)(app.signature("total")).get(timeout=60.0) == 15
        assert service.counters.value("total") == 1


def test_short_lived_sessions(redis_server: Redis, make_database: Callable[..., Database]) -> None:
    """With ``database_short_lived_sessions`` the server counts no connection between tasks."""
    database = make_database("psycopg")
    with serving(redis_server, "fork", database, database_short_lived_sessions=True) as service:
        for number in range(3):
            assert service.call("echo", number) == number
            wait_until(lambda: not database.connections())


@DRIVER
@pytest.mark.parametrize("problem", ["no right", "no table", "no column", "too long"])
def test_what_stays_wrong_is_raised_at_once(
    driver: str,
    problem: str,
    make_database: Callable[..., Database],
    make_client: Callable[..., Celery],
) -> None:
    """What no repetition mends is tried once, and costs no connection."""
    database = make_database(driver)
    with contextlib.ExitStack() as ends:
        backend = make_client(f"sessionmgr+{text_of(database.url)}").backend
        backend.store_result(uuid(), 1, "SUCCESS")
        state, expected = "SUCCESS", ""
        if problem == "no right":  # of the kind that is found when it is made use of
            url = ends.enter_context(powerless_role(database))
            backend = make_client(f"sessionmgr+{text_of(url)}").backend
            expected = "denied"
        elif problem == "no table":
            rows_of(database.url, "ALTER TABLE celery_taskmeta RENAME TO celery_taskmeta_gone")
            expected = "celery_taskmeta"
        elif problem == "no column":
            rows_of(database.url, "ALTER TABLE celery_taskmeta DROP COLUMN children")
            expected = "children"
        else:
            state, expected = "S" * 51, "too long|holds 50"
        [before] = backend.session_manager.stats().databases
        with (
            counted_statements(backend.store) as statements,
            pytest.raises(SQLAlchemyError, match=expected) as raised,
        ):
            backend.store_result(uuid(), 1, state)
        assert "failed to store" not in str(raised.value)
        assert len(statements) <= 1  # what is too long for MySQL is not sent
        [after] = backend.session_manager.stats().databases
        assert (after.connects, after.invalidated) == (before.connects, before.invalidated)
        backend.store.close()


@DRIVER
def test_group_is_one_statement(
    driver: str, make_database: Callable[..., Database], make_client: Callable[..., Celery]
) -> None:
    """The results of a group of 50 that has ended come by one statement."""
    url = f"sessionmgr+{text_of(make_database(driver).url)}"
    writer = make_client(url)
    ids = [uuid() for _ in range(50)]
    for number, task_id in enumerate(ids):
        writer.backend.store_result(task_id, number, "SUCCESS")
    one, other = make_client(url), make_client(url)
    for app in (one, other):
        app.backend.get_state("another")  # sees to the tables
    with counted_statements(one.backend.store) as statements:
        parts = [one.AsyncResult(task_id) for task_id in ids]
        assert GroupResult(uuid(), parts, app=one).get(timeout=60.0) == list(range(50))
    assert len(statements) == 1
    with counted_statements(other.backend.store) as statements:
        found = dict(other.backend.get_many(ids, timeout=60.0))
    assert [found[task_id]["result"] for task_id in ids] == list(range(50))
    assert len(statements) == 1


@pytest.mark.parametrize("driver", ["psycopg", "mysqlclient"])
@pytest.mark.parametrize(("threads", "most"), [(1, 1), (16, POOL_SIZE)])
def test_client_keeps_its_connections(
    request: pytest.FixtureRequest,
    driver: str,
    threads: int,
    most: int,
    make_client: Callable[..., Celery],
) -> None:
    """A client that calls ``get()`` 2,000 times opens no more connections than its pool has."""
    database = database_to_count(request, driver)
    app = make_client(f"sessionmgr+{text_of(database.url)}", result_cache_max=-1)
    task_id = uuid()
    app.backend.store_result(task_id, 7, "SUCCESS")
    app.backend.store.invalidate()
    opened = connection_counter(database)

    def work() -> set[Any]:
        return {app.AsyncResult(task_id).get(timeout=60.0) for _ in range(2000 // threads)}

    assert in_threads([work] * threads) == [{7}] * threads
    app.backend.store.close()
    assert 1 <= opened() <= most


@pytest.mark.parametrize(
    ("options", "most"),
    [({"pool_size": 2}, 12), ({"max_overflow": 1}, 6), ({"poolclass": NullPool}, None)],
    ids=["size", "overflow", "class"],
)
def test_pool_of_the_user_is_left_alone(
    options: dict[str, Any], most: int | None, tmp_path: Path, make_client: Callable[..., Celery]
) -> None:
    """Who says anything of the pool has SQLAlchemy's for the rest."""
    url = f"sessionmgr+sqlite:///{tmp_path / 'results.db'}"
    backend = make_client(url, database_engine_options=options).backend
    pool = backend.session_manager.get_engine(backend.url).pool
    if most is None:
        assert isinstance(pool, NullPool)
    else:
        assert pool.size() + pool._max_overflow == most


@DRIVER
def test_lost_connection_is_replaced(
    driver: str, make_database: Callable[..., Database], make_client: Callable[..., Celery]
) -> None:
    """A connection that the server has ended costs one attempt, and no result."""
    database = make_database(driver)
    backend = make_client(f"sessionmgr+{text_of(database.url)}").backend
    task_id = uuid()
    backend.store_result(task_id, 1, "STARTED")
    database.server.kill(*database.connections())
    wait_until(lambda: not database.connections())
    backend.store_result(task_id, 2, "SUCCESS")
    database.server.kill(*database.connections())
    wait_until(lambda: not database.connections())
    assert backend.get_result(task_id) == 2


@pytest.fixture
def away(
    driver: str, make_database: Callable[..., Database], make_client: Callable[..., Celery]
) -> Iterator[Callable[..., CountingBackend]]:
    """Return a function that makes a backend whose database has gone, with the app's settings.

    It is back after eight errors.
    """
    with TCPProxy(make_database(driver).url) as proxy:

        def make(**settings: Any) -> CountingBackend:
            app = make_client("cache+memory://", **settings)
            backend = CountingBackend(app=app, url=text_of(proxy.url))
            stores.append(backend.store)
            backend.after_errors = {8: proxy.accept}
            backend.store_result("1", 1, "STARTED")
            proxy.refuse()
            proxy.cut()
            return backend

        stores: list[ResultStore] = []
        yield make
        for store in stores:
            store.close()


@DRIVER
def test_database_that_comes_back_is_waited_for(away: Callable[..., CountingBackend]) -> None:
    """By default an operation goes on after more lost connections than Celery has retries."""
    backend = away()
    backend.store_result("1", 2, "SUCCESS")
    assert backend.errors == 8
    assert backend.get_result("1") == 2


@DRIVER
def test_who_says_how_often_to_retry_is_heeded(away: Callable[..., CountingBackend]) -> None:
    """With ``result_backend_max_retries`` no connection is tried for more often than that."""
    backend = away(result_backend_max_retries=3)
    with pytest.raises(BackendStoreError):
        backend.store_result("1", 2, "SUCCESS")
    assert backend.errors == 3


@pytest.mark.parametrize("driver", ["psycopg"])
def test_database_that_stays_away(
    monkeypatch: pytest.MonkeyPatch, away: Callable[..., CountingBackend]
) -> None:
    """An operation ends: when its time is over it is tried as often as Celery does, no more."""
    monkeypatch.setattr(restarts, "PATIENCE", 0.0)
    backend = away()
    with pytest.raises(BackendStoreError):
        backend.store_result("1", 2, "SUCCESS")
    assert backend.errors == 3


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_full_server_costs_no_connection(
    driver: str, make_database: Callable[..., Database], make_client: Callable[..., Celery]
) -> None:
    """Where the database takes no more connections those there are stay, and are used."""
    database = make_database(driver)
    settings = {"result_backend_always_retry": False}
    backend = make_client(f"sessionmgr+{text_of(database.url)}", **settings).backend
    backend.store_result("1", 1, "STARTED")
    there = database.connections()
    database.server.query(f"ALTER DATABASE {database.name} CONNECTION LIMIT 1")
    with backend.session_manager.get_engine(backend.url).connect():
        with pytest.raises(DBAPIError, match="too many connections") as raised:
            backend.store_result("1", 2, "SUCCESS")
        assert backend.exception_safe_to_retry(raised.value)
        backend.on_backend_retryable_error(raised.value)
    assert database.connections() == there
    backend.store_result("1", 2, "SUCCESS")
    assert backend.get_result("1") == 2
    assert database.connections() == there


@DRIVER
def test_cleanup_closes_its_connection(
    driver: str,
    make_database: Callable[..., Database],
    make_client: Callable[..., Celery],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The connection that holds the lock of a cleanup is no session's, and ends with it."""
    database = make_database(driver)
    backend = make_client(f"sessionmgr+{text_of(database.url)}").backend
    backend.ResultSession().close()
    idle = len(database.connections())
    for _ in range(3):
        backend.cleanup()
    wait_until(lambda: len(database.connections()) <= idle)
    assert not caplog.records


@pytest.mark.parametrize("driver", [*DRIVERS, "sqlite"])
def test_abandoned_session_is_rolled_back(
    driver: str,
    make_database: Callable[..., Database],
    make_client: Callable[..., Celery],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a session has not committed when it is let go is not there, and costs no connection."""
    url = make_url(database_url(driver, make_database, tmp_path))
    backend = make_client(f"sessionmgr+{url.render_as_string(hide_password=False)}").backend
    for number in range(3):
        session = backend.ResultSession()
        session.add(backend.task_cls(f"abandoned-{number}"))
        session.flush()
        del session
        gc.collect()
        backend.store.store(f"{number}", "SUCCESS")
    with backend.ResultSession() as session:
        session.add(backend.task_cls("committed"))
        session.commit()
    found = rows_of(url, "SELECT task_id FROM celery_taskmeta ORDER BY task_id")
    assert found == [("0",), ("1",), ("2",), ("committed",)]
    [stats] = backend.session_manager.stats().databases
    assert (stats.connects, stats.invalidated, stats.checked_out) == (1, 0, 0)
    assert "Exception during reset" not in caplog.text


@pytest.mark.parametrize("driver", ["pymysql", "mysqlclient"])
def test_a_result_is_one_question_to_mariadb(
    driver: str, make_database: Callable[..., Database], make_client: Callable[..., Celery]
) -> None:
    """Also after a session was open on the connection: no ROLLBACK goes with each result."""
    backend = make_client(f"sessionmgr+{text_of(make_database(driver).url)}").backend
    with backend.ResultSession() as session:
        session.add(backend.task_cls("by a session"))
        session.commit()

    def questions() -> int:
        engine = backend.session_manager.get_engine(backend.store.dburi)
        with engine.connect() as connection:
            status = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Questions'")
            return int(status.one()[1])

    before = questions()
    around = questions() - before
    for number in range(5):
        backend.store_result(f"{number}", number, "SUCCESS")
    assert questions() - before - 2 * around == 5


@DRIVER
def test_wrong_password(
    driver: str, make_database: Callable[..., Database], make_client: Callable[..., Celery]
) -> None:
    """A wrong password is told at once, and not itself."""
    url = make_database(driver).url.set(password=SECRET)
    app = make_client(f"sessionmgr+{text_of(url)}")
    with pytest.raises(DBAPIError) as raised:
        app.backend.store_result(uuid(), 1, "SUCCESS")
    assert "sessionmgr_app" in str(raised.value)
    assert SECRET not in str(raised.value)


def test_urls_that_differ_in_the_password(
    make_database: Callable[..., Database], make_client: Callable[..., Celery]
) -> None:
    """URL objects have the store of their own password, and that of the same URL as text."""
    url = make_database("psycopg").url
    app = make_client("cache+memory://", database_create_tables_at_setup=False)
    right, wrong, same = (
        DatabaseBackend(dburi=each, app=app)
        for each in (url, url.set(password=SECRET), text_of(url))
    )
    right.store_result("1", 1, "SUCCESS")
    with pytest.raises(DBAPIError, match="sessionmgr_app"):
        wrong.store_result("2", 2, "SUCCESS")
    assert right.store is same.store
    assert right.as_uri(include_password=True) == text_of(url)
    assert SECRET not in wrong.as_uri()
    for backend in (right, wrong):
        backend.store.close()


def test_no_secret_is_shown(redis_server: Redis, make_database: Callable[..., Database]) -> None:
    """Neither the worker's banner nor ``as_uri`` show a password, in the query string neither."""
    database = make_database("psycopg")
    url = database.url
    bare = url.set(password=None).render_as_string(hide_password=False)
    backend = f"sessionmgr+{bare}?password={url.password}"
    with serving(redis_server, "fork", database, result_backend=backend) as service:
        assert service.call("echo", 1) == 1
        shown = [service.worker.text(), service.app.backend.as_uri(), repr(service.app.backend)]
    assert "results:" in shown[0]
    assert url.password is not None
    assert not [text for text in shown if url.password in text]
    assert url.password in service.app.backend.as_uri(include_password=True)

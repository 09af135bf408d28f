"""Waiting for results: looked for less and less often."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sessionmgr import ResultStore
from sessionmgr.errors import ResultArgumentError, ResultTimeoutError
from sessionmgr.results import waiting
from sessionmgr.results.waiting import Pace
from sessionmgr.schema import upgrade_tables
from tests.helpers import wait_until
from tests.results_helpers import counted_statements, make_celery_tables, rows_of
from tests.results_waiting import TELLING, TIMEOUT, WHEN, Waiter, get, one_by_one, told_store
from tests.servers import DRIVERS, Database

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL

    from tests.servers.postgresql import PostgreSQL

pytest_plugins = ["tests.results_fixtures"]


@pytest.fixture
def store(store: ResultStore) -> ResultStore:
    """Prepare the store: looks are counted, and not what comes before them."""
    store.prepare()
    return store


@pytest.fixture
def local(local: ResultStore) -> ResultStore:
    """Prepare the store in a SQLite file."""
    local.prepare()
    return local


# -- by looking


def test_results_come_in_order_of_completion(store: ResultStore) -> None:
    """What has ended comes by its time, and the rest as it ends, each once."""
    store.store("2", "SUCCESS", date_done=WHEN + timedelta(seconds=1))
    store.store("1", "REVOKED", b"one", date_done=WHEN)
    store.store("3", "STARTED")
    ids = ["3", "1", "4", "2", "1", "5"]
    end = one_by_one(store, "534")
    results = list(store.wait(iter(ids), TIMEOUT, on_interval=end))
    assert [result.task_id for result in results] == ["1", "2", "5", "3", "4"]
    assert results[0] == store.get("1")


@pytest.mark.parametrize("url", list(DRIVERS), indirect=True)
@pytest.mark.parametrize("made_by", ["store", "celery"])
def test_order_of_tasks_that_end_in_one_second(url: URL, made_by: str) -> None:
    """They come by their time too, on MySQL in new tables and in those that were upgraded."""
    if made_by == "celery":
        make_celery_tables(url, "5.7")
    ids = list("73516204")
    with ResultStore(url) as store:
        if made_by == "celery":
            upgrade_tables(store.manager.get_engine(url), store.tables.metadata, "it", whole=True)
        for task_id in sorted(ids):  # not in the order of the rows
            done = WHEN + timedelta(milliseconds=20 * ids.index(task_id))
            store.store(task_id, "SUCCESS", date_done=done)
        assert get(store, *sorted(ids)) == ids


def test_timeout_tells_what_is_open(local: ResultStore) -> None:
    """After the timeout, and not before the results that are there, it says who is late."""
    local.store("0", "SUCCESS")
    results = local.wait(map(str, range(5)), 0.1)
    assert next(results).task_id == "0"
    with pytest.raises(
        ResultTimeoutError, match=r"4 of 5 tasks .* after [\d.]+ s: '1', '2', '3', \.\.\.$"
    ) as caught:
        next(results)
    assert local.describe() in str(caught.value)
    assert isinstance(caught.value, TimeoutError)


def test_no_time_is_one_look(local: ResultStore) -> None:
    """With a timeout of 0 there is one statement, and results that are there are found."""
    local.store("1", "SUCCESS")
    with counted_statements(local) as statements:
        assert [result.task_id for result in local.wait(["1"], 0)] == ["1"]
        with pytest.raises(ResultTimeoutError, match="1 of 1 tasks"):
            list(local.wait(["2"], 0))
        assert list(local.wait([])) == []
    assert len(statements) == 2


def test_a_look_is_one_statement(store: ResultStore) -> None:
    """A thousand tasks are asked for at once, and `on_interval` is called after each look."""
    calls: list[None] = []
    with counted_statements(store) as statements, pytest.raises(ResultTimeoutError):
        list(store.wait(map(str, range(1000)), 0.3, on_interval=lambda: calls.append(None)))
    assert len(statements) == len(calls) + 1  # the last look ends the wait
    assert len(calls) > 1


def test_ids_are_checked_once(local: ResultStore) -> None:
    """Not at each look: with thousands of open tasks that would take longer than the look."""

    class Checked(str):
        __slots__ = ()
        times = 0

        def isascii(self) -> bool:
            Checked.times += 1
            return True

    ids = [Checked(f"{number}") for number in range(10)]
    with counted_statements(local) as looks, pytest.raises(ResultTimeoutError):
        list(local.wait(ids, 0.1))
    assert len(looks) > 3
    assert Checked.times == 10


@pytest.mark.parametrize("url", ["pymysql"], indirect=True)
def test_state_that_differs_in_case_is_no_end(store: ResultStore) -> None:
    """MySQL takes one for the other; a task in a state of the user's is open."""
    store.store("1", "Success")
    store.store("2", "SUCCESS")
    assert [result.task_id for result in store.wait(["2"], 0)] == ["2"]
    with pytest.raises(ResultTimeoutError):
        list(store.wait(["1"], 0))


def test_looks_become_rare(local: ResultStore) -> None:
    """In a second there are at most fifty looks, the first of them 5 ms apart."""
    with counted_statements(local) as statements, pytest.raises(ResultTimeoutError):
        list(local.wait(["1"], 1.0))
    assert len(statements) <= 50


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look comes at most a tenth of the time late, and in an hour there are two a second."""
    now = 0.0
    monkeypatch.setattr(waiting, "monotonic", lambda: now)
    pace, looks = Pace(0.5), 0
    while now < 3600:
        pause = pace.pause(told=False)
        assert pause == pytest.approx(min(max(0.005, now / 10), 0.5))
        now, looks = now + pause, looks + 1
    assert looks < 3600 * 2 + 50
    pace.begin_anew(0.1)
    assert pace.pause(told=False) == pytest.approx(0.5)
    pace.begin_anew(0.0001)
    assert pace.pause(told=False) == pytest.approx(0.005)
    assert pace.pause(told=True) == pytest.approx(0.05)


def test_no_connection_is_held_between_looks(store: ResultStore) -> None:
    """While one waits, the pool has its connection back."""
    waiter = Waiter(store, ["1"])
    waiter.has_looked()
    wait_until(lambda: not any(each.checked_out for each in store.manager.stats().databases))
    store.store("1", "SUCCESS")
    assert waiter.end() == ["1"]


def test_caller_may_stop_early(local: ResultStore) -> None:
    """Who has enough leaves the rest, and the store goes on."""
    local.store("1", "SUCCESS")
    for result in local.wait(["1", "2"]):
        assert result.task_id == "1"
        break
    assert local.get("2") is None


def test_what_on_interval_raises_ends_the_wait(local: ResultStore) -> None:
    """An exception of the caller's reaches the caller."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(local.wait(["1"], on_interval=stop))


def test_hopeless_error_is_raised(store: ResultStore) -> None:
    """An error that does not pass ends the wait: a table that is gone, say."""
    rows_of(store.dburi, "DROP TABLE celery_taskmeta")
    with pytest.raises(DBAPIError, match="celery_taskmeta"):
        list(store.wait(["1"], TIMEOUT))


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("123",), {}, "task_ids is a list of ids, or another iterable, not '123'"),
        ((["1"], "1"), {}, "timeout is a number of seconds, not"),
        ((["1"], float("nan")), {}, "timeout is a number of seconds, not"),
        ((["1"],), {"max_interval": 0}, "max_interval is a number of seconds above 0, not 0"),
        ((["1"],), {"max_interval": None}, "max_interval is a number of seconds above 0, not"),
    ],
    ids=["text", "timeout", "nan", "zero", "none"],
)
def test_wrong_arguments_are_refused(
    local: ResultStore, arguments: Any, options: Any, says: str
) -> None:
    """What cannot be raises at the call, before anything is waited for."""
    with pytest.raises(ResultArgumentError, match=says):
        local.wait(*arguments, **options)


@pytest.mark.parametrize("driver", DRIVERS)
def test_killed_connections_do_not_end_the_wait(
    make_database: Callable[..., Database], driver: str
) -> None:
    """Who waits goes on with new connections when the server ended the old ones."""
    database = make_database(driver)
    with ResultStore(database.url) as store:
        store.prepare()
        waiter = Waiter(store, ["1"])
        for _ in range(3):
            waiter.has_looked()
            database.server.kill(*database.connections())
        waiter.has_looked(3)
        store.store("1", "SUCCESS")
        assert waiter.end() == ["1"]


# -- a pool without a connection


def test_full_pool_does_not_end_the_wait(
    url: URL | str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits outlives a pool whose connections are all in use, until its own timeout."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.02}
    with ResultStore(url, engine_options=options) as store, ResultStore(url) as other:
        store.prepare()
        other.prepare()
        with store.manager.get_engine(store.dburi).connect():
            waiter = Waiter(store, ["1"])
            waiter.has_looked(3)
            with pytest.raises(ResultTimeoutError) as caught:
                list(store.wait(["1"], 0.1))
            assert isinstance(caught.value.__cause__, PoolTimeoutError)
            other.store("1", "SUCCESS")
            waiter.has_looked()
        assert waiter.end() == ["1"]
        assert "cannot look for the results of 1 tasks" in caplog.text
        monkeypatch.setattr(waiting, "PATIENCE", 0.1)
        with store.manager.get_engine(store.dburi).connect():
            with pytest.raises(PoolTimeoutError):
                list(store.wait(["2"]))
            with pytest.raises(ResultTimeoutError):
                list(store.wait(["2"], 0.5))


def test_wait_for_a_full_pool_is_waited_once(local: ResultStore) -> None:
    """When the pool alone has taken longer than the timeout, it is not asked again."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.2}
    looks: list[None] = []
    with ResultStore(local.dburi, engine_options=options) as store:
        store.prepare()
        engine = store.manager.get_engine(store.dburi)
        with engine.connect(), pytest.raises(ResultTimeoutError):
            list(store.wait(["1"], 0.1, on_interval=lambda: looks.append(None)))
    assert looks == []


# -- a server that goes


@pytest.mark.parametrize("driver", TELLING)
def test_restart_of_the_server_is_survived(
    private_postgresql: PostgreSQL,
    make_database: Callable[..., Database],
    driver: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who waits outlives a restart, with a warning; not a server that stays away."""
    database = make_database(driver, private_postgresql)
    with ResultStore(database.url) as plain, told_store(database) as telling:
        plain.prepare()
        waiters = [Waiter(store, ["1"]) for store in (plain, telling)]
        for waiter in waiters:
            waiter.has_looked(3)
        private_postgresql.process.stop()
        for waiter in waiters:
            waiter.has_looked(2)
        with pytest.raises(ResultTimeoutError) as caught:
            list(plain.wait(["1"], 0.2))
        assert isinstance(caught.value.__cause__, DBAPIError)
        private_postgresql.process.start()
        telling.store("1", "SUCCESS")
        assert [waiter.end() for waiter in waiters] == [["1"], ["1"]]
        private_postgresql.process.stop()
        monkeypatch.setattr(waiting, "PATIENCE", 0.2)
        with pytest.raises(DBAPIError):
            get(plain, "2")
    texts = [record.getMessage() for record in caplog.records]
    assert any("cannot look for the results of 1 tasks; going on for 60 s" in t for t in texts)
    assert any("the connection that listens for task results was lost" in t for t in texts)

"""``ResultStore.cleanup``: what expired goes, in batches, one runner at a time, beside writers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from sqlalchemy import event, func, make_url, select

from sessionmgr import ResultStore, SessionManager, TaskResult
from sessionmgr.errors import ResultArgumentError
from sessionmgr.results import cleanup
from tests.concurrency import in_children
from tests.helpers import wait_until
from tests.results_helpers import (
    cleanup_lock,
    counted_statements,
    make_celery_tables,
    plain_engine,
    rows_of,
)
from tests.servers import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL

    from tests.servers import Database


pytest_plugins = ["tests.results_fixtures"]

BEFORE = datetime(2024, 3, 1)  # noqa: DTZ001 - as the tables have it
OLD, NEW = BEFORE - timedelta(days=1), BEFORE + timedelta(days=1)

ONE_PER_DATABASE = pytest.mark.parametrize("url", ["psycopg", "pymysql", "sqlite"], indirect=True)
ON_SERVERS = pytest.mark.parametrize("url", ["psycopg", "pymysql"], indirect=True)


def fill(store: ResultStore, number: int, done: datetime | None, name: str = "old") -> None:
    """Store results of tasks that ended at one time; those without a time have not ended."""
    status = "SUCCESS" if done else "STARTED"
    store.store_many(TaskResult(f"{name}-{i}", status, b"x", date_done=done) for i in range(number))


def fill_chords(store: ResultStore, number: int, done: datetime | None, name: str = "old") -> None:
    """Write groups, and chords with two parts each."""
    tables = store.tables
    ids = [f"{name}-{i}" for i in range(number)]
    groups = [{"taskset_id": each, "result": b"g", "date_done": done} for each in ids]
    chords = [{"group_id": each, "added": 2, "returned": 1, "date_done": done} for each in ids]
    parts = [
        {"group_id": each, "position": part, "task_id": f"{each}-{part}", "date_done": done}
        for each in ids
        for part in range(2)
    ]
    store.prepare()
    with plain_engine(store.dburi) as engine, engine.begin() as connection:
        for table, rows in ((tables.group, groups), (tables.chord, chords), (tables.part, parts)):
            for row in rows:
                connection.execute(table.insert(), row)


def names(store: ResultStore, column: Any) -> set[str]:
    """Return the first parts of the ids that are in a column."""
    with plain_engine(store.dburi) as engine, engine.connect() as connection:
        return {each.partition("-")[0] for each in connection.scalars(select(column))}


def left(store: ResultStore) -> int:
    """Return how many tasks there are."""
    with plain_engine(store.dburi) as engine, engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(store.tables.task)) or 0


def test_what_ended_before_goes(store: ResultStore) -> None:
    """Tasks, groups, chords and their parts go by the time they ended; the others stay."""
    for done, name in ((OLD, "old"), (BEFORE, "at"), (NEW, "new"), (None, "open")):
        fill(store, 30, done, name)
        fill_chords(store, 5, done, name)
    told: list[int] = []
    assert store.cleanup(BEFORE, batch_size=7, progress=told.append) == 30 + 5 + 5 + 10
    assert told == sorted(told)
    assert {7, 14, 21, 28, 30, 35, 40, 47, 50} == set(told)
    tables = store.tables
    for column in (
        tables.task.c.task_id,
        tables.group.c.taskset_id,
        tables.chord.c.group_id,
        tables.part.c.group_id,
    ):
        assert names(store, column) == {"at", "new", "open"}
    assert store.cleanup(BEFORE) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 10, 20, 1000])
def test_batches_of_any_size(local: ResultStore, batch_size: int) -> None:
    """The same rows go, whatever the size of a batch, also where all ended at one time."""
    fill(local, 20, OLD)
    fill(local, 3, NEW, "new")
    assert local.cleanup(BEFORE, batch_size) == 20
    assert left(local) == 3


@ONE_PER_DATABASE
def test_each_batch_is_a_transaction(store: ResultStore) -> None:
    """After each batch what it deleted is gone for everybody, and nothing more."""
    fill(store, 20, OLD)
    there: list[int] = []
    store.cleanup(BEFORE, batch_size=8, progress=lambda _: there.append(left(store)))
    assert there[:3] == [12, 4, 0]


@ONE_PER_DATABASE
@pytest.mark.parametrize("ids", ["sequence", "auto"])
def test_old_tables_without_an_index_are_read_once(url: URL | str, ids: str) -> None:
    """In Celery 5.2's tables, which cannot be asked by time, all batches together pass once."""
    make_celery_tables(url, "5.2", ids=ids)
    with ResultStore(url, create_tables=False) as store:
        fill(store, 250, NEW, "new")
        fill(store, 45, OLD)
        fill(store, 250, NEW, "newer")
        with counted_statements(store) as statements:
            assert store.cleanup(BEFORE, batch_size=10) == 45
        assert names(store, store.tables.task.c.task_id) == {"new", "newer"}
    # by windows of ten batches, and one more batch for each that was full
    assert sum(each.startswith("DELETE") for each in statements) == 5
    assert sum("celery_taskmeta.date_done <" in each for each in statements) <= 6 + 5 + 5


@ONE_PER_DATABASE
def test_tables_that_are_not_there(url: URL | str) -> None:
    """Where there are no tables for chords, or none at all, cleanup goes through what is there."""
    with ResultStore(url, create_tables=False) as store:
        assert store.cleanup(BEFORE) == 0
        make_celery_tables(url, "5.7")
        fill(store, 3, OLD)
        assert store.cleanup(BEFORE) == 3


def test_row_that_a_batch_may_not_delete(local: ResultStore) -> None:
    """Rows that the database itself keeps end the cleanup, which does not try for ever."""
    fill(local, 30, OLD)
    rows_of(
        local.dburi,
        "CREATE TRIGGER keep BEFORE DELETE ON celery_taskmeta BEGIN SELECT RAISE(IGNORE); END",
    )
    assert local.cleanup(BEFORE, batch_size=10) == 0
    assert left(local) == 30


def test_time_zone_is_turned_into_utc(local: ResultStore) -> None:
    """A time with a zone is the same moment in UTC, as the rows have it."""
    fill(local, 1, BEFORE - timedelta(hours=1))
    east = timezone(timedelta(hours=2))
    assert local.cleanup(BEFORE.replace(tzinfo=east)) == 0
    assert local.cleanup(BEFORE.replace(tzinfo=timezone.utc)) == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("2024-03-01",), "before is a datetime"),
        ((BEFORE.date(),), "before is a datetime"),
        ((BEFORE, 0), "batch_size must be a whole number"),
        ((BEFORE, True), "batch_size must be a whole number"),
        ((BEFORE, "9"), "batch_size must be a whole number"),
    ],
    ids=["text", "date", "zero", "bool", "size"],
)
def test_arguments_that_cannot_be(
    local: ResultStore, arguments: tuple[Any, ...], match: str
) -> None:
    """A wrong argument raises before anything is deleted."""
    with pytest.raises(ResultArgumentError, match=match):
        local.cleanup(*arguments)


@ON_SERVERS
def test_second_runner_leaves_it_to_the_first(
    url: URL | str, store: ResultStore, caplog: pytest.LogCaptureFixture
) -> None:
    """While another connection has the lock, cleanup deletes nothing and says so in the log."""
    caplog.set_level(logging.INFO, "sessionmgr")
    fill(store, 3, OLD)
    with cleanup_lock(store):
        assert store.cleanup(BEFORE) == 0
        assert "another cleanup of results is running" in caplog.text
        assert store.describe() in caplog.text
    assert store.cleanup(BEFORE) == 3


@ON_SERVERS
@pytest.mark.parametrize("differ", ["names", "schemas"])
def test_runner_leaves_those_of_other_tables_alone(
    url: URL | str, store: ResultStore, make_database: Callable[..., Database], differ: str
) -> None:
    """The tables of another application in the same database are cleaned up at the same time."""
    if differ == "names":  # of any length, and with any characters in them
        names = {kind: f"{kind}%:{'x' * 50}" for kind in ("task", "group", "chord", "part")}
        options: dict[str, Any] = {"table_names": names}
    elif make_url(url).get_backend_name() == "postgresql":
        rows_of(url, "CREATE SCHEMA other")
        options = {"table_schemas": {"task": "other", "group": "other"}}
    else:
        other_database = make_database("pymysql").name
        options = {"table_schemas": {"task": other_database, "group": other_database}}
    with ResultStore(url, **options) as other:
        for each in (store, other):
            fill(each, 3, OLD)
        with cleanup_lock(store):
            assert store.cleanup(BEFORE) == 0
            assert other.cleanup(BEFORE) == 3
        with cleanup_lock(other):
            assert store.cleanup(BEFORE) == 3


@pytest.mark.parametrize("url", ["psycopg"], indirect=True)
def test_runner_of_the_same_tables_by_another_name(store: ResultStore) -> None:
    """The default schema, named or not, is one place."""
    fill(store, 3, OLD)
    with ResultStore(store.dburi, table_schemas={"task": "public"}) as other, cleanup_lock(store):
        assert other.cleanup(BEFORE) == 0


@pytest.fixture(params=["own", "given"])
def runner(request: pytest.FixtureRequest, url: URL | str) -> Iterator[ResultStore]:
    """Open a store with a manager of its own, whose connections are in autocommit, or another."""
    if request.param == "own":
        with ResultStore(url) as opened:
            yield opened
    else:
        with SessionManager(pooling="always") as manager:
            yield ResultStore(url, manager=manager)


@pytest.mark.parametrize("url", list(DRIVERS), indirect=True)
def test_second_runner_deletes_nothing_between_two_batches(
    runner: ResultStore, store: ResultStore
) -> None:
    """The first has the lock for its whole run: who begins in its midst leaves it alone."""
    fill(store, 50, OLD)
    others: list[int] = []

    def run_others(_: int) -> None:
        others.extend(each.cleanup(BEFORE, batch_size=10) for each in (store, runner))

    assert runner.cleanup(BEFORE, batch_size=10, progress=run_others) == 50
    assert len(others) >= 10
    assert set(others) == {0}
    fill(store, 5, OLD, "again")
    assert store.cleanup(BEFORE) == 5, "the lock is free"


@ON_SERVERS
def test_forked_child_leaves_the_lock_to_its_parent(store: ResultStore) -> None:
    """A child that is forked in the midst of a run does not have its lock, nor ends it."""
    fill(store, 30, OLD)
    others: list[int] = []

    def run_others(_: int) -> None:
        others.extend(in_children([lambda: store.cleanup(BEFORE)]))

    assert store.cleanup(BEFORE, batch_size=10, progress=run_others) == 30
    assert set(others) == {0}


@ON_SERVERS
def test_end_of_the_run_frees_the_lock(store: ResultStore) -> None:
    """What progress raises ends the run, and its lock; no connection stays but the pool's."""
    fill(store, 30, OLD)

    def fail(_: int) -> NoReturn:
        raise KeyboardInterrupt

    for rest in (20, 10):
        with pytest.raises(KeyboardInterrupt):
            store.cleanup(BEFORE, batch_size=10, progress=fail)
        assert left(store) == rest
    assert store.cleanup(BEFORE) == 10
    [stats] = store.manager.stats().databases
    assert (stats.checked_out, stats.idle) == (0, 1)


@ON_SERVERS
def test_runner_needs_one_connection_of_the_pool(url: URL | str, store: ResultStore) -> None:
    """The lock takes none away from batches and progress: a pool of one is enough."""
    fill(store, 30, OLD)
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    with ResultStore(url, engine_options=options) as small:
        found: list[bool] = []
        assert small.cleanup(BEFORE, 10, lambda _: found.append(small.exists("old-29"))) == 30
        assert found[:3] == [True, True, False]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_lock_on_postgresql_suits_a_transaction_pooler(
    make_database: Callable[..., Database], driver: str
) -> None:
    """It belongs to an open transaction, which keeps no snapshot that would hold up VACUUM."""
    database = make_database(driver)
    query = (
        "SELECT a.state, a.backend_xmin, a.backend_xid FROM pg_locks l JOIN pg_stat_activity a"
        " USING (pid) WHERE l.locktype = 'advisory' AND a.datname = %s"
    )
    seen: list[Any] = []

    def look(_: int) -> None:
        seen.extend(database.server.query(query, database.name))

    options = {"isolation_level": "REPEATABLE READ"}
    with SessionManager(pooling="always", engine_options=options) as manager:
        for store in (ResultStore(database.url), ResultStore(database.url, manager=manager)):
            with store:
                fill(store, 1, OLD)
                store.cleanup(BEFORE, progress=look)
    assert len(seen) == 8
    assert set(seen) == {("idle in transaction", None, None)}
    assert database.server.query(query, database.name) == []


@pytest.mark.parametrize("driver", list(DRIVERS))
def test_lost_lock_is_taken_again(
    make_database: Callable[..., Database],
    driver: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A runner whose connections are killed goes on, unless another has the lock by then."""
    caplog.set_level(logging.INFO, "sessionmgr")
    database = make_database(driver)
    with ResultStore(database.url) as store:

        def kill(_: int) -> None:
            database.server.kill(*database.connections())
            wait_until(lambda: not database.connections())

        fill(store, 30, OLD)
        assert store.cleanup(BEFORE, batch_size=10, progress=kill) == 30
        assert "another cleanup" not in caplog.text

        monkeypatch.setattr(cleanup, "_PATIENCE", 0.1)
        with contextlib.ExitStack() as ends:

            def take_it_away(deleted: int) -> None:
                kill(deleted)
                ends.enter_context(cleanup_lock(store))

            fill(store, 30, OLD)
            assert store.cleanup(BEFORE, batch_size=10, progress=take_it_away) == 10
            assert "another cleanup of results is running" in caplog.text
        assert store.cleanup(BEFORE) == 20


def test_runners_take_turns_on_sqlite(local: ResultStore) -> None:
    """There is no lock for a run: who begins in the midst of another's deletes the rest."""
    fill(local, 30, OLD)
    others: list[int] = []
    with ResultStore(local.dburi) as other:
        deleted = local.cleanup(BEFORE, 10, lambda _: others.append(other.cleanup(BEFORE)))
    assert (deleted, others[:2]) == (10, [20, 0])


@ONE_PER_DATABASE
def test_runners_at_once_delete_each_row_once(store: ResultStore) -> None:
    """Of three processes that clean up at once each counts what it deleted, and all goes."""
    fill(store, 600, OLD)
    counts = in_children([lambda: store.cleanup(BEFORE, batch_size=50)] * 3)
    assert sum(counts) == 600
    assert left(store) == 0


def die(*_: object) -> NoReturn:
    """Be killed, as by the kernel when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


@ONE_PER_DATABASE
def test_killed_runner_leaves_no_lock(store: ResultStore) -> None:
    """A runner that is killed inside a batch holds nobody up, and its batch was not done."""
    fill(store, 30, OLD)
    pid = os.fork()
    if pid == 0:
        engine = store.manager.get_engine(store.dburi)
        event.listen(
            engine,
            "after_cursor_execute",
            lambda *args: die() if args[2].startswith("DELETE") else None,
        )
        store.cleanup(BEFORE, batch_size=10)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert left(store) == 30
    deleted: list[int] = []
    wait_until(lambda: deleted.append(store.cleanup(BEFORE)) or left(store) == 0)
    assert sum(deleted) == 30


@ON_SERVERS
def test_batch_holds_up_no_writer(url: URL | str, store: ResultStore) -> None:
    """While a batch has deleted and not committed, others store new results and later states."""
    fill(store, 20, OLD)
    fill(store, 20, None, "open")
    engine = store.manager.get_engine(store.dburi)
    stored: list[bool] = []

    def write(*args: Any) -> None:
        if args[2].startswith("DELETE"):
            stored.append(other.store(f"new-{len(stored)}", "SUCCESS", b"1"))
            stored.append(other.store(f"open-{len(stored)}", "SUCCESS", b"1"))

    event.listen(engine, "after_cursor_execute", write)
    with ResultStore(url) as other:
        assert store.cleanup(BEFORE, batch_size=5) == 20
    assert stored == [True] * 8
    assert left(store) == 20 + 4


def check_writers(store: ResultStore, rows: int, writers: int, batch_size: int) -> None:
    """Store from many processes while expired rows go; check that every store succeeds.

    :param rows: how many expired rows there are.
    :param writers: how many processes store.
    :param batch_size: rows in a batch of the cleanup.
    """
    done = multiprocessing.Event()

    def write(writer: int) -> list[float]:
        times = [time.monotonic()]
        while not done.is_set():
            assert store.store(f"writer{writer}-{len(times)}", "SUCCESS", b"done")
            times.append(time.monotonic())
        return times

    def clean_up() -> list[float]:
        begin = time.monotonic()
        try:
            assert store.cleanup(BEFORE, batch_size) == rows
        finally:
            done.set()
        return [begin, time.monotonic()]

    jobs = [lambda i=i: write(i) for i in range(writers)]
    *times, (begin, end) = in_children([*jobs, clean_up], timeout=1000.0)
    stores = sum(len(each) - 1 for each in times)
    slowest = max(b - a for each in times for a, b in itertools.pairwise(each))
    print(  # noqa: T201 - for whoever runs it with -s
        f"\n{store.describe()}: {rows:,} rows in {end - begin:.1f} s; {stores:,} stores beside by"
        f" {writers} processes, the slowest took {slowest * 1000:.0f} ms"
    )
    # not each of them: which of many processes has a core is the machine's business
    assert sum(begin < moment < end for each in times for moment in each) > writers
    assert left(store) == stores


@ONE_PER_DATABASE
def test_writers_go_on(store: ResultStore) -> None:
    """Several processes keep storing while expired rows go; no store fails."""
    # SQLite's writers wait for each other, with or without a cleanup
    writers = 2 if store.describe().startswith("sqlite") else 4
    fill(store, 5000, OLD)
    check_writers(store, 5000, writers, batch_size=1000)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@ONE_PER_DATABASE
def test_many_writers_go_on(store: ResultStore) -> None:
    """Eight processes keep storing while 500,000 expired rows go; no store fails."""
    for part in range(10):
        fill(store, 50_000, OLD + timedelta(minutes=part), f"old{part}")
    check_writers(store, 500_000, writers=8, batch_size=1000)

"""Result stores behind PgBouncer, which gives a connection of the server to each transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from celery import chord, group

from sessionmgr import ResultStore, TaskResult
from tests.celery_workers import serving
from tests.concurrency import in_children
from tests.results_helpers import rows_of
from tests.results_waiting import TELLING, TIMEOUT, WHEN, Waiter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL

    from tests.servers import Database, Servers
    from tests.servers.pgbouncer import PgBouncer
    from tests.servers.postgresql import PostgreSQL
    from tests.servers.redis import Redis

OPTIONS: dict[str, dict[str, Any]] = {
    "psycopg": {"connect_args": {"prepare_threshold": None}},  # it prepares else, for itself alone
    "psycopg2": {},
}
"""What the drivers need to work behind a pooler of transactions."""


@dataclass(frozen=True)
class Pooled:
    """A database behind PgBouncer.

    :param database: the database, as it is without.
    :param url: its URL through PgBouncer.
    """

    database: Database
    url: URL

    @property
    def options(self) -> dict[str, Any]:
        """The options of an engine for it."""
        return OPTIONS[self.database.driver]

    def store(self, **options: Any) -> ResultStore:
        """Open a store on it."""
        return ResultStore(self.url, engine_options=self.options, **options)


@pytest.fixture(scope="module")
def pgbouncer(servers: Servers, postgresql: PostgreSQL) -> Iterator[PgBouncer]:
    """Run a PgBouncer in front of the server that all tests share."""
    with servers.pgbouncer(postgresql) as bouncer:
        yield bouncer


@pytest.fixture(params=TELLING)
def pooled(
    request: pytest.FixtureRequest, pgbouncer: PgBouncer, make_database: Callable[..., Database]
) -> Pooled:
    """Create a database, once with each driver."""
    database = make_database(request.param)
    return Pooled(database, pgbouncer.url(request.param, database.name))


def fill(store: ResultStore, number: int) -> None:
    """Store results that have expired."""
    store.store_many(TaskResult(f"old-{i}", "SUCCESS", b"x", date_done=WHEN) for i in range(number))


def test_many_processes_share_few_connections(pooled: Pooled) -> None:
    """Of eight processes one creates the tables; each stores, and reads what it stored."""

    def use(process: int) -> None:
        ids = [f"{process}-{i}" for i in range(20)]
        with pooled.store() as store:
            for task_id in ids:
                assert store.store(task_id, "SUCCESS", task_id.encode())
                assert not store.store(task_id, "FAILURE")
                found = store.get(task_id)
                assert found is not None
                assert found.result == task_id.encode()
            store.store_many(TaskResult(f"many-{each}", "SUCCESS") for each in ids)
            assert store.get_many(ids).keys() == set(ids)
            store.forget(ids[0])
            assert not store.exists(ids[0])

    mark = pooled.database.server.log_mark()
    in_children([lambda i=i: use(i) for i in range(8)])
    log = pooled.database.server.log_text(mark).splitlines()
    assert not [line for line in log if f"@{pooled.database.name} ERROR" in line]
    [(count,)] = rows_of(pooled.database.url, "SELECT count(*) FROM celery_taskmeta")
    assert count == 8 * (19 + 20)
    assert len(pooled.database.connections()) <= 3


def test_results_are_waited_for(pooled: Pooled) -> None:
    """Who waits gets what others store; with ``notify`` too, though he is not told."""
    ids = ["1", "2"]
    for notify in (False, True):
        with pooled.store(notify=notify) as store, pooled.store(notify=notify) as worker:
            store.prepare()
            waiter = Waiter(store, ids)
            for task_id in ids:
                waiter.has_looked()
                worker.store(task_id, "SUCCESS")
            assert sorted(waiter.end()) == ids
            store.forget(ids)


def test_one_cleanup_at_a_time(pooled: Pooled) -> None:
    """The lock is held from batch to batch, while others use the same few connections."""
    with pooled.store() as store, pooled.store() as other:
        fill(store, 50)
        before = WHEN + timedelta(days=1)
        others: list[int] = []

        def run_others(_: int) -> None:
            others.append(other.cleanup(before))
            other.store("new", "SUCCESS")

        assert store.cleanup(before, batch_size=10, progress=run_others) == 50
        assert len(others) >= 5
        assert set(others) == {0}
        fill(store, 50)
        assert other.cleanup(before) == 50, "the lock is free"


def test_cleanups_at_once(pooled: Pooled) -> None:
    """Of four processes that clean up at once each counts what it deleted, and all goes."""
    with pooled.store() as store:
        fill(store, 600)
        before = WHEN + timedelta(days=1)
        counts = in_children([lambda: store.cleanup(before, batch_size=50)] * 4)
        assert sum(counts) == 600
        assert store.cleanup(before) == 0


@pytest.mark.parametrize("pooled", ["psycopg"], indirect=True)
def test_celery_backend(pooled: Pooled, redis_server: Redis) -> None:
    """A worker's results, groups and chords come through."""
    settings = {
        "result_backend": f"sessionmgr+{pooled.url.render_as_string(hide_password=False)}",
        "database_engine_options": pooled.options,
    }
    with serving(redis_server, "fork", pooled.database, **settings) as service:
        app = service.app
        add, total = app.signature("add"), app.signature("total")
        assert group([add.clone((i, i)) for i in range(20)], app=app)().get(timeout=TIMEOUT) == [
            2 * i for i in range(20)
        ]
        result = chord([add.clone((i, 1)) for i in range(20)], app=app)(total)
        assert result.get(timeout=TIMEOUT) == 210
        saved = result.parent.save()
        assert app.GroupResult.restore(saved.id).get(timeout=TIMEOUT) == list(range(1, 21))
        app.backend.cleanup()
        result.forget()
        assert result.state == "PENDING"

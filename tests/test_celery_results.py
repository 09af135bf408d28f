"""Results of real Celery workers, of every pool, in every database."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
from celery import group
from celery.canvas import StampingVisitor
from celery.result import GroupResult

from tests.celery_workers import POOLS, serving
from tests.concurrency import in_threads
from tests.counting import session_counts
from tests.helpers import wait_until
from tests.results_helpers import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery.canvas import Signature

    from tests.celery_workers import Service
    from tests.servers import Database
    from tests.servers.mariadb import MariaDB
    from tests.servers.redis import Redis

pytest_plugins = ["tests.celery_fixtures"]

POOL_SIZE = 15
"""How many connections a backend opens, and keeps, unless it is told otherwise."""

WORKER_CONNECTIONS = {
    "fork": 3,  # two processes, and the master
    "spawn": 3,
    "solo": 1,
    "threads": POOL_SIZE,
    "gevent": POOL_SIZE,
    "eventlet": POOL_SIZE,
}
"""Pool -> how many connections a worker opens at most: one for each process, where that runs one
task at a time."""


class Stamp(StampingVisitor):
    """Stamps every task with a customer."""

    def on_signature(self, sig: Signature, **headers: Any) -> dict[str, Any]:
        return {"customer": "42", "stamped_headers": ["customer"]}


def test_result_comes_back(service: Service) -> None:
    """A task's result and state reach the client, with the time at which it ended."""
    result = service.app.send_task("add", (2, 3))
    assert result.get(timeout=60.0) == 5
    assert result.state == "SUCCESS"
    age = datetime.now(timezone.utc).replace(tzinfo=None) - result.date_done
    assert abs(age.total_seconds()) < 600


def test_exception_comes_back(service: Service) -> None:
    """A failure is raised again as what it was, with the worker's traceback in the result."""
    result = service.app.send_task("fail", ("no such thing",))
    with pytest.raises(LookupError, match="no such thing"):
        result.get(timeout=60.0)
    assert result.state == "FAILURE"
    assert "raise LookupError(message)" in result.traceback


def test_children_come_back(service: Service) -> None:
    """The tasks that a task has started are known to who reads its result."""
    result = service.app.send_task("parent")
    result.get(timeout=60.0)
    assert [child.get(timeout=60.0) for child in result.children] == [3, 7]


def test_started_tasks_say_so(service: Service) -> None:
    """A task that runs is STARTED, with the worker's name, and SUCCESS replaces that."""
    result = service.app.send_task("hold", (name := service.unique_name(),))
    wait_until(lambda: result.state == "STARTED", timeout=60.0)
    assert service.key in result.info["hostname"]
    service.counters.add(name)
    result.get(timeout=60.0)
    assert result.state == "SUCCESS"


def test_extended_results_tell_of_the_request(service: Service) -> None:
    """With ``result_extended`` name, arguments, worker and stamps of the task are known."""
    signature = service.app.signature("add", (4,), {"y": 5})
    signature.stamp(Stamp())
    result = signature.apply_async()
    assert result.get(timeout=60.0) == 9
    assert (result.name, result.args, result.kwargs) == ("add", [4], {"y": 5})
    assert (result.retries, result.queue) == (0, "celery")
    assert service.key in result.worker
    meta = service.app.backend.get_task_meta(result.id)
    assert meta["stamped_headers"] == ["customer"]
    assert meta["customer"] in ("42", ["42"])


def test_group_is_saved_and_restored(service: Service) -> None:
    """A group's results are there for who knows its id, until it is deleted."""
    parts = group([service.app.signature("add", (i, i)) for i in range(5)], app=service.app)
    result = parts.apply_async()
    result.save(backend=service.app.backend)
    restored = GroupResult.restore(result.id, backend=service.app.backend, app=service.app)
    assert restored.get(timeout=60.0) == [0, 2, 4, 6, 8]
    restored.delete(backend=service.app.backend)
    assert GroupResult.restore(result.id, backend=service.app.backend, app=service.app) is None


def test_forgotten_and_ignored_results(service: Service) -> None:
    """Nothing is known of a result that was forgotten, or that its task has ignored."""
    result = service.app.send_task("add", (1, 1))
    assert result.get(timeout=60.0) == 2
    result.forget()
    quiet = service.app.send_task("quiet")
    service.call("add", 1, 1)
    assert service.app.AsyncResult(result.id).state == "PENDING"
    assert not service.app.backend.task_result_exists(quiet.id)


def test_result_is_looked_for_often(service: Service) -> None:
    """While tasks sleep 50 ms, ``get()`` looks again and again, and sends nothing else.

    Celery's backend looks once in vain, and then sleeps for half a second.
    """
    service.call("nap", 0.0)
    counts = []
    with counted_statements(service.app.backend.store) as looks:
        for _ in range(10):
            before = len(looks)
            assert service.call("nap", 0.05) == 0.05
            counts.append(len(looks) - before)
    assert max(counts) >= 4  # a busy machine may have let some of them wait
    assert len(set(looks)) == 1


def test_large_result(service: Service) -> None:
    """A result of a mebibyte arrives whole."""
    assert service.call("echo", "x" * 2**20) == "x" * 2**20


def test_one_manager_for_all_threads(service: Service) -> None:
    """However many threads run tasks in a process, its application has one SessionManager."""
    results = [service.app.send_task("backend") for _ in range(20)]
    seen = {tuple(result.get(timeout=60.0)) for result in results}
    assert len({(pid, manager) for pid, _, manager in seen}) == len({pid for pid, _, _ in seen})

    def manager_of_thread() -> int:
        return id(service.app.backend.session_manager)

    assert len(set(in_threads([manager_of_thread] * 8))) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"result_serializer": "pickle", "result_accept_content": ["pickle"]},
        {"result_compression": "gzip"},
    ],
    ids=["pickle", "gzip"],
)
def test_serializers_and_compression(
    settings: dict[str, Any], redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """Results and exceptions come back in whatever form they are stored."""
    with serving(redis_server, "threads", make_database("psycopg"), **settings) as service:
        assert service.call("echo", {"a": ["b" * 1000]}) == {"a": ["b" * 1000]}
        with pytest.raises(LookupError, match="no such thing"):
            service.call("fail", "no such thing")


@pytest.mark.parametrize("pool", list(POOLS))
def test_processes_keep_their_connections(
    pool: str, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """For 400 tasks each process opens no more connections than it uses at once, and closes them.

    A connection that is not closed politely, the server counts as abandoned.
    """
    database = make_database("psycopg")
    prepared, _ = session_counts(database)
    with serving(redis_server, pool, database) as service:
        results = [service.app.send_task("echo", (number,)) for number in range(400)]
        assert [result.get(timeout=60.0) for result in results] == list(range(400))
    opened, abandoned = session_counts(database)
    assert opened - prepared <= WORKER_CONNECTIONS[pool] + 1  # and the client's
    assert abandoned == 0


def test_processes_that_are_replaced_close_their_connections(
    redis_server: Redis, make_database: Callable[..., Database], private_mariadb: MariaDB
) -> None:
    """With ``--max-tasks-per-child`` each process says goodbye to the server before it leaves."""
    aborted = private_mariadb.status("Aborted_clients")
    for database in (make_database("psycopg"), make_database("pymysql", private_mariadb)):
        with serving(redis_server, "fork", database, options="--max-tasks-per-child 5") as service:
            results = [service.app.send_task("process") for _ in range(20)]
            assert len({result.get(timeout=60.0) for result in results}) >= 4
        if database.driver == "psycopg":
            assert session_counts(database)[1] == 0
    assert private_mariadb.status("Aborted_clients") == aborted

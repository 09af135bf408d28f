"""Faults under real Celery workers: no result is lost, none is wrong, and no worker is stuck."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import redis
from celery.exceptions import SoftTimeLimitExceeded

from tests.celery_workers import serving
from tests.helpers import wait_until
from tests.items import open_transactions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from celery.result import AsyncResult

    from tests.celery_workers import Service
    from tests.servers import Database
    from tests.servers.redis import Redis

pytest_plugins = ["tests.celery_fixtures"]

LATE = {"task_acks_late": True, "task_reject_on_worker_lost": True}
"""Settings with which a task is delivered again when its process was killed."""

TASKS = pytest.mark.parametrize(
    "tasks", [200, pytest.param(2000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
DRIVER = pytest.mark.parametrize("driver", ["psycopg", "pymysql"])


def send(service: Service, numbers: Iterable[int]) -> list[AsyncResult]:
    """Send tasks that take 20 ms; the result of each is its number."""
    return [service.app.send_task("slow_echo", (number,)) for number in numbers]


def waiting(service: Service) -> int:
    """Return how many tasks the broker has that no worker has taken yet."""
    with redis.Redis.from_url(service.settings["broker_url"]) as client:
        return int(client.llen(f"{service.key}celery"))


def undone(service: Service) -> int:
    """Return how many tasks the broker has, be it that a worker has taken them, and not ended."""
    with redis.Redis.from_url(service.settings["broker_url"]) as client:
        return int(client.hlen(f"{service.key}unacked")) + waiting(service)


def received(service: Service) -> list[str]:
    """Return the ids of the slow tasks that workers have received, once for each time."""
    return re.findall(r"Task slow_echo\[(\S+)\] received", service.worker.text())


def assert_all_right(service: Service, results: list[AsyncResult]) -> None:
    """Assert that each result comes and is its own, and that each child takes tasks."""
    numbers = [result.get(timeout=60.0) for result in results]
    assert numbers == list(range(len(results)))
    assert_all_work(service)


def assert_all_work(service: Service) -> None:
    """Assert that each child takes tasks."""
    children = {child.pid for child in service.worker.children()}

    def all_work() -> bool:
        sent = [service.app.send_task("process") for _ in range(8)]  # at once: else one does all
        return children <= {result.get(timeout=60.0) for result in sent}

    wait_until(all_work, timeout=60.0)


@contextlib.contextmanager
def repeatedly(act: Callable[[], None], seconds: float) -> Iterator[None]:
    """Do something again and again, in a thread."""
    ends = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        while not ends.wait(seconds):
            try:
                act()
            except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
                errors.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()
    if errors:
        raise errors[0]


@TASKS
@DRIVER
def test_connections_killed_again_and_again(
    driver: str, tasks: int, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """The server ends every connection, the client's too, each 200 ms, while tasks run."""
    database = make_database(driver)
    kills = 0

    def kill() -> None:
        nonlocal kills
        ids = database.connections()
        kills += bool(ids) and waiting(service) > 0
        database.server.kill(*ids)

    with serving(redis_server, "fork", database) as service:
        service.call("echo", 0)
        results = send(service, range(tasks))
        with repeatedly(kill, 0.2):
            assert [result.get(timeout=90.0) for result in results] == list(range(tasks))
        assert kills >= tasks // 50
        assert_all_right(service, results)


@TASKS
@DRIVER
def test_server_restarts(
    driver: str, tasks: int, redis_server: Redis, request: pytest.FixtureRequest
) -> None:
    """The database server restarts while tasks run and more are sent: the workers wait for it."""
    kind = "private_postgresql" if driver == "psycopg" else "private_mariadb"
    server = request.getfixturevalue(kind)
    database = request.getfixturevalue("make_database")(driver, server)
    with serving(redis_server, "fork", database) as service, ThreadPoolExecutor(1) as thread:
        service.call("echo", 0)
        results = send(service, range(tasks // 2))
        wait_until(results[tasks // 10].ready, timeout=60.0)
        later = thread.submit(send, service, range(tasks // 2, tasks))
        server.process.stop()
        assert waiting(service)
        # both processes have something to store, and have found nobody
        wait_until(lambda: service.worker.text().count("trying again for") >= 2, timeout=60.0)
        server.process.start()
        assert waiting(service)
        assert_all_right(service, results + later.result())


@TASKS
@DRIVER
def test_children_killed_at_random(
    driver: str, tasks: int, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """Processes that run tasks get SIGKILL: what they had is delivered again."""
    database = make_database(driver)
    with serving(redis_server, "fork", database, **LATE) as service:
        service.call("echo", 0)
        results = send(service, range(tasks))
        amidst = 0
        for done in range(20, tasks - 40, 30):
            wait_until(results[done].ready, timeout=60.0)
            victim = random.choice(wait_until(service.worker.children))
            amidst += waiting(service) > 0
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        assert amidst, "tasks were open at no kill"
        assert_all_right(service, results)
        assert len(received(service)) > tasks  # some came again


@pytest.mark.parametrize("driver", ["psycopg", pytest.param("pymysql", marks=pytest.mark.soak)])
def test_whole_worker_killed(
    driver: str, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """A worker gets SIGKILL with all its processes, and is started again: no result is lost.

    Of those that it has received, that is: kombu's Redis transport takes a message out of the
    queue before it notes that, so a kill in between loses one that no worker has seen.
    """
    redeliver = {"visibility_timeout": 2}  # seconds until the broker gives a task to another worker
    settings = {**LATE, "broker_transport_options": redeliver}
    with serving(redis_server, "fork", make_database(driver), **settings) as service:
        results = send(service, range(200))
        for done in (20, 80):
            wait_until(results[done].ready, timeout=60.0)
            service.worker.kill()
            assert not results[-1].ready()
            service.worker.start()
        wait_until(lambda: not undone(service), timeout=60.0)
        seen = set(received(service))
        assert len(results) - len(seen) <= 2  # one for each kill
        for number, result in enumerate(results):
            assert result.id not in seen or result.get(timeout=60.0) == number
        assert_all_work(service)


@pytest.mark.parametrize(
    "times", [20, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql", "mysqlclient"])
def test_soft_time_limit_inside_a_query(
    driver: str, times: int, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """A time limit that fires while a task queries the results leaves a clean process behind."""
    database = make_database(driver)
    with serving(redis_server, "fork", database, options="--concurrency 1") as service:
        service.call("echo", 0)
        [child] = service.worker.children()
        interrupted = 0
        for number in range(times):
            limit = random.uniform(0.05, 0.1)
            result = service.app.send_task("look", (1.0,), soft_time_limit=limit)
            # Python ignores what a handler raises in a finalizer: now and then none comes
            interrupted += "SoftTimeLimitExceeded" in repr(result.get(60.0, propagate=False))
            assert service.call("echo", number) == number
            assert service.call("query", number) == number
        assert interrupted > times / 2
        assert service.call("process") == child.pid


@pytest.mark.parametrize(
    "times", [5, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
def test_soft_time_limit_inside_a_session(
    times: int, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """A time limit that fires while a task's own session waits leaves nothing in a transaction."""
    database = make_database("psycopg")
    with serving(redis_server, "fork", database, options="--concurrency 1") as service:
        service.call("query", 0)
        for number in range(times):
            limit = random.uniform(0.05, 0.1)
            result = service.app.send_task("query_for", (0.5,), soft_time_limit=limit)
            with pytest.raises(SoftTimeLimitExceeded):
                result.get(timeout=60.0)
            assert service.call("query", number) == number
            wait_until(lambda: not open_transactions(database))

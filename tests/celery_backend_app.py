"""A Celery application whose results are in a database, with tasks for tests of its backend.

Workers read what it is configured with from the environment; tests make it with the same settings.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import redis
from celery import Celery, group
from celery.signals import before_task_publish
from sqlalchemy import func, select, text

from sessionmgr import SessionManager
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Engine

SETTINGS = "SESSIONMGR_TEST_CELERY_SETTINGS"
"""The environment variable with the settings of a worker's application, as JSON."""

KEY = "SESSIONMGR_TEST_CELERY_KEY"
"""The environment variable with what the keys of a worker's application begin with."""

PUBLISHING_DIES = "SESSIONMGR_TEST_PUBLISHING_DIES"
"""The environment variable with a number: the process that publishes the task `total` that often,
counted over all processes, is killed as it does."""

engines: list[Engine] = []
"""The engines that :func:`note_engine` was given in this process."""


class Counters:
    """Numbers in the broker's Redis, which survive whoever counts.

    :param url: of the Redis server.
    :param prefix: what the keys begin with.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self.url, self.prefix = url, prefix

    def add(self, name: str) -> int:
        """Count one more and return how many it are now."""
        with redis.Redis.from_url(self.url) as client:
            return int(client.incr(f"{self.prefix}{name}"))

    def value(self, name: str) -> int:
        """Return how many were counted."""
        with redis.Redis.from_url(self.url) as client:
            return int(client.get(f"{self.prefix}{name}") or 0)


def make_app(settings: Mapping[str, Any], key: str) -> Celery:
    """Make an application with all tasks.

    :param settings: Celery's, among them ``broker_url`` and ``result_backend``.
    :param key: keeps its messages and counters apart from those of others.
    """
    app = Celery("sessionmgr-backend-tests", set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
    app.conf.update(settings)
    # not changed in place: that is the default's own, which a spawned process does not get
    transport = {**app.conf.broker_transport_options, "global_keyprefix": key}
    app.conf.broker_transport_options = transport
    counters = Counters(app.conf.broker_url, f"{key}count-")
    add_plain_tasks(app, counters)
    add_chord_tasks(app, counters)
    add_database_tasks(app, counters)
    return app


def add_plain_tasks(app: Celery, counters: Counters) -> None:
    """Register tasks that return, fail, wait and die."""
    task = partial(app.task, shared=False)

    @task(name="add")
    def add(x: int, y: int = 0) -> int:
        return x + y

    @task(name="echo")
    def echo(value: Any) -> Any:
        return value

    @task(name="quiet", ignore_result=True)
    def quiet() -> str:
        return "unheard"

    @task(name="fail")
    def fail(message: str) -> None:
        raise LookupError(message)

    @task(name="parent")
    def parent() -> None:
        add.delay(1, 2)
        add.delay(3, 4)

    @task(name="nap")
    def nap(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @task(name="slow_echo")
    def slow_echo(value: Any) -> Any:
        time.sleep(0.02)
        return value

    @task(name="hold")
    def hold(name: str) -> None:
        wait_until(lambda: counters.value(name), timeout=60.0)

    @task(name="die_once")
    def die_once(name: str, value: int) -> int:
        if counters.add(name) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    @task(name="process")
    def process() -> int:
        time.sleep(0.02)
        return os.getpid()


def add_chord_tasks(app: Celery, counters: Counters) -> None:
    """Register tasks that are parts and callbacks of chords."""
    task = partial(app.task, shared=False)

    @task(name="total")
    def total(values: Any, name: str = "total") -> int:
        counters.add(name)
        return sum(flat(values))

    @task(name="collect")
    def collect(values: list[Any]) -> list[Any]:
        return values

    @task(name="states")
    def states(_: Any, ids: list[str]) -> list[str]:
        return [app.AsyncResult(each).state for each in ids]

    @task(name="errback")
    def errback(request: Any, error: BaseException, traceback: Any, name: str) -> None:
        counters.add(f"{name}-{type(error).__name__}")

    @task(name="replaced", bind=True)
    def replaced(self: Any, value: int) -> None:
        raise self.replace(app.signature("add", (value, 100)))

    @task(name="replaced_by_group", bind=True)
    def replaced_by_group(self: Any, value: int) -> None:
        parts = [app.signature("add", (value, 1)), app.signature("add", (value, 2))]
        raise self.replace(group(parts, app=app))

    @task(name="growing", bind=True)
    def growing(self: Any, value: int) -> int:
        self.add_to_chord(app.signature("add", (value, 1000)))
        return value


def add_database_tasks(app: Celery, counters: Counters) -> None:
    """Register tasks that look at the backend, or use its database."""
    task = partial(app.task, shared=False)
    manager = SessionManager()

    @task(name="backend")
    def backend() -> tuple[int, int, int]:
        ids = os.getpid(), threading.get_ident(), id(app.backend.session_manager)
        counters.add("backends")
        return ids

    @task(name="look")
    def look(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            app.backend.store.get("a task that is not there")

    @task(name="query_for")
    def query_for(seconds: float) -> None:
        with manager.begin(app.backend.store.dburi) as session:
            session.execute(text("SELECT 1"))
            session.scalar(select(func.pg_sleep(seconds)))

    @task(name="query")
    def query(number: int) -> int | None:
        with manager.begin(app.backend.store.dburi) as session:
            return session.scalar(select(number))


def note_engine(engine: Engine) -> None:
    """Keep an engine in :data:`engines`."""
    engines.append(engine)


def flat(values: Any) -> list[int]:
    """Return the numbers in nested lists."""
    if isinstance(values, int):
        return [values]
    return [number for value in values or () for number in flat(value)]


def die_at_publishing(number: int, counters: Counters) -> None:
    """Have the process be killed that publishes ``total`` for the n-th time, and no other."""

    @before_task_publish.connect(weak=False)
    def die(sender: str = "", **_: object) -> None:
        if sender == "total" and counters.add("publishing") == number:
            os.kill(os.getpid(), signal.SIGKILL)


if SETTINGS in os.environ:
    app = make_app(json.loads(os.environ[SETTINGS]), os.environ[KEY])
    if PUBLISHING_DIES in os.environ:
        counters = Counters(app.conf.broker_url, f"{os.environ[KEY]}count-")
        die_at_publishing(int(os.environ[PUBLISHING_DIES]), counters)

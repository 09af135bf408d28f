"""Celery as its users see it: a worker of two processes, Redis as the broker, and one client.

``sessionmgr`` and ``Celery SQL`` keep the results in PostgreSQL (durable, its files in memory),
``Celery Redis`` in Redis. What is timed, by the client: a chord until its body's result is there;
``get()`` of a task that sleeps 50 ms; many small tasks, sent and every result read, one after the
other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from celery import Celery, chord, signature

from tests.helpers import wait_until

from .celery_tasks import BACKEND, BROKER
from .contenders import exposed
from .context import ROOT
from .report import Panel, Report, Target
from .timing import rotated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .context import Context

OURS, REDIS, SQL = "sessionmgr", "Celery Redis", "Celery SQL"
BOUND = "60 ms"

STARTED = 60.0
"""Seconds for a worker to answer."""

TIMEOUT = 120.0
"""Seconds for a result to come."""


@dataclass(frozen=True)
class Work:
    """What is timed.

    :param title: of its panel.
    :param run: does it with an app; returns the figure.
    :param unit: of the figure.
    :param targets: the bounds.
    """

    title: str
    run: Callable[[Celery], float]
    unit: str
    targets: tuple[Target, ...]


def run(context: Context) -> Report:
    """Start a worker for each backend, and do each work with each in turn."""
    report = context.report("end_to_end", __doc__)
    small, large, tasks = (3, 6, 20) if context.quick else (20, 200, 2000)
    works = (
        Work(f"chord of {small}", lambda app: _chord(app, small), "ms", (Target(OURS, REDIS, 2),)),
        Work(f"chord of {large}", lambda app: _chord(app, large), "ms", (Target(OURS, REDIS, 2),)),
        Work("get() of a task of 50 ms", _nap, "ms", (Target(OURS, BOUND, 1),)),
        Work(
            f"{tasks:,} tasks, sent and read",
            lambda app: _many(app, tasks),
            "tasks/s",
            (Target(OURS, REDIS, 0.75, at_most=False),),
        ),
    )
    database = exposed(context.durable("PostgreSQL", "psycopg"))
    urls = {OURS: f"sessionmgr+{database}", REDIS: context.redis(), SQL: f"db+{database}"}
    with ExitStack() as workers:
        apps = {
            name: workers.enter_context(_worker(f"{context.redis()[:-1]}{number}", url))
            for number, (name, url) in enumerate(urls.items(), 1)
        }
        for work in works:
            samples = _alternate(work, apps, rounds=2 if context.quick else 9)
            if any(BOUND in (target.over, target.under) for target in work.targets):
                samples[BOUND] = [60.0] * len(samples[OURS])
            report.panels.append(Panel(work.title, work.unit, samples, work.targets))
    context.add_versions(report, [("PostgreSQL", "psycopg")])
    return report


def _alternate(work: Work, apps: dict[str, Celery], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in apps}
    for app in apps.values():
        work.run(app)
    for number in range(rounds):
        for name in rotated(list(apps), number):
            samples[name].append(work.run(apps[name]))
    return samples


def _task(app: Celery, name: str, *args: Any) -> Any:
    return signature(f"benchmarks.celery_tasks.{name}", args, app=app)


def _chord(app: Celery, parts: int) -> float:
    start = perf_counter()
    header = [_task(app, "add", number, number) for number in range(parts)]
    answer = chord(header, app=app)(_task(app, "total")).get(timeout=TIMEOUT)
    assert answer == parts * (parts - 1)
    return (perf_counter() - start) * 1e3


def _nap(app: Celery) -> float:
    start = perf_counter()
    _task(app, "nap", 0.05).delay().get(timeout=TIMEOUT)
    return (perf_counter() - start) * 1e3


def _many(app: Celery, tasks: int) -> float:
    start = perf_counter()
    results = [_task(app, "add", number, 1).delay() for number in range(tasks)]
    values = [result.get(timeout=TIMEOUT) for result in results]
    assert values == [number + 1 for number in range(tasks)]
    return tasks / (perf_counter() - start)


@contextmanager
def _worker(broker: str, backend: str) -> Iterator[Celery]:
    """Run a worker with two processes; give the client's app."""
    environment = {**os.environ, BROKER: broker, BACKEND: backend}
    command: Sequence[str] = (
        *(sys.executable, "-m", "celery", "-A", "benchmarks.celery_tasks", "worker"),
        *("--concurrency", "2", "--loglevel", "ERROR", "--without-gossip", "--without-mingle"),
    )
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    app = Celery("client", broker=broker, backend=backend, set_as_current=False)
    try:
        wait_until(lambda: app.control.ping(timeout=1), STARTED, "a worker")
        yield app
    finally:
        app.close()
        process.terminate()
        process.wait()

"""Storing the result of one task, in a forked worker; each time of another task.

``sessionmgr``, ``Celery SQL`` and ``Celery Redis`` are result backends of Celery: what is timed is
``store_result``, encoding and all. ``ResultStore`` is what sessionmgr's backend stores with,
without Celery. ``bare driver`` sends the same statement through a connection of the driver, kept
open and in autocommit. "durable" is PostgreSQL as it is installed
(``synchronous_commit`` on); "relaxed" is the same server with
``engine_options={"connect_args": {"options": "-c synchronous_commit=off"}}``. The servers' files
are in memory where the machine has a place for that (/dev/shm), but those of "PostgreSQL on disk",
where a durable store takes what it takes in production.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.servers import MissingServerError

from .contenders import exposed
from .report import Panel, Report, Target
from .result_backends import backend, bare_upsert, storing, storing_bytes
from .timing import Plan, alternate
from .worker import in_worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL

    from .context import Context

RELAXED = {"options": "-c synchronous_commit=off"}


def _targets(faster: float) -> tuple[Target, ...]:
    return (Target("Celery SQL", "sessionmgr", faster, at_most=False),)


BARE = tuple(Target(name, "bare driver", 1.6) for name in ("sessionmgr", "ResultStore"))
PLACES = (
    ("PostgreSQL, durable", "psycopg", (*_targets(4), *BARE)),
    ("PostgreSQL on disk, durable", "psycopg", (*_targets(4), *BARE)),
    ("PostgreSQL, relaxed", "psycopg", (Target("Celery Redis", "sessionmgr", 1, at_most=False),)),
    ("MariaDB", "mysqlclient", _targets(3)),
    ("SQLite", "", _targets(2)),
)


def run(context: Context) -> Report:
    """Measure in one worker for each database."""
    report = context.report("store_result", __doc__)
    plan = Plan(3, 0.005) if context.quick else Plan(41, 0.05)
    for place, driver, targets in PLACES:
        server = _server(place)
        try:
            url = context.sqlite() if server == "SQLite" else context.durable(server, driver)
        except MissingServerError as error:
            report.missing.append(f"{place}: {error}")
            continue
        times = _measure(url, context.redis(), plan, relaxed="relaxed" in place)
        samples = {name: [1e3 * time for time in rounds] for name, rounds in times.items()}
        report.panels.append(Panel(f"{place} {driver}".strip(), "ms", samples, targets))
    context.add_versions(report, [(_server(place), driver) for place, driver, _ in PLACES])
    return report


def _server(place: str) -> str:
    return place.partition(",")[0]


def _measure(url: URL, redis: str, plan: Plan, *, relaxed: bool) -> dict[str, list[float]]:
    options = {"connect_args": RELAXED} if relaxed else {}
    text = exposed(url)

    def work() -> dict[str, list[float]]:
        ours = backend(f"sessionmgr+{text}", database_engine_options=options)
        bare = url.update_query_dict(RELAXED) if relaxed else url
        contenders: dict[str, Callable[[], object]] = {
            "sessionmgr": storing(ours),
            "ResultStore": storing_bytes(ours.store),
            "bare driver": bare_upsert(ours.store, bare),
            "Celery SQL": storing(forked(backend(f"db+{text}", database_engine_options=options))),
            "Celery Redis": storing(backend(redis)),
        }
        return alternate(contenders, plan)

    return in_worker(work)


def forked(celerys: object) -> object:
    """Have Celery's manager pool, as it does in a worker whose parent had made it."""
    celerys.session_manager.forked = True  # type: ignore[attr-defined]  # it is Celery's
    return celerys

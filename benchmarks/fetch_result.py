"""Fetching the result of one task that has ended, in a forked worker: ``get_task_meta``.

``sessionmgr``, ``Celery SQL`` and ``Celery Redis`` are result backends of Celery; what they have
in their caches is not asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.servers import MissingServerError

from .contenders import exposed
from .report import Panel, Report, Target
from .result_backends import backend, fetching
from .store_result import forked
from .timing import Plan, alternate
from .worker import in_worker

if TYPE_CHECKING:
    from sqlalchemy import URL

    from .context import Context

PLACES = (("PostgreSQL", "psycopg"), ("MariaDB", "mysqlclient"), ("SQLite", ""))
TARGETS = (Target("Celery SQL", "sessionmgr", 3, at_most=False),)


def run(context: Context) -> Report:
    """Measure in one worker for each database."""
    report = context.report("fetch_result", __doc__)
    plan = Plan(3, 0.005) if context.quick else Plan(41, 0.05)
    for server, driver in PLACES:
        try:
            url = context.sqlite() if server == "SQLite" else context.durable(server, driver)
        except MissingServerError as error:
            report.missing.append(f"{server}: {error}")
            continue
        times = _measure(url, context.redis(), plan)
        samples = {name: [1e3 * time for time in rounds] for name, rounds in times.items()}
        targets = TARGETS if server == "PostgreSQL" else ()
        report.panels.append(Panel(f"{server} {driver}".strip(), "ms", samples, targets))
    context.add_versions(report, PLACES)
    return report


def _measure(url: URL, redis: str, plan: Plan) -> dict[str, list[float]]:
    def work() -> dict[str, list[float]]:
        contenders = {
            "sessionmgr": fetching(backend(f"sessionmgr+{exposed(url)}")),
            "Celery SQL": fetching(forked(backend(f"db+{exposed(url)}"))),
            "Celery Redis": fetching(backend(redis)),
        }
        return alternate(contenders, plan)

    return in_worker(work)

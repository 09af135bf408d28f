"""A unit of work in a forked worker: open a session, ``SELECT 1``, fetch, close.

``sessionmgr`` is a SessionManager with its defaults, made before the fork: it pools, and tests a
connection only after an idle second. ``SQLAlchemy pooled`` is a kept engine and sessionmaker
with SQLAlchemy's defaults: it never tests one. ``SQLAlchemy pre_ping`` is the same with
``pool_pre_ping=True``: it tests each time. ``Celery`` is Celery's SessionManager with the options
that its result backend passes (pool_pre_ping=True, pool_recycle=3600).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery.backends.database.session import SessionManager as CelerySessionManager

from sessionmgr import SessionManager
from tests.servers import MissingServerError

from .contenders import celery, managed, plain_sqlalchemy
from .report import Panel, Report, Target
from .timing import Plan, alternate
from .worker import in_worker

if TYPE_CHECKING:
    from sqlalchemy import URL

    from .context import Context

PLACES = (("PostgreSQL", "psycopg"), ("MariaDB", "mysqlclient"), ("MariaDB", "pymysql"))

TARGETS = (
    Target("sessionmgr", "SQLAlchemy pooled", 1.05),
    Target("SQLAlchemy pre_ping", "sessionmgr", 1.10, at_most=False),
    Target("Celery", "sessionmgr", 1.0, at_most=False),
)


def run(context: Context) -> Report:
    """Measure in one worker for each driver."""
    report = context.report("unit_of_work_worker", __doc__)
    plan = Plan(3, 0.002) if context.quick else Plan(101, 0.03)
    for server, driver in PLACES:
        try:
            url = context.url(server, driver)
        except MissingServerError as error:
            report.missing.append(f"{server}, {driver}: {error}")
            continue
        times = _measure(url, plan)
        samples = {name: [1e3 * time for time in rounds] for name, rounds in times.items()}
        report.panels.append(Panel(f"{server}, {driver}", "ms", samples, TARGETS))
    context.add_versions(report, PLACES)
    return report


def _measure(url: URL, plan: Plan) -> dict[str, list[float]]:
    ours, celerys = SessionManager(), CelerySessionManager()

    def work() -> dict[str, list[float]]:
        assert ours.forked
        assert celerys.forked
        contenders = {
            "sessionmgr": managed(ours, url),
            "SQLAlchemy pooled": plain_sqlalchemy(url),
            "SQLAlchemy pre_ping": plain_sqlalchemy(url, pool_pre_ping=True),
            "Celery": celery(celerys, url),
        }
        return alternate(contenders, plan)

    return in_worker(work)

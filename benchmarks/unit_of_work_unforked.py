"""A unit of work in a process that was not forked: open a session, ``SELECT 1``, fetch, close.

``sessionmgr`` is a SessionManager with its defaults: it keeps its engine and opens a connection for
each session. ``bare driver`` is the driver's own connect, ``SELECT 1``, fetch, close: no ROLLBACK,
no SQLAlchemy. ``SQLAlchemy NullPool`` is a kept engine and sessionmaker with
``poolclass=NullPool``. ``Celery`` is Celery's SessionManager with the options that its result
backend passes: it makes an engine for each session. ``sessionmgr always`` is a SessionManager with
``pooling="always"``. PostgreSQL over TLS is another server than without: see the versions. PyMySQL
reads the system's CA certificates at each connect, whether or not the server has TLS: that is most
of the time of all who connect, and brings their ratios close to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery.backends.database.session import SessionManager as CelerySessionManager
from sqlalchemy import NullPool

from sessionmgr import SessionManager
from tests.servers import MissingServerError

from .contenders import bare_driver, celery, managed, plain_sqlalchemy
from .report import Panel, Report, Target
from .timing import Plan, alternate

if TYPE_CHECKING:
    from sqlalchemy import URL

    from .context import Context

PLACES = {
    ("PostgreSQL", "psycopg"): 1.9,
    ("PostgreSQL over TLS", "psycopg"): 1.5,
    ("MariaDB", "mysqlclient"): 1.0,
    ("MariaDB", "pymysql"): 1.0,
}
"""Server and driver -> how many times as long Celery's is to take at least."""


def run(context: Context) -> Report:
    """Measure in this process, on each server and driver."""
    report = context.report("unit_of_work_unforked", __doc__)
    plan = Plan(3, 0.01) if context.quick else Plan(61, 0.04)
    for (server, driver), times_faster in PLACES.items():
        try:
            url = context.url(server, driver)
        except MissingServerError as error:
            report.missing.append(f"{server}, {driver}: {error}")
            continue
        times = _measure(url, plan)
        samples = {name: [1e3 * time for time in rounds] for name, rounds in times.items()}
        targets = _targets(times_faster)
        report.panels.append(Panel(f"{server}, {driver}", "ms", samples, targets))
    context.add_versions(report, PLACES)
    return report


def _targets(times_faster: float) -> tuple[Target, ...]:
    return (
        Target("sessionmgr", "bare driver", 1.10),
        Target("Celery", "sessionmgr", times_faster, at_most=False),
        Target("Celery", "sessionmgr always", 10.0, at_most=False),
    )


def _measure(url: URL, plan: Plan) -> dict[str, list[float]]:
    with SessionManager() as ours, SessionManager(pooling="always") as always:
        contenders = {
            "sessionmgr": managed(ours, url),
            "bare driver": bare_driver(url),
            "SQLAlchemy NullPool": plain_sqlalchemy(url, poolclass=NullPool),
            "Celery": celery(CelerySessionManager(), url),
            "sessionmgr always": managed(always, url),
        }
        return alternate(contenders, plan)

"""A session made and closed in a forked worker, without a query.

``sessionmgr`` is ``SessionManager.session_factory(url).close()`` of a manager made before the fork,
``bare sessionmaker`` is ``factory().close()``, and ``Celery`` is the same call of Celery's
SessionManager. Each was used before, so engines, sessionmakers and tables are there. ``Celery, its
options in each call`` and the last one are given the options that Celery's result backend passes in
each call (pool_pre_ping=True, pool_recycle=3600).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from celery.backends.database.session import SessionManager as CelerySessionManager
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from sessionmgr import SessionManager

from .contenders import CELERY_OPTIONS
from .report import Panel, Report, Target
from .timing import Plan, alternate
from .worker import in_worker

if TYPE_CHECKING:
    from .context import Context

TARGETS = (
    Target("sessionmgr", "bare sessionmaker", 1.05),
    Target("sessionmgr", "Celery", 1.0),
)


def run(context: Context) -> Report:
    """Measure in one worker, on a SQLite file: the sessions do not connect."""
    report = context.report("session_in_worker", __doc__)
    plan = Plan(3, 0.001) if context.quick else Plan(201, 0.01)
    with tempfile.TemporaryDirectory() as directory:
        times = _measure(f"sqlite:///{Path(directory) / 'one.db'}", plan)
    samples = {name: [1e6 * time for time in rounds] for name, rounds in times.items()}
    report.panels.append(Panel("session made and closed", "us", samples, TARGETS))
    return report


def _measure(url: str, plan: Plan) -> dict[str, list[float]]:
    ours, celerys = SessionManager(), CelerySessionManager()

    def work() -> dict[str, list[float]]:
        assert ours.forked
        assert celerys.forked
        factory = sessionmaker(create_engine(url))
        contenders = {
            "sessionmgr": lambda: ours.session_factory(url).close(),
            "bare sessionmaker": lambda: factory().close(),
            "Celery": lambda: celerys.session_factory(url).close(),
            "Celery, its options in each call": lambda: celerys.session_factory(
                url, **CELERY_OPTIONS
            ).close(),
            "sessionmgr, Celery's options in each call": lambda: ours.session_factory(
                url, **CELERY_OPTIONS
            ).close(),
        }
        return alternate(contenders, plan)

    return in_worker(work)

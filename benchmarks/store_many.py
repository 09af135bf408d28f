"""Storing many results at once, in a forked worker: 5,000 in a call.

``sessionmgr`` is ``ResultStore.store_many``; ``one by one`` is ``ResultStore.store`` for each.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from sessionmgr import ResultStore, TaskResult

from .contenders import exposed
from .report import Panel, Report, Target
from .timing import Plan, alternate
from .worker import in_worker

if TYPE_CHECKING:
    from sqlalchemy import URL

    from .context import Context

MANY = 5000
BOUND = "20,000 a second"


def run(context: Context) -> Report:
    """Measure in one worker, on PostgreSQL."""
    report = context.report("store_many", __doc__)
    plan = Plan(2, 0.01) if context.quick else Plan(15, 0.2)
    times = _measure(context.durable("PostgreSQL", "psycopg"), plan)
    samples = {
        "sessionmgr": [MANY / time for time in times["sessionmgr"]],
        "one by one": [1 / time for time in times["one by one"]],
        BOUND: [20_000.0] * plan.rounds,
    }
    targets = (Target("sessionmgr", BOUND, 1, at_most=False),)
    report.panels.append(Panel("PostgreSQL psycopg", "results/s", samples, targets))
    context.add_versions(report, [("PostgreSQL", "psycopg")])
    return report


def _measure(url: URL, plan: Plan) -> dict[str, list[float]]:
    def work() -> dict[str, list[float]]:
        numbers = count()
        store = ResultStore(exposed(url))

        def many() -> None:
            start = next(numbers) * MANY
            ids = range(start, start + MANY)
            store.store_many(TaskResult(f"m{number}", "SUCCESS", b"x" * 120) for number in ids)

        def one() -> None:
            store.store(f"o{next(numbers)}", "SUCCESS", b"x" * 120)

        return alternate({"sessionmgr": many, "one by one": one}, plan)

    return in_worker(work)

"""The demo's task results: a store for each database, and what a task tells in its result."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from sessionmgr.results import ResultStore
from sessionmgr.results.records import SUCCESS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sessionmgr.manager import SessionManager

__all__ = ("TABLES", "count_results", "make_store", "result_id", "store_result")

#: What the demo's tables of results are called, in words.
TABLES = "sessionmgr_demo_*"

#: Tables and sequences of the demo's own: it drops them, and Celery's must stay.
NAMES = {
    "task": "sessionmgr_demo_task",
    "group": "sessionmgr_demo_group",
    "chord": "sessionmgr_demo_chord",
    "part": "sessionmgr_demo_chord_part",
    "task_sequence": "sessionmgr_demo_task_id",
    "group_sequence": "sessionmgr_demo_group_id",
}

# On SQLite all workers of a database wait for one lock, and some wait for long.
ATTEMPTS = 10


def make_store(manager: SessionManager, database: str) -> ResultStore:
    """Make the store of a database.

    :param manager: where it takes its connections from.
    :param database: bind key.
    """
    return ResultStore(database, manager=manager, table_names=NAMES, attempts=ATTEMPTS)


def result_id(run: str, number: int) -> str:
    """Give the id of a task's result.

    :param run: identity of the run.
    :param number: the task's number.
    """
    return f"{run}-{number}"


def store_result(store: ResultStore, run: str, number: int, pid: int, seconds: float) -> None:
    """Store what a task has to tell: its number, its worker, and how long it took."""
    told = {"number": number, "pid": pid, "seconds": round(seconds, 6)}
    store.store(result_id(run, number), SUCCESS, json.dumps(told).encode())


def count_results(store: ResultStore, run: str, numbers: Iterable[int]) -> dict[int, int]:
    """Read results back, and count those that tell what they should.

    :param store: where they are.
    :param run: identity of the run.
    :param numbers: those of the tasks.
    :return: pid of the worker -> how many it has stored.
    """
    found = store.get_many(result_id(run, number) for number in numbers)
    counts: Counter[int] = Counter()
    for task_id, result in found.items():
        told = json.loads(result.result or b"{}")
        if result.status == SUCCESS and task_id == result_id(run, told.get("number")):
            counts[told["pid"]] += 1
    return dict(counts)

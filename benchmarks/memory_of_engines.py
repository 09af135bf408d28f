"""Memory of the engines for 2,000 SQLite files, each used for one session.

Each contender has fresh processes of its own (``memory_process``). Like is compared with like:
``sessionmgr`` (a process that was not forked: connections are closed after use) with ``SQLAlchemy
NullPool``, and ``sessionmgr always`` (``pooling="always"``, as in a worker: one connection per
database stays open) with ``SQLAlchemy default pool``. All set the same PRAGMAs, for a connection
in WAL mode takes 40 KB more, and read the schema. Plain SQLAlchemy keeps ``create_engine(url)``
per URL in a dictionary and opens ``Session(engine)``; ``sessionmakers`` keeps
``sessionmaker(create_engine(url))`` instead, and each of these is a class with events of its own.
``resident`` is the growth of the process's memory since before the first database, ``Python's`` the
part that Python allocated (tracemalloc), both after a garbage collection. With ``max_engines=100``
engines come and go: what is resident then grows by the room for garbage between two collections,
which takes some thousands of databases to settle; hence it is followed further, to 8,000.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from .context import ROOT
from .report import Curves, Panel, Report, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .context import Context

MIB = 2**20

PAIRS = (
    ("sessionmgr", "SQLAlchemy NullPool"),
    ("sessionmgr always", "SQLAlchemy default pool"),
)
KEPT = tuple(name for ours, plain in PAIRS for name in (ours, plain, f"{plain}, sessionmakers"))
LIMITED = ("sessionmgr, max_engines=100", "sessionmgr always, max_engines=100")

FLAT = 1.1
"""Bound for the growth of memory once there are ``max_engines``."""

Samples = dict[str, list[list[float]]]


def run(context: Context) -> Report:
    """Measure what is resident in several rounds, and what Python allocated in one."""
    report = context.report("memory_of_engines", __doc__)
    steps, further, rounds = ([100, 500, 1000, 2000], [4000, 8000], 2)
    if context.quick:
        steps, further, rounds = ([20, 40], [60], 1)
    _compare(report, "resident memory", _measure(KEPT, steps, rounds), steps)
    limited = _measure(LIMITED, [*steps, *further], rounds)
    _follow(report, "resident memory", limited, [*steps, *further], since=-2)
    _compare(report, "Python's memory", _measure(KEPT, steps, 1, "traced"), steps)
    limited = _measure(LIMITED, steps, 1, "traced")
    _follow(report, "Python's memory", limited, steps, since=0)
    return report


def _compare(report: Report, title: str, samples: Samples, steps: list[int]) -> None:
    """Report each kind of engine beside plain SQLAlchemy's, at the last step."""
    for ours, plain in PAIRS:
        names = (ours, plain, f"{plain}, sessionmakers")
        figures = {name: [grown[-1] for grown in samples[name]] for name in names}
        where = f"{title} for {steps[-1]:,d} databases, {ours}"
        targets = tuple(Target(ours, name, 1.0) for name in names[1:])
        report.panels.append(Panel(where, "MiB", figures, targets))
    report.curves.append(Curves(title, "MiB", "databases used", steps, samples))


def _follow(report: Report, title: str, samples: Samples, steps: list[int], since: int) -> None:
    """Report how memory grows from one step to the last, with ``max_engines``.

    :param since: position of the step from which on it is to be flat.
    """
    for name, rounds in samples.items():
        before, after = (f"{steps[at]:,d} databases" for at in (since, -1))
        figures = {
            before: [grown[since] for grown in rounds],
            after: [grown[-1] for grown in rounds],
        }
        target = Target(after, before, FLAT)
        report.panels.append(Panel(f"{title}, {name}", "MiB", figures, (target,)))
    where = f"{title} with max_engines=100"
    report.curves.append(Curves(where, "MiB", "databases used", steps, samples))


def _measure(contenders: Sequence[str], steps: list[int], rounds: int, *options: str) -> Samples:
    """Run a process for each contender and round, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {
            name: [pool.submit(_grow, name, steps, options) for _ in range(rounds)]
            for name in contenders
        }
        return {name: [future.result() for future in runs] for name, runs in running.items()}


def _grow(contender: str, steps: list[int], options: Sequence[str]) -> list[float]:
    """Run one process.

    :return: by how many MiB it had grown at each step.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.memory_process", contender, directory]
        command += [",".join(map(str, steps)), *options]
        done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    return [grown / MIB for grown in json.loads(done.stdout)]

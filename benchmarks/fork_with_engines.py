"""The first session in a child, after a fork with 1,000 cached engines and with one.

Two processes, one with one engine and one with 1,000, fork children in turns. Each engine was used
once, for a database of its own (SQLite) or under a URL of its own (PostgreSQL). ``first session``
goes from the child's first statement, sessionmgr's own fork hook included, to the end of ``SELECT
1`` on a database that the parent has an engine for. ``fork and first session`` begins at the
parent's call of fork, and ``call of fork`` is what that call takes in the parent: both also copy
the page tables of a bigger process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tests.servers import MissingServerError

from .contenders import exposed
from .context import ROOT
from .report import Panel, Report, Target
from .timing import rotated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .context import Context

Samples = dict[str, list[float]]

MEASURED = {"child": "first session", "whole": "fork and first session", "fork": "call of fork"}
"""Key in the parent's answer -> what it is."""

BOUND = 1.2


def run(context: Context) -> Report:
    """Measure on SQLite, where connecting costs least, and on PostgreSQL."""
    report = context.report("fork_with_engines", __doc__)
    engines, rounds = (20, 3) if context.quick else (1000, 151)
    with tempfile.TemporaryDirectory() as directory:
        panels = _measure(lambda i: f"sqlite:///{directory}/{i}.db", engines, rounds)
    report.panels += _panels("SQLite", panels)
    try:
        url = context.url("PostgreSQL", "psycopg")
    except MissingServerError as error:
        report.missing.append(f"PostgreSQL, psycopg: {error}")
        return report

    def named(number: int) -> str:
        return exposed(url.update_query_dict({"application_name": f"benchmark {number}"}))

    report.panels += _panels("PostgreSQL, psycopg", _measure(named, engines, rounds))
    context.add_versions(report, [("PostgreSQL", "psycopg")])
    return report


def _panels(place: str, samples: dict[str, Samples]) -> list[Panel]:
    """Make a panel for each of :data:`MEASURED`; the first has the target."""
    panels = []
    for key, title in MEASURED.items():
        few, many = samples[key]
        targets = (Target(many, few, BOUND),) if key == "child" else ()
        panels.append(Panel(f"{place}: {title}", "ms", samples[key], targets))
    return panels


def _measure(url_of: Callable[[int], str], engines: int, rounds: int) -> dict[str, Samples]:
    """Let two parents fork in turns.

    :param url_of: gives the URL of a database by number.
    :return: key of :data:`MEASURED` -> contender -> milliseconds in each round.
    """
    with ExitStack() as stack:
        forks = {
            f"{count:,d} engine{'s' * (count > 1)}": stack.enter_context(_parent(url_of, count))
            for count in (1, engines)
        }
        samples: dict[str, Samples] = {key: {name: [] for name in forks} for key in MEASURED}
        for number in range(rounds):
            for name in rotated(list(forks), number):
                for key, seconds in forks[name]().items():
                    samples[key][name].append(1e3 * seconds)
    return samples


@contextmanager
def _parent(url_of: Callable[[int], str], count: int) -> Iterator[Callable[[], dict[str, float]]]:
    """Run a process with so many engines, and give a function that has it fork."""
    command = [sys.executable, "-m", "benchmarks.fork_parent"]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answer = process.stdin, process.stdout

        def send(line: str) -> str:
            print(line, file=ask, flush=True)
            return answer.readline()

        def fork() -> dict[str, float]:
            times: dict[str, float] = json.loads(send("fork"))
            return times

        send(json.dumps([url_of(number) for number in range(count)]))
        yield fork
        ask.close()

"""One run of the demo: databases opened, tasks done by a pool, all counted, a report made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy.exc import SQLAlchemyError

from sessionmgr.explain import hide, reason

from .databases import DemoDatabase, database_urls, make_manager, opened
from .pool import Failure, WorkerPool
from .report import DatabaseReport, DemoReport, ProcessReport, Tally
from .results import make_store
from .work import Answer

if TYPE_CHECKING:
    from sessionmgr.manager import SessionManager
    from sessionmgr.results import ResultStore

__all__ = ("DemoOptions", "Track", "run_demo")

#: Passes answers on, and may show how many have come.
Track = Callable[[Iterable[Answer | Failure]], Iterable[Answer | Failure]]


@dataclass(frozen=True)
class DemoOptions:
    """What a run of the demo is to do.

    :param urls: databases; without any, three SQLite files in a temporary folder.
    :param processes: workers of the pool.
    :param tasks: rows to write and results to store, dealt out to the databases in turn.
    :param start_method: how the workers are started.
    """

    urls: tuple[str, ...]
    processes: int
    tasks: int
    start_method: str


def run_demo(options: DemoOptions, track: Track) -> DemoReport:
    """Run the demo.

    :param options: what to do.
    :param track: what the answers of the workers pass through.
    :raises UnusableDatabaseError: when a URL or a database cannot be used.
    :raises UnusablePoolError: when the workers cannot be started.
    """
    run = uuid4().hex
    with ExitStack() as stack:
        urls = stack.enter_context(database_urls(options.urls))
        manager = stack.enter_context(make_manager(urls))
        stores = {key: make_store(manager, key) for key in urls}
        databases = [DemoDatabase(stores[key], key, url, run) for key, url in urls.items()]
        with opened(databases, clean_up=bool(options.urls)):
            tally = _work(options, manager, stores, run, track)
            given = [range(n, options.tasks, len(databases)) for n in range(len(databases))]
            counts = [_count(*each, tally) for each in zip(databases, given, strict=True)]
        reports = [
            _report(database, tally, count, len(numbers))
            for database, count, numbers in zip(databases, counts, given, strict=True)
        ]
    return DemoReport(
        options.start_method,
        options.processes,
        options.tasks,
        round(tally.seconds, 3),
        tuple(reports),
    )


def _work(
    options: DemoOptions,
    manager: SessionManager,
    stores: Mapping[str, ResultStore],
    run: str,
    track: Track,
) -> Tally:
    """Have the pool do every task."""
    tally = Tally()
    keys = list(stores)
    tasks = ((keys[number % len(keys)], run, number) for number in range(options.tasks))
    with WorkerPool(options.processes, options.start_method, manager, stores) as pool:
        for answer in track(pool.answers(tasks)):
            tally.add(answer)
    return tally


@dataclass(frozen=True)
class _Counts:
    """What is in a database: pid of the worker -> how many are its."""

    rows: dict[int, int]
    results: dict[int, int]


def _count(database: DemoDatabase, numbers: Iterable[int], tally: Tally) -> _Counts:
    """Count the rows and results of each worker."""
    return _Counts(
        _tried(database.count_rows, "rows", database, tally),
        _tried(lambda: database.count_results(numbers), "results", database, tally),
    )


def _tried(
    count: Callable[[], dict[int, int]], what: str, database: DemoDatabase, tally: Tally
) -> dict[int, int]:
    """Count; nothing is there, where that fails."""
    try:
        return count()
    except SQLAlchemyError as error:
        why = reason(error, database.url)
        tally.add(Failure(database.key, f"the {what} could not be counted: {why}"))
        return {}


def _report(database: DemoDatabase, tally: Tally, counts: _Counts, expected: int) -> DatabaseReport:
    told = {pid for key, pid in tally.done if key == database.key}
    processes = tuple(
        _process_report(tally, (database.key, pid), counts)
        for pid in sorted(told | counts.rows.keys() | counts.results.keys())
    )
    return DatabaseReport(
        database=database.name,
        rows_written=sum(counts.rows.values()),
        rows_expected=expected,
        results_stored=sum(counts.results.values()),
        sessions_per_second=round(sum(p.sessions_per_second for p in processes), 1),
        engines_made=sum(p.engines_made for p in processes),
        connections_opened=sum(p.connections_opened for p in processes),
        processes=processes,
        problems=_problems(database, tally),
        cleaned_up=database.cleaned_up,
    )


def _process_report(tally: Tally, process: tuple[str, int], counts: _Counts) -> ProcessReport:
    last = tally.answers.get(process)
    return ProcessReport(
        pid=process[1],
        rows_written=counts.rows.get(process[1], 0),
        rows_expected=tally.done[process],
        results_stored=counts.results.get(process[1], 0),
        sessions_per_second=round(last.sessions / tally.seconds, 1) if last else 0.0,
        engines_made=last.engines if last else 0,
        connections_opened=last.connections if last else 0,
    )


def _problems(database: DemoDatabase, tally: Tally) -> dict[str, int]:
    """Count what went wrong, by the reason."""
    problems: Counter[str] = Counter()
    for failure, times in tally.failures.items():
        if failure.database == database.key:
            problems[hide(failure.reason, database.url)] += times
    return dict(problems)

"""Eight processes that read a counter in one SQLite file, and write it back one higher.

What is timed is a transaction, with all eight at work: from the word to begin until the last one
is done, divided by the transactions of all. ``sessionmgr`` is ``manager.run`` with its defaults.
``SQLAlchemy`` is what its documentation advises: an Engine whose connections have the same PRAGMAs,
are left without transactions by the driver (``isolation_level = None``), and send ``BEGIN
IMMEDIATE`` in a "begin" event; around it a loop that tries again what found the file locked.
``alone`` is one process of each. In the end the counter has to be what was counted.
"""

from __future__ import annotations

import random
import sqlite3
import time
from typing import TYPE_CHECKING, Any

from billiard.context import ForkContext
from sqlalchemy import MetaData, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker

from sessionmgr import SessionManager

from .contenders import exposed, set_pragmas
from .report import Panel, Report, Target
from .timing import rotated

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL
    from sqlalchemy.orm import Session

    from .context import Context

PROCESSES = 8

TIMEOUT = 300.0
"""Seconds after which a process that did not come to the barrier is given up."""

TARGETS = (Target("sessionmgr", "SQLAlchemy", 1.0),)


READ = text("SELECT n FROM counter")
WRITE = text("UPDATE counter SET n = :n")


def run(context: Context) -> Report:
    """Measure with eight processes, and with one."""
    report = context.report("sqlite_counter", __doc__)
    report.versions["SQLite"] = sqlite3.sqlite_version
    rounds, each = (2, 20) if context.quick else (41, 100)
    for title, processes in (("8 processes", PROCESSES), ("alone", 1)):
        samples = _measure(context, processes, rounds, each * PROCESSES // processes)
        report.panels.append(Panel(title, "ms", samples, TARGETS))
    return report


def _measure(context: Context, processes: int, rounds: int, each: int) -> dict[str, list[float]]:
    files = {name: context.sqlite() for name in CONTENDERS}
    for url in files.values():
        _make(url)
    samples: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in rotated(list(CONTENDERS), number):
            seconds = _together(CONTENDERS[name], files[name], processes, each)
            samples[name].append(1e3 * seconds / (processes * each))
    for url in files.values():
        assert _counted(url) == rounds * processes * (each + 1)
    return samples


def _together(
    contender: Callable[[URL], Callable[[], None]], url: URL, processes: int, each: int
) -> float:
    """Have processes count at the same time, and give the seconds that it took."""
    fork = ForkContext()
    barrier = fork.Barrier(processes + 1, timeout=TIMEOUT)

    def child() -> None:
        count = contender(url)
        count()  # connects, and fills the caches
        barrier.wait()
        for _ in range(each):
            count()
        barrier.wait()

    started = [fork.Process(target=child) for _ in range(processes)]
    for process in started:
        process.start()
    barrier.wait()
    begun = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - begun
    for process in started:
        process.join()
    assert all(process.exitcode == 0 for process in started)
    return seconds


def _add(session: Session) -> None:
    count = session.scalar(READ)
    session.execute(WRITE, {"n": count + 1})


def _sessionmgr(url: URL) -> Callable[[], None]:
    manager = SessionManager(metadata=MetaData())
    dburi = exposed(url)
    return lambda: manager.run(dburi, _add)


def _sqlalchemy(url: URL) -> Callable[[], None]:
    engine = create_engine(url)
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    make = sessionmaker(engine)

    def count() -> None:
        for attempt in range(5):
            try:
                with make.begin() as session:
                    _add(session)
            except OperationalError as error:
                if "locked" not in str(error) or attempt == 4:
                    raise
                time.sleep(random.uniform(0.01, 0.01 * 2**attempt))  # noqa: S311 - no secret
            else:
                return

    return count


CONTENDERS = {"sessionmgr": _sessionmgr, "SQLAlchemy": _sqlalchemy}


def _set_up(connection: Any, _: object) -> None:
    connection.isolation_level = None
    set_pragmas(connection)


def _make(url: URL) -> None:
    connection = sqlite3.connect(url.database or "")
    connection.executescript("CREATE TABLE counter (n INTEGER); INSERT INTO counter VALUES (0)")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


def _counted(url: URL) -> int:
    connection = sqlite3.connect(url.database or "")
    [(count,)] = connection.execute("SELECT n FROM counter")
    connection.close()
    return int(count)

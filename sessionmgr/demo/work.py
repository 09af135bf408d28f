"""What the demo's workers do: write a row, read it back, store a result, and tell of it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING

from sqlalchemy import URL, Engine, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sessionmgr.ext import billiard

from .results import ATTEMPTS, store_result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.orm import Session

    from sessionmgr.manager import SessionManager
    from sessionmgr.results import ResultStore

__all__ = ("Answer", "Base", "Row", "count_engine", "start_worker", "write_and_read")


class Base(DeclarativeBase):
    """Base of the demo's table, apart from any other."""


class Row(Base):
    """One row for each task.

    :ivar run: identity of the run of the demo, so that runs side by side do not meet.
    :ivar number: the task's number.
    :ivar pid: the worker that wrote it.
    """

    __tablename__ = "sessionmgr_demo"

    run: Mapped[str] = mapped_column(String(32), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    pid: Mapped[int]


@dataclass(frozen=True)
class Answer:
    """What a worker says after a task; the numbers are its own so far, for that database.

    :param database: bind key of the database.
    :param pid: the worker.
    :param began: when the task began, by ``time.time()``.
    :param ended: when it ended.
    :param sessions: sessions opened.
    :param engines: engines made, by the calls of ``engine_callback``.
    :param connections: connections opened, by ``SessionManager.stats()``.
    """

    database: str
    pid: int
    began: float
    ended: float
    sessions: int
    engines: int
    connections: int


class RowMissingError(Exception):
    """A row that was committed is not there."""


_manager: SessionManager
_stores: Mapping[str, ResultStore]
_engines: Counter[URL] = Counter()
_sessions: Counter[str] = Counter()


def count_engine(engine: Engine) -> None:
    """Count an engine; the ``engine_callback`` of the demo's manager."""
    _engines[engine.url] += 1


def start_worker(manager: SessionManager, stores: Mapping[str, ResultStore]) -> None:
    """Begin as a worker.

    :param manager: the parent's: this very object if the worker was forked, else one made
        from its configuration.
    :param stores: the parent's, as the manager is: bind key -> the store for task results.
    """
    global _manager, _stores
    _manager, _stores = manager, stores
    _engines.clear()  # those that a forked worker inherited are the parent's
    billiard.initializer()
    # The parent held it back when it started this process, and ends it by it. From here on, until
    # billiard sets its handler, there is nothing to clean up.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def write_and_read(database: str, run: str, number: int) -> Answer:
    """Write one row in a session, read it back in another, and store the task's result.

    :param database: bind key of the database.
    :param run: identity of the run.
    :param number: the task's number.
    :raises RowMissingError: when the row is not there after the commit.
    """

    def write(session: Session) -> None:
        _sessions[database] += 1
        session.add(Row(run=run, number=number, pid=os.getpid()))

    def read(session: Session) -> Row | None:
        _sessions[database] += 1
        return session.get(Row, (run, number))

    began = time()
    _manager.run(database, write, attempts=ATTEMPTS)
    if _manager.run(database, read, attempts=ATTEMPTS) is None:
        raise RowMissingError(f"row {number} was written but could not be read back")
    store_result(_stores[database], run, number, os.getpid(), time() - began)
    return _answer(database, began)


def _answer(database: str, began: float) -> Answer:
    pools = {pool.database: pool for pool in _manager.stats().databases}
    return Answer(
        database=database,
        pid=os.getpid(),
        began=began,
        ended=time(),
        sessions=_sessions[database],
        engines=_engines[_manager.get_engine(database).url],
        connections=pools[database].connects,
    )

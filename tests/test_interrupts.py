"""Statements that are interrupted: the next one gets its own answer.

For SessionManager alone: work in an event loop is cancelled, see ``test_async_cancel``, and what a
signal's handler raises there ends the loop.
"""

from __future__ import annotations

import logging
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import literal, select

from sessionmgr import ResultStore, SessionManager
from tests.fork_helpers import run_program
from tests.servers import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database

INTERRUPTS = 30


class TimeIsUp(Exception):  # noqa: N818 - as Celery's soft time limit, no error of the program
    """What the signal's handler raises: an Exception, as Celery's soft time limit is one."""


def raise_time_is_up(*_: object) -> None:
    """Handle the signal."""
    raise TimeIsUp


def ask_by_session(url: URL) -> Callable[[int], Any]:
    """Return what asks a manager's session for a number."""
    manager = SessionManager(pooling="always")

    def ask(number: int) -> Any:
        with manager.begin(url) as session:
            return session.scalar(select(literal(number)))

    return ask


def ask_by_store(url: URL) -> Callable[[int], Any]:
    """Return what stores a number as a result, and reads it back."""
    store = ResultStore(url, attempts=1)

    def ask(number: int) -> Any:
        store.store(str(number), "FAILURE", str(number).encode())
        result = store.get(str(number))
        return result and int(result.result or b"0")

    return ask


def interrupt(make: Callable[[URL], Callable[[int], Any]], url: URL) -> tuple[list[Any], int]:
    """Interrupt the work at random moments; return what went wrong with the work after that."""
    signal.signal(signal.SIGALRM, raise_time_is_up)
    # What interrupts a finalizer is shown by Python, what interrupts a reset is logged.
    sys.unraisablehook = lambda _: None
    logging.disable()
    ask = make(url)
    # Imports the driver: mysqlclient's import, done again after an interrupt, crashes Python.
    ask(1)
    wrong: list[Any] = []
    interrupted = 0
    for _ in range(INTERRUPTS):
        end = time.monotonic() + 0.05
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.01))
                while time.monotonic() < end:
                    ask(1)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Exception:  # noqa: BLE001 - SQLAlchemy may have wrapped it
            interrupted += 1
        wrong += [answer for number in range(2, 5) if (answer := ask(number)) != number]
    return wrong, interrupted


@pytest.mark.parametrize("make", [ask_by_session, ask_by_store], ids=["session", "store"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_interrupted_statement_leaves_no_answer_behind(
    driver: str, make: Callable[[URL], Any], make_database: Callable[..., Database]
) -> None:
    """After a time limit in the midst of a statement, the next one gets its own answer."""
    wrong, interrupted = run_program(interrupt, make, make_database(driver).url)
    assert wrong == []
    assert interrupted > INTERRUPTS / 2  # Python drops what is raised in a finalizer


def test_transaction_that_is_given_up_leaves_no_lock_on_a_sqlite_file(tmp_path: Path) -> None:
    """No lock stays after an error that is not the driver's, though it is still looked at."""
    file = tmp_path / "one.db"
    with ResultStore(f"sqlite:///{file}") as store:
        with pytest.raises(UnicodeEncodeError) as caught:
            store.chords.part_returned("chord", "\udc80", 0, "SUCCESS", b"")
        with closing(sqlite3.connect(file, timeout=0)) as another:
            another.execute("BEGIN IMMEDIATE")
        assert caught.tb is not None

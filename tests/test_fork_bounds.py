"""A fork that waits in vain goes on, whatever other threads hold: late, warned of, and no later."""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, StaticPool, select

from sessionmgr import ForkedSQLiteError, SessionManager, forking, sqlite_mutexes
from tests.concurrency import in_child
from tests.fork_helpers import held_elsewhere
from tests.processes import call_in_child
from tests.test_gate import thread_that

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG = 60.0
"""Seconds that a thread waits for another before it gives up."""


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "FORK_WAIT", 0.05)


@contextmanager
def inside_sqlite() -> Iterator[None]:
    """Hold one of SQLite's static mutexes, as a thread does that is stopped inside SQLite."""
    library, mutexes = sqlite_mutexes._static_mutexes()
    library.sqlite3_mutex_enter.argtypes = library.sqlite3_mutex_leave.argtypes
    library.sqlite3_mutex_enter(mutexes[0])
    try:
        yield
    finally:
        library.sqlite3_mutex_leave(mutexes[0])


def messages_of_two_forks() -> list[list[str]] | None:
    """Fork while a thread is inside of SQLite, and once more; give what is logged at each."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    forking.FORK_WAIT = 0.05
    sqlite3.connect(":memory:").close()
    if not sqlite_mutexes._static_mutexes()[1]:
        return None
    with held_elsewhere(inside_sqlite):
        assert in_child(lambda: forking.process.forked)
        assert not sqlite_mutexes._entered
    messages = [record.getMessage() for record in records]
    records.clear()
    assert in_child(lambda: forking.process.forked)
    return [messages, [record.getMessage() for record in records]]


def test_fork_while_a_thread_stays_inside_sqlite() -> None:
    """A fork that could not have SQLite's mutexes says so, and leaves none entered.

    In a process of its own: to close another test's connection would take the mutex, too.
    """
    messages = call_in_child("multiprocessing-spawn", messages_of_two_forks)
    if messages is None:
        pytest.skip("this sqlite3 module does not show its mutexes")
    [[message], none] = messages
    assert "while other threads still use SQLite, after waiting" in message
    assert none == []


def refused(engine: Engine) -> bool:
    """Return whether a process may not connect because its parent had the file in use."""
    with pytest.raises(ForkedSQLiteError):
        engine.connect()
    return True


def test_fork_while_a_thread_checks_out_a_shared_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that a thread is checking out for too long counts as one in use."""
    inside, leave = threading.Event(), threading.Event()
    options = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}

    def linger(_: str) -> None:
        inside.set()
        assert leave.wait(LONG)

    def use() -> None:
        with engine.connect() as connection:
            assert connection.scalar(select(7)) == 7

    with SessionManager(engine_options={**options, "ping_if_idle": 0.0}) as manager:
        engine = manager.get_engine(f"sqlite:///{tmp_path}/file.db")
        with engine.connect() as connection:
            driver_connection: Any = connection.connection.driver_connection
        driver_connection.set_trace_callback(linger)  # called by the test of its liveness
        with thread_that(use):
            assert inside.wait(LONG)
            assert in_child(lambda: refused(manager.get_engine(engine.url)))
            leave.set()
    [record] = caplog.records
    assert "while other threads still make engines or connect, after" in record.getMessage()

"""Connections of pools whose place another one took, and checkouts that hold no fork back.

For SessionManager alone is what takes threads that share a pool, or keep a connection each.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    Connection,
    Engine,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
    event,
    select,
)

from sessionmgr import SessionManager, forking
from tests.concurrency import in_child
from tests.helpers import wait_until
from tests.test_gate import thread_that

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.async_facade import ManagerClass
    from tests.servers import Database

LONG = 60.0
"""Seconds that a thread waits for another before it gives up."""


def use(engine: Engine) -> int | None:
    """Open a connection and use it."""
    with engine.connect() as connection:
        return connection.scalar(select(7))


@contextmanager
def connecting(engine: Engine) -> Iterator[None]:
    """Have another thread on its way to a new connection, held back as by a fork."""
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    before = pool.overflow()
    assert forking.gate.close(LONG)
    with thread_that(use, engine):
        try:
            wait_until(lambda: pool.overflow() == before + 1)
            yield
        finally:
            forking.gate.open()


@pytest.mark.parametrize("by", ["fork", "dispose"])
def test_connection_made_behind_the_gate_is_not_left_in_the_old_pool(
    tmp_path: Path, by: str
) -> None:
    """A thread that was held back by a fork leaves no connection in the pool that it had then."""
    url = f"sqlite:///{tmp_path}/file.db"
    with SessionManager(pooling="always") as manager:
        engine = manager.get_engine(url)
        used = engine.connect()
        with connecting(engine):
            used.close()
            if by == "fork":
                manager._before_fork(0.0)
            else:
                engine.dispose()
        [stats] = manager.stats().databases
        assert (stats.connects, stats.checked_out, stats.idle) == (2, 0, 0)
        assert in_child(lambda: use(manager.get_engine(url))) == 7


def test_disposed_engine_leaves_no_connection_to_its_server(
    make_database: Callable[..., Database],
) -> None:
    """What was checked out, or on its way, when an engine was disposed of is closed at its end."""
    database = make_database("psycopg")
    with SessionManager(pooling="always") as manager:
        engine = manager.get_engine(database.url)
        with engine.connect() as used, connecting(engine):
            assert used.scalar(select(7)) == 7
            engine.dispose()
        wait_until(lambda: not database.connections(), 30.0)
        use(engine)
        assert len(database.connections()) == 1


def test_connection_that_a_pool_keeps_for_its_thread_is_closed(
    make_database: Callable[..., Database],
) -> None:
    """Closing a manager closes its connection in this thread, where each thread has its own."""
    database = make_database("psycopg")
    with SessionManager(engine_options={"poolclass": SingletonThreadPool}) as manager:
        engine = manager.get_engine(database.url)
        use(engine)
        assert len(database.connections()) == 1
    wait_until(lambda: not database.connections())


def test_connection_of_a_replaced_pool_without_a_queue(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """A pool of one connection that was replaced closes it when it comes back, and not before."""
    options = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    with manager_class(engine_options=options) as manager:
        engine = manager.get_engine(f"{sqlite}:///{tmp_path}/file.db")
        with engine.connect() as used:
            engine.dispose(close=False)
            assert used.scalar(select(7)) == 7
        [stats] = manager.stats().databases
        assert (stats.connects, stats.checked_out, stats.idle) == (1, 0, 0)


def test_nobody_uses_a_dialect_that_is_being_initialised(
    make_database: Callable[..., Database],
) -> None:
    """An engine that is invalidated in its first connect is initialised before its next."""
    database = make_database("psycopg")
    inside, resume = threading.Event(), threading.Event()
    seen: list[str | None] = []

    def slow_down(engine: Engine) -> None:
        initialize = engine.dialect.initialize

        def initialize_slowly(connection: Connection) -> None:
            inside.set()
            assert resume.wait(LONG)
            initialize(connection)

        engine.dialect.initialize = initialize_slowly  # type: ignore[method-assign]

    def look(engine: Engine) -> None:
        with engine.connect() as connection:
            seen.append(connection.dialect.default_schema_name)

    with SessionManager(slow_down, pooling="always") as manager:
        engine = manager.get_engine(database.url)
        with thread_that(look, engine):
            assert inside.wait(LONG)
            manager.invalidate(database.url)
            with thread_that(look, engine):
                wait_until(lambda: len(database.connections()) == 2, LONG)
                resume.set()
        assert seen == ["public", "public"]
        wait_until(lambda: not database.connections(), LONG)


def closes_at_once() -> bool:
    """Return whether a fork would have nothing to wait for."""
    closed = forking.gate.close(0)
    forking.gate.open()
    return closed


def test_fork_waits_for_a_first_connection_and_not_for_a_queue(tmp_path: Path) -> None:
    """The dialect's initialisation holds forks back; a thread that queues beside it does not."""
    initialised = threading.Event()

    def initialise(*_: Any) -> None:
        inside.set()
        assert initialised.wait(LONG)

    def listen(engine: Engine) -> None:
        event.listen(engine, "connect", initialise)

    def hold() -> None:
        with engine.connect():
            connected.set()
            assert leave.wait(LONG)

    inside, connected, leave = (threading.Event() for _ in range(3))
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": LONG}
    with SessionManager(listen, pooling="always", engine_options=options) as manager:
        engine: Any = manager.get_engine(f"sqlite:///{tmp_path}/file.db")
        with thread_that(hold):
            assert inside.wait(LONG)
            with thread_that(use, engine):
                wait_until(lambda: engine.pool._pool.not_empty._waiters)
                assert not closes_at_once()
                initialised.set()
                assert connected.wait(LONG)
                assert closes_at_once()
                leave.set()

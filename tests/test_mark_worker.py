"""What mark_worker() does to the engines that a manager has, or is making at that moment.

For SessionManager alone is the engine that another thread is making: it has a loop of its own.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.pool import QueuePool

from sessionmgr import SessionManager
from tests.helpers import wait_until
from tests.items import connection_id
from tests.test_gate import thread_that

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Engine

    from tests.async_facade import ManagerClass
    from tests.servers import Database

LONG = 60.0
"""Seconds that a thread waits for another before it gives up."""


def test_engine_that_is_being_made_is_a_workers(make_database: Callable[..., Database]) -> None:
    """An engine on which another thread is at work when the process is marked keeps connections."""
    database = make_database("psycopg")
    inside, marked = threading.Event(), threading.Event()
    made: list[Engine] = []

    def callback(engine: Engine) -> None:
        made.append(engine)
        inside.set()
        assert marked.wait(LONG)

    with SessionManager(callback) as manager:
        given: list[Engine] = []
        with thread_that(lambda: given.append(manager.get_engine(database.url))):
            assert inside.wait(LONG)
            manager.mark_worker()
            marked.set()
        assert len(made) == 2
        assert given == [manager.get_engine(database.url)] == made[1:]
        assert isinstance(given[0].pool, QueuePool)
        ids = set()
        for _ in range(3):
            with manager.session_factory(database.url) as session:
                ids.add(connection_id(session))
        wait_until(lambda: database.connections() == ids, 30.0)
        assert len(ids) == 1


def test_callback_may_mark_the_process(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """The engine that the callback was given then is let go for one that keeps connections."""
    manager = manager_class(lambda _: manager.mark_worker())
    with manager:
        engine = manager.get_engine(f"{sqlite}:///{tmp_path}/file.db")
        assert isinstance(engine.pool, QueuePool)


@pytest.mark.parametrize("pooling", ["always", "never"])
def test_engines_that_stay_as_they_are_are_kept(
    pooling: str, tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """Where the pooling is fixed, mark_worker() lets no engine go."""
    url = f"{sqlite}:///{tmp_path}/file.db"
    with manager_class(pooling=pooling) as manager:
        engine = manager.get_engine(url)
        manager.mark_worker()
        assert manager.forked
        assert manager.get_engine(url) is engine

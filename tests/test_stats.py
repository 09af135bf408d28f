"""Statistics: frozen, printable, JSON, and true.

For SessionManager alone is the pool whose connections threads hand to each other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import QueuePool
from sqlalchemy.exc import DBAPIError

from sessionmgr import DatabaseStats, ManagerStats, SessionManager
from tests.concurrency import in_child
from tests.helpers import wait_until
from tests.items import Item, ItemBase, count_items, kill_connection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.pool import ConnectionPoolEntry

    from tests.async_facade import ManagerClass
    from tests.servers import Database

DATABASE = DatabaseStats("users", "QueuePool", 5, 4, 9, 3, 2, 1, 1, 2)
STATS = ManagerStats(17, True, (DATABASE, dataclasses.replace(DATABASE, size=None)))


def test_stats_are_frozen() -> None:
    """What was counted cannot be changed."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        STATS.pid = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DATABASE.connects = 3  # type: ignore[misc]


def test_stats_print_well() -> None:
    """Each database has a line, under one for the process."""
    counts = "1 in use, 2 idle; 4 connects, 9 checkouts, 3 tests, 2 replaced, 1 invalidated"
    assert str(STATS).splitlines() == [
        "process 17 (a worker), databases: 2",
        f"  users: QueuePool of 5, {counts}",
        f"  users: QueuePool, {counts}",
    ]
    assert str(ManagerStats(17, False, ())) == "process 17 (not forked), databases: 0"


def test_stats_turn_into_json() -> None:
    """JSON has every field under its name."""
    read = json.loads(STATS.to_json())
    assert read == json.loads(json.dumps(STATS.as_dict()))
    assert (read["pid"], read["forked"]) == (17, True)
    names = [field.name for field in dataclasses.fields(DatabaseStats)]
    assert [list(database) for database in read["databases"]] == [names, names]
    assert read["databases"][0] == dataclasses.asdict(DATABASE)


def test_stats_travel() -> None:
    """Statistics compare by value and pickle: a worker can send them to its parent."""
    assert pickle.loads(pickle.dumps(STATS)) == STATS  # noqa: S301 - our own


def counts(manager: SessionManager) -> dict[str, Any]:
    """Return the numbers of a manager's only database that are not zero."""
    [database] = manager.stats().databases
    return {name: value for name, value in vars(database).items() if value and value is not True}


@pytest.mark.parametrize("pooling", ["always", "never"])
def test_counts_are_true(database: Database, pooling: Any, manager_class: ManagerClass) -> None:
    """Connects, checkouts, tests, and replaced and invalidated connections are counted."""
    options = {"ping_if_idle": 0, "pool_size": 3}
    kept = pooling == "always"
    adapted = "" if manager_class is SessionManager else "AsyncAdapted"
    with manager_class(
        metadata=ItemBase.metadata, pooling=pooling, engine_options=options
    ) as manager:
        manager.session_factory(database.url).close()
        before = counts(manager)
        assert before["database"] == str(database.url)
        assert (before["pool_class"], before.get("size")) == (
            (f"{adapted}QueuePool", 3) if kept else ("NullPool", None)
        )
        assert before.get("idle", 0) == kept

        with manager.session_factory(database.url) as session:
            count_items(session)
            with manager.session_factory(database.url) as other:
                count_items(other)
                assert counts(manager)["checked_out"] == 2
            assert counts(manager)["checked_out"] == 1
        after = counts(manager)
        assert after["checkouts"] == before["checkouts"] + 2
        assert after["connects"] == before["connects"] + (1 if kept else 2)
        assert after.get("tests", 0) == before.get("tests", 0) + kept
        assert after.get("idle", 0) == (2 if kept else 0)
        assert "checked_out" not in after

        with manager.session_factory(database.url) as session:
            kill_connection(session, database)
            with pytest.raises(DBAPIError):
                count_items(session)
        assert counts(manager)["invalidated"] == 1
        assert "replaced" not in counts(manager)


def test_replaced_connections_are_counted(database: Database, manager_class: ManagerClass) -> None:
    """A pooled connection that is found dead at its checkout counts as replaced."""
    with manager_class(
        metadata=ItemBase.metadata, pooling="always", engine_options={"ping_if_idle": 0}
    ) as manager:
        manager.session_factory(database.url).close()
        database.server.kill(*database.connections())
        wait_until(lambda: not database.connections())
        with manager.begin(database.url) as session:
            session.add(Item(name="row"))
        found = counts(manager)
        assert (found["replaced"], found["idle"]) == (1, 1)


class HandsOverAtOnce(QueuePool):
    """A pool whose record another thread takes as soon as it is back, at the latest."""

    taker: Callable[[], None] | None = None

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        taker, self.taker = self.taker, None
        if taker is not None:
            thread = threading.Thread(target=taker)
            thread.start()
            thread.join()


def test_detached_connection_is_told_from_the_next_of_its_record(tmp_path: Path) -> None:
    """A detached connection is watched to its end, and so is the one that took its place."""
    options = {"poolclass": HandsOverAtOnce, "pool_size": 1, "max_overflow": 0}
    with SessionManager(pooling="always", engine_options=options) as manager:
        engine = manager.get_engine(f"sqlite:///{tmp_path}/file.db")
        detached, others = engine.connect(), []
        engine.pool.taker = lambda: others.append(engine.connect())  # type: ignore[attr-defined]
        detached.detach()
        assert counts(manager)["checked_out"] == 2
        detached.close()
        assert counts(manager)["checked_out"] == 1
        [other] = others
        other.close()
        assert counts(manager)["idle"] == 1
        assert "checked_out" not in counts(manager)


def test_stats_are_of_this_process(database: Database, manager_class: ManagerClass) -> None:
    """A child counts for itself, from nothing; the parent's counts stay."""
    with manager_class(metadata=ItemBase.metadata, pooling="always") as manager:
        manager.session_factory(database.url).close()
        before = manager.stats()
        assert (before.pid, before.forked) == (os.getpid(), False)

        def use() -> tuple[ManagerStats, ManagerStats, int]:
            first = manager.stats()
            with manager.session_factory(database.url) as session:
                count_items(session)
            return first, manager.stats(), os.getpid()

        first, then, pid = in_child(use)
        assert (first.pid, first.forked, first.databases) == (pid, True, ())
        assert [(d.connects, d.checkouts) for d in then.databases] == [(1, 1)]
        assert manager.stats() == before

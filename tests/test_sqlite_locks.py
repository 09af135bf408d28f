"""Which locks transactions take on SQLite, and who has to wait for whom."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Connection, MetaData, insert, text
from sqlalchemy.exc import OperationalError

from sessionmgr import SessionManager
from sessionmgr.transient import is_contention, is_transient
from tests.concurrency import in_children
from tests.items import Item, ItemBase
from tests.sqlite_helpers import (
    ADD,
    READ,
    another,
    can_write,
    counted,
    manage_pooled,
    raw,
    recorded,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.orm import Session

    from tests.async_facade import ManagerClass


pytest_plugins = ["tests.sqlite_fixtures"]


def test_reading_takes_no_lock_for_writing(
    path: Path, file_url: str, manager: SessionManager
) -> None:
    """While a session reads, another program may write."""
    with manager.session_factory(file_url) as session:
        session.scalar(READ)
        assert raw(session).in_transaction
        assert can_write(path)


def update(connection: Connection) -> None:
    """Execute a statement with no parameters."""
    connection.execute(ADD)


def insert_rows(connection: Connection) -> None:
    """Execute one for several rows."""
    connection.execute(insert(Item), [{"name": "1"}, {"name": "2"}])


def insert_returning(connection: Connection) -> None:
    """Execute one whose rows SQLAlchemy puts into a few statements."""
    rows = [{"name": "1"}, {"name": "2"}]
    assert len(connection.scalars(insert(Item).returning(Item.id), rows).all()) == 2


def execute_text(connection: Connection) -> None:
    """Execute what the driver is given as it is."""
    connection.exec_driver_sql("DELETE FROM counter")


def execute_bare(connection: Connection) -> None:
    """Execute what the driver is given without so much as an empty list of parameters."""
    connection.exec_driver_sql("DELETE FROM counter", execution_options={"no_parameters": True})


@pytest.mark.parametrize(
    "write", [update, insert_rows, insert_returning, execute_text, execute_bare]
)
def test_first_write_takes_the_lock(
    path: Path, file_url: str, write: Callable[[Connection], None]
) -> None:
    """However a statement is executed, it begins with the lock for writing, and keeps it."""
    factory, seen = recorded()
    options = {"connect_args": {"factory": factory}}
    with SessionManager(metadata=ItemBase.metadata, engine_options=options) as manager:
        manager.session_factory(file_url).close()
        with manager.get_engine(file_url).connect() as connection:
            seen.clear()
            write(connection)
            begins = [statement for statement in seen if statement.startswith("BEGIN")]
            assert begins == ["BEGIN IMMEDIATE"]
            assert not can_write(path)
        assert can_write(path)


def test_begin_takes_the_lock_at_once(path: Path, manager_class: ManagerClass, sqlite: str) -> None:
    """``begin`` does, ``begin(write=False)`` and a session do not."""
    url = f"{sqlite}:///{path}"
    with manager_class(metadata=MetaData(), pooling="always") as manager:
        with manager.begin(url):
            assert not can_write(path)
        assert can_write(path)
        with manager.begin(url, write=False) as session:
            assert can_write(path)
            session.scalar(READ)
            assert can_write(path)
        with manager.session_factory(url):
            assert can_write(path)
        assert not manager.run(url, lambda _: can_write(path))
        assert manager.run(url, lambda _: can_write(path), write=False)


def test_begin_waits_for_the_lock_and_gives_up(
    path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """Who cannot have the lock within the busy timeout is told so, and no connection stays out."""
    url = f"{sqlite}:///{path}"
    options = {"sqlite_busy_timeout": 0.01}
    with (
        manager_class(metadata=MetaData(), pooling="always", engine_options=options) as manager,
        another(path) as other,
    ):
        manager.session_factory(url).close()
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="database is locked") as caught:
            manager.begin(url).__enter__()
        assert is_contention(caught.value)
        with manager.session_factory(url) as session:
            assert session.scalar(READ) == 0
        [stats] = manager.stats().databases
        assert stats.checked_out == 0


def test_begin_inside_of_begin_is_explained(file_url: str) -> None:
    """Who waits for a lock of its own is told how to do without."""
    with manage_pooled(sqlite_busy_timeout=0.01) as manager, manager.begin(file_url):
        with pytest.raises(OperationalError, match="database is locked") as caught:
            manager.begin(file_url).__enter__()
        if sys.version_info >= (3, 11):  # errors have notes
            assert "waits for itself" in "".join(caught.value.__notes__)
        with manager.begin(file_url, write=False) as session:
            assert session.scalar(READ) == 0


def test_reader_that_writes_too_late_is_told(
    path: Path, file_url: str, manager: SessionManager
) -> None:
    """Who read before another committed cannot write: an error that passes, and at once."""
    with manager.begin(file_url, write=False) as session:
        session.scalar(READ)
        with another(path) as other:
            other.execute("UPDATE counter SET n = 5")
        with pytest.raises(OperationalError, match="database is locked") as caught:
            session.execute(ADD)
        assert is_contention(caught.value)
        assert is_transient(caught.value)
        session.rollback()
    assert counted(path) == 5


def test_run_does_a_late_writers_work_again(
    path: Path, file_url: str, manager: SessionManager
) -> None:
    """``run(write=False)`` reads anew, and loses no update of the other's."""
    seen: list[int] = []

    def work(session: Session) -> None:
        seen.append(session.scalar(READ) or 0)
        if len(seen) == 1:
            with another(path) as other:
                other.execute("UPDATE counter SET n = 5")
        session.execute(text("UPDATE counter SET n = :n"), {"n": seen[-1] + 1})

    manager.run(file_url, work, write=False)
    assert seen == [0, 5]
    assert counted(path) == 6


@pytest.mark.parametrize("write", [True, False])
def test_no_update_is_lost(path: Path, file_url: str, write: bool) -> None:
    """8 processes read a counter and write it back, through ``run``: all of it counts."""
    # deferred ones lose a race as often as not
    each, attempts = (1000, 5) if write else (100, 1000)

    def add(session: Session) -> None:
        count = session.scalar(READ)
        assert count is not None
        session.execute(text("UPDATE counter SET n = :n"), {"n": count + 1})

    def use() -> None:
        with manage_pooled() as manager:
            for _ in range(each):
                manager.run(file_url, add, attempts=attempts, write=write)

    in_children([use] * 8, timeout=280)
    assert counted(path) == 8 * each

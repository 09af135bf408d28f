"""Threads of one process: one engine per database, two databases side by side."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, event
from sqlalchemy.exc import InvalidRequestError

from sessionmgr import SessionManager
from tests.concurrency import in_both_phases, in_child, in_threads
from tests.helpers import wait_until
from tests.items import Item, ItemBase, connection_id, count_items

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.orm import Session

    from tests.servers import Database

THREADS = 16

MEETING = 60.0
"""Seconds that two threads wait for each other before they give up."""


@in_both_phases
def test_threads_that_ask_for_one_engine_get_one(database: Database, call: Callable) -> None:
    """Sixteen threads asking for a new engine share one, made by one callback, with one pool."""
    made: list[Engine] = []
    options = {"pool_size": 2, "max_overflow": 0}
    with SessionManager(made.append, metadata=ItemBase.metadata, engine_options=options) as manager:

        def use(position: int) -> tuple[int, int]:
            with manager.begin(database.url) as session:
                session.add(Item(name=f"row {position}"))
                session.flush()
                return id(session.get_bind()), connection_id(session)

        def run() -> tuple[int, int, int, bool]:
            used = in_threads([lambda i=i: use(i) for i in range(THREADS)])
            engines, connections = (set(found) for found in zip(*used, strict=True))
            with manager.session_factory(database.url) as session:
                assert count_items(session) == THREADS
            assert len(manager.stats().databases) == 1
            return len(made), len(engines), len(connections), manager.forked

        callbacks, engines, connections, forked = call(run)
        assert (callbacks, engines) == (1, 1)
        assert connections <= 2 or not forked


def test_threads_that_ask_for_one_sessionmaker_get_one(tmp_path: Path) -> None:
    """Sixteen threads asking at once get one sessionmaker."""
    with SessionManager() as manager:
        url = f"sqlite:///{tmp_path / 'one.db'}"
        found = in_threads([lambda: manager.create_session(url)] * THREADS)
        assert len(set(found)) == 1


def test_tables_are_made_by_one_thread(make_database: Callable[..., Database]) -> None:
    """Sixteen first sessions at once emit the DDL once."""
    metadata, emitted = MetaData(), []
    table = Table("once", metadata, Column("id", Integer, primary_key=True))
    event.listen(table, "before_create", lambda *_, **__: emitted.append(threading.get_ident()))
    with SessionManager(metadata=metadata) as manager:
        url = make_database("psycopg").url
        in_threads([lambda: manager.session_factory(url).close()] * THREADS)
    assert len(emitted) == 1


def test_engines_of_two_databases_are_made_side_by_side(tmp_path: Path) -> None:
    """A callback that waits for another database's holds nobody up."""
    meeting = threading.Barrier(2)
    with SessionManager(lambda _: meeting.wait(MEETING)) as manager:
        urls = [f"sqlite:///{tmp_path / name}" for name in ("one.db", "two.db")]
        engines = in_threads([lambda url=url: manager.get_engine(url) for url in urls])
        assert len(set(engines)) == 2


def test_tables_of_two_databases_are_made_side_by_side(
    make_database: Callable[..., Database],
) -> None:
    """Two slow databases are prepared at the same time."""
    meeting, metadata = threading.Barrier(2), MetaData()
    table = Table("slow", metadata, Column("id", Integer, primary_key=True))
    event.listen(table, "before_create", lambda *_, **__: meeting.wait(MEETING))
    with SessionManager(metadata=metadata) as manager:
        urls = [make_database("psycopg").url, make_database("pymysql").url]
        in_threads([lambda url=url: manager.session_factory(url).close() for url in urls])
        assert len(manager.prepared) == 2


@in_both_phases
def test_cached_sessions_take_no_lock(tmp_path: Path, call: Callable) -> None:
    """A session on a database in use is opened while another thread holds every lock."""
    with SessionManager(metadata=ItemBase.metadata) as manager:
        url = f"sqlite:///{tmp_path / 'one.db'}"

        def open_while_locked() -> int:
            manager.session_factory(url).close()
            held, done = threading.Event(), threading.Event()
            [key] = manager._engines

            def hold() -> None:
                registry = manager._registry
                with registry.lock(key), registry._lock(), manager._lock():
                    held.set()
                    assert done.wait(MEETING)

            def open_session() -> int:
                assert held.wait(MEETING)
                try:
                    with manager.session_factory(url) as session:
                        return count_items(session)
                finally:
                    done.set()

            return in_threads([hold, open_session], MEETING / 2)[1]

        assert call(open_while_locked) == 0


def test_callback_that_fails_is_called_for_each_thread_until_one_succeeds(tmp_path: Path) -> None:
    """A failing first thread costs the others nothing: the next one makes the engine."""
    calls: list[Engine] = []

    def fail_three_times(engine: Engine) -> None:
        calls.append(engine)
        if len(calls) <= 3:
            raise LookupError(len(calls))

    def ask() -> Engine | None:
        try:
            return manager.get_engine(f"sqlite:///{tmp_path / 'one.db'}")
        except LookupError:
            return None

    with SessionManager(fail_three_times) as manager:
        found = in_threads([ask] * THREADS)
        assert found.count(None) == 3
        assert set(found) - {None} == {calls[3]}
        assert len(calls) == 4


def test_callback_that_asks_for_its_own_engine_is_told(tmp_path: Path) -> None:
    """A callback that asks the manager for the database at hand fails, and does not recurse."""
    url = f"sqlite:///{tmp_path / 'one.db'}"
    with SessionManager(lambda _: manager.get_engine(url)) as manager:
        with pytest.raises(InvalidRequestError, match="engine_callback asked"):
            manager.get_engine(url)
        assert manager._engines == {}


def finish_in_use(
    manager: SessionManager, database: Database, use: Callable[[Session], None]
) -> int:
    """Invalidate a database while sessions on it are in use, and finish them with ``use``.

    :return: the number of rows afterwards, when the server counts none of their connections.
    """
    sessions = [manager.session_factory(database.url) for _ in range(4)]
    for position, session in enumerate(sessions):
        session.add(Item(name=f"row {position}"))
        session.flush()
    theirs = {connection_id(session) for session in sessions}
    assert len(theirs) == len(sessions)

    in_threads([lambda: manager.invalidate(database.url)] * 4)
    with manager.session_factory(database.url) as newer:
        assert connection_id(newer) not in theirs
        in_threads([lambda session=session: use(session) for session in sessions])
        wait_until(lambda: not theirs & database.connections())
    assert len(manager.stats().databases) == 1
    with manager.session_factory(database.url) as session:
        return count_items(session)


def commit_and_close(session: Session) -> None:
    """Commit twice, and close."""
    session.commit()
    count_items(session)
    session.commit()
    session.close()


@pytest.mark.parametrize(
    ("use", "rows"), [(commit_and_close, 4), (lambda s: s.close(), 0)], ids=["commit", "rollback"]
)
@in_both_phases
def test_sessions_in_use_finish_after_invalidate(
    database: Database, call: Callable, use: Callable[[Session], None], rows: int
) -> None:
    """Sessions of an invalidated database finish; then the server counts none of theirs."""
    with SessionManager(metadata=ItemBase.metadata) as manager:
        assert call(lambda: finish_in_use(manager, database, use)) == rows


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_threads_use_and_invalidate_at_once(
    make_database: Callable[..., Database], driver: str
) -> None:
    """Threads that use two databases while others invalidate them lose no row or connection."""
    databases = [make_database(driver), make_database(driver)]

    def use(manager: SessionManager, database: Database, name: str) -> None:
        for position in range(10):
            with manager.begin(database.url) as session:
                session.add(Item(name=f"{name}.{position}"))
            if position % 3 == 0:
                manager.invalidate(database.url)

    def run() -> list[int]:
        with SessionManager(metadata=ItemBase.metadata) as manager:
            in_threads(lambda i=i: use(manager, databases[i % 2], f"thread {i}") for i in range(8))
            rows = []
            for database in databases:
                with manager.session_factory(database.url) as session:
                    rows.append(count_items(session))
        for database in databases:
            wait_until(lambda database=database: not database.connections())
        return rows

    assert in_child(run) == [40, 40]

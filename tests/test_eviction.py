"""``max_engines``: the engine that was idle for longest goes, one in use never."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.concurrency import in_both_phases, in_child, in_threads
from tests.helpers import wait_until
from tests.items import Item, ItemBase, connection_id, count_items, item_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

    from sessionmgr import SessionManager
    from tests.async_facade import ManagerClass
    from tests.servers import Database


@pytest.fixture
def urls(tmp_path: Path, sqlite: str) -> list[str]:
    """Return the URLs of six SQLite files."""
    return [f"{sqlite}:///{tmp_path / name}.db" for name in "abcdef"]


def use(manager: SessionManager, *urls: str | URL) -> None:
    """Use databases, in this order."""
    for url in urls:
        with manager.session_factory(url) as session:
            count_items(session)


@in_both_phases
def test_least_recently_used_engine_goes_first(
    urls: list[str], call: Callable, manager_class: ManagerClass
) -> None:
    """Beyond the limit the engine whose last use is longest ago is let go."""

    def run() -> list[set[str]]:
        a, b, c, d, e, _ = urls
        found = []
        with manager_class(metadata=ItemBase.metadata, max_engines=3) as manager:
            use(manager, a, b, c, a, d)  # b is the oldest
            found.append(set(manager._engines))
            use(manager, c, e)  # a is
            found.append(set(manager._engines))
            assert len(manager.stats().databases) == len(manager._sessions | manager._engines) == 3
        return found

    a, _, c, d, e, _ = urls
    assert call(run) == [{a, c, d}, {c, d, e}]


@in_both_phases
def test_engines_in_use_are_never_evicted(
    urls: list[str], call: Callable, manager_class: ManagerClass
) -> None:
    """Where all are in use there are more than the limit, and again no more once they are not."""

    def run() -> None:
        with manager_class(metadata=ItemBase.metadata, max_engines=2) as manager:
            with contextlib.ExitStack() as stack:
                for url in urls[:5]:
                    session = stack.enter_context(manager.session_factory(url))
                    session.add(Item(name="row"))
                    session.flush()
                engines = dict(manager._engines)
                assert set(engines) == set(urls[:5])
                use(manager, urls[0])
                assert manager._engines == engines
                for url in urls[:5]:
                    manager.get_engine(url)
                assert manager._engines == engines
            use(manager, urls[5])
            assert len(manager._engines) == 2
            assert urls[5] in manager._engines

    call(run)


def test_limit_of_one(urls: list[str], manager_class: ManagerClass) -> None:
    """With one engine at most each database in turn has it, and keeps its rows."""
    with manager_class(metadata=ItemBase.metadata, max_engines=1) as manager:
        for round_number in range(3):
            for url in urls:
                with manager.begin(url) as session:
                    session.add(Item(name=f"round {round_number}"))
                assert list(manager._engines) == [url]
        for url in urls:
            with manager.session_factory(url) as session:
                assert count_items(session) == 3


def test_evicted_engine_leaves_no_connection(
    make_database: Callable[..., Database],
    urls: list[str],
    manager_class: ManagerClass,
) -> None:
    """The pool of an evicted engine is closed: the server counts no connection."""
    database = make_database("psycopg")

    def run() -> None:
        with manager_class(metadata=ItemBase.metadata, max_engines=1) as manager:
            use(manager, database.url)
            assert len(database.connections()) == 1
            use(manager, urls[0])
            wait_until(lambda: not database.connections())

    in_child(run)


@in_both_phases
@pytest.mark.twin_cases(database=["psycopg"])
def test_session_made_before_the_eviction_works_after_it(
    database: Database,
    urls: list[str],
    call: Callable,
    manager_class: ManagerClass,
) -> None:
    """A session without a connection when its engine goes still works, and leaves none behind."""

    def run() -> list[str]:
        with manager_class(metadata=ItemBase.metadata, max_engines=1) as manager:
            session = manager.session_factory(database.url)
            engine, factory = manager.create_session(database.url)
            use(manager, urls[0])
            assert set(manager._engines) == {urls[0]}

            for round_number in range(3):
                session.add(Item(name=f"session {round_number}"))
                session.commit()
                with factory() as other:
                    assert count_items(other) == round_number + 1
                with engine.connect() as connection:
                    assert connection_id(connection) in database.connections()
            session.close()
            wait_until(lambda: not database.connections())
            with manager.session_factory(database.url) as session:
                return item_names(session)

    assert call(run) == [f"session {n}" for n in range(3)]


def test_evicted_database_is_looked_at_again(
    tmp_path: Path, urls: list[str], manager_class: ManagerClass
) -> None:
    """A database that was evicted, and dropped meanwhile, gets its tables when it comes back."""
    with manager_class(metadata=ItemBase.metadata, max_engines=1) as manager:
        use(manager, urls[0], urls[1])
        assert manager.prepared == {urls[1]}
        (tmp_path / "a.db").unlink()
        use(manager, urls[0])


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.twin_cases(limit=[2])
def test_threads_share_a_limit(
    make_database: Callable[..., Database],
    urls: list[str],
    limit: int,
    manager_class: ManagerClass,
) -> None:
    """Threads on more databases than engines lose no row; in the end the limit is kept."""
    databases = [make_database(driver) for driver in ("psycopg", "pymysql")]
    dburis = [*urls[:4], *(database.url for database in databases)]

    def work(manager: SessionManager, thread: int) -> None:
        for position in range(12):
            dburi = dburis[(thread + position) % len(dburis)]
            manager.run(dburi, lambda session, p=position: session.add(Item(name=f"{thread}.{p}")))

    def run() -> int:
        with manager_class(metadata=ItemBase.metadata, max_engines=limit) as manager:
            in_threads([lambda t=t: work(manager, t) for t in range(6)])
            use(manager, urls[5])  # a new one: engines that were in use meanwhile go with the next
            assert len(manager._engines) <= limit
            rows = 0
            for dburi in dburis:
                with manager.session_factory(dburi) as session:
                    rows += count_items(session)
        for database in databases:
            wait_until(lambda database=database: not database.connections())
        return rows

    assert in_child(run) == 6 * 12


def test_no_limit_is_the_default(urls: list[str], manager_class: ManagerClass) -> None:
    """Without ``max_engines`` every engine is kept."""
    with manager_class(metadata=ItemBase.metadata) as manager:
        use(manager, *urls)
        assert set(manager._engines) == set(urls)

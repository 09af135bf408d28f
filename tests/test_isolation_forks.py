"""Isolation, forks and Celery: a child has a transaction of its own, an eager task the test's."""

from __future__ import annotations

import asyncio
import gc
import warnings
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from celery import Celery
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from sessionmgr import (
    AsyncSessionManager,
    EventLoopError,
    ForkedSQLiteError,
    IsolationError,
    ResultStore,
    SessionManager,
)
from sessionmgr.isolation import isolated
from tests.concurrency import in_child
from tests.helpers import wait_until
from tests.isolation_helpers import BEFORE, add, fill, names, undone, write
from tests.items import Item, ItemBase, connection_id, item_names, open_transactions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.async_facade import ManagerClass
    from tests.servers import Database

SERVERS = ["psycopg", "psycopg2", "pymysql", "mysqlclient"]


@pytest.mark.parametrize("driver", SERVERS)
def test_forked_children_leave_nothing(
    manager_class: ManagerClass, driver: str, make_database: Callable[..., Database]
) -> None:
    """What a child commits is undone when it ends, on its own connection; the parent goes on."""
    database = make_database(driver)
    with manager_class(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, database.url)
        held = manager.get_engine(database.url)

        def work() -> list[list[str]]:
            add(manager, database.url, "of the child")
            inside = [names(manager, database.url)]
            if manager_class is SessionManager:  # an asynchronous one is the parent's loop's
                with held.begin() as connection:
                    assert connection_id(connection) != parent
                    connection.exec_driver_sql("DELETE FROM item WHERE name = 'before'")
                with held.connect() as connection:
                    left = connection.exec_driver_sql("SELECT name FROM item").scalars()
                    inside.append(list(left))
            return inside

        with undone(manager):
            add(manager, database.url, "of the parent")
            with manager.session_factory(database.url) as session:
                parent = connection_id(session)
            child = in_child(work)
            assert child[0] == [*BEFORE, "of the child"]
            assert child[1:] in ([], [[]])
            assert names(manager, database.url) == [*BEFORE, "of the parent"]
            wait_until(lambda: open_transactions(database) == {parent})
        assert names(manager, database.url) == BEFORE


def test_a_child_that_is_done_with_its_isolation(make_database: Callable[..., Database]) -> None:
    """A child that leaves the block ends its own transaction, and nothing of its parent's."""
    database = make_database("psycopg")
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, database.url)
        isolation = isolated(manager)
        isolation.begin()
        add(manager, database.url, "of the parent")

        def work() -> list[str]:
            add(manager, database.url, "of the child")
            isolation.end()
            return names(manager, database.url)

        assert in_child(work) == BEFORE
        assert names(manager, database.url) == [*BEFORE, "of the parent"]
        isolation.end()
        assert names(manager, database.url) == BEFORE


@pytest.mark.parametrize("driver", SERVERS)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_inherited_sessions_are_the_parents(
    driver: str, first: bool, make_database: Callable[..., Database]
) -> None:
    """A session held across the fork says so in the child, and harms neither of them."""
    url = make_database(driver).url
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, url)
        with isolated(manager), manager.session_factory(url) as session:
            write(session, "of the parent")

            def work() -> list[str]:
                if not first:
                    add(manager, url, "of the child")
                with pytest.raises((IsolationError, DBAPIError)):
                    session.execute(text("DELETE FROM item"))
                session.close()
                with manager.get_engine(url).connect() as connection:
                    connection.exec_driver_sql("SELECT 1")
                return names(manager, url)

            child = in_child(work)
            assert child == (BEFORE if first else [*BEFORE, "of the child"])
            session.commit()
            assert item_names(session) == [*BEFORE, "of the parent"]
        assert names(manager, url) == BEFORE


@pytest.mark.parametrize("driver", ["asyncpg", "asyncmy"])
def test_inherited_engines_of_a_loop(driver: str, make_database: Callable[..., Database]) -> None:
    """A child that takes an engine of its parent's loop is told whose it is, and no more."""
    url = make_database(driver).url
    manager = AsyncSessionManager(metadata=ItemBase.metadata, pooling="always")
    isolation = isolated(manager)
    isolation.begin()
    engine = None

    async def use() -> None:
        nonlocal engine
        engine = engine or manager.get_engine(url)
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    async def end() -> None:
        await use()
        await isolation.end_in_loop()
        await manager.close()

    def work() -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with pytest.raises(EventLoopError):
                asyncio.run(use())
            gc.collect()
            return [str(each.message) for each in told]

    with closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(use())
        assert in_child(work) == []
        loop.run_until_complete(end())


def test_a_child_ends_nothing_of_a_loop(make_database: Callable[..., Database]) -> None:
    """A child of a running loop that leaves the block does not wait for its parent's loop."""
    url = make_database("asyncpg").url

    async def main() -> None:
        manager = AsyncSessionManager(metadata=ItemBase.metadata, pooling="always")
        async with manager, isolated(manager) as isolation:
            async with manager.begin(url) as session:
                session.add(Item(name="of the parent"))
            assert in_child(lambda: isolation.end() is None)
            async with manager.begin(url) as session:
                assert (await session.scalars(select(Item.name))).all() == ["of the parent"]

    asyncio.run(main())


def test_children_are_kept_from_an_isolated_file(tmp_path: Path) -> None:
    """The child is told that the file is its parent's, who goes on."""
    url = f"sqlite:///{tmp_path}/file.db"
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, url)

        def work() -> bool:
            with pytest.raises(ForkedSQLiteError):
                add(manager, url, "of the child")
            return True

        with isolated(manager):
            add(manager, url, "of the parent")
            assert in_child(work)
            assert names(manager, url) == [*BEFORE, "of the parent"]
        assert names(manager, url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_eager_tasks_are_undone(driver: str, make_database: Callable[..., Database]) -> None:
    """A Celery task that is called at once, and its result in the same database, are undone."""
    url = make_database(driver).url
    app = Celery("isolated", set_as_current=False)
    app.conf.update(task_always_eager=True, task_store_eager_result=False)
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        store = ResultStore(url)  # whose connections commit by themselves

        @app.task(shared=False)  # or every other application of this process gets it
        def work(name: str) -> str:
            add(manager, url, name)
            store.store("id", "SUCCESS", name.encode())
            return name

        fill(manager, url)
        store.get("nothing")  # which makes its tables
        with isolated(manager, store.manager):
            assert work.delay("of the task").get() == "of the task"
            assert names(manager, url) == [*BEFORE, "of the task"]
            found = store.get("id")
            assert found is not None
            assert found.result == b"of the task"
        assert names(manager, url) == BEFORE
        assert store.get("id") is None
        store.close()
    app.close()

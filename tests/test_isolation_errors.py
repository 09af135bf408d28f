"""What an isolation refuses, and what it says where it cannot be truthful or was cut off."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, insert, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from sessionmgr import AsyncSessionManager, IsolationError, SessionManager
from sessionmgr.isolation import isolated
from tests.helpers import wait_until
from tests.isolation_helpers import BEFORE, add, fill, make_url, names, undone, write
from tests.items import Item, ItemBase, connection_id, item_names, kill_connection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

    from tests.async_facade import ManagerClass
    from tests.servers import Database

pytest_plugins = ["tests.isolation_fixtures"]

ONE_OF_EACH = ["psycopg", "pymysql", "file"]


@pytest.mark.parametrize("driver", ["file"])
def test_one_isolation_at_a_time(filled: SessionManager, blank_url: str) -> None:
    """A manager that is isolated is not isolated again; what is refused leaves no trace."""
    other = SessionManager()
    with isolated(filled):
        with pytest.raises(IsolationError, match="is isolated already"), isolated(other, filled):
            pass
        with isolated(other):
            pass
        add(filled, blank_url, "inside")
    assert names(filled, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["file"])
def test_sessions_in_use_are_refused(filled: SessionManager, blank_url: str) -> None:
    """A connection that is checked out before would commit for good: it is named."""
    with (
        filled.begin(blank_url),
        pytest.raises(IsolationError, match=r"file\.db: connections checked out: 1"),
    ):
        isolated(filled).begin()
    with isolated(filled):
        pass


def test_only_managers_are_isolated() -> None:
    """Something else is told what is taken."""
    wrong: Any = "sqlite://"
    for managers in ((), (wrong,)):
        with pytest.raises(IsolationError, match="takes"):
            isolated(*managers).begin()


def test_loops_take_async_with() -> None:
    """A plain `with` in a coroutine cannot await the rollback, and says so when it begins."""

    async def work() -> None:
        with (
            pytest.raises(IsolationError, match="use 'async with"),
            isolated(AsyncSessionManager()),
        ):
            pass

    asyncio.run(work())


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_what_could_not_be_undone_is_refused(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """Two phases, and DDL on MariaDB, raise; after a rollback it goes on."""
    with manager_class(metadata=ItemBase.metadata) as manager:
        fill(manager, blank_url)
        engine = manager.get_engine(blank_url)
        with undone(manager):
            with engine.connect() as connection:
                connection.execution_options(isolation_level="SERIALIZABLE")  # has no effect
                connection.execute(insert(Item).values(name="inside", count=0))
                connection.commit()
            if driver != "file":  # SQLite has none
                with engine.connect() as connection, pytest.raises(IsolationError, match="phases"):
                    connection.begin_twophase()
            with engine.connect() as connection:
                if driver == "pymysql":
                    with pytest.raises(IsolationError, match="commits at DDL"):
                        connection.execute(text("CREATE TABLE other (a INT)"))
                connection.rollback()
                connection.execute(text("CREATE TEMPORARY TABLE other (a INT)"))
            assert names(manager, blank_url) == [*BEFORE, "inside"]
        assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql", "mysqlclient"])
def test_lost_connections_are_told(
    manager_class: ManagerClass, driver: str, make_database: Callable[..., Database]
) -> None:
    """After the server has ended the connection all uses say so, and the end puts all back."""
    database = make_database(driver)
    with manager_class(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, database.url)
        with undone(manager):
            with manager.session_factory(database.url) as session:
                write(session, "lost")
                kill_connection(session, database)
                with pytest.raises(DBAPIError) as caught:
                    session.scalar(text("SELECT 1"))
                assert caught.value.connection_invalidated
            with pytest.raises(IsolationError, match="was lost"):
                names(manager, database.url)
        assert names(manager, database.url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg"])
def test_the_servers_own_words_are_kept(
    driver: str, make_database: Callable[..., Database]
) -> None:
    """The error of a lost connection is the first one, not that of going on without it."""
    database = make_database(driver)
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, database.url)
        with isolated(manager), manager.session_factory(database.url) as session:
            write(session, "lost")
            kill_connection(session, database)
            with pytest.raises(DBAPIError, match="terminating connection due to administrator"):
                session.scalar(text("SELECT 1"))


@pytest.mark.parametrize("driver", ["pymysql"])
def test_a_connection_that_cannot_begin_is_given_back(
    driver: str, make_database: Callable[..., Database]
) -> None:
    """When the isolation's transaction cannot begin, its connection is not kept checked out."""
    database = make_database(driver)

    def kill(connection: Any, *_: object) -> None:
        database.server.kill(connection.thread_id())

    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, database.url)
        pool = manager.get_engine(database.url).pool
        with isolated(manager):
            event.listen(pool, "checkout", kill)
            with pytest.raises(Exception, match=r"Lost connection|gone away|killed") as caught:
                manager.get_engine(database.url).connect()
            assert pool.checkedout() == 0
            del caught
            event.remove(pool, "checkout", kill)
            add(manager, database.url, "inside")
        assert names(manager, database.url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg"])
def test_a_server_that_is_away_at_the_end_is_no_error(
    manager_class: ManagerClass, driver: str, make_database: Callable[..., Database]
) -> None:
    """The rollback of a connection that was lost unnoticed has happened already."""
    database = make_database(driver)
    with manager_class(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, database.url)
        with undone(manager), manager.session_factory(database.url) as session:
            write(session, "committed")
            session.commit()
            kill_connection(session, database)
        assert names(manager, database.url) == BEFORE


@pytest.mark.parametrize("driver", ["file"])
def test_a_commit_behind_a_transaction_is_told(filled: SessionManager, blank_url: str) -> None:
    """Once the SQLite driver has committed, whoever ends a transaction hears of it."""
    isolation = isolated(filled)
    isolation.begin()
    with filled.session_factory(blank_url) as session:
        write(session, "kept")
        session.connection().connection.driver_connection.commit()
        with pytest.raises(IsolationError, match="its transaction had ended"):
            session.commit()
    isolation.end()
    assert names(filled, blank_url) == [*BEFORE, "kept"]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "AUTOCOMMIT"])
@pytest.mark.parametrize("driver", ["file"])
def test_a_transaction_that_sqlite_ends_is_told(
    filled: SessionManager, blank_url: str, level: str
) -> None:
    """After OR ROLLBACK nothing is written any more: it would be committed."""
    with isolated(filled):
        with filled.get_engine(blank_url).connect() as plain:
            connection = plain.execution_options(isolation_level=level)
            again = text("INSERT OR ROLLBACK INTO item (name, count) VALUES ('before', 0)")
            with pytest.raises(DBAPIError):
                connection.execute(again)
        with pytest.raises(IsolationError, match="has ended the transaction"):
            names(filled, blank_url)
    assert names(filled, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["file"])
def test_managers_may_be_closed_inside(filled: SessionManager, blank_url: str) -> None:
    """A manager that is closed, or lets an engine go, while isolated leaves nothing open."""
    engine = filled.get_engine(blank_url)
    with isolated(filled):
        add(filled, blank_url, "inside")
        filled.invalidate(blank_url)
        assert names(filled, blank_url) == [*BEFORE, "inside"]
        filled.close()
    assert engine.pool.checkedin() == 0
    with create_engine(blank_url, poolclass=NullPool).connect() as connection:
        assert connection.scalars(text("SELECT name FROM item")).all() == BEFORE


@pytest.mark.parametrize("driver", ["file"])
def test_other_programs_wait_for_the_end(filled: SessionManager, blank_url: str) -> None:
    """What is not isolated does not see what is done inside, and is as free as ever afterwards."""
    with SessionManager(engine_options={"sqlite_busy_timeout": 0}) as other:
        with isolated(filled):
            add(filled, blank_url, "inside")
            assert names(other, blank_url) == BEFORE
            with pytest.raises(OperationalError, match="locked"):
                add(other, blank_url, "too early")
        add(other, blank_url, "outside")
        assert names(filled, blank_url) == [*BEFORE, "outside"]


@pytest.mark.parametrize("driver", ["asyncpg", "asyncmy", "file"])
def test_a_loop_of_another_thread_rolls_back(
    driver: str, make_database: Callable[..., Database], tmp_path: Path
) -> None:
    """As with a server in a thread of the test's: its loop undoes what was done in it."""
    blank_url = make_url(driver, make_database, tmp_path, "sqlite+aiosqlite")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def write_item(manager: AsyncSessionManager, name: str) -> list[str]:
        async with manager.begin(blank_url) as session:
            session.add(Item(name=name))
        async with await manager.session_factory(blank_url) as session:
            return await session.run_sync(item_names)

    try:
        manager = AsyncSessionManager(metadata=ItemBase.metadata, pooling="always")
        assert wait(write_item(manager, "before")) == BEFORE
        with isolated(manager):
            assert wait(write_item(manager, "inside")) == [*BEFORE, "inside"]
        assert wait(write_item(manager, "outside")) == [*BEFORE, "outside"]
        wait(manager.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg-async", "asyncmy"])
def test_cancelled_statements_are_told(driver: str, make_database: Callable[..., Database]) -> None:
    """A cancelled statement ends the isolation's connection; the end puts all back."""
    database = make_database(driver)
    sleep = "SELECT pg_sleep(30)" if database.is_postgresql else "SELECT sleep(30)"

    async def work() -> None:
        async with AsyncSessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
            async with isolated(manager):
                with pytest.raises(asyncio.TimeoutError):
                    async with manager.begin(database.url) as session:
                        await asyncio.wait_for(session.execute(text(sleep)), 0.1)
                with pytest.raises(IsolationError, match=r"was lost \(CancelledError\)"):
                    async with manager.begin(database.url) as session:
                        await session.execute(text("SELECT 1"))
            async with manager.begin(database.url) as session:
                assert await session.run_sync(item_names) == []

    asyncio.run(work())


def test_commit_behind_its_back_is_told(tmp_path: Path) -> None:
    """What the SQLite driver itself has committed is not undone: the end of the block says so."""
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        blank_url = f"sqlite:///{tmp_path / 'file.db'}"
        fill(manager, blank_url)
        with (
            pytest.raises(IsolationError, match=r"still be there.*executescript\(\)"),
            isolated(manager),
            manager.get_engine(blank_url).connect() as connection,
        ):
            connection.connection.cursor().executescript("UPDATE item SET name = 'stays'")
        assert names(manager, blank_url) == ["stays"]  # and the manager goes on


@pytest.mark.parametrize("driver", ["pymysql", "mysqlclient"])
def test_end_waits_for_a_statement(driver: str, make_database: Callable[..., Database]) -> None:
    """A thread that is in the midst of a statement gets its answer, and the connection lives."""
    database = make_database(driver)
    elsewhere = create_engine(database.url, poolclass=NullPool)
    answers: list[Any] = []
    with SessionManager(pooling="always") as manager, elsewhere.connect() as other:
        before = pooled_connection(manager, database)
        other.execute(text(f"SELECT get_lock('{database.name}', 0)"))
        isolation = isolated(manager)
        isolation.begin()

        def wait_for_lock() -> None:
            with manager.session_factory(database.url) as session:
                lock = text(f"SELECT get_lock('{database.name}', 60)")
                answers.append(session.scalar(lock))

        threads = [threading.Thread(target=each) for each in (wait_for_lock, isolation.end)]
        threads[0].start()
        running = "SELECT count(*) FROM information_schema.processlist WHERE info LIKE '%, 60)'"
        wait_until(lambda: other.scalar(text(running)))
        threads[1].start()
        threads[1].join(0.2)  # what does not wait comes in between now
        other.execute(text(f"SELECT release_lock('{database.name}')"))
        for thread in threads:
            thread.join()
        assert answers == [1]
        assert pooled_connection(manager, database) == before


def pooled_connection(manager: SessionManager, database: Database) -> int:
    """Return the id of the connection that a session gets."""
    with manager.session_factory(database.url) as session:
        return connection_id(session)

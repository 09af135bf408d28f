"""Isolation: whatever a test does on a manager's databases is undone, and nobody notices."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from sessionmgr import SessionManager
from tests.concurrency import in_threads
from tests.isolation_helpers import BEFORE, add, fill, names, undone, write
from tests.items import Item, ItemBase, connection_id, item_names, open_transactions
from tests.servers import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

    from tests.async_facade import ManagerClass
    from tests.servers import Database

pytest_plugins = ["tests.isolation_fixtures"]

ALL = [*DRIVERS, "file", "memory"]

ONE_OF_EACH = ["psycopg", "pymysql", "file"]
"""A driver for each kind of server, for what does not depend on the driver."""


def make_manager(manager_class: Any, **options: Any) -> Any:
    """Make a manager of items that keeps its connections."""
    return manager_class(metadata=ItemBase.metadata, pooling="always", **options)


@pytest.mark.parametrize("driver", ALL)
def test_what_is_committed_is_undone(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """Sessions and connections commit, nest, fail and go on; afterwards all is as it was."""
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        engine = manager.get_engine(blank_url)
        pool, dialect_class = engine.pool, type(engine.dialect)
        with undone(manager):
            with manager.begin(blank_url) as session:
                session.add(Item(name="outer"))
                session.flush()
                with pytest.raises(IntegrityError), session.begin_nested():
                    write(session, "before")
                with session.begin_nested():
                    session.add(Item(name="nested"))
            with engine.begin() as connection:
                connection.execute(insert(Item), [{"name": "core", "count": n} for n in (1,)])
            with engine.connect() as connection:
                connection.execute(insert(Item).values(name="not committed", count=0))
            with manager.session_factory(blank_url) as session:
                session.add(Item(name="rolled back"))
                session.flush()
                session.rollback()
                assert item_names(session) == [*BEFORE, "core", "nested", "outer"]
        assert (engine.pool, type(engine.dialect)) == (pool, dialect_class)
        assert names(manager, blank_url) == BEFORE
        add(manager, blank_url, "after")
        assert names(manager, blank_url) == ["after", *BEFORE]


@pytest.mark.parametrize("driver", ALL)
def test_failures_are_handled_as_ever(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """After an error and a rollback the same session and others go on; committed work stays."""
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        with undone(manager):
            add(manager, blank_url, "first")
            with manager.session_factory(blank_url) as session:
                session.add(Item(name="lost"))
                session.flush()
                session.add(Item(name="first"))
                with pytest.raises(IntegrityError):
                    session.commit()
                session.rollback()
                with pytest.raises(DBAPIError, match="no_such"):
                    session.execute(text("SELECT * FROM no_such"))
                assert names(manager, blank_url) == [*BEFORE, "first"]  # another does not mind
                session.rollback()
                session.add(Item(name="second"))
                session.commit()
            assert names(manager, blank_url) == [*BEFORE, "first", "second"]
        assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_aborted_transactions_stay_aborted(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """A forgotten rollback is found here as it would be on the server, whose commit undoes, too."""
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        with undone(manager), manager.get_engine(blank_url).connect() as connection:
            connection.execute(insert(Item).values(name="lost", count=0))
            with pytest.raises(DBAPIError):
                connection.execute(text("SELECT * FROM no_such"))
            with pytest.raises(DBAPIError, match="transaction is aborted"):
                connection.execute(select(Item.id))
            with pytest.raises(DBAPIError, match="transaction is aborted"):
                connection.begin_nested()
            add(manager, blank_url, "another's")
            connection.commit()
            assert names(manager, blank_url) == ["another's", *BEFORE]
            nested = connection.begin_nested()
            with pytest.raises(DBAPIError):
                connection.execute(text("SELECT * FROM no_such"))
            with pytest.raises(DBAPIError, match="transaction is aborted"):
                connection.exec_driver_sql("RELEASE SAVEPOINT sa_savepoint_2")
            nested.rollback()
            assert connection.scalar(select(Item.name).where(Item.name == "before")) == "before"


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_who_only_reads_undoes_nothing(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """A session that has read, and ends after another has committed, leaves that as it is."""
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        with undone(manager):
            with manager.session_factory(blank_url) as reader:
                assert item_names(reader) == BEFORE
                add(manager, blank_url, "written meanwhile")
                reader.rollback()
                assert item_names(reader) == [*BEFORE, "written meanwhile"]
            assert names(manager, blank_url) == [*BEFORE, "written meanwhile"]


@pytest.mark.parametrize("driver", ["psycopg", "file"])
def test_two_databases_and_engines_made_inside(
    manager_class: ManagerClass, driver: str, blank_url: str | URL, tmp_path: Path, sqlite: str
) -> None:
    """Databases that are first asked for inside are undone, too; so are bind keys of one URL."""
    other = f"{sqlite}:///{tmp_path}/other.db"
    binds = {"one": blank_url, "same": blank_url, "other": other}
    with make_manager(manager_class, binds=binds) as manager:
        fill(manager, "one")
        with undone(manager):
            add(manager, "one", "by one key")
            add(manager, "same", "by another")
            add(manager, "other", "elsewhere")
            assert names(manager, "one") == [*BEFORE, "by another", "by one key"]
            assert names(manager, "other") == ["elsewhere"]
            manager.dispose()
            assert names(manager, "one") == [*BEFORE, "by another", "by one key"]
        assert names(manager, "one") == names(manager, "same") == BEFORE
        assert names(manager, "other") == []


@pytest.mark.parametrize("driver", ["psycopg", "file", "memory"])
def test_tables_made_inside_are_forgotten(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """Tables that were created inside are gone, and created again when they are wanted."""
    with make_manager(manager_class) as manager:
        engine = manager.get_engine(blank_url)
        with undone(manager):
            add(manager, blank_url, "inside")
            assert manager.prepared
        assert not manager.prepared
        with engine.connect() as connection:
            assert inspect(connection).get_table_names() == []
        add(manager, blank_url, "outside")
        assert names(manager, blank_url) == ["outside"]


@pytest.mark.parametrize("driver", ["pymysql"])
def test_tables_are_made_before_where_ddl_commits(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """On MariaDB the manager's tables are there before the first statement, and stay."""
    with make_manager(manager_class) as manager:
        with undone(manager):
            add(manager, blank_url, "inside")
        assert manager.prepared
        assert names(manager, blank_url) == []


@pytest.mark.parametrize("driver", ALL)
def test_threads_share_the_connection(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """Threads, or tasks, write and read at once: nothing is lost, and all is undone."""
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)

        def work(position: int) -> int:
            for turn in range(5):
                with manager.get_engine(blank_url).begin() as connection:
                    name = f"{position} {turn}"
                    connection.execute(insert(Item).values(name=name, count=0))
                names(manager, blank_url)
            return position

        with undone(manager):
            assert in_threads([lambda n=n: work(n) for n in range(4)]) == list(range(4))
            assert len(names(manager, blank_url)) == 21
        assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_work_is_tried_again(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """`run` undoes an attempt that failed for a passing reason, and makes another."""
    attempts = []

    def work(session: Any) -> None:
        session.add(Item(name=f"attempt {len(attempts)}"))
        session.flush()
        attempts.append(session)
        if len(attempts) == 1:
            raise OperationalError("", {}, Exception("database is locked"))

    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        with undone(manager):
            manager.run(blank_url, work)
            assert names(manager, blank_url) == ["attempt 1", *BEFORE]
        assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("of_engine", [True, False], ids=["engine", "connection"])
@pytest.mark.parametrize("driver", [*DRIVERS, "file"])
def test_autocommit_commits_each_statement(
    manager_class: ManagerClass, driver: str, blank_url: str | URL, of_engine: bool
) -> None:
    """In AUTOCOMMIT a rollback undoes nothing, a BEGIN of one's own does; the end undoes all."""
    options = {"isolation_level": "AUTOCOMMIT"} if of_engine else {}
    with make_manager(manager_class, engine_options=options) as manager:
        fill(manager, blank_url)
        with undone(manager), manager.get_engine(blank_url).connect() as plain:
            connection = plain.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(insert(Item).values(name="kept", count=0))
            with pytest.raises(IntegrityError):
                connection.execute(insert(Item).values(name="kept", count=0))
            connection.execute(insert(Item).values(name="kept, too", count=0))
            connection.rollback()
            connection.exec_driver_sql("BEGIN")
            connection.execute(insert(Item).values(name="undone", count=0))
            connection.exec_driver_sql("ROLLBACK")
            assert names(manager, blank_url) == [*BEFORE, "kept", "kept, too"]
        assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_nothing_is_left_on_the_server(
    manager_class: ManagerClass, driver: str, make_database: Callable[..., Database]
) -> None:
    """One connection and transaction while it lasts; none that is open afterwards."""
    database = make_database(driver)
    with make_manager(manager_class) as manager:
        fill(manager, database.url)
        with undone(manager):
            add(manager, database.url, "inside")
            with manager.session_factory(database.url) as one:
                with manager.session_factory(database.url) as two:
                    assert connection_id(one) == connection_id(two)
                assert open_transactions(database) == {connection_id(one)}
        assert open_transactions(database) == set()
        assert manager.stats().databases[0].checked_out == 0


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_statements_that_end_transactions_are_not_sent(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """COMMIT and ROLLBACK as text, and those of a raw connection, end no more than their own."""
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        with undone(manager):
            with manager.get_engine(blank_url).connect() as connection:
                connection.execute(insert(Item).values(name="kept", count=0))
                connection.exec_driver_sql("COMMIT")
                connection.execute(insert(Item).values(name="undone", count=0))
                connection.exec_driver_sql("ROLLBACK")
            raw = manager.get_engine(blank_url).raw_connection()
            raw.commit()
            raw.rollback()
            raw.close()
            assert names(manager, blank_url) == [*BEFORE, "kept"]
        assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_isolation_levels_as_text(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """SET TRANSACTION is not sent: all is one transaction, which has begun."""
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        with undone(manager), manager.session_factory(blank_url) as session:
            session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
            assert item_names(session) == BEFORE


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_many_rows_at_once_are_undone(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """A statement that the driver is given for many rows is rolled back as any other."""
    statement = text("INSERT INTO item (name, count) VALUES (:name, 0)")
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        with undone(manager), manager.get_engine(blank_url).connect() as connection:
            connection.execute(statement, [{"name": name} for name in "ab"])
            connection.rollback()
            assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_engines_of_one_database_know_their_server(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """The second engine of a database takes the first one's connection, and asks the same."""
    with make_manager(manager_class, binds={"one": blank_url, "same": blank_url}) as manager:
        fill(manager, "one")
        manager.dispose()
        with undone(manager):
            assert names(manager, "one") == names(manager, "same") == BEFORE
            engines = [manager.get_engine(key) for key in ("one", "same")]
            one, same = (engine.dialect.server_version_info for engine in engines)
            assert one == same


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_detached_connections_are_undone(
    manager_class: ManagerClass, driver: str, blank_url: str | URL
) -> None:
    """A connection that is taken out of the pool rolls back its own, as all others."""
    with make_manager(manager_class) as manager:
        fill(manager, blank_url)
        with undone(manager):
            add(manager, blank_url, "kept")
            with manager.get_engine(blank_url).connect() as connection:
                connection.detach()
                connection.execute(insert(Item).values(name="undone", count=0))
                connection.rollback()
            assert names(manager, blank_url) == [*BEFORE, "kept"]
        assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg", "file"])
def test_collected_sessions_are_rolled_back(driver: str, blank_url: str | URL) -> None:
    """A connection that nobody has closed is rolled back before the next statement."""
    with make_manager(SessionManager) as manager:
        fill(manager, blank_url)
        with undone(manager):
            session = manager.session_factory(blank_url)
            session.add(Item(name="forgotten"))
            session.flush()
            del session
            gc.collect()
            assert names(manager, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["psycopg", "mysqlclient", "file"])
def test_sessions_left_open_end_with_the_isolation(driver: str, blank_url: str | URL) -> None:
    """A session that outlives its isolation does nothing to what comes after it."""
    with make_manager(SessionManager) as manager:
        fill(manager, blank_url)
        with undone(manager):
            left = manager.session_factory(blank_url)
            left.add(Item(name="left"))
            left.flush()
        with pytest.raises(Exception, match="an isolation that has ended"):
            left.scalar(select(Item.id))
        left.close()
        assert names(manager, blank_url) == BEFORE


def test_memory_databases_of_one_url_stay_apart(manager_class: ManagerClass, sqlite: str) -> None:
    """Each bind key has its own database in memory, isolated or not."""
    binds = {"one": f"{sqlite}://", "two": f"{sqlite}://"}
    with make_manager(manager_class, binds=binds) as manager:
        fill(manager, "one")
        with undone(manager):
            add(manager, "two", "mine")
            assert (names(manager, "one"), names(manager, "two")) == (BEFORE, ["mine"])
        assert (names(manager, "one"), names(manager, "two")) == (BEFORE, [])

"""Which errors pass by themselves: real ones, as each driver raises them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from sessionmgr import is_transient
from sessionmgr.transient import is_contention, is_creation_race, is_full, is_lost
from tests.helpers import wait_until
from tests.items import connection_id
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL, Connection

    from tests.servers import Database
    from tests.servers.mariadb import MariaDB
    from tests.servers.postgresql import PostgreSQL

POSTGRESQL = pytest.mark.parametrize("database", ["psycopg", "psycopg2"], indirect=True)
MYSQL = pytest.mark.parametrize("database", ["pymysql", "mysqlclient"], indirect=True)


def connect_error(url: URL) -> DBAPIError:
    """Return the error of an attempt to connect."""
    with pytest.raises(DBAPIError) as caught:
        create_engine(url, poolclass=NullPool).connect()
    return caught.value


def connected(url: URL) -> Connection:
    """Return a connection, as soon as the server has let go of those that have just been closed."""

    def attempt() -> Connection | None:
        with contextlib.suppress(OperationalError):
            return create_engine(url, poolclass=NullPool).connect()
        return None

    return wait_until(attempt, message="a free slot")


def error_of(database: Database, *statements: str) -> DBAPIError:
    """Return the error of the last of some statements, in one transaction."""
    with create_engine(database.url, poolclass=NullPool).connect() as connection:
        for statement in statements[:-1]:
            connection.execute(text(statement))
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text(statements[-1]))
    return caught.value


def kinds(error: DBAPIError) -> set[str]:
    """Return what an error is taken for."""
    found = {
        "contention": is_contention,
        "full": is_full,
        "lost": is_lost,
        "race": is_creation_race,
    }
    kinds = {name for name, check in found.items() if check(error)}
    assert is_transient(error) is bool(kinds & {"contention", "full", "lost"})
    return kinds


@POSTGRESQL
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("40001", {"contention"}),
        ("40P01", {"contention"}),
        ("55P03", {"contention"}),
        ("08006", {"lost"}),
        ("53300", {"full"}),
        ("57P01", {"lost"}),
        ("57P02", {"lost"}),
        ("57P03", {"lost"}),
        ("57P05", {"lost"}),
        ("42P07", {"race"}),
        ("42710", {"race"}),
        ("42P06", {"race"}),
        ("23505", {"race"}),
        ("23503", set()),
        ("23514", set()),
        ("25P02", set()),
        ("42501", set()),
        ("42P01", set()),
        ("42601", set()),
        ("53100", set()),
        ("57014", set()),
        ("3D000", set()),
        ("28P01", set()),
        ("22012", set()),
    ],
)
def test_sqlstates_of_postgresql(database: Database, code: str, expected: set[str]) -> None:
    """PostgreSQL's errors are told apart by their SQLSTATE."""
    statement = f"DO $$ BEGIN RAISE EXCEPTION 'locked' USING ERRCODE = '{code}'; END $$"
    assert kinds(error_of(database, statement)) == expected


@MYSQL
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1205, {"contention"}),
        (1213, {"contention"}),
        (1020, {"contention"}),
        (1040, {"full"}),
        (1047, {"lost"}),
        (1053, {"lost"}),
        (1927, {"lost"}),
        (1050, {"race"}),
        (1061, {"race"}),
        (1007, {"race"}),
        (1826, {"race"}),
        (1062, set()),
        (1044, set()),
        (1045, set()),
        (1049, set()),
        (1064, set()),
        (1142, set()),
        (1146, set()),
        (1451, set()),
    ],
)
def test_numbers_of_mariadb(database: Database, number: int, expected: set[str]) -> None:
    """The errors of MySQL and MariaDB are told apart by their number."""
    statement = f"SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'locked'"
    assert kinds(error_of(database, statement)) == expected


def test_killed_connection_is_lost(database: Database) -> None:
    """A statement on a connection that the server ended tells of a lost connection."""
    with create_engine(database.url, poolclass=NullPool).connect() as connection:
        lost = connection_id(connection)
        database.server.kill(lost)
        wait_until(lambda: lost not in database.connections())
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text("SELECT 1"))
    assert kinds(caught.value) == {"lost"}


def test_cut_connection_is_lost(database: Database) -> None:
    """A statement on a connection that the network cut tells of a lost connection."""
    with (
        TCPProxy(database.url) as proxy,
        create_engine(proxy.url, poolclass=NullPool).connect() as connection,
    ):
        proxy.cut()
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text("SELECT 1"))
    assert kinds(caught.value) == {"lost"}


def test_refused_connect_is_lost(database: Database) -> None:
    """A server that does not listen may do so in a moment."""
    with TCPProxy(database.url) as proxy:
        proxy.refuse()
        assert kinds(connect_error(proxy.url)) == {"lost"}


@pytest.mark.parametrize(
    "change",
    [{"password": "wrong_password"}, {"database": "no_such_database"}, {"username": "nobody"}],
    ids=lambda change: next(iter(change)),
)
def test_hopeless_connect_is_not_transient(database: Database, change: dict[str, str]) -> None:
    """A wrong password, role or database stays wrong."""
    assert kinds(connect_error(database.url.set(**change))) == set()


@POSTGRESQL
def test_full_postgresql_is_full(database: Database) -> None:
    """A database that takes no more connections may take one in a moment."""
    database.server.query(f"ALTER DATABASE {database.name} CONNECTION LIMIT 1")
    with create_engine(database.url, poolclass=NullPool).connect():
        error = connect_error(database.url)
    assert "too many connections" in str(error)
    assert kinds(error) == {"full"}


def test_full_postgresql_server_is_full(
    private_postgresql: PostgreSQL, make_database: Callable[..., Database]
) -> None:
    """A server without a slot for an ordinary role may have one in a moment."""
    for setting in ("max_connections = 10", "superuser_reserved_connections = 9"):
        private_postgresql.query(f"ALTER SYSTEM SET {setting}")
    private_postgresql.query("ALTER SYSTEM SET reserved_connections = 0")
    private_postgresql.process.restart()
    urls = [make_database(driver, private_postgresql).url for driver in ("psycopg", "psycopg2")]
    with connected(urls[0]):
        assert [kinds(connect_error(url)) for url in urls] == [{"full"}] * 2


def test_full_mariadb_server_is_full(
    private_mariadb: MariaDB, make_database: Callable[..., Database]
) -> None:
    """A server that takes no more connections may take one in a moment."""
    urls = [make_database(driver, private_mariadb).url for driver in ("pymysql", "mysqlclient")]
    private_mariadb.query("SET GLOBAL max_connections = 10")  # the least; one more for a superuser
    with contextlib.ExitStack() as connections:
        for _ in range(10):
            connections.enter_context(connected(urls[0]))
        assert [kinds(connect_error(url)) for url in urls] == [{"full"}] * 2


@POSTGRESQL
def test_lock_timeout_is_contention(database: Database) -> None:
    """A lock that was not granted in time may be granted the next time."""
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.connect() as holder:
        holder.execute(text("SELECT pg_advisory_xact_lock(1)"))
        statements = ("SET LOCAL lock_timeout = '10ms'", "SELECT pg_advisory_xact_lock(1)")
        assert kinds(error_of(database, *statements)) == {"contention"}


def test_table_that_exists_is_a_race(database: Database) -> None:
    """Creating what is there already is what two processes at once see."""
    create = "CREATE TABLE twice (id INTEGER)"
    assert kinds(error_of(database, create, create)) == {"race"}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("CREATE TABLE twice (id INTEGER)", {"race"}),
        ("CREATE INDEX twice_id ON twice (id)", {"race"}),
        ("SELECT * FROM nowhere", set()),
        ("INSERT INTO twice VALUES ('database is locked', 'no')", set()),
        ("nonsense", set()),
    ],
    ids=["table", "index", "missing", "insert", "syntax"],
)
def test_texts_of_sqlite(statement: str, expected: set[str]) -> None:
    """SQLite's errors are told apart by their text."""
    with create_engine("sqlite://", poolclass=NullPool).connect() as connection:
        connection.execute(text("CREATE TABLE twice (id INTEGER)"))
        connection.execute(text("CREATE INDEX twice_id ON twice (id)"))
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text(statement))
    assert kinds(caught.value) == expected


def test_locked_sqlite_file_is_contention(tmp_path: Path) -> None:
    """A file that another connection writes to may be free in a moment."""
    url = f"sqlite:///{tmp_path / 'one.db'}"
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": 0})
    with engine.connect() as holder, engine.connect() as other:
        holder.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError) as caught:
            other.exec_driver_sql("BEGIN IMMEDIATE")
    assert kinds(caught.value) == {"contention"}


@pytest.mark.parametrize(
    "error",
    [LookupError(), TimeoutError(), ConnectionResetError(), SQLAlchemyError(), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_are_no_databases_are_not_transient(error: BaseException) -> None:
    """What no driver raised says nothing of the database."""
    assert not any(check(error) for check in (is_transient, is_full, is_lost, is_creation_race))

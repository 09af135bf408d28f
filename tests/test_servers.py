"""The test servers themselves: what the other tests rely on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from tests.conftest import leftover_processes
from tests.helpers import wait_until
from tests.servers import Servers
from tests.servers.process import reserved_port
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Database
    from tests.servers.mariadb import MariaDB
    from tests.servers.postgresql import PostgreSQL
    from tests.servers.redis import Redis

ROOT = Path(__file__).parents[1]

POSTGRESQL_DRIVERS = ["psycopg", "psycopg2"]

NEEDS_A_SERVER = """
from tests.servers.process import find_program

def test_of_no_such_server():
    find_program("no-such-server", "no-such-package")
"""

KILLED_RUN = """
import os, sys
from tests.servers import Servers
servers = Servers()
for kind in ("postgresql", "mariadb"):
    print(servers.shared(kind).process.pid, flush=True)
sys.stdin.read()
"""


def test_database_is_fresh_and_writable(database: Database) -> None:
    """Each driver gets a database in which it may create tables."""
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE fresh (id INTEGER PRIMARY KEY)"))
        assert connection.scalar(text("SELECT count(*) FROM fresh")) == 0


def test_connections_are_counted_and_killed(database: Database) -> None:
    """The server tells which connections a database has, and ends one on request."""
    engine = create_engine(database.url)
    assert database.connections() == set()
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        ids = database.connections()
        assert len(ids) == 1
        database.server.kill(*ids)
        wait_until(lambda: not database.connections())
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text("SELECT 1"))
        assert caught.value.connection_invalidated
    engine.dispose()


def test_connections_of_other_databases_are_not_counted(
    make_database: Callable[..., Database],
) -> None:
    """Two databases on one server are counted apart."""
    first, second = make_database("psycopg"), make_database("psycopg")
    engine = create_engine(first.url, poolclass=NullPool)
    with engine.connect():
        assert len(first.connections()) == 1
        assert second.connections() == set()


@pytest.mark.parametrize("driver", POSTGRESQL_DRIVERS)
def test_tls_server_refuses_connections_without_tls(
    tls_postgresql: PostgreSQL, make_database: Callable[..., Database], driver: str
) -> None:
    """The TLS server is there for `hostssl` connections and no others."""
    url = make_database(driver, tls_postgresql).url
    plain = create_engine(url.update_query_dict({"sslmode": "disable"}), poolclass=NullPool)
    with pytest.raises(OperationalError, match=r"no pg_hba\.conf entry"):
        plain.connect()
    secure = create_engine(url.update_query_dict({"sslmode": "require"}), poolclass=NullPool)
    with secure.connect() as connection:
        assert connection.scalar(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))


@pytest.mark.parametrize(
    ("fixture", "driver"),
    [("private_postgresql", "psycopg"), ("private_mariadb", "pymysql")],
    ids=["postgresql", "mariadb"],
)
def test_restart_keeps_data(
    request: pytest.FixtureRequest,
    make_database: Callable[..., Database],
    fixture: str,
    driver: str,
) -> None:
    """A private server restarts on the same port, with its data, as another process."""
    server = request.getfixturevalue(fixture)
    engine = create_engine(make_database(driver, server).url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (id INTEGER)"))
        connection.execute(text("INSERT INTO kept VALUES (7)"))
    pid = server.process.pid
    server.process.restart()
    assert server.process.pid != pid
    assert not psutil.pid_exists(pid)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT id FROM kept")) == 7


@pytest.mark.parametrize("driver", POSTGRESQL_DRIVERS)
def test_postgresql_log_tells_of_aborted_connections(
    make_database: Callable[..., Database], driver: str
) -> None:
    """A client that goes without a goodbye shows in PostgreSQL's log; a polite one does not."""
    database = make_database(driver)
    mark = database.server.log_mark()

    def unexpected_ends() -> list[str]:
        lines = database.server.log_text(mark).splitlines()
        return [line for line in lines if database.name in line and "unexpected EOF" in line]

    with TCPProxy(database.url) as proxy:
        engine = create_engine(proxy.url, poolclass=NullPool)
        engine.connect().close()
        wait_until(lambda: not database.connections())
        assert unexpected_ends() == []
        connection = engine.connect()
        proxy.cut()
        assert len(wait_until(unexpected_ends)) == 1
        connection.invalidate()
        connection.close()


def test_mariadb_counts_aborted_clients(
    private_mariadb: MariaDB, make_database: Callable[..., Database]
) -> None:
    """A client that goes without a goodbye moves MariaDB's counter; a polite one does not."""
    database = make_database("pymysql", private_mariadb)
    with TCPProxy(database.url) as proxy:
        engine = create_engine(proxy.url, poolclass=NullPool)
        engine.connect().close()
        wait_until(lambda: not database.connections())
        assert private_mariadb.status("Aborted_clients") == 0
        connection = engine.connect()
        proxy.cut()
        wait_until(lambda: private_mariadb.status("Aborted_clients") == 1)
        connection.invalidate()
        connection.close()


def test_proxy_cuts_open_connections_and_forwards_new_ones(database: Database) -> None:
    """A cut connection is a disconnect to SQLAlchemy, and the server lets it go."""
    with TCPProxy(database.url) as proxy:
        engine = create_engine(proxy.url)
        with engine.connect() as connection:
            assert len(database.connections()) == 1
            proxy.cut()
            with pytest.raises(DBAPIError) as caught:
                connection.execute(text("SELECT 1"))
            assert caught.value.connection_invalidated
            wait_until(lambda: not database.connections())
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
        engine.dispose()


def test_proxy_refuses_and_accepts(make_database: Callable[..., Database]) -> None:
    """Refused means that nothing listens, until the proxy accepts again on the same port."""
    with TCPProxy(make_database("psycopg").url) as proxy:
        engine = create_engine(proxy.url, poolclass=NullPool)
        with engine.connect() as connection:
            proxy.refuse()
            with pytest.raises(OperationalError, match="refused"):
                engine.connect()
            assert connection.scalar(text("SELECT 1")) == 1
        proxy.accept()
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1


def test_proxy_stalls_and_resumes(make_database: Callable[..., Database]) -> None:
    """A stalled connection stays open without an answer."""
    url = make_database("pymysql").url.update_query_dict({"read_timeout": "1"})
    with TCPProxy(url) as proxy:
        engine = create_engine(proxy.url, poolclass=NullPool)
        with engine.connect() as connection:
            proxy.stall()
            with pytest.raises(DBAPIError, match="timed out"):
                connection.execute(text("SELECT 1"))
            proxy.resume()
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1


def test_redis_answers(redis_server: Redis) -> None:
    """The Redis server is up."""
    assert redis_server.answers()


def test_servers_end_with_a_killed_test_run() -> None:
    """Servers whose test run gets SIGKILL are gone soon after."""
    # Its files stay: here they are in a directory that goes with this test.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)  # for the servers' user to pass through
        with subprocess.Popen(
            [sys.executable, "-c", KILLED_RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TMPDIR": directory},
        ) as run:
            assert run.stdout is not None
            pids = [int(run.stdout.readline()) for _ in range(2)]
            assert all(psutil.pid_exists(pid) for pid in pids)
            run.kill()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_reserved_port_is_for_one_server() -> None:
    """A reserved port can be listened on, and not be reserved again, also between two servers."""
    with reserved_port() as port, socket.socket() as other:
        for _ in range(2):
            with socket.create_server(("127.0.0.1", port)):
                with socket.create_connection(("127.0.0.1", port)):
                    pass
                with pytest.raises(OSError, match="in use"):
                    other.bind(("127.0.0.1", port))
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_server_of_somebody_else_is_used(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A server that the environment names is used in place of one of ours, and left running."""
    running = request.getfixturevalue(kind)
    url = running.admin.render_as_string(hide_password=False)
    monkeypatch.setenv(f"SESSIONMGR_TEST_{'MYSQL' if kind == 'mariadb' else 'POSTGRESQL'}_URL", url)
    mine = Servers()
    used = mine.shared(kind)
    assert (used.admin, used.log) == (running.admin, None)
    mine.close()
    assert running.answers()


@pytest.mark.parametrize(
    ("environment", "status", "words"),
    [
        ({}, 0, ["1 skipped", "missing here, tests were skipped"]),
        ({"CI": "false"}, 0, ["1 skipped"]),
        ({"CI": "true"}, 1, ["1 failed"]),
    ],
    ids=["at home", "CI=false", "CI=true"],
)
def test_missing_server_fails_in_ci(
    tmp_path: Path, environment: dict[str, str], status: int, words: list[str]
) -> None:
    """For want of a server a test skips, and the end of the run says so; in CI it fails."""
    (tmp_path / "test_one.py").write_text(NEEDS_A_SERVER)
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", os.devnull, "test_one.py"],
        cwd=tmp_path,
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout
    for word in [*words, "no-such-server (Debian package no-such-package)"]:
        assert word in done.stdout


def test_leftover_processes_are_found() -> None:
    """A child counts as left behind while it runs and until it is waited for."""
    child = os.fork()
    if child == 0:
        signal.pause()
    assert [process.pid for process in leftover_processes()] == [child]
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    assert [process.pid for process in leftover_processes()] == [child]
    os.waitpid(child, 0)
    assert leftover_processes() == []


def test_helper_processes_are_not_leftovers() -> None:
    """The resource tracker that a spawned process brings may stay."""
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    assert leftover_processes() == []


def test_wait_until_tells_the_last_value() -> None:
    """A condition that never comes true is an error with its name and last value."""
    with pytest.raises(AssertionError, match=r"a train did not come true in 0 s: last value \[\]"):
        wait_until(list, timeout=0, message="a train")

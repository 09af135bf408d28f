"""Fixtures: real servers, a fresh database for each test, and no process left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import signal
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import sqlalchemy

from sessionmgr import SessionManager
from tests.async_facade import BlockingManager, event_loop, in_test_loop, twin
from tests.helpers import wait_until
from tests.servers import ASYNC_DRIVERS, DRIVERS, TWINS, Database, MissingServerError, Servers
from tests.servers.process import MISSING, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL

    from tests.async_facade import ManagerClass
    from tests.servers.mariadb import MariaDB
    from tests.servers.postgresql import PostgreSQL
    from tests.servers.redis import Redis

HELPER_PROCESSES = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "billiard.semaphore_tracker",
    "billiard.forkserver",
)
"""Modules in the command lines of processes that the standard library and billiard start once and
keep until the interpreter exits."""

collect_ignore = ["data"]  # an application's own tests, which are run in a copy of it

SERVERS = pytest.StashKey[Servers]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the run's servers known; nothing is started yet."""
    # Each connect of PyMySQL's loads the certificates of all authorities: 30 ms for servers that
    # have none. Children inherit this.
    os.environ["SSL_CERT_FILE"] = os.devnull
    # A shell's background job ignores Ctrl-C, and so would all that the tests start from there.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker_input = getattr(config, "workerinput", {})
    config.stash[SERVERS] = servers = Servers(worker_input.get("servers"))
    config.add_cleanup(servers.close)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Start the shared servers in the xdist controller and give a worker their addresses."""
    node.workerinput["servers"] = node.config.stash[SERVERS].addresses()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longest: at the end, one would keep a single core busy.

    Cases of AsyncSessionManager that a test does not want are left out.
    """
    items[:] = filter(is_wanted, items)
    items.sort(key=time_allowed, reverse=True)


def is_wanted(item: pytest.Item) -> bool:
    """Return whether a case for AsyncSessionManager is among the ``twin_cases`` of its test."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("manager_class") != "async":
        return True
    wanted = [pair for mark in item.iter_markers("twin_cases") for pair in mark.kwargs.items()]
    return all(parameters[name] in values for name, values in wanted if name in parameters)


def time_allowed(item: pytest.Item) -> float:
    """Return the timeout of a test that has one of its own, in seconds, else 0."""
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0


def pytest_report_header() -> str:
    """Name what the tests run on."""
    return f"sqlalchemy: {sqlalchemy.__version__}, python: {platform.python_version()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the servers and drivers for want of which tests were skipped."""
    reasons = {report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])}
    missing = sorted(text.split(MISSING, 1)[1] for text in reasons if MISSING in text)
    if missing:
        terminalreporter.section("missing here, tests were skipped", yellow=True)
        terminalreporter.write_line("\n".join(missing))


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Servers:
    """Return the servers of this test run."""
    return request.config.stash[SERVERS]


@pytest.fixture(scope="session")
def postgresql(servers: Servers) -> PostgreSQL:
    """Return the PostgreSQL server that all tests share: a test uses databases of its own."""
    return servers.shared("postgresql")


@pytest.fixture(scope="session")
def mariadb(servers: Servers) -> MariaDB:
    """Return the MariaDB server that all tests share: a test uses databases of its own."""
    return servers.shared("mariadb")


@pytest.fixture
def private_postgresql(servers: Servers) -> Iterator[PostgreSQL]:
    """Run a PostgreSQL server for one test, which may restart it and change its settings."""
    with servers.private("postgresql") as server:
        yield server


@pytest.fixture
def private_mariadb(servers: Servers) -> Iterator[MariaDB]:
    """Run a MariaDB server for one test, which may restart it and change its settings."""
    with servers.private("mariadb") as server:
        yield server


@pytest.fixture(scope="session")
def tls_postgresql(servers: Servers) -> Iterator[PostgreSQL]:
    """Run a PostgreSQL server that refuses TCP connections without TLS (``hostssl`` only)."""
    with servers.private("postgresql", tls=True) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(servers: Servers) -> Iterator[Redis]:
    """Run a Redis server."""
    with servers.redis() as server:
        yield server


@pytest.fixture
def make_database(request: pytest.FixtureRequest) -> Iterator[Callable[..., Database]]:
    """Return a function that creates a database, which is dropped after the test.

    ``make_database(driver, server=None)``: the driver is one of
    :data:`~tests.servers.server.DRIVERS`, and stands for its twin in a test that is run for
    AsyncSessionManager; or one of :data:`~tests.servers.server.ASYNC_DRIVERS`. Without a server it
    is the shared one of its kind; on another the database stays, and goes with the server.
    """
    drops = contextlib.ExitStack()

    def make(driver: str, server: PostgreSQL | MariaDB | None = None) -> Database:
        if is_async(request):
            driver = TWINS[driver]
        dialect = (DRIVERS | ASYNC_DRIVERS)[driver]
        module = dialect.split("+")[1].replace("mysqldb", "MySQLdb")
        if importlib.util.find_spec(module) is None:
            raise MissingServerError(f"driver {driver}")
        if server is not None:
            return Database(server, server.create_database(), driver)
        kind = "postgresql" if dialect.startswith("postgresql") else "mariadb"
        shared = request.getfixturevalue(kind)
        database = Database(shared, shared.create_database(), driver)
        drops.callback(shared.drop_database, database.name)
        return database

    with drops:
        yield make


@pytest.fixture(params=["sync", "async"])
def manager_class(request: pytest.FixtureRequest) -> Iterator[ManagerClass]:
    """Return the class of managers: the test is run for SessionManager and its asynchronous twin.

    For that it is run in an event loop, see :mod:`tests.async_facade`, and its databases are
    reached by asynchronous drivers.
    """
    if request.param == "sync":
        yield SessionManager
        return
    with event_loop():
        yield BlockingManager


def is_async(request: pytest.FixtureRequest) -> bool:
    """Return whether a test is run for AsyncSessionManager."""
    return (
        "manager_class" in request.fixturenames
        and request.getfixturevalue("manager_class") is BlockingManager
    )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test in a greenlet of its event loop, if it has one."""
    if pyfuncitem.funcargs.get("manager_class") is not BlockingManager:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    in_test_loop(lambda: pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def sqlite(request: pytest.FixtureRequest) -> str:
    """Return what the URLs of SQLite databases begin with."""
    return "sqlite+aiosqlite" if is_async(request) else "sqlite"


@pytest.fixture
def as_twin(request: pytest.FixtureRequest) -> Callable[[str | URL], str | URL]:
    """Return what gives any URL an asynchronous driver, if the test is run for one."""
    return twin if is_async(request) else lambda url: url


@pytest.fixture(params=list(DRIVERS))
def database(request: pytest.FixtureRequest, make_database: Callable[..., Database]) -> Database:
    """Create a database for this test, once with each of the four drivers."""
    return make_database(request.param)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail a test that leaves a child process behind, running or not waited for."""
    yield
    try:
        wait_until(lambda: not leftover_processes(), timeout=5.0)
    except AssertionError:
        left = leftover_processes()
        for process in left:
            process.kill()
        pytest.fail(f"processes left behind: {[str(process) for process in left]}")


def leftover_processes() -> list[psutil.Process]:
    """Return our child processes and theirs, but for servers and helper processes."""
    left = []
    for child in psutil.Process().children():
        if child.pid in ServerProcess.pids:
            continue
        if not is_helper(child):
            left.append(child)
        with contextlib.suppress(psutil.NoSuchProcess):
            left += child.children(recursive=True)
    return left


def is_helper(process: psutil.Process) -> bool:
    """Return whether a process is one of :data:`HELPER_PROCESSES`."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:  # gone or a zombie
        return False
    return any(module in command for module in HELPER_PROCESSES)

"""Pooled connections that died while idle: replaced before anybody notices, at no cost to others.

Time is the tests' own here: connections age when a test says so, not when the machine is slow.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from tests.concurrency import in_child, in_threads
from tests.counting import database_to_count, ping_counter
from tests.helpers import wait_until
from tests.items import connection_id
from tests.servers import DRIVERS
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL

    from sessionmgr import DatabaseStats, SessionManager
    from tests.async_facade import ManagerClass
    from tests.servers import Database

WINDOW = 1.0
"""Seconds idle after which a connection is tested by default."""


class Clock:
    """A clock that stands still until it is put forward."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock by which connections are idle in this test."""
    clock = Clock()
    monkeypatch.setattr("sessionmgr.monitor.monotonic", clock)
    return clock


@pytest.fixture(params=list(DRIVERS))
def own_database(
    request: pytest.FixtureRequest, make_database: Callable[..., Database]
) -> Database:
    """Create a database, on a server of the test's own, once with each of the four drivers."""
    kind = "postgresql" if request.param.startswith("psycopg") else "mariadb"
    return make_database(request.param, request.getfixturevalue(f"private_{kind}"))


@pytest.fixture(params=list(DRIVERS))
def counted(request: pytest.FixtureRequest) -> Database:
    """Create a database whose tests can be counted, once with each of the four drivers."""
    return database_to_count(request, request.param)


# one driver per kind of server
one_driver_each = ["psycopg", "pymysql"]


@pytest.fixture
def worker_manager(manager_class: ManagerClass) -> Callable[..., SessionManager]:
    """Return a function that gives a manager which pools in this process, with engine options."""
    return lambda **engine_options: manager_class(pooling="always", engine_options=engine_options)


def work(manager: SessionManager, url: URL) -> int:
    """Do a unit of work, which is no ``SELECT 1``, and return the server's id of its connection."""
    with manager.session_factory(url) as session:
        assert session.scalar(select(7)) == 7
        return connection_id(session)


def work_side_by_side(manager: SessionManager, url: URL, sessions: int = 3) -> set[int]:
    """Do units of work at the same time, on a connection each, and return the server's ids."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(manager.session_factory(url)) for _ in range(sessions)]
        ids = {connection_id(session) for session in opened}
    assert len(ids) == sessions
    return ids


def stats_of(manager: SessionManager) -> DatabaseStats:
    """Return the statistics of the manager's only database."""
    [stats] = manager.stats().databases
    return stats


def assert_replaced(
    manager: SessionManager, url: URL, clock: Clock, lost: int, reached: Database
) -> None:
    """Assert that work after the window succeeds, with one test, on connections all of them new.

    :param lost: how many idle connections were lost.
    :param reached: whose server to ask which connections there are.
    """
    before = stats_of(manager)
    clock.forward(WINDOW)
    assert work_side_by_side(manager, url, lost) == reached.connections()
    after = stats_of(manager)
    # One dead connection tells of all the others.
    assert after.tests == before.tests + 1
    assert after.replaced == before.replaced + 1
    assert after.connects == before.connects + lost


def test_killed_connections_are_replaced(
    clock: Clock, database: Database, worker_manager: Callable[..., SessionManager]
) -> None:
    """After `pg_terminate_backend` or `KILL` the next units of work succeed without an error."""
    with worker_manager() as manager:
        idle = work_side_by_side(manager, database.url)
        database.server.kill(*idle)
        wait_until(lambda: not database.connections())
        assert_replaced(manager, database.url, clock, len(idle), database)


def test_connections_idle_for_too_long_are_replaced(
    clock: Clock, database: Database, worker_manager: Callable[..., SessionManager]
) -> None:
    """After the server's own idle timeout the next unit of work succeeds without an error."""
    postgresql = database.is_postgresql
    limit = "idle_session_timeout = 1000" if postgresql else "wait_timeout = 1"
    with worker_manager() as manager:
        with manager.begin(database.url) as session:
            idle = {connection_id(session)}
            session.execute(text(f"SET SESSION {limit}"))  # last: the server's clock runs from here
        wait_until(lambda: not database.connections())
        assert_replaced(manager, database.url, clock, len(idle), database)


@pytest.mark.twin_cases(own_database=["psycopg", "pymysql"])
def test_connections_to_a_restarted_server_are_replaced(
    clock: Clock,
    own_database: Database,
    worker_manager: Callable[..., SessionManager],
) -> None:
    """After a restart none of the idle connections causes an error."""
    with worker_manager(pool_size=10) as manager:
        idle = work_side_by_side(manager, own_database.url, sessions=10)
        own_database.server.process.restart()
        assert_replaced(manager, own_database.url, clock, len(idle), own_database)


def test_connections_cut_on_the_way_are_replaced(
    clock: Clock, database: Database, worker_manager: Callable[..., SessionManager]
) -> None:
    """A network that dropped the connections meanwhile causes no error."""
    with TCPProxy(database.url) as proxy, worker_manager() as manager:
        idle = work_side_by_side(manager, proxy.url)
        proxy.cut()
        wait_until(lambda: not database.connections())
        assert_replaced(manager, proxy.url, clock, len(idle), database)


def test_worker_replaces_killed_connections(
    clock: Clock, database: Database, manager_class: ManagerClass
) -> None:
    """A forked worker, which pools by itself, replaces its connections in the same way."""
    manager = manager_class()

    def worker() -> None:
        with manager:
            idle = work_side_by_side(manager, database.url)
            database.server.kill(*idle)
            wait_until(lambda: not database.connections())
            assert_replaced(manager, database.url, clock, len(idle), database)

    in_child(worker)


@pytest.mark.parametrize("own_database", one_driver_each, indirect=True)
def test_server_that_is_down_is_the_drivers_error(
    clock: Clock, own_database: Database, worker_manager: Callable[..., SessionManager]
) -> None:
    """While the server is down the driver's error tells; the first work after it succeeds."""
    with worker_manager() as manager:
        work_side_by_side(manager, own_database.url)
        own_database.server.process.stop()
        clock.forward(WINDOW)
        for _ in range(2):
            with pytest.raises(DBAPIError):
                work(manager, own_database.url)
        own_database.server.process.start()
        assert work(manager, own_database.url) in own_database.connections()
        assert stats_of(manager).checked_out == 0


def test_connection_that_is_alive_is_kept(
    clock: Clock, database: Database, worker_manager: Callable[..., SessionManager]
) -> None:
    """A test that succeeds changes nothing: the connection goes on, and is tested once."""
    with worker_manager() as manager:
        backend = work(manager, database.url)
        clock.forward(WINDOW)
        assert work(manager, database.url) == backend
        assert work(manager, database.url) == backend
        stats = stats_of(manager)
        assert (stats.tests, stats.replaced, stats.connects) == (1, 0, 1)


@pytest.mark.twin_cases(counted=["psycopg", "pymysql"])
def test_busy_connections_are_not_tested(
    clock: Clock, counted: Database, worker_manager: Callable[..., SessionManager]
) -> None:
    """Under load the server gets no test, only the work; after the window it gets one."""
    with ping_counter(counted) as pings, worker_manager() as manager:
        for _ in range(50):
            work(manager, counted.url)
            clock.forward(WINDOW * 0.99)
        clock.forward(-WINDOW * 0.99)
        in_threads([lambda: [work(manager, counted.url) for _ in range(50)]] * 4)
        assert pings() == 0
        assert stats_of(manager).tests == 0
        clock.forward(WINDOW)
        work(manager, counted.url)
        assert pings() == 1
        assert stats_of(manager).tests == 1


def test_long_unit_of_work_is_not_idle_time(
    clock: Clock, database: Database, worker_manager: Callable[..., SessionManager]
) -> None:
    """A connection is idle from its return on, however long it was in use."""
    with worker_manager() as manager:
        with manager.session_factory(database.url) as session:
            backend = connection_id(session)
            clock.forward(WINDOW * 10)
            assert connection_id(session) == backend
        assert work(manager, database.url) == backend
        assert stats_of(manager).tests == 0


@pytest.mark.parametrize(
    ("options", "call", "window"),
    [
        pytest.param({}, {}, WINDOW, id="default"),
        pytest.param({"ping_if_idle": 5.0}, {}, 5.0, id="ping_if_idle=5"),
        pytest.param({"pool_pre_ping": True}, {}, WINDOW, id="pool_pre_ping"),
        pytest.param({}, {"pool_pre_ping": True}, WINDOW, id="pool_pre_ping-of-the-call"),
        pytest.param({"ping_if_idle": 5.0}, {"pool_pre_ping": True}, 5.0, id="both"),
        pytest.param(
            {"ping_if_idle": None}, {"pool_pre_ping": True}, WINDOW, id="pool_pre_ping-over-never"
        ),
        pytest.param({"pool_pre_ping": False}, {"ping_if_idle": 0.5}, 0.5, id="over-no-pre-ping"),
    ],
)
@pytest.mark.parametrize("counted", ["psycopg2"], indirect=True)
@pytest.mark.twin_cases(window=[5.0])
def test_window(
    options: dict[str, Any],
    call: dict[str, Any],
    window: float,
    clock: Clock,
    counted: Database,
    worker_manager: Callable[..., SessionManager],
) -> None:
    """The server gets a test from so many seconds idle on; `pool_pre_ping=True` means the same."""
    with ping_counter(counted) as pings, worker_manager(**options) as manager:
        manager.get_engine(counted.url, **call)
        work(manager, counted.url)
        clock.forward(window * 0.99)
        work(manager, counted.url)
        assert pings() == 0
        clock.forward(window)
        work(manager, counted.url)
        assert pings() == stats_of(manager).tests == 1


@pytest.mark.twin_cases(counted=["psycopg"])
def test_no_window_tests_every_checkout(
    clock: Clock, counted: Database, worker_manager: Callable[..., SessionManager]
) -> None:
    """`ping_if_idle=0` tests a connection each time it is taken from the pool."""
    with ping_counter(counted) as pings, worker_manager(ping_if_idle=0) as manager:
        work(manager, counted.url)
        before = pings()
        for _ in range(5):
            work(manager, counted.url)
        assert pings() == before + 5 == stats_of(manager).tests


@pytest.mark.parametrize(
    "options", [{"ping_if_idle": None}, {"pool_pre_ping": False}], ids=["ping_if_idle", "pre_ping"]
)
@pytest.mark.parametrize("counted", one_driver_each, indirect=True)
@pytest.mark.twin_cases(counted=["psycopg"])
def test_tests_can_be_switched_off(
    options: dict[str, Any],
    clock: Clock,
    counted: Database,
    worker_manager: Callable[..., SessionManager],
) -> None:
    """`ping_if_idle=None` and `pool_pre_ping=False` never test: a dead connection is an error."""
    with ping_counter(counted) as pings, worker_manager(**options) as manager:
        backend = work(manager, counted.url)
        clock.forward(1e9)
        assert work(manager, counted.url) == backend
        counted.server.kill(backend)
        wait_until(lambda: not counted.connections())
        clock.forward(1e9)
        with pytest.raises(DBAPIError) as caught:
            work(manager, counted.url)
        assert caught.value.connection_invalidated
        work(manager, counted.url)
        assert pings() == stats_of(manager).tests == 0
        assert stats_of(manager).invalidated == 1

"""Stores that race, fork and lose their connections: nothing is raised, and nothing lost."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url

from sessionmgr import ResultStore, SessionManager, TaskResult
from tests.concurrency import in_both_phases, in_child, in_children, in_threads
from tests.counting import connection_counter, database_to_count
from tests.helpers import wait_until
from tests.results_helpers import RESULT_DRIVERS, be_elsewhere
from tests.schema_helpers import database_url
from tests.servers import DRIVERS, Database
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

STATES = ("STARTED", "RETRY", "FAILURE", "SUCCESS")


@pytest.fixture
def url(
    driver: str,
    make_database: Callable[..., Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> URL | str:
    """Return the URL of an empty database."""
    return database_url(be_elsewhere(driver, monkeypatch), make_database, tmp_path)


# -- races


def patience(driver: str) -> dict[str, Any]:
    """Return options of a store: updates before inserts have MySQL lock gaps, and deadlock."""
    return {"attempts": 20} if driver == "mysqlclient-elsewhere" else {}


# SQLite waits for the disk at each store: 10,000 take ten seconds here, and minutes elsewhere.
@pytest.mark.parametrize(
    ("driver", "stores", "ids"),
    [
        ("psycopg", 2500, 500),
        ("mysqlclient", 2500, 500),
        ("sqlite", 1000, 200),
        pytest.param("sqlite", 2500, 500, marks=[pytest.mark.soak, pytest.mark.timeout(600)]),
        ("psycopg-elsewhere", 500, 100),
        ("mysqlclient-elsewhere", 500, 100),
    ],
)
def test_racing_stores_end_in_success(url: URL | str, driver: str, stores: int, ids: int) -> None:
    """Four processes store the same tasks at once: nothing raises, the first SUCCESS stays."""
    store = ResultStore(url, **patience(driver))

    def race(process: int) -> dict[str, list[bytes]]:
        chance = random.Random(process)
        successes: dict[str, list[bytes]] = {}
        rounds = [number for _ in range(stores // ids) for number in chance.sample(range(ids), ids)]
        for turn, number in enumerate(rounds):
            # each task has its SUCCESS from one of them at least, sooner or later
            sure = number % 4 == process and turn >= ids
            state = "SUCCESS" if sure else chance.choice(STATES)
            result = f"{process}-{turn}".encode()
            if store.store(f"{number}", state, result) and state == "SUCCESS":
                successes.setdefault(f"{number}", []).append(result)
        return successes

    races = [lambda process=process: race(process) for process in range(4)]
    accepted = in_children(races, timeout=500.0)
    found = store.get_many(f"{number}" for number in range(ids))
    store.close()
    assert len(found) == ids
    for task_id, result in found.items():
        winners = [each for successes in accepted for each in successes.get(task_id, [])]
        assert (result.status, [result.result]) == ("SUCCESS", winners)


@pytest.mark.parametrize(
    ("driver", "rounds"),
    [
        ("psycopg", 5),
        ("mysqlclient", 2),
        ("sqlite", 3),
        ("psycopg-elsewhere", 2),
        ("mysqlclient-elsewhere", 1),
    ],
)
def test_racing_store_many_in_any_order(url: URL | str, driver: str, rounds: int) -> None:
    """Processes that store many of the same tasks, each in its own order, do not raise."""
    store = ResultStore(url, **patience(driver))
    ids = [f"{number}" for number in range(100 if "elsewhere" in driver else 300)]

    def race(process: int) -> None:
        chance = random.Random(process)
        for _ in range(rounds):
            chance.shuffle(ids)
            store.store_many(TaskResult(each, chance.choice(STATES), b"x") for each in ids)
        store.store_many(TaskResult(each, "SUCCESS") for each in ids)

    in_children([lambda process=process: race(process) for process in range(4)])
    found = store.get_many(ids)
    store.close()
    assert len(found) == len(ids)
    assert {each.status for each in found.values()} == {"SUCCESS"}


@pytest.mark.parametrize("driver", ["psycopg", "mysqlclient", "sqlite"])
def test_threads_share_a_store(url: URL | str) -> None:
    """Eight threads begin at once: the tables are looked at once, and each gets its answers."""
    with ResultStore(url) as store:

        def work(thread: int) -> bool:
            new = store.store(f"{thread}", "SUCCESS", str(thread).encode())
            found = store.get(f"{thread}")
            return new and found is not None and found.result == str(thread).encode()

        assert in_threads([lambda thread=thread: work(thread) for thread in range(8)]) == [True] * 8
        assert len(store.get_many(f"{thread}" for thread in range(8))) == 8


# -- forks


@pytest.mark.parametrize("driver", RESULT_DRIVERS)
def test_parent_and_child_go_on_after_a_fork(url: URL | str) -> None:
    """Both use the store on connections of their own, the parent also after the child's end."""
    with ResultStore(url) as store:
        for number in range(3):
            store.store(f"parent {number}", "SUCCESS")
            assert in_child(lambda number=number: store.store(f"child {number}", "SUCCESS"))
            assert store.exists(f"child {number}")
            store.store_many([TaskResult(f"many {number}", "SUCCESS")])
        ids = [f"{who} {number}" for who in ("parent", "child", "many") for number in range(3)]
        assert store.get_many(ids).keys() == set(ids)


def test_no_child_is_stuck_when_threads_prepare(tmp_path: Path) -> None:
    """A child forked while another thread looks at the tables can look for itself."""
    store = ResultStore(f"sqlite:///{tmp_path / 'one.db'}")
    with store.access.lock():
        assert in_child(lambda: store.store("1", "SUCCESS")) is True
    assert store.get("1") is not None
    store.close()


# -- connections


@pytest.mark.parametrize("driver", ["psycopg", "mysqlclient"])
@in_both_phases
def test_two_thousand_calls_open_a_pool_full_of_connections(
    request: pytest.FixtureRequest,
    driver: str,
    call: Callable[[Callable[[], int]], int],
) -> None:
    """Four threads with 2,000 calls open at most pool_size connections, forked or not."""
    database = database_to_count(request, driver)
    with ResultStore(database.url) as store:
        store.prepare()
    opened = connection_counter(database)

    def work() -> int:
        with ResultStore(database.url, engine_options={"pool_size": 4}) as store:
            in_threads([lambda: [store.exists("1") for _ in range(500)]] * 4)
            return sum(each.connects for each in store.manager.stats().databases)

    assert 1 <= call(work) <= 4
    assert opened() <= 4


@pytest.mark.parametrize("driver", DRIVERS)
def test_short_lived_sessions_leave_no_connection(
    driver: str, make_database: Callable[..., Database]
) -> None:
    """With short_lived_sessions no call leaves a connection on the server, prepare() neither."""
    database = make_database(driver)
    with ResultStore(database.url, short_lived_sessions=True) as store:
        calls: list[Callable[[], object]] = [
            store.prepare,
            lambda: store.store("1", "SUCCESS", b"1"),
            lambda: store.store_many([TaskResult("2", "SUCCESS")]),
            lambda: store.get_many(["1", "2"]),
            lambda: store.forget("1"),
        ]
        for call in calls:
            call()
            assert sum(each.idle for each in store.manager.stats().databases) == 0
            wait_until(lambda: not database.connections())
        assert store.get_many(["1", "2"]).keys() == {"2"}


def test_short_lived_sessions_keep_a_memory_database() -> None:
    """A database in memory is its connection, which stays."""
    with ResultStore("sqlite://", short_lived_sessions=True) as store:
        store.store("1", "SUCCESS")
        assert store.exists("1")


def test_connection_of_a_shared_manager_is_not_closed_by_others(tmp_path: Path) -> None:
    """A store that is not short-lived leaves the manager's pool as it is."""
    url = f"sqlite:///{tmp_path / 'one.db'}"
    with SessionManager(pooling="always") as manager:
        store = ResultStore(url, manager=manager)
        for number in range(20):
            store.store(f"{number}", "SUCCESS")
        [numbers] = manager.stats().databases
        assert (numbers.connects, numbers.idle, numbers.checked_out) == (1, 1, 0)


# -- lost connections


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_killed_between_calls(
    driver: str, make_database: Callable[..., Database]
) -> None:
    """Every call goes on after its connection was ended by the server."""
    database = make_database(driver)
    with ResultStore(database.url) as store:
        calls: list[Callable[[], object]] = [
            lambda: store.store("1", "SUCCESS", b"1"),
            lambda: store.store("1", "FAILURE"),
            lambda: store.get("1"),
            lambda: store.get_many(["1"]),
            lambda: store.store_many([TaskResult("2", "SUCCESS")]),
            lambda: store.save_group("g", b"1"),
            lambda: store.restore_group("g"),
            lambda: store.forget("3"),
        ]
        store.prepare()
        answers = []
        for call in calls:
            there = database.connections()
            assert there
            database.server.kill(*there)
            wait_until(lambda there=there: not there & database.connections())
            answers.append(call())
        assert answers[:2] == [True, False]
        assert answers[2] == store.get("1")
        assert store.get_many(["1", "2"]).keys() == {"1", "2"}
        assert answers[6][0] == b"1"  # type: ignore[index]


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_killed_during_stores(
    driver: str, make_database: Callable[..., Database]
) -> None:
    """While every connection is killed again and again, stores raise nothing and lose nothing."""
    database = make_database(driver)
    done = threading.Event()
    with ResultStore(database.url, attempts=20) as store:
        store.prepare()

        def kill() -> int:
            kills = 0
            while not done.wait(0.02):
                there = database.connections()
                database.server.kill(*there)
                kills += len(there)
            return kills

        def work(thread: int) -> int:
            for number in range(150):
                store.store(f"{thread}-{number}", "SUCCESS", f"{number}".encode())
            store.store_many(TaskResult(f"{thread}-many-{n}", "SUCCESS", b"m") for n in range(50))
            return 0

        def work_all() -> int:
            try:
                in_threads([lambda thread=thread: work(thread) for thread in range(2)])
            finally:
                done.set()
            return 0

        kills, _ = in_threads([kill, work_all])
        assert kills > 0
        ids = [f"{thread}-{number}" for thread in range(2) for number in range(150)]
        many = [f"{thread}-many-{number}" for thread in range(2) for number in range(50)]
        found = store.get_many([*ids, *many])
        assert found.keys() == {*ids, *many}
        assert all(found[each].result == each.split("-")[1].encode() for each in ids)


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_cut_on_the_way(driver: str, make_database: Callable[..., Database]) -> None:
    """A line that breaks while the store's connection is idle is no error."""
    with TCPProxy(make_database(driver).url) as proxy, ResultStore(proxy.url) as store:
        for number in range(5):
            assert store.store(f"{number}", "SUCCESS")
            proxy.cut()
        assert len(store.get_many(f"{number}" for number in range(5))) == 5


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_server_that_stays_away_is_the_drivers_error(
    driver: str, make_database: Callable[..., Database]
) -> None:
    """After its attempts a call raises what the driver said; the next one works again."""
    database = make_database(driver)
    with TCPProxy(database.url) as proxy, ResultStore(proxy.url, attempts=2) as store:
        store.store("1", "STARTED")
        proxy.refuse()
        proxy.cut()
        with pytest.raises(Exception, match=r"refused|Lost|closed|Can't connect") as caught:
            store.store("1", "SUCCESS")
        assert str(make_url(proxy.url).password) not in str(caught.value)
        proxy.accept()
        assert store.store("1", "SUCCESS") is True

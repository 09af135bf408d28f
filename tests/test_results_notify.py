"""Waiting for results of which PostgreSQL tells."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from sessionmgr import ManagerClosedError, ResultStore
from sessionmgr.results.waiting import Pace
from tests.concurrency import in_child, in_threads
from tests.counting import session_counts
from tests.fork_helpers import portable, run_program
from tests.helpers import wait_until
from tests.results_waiting import NEVER, TELLING, TIMEOUT, Waiter, get, listeners, told_store
from tests.servers import Database, MissingServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(params=TELLING)
def telling(
    request: pytest.FixtureRequest, make_database: Callable[..., Database]
) -> Iterator[Database]:
    """Create a database, once with each driver by which results are told; nothing stays open."""
    database = make_database(request.param)
    yield database
    wait_until(lambda: not database.connections())


@pytest.fixture
def only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the table once while results are told of, so that no look hides their absence."""
    monkeypatch.setattr(Pace, "SHORTEST_TOLD", NEVER)


# -- by being told


@pytest.mark.usefixtures("only_told")
def test_results_are_told(telling: Database) -> None:
    """Results come in order, those of one task after the other, without a look between."""
    ids = [str(number) for number in range(20)]
    with told_store(telling) as store, told_store(telling) as worker:
        waiter = Waiter(store, reversed(ids), max_interval=NEVER)
        wait_until(lambda: listeners(telling))
        for position, task_id in enumerate(ids, 1):
            worker.store(task_id, "SUCCESS")
            wait_until(lambda n=position: len(waiter.got) == n, TIMEOUT)
        assert waiter.end() == ids


@pytest.mark.usefixtures("only_told")
def test_threads_share_one_listening_connection(telling: Database) -> None:
    """Of 16 threads one listens for all, and when it has its result another one does."""
    ids = [str(number) for number in range(16)]
    with told_store(telling) as store:
        waiters = {each: Waiter(store, [each, "all"], max_interval=NEVER) for each in ids}
        for waiter in waiters.values():
            wait_until(lambda w=waiter: w.looks >= 2)
        [listener] = listeners(telling)
        for task_id, waiter in waiters.items():
            store.store(task_id, "SUCCESS")
            wait_until(lambda w=waiter: w.got, TIMEOUT)
        assert listeners(telling) == {listener}
        store.store("all", "SUCCESS")
        assert [waiter.end() for waiter in waiters.values()] == [[each, "all"] for each in ids]
        assert not listeners(telling)  # nobody would read


@pytest.mark.usefixtures("only_told")
def test_listening_connection_is_kept(telling: Database) -> None:
    """It listens while somebody waits, and the next one who waits gets the same."""
    with told_store(telling) as store:
        found = set()
        for number in range(12):  # more than psycopg takes to prepare a statement
            waiter = Waiter(store, [str(number)], max_interval=NEVER)
            found |= wait_until(lambda: listeners(telling))
            store.store(str(number), "SUCCESS")
            assert waiter.end() == [str(number)]
            assert not listeners(telling)
        assert len(found) == 1
        assert len(telling.connections()) <= 3


def test_short_lived_sessions_keep_no_listening_connection(telling: Database) -> None:
    """Where nothing is to stay open, nothing does."""
    with told_store(telling, short_lived_sessions=True) as store:
        waiter = Waiter(store, ["1"])
        wait_until(lambda: telling.connections() == listeners(telling) != set())
        store.store("1", "SUCCESS")
        assert waiter.end() == ["1"]
        wait_until(lambda: not telling.connections())


def test_writer_that_does_not_tell_is_seen(telling: Database) -> None:
    """Results that another program stores, without telling, are looked for beside."""
    with told_store(telling) as store, ResultStore(telling.url) as silent:
        waiter = Waiter(store, ["1", "2"])
        wait_until(lambda: listeners(telling))
        silent.store("1", "SUCCESS")
        silent.store("2", "SUCCESS")
        assert waiter.end() == ["1", "2"]


@pytest.mark.usefixtures("only_told")
def test_lost_listening_connection_is_replaced(
    telling: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is killed another one is made; results are told again, and none is missed."""
    with told_store(telling) as store, told_store(telling) as worker:
        waiter = Waiter(store, ["1", "2"], max_interval=NEVER)
        lost = wait_until(lambda: listeners(telling))
        telling.server.kill(*lost)
        worker.store("1", "SUCCESS")  # while nobody listens, or just before
        wait_until(lambda: listeners(telling) - lost)
        worker.store("2", "SUCCESS")
        assert waiter.end() == ["1", "2"]
    [record] = caplog.records
    assert f"database {store.describe()}: the connection that listens" in record.getMessage()


@pytest.mark.usefixtures("only_told")
def test_connection_lost_while_nobody_waits_is_replaced(
    telling: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A listening connection that died in between is replaced without a warning."""
    with told_store(telling) as store:
        for number in range(2):
            waiter = Waiter(store, [str(number)], max_interval=NEVER)
            lost = wait_until(lambda: listeners(telling))
            store.store(str(number), "SUCCESS")
            assert waiter.end() == [str(number)]
            telling.server.kill(*lost)
    assert not caplog.records


@pytest.mark.usefixtures("only_told")
def test_fork_while_a_thread_waits(telling: Database) -> None:
    """A thread of the parent gets its result, and the child waits by a connection of its own."""
    with told_store(telling) as store:
        waiter = Waiter(store, ["parent"], max_interval=NEVER)
        [listener] = wait_until(lambda: listeners(telling))
        store.store("1", "SUCCESS")
        inherited = store.wait(["1", "2"], TIMEOUT, max_interval=NEVER)
        assert next(inherited).task_id == "1"

        def child() -> tuple[list[str], list[str], set[int]]:
            threading.Timer(0.1, store.store, ("child", "SUCCESS")).start()
            own = get(store, "child")
            other = Waiter(store, ["never"], max_interval=NEVER)
            found = wait_until(lambda: listeners(telling) - {listener})
            store.store("2", "SUCCESS")
            rest = [result.task_id for result in inherited]
            store.close()
            assert isinstance(other.error, ManagerClosedError) or other.thread.is_alive()
            return own, rest, found

        own, rest, found = in_child(child)
        assert (own, rest, len(found)) == (["child"], ["2"], 1)
        assert listeners(telling) == {listener}
        store.store("parent", "SUCCESS")
        assert waiter.end() == ["parent"]
        assert [result.task_id for result in inherited] == ["2"]


def test_close_closes_the_listening_connection(telling: Database) -> None:
    """After `close()` there is no connection, and who still waits is told that it is closed."""
    with told_store(telling) as store:
        waiter = Waiter(store, ["1"])
        wait_until(lambda: listeners(telling))
        store.close()
        with pytest.raises(ManagerClosedError):
            waiter.end()
        wait_until(lambda: not telling.connections())


def test_invalidate_while_a_thread_waits(telling: Database) -> None:
    """The listening connection is made anew, and the thread gets its result."""
    with told_store(telling) as store:
        waiter = Waiter(store, ["1"])
        [old] = wait_until(lambda: listeners(telling))
        store.invalidate()
        wait_until(lambda: old not in telling.connections())
        store.store("1", "SUCCESS")
        assert waiter.end() == ["1"]


def wait_and_end(way: str, database: Database) -> None:
    """Wait by a listening connection, and leave it as it is.

    :param way: ``"idle"`` when it is idle, ``"waits"`` while a thread waits, ``"forgotten"`` when
        the store is not there any more.
    """
    store = ResultStore(database.url, notify=True)
    done = Waiter(store, ["1"])
    wait_until(lambda: listeners(database))
    store.store("1", "SUCCESS")
    assert done.end() == ["1"]
    if way == "waits":
        Pace.SHORTEST_TOLD = NEVER  # no look is cut off by the end
        waits = Waiter(store, ["2"], max_interval=NEVER)
        wait_until(lambda: listeners(database) and waits.looks > 1)
    if way == "forgotten":
        del store, done
        gc.collect()
        wait_until(lambda: not database.connections())


@pytest.mark.parametrize("way", ["idle", "waits", "forgotten"])
def test_process_ends_politely(telling: Database, way: str) -> None:
    """A process that ends, also while a thread waits, says goodbye on the listening connection."""
    mark = telling.server.log_mark()
    run_program(wait_and_end, way, portable(telling))
    _, abandoned = session_counts(telling)
    assert abandoned == 0
    log = telling.server.log_text(mark).splitlines()
    assert not [line for line in log if f"@{telling.name} " in line and "unexpected EOF" in line]


def wait_in_greenlets(url: str) -> None:
    """Wait in 20 greenlets for what others store; for a monkey-patched process."""
    with ResultStore(url, notify=True) as store:
        store.prepare()
        ids = [str(number) for number in range(20)]
        waits = [partial(get, store, task_id) for task_id in ids]
        stores = [partial(in_turn, store, ids)]
        assert in_threads([*waits, *stores])[:-1] == [[each] for each in ids]


def in_turn(store: ResultStore, ids: list[str]) -> None:
    """Store results one by one, while the others run."""
    for task_id in ids:
        threading.Event().wait(0.01)
        store.store(task_id, "SUCCESS")


def test_greenlets_wait(make_database: Callable[..., Database]) -> None:
    """With gevent's monkey-patching, those that wait let the others run."""
    if importlib.util.find_spec("gevent") is None:
        raise MissingServerError("gevent (PyPI package)")
    database = make_database("psycopg")
    program = (
        "from gevent import monkey; monkey.patch_all()\n"
        "import sys; from tests.test_results_notify import wait_in_greenlets\n"
        "wait_in_greenlets(sys.argv[1])"
    )
    url = database.url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "-c", program, url], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")

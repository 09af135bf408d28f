"""Which processes keep connections: workers do, however they were started; others do not."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import billiard
import pytest
from billiard.pool import Pool
from sqlalchemy import select
from sqlalchemy.pool import NullPool, QueuePool

from sessionmgr import SessionManager
from sessionmgr.ext.billiard import initializer, on_process_exit
from tests import celery_app
from tests.celery_program import celery_worker
from tests.concurrency import in_child, in_threads
from tests.counting import connection_counter, database_to_count
from tests.helpers import wait_until
from tests.items import connection_id
from tests.processes import FORKS, STARTS, backend_ids, call_in_child
from tests.servers import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL

    from tests.servers import Database

ROOT = Path(__file__).parents[1]

SHOW = """
import sys
from sessionmgr import SessionManager

manager = SessionManager(engine_options={"pool_size": 3})

def show(who, manager):
    engine = manager.get_engine("sqlite:///file.db")
    print(who, manager.forked, type(engine.pool).__name__, flush=True)
"""

MAIN_MODULE = """
from tests.processes import LIBRARIES

def work():
    show("child", manager)

if __name__ == "__main__":
    show("parent", manager)
    library, method = sys.argv[1].split("-")
    process = LIBRARIES[library].get_context(method).Process(target=work)
    process.start()
    process.join()
"""

INITIALIZED = """
from sessionmgr.ext.billiard import initializer

show("existing", manager)
initializer()
show("existing", manager)
show("new", SessionManager())
"""


def run_script(folder: Path, text: str, *args: str) -> list[str]:
    """Run :data:`SHOW` and more as a program of its own, and return the lines it prints."""
    script = folder / "script.py"
    script.write_text(SHOW + text)
    done = subprocess.run(
        [sys.executable, str(script), *args],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.stdout.splitlines()


@pytest.fixture
def manager() -> Iterator[SessionManager]:
    """Return a manager as a program makes it where it starts."""
    with SessionManager() as manager:
        yield manager


def pools(ids: list[int]) -> bool:
    """Return whether sessions, one after the other, had one connection, and not one each."""
    assert len(ids) > 1
    assert len(set(ids)) in (1, len(ids))
    return len(set(ids)) == 1


def backends_of_own_manager(url: URL) -> list[int]:
    """Use a manager that this process made."""
    with SessionManager() as manager:
        return backend_ids(manager, url)


def backends_of_pickled(pickled: bytes, url: URL) -> list[int]:
    """Use a manager that came as a pickle."""
    with pickle.loads(pickled) as manager:  # noqa: S301 - made by the test
        return backend_ids(manager, url)


def test_unforked_parent_keeps_nothing(manager: SessionManager, database: Database) -> None:
    """Where no fork has happened, the server counts no connection once a session is closed."""
    ids = []
    for _ in range(3):
        with manager.session_factory(database.url) as session:
            ids.append(connection_id(session))
            wait_until(lambda: database.connections() == {ids[-1]})
        wait_until(lambda: not database.connections())
    assert not pools(ids)
    assert not manager.forked
    assert isinstance(manager.get_engine(database.url).pool, NullPool)


@pytest.mark.parametrize("start", FORKS)
def test_inherited_manager_pools_in_a_forked_child(
    start: str, manager: SessionManager, database: Database
) -> None:
    """A manager that its parent made and used pools in the child, and still not in the parent."""
    assert not pools(backend_ids(manager, database.url))
    assert pools(call_in_child(start, backend_ids, manager, database.url))
    assert not pools(backend_ids(manager, database.url))


@pytest.mark.parametrize("start", STARTS)
def test_manager_made_inside_a_child_pools(
    start: str, make_database: Callable[..., Database]
) -> None:
    """A child's own manager is a worker's from the start, whoever started the child."""
    assert pools(call_in_child(start, backends_of_own_manager, make_database("psycopg").url))


@pytest.mark.parametrize("start", STARTS)
def test_manager_given_as_an_argument_pools(
    start: str, manager: SessionManager, make_database: Callable[..., Database]
) -> None:
    """A manager among the arguments of a Process, pickled where it is not forked, pools there."""
    assert pools(call_in_child(start, backend_ids, manager, make_database("psycopg").url))


@pytest.mark.parametrize("start", STARTS)
def test_pickled_manager_pools_in_a_child(
    start: str, manager: SessionManager, make_database: Callable[..., Database]
) -> None:
    """A manager that reaches a worker with a task, as a pickle, pools there."""
    url = make_database("psycopg").url
    assert pools(call_in_child(start, backends_of_pickled, pickle.dumps(manager), url))


def test_pickled_manager_does_not_pool_in_the_parent(
    manager: SessionManager, make_database: Callable[..., Database]
) -> None:
    """A copy knows where it is, not where it was made."""
    url = make_database("psycopg").url
    assert not pools(backends_of_pickled(pickle.dumps(manager), url))
    pickled_in_child = call_in_child("os.fork", pickle.dumps, manager)
    assert not pools(backends_of_pickled(pickled_in_child, url))


@pytest.mark.parametrize("start", [start for start in STARTS if start != "os.fork"])
def test_manager_of_the_main_module_pools(start: str, tmp_path: Path) -> None:
    """A manager that a script makes at its top pools in its workers, also if they import it."""
    assert run_script(tmp_path, MAIN_MODULE, start) == [
        "parent False NullPool",
        "child True QueuePool",
    ]


@pytest.mark.parametrize("start", FORKS)
def test_worker_that_forks_again_has_pooling_children(
    start: str, manager: SessionManager, make_database: Callable[..., Database]
) -> None:
    """A worker's child pools on a connection of its own."""
    url = make_database("psycopg").url

    def worker() -> tuple[list[int], list[int], list[int]]:
        before = backend_ids(manager, url)
        return before, call_in_child(start, backend_ids, manager, url), backend_ids(manager, url)

    before, child, after = call_in_child("os.fork", worker)
    assert pools(before + after)
    assert pools(child)
    assert not set(child) & set(before)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_billiard_pool_pool(
    method: str, manager: SessionManager, make_database: Callable[..., Database]
) -> None:
    """A billiard Pool's worker keeps its connections, however it was started."""
    url = make_database("psycopg").url
    with Pool(
        1,
        initializer=initializer,
        on_process_exit=on_process_exit,
        context=billiard.get_context(method),
    ) as pool:
        assert pools(pool.apply(backends_of_own_manager, (url,)))
        assert pools(pool.apply(backends_of_pickled, (pickle.dumps(manager), url)))
        pool.close()
        pool.join()


def test_initializer_makes_any_process_a_worker(tmp_path: Path) -> None:
    """From the initializer on managers pool: those that exist already, and those made later."""
    assert run_script(tmp_path, INITIALIZED) == [
        "existing False NullPool",
        "existing True QueuePool",
        "new True QueuePool",
    ]


def test_mark_worker_pools_where_nothing_forks(manager: SessionManager, database: Database) -> None:
    """From mark_worker() on a process keeps connections, whatever it had before."""
    engine = manager.get_engine(database.url)
    assert not pools(backend_ids(manager, database.url))
    manager.mark_worker()
    assert manager.forked
    ids = backend_ids(manager, database.url)
    assert pools(ids)
    wait_until(lambda: database.connections() == set(ids))
    assert manager.get_engine(database.url) is not engine
    manager.mark_worker()
    assert backend_ids(manager, database.url) == ids


def test_mark_worker_marks_this_manager_only(make_database: Callable[..., Database]) -> None:
    """Another manager in the same process goes on as it was."""
    url = make_database("psycopg").url
    with SessionManager() as marked, SessionManager() as other:
        marked.mark_worker()
        assert pools(backend_ids(marked, url))
        assert not pools(backend_ids(other, url))


@pytest.mark.parametrize(
    ("pooling", "expected"), [("always", True), ("never", False)], ids=["always", "never"]
)
def test_pooling_overrides_the_flag(
    pooling: str, expected: bool, make_database: Callable[..., Database]
) -> None:
    """`always` and `never` mean it, before a fork and after."""
    url = make_database("psycopg").url
    with SessionManager(pooling=pooling) as manager:
        assert pools(backend_ids(manager, url)) is expected
        assert pools(call_in_child("os.fork", backend_ids, manager, url)) is expected


def use_from_threads(manager: SessionManager, url: URL, threads: int, sessions: int) -> str:
    """Open so many sessions in each of some threads, and return the class of their pool."""

    def work() -> None:
        for _ in range(sessions):
            with manager.session_factory(url) as session:
                assert session.scalar(select(7)) == 7

    in_threads([work] * threads)
    [stats] = manager.stats().databases
    manager.close()
    return stats.pool_class


@pytest.mark.parametrize("driver", list(DRIVERS))
def test_ten_thousand_sessions_open_no_more_connections_than_the_pool_has(
    driver: str, request: pytest.FixtureRequest
) -> None:
    """The server counts at most `pool_size` connections to a worker with 10,000 sessions."""
    database = database_to_count(request, driver)
    options = {"pool_size": 2, "max_overflow": 0}
    with SessionManager(engine_options=options) as manager:
        # the counter counts: without a pool each session has its own connection, and so have
        # the threads' looks at the tables, and their creation
        opened = connection_counter(database)
        assert use_from_threads(manager, database.url, 2, 10) == NullPool.__name__
        assert 21 <= opened() <= 23

    with SessionManager(engine_options=options) as manager:
        opened = connection_counter(database)
        pool = in_child(lambda: use_from_threads(manager, database.url, 4, 2500))
    assert pool == QueuePool.__name__
    assert 1 <= opened() <= 2


@pytest.mark.parametrize(
    ("pool", "marks"),
    [("prefork", False), ("threads", True), ("solo", True), ("solo", False)],
    ids=["prefork", "threads-marked", "solo-marked", "solo"],
)
def test_celery_workers(
    pool: str, marks: bool, tmp_path: Path, make_database: Callable[..., Database]
) -> None:
    """A Celery prefork worker pools; threads and solo workers do once they are marked."""
    url = make_database("psycopg").url.render_as_string(hide_password=False)
    app = celery_app.make_app(tmp_path)
    with celery_worker(tmp_path, pool, marks=marks):
        results = [app.send_task("backends", [url]) for _ in range(4)]
        tasks = [result.get(timeout=60.0) for result in results]
    assert [pools(ids) for ids in tasks] == [marks or pool == "prefork"] * 4

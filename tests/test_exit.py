"""Processes that end by any normal way say goodbye: servers see no aborted connection."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from billiard.pool import Pool

from sessionmgr import SessionManager
from sessionmgr.ext.billiard import initializer, on_process_exit
from tests import async_exiting
from tests.async_helpers import SERVER_DRIVERS
from tests.concurrency import in_child
from tests.counting import session_counts
from tests.exiting import ENDINGS, FAILURE, use, warm_up
from tests.helpers import wait_until
from tests.processes import LIBRARIES, backend_ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.servers import Database
    from tests.servers.mariadb import MariaDB
    from tests.servers.postgresql import PostgreSQL

LOST = ("unexpected EOF", "could not receive data", "could not send data", "connection to client")
"""How PostgreSQL's log tells of a client that went without a goodbye."""


class Watch:
    """One database for each driver, on servers that nobody else uses, and what became of clients.

    :param postgresql: the server of the first databases.
    :param mariadb: the server of the others.
    """

    def __init__(self, postgresql: PostgreSQL, mariadb: MariaDB, databases: list[Database]) -> None:
        self.postgresql = postgresql
        self.mariadb = mariadb
        self.databases = databases
        self.urls = [url.url.render_as_string(hide_password=False) for url in databases]
        self._mark = postgresql.log_mark()
        self._connections_before = mariadb.status("Connections")

    def wait_for_end(self) -> None:
        """Wait until no client is connected any more."""
        for database in self.databases:
            wait_until(lambda d=database: not d.connections(), timeout=30.0)

    def connected(self) -> dict[str, int]:
        """Return how many connections each PostgreSQL database has had, and MariaDB in all."""
        counts = {d.driver: session_counts(d)[0] for d in self._on_postgresql()}
        return counts | {"mariadb": self.mariadb.status("Connections") - self._connections_before}

    def lost(self) -> dict[str, int]:
        """Return how many connections ended without a goodbye, by who counts them."""
        text = self.postgresql.log_text(self._mark)
        return {
            "log": sum(any(sign in line for sign in LOST) for line in text.splitlines()),
            "sessions_abandoned": sum(session_counts(d)[1] for d in self._on_postgresql()),
            "Aborted_clients": self.mariadb.status("Aborted_clients"),
        }

    def assert_polite(self, processes: int) -> None:
        """Assert that so many processes have used every database, and left each politely."""
        self.wait_for_end()
        on_mariadb = len(self.databases) - len(self._on_postgresql())
        for counter, count in self.connected().items():
            assert count >= processes * (on_mariadb if counter == "mariadb" else 1)
        assert set(self.lost().values()) == {0}, self.lost()

    def _on_postgresql(self) -> list[Database]:
        return [d for d in self.databases if d.server is self.postgresql]


@pytest.fixture
def watch(
    private_postgresql: PostgreSQL, private_mariadb: MariaDB, make_database: Callable[..., Database]
) -> Watch:
    """Watch servers of the test's own."""
    databases = [
        make_database("psycopg", private_postgresql),
        make_database("psycopg2", private_postgresql),
        make_database("pymysql", private_mariadb),
    ]
    with contextlib.suppress(pytest.skip.Exception):  # mysqlclient cannot be built everywhere
        databases.append(make_database("mysqlclient", private_mariadb))
    watch = Watch(private_postgresql, private_mariadb, databases)
    warm_up(watch.urls)
    return watch


@pytest.fixture
def async_watch(
    private_postgresql: PostgreSQL, private_mariadb: MariaDB, make_database: Callable[..., Database]
) -> Watch:
    """Watch servers of the test's own, by the asynchronous drivers."""
    postgresql = ("asyncpg", "psycopg-async")
    databases = [
        make_database(driver, private_postgresql if driver in postgresql else private_mariadb)
        for driver in SERVER_DRIVERS
    ]
    return Watch(private_postgresql, private_mariadb, databases)


def test_rude_exit_is_counted(watch: Watch) -> None:
    """What these tests look at does tell of processes that leave without a goodbye."""
    in_child(lambda: use(watch.urls))  # leaves by os._exit
    watch.wait_for_end()
    # two connections of each driver
    on_postgresql, on_mariadb = 2 * 2, 2 * (len(watch.databases) - 2)
    assert watch.lost() == {
        "log": on_postgresql,
        "sessions_abandoned": on_postgresql,
        "Aborted_clients": on_mariadb,
    }


@pytest.mark.timeout(300)  # each worker sleeps a second at its end
def test_workers_of_a_billiard_pool_leave_politely(watch: Watch) -> None:
    """200 workers, each for one task, end by `os._exit` with their connections closed."""
    workers = 200
    with Pool(
        40, maxtasksperchild=1, initializer=initializer, on_process_exit=on_process_exit
    ) as pool:
        tasks = [pool.apply_async(use, (watch.urls,)) for _ in range(workers)]
        for task in tasks:
            task.get(timeout=200.0)
        pool.close()
        pool.join()
    watch.assert_polite(workers)


@pytest.mark.parametrize("library", list(LIBRARIES))
def test_processes_leave_politely(watch: Watch, library: str) -> None:
    """50 forked Processes, and two spawned ones, end in order with their connections closed."""
    for method in ["fork"] * 5 + ["spawn"]:
        context = LIBRARIES[library].get_context(method)
        at_once = 10 if method == "fork" else 2
        processes = [context.Process(target=use, args=(watch.urls,)) for _ in range(at_once)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    watch.assert_polite(52)


@pytest.mark.timeout(300)  # a busy machine takes long for 52 processes
def test_forked_children_and_their_parent_leave_politely(watch: Watch) -> None:
    """Children of a plain fork, and the program, end in every way with their connections closed."""
    children = 51
    done = subprocess.run(
        [sys.executable, "-m", "tests.exiting", str(children), *watch.urls],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Traceback") == children // len(ENDINGS)
    assert done.stderr.count(f"RuntimeError: {FAILURE}") == children // len(ENDINGS)
    watch.assert_polite(children + 1)


def test_processes_with_event_loops_leave_politely(async_watch: Watch) -> None:
    """Forked children, Processes, and the program close what their loops have left open."""
    command = [sys.executable, "-W", "error", "-m", "tests.async_exiting"]
    running = {
        ending: subprocess.Popen(
            [*command, ending, *async_watch.urls], stderr=subprocess.PIPE, text=True
        )
        for ending in async_exiting.ENDINGS
    }
    for ending, program in running.items():
        _, written = program.communicate()
        failures = 2 * len(async_watch.urls) + 1 if ending == "exception" else 0
        assert program.returncode == (1 if failures else 0), written
        assert written.count("Traceback") == failures, written
        assert written.count(f"RuntimeError: {FAILURE}") == failures
        assert bool(written) is bool(failures), written
    async_watch.assert_polite(async_exiting.PROCESSES * len(running))


UNFINISHED = """
import asyncio, sys
from sqlalchemy import select
from sessionmgr import AsyncSessionManager

manager = AsyncSessionManager(pooling="always")

async def begin_more(url):
    async with manager.begin(url) as session:
        await session.execute(select(7))
    tasks.append(asyncio.ensure_future(go_on()))

async def go_on():
    for _ in range(5):  # more often than the loop turns before it stops
        await asyncio.sleep(0)
    print("it went on")

tasks, loop = [], asyncio.new_event_loop()
loop.run_until_complete(begin_more(sys.argv[1]))
print("the end")
"""


def test_unfinished_tasks_do_not_go_on_at_the_end(tmp_path: Path) -> None:
    """A loop that was stopped amidst its tasks is not run again to close its connections."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", UNFINISHED, f"sqlite+aiosqlite:///{tmp_path}/one.db"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "the end\n"


def test_collected_managers_close_their_connections(watch: Watch) -> None:
    """Managers that go out of use without `close()` leave nothing open, and politely."""

    def make_use_and_forget() -> None:
        for _ in range(3):
            manager = SessionManager(pooling="always")
            for url in watch.urls:
                backend_ids(manager, url)
            assert all(database.connections() for database in watch.databases)
            del manager
            gc.collect()
            watch.wait_for_end()

    make_use_and_forget()
    in_child(make_use_and_forget)
    watch.assert_polite(6)

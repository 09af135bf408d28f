"""Fork under threads: children work, whatever other threads do at the moment of the fork."""

from __future__ import annotations

import random
import threading
import traceback
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import ForeignKey, event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from typing_extensions import Self

from sessionmgr import SessionManager
from tests.concurrency import in_threads
from tests.fork_helpers import age, fork, portable, run_program
from tests.helpers import wait_until
from tests.items import ItemBase, connection_id, count_items
from tests.servers import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database

THREADS = 16
LONGEST_LIFE = 2.0
"""Seconds from its fork in which a child that has a CPU is done: a promise of the library."""

ALLOCATES = text(
    "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 3000)"
    " SELECT group_concat(n) FROM numbers"
)
"""A statement of SQLite's that takes much memory, piece by piece."""

TIMEOUT = 580.0
"""Seconds for all forks of a program; a minute on two idle cores."""


def map_classes() -> None:
    """Map two new classes that refer to each other, and make the first use of them."""

    class Own(DeclarativeBase):
        pass

    class Parent(Own):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Child(Own):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(ForeignKey(Parent.id))
        parent = relationship(Parent)

    Child(parent=Parent())
    Own.registry.dispose()


class Workers:
    """Threads that make, use and invalidate engines and mappers, and keep what they raise.

    :param kept: opens a Session or Connection by an engine or sessionmaker made before.
    :param pause: the longest wait of a thread between two acts, in seconds.
    """

    def __init__(
        self,
        manager: SessionManager,
        urls: list[str | URL],
        kept: list[Callable[[], Any]],
        pause: float,
    ) -> None:
        self.manager, self.urls, self.kept, self.pause = manager, urls, kept, pause
        self.errors: list[str] = []
        self.acts = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(THREADS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        choice = random.Random(number)
        acts = [self._use, self._use, self._use_kept, self._invalidate, self._make, self._map]
        while not self._stop.wait(choice.uniform(0, self.pause)):
            try:
                choice.choice(acts)(choice)
            except Exception:  # noqa: BLE001 - told to the test
                self.errors.append(traceback.format_exc())
            self.acts += 1

    def _use(self, choice: random.Random) -> None:
        with self.manager.session_factory(choice.choice(self.urls)) as session:
            count_items(session)

    def _use_kept(self, choice: random.Random) -> None:
        with choice.choice(self.kept)() as session:
            connection_id(session)

    def _invalidate(self, choice: random.Random) -> None:
        self.manager.invalidate(choice.choice(self.urls))

    def _make(self, choice: random.Random) -> None:
        url = choice.choice(self.urls)
        with (
            SessionManager(pooling="always", metadata=ItemBase.metadata) as own,
            own.session_factory(url) as session,
        ):
            count_items(session)

    def _map(self, choice: random.Random) -> None:
        map_classes()


def live(manager: SessionManager, url: URL, kept: list[Callable[[], Any]]) -> tuple[int, float]:
    """In a child, use the manager and what was kept, map classes, and tell the age in the end."""
    with ExitStack() as stack:
        opened = [manager.session_factory(url), *(opening() for opening in kept)]
        ids = {connection_id(stack.enter_context(session)) for session in opened}
    map_classes()
    return len(ids), age()


def fork_under_threads(
    databases: list[Database], folder: Path, pooling: Any, forks: int, pause: float
) -> Any:
    """Fork again and again while threads work; the first forks meet first uses of dialects."""
    files = [f"sqlite:///{folder}/{number}.db" for number in range(2)]
    with SessionManager(pooling=pooling, metadata=ItemBase.metadata) as manager:
        engine, factory = manager.create_session(databases[0].url)
        kept = [engine.connect, factory]
        workers = Workers(manager, [*(each.url for each in databases), *files], kept, pause)
        with workers:
            children = [
                fork("os.fork", partial(live, manager, url, kept), collect=False).end()
                for url in rotate(databases, forks)
            ]
            acts = workers.acts
    wait_until(lambda: not any(database.connections() for database in databases))
    return children, acts, workers.errors


def rotate(databases: list[Database], times: int) -> Iterator[URL]:
    """Give the databases' URLs, one after the other."""
    for number in range(times):
        yield databases[number % len(databases)].url


def check(databases: list[Database], folder: Path, *how: Any) -> None:
    """Fork under threads, and check that all went well, in children and threads."""
    children, acts, errors = run_program(
        fork_under_threads, [portable(each) for each in databases], folder, *how, timeout=TIMEOUT
    )
    assert errors == []
    assert acts > len(children)
    assert {child.noise for child in children} == {""}
    connections, ages = zip(*(child.result for child in children), strict=True)
    assert set(connections) == {3}
    assert max(ages) < LONGEST_LIFE, sorted(ages)[-5:]


@pytest.fixture
def databases(make_database: Callable[..., Database]) -> list[Database]:
    """Create a database for each driver."""
    return [make_database(driver) for driver in DRIVERS]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("pooling", "forks"), [("forked", 100), ("always", 50)])
def test_fork_under_threads(
    databases: list[Database], tmp_path: Path, pooling: str, forks: int
) -> None:
    """Each child is done in time while 16 threads use, make and invalidate engines."""
    check(databases, tmp_path, pooling, forks, 0.3)


def use_memory(manager: SessionManager) -> float:
    """In a child, use a SQLite database in memory, and tell the age in the end."""
    with manager.session_factory("sqlite://") as session:
        session.execute(ALLOCATES)
    return age()


def fork_from_sqlite(folder: Path, forks: int) -> list[Any]:
    """Fork while threads are inside SQLite, where they do not hold Python's global lock."""
    stop = threading.Event()
    with SessionManager(metadata=ItemBase.metadata) as manager:

        def work(number: int) -> None:
            with manager.session_factory(f"sqlite:///{folder}/{number}.db") as session:
                while not stop.is_set():
                    session.execute(ALLOCATES)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            return [
                fork("os.fork", lambda: use_memory(manager), collect=False).end()
                for _ in range(forks)
            ]
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_child_uses_sqlite_whatever_threads_do_in_it(tmp_path: Path) -> None:
    """A child does not find SQLite's own mutexes locked by threads that it does not have."""
    children = run_program(fork_from_sqlite, tmp_path, 50)
    assert {child.noise for child in children} == {""}
    assert max(child.result for child in children) < LONGEST_LIFE


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pooling", ["forked", "always"])
@pytest.mark.parametrize(("pause", "forks"), [(0.0, 30), (0.1, 100)], ids=["fierce", "calm"])
def test_fork_under_threads_for_long(
    databases: list[Database], tmp_path: Path, pooling: str, pause: float, forks: int
) -> None:
    """The same holds for thousands of forks, also when the threads never rest."""
    for _ in range(10):  # each with first uses of its own
        check(databases, tmp_path, pooling, forks, pause)


@pytest.mark.parametrize("moment", ["connect", "close"])
def test_invalidate_spares_a_connection_on_its_way(
    make_database: Callable[..., Database], caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    """A connection that another thread is making or giving back is not closed under its hands."""
    url = make_database("pymysql").url
    manager = SessionManager(lambda engine: event.listen(engine, moment, invalidate))

    def invalidate(*_: object) -> None:
        in_threads([lambda: manager.invalidate(url)])

    with manager, manager.get_engine(url).connect() as connection:
        assert connection_id(connection)
    assert not caplog.records

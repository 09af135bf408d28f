"""`engine_callback`: what users prepare each Engine with, wherever and however often it is made.

For SessionManager alone are callbacks that connect or open a session, for which nothing could be
awaited; threads that wait for each other; and other starts of a process than by ``os.fork``.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, event, literal_column, select
from sqlalchemy.exc import InvalidRequestError

from sessionmgr import SessionManager
from tests.concurrency import here, in_both_phases, in_child, in_children, in_threads
from tests.helpers import wait_until
from tests.items import connection_id
from tests.processes import FORKS, STARTS, call_in_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL

    from tests.async_facade import ManagerClass
    from tests.servers import Database

ROTATION = 1.0
"""Seconds for which a password is valid."""


class Vault:
    """A role's password, which changes; a file that processes share tells the current one.

    Its lock keeps a change and a login apart: a role has one password, and one that was read
    just before it changed would be refused rightly.
    """

    def __init__(self, path: Path, database: Database) -> None:
        self._path = path
        self._turnstile = path.with_suffix(".turnstile")
        self._database = database
        self.role = f"rotating_{secrets.token_hex(6)}"
        path.touch()
        self._turnstile.touch()
        database.server.query(f"CREATE ROLE {self.role} LOGIN")
        self.rotate()

    def drop(self) -> None:
        """Drop the role."""
        self._database.server.query(f"DROP ROLE {self.role}")

    def rotate(self) -> None:
        """Give the role another password."""
        password = secrets.token_hex()
        with self._locked(fcntl.LOCK_EX):
            self._database.server.query(f"ALTER ROLE {self.role} PASSWORD %s", password)
            self._path.write_text(password)

    def rotate_until(self, stop: threading.Event) -> None:
        """Give the role another password every second."""
        while not stop.wait(ROTATION):
            self.rotate()

    def inject(self, engine: Engine) -> None:
        """Have an engine's connections log in with the current password: an engine_callback."""

        @event.listens_for(engine, "do_connect")
        def log_in(dialect: Any, record: object, args: list[Any], params: dict[str, Any]) -> object:
            with self._locked(fcntl.LOCK_SH):
                params["password"] = self._path.read_text()
                passwords.add(params["password"])
                return dialect.connect(*args, **params)

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Lock the password, exclusively or shared.

        A lock of files is not fair: logins that overlap would keep a change out for good. So who
        waits for the lock holds up those that come after, at the turnstile. And it is undone by
        hand: a child that was forked meanwhile would keep it with the file, which it has open.
        """
        with self._turnstile.open() as turnstile, self._path.open() as file:
            fcntl.flock(turnstile, fcntl.LOCK_EX)
            try:
                fcntl.flock(file, how)
            finally:
                fcntl.flock(turnstile, fcntl.LOCK_UN)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


passwords: set[str] = set()
"""Those with which this process has logged in."""

statements: Counter[str] = Counter()
"""What :func:`count_statements` has seen in this process."""

prepared: list[tuple[int, Engine]] = []
"""The process and the engine of each call of :func:`count_statements`."""


def count_statements(engine: Engine) -> None:
    """Count an engine's statements: an engine_callback that can be imported."""
    prepared.append((os.getpid(), engine))

    @event.listens_for(engine, "before_cursor_execute")
    def count(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements[statement] += 1


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    """Begin each test with nothing counted."""
    for counts in (passwords, statements, prepared):
        counts.clear()
    return


@pytest.fixture
def vault(tmp_path: Path, make_database: Callable[..., Database]) -> Iterator[tuple[Vault, URL]]:
    """Return a role whose password changes, and the URL of a database that it uses, without it."""
    database = make_database("psycopg")
    vault = Vault(tmp_path / "password", database)
    yield vault, database.url.set(username=vault.role, password="outdated")
    vault.drop()


@pytest.mark.parametrize("pooling", ["forked", "never"])
@pytest.mark.twin_cases(pooling=["forked"])
def test_password_that_changes_every_second(
    pooling: Any, vault: tuple[Vault, URL], manager_class: ManagerClass
) -> None:
    """Four workers go on through four passwords without one unit of work that fails."""
    changing, url = vault
    often = {"pool_recycle": 0.05}  # connections are made often, also where they are pooled
    manager = manager_class(changing.inject, pooling=pooling, engine_options=often)

    def worker() -> int:
        with manager:
            done = 0
            while len(passwords) < 4:
                with manager.begin(url) as session:
                    done += session.scalar(select(1)) or 0
            return done

    stop = threading.Event()
    rotator = threading.Thread(target=changing.rotate_until, args=(stop,))
    rotator.start()
    try:
        done = in_children([worker] * 4)
    finally:
        stop.set()
        rotator.join()
    assert all(count > 4 for count in done)


def run_tagged(manager: SessionManager, url: URL, tag: str, times: int = 11) -> dict[str, int]:
    """Run statements of their own in new engines; return how often each was seen."""
    tags = [f"SELECT '{tag}-{number}'" for number in range(times)]
    for statement in tags:
        manager.invalidate(url)
        with manager.session_factory(url) as session:
            session.execute(select(literal_column(statement.removeprefix("SELECT "))))
    return {statement: statements[statement] for statement in tags}


@pytest.mark.twin_cases(database=["psycopg", "pymysql"])
def test_query_counter_sees_each_statement_once(
    database: Database, manager_class: ManagerClass
) -> None:
    """In the parent, in its child and in the parent again, through ten invalidations in each."""
    with manager_class(count_statements) as manager:
        for tag, call in [("parent", here), ("child", in_child), ("again", here)]:
            counts = call(lambda tag=tag: run_tagged(manager, database.url, tag))
            assert len(counts) == 11
            assert set(counts.values()) == {1}, counts


@pytest.mark.parametrize("start", STARTS)
def test_query_counter_in_every_kind_of_worker(
    start: str, make_database: Callable[..., Database]
) -> None:
    """A manager that reaches a worker brings its callback, by inheritance or as a pickle."""
    url = make_database("psycopg").url
    with SessionManager(count_statements) as manager:
        counts = call_in_child(start, run_tagged, manager, url, start)
    assert set(counts.values()) == {1}, counts


@pytest.mark.parametrize("start", FORKS)
def test_forked_child_has_its_own_engine_called_back(start: str, database: Database) -> None:
    """The child's new engine gets the callback in the child, once; the parent's does not again."""
    with SessionManager(count_statements) as manager:
        inherited = manager.get_engine(database.url)

        def child() -> tuple[bool, list[bool]]:
            prepared.clear()
            engines = [manager.get_engine(database.url) for _ in range(3)]
            with engines[0].connect():
                pass
            calls = [(pid == os.getpid(), engine is engines[0]) for pid, engine in prepared]
            return engines[0] is inherited, calls

        assert call_in_child(start, child) == (False, [(True, True)])
        assert prepared == [(os.getpid(), inherited)]


def test_inherited_engine_keeps_what_its_callback_did(database: Database) -> None:
    """An engine kept from before the fork is still counted in the child: once per statement."""
    with SessionManager(count_statements) as manager:
        engine = manager.get_engine(database.url)

        def child() -> int:
            with engine.connect() as connection:
                connection.execute(select(literal_column("'inherited'")))
            engine.dispose()
            return statements["SELECT 'inherited'"]

        assert in_child(child) == 1


@in_both_phases
def test_callback_that_raises_leaves_nothing(
    call: Callable[[Callable[[], None]], None],
    database: Database,
    manager_class: ManagerClass,
) -> None:
    """Its error reaches the caller as it is, nothing is cached, and the next call works."""
    failure = LookupError("no such secret")
    engines: list[Engine] = []

    def fail_once(engine: Engine) -> None:
        engines.append(engine)
        if len(engines) == 1:
            raise failure

    def check() -> None:
        with manager_class([count_statements, fail_once]) as manager:
            with pytest.raises(LookupError) as caught:
                manager.session_factory(database.url)
            assert caught.value is failure
            if hasattr(failure, "add_note"):  # Python 3.11 and later
                assert any(database.name in note for note in failure.__notes__)
            assert manager._engines == manager._sessions == {}
            assert manager.prepared == frozenset()
            assert manager.stats().databases == ()
            assert database.connections() == set()
            with manager.session_factory(database.url) as session:
                own = {connection_id(session)}
                wait_until(lambda: database.connections() == own)
            assert manager.get_engine(database.url) is engines[1]
            assert [engine for _, engine in prepared] == engines

    call(check)


def test_callbacks_run_in_their_order(database: Database, manager_class: ManagerClass) -> None:
    """Several callbacks get the same engine, one after the other, before it connects."""
    calls: list[tuple[str, Engine]] = []

    def callback(name: str) -> Callable[[Engine], None]:
        def note(engine: Engine) -> None:
            assert manager._engines == {}
            assert database.connections() == set()
            calls.append((name, engine))

        return note

    with manager_class([callback(name) for name in "abc"]) as manager:
        for _ in range(2):
            engine = manager.get_engine(database.url)
            manager.session_factory(database.url).close()
            assert calls == [("a", engine), ("b", engine), ("c", engine)]
            wait_until(lambda: not database.connections())
            manager.invalidate(database.url)
            calls.clear()


def test_callbacks_of_any_iterable_run_for_every_engine(
    make_database: Callable[..., Database],
    manager_class: ManagerClass,
) -> None:
    """What can be gone through once only serves every engine all the same."""
    first, second = make_database("psycopg"), make_database("psycopg")
    with manager_class(callback for callback in [count_statements]) as manager:
        engines = [manager.get_engine(first.url), manager.get_engine(second.url)]
    assert [engine for _, engine in prepared] == engines


@in_both_phases
def test_callback_runs_once_per_engine_under_threads(
    call: Callable[[Callable[[], None]], None],
    make_database: Callable[..., Database],
    manager_class: ManagerClass,
) -> None:
    """16 threads that want two new engines at once cause two calls."""
    urls = [make_database("psycopg").url, make_database("pymysql").url]

    def check() -> None:
        with manager_class(count_statements) as manager:
            wanted = [lambda url=url: manager.get_engine(url) for url in urls * 8]
            engines = in_threads(wanted)
            assert len(set(engines)) == 2
            assert Counter(engine for _, engine in prepared) == Counter(set(engines))

    call(check)


def test_callback_that_wants_its_own_engine_is_told(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """A callback that asks the manager for the database at hand gets an error that says so."""
    url = make_database("psycopg").url
    manager = manager_class(lambda engine: manager.get_engine(engine.url))
    with manager:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match=r"engine_callback asked .* use that one"):
                manager.get_engine(url)
            assert manager._engines == {}


def test_callbacks_that_want_each_other_are_told_under_threads(
    tmp_path: Path,
) -> None:
    """Two callbacks that ask for each other's database get an error in two threads, as in one."""
    both = threading.Barrier(2)
    started: set[str] = set()

    def ask_for_the_other(engine: Engine) -> None:
        own = Path(engine.url.database or "").name
        if own not in started:
            started.add(own)
            both.wait(10.0)
        manager.get_engine("second" if own == "first" else "first")

    binds = {name: f"sqlite:///{tmp_path / name}" for name in ("first", "second")}
    manager = SessionManager(ask_for_the_other, binds=binds)

    def get(name: str) -> None:
        with pytest.raises(InvalidRequestError, match="engine_callback asked"):
            manager.get_engine(name)

    # in a child, with which threads that hang go
    in_child(lambda: in_threads([lambda: get("first"), lambda: get("second")], timeout=20.0))


def test_callback_may_use_another_database(make_database: Callable[..., Database]) -> None:
    """A callback reads, say, a setting from another database of the same manager."""
    settings, data = make_database("psycopg"), make_database("pymysql")
    found: list[int] = []

    def read_setting(engine: Engine) -> None:
        if engine.url.database == data.name:
            with manager.begin(settings.url) as session:
                found.append(session.scalar(select(7)) or 0)

    with SessionManager(read_setting) as manager:
        manager.get_engine(data.url)
        assert found == [7]
        assert [engine.url for engine in manager._engines.values()] == [settings.url, data.url]


def test_callback_may_connect(database: Database) -> None:
    """A callback uses the engine that it is given."""

    def check(engine: Engine) -> None:
        with engine.connect() as connection:
            answers.append(connection.scalar(select(7)))

    answers: list[int | None] = []
    with SessionManager(check) as manager:
        manager.session_factory(database.url).close()
    assert answers == [7]

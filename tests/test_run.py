"""``run``: work that failed for a passing reason is done again, other work is not."""

from __future__ import annotations

import socket
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError

from sessionmgr import EngineOptionsError, SessionManager
from tests.concurrency import in_children
from tests.items import (
    Item,
    ItemBase,
    connection_id,
    count_items,
    item_names,
    kill_connection,
    open_transactions,
)
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from tests.async_facade import ManagerClass
    from tests.servers import Database

pytestmark = pytest.mark.twin_cases(manager=["always"])

POSTGRESQL_DRIVERS = ["psycopg", "psycopg2"]

needs_notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")


@pytest.fixture(params=["always", "never"])
def manager(
    request: pytest.FixtureRequest, manager_class: ManagerClass
) -> Iterator[SessionManager]:
    """Return a manager that keeps connections, and one that does not."""
    with manager_class(metadata=ItemBase.metadata, pooling=request.param) as manager:
        yield manager


class Work:
    """Calls a function with the session and the number of the attempt, and keeps the sessions.

    Each attempt must find a session of its own, without objects of the one before.
    """

    def __init__(self, function: Callable[[Session, int], Any]) -> None:
        self.sessions: list[Session] = []
        self._function = function

    def __call__(self, session: Session) -> Any:
        """Do one attempt."""
        assert session not in self.sessions
        assert not session.identity_map
        assert not session.new
        self.sessions.append(session)
        return self._function(session, len(self.sessions))

    @property
    def attempts(self) -> int:
        """How often the work was done."""
        return len(self.sessions)


def rows(manager: SessionManager, database: Database) -> list[str]:
    """Read what is committed."""
    with manager.session_factory(database.url) as session:
        return item_names(session)


def raise_contention(session: Session) -> None:
    """Raise what a deadlock raises."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$"))
    session.execute(text("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'x'"))


def test_result_is_returned_after_one_commit(manager: SessionManager, database: Database) -> None:
    """Work that succeeds is done once, committed, and its result returned."""

    def add(session: Session, _attempt: int) -> str:
        session.add(Item(name="row"))
        return "result"

    work = Work(add)
    assert manager.run(database.url, work) == "result"
    assert work.attempts == 1
    assert rows(manager, database) == ["row"]
    assert not open_transactions(database)


def meet(end: socket.socket) -> None:
    """Wait until the other process is here too."""
    end.sendall(b".")
    assert end.recv(1) == b"."


def test_deadlock_is_retried(manager: SessionManager, database: Database) -> None:
    """Two processes that lock two rows crosswise both get through, in a new session each time."""
    with manager.begin(database.url) as session:
        session.add_all([Item(name="one"), Item(name="two")])
    manager.dispose()
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(60)

    def lock(names: list[str], end: socket.socket) -> int:
        def cross(session: Session, attempt: int) -> None:
            for name in names:
                session.execute(update(Item).where(Item.name == name).values(count=Item.count + 1))
                if attempt == 1 and name == names[0]:
                    meet(end)

        work = Work(cross)
        manager.run(database.url, work)
        manager.close()
        return work.attempts

    attempts = in_children(
        [lambda: lock(["one", "two"], ends[0]), lambda: lock(["two", "one"], ends[1])]
    )
    for end in ends:
        end.close()
    assert sum(attempts) >= 3
    with manager.session_factory(database.url) as session:
        assert session.scalars(select(Item.count)).all() == [2, 2]


def fail_at_the_update(session: Session, other: Callable[[str], None]) -> None:
    """Update a row that another transaction changed since this one began."""
    item = session.scalars(select(Item)).one()
    other("UPDATE item SET count = count + 1")
    item.count += 10


def fail_at_the_commit(session: Session, other: Callable[[str], None]) -> None:
    """Write after a read, as another transaction does that read before this one wrote."""
    count = count_items(session)
    other("INSERT INTO item (name, count) SELECT 'of other', count(*) FROM item")
    session.add(Item(name="own", count=count))


@pytest.mark.parametrize("database", POSTGRESQL_DRIVERS, indirect=True)
@pytest.mark.parametrize("fail", [fail_at_the_update, fail_at_the_commit])
def test_serialization_failure_is_retried(
    manager: SessionManager,
    database: Database,
    fail: Callable[..., None],
    manager_class: ManagerClass,
) -> None:
    """Work that PostgreSQL could not serialize is done again and sees what came between."""
    options = {"isolation_level": "SERIALIZABLE"}
    with manager_class(
        metadata=ItemBase.metadata, pooling=manager.pooling, engine_options=options
    ) as strict:
        with strict.begin(database.url) as session:
            session.add(Item(name="first"))

        def other(statement: str) -> None:
            with strict.begin(database.url) as session:
                session.execute(text(statement))

        work = Work(lambda session, n: fail(session, other if n == 1 else lambda _: None))
        strict.run(database.url, work)
        assert work.attempts == 2
        with strict.session_factory(database.url) as session:
            found = {item.name: item.count for item in session.scalars(select(Item))}
        assert found in ({"first": 11}, {"first": 0, "of other": 1, "own": 2})


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.twin_cases(times=[1])
def test_killed_connection_is_retried(
    manager: SessionManager, database: Database, times: int
) -> None:
    """A connection killed in the middle of its transaction costs neither an error nor a row."""
    connections = []

    def lose(session: Session, attempt: int) -> None:
        connections.append(connection_id(session))
        session.add(Item(name="row"))
        session.flush()
        if attempt <= times:
            kill_connection(session, database)
            item_names(session)

    work = Work(lose)
    manager.run(database.url, work)
    assert work.attempts == times + 1
    assert len(set(connections)) == times + 1
    assert rows(manager, database) == ["row"]


def test_refused_connect_is_retried(
    manager: SessionManager, database: Database, manager_class: ManagerClass
) -> None:
    """A server that refuses the first connects is asked again."""
    connects: list[int] = []

    def accept_the_third(engine: Engine) -> None:
        def connect(*_: object) -> None:
            connects.append(len(connects))
            if len(connects) == 3:
                proxy.accept()

        event.listen(engine, "do_connect", connect)

    with (
        TCPProxy(database.url) as proxy,
        manager_class(
            accept_the_third, metadata=ItemBase.metadata, pooling=manager.pooling
        ) as remote,
    ):
        proxy.refuse()
        remote.run(proxy.url, lambda session: session.add(Item(name="row")))
        assert len(connects) >= 3
    assert rows(manager, database) == ["row"]


def violate(session: Session, _attempt: int) -> None:
    """Add a name twice."""
    session.add_all([Item(name="same"), Item(name="same")])


def misspell(session: Session, _attempt: int) -> None:
    """Ask for a table that is not there."""
    session.execute(text("SELECT * FROM nowhere"))


def fail(_session: Session, _attempt: int) -> None:
    """Raise an error that is no database's."""
    raise LookupError("of the work")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (violate, IntegrityError),
        (misspell, (ProgrammingError, OperationalError)),
        (fail, LookupError),
    ],
    ids=["violate", "misspell", "fail"],
)
@pytest.mark.twin_cases(database=["psycopg", "pymysql"])
def test_other_errors_are_not_retried(
    manager: SessionManager, database: Database, function: Callable, error: Any
) -> None:
    """What would go wrong again is raised at once, as it is, with nothing said of attempts."""
    work = Work(function)
    with pytest.raises(error) as caught:
        manager.run(database.url, work)
    assert work.attempts == 1
    assert not getattr(caught.value, "__notes__", [])
    assert rows(manager, database) == []
    assert not open_transactions(database)


@pytest.mark.parametrize("attempts", [1, 3])
def test_last_error_is_raised_when_attempts_are_used_up(
    manager: SessionManager, database: Database, attempts: int
) -> None:
    """After the last attempt its own error is raised; nothing is left of any of them."""
    raised: list[DBAPIError] = []

    def add_and_fail(session: Session, attempt: int) -> None:
        session.add(Item(name=f"attempt {attempt}"))
        session.flush()
        try:
            raise_contention(session)
        except DBAPIError as error:
            raised.append(error)
            raise

    work = Work(add_and_fail)
    with pytest.raises(DBAPIError) as caught:
        manager.run(database.url, work, attempts=attempts)
    assert work.attempts == attempts
    assert caught.value is raised[-1]
    assert rows(manager, database) == []
    assert not open_transactions(database)


@needs_notes
@pytest.mark.parametrize("database", ["psycopg", "pymysql"], indirect=True)
def test_attempts_and_waits_are_told(manager: SessionManager, database: Database) -> None:
    """The last error has a note with the database, the attempts and the waits."""
    with pytest.raises(DBAPIError) as caught:
        manager.run(database.url, Work(lambda session, _: raise_contention(session)), attempts=3)
    [note] = caught.value.__notes__
    assert str(database.url) in note
    assert "3 of 3 attempts" in note
    waits = [float(wait) for wait in note.rpartition(": ")[2].split(", ")]
    assert len(waits) == 2
    assert all(0.01 <= wait <= 1 for wait in waits)


def test_five_attempts_are_the_default(manager: SessionManager, database: Database) -> None:
    """Without ``attempts`` work is done five times at most."""
    work = Work(lambda session, _: raise_contention(session))
    with pytest.raises(DBAPIError):
        manager.run(database.url, work)
    assert work.attempts == 5


@pytest.mark.parametrize("attempts", [0, -1, 1.5, "3", True, None])
def test_attempts_must_be_a_count(attempts: Any, manager_class: ManagerClass, sqlite: str) -> None:
    """A number of attempts that cannot be raises before anything is done."""
    work = Work(lambda *_: None)
    with manager_class() as manager:
        with pytest.raises(EngineOptionsError, match="attempts must be a whole number"):
            manager.run(f"{sqlite}://", work, attempts=attempts)
        assert manager._engines == {}
    assert work.attempts == 0


def test_locked_sqlite_file_is_retried(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """Work that found a SQLite file locked is done again, and raises if it stays locked."""
    path = tmp_path / "one.db"
    options = {"connect_args": {"timeout": 0.01}}
    with manager_class(metadata=ItemBase.metadata, engine_options=options) as manager:
        manager.session_factory(f"{sqlite}:///{path}").close()
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")

        def add(session: Session, attempt: int) -> None:
            if attempt == 3:
                holder.execute("ROLLBACK")
            session.add(Item(name="row"))
            session.flush()

        work = Work(add)
        with pytest.raises(OperationalError, match="database is locked"):
            manager.run(f"{sqlite}:///{path}", work, attempts=2, write=False)
        assert work.attempts == 2
        manager.run(f"{sqlite}:///{path}", work, write=False)
        assert work.attempts == 3
        holder.close()
        with manager.session_factory(f"{sqlite}:///{path}") as session:
            assert item_names(session) == ["row"]

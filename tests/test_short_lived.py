"""Short-lived sessions: nothing stays in the registry, and no connection on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from tests.concurrency import in_both_phases, in_child, in_threads
from tests.helpers import wait_until
from tests.items import Item, ItemBase, connection_id, item_names, kill_connection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sessionmgr import SessionManager
    from tests.async_facade import ManagerClass
    from tests.servers import Database


def add(
    manager: SessionManager, database: Database, name: str, error: type[Exception] | None = None
) -> None:
    """Add a row in a session that leaves nothing, and raise an error then, if one is given."""
    with manager.begin(database.url, short_lived_sessions=True) as session:
        session.add(Item(name=name))
        session.flush()
        if error is not None:
            raise error


def through_create_session(manager: SessionManager, database: Database) -> None:
    """Commit, roll back and commit again in one session of a sessionmaker of our own."""
    manager.prepare_models(manager.get_engine(database.url))
    _, factory = manager.create_session(database.url, short_lived_sessions=True)
    for number in range(2):
        with factory() as session:
            session.add(Item(name=f"first of {number}"))
            session.commit()
            session.add(Item(name="undone"))
            session.flush()
            session.rollback()
            session.add(Item(name=f"second of {number}"))
            session.commit()


def through_begin(manager: SessionManager, database: Database) -> None:
    """Use ``begin``."""
    add(manager, database, "row")


def through_run(manager: SessionManager, database: Database) -> None:
    """Use ``run``."""
    manager.run(
        database.url, lambda session: session.add(Item(name="row")), short_lived_sessions=True
    )


def through_reading(manager: SessionManager, database: Database) -> None:
    """Close a session in the middle of a transaction that only reads."""
    session = manager.session_factory(database.url, short_lived_sessions=True)
    assert item_names(session) == []
    own = {connection_id(session)}
    wait_until(lambda: database.connections() == own)
    session.close()


def through_an_exception(manager: SessionManager, database: Database) -> None:
    """Leave the block with an error of the database, and one of the caller's own."""
    add(manager, database, "row")
    with pytest.raises(IntegrityError):
        add(manager, database, "row")
    with pytest.raises(LookupError):
        add(manager, database, "undone", error=LookupError)


def through_an_error_that_is_survived(manager: SessionManager, database: Database) -> None:
    """Roll back after a failed statement, and go on in the same session."""
    with manager.session_factory(database.url, short_lived_sessions=True) as session:
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT nothing FROM nowhere"))
        session.rollback()
        session.add(Item(name="row"))
        session.commit()


def through_a_killed_connection(manager: SessionManager, database: Database) -> None:
    """Lose the connection, roll back, and go on with another in the same session."""
    with manager.session_factory(database.url, short_lived_sessions=True) as session:
        kill_connection(session, database)
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1"))
        session.rollback()
        session.add(Item(name="row"))
        session.commit()


def through_isolation_levels(manager: SessionManager, database: Database) -> None:
    """Use another isolation level for one transaction."""
    with manager.session_factory(database.url, short_lived_sessions=True) as session:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        session.add(Item(name="row"))
        session.commit()


@in_both_phases
@pytest.mark.parametrize(
    "use",
    [
        through_create_session,
        through_begin,
        through_run,
        through_reading,
        through_an_exception,
        through_an_error_that_is_survived,
        through_a_killed_connection,
        through_isolation_levels,
    ],
    ids=lambda use: use.__name__.removeprefix("through_"),
)
@pytest.mark.twin_cases(database=["psycopg", "pymysql"], call=[in_child])
def test_nothing_is_left(
    database: Database,
    call: Callable,
    use: Callable[[SessionManager, Database], None],
    manager_class: ManagerClass,
) -> None:
    """After the session the registry has no factory and the server counts no connection."""
    with manager_class(metadata=ItemBase.metadata) as manager:
        manager.session_factory(database.url, short_lived_sessions=True).close()

        def run() -> None:
            use(manager, database)
            assert manager._sessions == {}
            [stats] = manager.stats().databases
            assert (stats.checked_out, stats.idle) == (0, 0)
            wait_until(lambda: not database.connections())

        call(run)
        wait_until(lambda: not database.connections())


@in_both_phases
def test_each_call_gives_a_factory_of_its_own(
    tmp_path: Path, call: Callable, manager_class: ManagerClass, sqlite: str
) -> None:
    """Two calls give two factories on one engine, and neither is the cached one."""

    def run() -> tuple[int, int, bool]:
        with manager_class() as manager:
            url = f"{sqlite}:///{tmp_path / 'one.db'}"
            pairs = [manager.create_session(url, short_lived_sessions=True) for _ in range(2)]
            kept = manager.create_session(url)
            engines, factories = (set(found) for found in zip(*pairs, kept, strict=True))
            return len(engines), len(factories), manager._sessions == {url: kept[1]}

    assert call(run) == (1, 3, True)


def test_other_sessions_keep_their_connections(
    database: Database, manager_class: ManagerClass
) -> None:
    """Beside short-lived sessions the others pool as ever: neither closes the other's."""

    def run() -> None:
        with manager_class(metadata=ItemBase.metadata) as manager:
            with manager.session_factory(database.url) as session:
                kept = connection_id(session)
                in_threads([lambda i=i: add(manager, database, f"row {i}") for i in range(4)])
                assert connection_id(session) == kept
            wait_until(lambda: database.connections() == {kept})
            with manager.session_factory(database.url) as session:
                assert connection_id(session) == kept

    in_child(run)


def test_pooled_connection_that_was_borrowed_is_closed(
    database: Database, manager_class: ManagerClass
) -> None:
    """A short-lived session that was given a pooled connection closes that one."""

    def run() -> Any:
        with manager_class(metadata=ItemBase.metadata) as manager:
            manager.session_factory(database.url).close()
            wait_until(lambda: len(database.connections()) == 1)
            add(manager, database, "row")
            wait_until(lambda: not database.connections())
            with manager.session_factory(database.url) as session:
                return item_names(session)

    assert in_child(run) == ["row"]

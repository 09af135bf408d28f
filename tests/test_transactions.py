"""``begin``: commit, rollback and close are exact, as the server sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError

from tests.helpers import wait_until
from tests.items import (
    Item,
    ItemBase,
    connection_id,
    item_names,
    kill_connection,
    open_transactions,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.orm import Session

    from sessionmgr import SessionManager
    from tests.async_facade import ManagerClass
    from tests.servers import Database

pytestmark = pytest.mark.twin_cases(manager=["always"])

DEFERRED = """
CREATE TABLE deferred (
    id INTEGER PRIMARY KEY,
    parent INTEGER REFERENCES deferred (id) DEFERRABLE INITIALLY DEFERRED
)
"""


@pytest.fixture(params=["always", "never"])
def manager(
    request: pytest.FixtureRequest, manager_class: ManagerClass
) -> Iterator[SessionManager]:
    """Return a manager that keeps connections, and one that does not."""
    with manager_class(metadata=ItemBase.metadata, pooling=request.param) as manager:
        yield manager


def check_at_rest(manager: SessionManager, database: Database) -> None:
    """Check that the server has no open transaction, and no connection that is not pooled."""
    wait_until(lambda: not open_transactions(database))
    [stats] = manager.stats().databases
    assert stats.checked_out == 0
    assert stats.idle == (1 if manager.pooling == "always" else 0)
    wait_until(lambda: len(database.connections()) == stats.idle)


def names(manager: SessionManager, database: Database) -> list[str]:
    """Read what is committed."""
    with manager.session_factory(database.url) as session:
        return item_names(session)


def begin(manager: SessionManager, database: Database, work: Callable[[Session], None]) -> None:
    """Do work in a transaction."""
    with manager.begin(database.url) as session:
        work(session)


def test_open_transactions_are_seen(manager: SessionManager, database: Database) -> None:
    """The check of the other tests sees a transaction that is open."""
    with manager.begin(database.url) as session:
        session.add(Item(name="row"))
        session.flush()
        wait_until(lambda: open_transactions(database) == {connection_id(session)})


def test_end_of_the_block_commits_and_closes(manager: SessionManager, database: Database) -> None:
    """After the block the rows are there and the transaction is over."""
    with manager.begin(database.url) as session:
        session.add(Item(name="row"))
    check_at_rest(manager, database)
    assert not session.in_transaction()
    assert not session.identity_map
    assert names(manager, database) == ["row"]


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_exception_rolls_back_and_closes(
    manager: SessionManager, database: Database, error: type[BaseException]
) -> None:
    """Any exception leaves nothing of the block, and reaches the caller as it is."""
    raised = error("of the caller")

    def work(session: Session) -> None:
        session.add(Item(name="undone"))
        session.flush()
        raise raised

    with pytest.raises(error) as caught:
        begin(manager, database, work)
    assert caught.value is raised
    check_at_rest(manager, database)
    assert names(manager, database) == []


def test_failing_flush_rolls_back_and_closes(manager: SessionManager, database: Database) -> None:
    """An error of the commit's own flush undoes the rows before it."""
    with pytest.raises(IntegrityError):
        begin(manager, database, lambda s: s.add_all([Item(name="same"), Item(name="same")]))
    check_at_rest(manager, database)
    assert names(manager, database) == []


@pytest.mark.parametrize("database", ["psycopg", "psycopg2"], indirect=True)
def test_failing_commit_rolls_back_and_closes(manager: SessionManager, database: Database) -> None:
    """A constraint that only the commit checks leaves nothing of the block."""

    def work(session: Session) -> None:
        session.add(Item(name="undone"))
        session.execute(text("INSERT INTO deferred VALUES (1, 2)"))

    begin(manager, database, lambda session: session.execute(text(DEFERRED)))
    with pytest.raises(IntegrityError):
        begin(manager, database, work)
    check_at_rest(manager, database)
    assert names(manager, database) == []


def test_nested_transaction_rolls_back_alone(manager: SessionManager, database: Database) -> None:
    """What fails within a savepoint is undone, and the rest is committed."""
    with manager.begin(database.url) as session:
        session.add(Item(name="kept"))
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add_all([Item(name="undone"), Item(name="undone")])
    check_at_rest(manager, database)
    assert names(manager, database) == ["kept"]


def test_block_may_roll_back_itself(manager: SessionManager, database: Database) -> None:
    """A block that rolls back, or closes its session, commits nothing afterwards."""

    def end(session: Session, how: str) -> None:
        session.add(Item(name=how))
        session.flush()
        getattr(session, how)()

    for how in ("rollback", "close"):
        with manager.begin(database.url) as session:
            end(session, how)
    check_at_rest(manager, database)
    assert names(manager, database) == []


def test_block_that_goes_on_after_its_commit_is_told(
    manager: SessionManager, database: Database
) -> None:
    """A block commits once: what it does after a commit of its own raises."""

    def work(session: Session) -> None:
        session.add(Item(name="committed"))
        session.commit()
        session.add(Item(name="undone"))
        session.flush()

    with pytest.raises(InvalidRequestError):
        begin(manager, database, work)
    check_at_rest(manager, database)
    assert names(manager, database) == ["committed"]


def test_lost_connection_is_not_retried_by_begin(
    manager: SessionManager, database: Database
) -> None:
    """A connection killed in the block is the driver's error; nothing is left or half done."""

    def work(session: Session) -> None:
        session.add(Item(name="undone"))
        session.flush()
        kill_connection(session, database)
        item_names(session)

    with pytest.raises(DBAPIError) as caught:
        begin(manager, database, work)
    assert caught.value.connection_invalidated
    assert names(manager, database) == []
    check_at_rest(manager, database)


def test_session_options_apply(
    manager: SessionManager, database: Database, manager_class: ManagerClass
) -> None:
    """``session_options`` are those of every session of the manager."""
    options: dict[str, Any] = {"expire_on_commit": False, "info": {"mark": 1}}
    with (
        manager_class(
            metadata=ItemBase.metadata, pooling=manager.pooling, session_options=options
        ) as configured,
        configured.begin(database.url) as session,
    ):
        item = Item(name="row")
        session.add(item)
        assert session.info["mark"] == 1
    assert item.name == "row"

"""Fork, in every way: the child gets connections of its own, the parent goes on with its own."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError

from sessionmgr import SessionManager
from tests.fork_helpers import (
    LEAVES,
    WAYS,
    fork,
    portable,
    run_program_for_each,
    status_of,
)
from tests.helpers import wait_until
from tests.items import Item, ItemBase, connection_id, item_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from tests.fork_helpers import Ended
    from tests.servers import Database
    from tests.servers.postgresql import PostgreSQL

STATES = ("idle", "checked out", "transaction")
"""What the parent's connection is at the fork."""

in_every_state = pytest.mark.parametrize("state", STATES)
in_both_poolings = pytest.mark.parametrize("pooling", ["always", "forked"])


def manage(pooling: Any = "always") -> SessionManager:
    """Make a manager of items."""
    return SessionManager(pooling=pooling, metadata=ItemBase.metadata)


class Parent:
    """What a parent does with its one connection before a fork, and after.

    The server first lets go of the connections of the parent before this one, and of its children.
    """

    def __init__(self, manager: SessionManager, database: Database, state: str) -> None:
        wait_until(lambda: not database.connections())
        self.manager, self.database, self.state = manager, database, state
        self.session: Session | Connection = manager.session_factory(database.url)
        self.id = connection_id(self.session)
        if state == "checked out":
            self.session.close()
            self.session = manager.get_engine(database.url).connect()
            assert connection_id(self.session) == self.id
            self.session.rollback()
        elif state == "transaction":
            self.session.add(Item(name="uncommitted"))
            self.session.flush()
        else:
            self.session.close()

    def go_on(self) -> dict[str, Any]:
        """Use the connection again, end its transaction, and tell what is there."""
        if self.state == "idle":
            self.session = self.manager.session_factory(self.database.url)
        after = connection_id(self.session)
        own = list(self.session.scalars(select(Item.name)))
        if self.state == "transaction":
            self.session.commit()
        self.session.close()
        with self.manager.begin(self.database.url) as session:
            committed = item_names(session)
            session.query(Item).delete()
        return {"before": self.id, "after": after, "own": own, "committed": committed}


def use_own(manager: SessionManager, database: Database) -> dict[str, Any]:
    """In a child, open two sessions one after the other, and tell what they and the server see."""
    with manager.session_factory(database.url) as session:
        first, names = connection_id(session), item_names(session)
        on_server = database.connections()
    with manager.session_factory(database.url) as session:
        second = connection_id(session)
    return {"ids": {first, second}, "server": on_server, "names": names, "forked": manager.forked}


def fork_and_go_on(database: Database, state: str, way: str, leave: str) -> tuple[Ended, Any]:
    """Fork while the connection is in a state, let the child end, and go on in the parent."""
    with manage() as manager:
        parent = Parent(manager, database, state)
        ended = fork(way, lambda: use_own(manager, database), leave).end()
        return ended, parent.go_on()


def check(leave: str, state: str, ended: Ended, parent: dict[str, Any]) -> None:
    """Check that the child was apart from the parent, and the parent went on undisturbed."""
    assert ended.noise == ""
    assert ended.status == status_of(leave)
    open_here = {parent["before"]}
    results = ended.result if isinstance(ended.result, list) else [ended.result]
    if len(results) > 1:
        worker, _, worker_after = results
        assert worker["ids"] == worker_after["ids"]  # it too went on with its own
        results.pop()
    for child in results:  # each is forked by the one before it
        assert child["forked"]
        assert child["names"] == []  # the parent's row was not committed by the fork
        assert len(child["ids"]) == 1
        assert not child["ids"] & open_here
        open_here |= child["ids"]
        assert child["server"] == open_here
    assert parent["after"] == parent["before"]
    written = ["uncommitted"] if state == "transaction" else []
    assert parent["own"] == parent["committed"] == written


@in_every_state
@pytest.mark.parametrize("way", WAYS)
def test_child_has_its_own_connection_and_parent_keeps_its(
    database: Database, state: str, way: str
) -> None:
    """However a process forks and its child leaves, neither touches the other's connection."""
    outcomes = run_program_for_each(LEAVES, fork_and_go_on, portable(database), state, way)
    for leave, (ended, parent) in outcomes.items():
        check(leave, state, ended, parent)


@in_every_state
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_fork_over_tls(
    tls_postgresql: PostgreSQL, make_database: Callable[..., Database], driver: str, state: str
) -> None:
    """A child says no goodbye in the parent's TLS session, whichever way it leaves."""
    database = make_database(driver, tls_postgresql)
    outcomes = run_program_for_each(LEAVES, fork_and_go_on, portable(database), state, "os.fork")
    for leave, (ended, parent) in outcomes.items():
        check(leave, state, ended, parent)


def disconnect(call: Callable[[], object]) -> str:
    """Call what must fail for want of its connection, and return the error's text."""
    with pytest.raises(DBAPIError) as caught:
        call()
    assert caught.value.connection_invalidated
    return str(caught.value)


def use_inherited(session: Session | Connection, act: str) -> tuple[str, int]:
    """In a child, use what the parent has in use, end it, and use it as new."""
    acts: dict[str, Callable[[], object]] = {
        "execute": lambda: session.execute(text("SELECT 1")),
        "commit": session.commit,
    }
    error = disconnect(acts[act])
    session.rollback()
    own = connection_id(session)
    session.close()
    return error, own


def inherit_session(database: Database, pooling: str, case: tuple[str, str]) -> Any:
    """Fork with a transaction open whose Session or Connection the child uses."""
    kind, act = case
    with manage(pooling) as manager:
        session: Session | Connection = manager.session_factory(database.url)
        if kind == "connection":
            session.close()
            session = manager.get_engine(database.url).connect()
        with session:
            session.execute(insert(Item).values(name=f"{kind} {act}"))
            before = connection_id(session)
            ended = fork("os.fork", lambda: use_inherited(session, act), "sys.exit").end()
            after = connection_id(session)
            session.commit()
            return ended, before, after, list(session.scalars(select(Item.name)))


@in_both_poolings
def test_inherited_session_is_disconnected_in_child(database: Database, pooling: str) -> None:
    """A Session or Connection in use at the fork fails in the child as a lost connection does.

    Its rollback is silent, and then it is on a connection of the child's.
    """
    cases = [(kind, act) for kind in ("session", "connection") for act in ("execute", "commit")]
    outcomes = run_program_for_each(cases, inherit_session, portable(database), pooling)
    for (kind, act), (ended, before, after, names) in outcomes.items():
        error, own = ended.result
        assert "belongs to the process that forked" in error
        assert (ended.noise, ended.status) == ("", 0)
        assert after == before != own
        assert f"{kind} {act}" in names


def fork_within_blocks(database: Database, leave: str) -> Any:
    """Fork within ``with`` statements, which the child leaves as well as the parent."""
    with manage("forked") as manager:
        with manager.begin(database.url) as session:
            session.add(Item(name=f"{leave} one"))
            session.flush()
            with manager.session_factory(database.url) as other, other.begin():
                other.add(Item(name=f"{leave} two"))
                other.flush()
                before = connection_id(session), connection_id(other)
                ended = fork("os.fork", lambda: None, leave).end()
                after = connection_id(session), connection_id(other)
        with manager.session_factory(database.url) as session:
            return ended, before, after, item_names(session)


def test_child_leaves_with_blocks_of_parent(database: Database) -> None:
    """A child that leaves through the parent's ``with`` blocks ends nothing of the parent's."""
    outcomes = run_program_for_each(LEAVES, fork_within_blocks, portable(database))
    for leave, (ended, before, after, names) in outcomes.items():
        assert (ended.noise, ended.status) == ("", status_of(leave))
        assert after == before
        assert {f"{leave} one", f"{leave} two"} <= set(names)


def use_driver_connections(raw: Any, driver_connection: Any) -> list[str]:
    """In a child, use what the parent has of the pool, and of the driver itself."""
    refusals = []
    for connection in (raw, driver_connection):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - each driver has its own
            connection.cursor().execute("SELECT 1")
        refusals.append(type(caught.value).__name__)
        connection.close()
    return refusals


def inherit_driver_connections(database: Database, leave: str) -> Any:
    """Fork with a raw connection in use."""
    with manage("forked") as manager:
        engine = manager.get_engine(database.url)
        function = "pg_backend_pid" if engine.name == "postgresql" else "connection_id"
        with closing(engine.raw_connection()) as raw:
            driver_connection = raw.driver_connection
            before = ask_driver(raw, function)
            child = fork("os.fork", lambda: use_driver_connections(raw, driver_connection), leave)
            return child.end(), before, ask_driver(raw, function)


def ask_driver(raw: Any, function: str) -> Any:
    """Return what a function of the database returns, past SQLAlchemy."""
    with closing(raw.cursor()) as cursor:
        cursor.execute(f"SELECT {function}()")
        return cursor.fetchone()


def test_raw_connection_is_dead_in_child(database: Database) -> None:
    """A child can neither talk nor say goodbye on a connection of the driver's own kind."""
    outcomes = run_program_for_each(LEAVES, inherit_driver_connections, portable(database))
    for leave, (ended, before, after) in outcomes.items():
        assert (ended.noise, ended.status) == ("", status_of(leave))
        assert len(ended.result) == 2
        assert set(ended.result) <= {"OperationalError", "InterfaceError"}
        assert after == before


def inherit_detached(database: Database, leave: str) -> Any:
    """Fork with a connection that was taken out of its pool for good."""
    with manage() as manager:
        connection = manager.get_engine(database.url).connect()
        connection.detach()
        with connection:
            before = connection_id(connection)
            child = fork("os.fork", lambda: disconnect(lambda: connection_id(connection)), leave)
            ended = child.end()
            return ended, before, connection_id(connection)


def test_detached_connection_stays_with_parent(database: Database) -> None:
    """A detached connection is severed in the child as those of the pool are."""
    outcomes = run_program_for_each(LEAVES, inherit_detached, portable(database))
    for leave, (ended, before, after) in outcomes.items():
        assert (ended.noise, ended.status) == ("", status_of(leave))
        assert after == before


def use_kept(kept: dict[str, Callable[[], Any]], database: Database) -> Any:
    """In a child, use what was kept from before the fork, all at the same time."""
    opened = {name: opening() for name, opening in kept.items()}
    ids = {name: connection_id(session) for name, session in opened.items()}
    on_server = database.connections()
    for session in opened.values():
        session.close()
    return ids, on_server


def fork_beside(
    parents: set[int], way: str, kept: dict[str, Callable[[], Any]], database: Database
) -> Ended:
    """Fork once the server has none but the parent's connections; those that were may linger."""
    wait_until(lambda: database.connections() == parents)
    return fork(way, lambda: use_kept(kept, database)).end()


def keep(database: Database, pooling: str, way: str) -> Any:
    """Fork with an engine, a variant of it and a sessionmaker: unused, in use and idle."""
    with manage(pooling) as manager:
        engine, factory = manager.create_session(database.url)
        kept = {
            "engine": engine.connect,
            "variant": engine.execution_options(isolation_level="AUTOCOMMIT").connect,
            "sessionmaker": factory,
        }
        unused = fork_beside(set(), way, kept, database)
        with factory() as session:
            before = connection_id(session)
            used = fork_beside({before}, way, kept, database)
        idle = fork_beside({before} if pooling == "always" else set(), way, kept, database)
        with factory() as session:
            return unused, used, idle, before, connection_id(session)


@in_both_poolings
def test_kept_engine_and_sessionmaker_work_in_child(database: Database, pooling: str) -> None:
    """An Engine and a sessionmaker from before the fork connect anew in the child."""
    ways = ("os.fork", "multiprocessing", "billiard")
    outcomes = run_program_for_each(ways, keep, portable(database), pooling)
    for unused, used, idle, before, after in outcomes.values():
        assert (after == before) is (pooling == "always")
        kept_idle = {before} if pooling == "always" else set()
        for ended, parents in ((unused, set()), (used, {before}), (idle, kept_idle)):
            ids, on_server = ended.result
            assert (ended.noise, ended.status) == ("", 0)
            assert len(set(ids.values())) == 3
            assert not set(ids.values()) & parents
            assert set(ids.values()) | parents == on_server

"""The parent is killed while its child lives on: the server frees the parent's locks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import NullPool, create_engine, select, text, update
from sqlalchemy.exc import OperationalError

from sessionmgr import SessionManager
from tests.fork_helpers import CHILD_TIMEOUT, fork, portable, program, seconds_since
from tests.helpers import wait_until
from tests.items import Item, ItemBase, connection_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from tests.fork_helpers import Program
    from tests.servers import Database

FREED_WITHIN = 1.0
"""Seconds after the parent's death: a promise of the library."""

GIVE_UP = {
    "postgresql": text("SET lock_timeout = '10s'"),
    "mysql": text("SET innodb_lock_wait_timeout = 10"),
}
"""Ends the wait for a lock that is never freed with an error."""


def select_for_update(session: Session) -> None:
    """Lock the row by reading it."""
    session.scalars(select(Item).with_for_update()).one()


def update_row(session: Session) -> None:
    """Lock the row by changing it."""
    session.execute(update(Item).values(count=Item.count + 1))


LOCKS: dict[str, Callable[[Session], None]] = {
    "select-for-update": select_for_update,
    "update": update_row,
}


def hold_lock(channel: Connection, database: Database, lock: str) -> None:
    """Fork a child while a row is locked, and wait for its end, which does not come."""
    with SessionManager(metadata=ItemBase.metadata) as manager:
        with manager.begin(database.url) as session:
            session.add(Item(name="row"))
        with manager.session_factory(database.url) as session:
            LOCKS[lock](session)
            fork("os.fork", lambda: live_on(channel, manager, database)).end()


def live_on(channel: Connection, manager: SessionManager, database: Database) -> None:
    """Tell of a connection of one's own again and again, until told to end."""
    while True:
        with manager.session_factory(database.url) as session:
            channel.send(connection_id(session))
        if channel.recv() == "end":
            return


def is_locked(engine: Engine) -> bool:
    """Return whether the row cannot be locked at once."""
    with engine.connect() as connection:
        try:
            connection.execute(select(Item.id).with_for_update(nowait=True)).one()
        except OperationalError:
            return True
    return False


def kill_parent(parent: Program, engine: Engine) -> float:
    """Kill the parent, and return for how many seconds the row stayed locked from then on."""
    with engine.connect() as connection:
        connection.execute(GIVE_UP[engine.name])  # which connects before the clock runs
        start = time.monotonic()
        parent.process.kill()
        connection.execute(update(Item).values(count=7))
        taken = seconds_since(start)
        connection.commit()
    return taken


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_of_killed_parent_are_freed(database: Database, lock: str) -> None:
    """A child that lives on does not keep alive what its killed parent had locked."""
    engine = create_engine(database.url, poolclass=NullPool)
    with program(hold_lock, portable(database), lock) as parent:
        childs_own = parent.receive()
        assert is_locked(engine)
        assert kill_parent(parent, engine) < FREED_WITHIN
        # the child has been there all the time, on its own connection, and still is
        wait_until(lambda: database.connections() == {childs_own})
        parent.channel.send("on")
        assert parent.receive() == childs_own
        parent.channel.send("end")
        assert parent.channel.poll(CHILD_TIMEOUT)
        with pytest.raises(EOFError):  # it has left
            parent.channel.recv()

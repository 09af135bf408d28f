"""One table for tests to write to, and what the server says of the connections that do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sqlalchemy import String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.helpers import wait_until

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from tests.servers import Database


class ItemBase(DeclarativeBase):
    """Base of the tests' own, so that ``sessionmgr.Base`` stays as it is."""


class Item(ItemBase):
    """A row with a name that no other row has."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    count: Mapped[int] = mapped_column(default=0)


def connection_id(session: Session | Connection) -> int:
    """Return the server's id of the connection of a session."""
    bind = session.get_bind() if isinstance(session, Session) else session
    postgresql = bind.dialect.name == "postgresql"
    found = session.scalar(select(func.pg_backend_pid() if postgresql else func.connection_id()))
    assert found is not None
    return int(found)


def kill_connection(session: Session, database: Database) -> None:
    """Have the server end the connection of a session, which has not noticed yet."""
    lost = connection_id(session)
    database.server.kill(lost)
    wait_until(lambda: lost not in database.connections())


def count_items(session: Session) -> int:
    """Return the number of rows."""
    return session.scalar(select(func.count()).select_from(Item)) or 0


def item_names(session: Session) -> list[str]:
    """Return the names of all rows, in alphabetical order."""
    return sorted(session.scalars(select(Item.name)))


def open_transactions(database: Database) -> set[int]:
    """Return the server's ids of the connections to a database that are in a transaction."""
    if database.is_postgresql:
        rows = database.server.query(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = %s AND backend_type = 'client backend' AND xact_start IS NOT NULL",
            database.name,
        )
        return {pid for (pid,) in rows}
    # information_schema.innodb_trx shows an old state for as long as it is read every 0.1 s
    [(_, _, status)] = database.server.query("SHOW ENGINE INNODB STATUS")
    active = re.findall(
        r"---TRANSACTION \S+ ACTIVE(?:(?!---).)*?thread id (\d+)", status, re.DOTALL
    )
    return {int(found) for found in active} & database.connections()

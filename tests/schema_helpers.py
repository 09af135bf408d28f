"""Tables that take more than CREATE TABLE, and ways in which making them fails."""

from __future__ import annotations

import enum
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    Engine,
    Enum,
    Index,
    Integer,
    MetaData,
    NullPool,
    Sequence,
    String,
    Table,
    create_engine,
    event,
    text,
)

from tests.servers.server import APP_PASSWORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database


class Mood(enum.Enum):
    """Values of a column."""

    GOOD = 1
    BAD = 2


def rich_metadata() -> MetaData:
    """Return tables with an Enum, a Sequence and indexes."""
    metadata = MetaData()
    tickets = Sequence("tickets", start=1, metadata=metadata)
    person = Table(
        "person",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("name", String(40), index=True),
        Column("mood", Enum(Mood, name="mood")),
        Column("ticket", Integer, tickets),
    )
    Index("person_name_mood", person.c.name, person.c.mood)
    Table("other", metadata, Column("id", Integer, primary_key=True), Column("mood", Enum(Mood)))
    return metadata


class Statements(list[str]):
    """The statements that engines sent; give :meth:`watch` to a manager as a callback."""

    def watch(self, engine: Engine) -> None:
        """Take note of each statement of an engine."""
        event.listen(engine, "before_cursor_execute", lambda *args: self.append(args[2]))


def fail_always(metadata: MetaData, fail: Callable[..., None]) -> list[int]:
    """Have each attempt to create tables fail; return a list that grows by one with each."""
    attempts: list[int] = []

    def before_create(_target: object, connection: Any, **_: object) -> None:
        attempts.append(len(attempts))
        fail(connection)

    event.listen(metadata, "before_create", before_create, insert=True)  # before types are made
    return attempts


def database_url(
    driver: str, make_database: Callable[..., Database], tmp_path: Path, sqlite: str = "sqlite"
) -> URL | str:
    """Return the URL of an empty database, in a file for the driver ``"sqlite"``.

    :param sqlite: what the file's URL begins with.
    """
    if driver == "sqlite":
        return f"{sqlite}:///{tmp_path / 'one.db'}"
    return make_database(driver).url


@contextmanager
def powerless_role(database: Database) -> Iterator[URL]:
    """Make a role that may read and write every table there is, and create nothing.

    :return: the database's URL for that role.
    """
    role, server = f"role_{uuid.uuid4().hex[:12]}", database.server
    if database.is_postgresql:
        owner = create_engine(database.url, poolclass=NullPool)

        def as_owner(statement: str) -> None:
            with owner.begin() as connection:
                connection.execute(text(statement))

        server.query(f"CREATE ROLE {role} LOGIN PASSWORD '{APP_PASSWORD}'")
        as_owner(f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO {role}")
        try:
            yield server.url(database.driver, database.name, user=role)
        finally:
            as_owner(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}")
            server.query(f"DROP ROLE {role}")
    else:
        server.query(f"CREATE USER {role}@'%' IDENTIFIED BY '{APP_PASSWORD}'")
        server.query(f"GRANT SELECT, INSERT ON {database.name}.* TO {role}@'%'")
        try:
            yield server.url(database.driver, database.name, user=role)
        finally:
            server.query(f"DROP USER {role}@'%'")

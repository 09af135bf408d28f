"""Creates the tables of a metadata once, however many processes try at the same time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import inspect
from sqlalchemy.orm import configure_mappers
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from . import forking
from .drift import drift
from .serverlock import server_lock
from .transient import is_contention, is_creation_race

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine, MetaData

__all__ = ("create_tables", "drop_tables", "has_tables", "upgrade_tables")

#: Attempts to create the tables: the first, and ten more.
ATTEMPTS = 11


def has_tables(engine: Engine, metadata: MetaData) -> bool:
    """Tell whether a database has every table of ``metadata``: one look for each schema.

    :param engine: an engine of the database.
    :param metadata: the tables.
    """
    with forking.gate.section():
        configure_mappers()
    return _attempts()(_look, engine, metadata)


def create_tables(engine: Engine, metadata: MetaData, database: str) -> None:
    """Create the tables of ``metadata`` that the database does not have.

    They are made under a lock of the database's own. What can still go wrong between
    processes, on databases for which no lock is known, is tried again, ten times, waiting 10 ms
    to 1 s.

    :param engine: an engine of the database.
    :param metadata: the tables, with the sequences, types and indexes that belong to them.
    :param database: the database's name for error texts.
    :raises SchemaLockError: when MySQL or MariaDB does not grant the lock within 60 s.
    """
    _attempts()(_create_under_lock, engine, metadata, database)


def _attempts() -> Retrying:
    return Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.01, min=0.01, max=1.0),
        retry=retry_if_exception(lambda error: is_creation_race(error) or is_contention(error)),
        reraise=True,
    )


def drop_tables(engine: Engine, metadata: MetaData) -> None:
    """Drop the tables of ``metadata`` that the database has."""
    metadata.drop_all(engine)


def _look(engine: Engine, metadata: MetaData) -> bool:
    with engine.connect() as connection:
        return _has_all(connection, metadata)


def _has_all(connection: Connection, metadata: MetaData) -> bool:
    wanted = {(connection.schema_for_object(t), t.name) for t in metadata.tables.values()}
    inspector = inspect(connection)
    for schema in {schema for schema, _ in wanted}:
        present = inspector.get_table_names(schema=schema)
        wanted -= {(schema, name) for name in present}
    return not wanted


def upgrade_tables(
    engine: Engine, metadata: MetaData, database: str, *, whole: bool = False
) -> list[str]:
    """Create missing tables, and add the columns that may be NULL to those that lack them.

    :param engine: an engine of the database.
    :param metadata: the tables.
    :param database: the database's name for error texts.
    :param whole: also add missing indexes, and widen columns that MySQL made too small.
    :return: the statements that were run.
    :raises SchemaLockError: when MySQL or MariaDB does not grant the lock within 60 s.
    """
    return _attempts()(_upgrade_under_lock, engine, metadata, database, whole)


def _create_under_lock(engine: Engine, metadata: MetaData, database: str) -> None:
    with _locked(engine, database) as connection:
        metadata.create_all(connection)


def _upgrade_under_lock(
    engine: Engine, metadata: MetaData, database: str, whole: bool
) -> list[str]:
    with _locked(engine, database) as connection:
        statements = drift(connection, metadata, whole=whole)
        for statement in statements:
            connection.exec_driver_sql(statement)
        return statements


@contextmanager
def _locked(engine: Engine, database: str) -> Iterator[Connection]:
    """Give a connection that holds the database's lock on changing its schema."""
    with engine.connect() as connection:
        # READ COMMITTED, whatever the engine is set to: under a snapshot taken before the lock
        # was granted, the tables that its last holder made are not there. AUTOCOMMIT would
        # let the lock go at once.
        if connection.dialect.name in ("postgresql", "mysql", "mariadb"):
            connection = connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin(), server_lock(connection, "schema", database):
            yield connection

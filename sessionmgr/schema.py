"""Creates the tables of a metadata once, however many processes try at the same time."""

from __future__ import annotations

from contextlib import contextmanager
from time import sleep
from typing import TYPE_CHECKING

from sqlalchemy import inspect
from sqlalchemy.orm import configure_mappers
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from . import forking
from .drift import drift
from .greenlets import sleep_in_greenlet
from .serverlock import server_lock
from .transient import is_contention, is_creation_race

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine, MetaData

__all__ = (
    "create_tables",
    "create_within",
    "drop_tables",
    "has_all",
    "has_tables",
    "upgrade_tables",
)

#: Attempts to create the tables: the first, and ten more.
ATTEMPTS = 11


def has_tables(engine: Engine, metadata: MetaData) -> bool:
    """Tell whether a database has every table of ``metadata``: one look for each schema.

    :param engine: an engine of the database.
    :param metadata: the tables.
    """
    with forking.gate.section():
        configure_mappers()
    return _attempts(engine)(_look, engine, metadata)


def create_tables(
    engine: Engine, metadata: MetaData, database: str, *, timeout: int | None = None
) -> None:
    """Create the tables of ``metadata`` that the database does not have.

    They are made under a lock of the database's own. What can still go wrong between
    processes, on databases for which no lock is known, is tried again, ten times, waiting 10 ms
    to 1 s.

    :param engine: an engine of the database.
    :param metadata: the tables, with the sequences, types and indexes that belong to them.
    :param database: the database's name for error texts.
    :param timeout: seconds to wait for the lock of a server; default: 60.
    :raises SchemaLockError: when a server does not grant the lock in time.
    """
    _attempts(engine)(_create_under_lock, engine, metadata, database, timeout)


def create_within(connection: Connection, metadata: MetaData) -> None:
    """Create the tables that a SQLite file lacks, in a transaction that may have locked it.

    :param connection: its connection; another one would wait for the lock.
    """
    metadata.create_all(connection)


def _attempts(engine: Engine) -> Retrying:
    return Retrying(
        sleep=sleep_in_greenlet if engine.dialect.is_async else sleep,
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
        return has_all(connection, metadata)


def has_all(connection: Connection, metadata: MetaData) -> bool:
    """Tell whether a database has every table of ``metadata``, as a connection sees it."""
    wanted = {(connection.schema_for_object(t), t.name) for t in metadata.tables.values()}
    inspector = inspect(connection)
    for schema in {schema for schema, _ in wanted}:
        present = inspector.get_table_names(schema=schema)
        wanted -= {(schema, name) for name in present}
    return not wanted


def upgrade_tables(
    engine: Engine,
    metadata: MetaData,
    database: str,
    *,
    whole: bool = False,
    timeout: int | None = None,
) -> list[str]:
    """Create missing tables, and add the columns that may be NULL to those that lack them.

    Each step is a transaction of its own, and takes the lock and looks anew: nobody has to wait
    for an index before he can read a table that has got a column.

    :param engine: an engine of the database.
    :param metadata: the tables.
    :param database: the database's name for error texts.
    :param whole: also add missing indexes, and widen columns that MySQL made too small,
        or for whole seconds.
    :param timeout: seconds to wait for the lock of a server; default: 60.
    :return: the statements that were run.
    :raises SchemaLockError: when a server does not grant the lock in time.
    """
    done: list[list[str]] = []
    attempts = _attempts(engine)
    while attempts(_upgrade_under_lock, engine, metadata, database, whole, timeout, done):
        pass
    return [statement for step in done for statement in step]


def _create_under_lock(
    engine: Engine, metadata: MetaData, database: str, timeout: int | None
) -> None:
    with _locked(engine, database, timeout) as connection:
        metadata.create_all(connection)


def _upgrade_under_lock(
    engine: Engine,
    metadata: MetaData,
    database: str,
    whole: bool,
    timeout: int | None,
    done: list[list[str]],
) -> bool:
    """Take the first step of those that are left; tell whether there are more.

    :param done: the steps that were taken, which grows. None is taken twice, whatever it led to.
    """
    with _locked(engine, database, timeout) as connection:
        left = [step for step in drift(connection, metadata, whole=whole) if step not in done]
        for statement in left[0] if left else ():
            connection.exec_driver_sql(statement)
    done += left[:1]
    return len(left) > 1


@contextmanager
def _locked(engine: Engine, database: str, timeout: int | None) -> Iterator[Connection]:
    """Give a connection that holds the database's lock on changing its schema."""
    with engine.connect() as connection:
        # READ COMMITTED, whatever the engine is set to: under a snapshot taken before the lock
        # was granted, the tables that its last holder made are not there. AUTOCOMMIT would
        # let the lock go at once.
        if connection.dialect.name in ("postgresql", "mysql", "mariadb"):
            connection = connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin(), server_lock(connection, "schema", database, timeout):
            yield connection

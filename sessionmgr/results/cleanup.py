"""Deletes what has expired: in short batches, one runner at a time, in nobody's way."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import datetime
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, exists, func, inspect, or_, select, tuple_

from sessionmgr.errors import EngineOptionsError, ResultArgumentError
from sessionmgr.options import check_count
from sessionmgr.serverlock import RunLock, lock_for_writing
from sessionmgr.transactions import transient_retries
from sessionmgr.urls import hide_secrets

from .arguments import in_utc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import ColumnElement, Connection, Select, Table

    from .access import ResultAccess
    from .tables import ResultTables

__all__ = (
    "ExpiringTable",
    "delete_expired",
    "expiring_tables",
    "lock_purpose",
    "naive_utc",
)

log = logging.getLogger("sessionmgr")

#: How many rows of a table without an index on date_done are looked at for each that a batch
#: may delete. It bounds a batch where hardly anything has expired, for SQLite's writers wait.
_WINDOW = 10

#: How many keys one statement names, as the drivers that allow least take them.
_KEYS = 500

#: Seconds between two batches on SQLite, at most; they are as long as the batch took. Writers
#: that wait for its lock look again up to every 0.1 s, and would hardly ever find it free.
_LONGEST_PAUSE = 0.1

#: Seconds until a server has noticed, at the latest, that the connection of the lock is gone.
_PATIENCE = 5.0


@dataclass(frozen=True)
class ExpiringTable:
    """A table whose rows expire.

    :param table: the table.
    :param indexed: whether there is an index that begins with ``date_done``. Tables made by
        Celery before 5.6.3 have none.
    :param chords: the table of the chords, where rows belong to those; a chord that has not
        expired keeps what returned long ago.
    """

    table: Table
    indexed: bool
    chords: Table | None = None

    def expired(self, end: datetime) -> ColumnElement[bool]:
        """Give the condition for rows that ended before a time."""
        expired = self.table.c.date_done < end
        if self.chords is None:
            return expired
        key = self.table.c.get("group_id", self.table.c.get("taskset_id"))
        later = or_(self.chords.c.date_done >= end, self.chords.c.date_done.is_(None))
        return expired & ~exists().where(self.chords.c.group_id == key, later)


@dataclass(frozen=True)
class _Batch:
    """What a batch did.

    :param deleted: how many rows are gone.
    :param position: where the next batch begins.
    :param more: whether there is a next one.
    """

    deleted: int
    position: Any
    more: bool


def delete_expired(
    access: ResultAccess,
    before: datetime,
    batch_size: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> int | None:
    """Delete what ended before a time, unless another runner is at it.

    :param access: to whose tables to go through.
    :param before: the time; without a time zone it is UTC.
    :param batch_size: rows in a transaction, at most.
    :param progress: is told after each batch how many rows are gone by now.
    :return: how many rows are gone; ``None`` when another runner is at it.
    :raises ResultArgumentError: when an argument cannot be.
    """
    end = naive_utc(before)
    try:
        check_count("batch_size", batch_size)
    except EngineOptionsError as error:
        raise ResultArgumentError(str(error)) from None
    purpose, tables = access.call(
        lambda _, connection: (
            lock_purpose(connection, access.tables),
            expiring_tables(connection, access.tables),
        )
    )
    lock = RunLock(access.engine, purpose)
    try:
        if not _take(access, lock):
            _say_another_runs(access)
            return None
        deleted = 0
        for each in tables:
            batch = _Batch(0, None, more=True)
            while batch.more:
                if not _keep(access, lock):
                    _say_another_runs(access)
                    return deleted
                batch = _run_batch(access, each, end, batch_size, batch.position)
                deleted += batch.deleted
                if progress is not None:
                    progress(deleted)
        return deleted
    finally:
        lock.release()


def lock_purpose(connection: Connection, tables: ResultTables) -> str:
    """Give what the lock of a runner is for: other tables of the same database are not in it.

    A digest of their place and name, for these may be longer than MySQL's names of locks.
    """
    schema = tables.task.schema or connection.dialect.default_schema_name
    digest = hashlib.sha256(repr((schema, str(tables.task.name))).encode())
    return f"cleanup.{digest.hexdigest()[:12]}"


def _say_another_runs(access: ResultAccess) -> None:
    log.info(
        "database %s: another cleanup of results is running, and this one leaves it to that",
        access.describe(),
    )


def _take(access: ResultAccess, lock: RunLock) -> bool:
    return bool(transient_retries(access.attempts)(lock.take))


def _keep(access: ResultAccess, lock: RunLock) -> bool:
    """See that the lock is held, and take it again if its connection was lost."""
    deadline = monotonic() + _PATIENCE
    held = lock.is_held() or _take(access, lock)
    while not held and monotonic() < deadline:
        sleep(0.05)
        held = _take(access, lock)
    return held


def naive_utc(before: datetime) -> datetime:
    """Give a time as the rows have it.

    :raises ResultArgumentError: when it is none.
    """
    if not isinstance(before, datetime):
        raise ResultArgumentError(f"before is a datetime, not {hide_secrets(before)}")
    return in_utc(before, "before")


def expiring_tables(connection: Connection, tables: ResultTables) -> list[ExpiringTable]:
    """List those of a store's tables that are there, as they are now."""
    inspector = inspect(connection)
    there = [
        table
        for table in (tables.task, tables.group, tables.chord, tables.part)
        if inspector.has_table(table.name, schema=table.schema)
    ]
    chords = tables.chord if tables.chord in there else None
    return [
        ExpiringTable(
            table,
            any(
                index["column_names"][:1] == ["date_done"]
                for index in inspector.get_indexes(table.name, schema=table.schema)
            ),
            chords if table in (tables.group, tables.part) else None,
        )
        for table in there
    ]


def _run_batch(
    access: ResultAccess, each: ExpiringTable, end: datetime, size: int, position: Any
) -> _Batch:
    """Delete a batch in a transaction of its own."""
    choose = _by_date if each.indexed or len(each.table.primary_key) > 1 else _by_key

    def work(_: object, connection: Connection) -> tuple[_Batch, float | None]:
        lock_for_writing(connection)
        locked = monotonic() if connection.dialect.name == "sqlite" else None
        return choose(connection, each, end, size, position), locked

    batch, locked = access.call(work, transaction=True)
    if locked is not None:
        sleep(min(monotonic() - locked, _LONGEST_PAUSE))
    return batch


def _by_date(
    connection: Connection, each: ExpiringTable, end: datetime, size: int, position: Any
) -> _Batch:
    """Delete the rows that ended first.

    Beginning at the time of the last batch spares PostgreSQL and MySQL the index entries of
    deleted rows, which stay until no transaction can see them.
    """
    done = each.table.c.date_done
    columns = (*each.table.primary_key, done)
    query = select(*columns).where(each.expired(end)).order_by(done).limit(size)
    rows = connection.execute(query if position is None else query.where(done >= position)).all()
    deleted = _delete(connection, each, end, [tuple(row[:-1]) for row in rows])
    newest = rows[-1].date_done if rows else None
    # neither rows deleted nor a step forward: a trigger, say, keeps them
    return _Batch(deleted, newest, more=len(rows) == size and (deleted > 0 or newest != position))


def _by_key(
    connection: Connection, each: ExpiringTable, end: datetime, size: int, position: Any
) -> _Batch:
    """Delete along the primary key: all batches together read the table once."""
    [key] = each.table.primary_key

    def after(query: Select[Any]) -> Select[Any]:
        return query if position is None else query.where(key > position)

    window = after(select(key).order_by(key).limit(_WINDOW * size)).subquery()
    last = connection.scalar(select(func.max(window.c[key.name])))
    if last is None:
        return _Batch(0, None, more=False)
    query = select(key).where(each.expired(end), key <= last).order_by(key).limit(size)
    keys = [tuple(row) for row in connection.execute(after(query))]
    position = keys[-1][0] if len(keys) == size else last
    return _Batch(_delete(connection, each, end, keys), position, more=True)


def _delete(
    connection: Connection, each: ExpiringTable, end: datetime, keys: Sequence[tuple[Any, ...]]
) -> int:
    """Delete rows by their keys, but for those that were stored anew since."""
    columns = list(each.table.primary_key)
    deleted = 0
    for start in range(0, len(keys), _KEYS):
        some = keys[start : start + _KEYS]
        # also where the key has several columns: MariaDB uses no index for a list of tuples
        statement = delete(each.table).where(
            columns[0].in_(list(dict.fromkeys(key[0] for key in some))), each.expired(end)
        )
        if len(columns) > 1:
            statement = statement.where(tuple_(*columns).in_(some))
        deleted += connection.execute(statement).rowcount
    return deleted

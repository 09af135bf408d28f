"""What a person asks of a store: how many results there are, and what its tables lack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from sessionmgr.drift import drift
from sessionmgr.manager import SessionManager
from sessionmgr.sqlite import is_missing_file

from .cleanup import expiring_tables, naive_utc

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Connection

    from .statements import Statements
    from .store import ResultStore

__all__ = ("Counts", "count_expired", "count_results", "has_tasks", "missing_ddl", "utc_text")


@dataclass(frozen=True)
class Counts:
    """How many results a database has.

    :param statuses: state -> how many tasks are in it, in alphabetical order.
    :param groups: how many groups are saved.
    :param oldest: when the first of the tasks ended, in UTC; ``None`` if none has.
    :param newest: when the last of them ended.
    """

    statuses: dict[str, int]
    groups: int
    oldest: datetime | None
    newest: datetime | None

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return sum(self.statuses.values())

    def as_dict(self) -> dict[str, Any]:
        """Give what turns into JSON."""
        return {
            "tasks": self.tasks,
            "statuses": self.statuses,
            "groups": self.groups,
            "oldest": utc_text(self.oldest),
            "newest": utc_text(self.newest),
        }


def utc_text(when: datetime | None) -> str | None:
    """Write a time of a row for programs to read."""
    return None if when is None else f"{when.isoformat()}+00:00"


def has_tasks(store: ResultStore) -> bool:
    """Tell whether the table of the tasks is there."""
    return store.access.call(lambda statements, _: bool(statements.layout.task.columns))


def count_results(store: ResultStore) -> Counts:
    """Count the tasks in each state, and the groups: one look at all rows.

    :param store: a store whose tables are there.
    """
    task, group = store.tables.task, store.tables.group
    times = (func.min(task.c.date_done), func.max(task.c.date_done))
    query = select(task.c.status, func.count(), *times).group_by(task.c.status)

    def read(statements: Statements, connection: Connection) -> Counts:
        rows = connection.execute(query).all()
        groups = 0
        if statements.layout.group.columns:
            groups = connection.scalar(select(func.count()).select_from(group)) or 0
        ends = [time for row in rows for time in row[2:] if time is not None]
        statuses = {str(status): count for status, count, *_ in rows}
        return Counts(
            dict(sorted(statuses.items())),
            groups,
            min(ends, default=None),
            max(ends, default=None),
        )

    return store.access.call(read)


def count_expired(store: ResultStore, before: datetime) -> dict[str, int]:
    """Count what :meth:`ResultStore.cleanup` would delete.

    :param store: a store.
    :param before: the time; without a time zone it is UTC.
    :return: the name of each table that is there -> how many of its rows ended before it.
    :raises ResultArgumentError: when it is no time.
    """
    end = naive_utc(before)

    def read(_: object, connection: Connection) -> dict[str, int]:
        queries = {
            each.table.fullname: select(func.count())
            .select_from(each.table)
            .where(each.expired(end))
            for each in expiring_tables(connection, store.tables)
        }
        return {name: connection.scalar(query) or 0 for name, query in queries.items()}

    return store.access.call(read)


def missing_ddl(store: ResultStore) -> list[str]:
    """Give the statements that would create or upgrade the tables of a store.

    A SQLite file that is not there is an empty database, and is not made.
    """
    metadata = store.tables.metadata
    if is_missing_file(store.access.engine().url):
        with SessionManager() as manager, manager.get_engine("sqlite://").connect() as connection:
            steps = drift(connection, metadata, whole=True)
    else:
        steps = store.access.call(lambda _, connection: drift(connection, metadata, whole=True))
    return [statement for step in steps for statement in step]

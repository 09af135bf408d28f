"""What a database has of the tables: columns, where ids come from, how long values may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlalchemy.dialects import mysql

from sessionmgr.errors import ResultTooLongError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Table

    from .tables import ResultTables

__all__ = ("Layout", "TableLayout", "read_layout")

#: Bytes that fit in MySQL's types: https://mariadb.com/kb/en/blob/. What is longer is cut off
#: there, without an error, unless sql_mode is strict.
_LIMITS: Mapping[type[Any], int] = {
    mysql.TINYBLOB: 2**8 - 1,
    mysql.BLOB: 2**16 - 1,
    mysql.MEDIUMBLOB: 2**24 - 1,
    mysql.TINYTEXT: 2**8 - 1,
    mysql.TEXT: 2**16 - 1,
    mysql.MEDIUMTEXT: 2**24 - 1,
}


@dataclass(frozen=True)
class TableLayout:
    """One table as it is in the database.

    :param columns: the names of the columns it has; none, when it is not there.
    :param numbers_itself: whether the database makes the ids; else a sequence does.
    :param limits: column -> the bytes or characters that fit, where more would be cut off.
    """

    columns: frozenset[str]
    numbers_itself: bool = True
    limits: Mapping[str, int] = field(default_factory=dict)

    def check(self, table: str, values: Mapping[str, Any]) -> None:
        """Raise when a value is too long for its column.

        :raises ResultTooLongError: when one is.
        """
        for column, limit in self.limits.items():
            size = _size(column, values.get(column))
            if size > limit:
                key = values.get("task_id", values.get("taskset_id"))
                grows = column not in ("task_id", "taskset_id", "status")
                widen = "Widen it with 'python -m sessionmgr results upgrade', or store less"
                raise ResultTooLongError(
                    f"{column} of {key!r} takes {size:,}, column {column} of table {table} holds"
                    f" {limit:,}. {widen if grows else 'Give it a shorter one'}"
                )


@dataclass(frozen=True)
class Layout:
    """The tables of a store as they are in one database."""

    task: TableLayout
    group: TableLayout
    chord: TableLayout
    part: TableLayout

    def has_tables(self) -> bool:
        """Tell whether every table is there, whatever columns it has."""
        return all(each.columns for each in (self.task, self.group, self.chord, self.part))

    def lacks(self, tables: ResultTables) -> bool:
        """Tell whether a table or a column is not there."""
        pairs = (
            (self.task, tables.task),
            (self.group, tables.group),
            (self.chord, tables.chord),
            (self.part, tables.part),
        )
        return any(set(table.c.keys()) - layout.columns for layout, table in pairs)


def read_layout(connection: Connection, tables: ResultTables) -> Layout:
    """Look what the database has: some queries for each schema, whatever the number of tables."""
    inspector = inspect(connection)
    found: dict[tuple[str | None, str], Any] = {}
    for schema in {table.schema for table in tables.metadata.tables.values()}:
        names = [table.name for table in tables.metadata.tables.values() if table.schema == schema]
        found |= inspector.get_multi_columns(schema=schema, filter_names=names)

    def layout(table: Table) -> TableLayout:
        return _read(connection.dialect.name, found.get((table.schema, table.name), []))

    return Layout(
        layout(tables.task), layout(tables.group), layout(tables.chord), layout(tables.part)
    )


def _size(column: str, value: Any) -> int:
    """Count bytes, or characters where the column counts those."""
    if isinstance(value, str) and column == "traceback":
        return len(value.encode())
    return len(value) if isinstance(value, (str, bytes)) else 0


def _read(dialect: str, columns: list[dict[str, Any]]) -> TableLayout:
    numbers_itself = dialect == "sqlite"
    limits: dict[str, int] = {}
    for column in columns:
        if column["name"] == "id":
            numbers_itself |= (
                column.get("autoincrement") is True
                or column.get("default") is not None
                or column.get("identity") is not None
            )
        if dialect in ("mysql", "mariadb"):
            limit = _LIMITS.get(type(column["type"]), getattr(column["type"], "length", None))
            if limit is not None:
                limits[column["name"]] = limit
    return TableLayout(frozenset(column["name"] for column in columns), numbers_itself, limits)

"""What a database lacks of a metadata's tables, as the statements that would add it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Sequence, inspect
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateSequence, CreateTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Column, Connection, Dialect, MetaData, Table
    from sqlalchemy.schema import ExecutableDDLElement

__all__ = ("drift",)

#: MySQL's types for bytes and for text, each from the smallest.
_GROWING = (
    (mysql.TINYBLOB, mysql.BLOB, mysql.MEDIUMBLOB, mysql.LONGBLOB),
    (mysql.TINYTEXT, mysql.TEXT, mysql.MEDIUMTEXT, mysql.LONGTEXT),
)


def drift(connection: Connection, metadata: MetaData, *, whole: bool) -> list[list[str]]:
    """Give the statements that make of a database what the metadata describes.

    They create tables, and add columns that may be NULL. What is there is never removed or made
    smaller.

    :param connection: a connection to the database.
    :param metadata: the tables.
    :param whole: also add missing indexes to tables that are there, and widen columns that MySQL
        made too small, or for whole seconds.
    :return: steps, each for a transaction of its own. On PostgreSQL nobody can read a table from
        the time a column is added until the commit, and an index may take minutes to build.
    """
    inspector = inspect(connection)
    there = [
        table
        for table in metadata.sorted_tables
        if inspector.has_table(table.name, schema=table.schema)
    ]
    steps = [_creations(connection, metadata)]
    steps += [list(_columns(connection, table, whole=whole)) for table in there]
    if whole:
        steps += [[statement] for table in there for statement in _indexes(connection, table)]
    return [step for step in steps if step]


def _creations(connection: Connection, metadata: MetaData) -> list[str]:
    """Give the statements that create the tables that are not there, with all they need."""
    inspector, dialect = inspect(connection), connection.dialect
    tables = [
        table
        for table in metadata.sorted_tables
        if not inspector.has_table(table.name, schema=table.schema)
    ]
    elements: list[ExecutableDDLElement] = []
    for table in tables:
        if dialect.supports_sequences:
            elements += [
                CreateSequence(column.default)
                for column in table.c
                if isinstance(column.default, Sequence)
                and not inspector.has_sequence(column.default.name, schema=table.schema)
            ]
        elements.append(CreateTable(table))
        elements += [CreateIndex(index) for index in _sorted_indexes(table)]
    return [_text(element, dialect) for element in elements]


def _columns(connection: Connection, table: Table, *, whole: bool) -> Iterator[str]:
    """Give the statements that add columns to a table that is there, or widen them."""
    columns = inspect(connection).get_columns(table.name, schema=table.schema)
    there, dialect = {each["name"]: each for each in columns}, connection.dialect
    alter = f"ALTER TABLE {dialect.identifier_preparer.format_table(table)}"
    for column in table.c:
        if column.name not in there:
            if column.nullable:
                yield f"{alter} ADD COLUMN {_text(CreateColumn(column), dialect)}"
        elif whole and _is_smaller(there[column.name]["type"], column, dialect):
            yield f"{alter} MODIFY COLUMN {_text(CreateColumn(column), dialect)}"


def _indexes(connection: Connection, table: Table) -> Iterator[str]:
    """Give the statements that add indexes to a table that is there."""
    indexes = inspect(connection).get_indexes(table.name, schema=table.schema)
    indexed = [each["column_names"] for each in indexes]
    for index in _sorted_indexes(table):
        if list(index.columns.keys()) not in indexed:
            yield _text(CreateIndex(index), connection.dialect)


def _is_smaller(there: Any, column: Column[Any], dialect: Dialect) -> bool:
    """Tell whether MySQL's column holds less than the described one, or times less exactly."""
    described: Any = column.type.dialect_impl(dialect)
    if isinstance(described, mysql.DATETIME) and isinstance(there, mysql.DATETIME):
        return (there.fsp or 0) < (described.fsp or 0)
    return any(
        type(there) in kinds
        and type(described) in kinds
        and kinds.index(type(there)) < kinds.index(type(described))
        for kinds in _GROWING
    )


def _sorted_indexes(table: Table) -> list[Any]:
    return sorted(table.indexes, key=lambda index: str(index.name))


def _text(element: Any, dialect: Dialect) -> str:
    return str(element.compile(dialect=dialect)).strip()

"""The tables of a store: Celery's two, and two of sessionmgr's for chords."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    String,
    Table,
    Text,
)
from sqlalchemy.dialects import mysql

from sessionmgr.errors import ResultArgumentError
from sessionmgr.urls import hide_secrets, list_names

from .records import utc_now

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("ResultTables", "build_tables", "check_names")

#: The tables that may be given names and schemas of the user's -> Celery's names.
NAMES: Mapping[str, str] = {"task": "celery_taskmeta", "group": "celery_tasksetmeta"}

#: The tables of chords, and the sequences of ids, may be given names as well -> sessionmgr's and
#: Celery's names. Celery reads its tables by its sequences, whatever the tables are called.
OTHER_NAMES: Mapping[str, str] = {
    "chord": "sessionmgr_chord",
    "part": "sessionmgr_chord_part",
    "task_sequence": "task_id_sequence",
    "group_sequence": "taskset_id_sequence",
}


#: How long names may be. PostgreSQL cuts off what is longer, and finds no table of the whole name:
#: https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS and
#: https://dev.mysql.com/doc/refman/8.4/en/identifier-length.html
_LONGEST: Mapping[str, tuple[int, str]] = {
    "postgresql": (63, "bytes"),
    "mysql": (64, "characters"),
    "mariadb": (64, "characters"),
}

#: Where the row that is to be written is called "excluded". In a table of that name PostgreSQL
#: stores nothing, and SQLite believes that each row is as it is to be.
_EXCLUDED = frozenset(("postgresql", "sqlite"))


@dataclass(frozen=True)
class ResultTables:
    """The tables of one store. They belong to it alone, whatever names other stores use.

    :param metadata: all four.
    :param task: one row for each task.
    :param group: one row for each saved group.
    :param chord: one row for each chord: how many parts it has, and how many have returned.
    :param part: one row for each returned part of a chord that is not complete.
    """

    metadata: MetaData
    task: Table
    group: Table
    chord: Table
    part: Table


def build_tables(
    names: Mapping[str, str] | None = None, schemas: Mapping[str, str] | None = None
) -> ResultTables:
    """Describe the tables as Celery 5.7 does, with room for larger ids.

    On MySQL there is room for larger results, and for fractions of seconds.

    :param names: ``"task"``, ``"group"``, ``"chord"`` or ``"part"`` -> the table's name;
        ``"task_sequence"`` or ``"group_sequence"`` -> the name of the sequence that makes the
        ids, on PostgreSQL and MariaDB.
    :param schemas: ``"task"`` or ``"group"`` -> the table's schema. The tables for chords are
        in that of the groups.
    :raises ResultArgumentError: when another table is named.
    """
    names = {**NAMES, **OTHER_NAMES, **_check("table_names", names, NAMES, OTHER_NAMES)}
    schemas = _check("table_schemas", schemas, NAMES)
    # all but the tasks' own are with the groups; sequences share their names with the tables
    places = {
        (schemas.get("task" if kind.startswith("task") else "group"), name)
        for kind, name in names.items()
    }
    if len(places) < len(names):
        raise ResultArgumentError(
            f"table_names: {hide_secrets(names)}: each table and sequence has a name of its own"
        )
    metadata = MetaData()
    return ResultTables(
        metadata,
        _task(metadata, names, schemas.get("task")),
        _group(metadata, names, schemas.get("group")),
        _chord(metadata, names, schemas.get("group")),
        _part(metadata, names, schemas.get("group")),
    )


def check_names(tables: ResultTables, dialect: str) -> None:
    """Check that a kind of database takes the names of tables, sequences and schemas.

    :param dialect: the name of SQLAlchemy's dialect.
    :raises ResultArgumentError: when it does not.
    """
    longest, unit = _LONGEST.get(dialect, (None, ""))
    for name in _names(tables):
        if longest is not None and len(name.encode() if unit == "bytes" else name) > longest:
            raise ResultArgumentError(
                f"table_names, table_schemas: {name!r} is too long for {dialect}, whose names"
                f" have {longest} {unit} at most"
            )
    for table in tables.metadata.tables.values():
        if dialect in _EXCLUDED and table.name.lower() == "excluded":
            raise ResultArgumentError(
                f"table_names: {table.name!r} has a meaning of its own in the statements of"
                f" {dialect}; give the table another name"
            )


def _names(tables: ResultTables) -> Iterator[str]:
    for table in tables.metadata.tables.values():
        yield table.name
        if table.schema is not None:
            yield table.schema
        for column in table.c:
            if isinstance(column.default, Sequence):
                yield column.default.name


def _check(option: str, given: Any, *known: Mapping[str, str]) -> Mapping[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ResultArgumentError(f"{option} is a mapping, not {hide_secrets(given)}")
    unknown = given.keys() - {name for names in known for name in names}
    if unknown:
        raise ResultArgumentError(
            f"{option}: there is no table {list_names(unknown)};"
            f" name {', '.join(map(list_names, known))}"
        )
    for table, name in given.items():
        if name is not None and not isinstance(name, str):
            raise ResultArgumentError(f"{option}: {table!r} is {hide_secrets(name)}, not a name")
    return {table: name for table, name in given.items() if name}


def _task(metadata: MetaData, names: Mapping[str, str], schema: str | None) -> Table:
    return Table(
        names["task"],
        metadata,
        _id(names["task_sequence"], schema),
        Column("task_id", String(155), unique=True),
        Column("status", String(50), default="PENDING"),
        Column("result", _binary()),
        Column("date_done", _time(), index=True, default=utc_now, onupdate=utc_now),
        Column("traceback", _text()),
        Column("children", _binary()),
        Column("name", String(155)),
        Column("args", _binary()),
        Column("kwargs", _binary()),
        Column("worker", String(155)),
        Column("retries", Integer),
        Column("queue", String(155)),
        Column("stamps", _binary()),
        schema=schema,
        sqlite_autoincrement=True,
    )


def _group(metadata: MetaData, names: Mapping[str, str], schema: str | None) -> Table:
    return Table(
        names["group"],
        metadata,
        _id(names["group_sequence"], schema),
        Column("taskset_id", String(155), unique=True),
        Column("result", _binary()),
        Column("date_done", _time(), index=True, default=utc_now),
        schema=schema,
        sqlite_autoincrement=True,
    )


def _chord(metadata: MetaData, names: Mapping[str, str], schema: str | None) -> Table:
    return Table(
        names["chord"],
        metadata,
        Column("group_id", String(155), primary_key=True),
        Column("size", Integer),  # not known before the last part is sent
        Column("added", Integer, nullable=False),
        Column("returned", Integer, nullable=False),
        Column("fired", _time()),
        Column("date_done", _time(), index=True),
        schema=schema,
    )


def _part(metadata: MetaData, names: Mapping[str, str], schema: str | None) -> Table:
    return Table(
        names["part"],
        metadata,
        Column("group_id", String(155), primary_key=True),
        Column("position", Integer, primary_key=True, autoincrement=False),
        Column("task_id", String(155), primary_key=True),
        Column("status", String(50)),
        Column("result", _binary()),
        Column("date_done", _time(), index=True),
        schema=schema,
    )


def _id(sequence: str, schema: str | None) -> Column[Any]:
    # Every upsert takes a number of the sequence, also where the row is there: Celery's
    # Integer would be used up at two thousand million writes.
    kind = BigInteger().with_variant(Integer, "sqlite")
    return Column(
        "id", kind, Sequence(sequence, schema=schema), primary_key=True, autoincrement=True
    )


def _binary() -> Any:
    # BLOB holds 64 KiB on MySQL and MariaDB
    return LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def _text() -> Any:
    return Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def _time() -> Any:
    # DATETIME holds whole seconds on MySQL and MariaDB
    return DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")

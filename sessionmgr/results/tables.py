"""The tables of a store: Celery's two, and two of sessionmgr's for chords."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

__all__ = ("ResultTables", "build_tables")

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
    """Describe the tables as Celery 5.7 does, with room for larger ids and, on MySQL, results.

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
        Column("date_done", DateTime, index=True, default=utc_now, onupdate=utc_now),
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
        Column("date_done", DateTime, index=True, default=utc_now),
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
        Column("fired", DateTime),
        Column("date_done", DateTime, index=True),
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
        Column("date_done", DateTime, index=True),
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

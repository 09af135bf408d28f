"""Writes a row, whether or not it is there: in one statement where the database has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ARRAY,
    String,
    Text,
    bindparam,
    cast,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from .sent import SentRows, SentStatement, portions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from sqlalchemy import ColumnElement, Connection, Table

__all__ = ("CHANNEL", "IGNORED", "MYSQL", "Upsert", "make_upsert")

CHANNEL = "sessionmgr_results"
"""The PostgreSQL channel on which the ids of tasks that ended are told."""


MYSQL = frozenset(("mysql", "mariadb"))
"""The names of the dialects of MySQL and MariaDB."""

#: What MySQL is to answer as "last insert id" when the row was left as it is: a number that
#: no AUTO_INCREMENT of this table has. Its row count cannot tell: with the FOUND_ROWS flag,
#: which SQLAlchemy sets, a row that was left alone counts as one that was inserted.
IGNORED = 2**62

#: Bytes and characters that are sent at once, unless one row has more: PostgreSQL takes a gigabyte,
#: and the rows are in memory once more meanwhile.
_LARGE = 2**24


class Upsert:
    """Writes rows of one table.

    :param table: the table.
    :param key: the unique column.
    :param columns: those to write beside the key.
    :param final: a value of ``status`` that is never replaced.
    :param kept: columns in which NULL does not replace what is there.
    """

    def __init__(
        self,
        table: Table,
        key: str,
        columns: Collection[str],
        *,
        final: str | None = None,
        kept: Collection[str] = (),
    ) -> None:
        self.table, self.key, self.final, self.kept = table, key, final, kept
        # the status last: MySQL assigns one after the other, and asks for the status each time
        self.columns = sorted(columns, key=lambda name: name == "status")

    def write(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        """Write one row; tell whether it was written, for the final one is not replaced."""
        raise NotImplementedError

    def write_many(self, connection: Connection, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows whose keys differ."""
        for values in rows:
            self.write(connection, values)

    def _new(self, name: str, excluded: Any) -> ColumnElement[Any]:
        new: ColumnElement[Any] = excluded[name]
        return func.coalesce(new, self.table.c[name]) if name in self.kept else new


class _OnConflict(Upsert):
    """PostgreSQL's and SQLite's ON CONFLICT."""

    def __init__(self, dialect: Any, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.statement = self._resolving(dialect.insert(self.table).inline())
        self._one = SentStatement(self.statement, self.table)

    def _resolving(self, statement: Any) -> Any:
        """Add to an INSERT what happens where the row is there."""
        changes = {name: self._new(name, statement.excluded) for name in self.columns}
        condition = None
        if self.final is not None:
            condition = self.table.c.status.is_distinct_from(self.final)
        return statement.on_conflict_do_update(
            index_elements=[self.table.c[self.key]], set_=changes, where=condition
        )

    def write(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        written: bool = self._one.execute(connection, values) > 0
        return written

    def write_many(self, connection: Connection, rows: Iterable[Mapping[str, Any]]) -> None:
        for batch in portions(rows, _LARGE):
            connection.execute(self.statement, batch)


class _PostgreSQL(_OnConflict):
    """PostgreSQL: many rows are one statement, whose parameters are the columns as arrays.

    :param notify: tell those who wait, in the same statement.
    """

    def __init__(self, *args: Any, notify: bool, **options: Any) -> None:
        super().__init__(postgresql, *args, **options)
        self._names = [self.key, *self.columns]
        # A cast to VARCHAR(n) would cut off what is longer; so it is for the column to refuse it.
        types = [self.table.c[name].type for name in self._names]
        columns = [
            cast(bindparam(name), ARRAY(Text() if isinstance(kind, String) else kind))
            for name, kind in zip(self._names, types, strict=True)
        ]
        rows = func.unnest(*columns).table_valued(*self._names).render_derived()
        self._many: Any = self._resolving(
            postgresql.insert(self.table).from_select(self._names, select(*rows.c))
        )
        if notify:
            told = func.pg_notify(CHANNEL, self.table.c[self.key])
            self._one = SentStatement(self.statement.returning(told), self.table)
            self._many = self._many.returning(told)

    def write_many(self, connection: Connection, rows: Iterable[Mapping[str, Any]]) -> None:
        for batch in portions(rows, _LARGE):
            arrays = {name: [values[name] for values in batch] for name in self._names}
            connection.execute(self._many, arrays)


class _OnDuplicateKey(Upsert):
    """MySQL's and MariaDB's ON DUPLICATE KEY UPDATE."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        statement = mysql.insert(self.table).inline()
        changes = [(name, self._new(name, statement.inserted)) for name in self.columns]
        if self.final is not None:
            # Text, not parameters: where there are many rows those are in VALUES only.
            # Most collations of columns take states for equal that differ in case.
            final: Any = literal_column(f"_utf8mb4'{self.final}' COLLATE utf8mb4_bin")
            there = self.table.c.status == final
            changes = [(name, func.if_(there, self.table.c[name], new)) for name, new in changes]
            number = self.table.c.id
            ignored = number + literal_column(f"0 * last_insert_id({IGNORED})")
            changes.insert(0, ("id", func.if_(there, ignored, number)))
        self.statement = statement.on_duplicate_key_update(changes)
        self._sent = SentRows(self.statement, self.table, self.key)

    def write(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        written: bool = self._sent.execute(connection, values) != IGNORED
        return written

    def write_many(self, connection: Connection, rows: Iterable[Mapping[str, Any]]) -> None:
        self._sent.execute_many(connection, list(rows))


class _UpdateThenInsert(Upsert):
    """Two statements, and the first again when another process was faster.

    The connection is in a transaction, which goes on after the INSERT that failed.
    """

    def write(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        if self._update(connection, values):
            return True
        # Not by "with": after a deadlock, say, the database may have no savepoint any more.
        savepoint = connection.begin_nested()
        try:
            connection.execute(insert(self.table), values)
        except IntegrityError:
            savepoint.rollback()
            if not self._is_there(connection, values):
                raise  # for another reason than the key
            return self._update(connection, values)
        savepoint.commit()
        return True

    def _is_there(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        key = self.table.c[self.key]
        return connection.execute(select(key).where(key == values[self.key])).first() is not None

    def _update(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        changes = {
            name: values[name]
            for name in self.columns
            if not (name in self.kept and values[name] is None)
        }
        statement = update(self.table).where(self.table.c[self.key] == values[self.key])
        if self.final is not None:
            statement = statement.where(self.table.c.status.is_distinct_from(self.final))
        return connection.execute(statement.values(changes)).rowcount > 0


def make_upsert(dialect: str, *args: Any, notify: bool = False, **options: Any) -> Upsert:
    """Make the upsert of a table in the database's own way.

    :param dialect: the name of SQLAlchemy's dialect.
    :param args: as for :class:`Upsert`, and ``options`` too.
    :param notify: tell those who wait, on PostgreSQL.
    """
    if dialect == "postgresql":
        return _PostgreSQL(*args, notify=notify, **options)
    makers: dict[str, Callable[..., Upsert]] = {
        "sqlite": lambda *args, **options: _OnConflict(sqlite, *args, **options),
        "mysql": _OnDuplicateKey,
        "mariadb": _OnDuplicateKey,
    }
    return makers.get(dialect, _UpdateThenInsert)(*args, **options)

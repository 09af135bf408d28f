"""The statements that count the parts of chords, for each kind of database that can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    DateTime,
    Integer,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite

from .upsert import IGNORED, MYSQL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Table

    from .layout import Layout
    from .tables import ResultTables

__all__ = ("ChordStatements", "chord_statements")


class ChordStatements:
    """What is said about chords; ``group`` and ``now`` are parameters of most of it.

    :param dialect: the name of SQLAlchemy's dialect.
    :param tables: the tables.
    """

    #: Whether :meth:`count` is one statement, and needs no transaction around it.
    counts_at_once = False

    def __init__(self, dialect: str, tables: ResultTables) -> None:
        chord, part = tables.chord, tables.part
        self.chord, self.part = chord, part
        this_chord, its_parts = (table.c.group_id == bindparam("group") for table in (chord, part))
        now = bindparam("now", type_=DateTime)
        row = {"group_id": bindparam("group"), "added": 0, "returned": 0, "date_done": now}
        unknown = {"size": None, "fired": None}

        initial = {**row, **unknown}
        over = chord.c.fired.is_not(None)
        anew: dict[str, Any] = {
            name: case((over, initial[name]), else_=chord.c[name])
            for name in ("size", "added", "returned")
        }
        anew.update(date_done=now, fired=None)  # the last: MySQL assigns one after the other
        self.begin = _make_or_change(dialect, chord, initial, anew)
        size: dict[str, Any] = {"size": bindparam("size"), "date_done": now}
        self.resize = _make_or_change(dialect, chord, {**row, **size}, size)
        more = {"returned": chord.c.returned + 1, "date_done": now}
        self.one_more = _make_or_change(dialect, chord, {**row, "returned": 1}, more)
        self.add = update(chord).where(this_chord).values(added=chord.c.added + 1, date_done=now)
        self.claim = update(chord).where(this_chord, chord.c.fired.is_(None)).values(fired=now)

        self.counted = (chord.c.returned, chord.c.size, chord.c.added, chord.c.fired)
        self.look = select(*self.counted).where(this_chord)
        chosen = select(part.c.task_id, part.c.status, part.c.result)
        self.parts = chosen.where(its_parts).order_by(part.c.position)
        self.forget = delete(part).where(its_parts)
        self.forget_late = self.forget.where(exists(select(1).where(this_chord, over)))

    def count(self, connection: Connection, row: Mapping[str, Any]) -> Any:
        """Count a part, unless it was counted before.

        :param row: the parameters that :meth:`_part` names.
        :return: how many have returned, how many there are, how many came in addition, and when
            somebody went on from there.
        """
        if self._is_new(connection, row):
            connection.execute(self.one_more, row)
        return connection.execute(self.look, row).one()

    def _is_new(self, connection: Connection, row: Mapping[str, Any]) -> bool:
        raise NotImplementedError

    def _part(self) -> dict[str, Any]:
        names = ("group", "position", "task", "status", "result", "now")
        columns = ("group_id", "position", "task_id", "status", "result", "date_done")
        return dict(zip(columns, map(bindparam, names), strict=True))


class _PostgreSQL(ChordStatements):
    """The part and the count in one statement, hence in one transaction."""

    counts_at_once = True

    def __init__(self, dialect: str, tables: ResultTables) -> None:
        super().__init__(dialect, tables)
        part = postgresql.insert(self.part).values(self._part()).on_conflict_do_nothing()
        new = part.returning(self.part.c.group_id).cte("new")
        row = select(
            bindparam("group", type_=self.chord.c.group_id.type),
            literal(0, Integer),
            select(func.count()).select_from(new).scalar_subquery(),
            bindparam("now", type_=DateTime),
        )
        statement = postgresql.insert(self.chord).from_select(
            ["group_id", "added", "returned", "date_done"], row
        )
        more = {
            "returned": self.chord.c.returned + statement.excluded.returned,
            "date_done": statement.excluded.date_done,
        }
        self.counting = statement.on_conflict_do_update(
            index_elements=[self.chord.c.group_id], set_=more
        ).returning(*self.counted)

    def count(self, connection: Connection, row: Mapping[str, Any]) -> Any:
        return connection.execute(self.counting, row).one()


class _SQLite(ChordStatements):
    def __init__(self, dialect: str, tables: ResultTables) -> None:
        super().__init__(dialect, tables)
        part = sqlite.insert(self.part).values(self._part()).on_conflict_do_nothing()
        self.keep = part.execution_options(preserve_rowcount=True)

    def _is_new(self, connection: Connection, row: Mapping[str, Any]) -> bool:
        return connection.execute(self.keep, row).rowcount > 0


class _MySQL(ChordStatements):
    def __init__(self, dialect: str, tables: ResultTables) -> None:
        super().__init__(dialect, tables)
        same = self.part.c.position + 0 * func.last_insert_id(IGNORED)
        part = mysql.insert(self.part).values(self._part())
        self.keep = part.on_duplicate_key_update(position=same)

    def _is_new(self, connection: Connection, row: Mapping[str, Any]) -> bool:
        return connection.execute(self.keep, row).lastrowid != IGNORED


def _make_or_change(
    dialect: str, table: Table, row: Mapping[str, Any], changes: Mapping[str, Any]
) -> Any:
    if dialect in MYSQL:
        return mysql.insert(table).values(row).on_duplicate_key_update(list(changes.items()))
    native: Any = postgresql if dialect == "postgresql" else sqlite
    statement = native.insert(table).values(row)
    return statement.on_conflict_do_update(index_elements=[table.c.group_id], set_=changes)


def chord_statements(dialect: str, tables: ResultTables, layout: Layout) -> ChordStatements | None:
    """Give the statements for a database; ``None``, where it lacks the tables or the means."""
    if not layout.chord.columns or not layout.part.columns:
        return None
    kinds = {"postgresql": _PostgreSQL, "sqlite": _SQLite, **dict.fromkeys(MYSQL, _MySQL)}
    return kinds[dialect](dialect, tables) if dialect in kinds else None

"""The statements of a store, for one database with the tables as it has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData, bindparam, delete, select

from .chord_statements import chord_statements
from .ids import IdList
from .records import EXTENDED, FIELDS, READY_STATES, SUCCESS
from .upsert import make_upsert

if TYPE_CHECKING:
    from sqlalchemy import Table

    from .layout import Layout, TableLayout
    from .tables import ResultTables

__all__ = ("Statements",)


class Statements:
    """What a store says to one database. They are made once, and hold no connection.

    :param dialect: the name of SQLAlchemy's dialect.
    :param tables: the tables as described.
    :param layout: the tables as they are. A column that is not there is not named; a table
        that is not there is taken to be as described.
    :param extended: whether the extended columns are in use.
    :param notify: whether results are told to those who wait, on PostgreSQL.
    """

    def __init__(
        self, dialect: str, tables: ResultTables, layout: Layout, *, extended: bool, notify: bool
    ) -> None:
        self.layout = layout
        self.dialect = dialect
        self.notifies = notify and dialect == "postgresql"
        task, group = tables.task, tables.group
        there = layout.task.columns or set(task.c.keys())
        unused = frozenset() if extended else EXTENDED
        #: Names of the fields that are written and read.
        self.fields = tuple(name for name in FIELDS if name in there and name not in unused)

        columns = [name for name in self.fields if name != "task_id"]
        writing = _numbered(task, layout.task)
        options: dict[str, Any] = {"final": SUCCESS, "kept": {"stamps"}}
        self.store = make_upsert(dialect, writing, "task_id", columns, **options)
        self.store_ready = make_upsert(
            dialect, writing, "task_id", columns, notify=notify, **options
        )
        self.store_group = make_upsert(
            dialect, _numbered(group, layout.group), "taskset_id", ["result", "date_done"]
        )

        #: What is said about chords, where the database has the tables.
        self.chords = chord_statements(dialect, tables, layout)
        self.ids = IdList(dialect, task.c.task_id)
        chosen = select(*(task.c[name] for name in self.fields))
        self.get = chosen.where(task.c.task_id == bindparam("id"))
        self.get_many = chosen.where(self.ids.condition)
        self.get_ready = self.get_many.where(task.c.status.in_(sorted(READY_STATES)))
        self.exists = select(task.c.task_id).where(task.c.task_id == bindparam("id"))
        self.forget = delete(task).where(self.ids.condition)
        self.get_group = select(group.c.taskset_id, group.c.result, group.c.date_done).where(
            group.c.taskset_id == bindparam("id")
        )
        self.delete_group = delete(group).where(group.c.taskset_id == bindparam("id"))


def _numbered(table: Table, layout: TableLayout) -> Table:
    """Give the table with ids from where this database has them."""
    if not layout.numbers_itself:
        return table
    numbering = table.to_metadata(MetaData())
    numbering.c.id.default = None  # the sequence, which is not there
    return numbering

"""What a run of the demo leaves in a database: rows, in tables of the demo's; and its removal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, func, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from sessionmgr.explain import reason
from sessionmgr.schema import drop_tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL, ColumnElement, Table
    from sqlalchemy.orm import Session

    from sessionmgr.manager import SessionManager

__all__ = ("Traces",)


class Traces:
    """One kind of rows of a run, in one database."""

    def __init__(
        self,
        what: str,
        tables: str,
        *,
        table: Table,
        mine: ColumnElement[bool],
    ) -> None:
        """Name them; nothing is connected yet.

        :param what: the rows, in a word.
        :param tables: the tables, in words.
        :param table: the one with the rows; it is dropped with all others of its metadata, if
            the run made it.
        :param mine: which of them are the run's.
        """
        #: what became of them; empty before :meth:`remove`.
        self.outcome = ""
        self._what, self._tables = what, tables
        self._table, self._mine = table, mine
        self._begun = self._made = False

    def begin(self, manager: SessionManager, key: str, announce: Callable[[], object]) -> None:
        """Write the first row.

        :param manager: the manager that has the database.
        :param key: its bind key.
        :param announce: makes the tables, if they are not there, and writes a row of the run. It
            shows that rows can be written, and keeps another run, which may have made the
            tables, from dropping them.
        """
        self._made = not inspect(manager.get_engine(key)).has_table(self._table.name)
        self._begun = True
        announce()

    def remove(self, manager: SessionManager, key: str, url: URL) -> None:
        """Remove the run's rows, and the tables if the run made them and no other one uses them.

        Nothing is done if nothing was begun.

        :param manager: the manager that has the database.
        :param key: its bind key.
        :param url: its URL, whose secrets must not be shown.
        """
        if not self._begun:
            return
        try:
            others = manager.run(key, self._remove_rows)
            if self._made and not others:
                drop_tables(manager.get_engine(key), self._table.metadata)
        except SQLAlchemyError as error:
            where = self._mine.compile(compile_kwargs={"literal_binds": True})
            self.outcome = (
                f"the demo's {self._what} could not be removed ({reason(error, url)}): delete"
                f" those with {where} from table {self._table.name}"
            )
        else:
            self.outcome = self._describe(others)

    def _remove_rows(self, session: Session) -> int:
        session.execute(delete(self._table).where(self._mine))
        return session.scalar(select(func.count()).select_from(self._table)) or 0

    def _describe(self, others: int) -> str:
        if not self._made:
            return f"the demo's {self._what} are removed, but not its {self._tables}, found there"
        if others:
            return (
                f"the demo's {self._what} are removed, but not its {self._tables}, in use by"
                " another run"
            )
        return f"the demo's {self._what} and its {self._tables} are removed"

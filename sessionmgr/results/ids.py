"""Asks for many ids at once: as few statements as a driver allows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, String, any_, bindparam, func, select

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import ColumnElement

__all__ = ("IdList",)


#: How many ids go into one statement. PostgreSQL takes them as one array, SQLite as one JSON
#: text. MySQL's drivers write them into the statement, which max_allowed_packet (16 MiB)
#: bounds.
_BATCHES = {"postgresql": 100_000, "sqlite": 100_000, "mysql": 10_000, "mariadb": 10_000}

#: Elsewhere: what every database allows in a list.
_BATCH = 500


class IdList:
    """The condition "this column is one of these ids", as a database takes it best.

    :param dialect: the name of SQLAlchemy's dialect.
    :param column: the column.
    """

    def __init__(self, dialect: str, column: ColumnElement[str]) -> None:
        self._dialect = dialect
        self._size = _BATCHES.get(dialect, _BATCH)
        self.condition = self._condition(column)

    def _condition(self, column: ColumnElement[str]) -> ColumnElement[bool]:
        if self._dialect == "postgresql":
            return column == any_(bindparam("ids", type_=ARRAY(String)))
        if self._dialect == "sqlite":
            each = func.json_each(bindparam("ids", type_=String)).table_valued("value")
            return column.in_(select(each.c.value))
        return column.in_(bindparam("ids", expanding=True))

    def batches(self, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Give the parameters of each statement that it takes."""
        for start in range(0, len(ids), self._size):
            batch = list(ids[start : start + self._size])
            yield {"ids": json.dumps(batch) if self._dialect == "sqlite" else batch}

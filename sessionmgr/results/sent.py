"""Statements that are compiled once, and then sent as the driver takes them."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, CursorResult, Dialect, Table

__all__ = ("SentRows", "SentStatement")

_OPTIONS = {"preserve_rowcount": True}

#: An upsert of MySQL's: what comes before the row, the row, what comes after it.
_UPSERT = re.compile(r"(.*? VALUES )(\(.*?\))((?: AS \w+)? ON DUPLICATE KEY UPDATE .*)", re.DOTALL)

#: A parameter with a name.
_NAMED = re.compile(r"%\((\w+)\)s")

#: Bytes and characters in a statement, at most, unless they are one row's. Drivers may double
#: them; MySQL takes 16 MiB, and some servers are set to 1 MiB (max_allowed_packet).
_LENGTH = 2**18


class SentStatement:
    """An INSERT of one row, whose parameters are named as the columns are.

    SQLAlchemy looks a statement's text up in a cache at each execution, and makes its parameters
    anew; that is as much work as all the rest of storing a result. The events of engines and the
    translation of errors are those of any statement.

    :param statement: the INSERT.
    :param table: the table.
    """

    def __init__(self, statement: Any, table: Table) -> None:
        self._statement, self._table = statement, table
        self._compiled: _Compiled | None = None

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> CursorResult[Any]:
        """Send it.

        :param values: column -> value; each time of the same columns.
        """
        compiled = self._for(connection, values)
        return connection.exec_driver_sql(
            compiled.text, compiled.parameters(values), execution_options=_OPTIONS
        )

    def _for(self, connection: Connection, values: Mapping[str, Any]) -> _Compiled:
        compiled = self._compiled
        if compiled is None or compiled.dialect is not connection.dialect:
            compiled = _Compiled(self._statement, self._table, connection.dialect, values)
            self._compiled = compiled
        return compiled


class SentRows(SentStatement):
    """An upsert of MySQL's of many rows.

    MySQL's drivers make one statement of many rows by themselves, but not where a row takes its
    id from a sequence. Parameters are in the rows alone.
    """

    def execute_many(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send some rows, in as few statements as their length allows.

        :param rows: at least one, all of the same columns.
        """
        compiled = self._for(connection, rows[0])
        found = _UPSERT.fullmatch(compiled.text)
        assert found is not None
        begin, row, end = found.groups()
        # PyMySQL's parameters have names, which would be the same in each row; it takes both forms
        names = _NAMED.findall(row)
        row = _NAMED.sub("%s", row)
        for portion in _portions(map(compiled.parameters, rows)):
            values = [[each[name] for name in names] if names else each for each in portion]
            text = f"{begin}{', '.join([row] * len(portion))}{end}"
            try:
                connection.exec_driver_sql(text, tuple(chain.from_iterable(values)))
            except DBAPIError as error:
                error.statement = f"{begin}{row}, ...{end}"  # not a hundred thousand characters
                raise


def _portions(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Give the parameters of rows in portions that fit in a statement."""
    portion: list[Any] = []
    length = 0
    for row in rows:
        values = row.values() if isinstance(row, dict) else row
        size = sum(len(value) for value in values if isinstance(value, (str, bytes)))
        if portion and length + size > _LENGTH:
            yield portion
            portion, length = [], 0
        portion.append(row)
        length += size
    yield portion


class _Compiled:
    """What a statement is for one dialect: another engine's may be of another version."""

    def __init__(
        self, statement: Any, table: Table, dialect: Dialect, values: Mapping[str, Any]
    ) -> None:
        self.dialect = dialect
        compiled = statement.compile(dialect=dialect, column_keys=list(values))
        self.text = str(compiled)
        self._constants = {k: v for k, v in compiled.params.items() if k not in values}
        self._order = compiled.positiontup
        processors: dict[str, Callable[[Any], Any] | None] = {
            name: table.c[name].type.dialect_impl(dialect).bind_processor(dialect)
            for name in values
        }
        self._processors = {name: each for name, each in processors.items() if each is not None}

    def parameters(self, values: Mapping[str, Any]) -> Any:
        """Give the parameters in the driver's form: by name, or in their order."""
        parameters = {**self._constants, **values}
        for name, process in self._processors.items():
            parameters[name] = process(parameters[name])
        if self._order is None:
            return parameters
        return tuple([parameters[name] for name in self._order])

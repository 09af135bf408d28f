"""A statement that is compiled once, and then sent as the driver takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection, CursorResult, Dialect, Table

__all__ = ("SentStatement",)

_OPTIONS = {"preserve_rowcount": True}


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
        compiled = self._compiled
        if compiled is None or compiled.dialect is not connection.dialect:
            compiled = _Compiled(self._statement, self._table, connection.dialect, values)
            self._compiled = compiled
        return connection.exec_driver_sql(
            compiled.text, compiled.parameters(values), execution_options=_OPTIONS
        )


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

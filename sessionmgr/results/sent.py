"""Statements that are compiled once, and then sent as the driver takes them."""

from __future__ import annotations

import re
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from sessionmgr.errors import ResultTooLongError
from sessionmgr.urls import masked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, Dialect, Table

__all__ = ("SentRows", "SentStatement", "portions")

MANY = 1000
"""Rows in one statement, of those that write many."""

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

    SQLAlchemy looks a statement's text up in a cache at each execution, makes its parameters
    anew, and keeps a context and a result for it; together that takes longer than all the rest
    of storing a result. The translation of errors is SQLAlchemy's, and so is everything where
    somebody listens to the engine's events, or has its statements logged.

    :param statement: the INSERT.
    :param table: the table.
    :param answer: what is asked of the driver's cursor: ``"rowcount"`` or ``"lastrowid"``.
    """

    def __init__(self, statement: Any, table: Table, answer: str = "rowcount") -> None:
        self._statement, self._table, self._answer = statement, table, answer
        self._compiled: _Compiled | None = None

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """Send it.

        :param values: column -> value; each time of the same columns.
        :return: the answer.
        """
        compiled = self._for(connection, values)
        text, parameters = compiled.text, compiled.parameters(values)
        if _is_watched(connection):
            result = connection.exec_driver_sql(text, parameters, execution_options=_OPTIONS)
            return getattr(result, self._answer)
        cursor: Any = None
        try:
            cursor = connection.connection.cursor()
            cursor.execute(text, parameters)
            answer = getattr(cursor, self._answer)
            cursor.close()
        except BaseException as error:  # noqa: BLE001 - what it is SQLAlchemy finds out
            # With a statement, SQLAlchemy takes any error for one of that; an interrupt is none.
            said = text if isinstance(error, connection.dialect.loaded_dbapi.Error) else None
            connection._handle_dbapi_exception(error, said, parameters, cursor, None)
        return answer

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

    For a statement that is too long the server would end the connection, as if that was lost, and
    so each time it is sent again. It is not sent.

    :param statement: the upsert.
    :param table: the table.
    :param key: the unique column.
    """

    def __init__(self, statement: Any, table: Table, key: str) -> None:
        super().__init__(statement, table, "lastrowid")
        self._key = key

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """Send one row, as :class:`SentStatement` does.

        :raises ResultTooLongError: when the statement would be too long for the server.
        """
        self._check_length(connection, values)
        return super().execute(connection, values)

    def execute_many(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send some rows, in as few statements as their length allows.

        :param rows: at least one, all of the same columns.
        :raises ResultTooLongError: when the statement of a row would be too long for the server.
        """
        for values in rows:
            self._check_length(connection, values)
        compiled = self._for(connection, rows[0])
        found = _UPSERT.fullmatch(compiled.text)
        assert found is not None
        begin, row, end = found.groups()
        # PyMySQL's parameters have names, which would be the same in each row; it takes both forms
        names = _NAMED.findall(row)
        row = _NAMED.sub("%s", row)
        for portion in portions(map(compiled.parameters, rows), _LENGTH):
            sent = [[each[name] for name in names] if names else each for each in portion]
            text = f"{begin}{', '.join([row] * len(portion))}{end}"
            try:
                connection.exec_driver_sql(text, tuple(chain.from_iterable(sent)))
            except DBAPIError as error:
                error.statement = f"{begin}{row}, ...{end}"  # not a hundred thousand characters
                raise

    def _check_length(self, connection: Connection, values: Mapping[str, Any]) -> None:
        if _length(values.values()) < _LENGTH:
            return
        compiled = self._for(connection, values)
        with closing(connection.connection.cursor()) as cursor:
            if not hasattr(cursor, "mogrify"):  # a driver that sends values beside the statement
                return
            # escaped bytes are up to twice as many, in each driver's own way
            try:
                statement = cursor.mogrify(compiled.text, compiled.parameters(values)).encode()
            except UnicodeDecodeError as error:  # mysqlclient has made it, and cannot show it
                statement = error.object
        size = len(statement)
        limit: Any = connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar()
        if size >= limit:
            raise ResultTooLongError(
                f"what is stored for {values[self._key]!r} takes {size:,} bytes in a statement, and"
                f" the server of database {masked(connection.engine.url)} takes {limit:,}. Raise"
                " its max_allowed_packet, or store less"
            )


def _is_watched(connection: Connection) -> bool:
    """Tell whether anybody would miss a statement that only the driver knows of.

    The events are asked for as SQLAlchemy does before it calls their listeners.
    """
    events = connection._has_events or connection.engine._has_events
    return events or connection._echo or bool(connection.dialect.dispatch.do_execute)


def portions(rows: Iterable[Any], longest: int) -> Iterator[list[Any]]:
    """Give rows in portions of :data:`MANY` at most.

    :param rows: mappings or sequences of values.
    :param longest: bytes and characters in a portion at most, unless they are one row's.
    """
    portion: list[Any] = []
    length = 0
    for row in rows:
        size = _length(row.values() if isinstance(row, dict) else row)
        if len(portion) == MANY or (portion and length + size > longest):
            yield portion
            portion, length = [], 0
        portion.append(row)
        length += size
    if portion:
        yield portion


def _length(values: Iterable[Any]) -> int:
    return sum(len(value) for value in values if isinstance(value, (str, bytes)))


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

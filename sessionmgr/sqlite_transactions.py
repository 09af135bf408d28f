"""How transactions begin on SQLite: at their first statement, and by what that is.

The sqlite3 module begins one before INSERT, UPDATE, DELETE and REPLACE only, and without taking
the lock for writing. So reads before that are no part of the transaction, DDL cannot be undone,
the end of a first SAVEPOINT is a commit, and a transaction that read before it writes may be
refused ("database is locked") although it was ready to wait. Here every transaction begins with
its first statement: deferred where that reads, which takes no lock that others would have to wait
for; else IMMEDIATE, for which it waits up to the busy timeout. With "writes" a statement that reads
begins none, as on a READ COMMITTED server each sees what was committed before it, and no later one
is refused because of it.
"""

from __future__ import annotations

import functools
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine.default import DefaultDialect

from .sqlite import autocommit, raw_connection
from .transient import note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import DBAPICursor, ExecutionContext
    from sqlalchemy.orm import Session

    from .sqlite import SQLiteSettings

__all__ = ("WRITES", "attach", "begin_for", "begin_writing", "first_keyword")

_DEFERRED, _IMMEDIATE = "BEGIN", "BEGIN IMMEDIATE"

#: The execution option of an engine, or a connection, whose transactions take the lock for writing
#: also where they begin by reading.
WRITES = "sessionmgr_writes"

#: The first keyword, after what SQLite skips.
_KEYWORD = re.compile(r"(?:[\s;\ufeff]|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*([a-z]+)", re.IGNORECASE)
#: How SQLAlchemy begins most statements: the same in a fifth of the time.
_RENDERED = {f"{keyword} ": keyword for keyword in ("SELECT", "INSERT", "UPDATE", "DELETE")}
_READS = frozenset(("SELECT", "VALUES", "EXPLAIN", "SAVEPOINT"))
#: What ends or begins transactions itself, or has another effect in one, or none.
_OTHERS = frozenset(
    "BEGIN COMMIT END ROLLBACK RELEASE PRAGMA VACUUM ATTACH DETACH".split()  # noqa: SIM905 - shorter
)
#: What follows the common table expressions of a statement that writes.
_DML = re.compile(r"\b(?:INSERT(?:\s|/)|REPLACE(?:\s|/)|UPDATE\b|DELETE(?:\s|/))", re.IGNORECASE)


def begin_for(statement: str, *, at_reads: bool = True) -> str | None:
    """Give the statement that begins a transaction whose first one is ``statement``.

    :param at_reads: whether a statement that reads begins one.
    :return: ``None`` for what does not belong into a transaction, or begins one itself.
    """
    keyword = first_keyword(statement)
    if keyword in _READS or (keyword == "WITH" and _DML.search(statement) is None):
        # alone, the end of a SAVEPOINT would be a commit
        return _DEFERRED if at_reads or keyword == "SAVEPOINT" else None
    return None if not keyword or keyword in _OTHERS else _IMMEDIATE


def first_keyword(statement: str) -> str:
    """Give the word that a statement begins with, in capitals; "" where there is none."""
    keyword = _RENDERED.get(statement[:7])
    if keyword is not None:
        return keyword
    found = _KEYWORD.match(statement)
    return "" if found is None else found[1].upper()


class _Beginning(DefaultDialect):
    """What a dialect gains by :func:`_beginning`."""

    supports_statement_cache = True

    def do_execute(
        self,
        cursor: DBAPICursor,
        statement: str,
        parameters: Any,
        context: ExecutionContext | None = None,
    ) -> None:
        if self._at_reads or statement[:7] != "SELECT ":  # else there is nothing to begin
            self._begin(cursor, statement, context)
        super().do_execute(cursor, statement, parameters, context)  # type: ignore[no-untyped-call]

    def do_executemany(
        self,
        cursor: DBAPICursor,
        statement: str,
        parameters: Any,
        context: ExecutionContext | None = None,
    ) -> None:
        self._begin(cursor, statement, context)
        super().do_executemany(cursor, statement, parameters, context)  # type: ignore[no-untyped-call]

    def do_execute_no_params(
        self, cursor: DBAPICursor, statement: str, context: ExecutionContext | None = None
    ) -> None:
        self._begin(cursor, statement, context)
        super().do_execute_no_params(cursor, statement, context)  # type: ignore[no-untyped-call]

    def _begin(self, cursor: DBAPICursor, statement: str, context: ExecutionContext | None) -> None:
        """Begin a transaction, unless there is one or the connection's user begins them."""
        begin = begin_for(statement, at_reads=self._at_reads)
        if begin is None:
            return
        connection = getattr(cursor, "connection", None)
        if connection is None and context is not None:  # aiosqlite's has none
            connection = context.root_connection.connection.driver_connection
        if not _may_begin(connection):
            return
        if context is not None and context.execution_options.get(WRITES):
            begin = _IMMEDIATE
        try:
            cursor.execute(begin)
        except self.loaded_dbapi.OperationalError as error:
            if not _is_needless(error):
                raise

    _at_reads = True


class _BeginningAtWrites(_Beginning):
    """The same where a statement that reads begins no transaction.

    For one connection that threads use at the same time: one that has read would end the
    transaction of all of them. (To end one while another thread reads may crash the sqlite3
    module.) And for who rather sees what was committed since than be refused when he writes.
    """

    supports_statement_cache = True

    _at_reads = False


def _may_begin(driver_connection: Any) -> bool:
    """Tell whether a connection is in no transaction, and left as the driver makes it.

    Who set another ``isolation_level`` or ``autocommit`` begins transactions himself, or has none:
    https://docs.python.org/3/library/sqlite3.html#transaction-control
    """
    raw = raw_connection(driver_connection)
    return (
        not getattr(raw, "in_transaction", True)
        and getattr(raw, "isolation_level", None) == ""
        and autocommit(raw) is None
    )


def _is_needless(error: BaseException) -> bool:
    """Tell whether the statement for which a transaction was to begin can do without.

    Either another thread has begun one on the connection that both use. Or the file may not
    be written to, and a statement that tries will be told so.
    """
    text = str(error)
    return "within a transaction" in text or "readonly database" in text


@functools.cache
def _beginning(dialect_class: Any, kind: type[_Beginning]) -> Any:
    """Give a dialect's class with transactions that begin as here.

    A subclass of the same name, as the pools' is: listeners to the dialect's events would take
    half as much memory as all the rest of an engine.
    """
    names = {"__module__": dialect_class.__module__, "__doc__": dialect_class.__doc__}
    if "supports_statement_cache" in vars(dialect_class):  # each class has to say it itself
        names["supports_statement_cache"] = vars(dialect_class)["supports_statement_cache"]
    return type(dialect_class.__name__, (kind, dialect_class), names)


def attach(engine: Engine, settings: SQLiteSettings) -> None:
    """Have the connections of an engine set up, and its transactions begin, as settings say.

    :param engine: an engine of a SQLite database that has not connected yet.
    """
    event.listen(engine, "connect", settings.on_connect)
    if settings.transactions:
        kind = _Beginning if settings.at_reads else _BeginningAtWrites
        dialect_class: Any = type(engine.dialect)  # typed, it would not be hashable
        engine.dialect.__class__ = _beginning(dialect_class, kind)


def begin_writing(session: Session) -> None:
    """Begin a session's transaction with the lock for writing, on SQLite.

    Not on other databases, nor where the transactions are not begun here.
    """
    engine = session.bind
    if engine is None or not isinstance(engine.dialect, _Beginning):
        return
    connection = session.connection(bind_arguments={"bind": engine})
    if not _may_begin(connection.connection.driver_connection):
        return
    # Sent as the other BEGINs are: as a statement it would take a tenth of a short transaction.
    cursor: Any = None
    try:
        cursor = connection.connection.cursor()
        cursor.execute(_IMMEDIATE)
        cursor.close()
    except BaseException as error:  # noqa: BLE001 - what it is SQLAlchemy finds out
        if not _is_needless(error):
            said = _IMMEDIATE if isinstance(error, engine.dialect.loaded_dbapi.Error) else None
            with _explained():
                connection._handle_dbapi_exception(error, said, None, cursor, None)


@contextmanager
def _explained() -> Iterator[None]:
    """Say on the error that leaves the block who may have the lock."""
    try:
        yield
    except Exception as error:
        if "locked" in str(error):
            note(
                error,
                "another transaction had the lock for writing all the while. A begin() or run()"
                " inside of another one on the same file waits for itself: use its session, or"
                " write=False for one that reads",
            )
        raise

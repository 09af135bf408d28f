"""A store's way to its database: connections, tables seen to once, calls that are repeated."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager, nullcontext
from inspect import signature
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import URL
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from sessionmgr import forking
from sessionmgr.errors import ResultArgumentError
from sessionmgr.manager import SessionManager
from sessionmgr.options import Layer, check_count, check_options
from sessionmgr.pools import open_connection
from sessionmgr.sqlite import is_memory
from sessionmgr.transactions import transient_retries
from sessionmgr.transient import is_transient
from sessionmgr.urls import hide_secrets, parse_url

from .arguments import check_execution_options
from .preparation import prepare
from .records import TaskResult, in_order
from .tables import check_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection, Engine

    from sessionmgr.config import EngineCallback

    from .chords import ChordBegun
    from .notify import Listener
    from .statements import Statements
    from .tables import ResultTables

__all__ = ("ResultAccess",)

Answer = TypeVar("Answer")

#: Each statement is a transaction of its own: there is nothing to roll back when a connection is
#: done with, or comes back to the pool, and MySQL's drivers would send a ROLLBACK each time.
AUTOCOMMIT: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
if "skip_autocommit_rollback" in signature(DefaultDialect).parameters:  # since 2.0.43
    AUTOCOMMIT["skip_autocommit_rollback"] = True

#: How transactions begin on a connection in autocommit. READ COMMITTED, whatever the server's
#: default: it locks least. SQLite's transactions here all write, hence take the lock at once.
#: Other databases may have no such statement: there each call is in a transaction of the driver's.
_BEGIN = {
    "postgresql": ("BEGIN ISOLATION LEVEL READ COMMITTED",),
    "mysql": ("SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "BEGIN"),
    "mariadb": ("SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "BEGIN"),
    "sqlite": ("BEGIN IMMEDIATE",),
}


#: Seconds until the tables are looked at again, where somebody else had the lock on them.
_AGAIN = 60.0


class _Lent:
    """A transaction that the calls of a thread are part of, for as long as something else lasts.

    A second connection may not be had, or wait for the first for ever: on SQLite it would.
    """

    def __init__(self, statements: Statements, connection: Connection, depth: int) -> None:
        self.statements = statements
        self.depth = depth
        self._connection = connection
        self._error: BaseException | None = None
        #: Whether a call was part of it.
        self.used = False
        #: The ids of the chords that are to be begun in it -> what is known of them.
        self.begun: dict[str, ChordBegun] = {}

    def call(
        self, work: Callable[[Statements, Connection], Answer], *, transaction: bool
    ) -> Answer:
        """Do work. After the database's error there is no transaction any more: nothing is done.

        :param transaction: undo it when it raises something else.
        """
        self.check()
        self.used = True
        try:
            with _savepoint(self._connection, self.depth) if transaction else nullcontext():
                return work(self.statements, self._connection)
        except BaseException as error:
            if isinstance(error, SQLAlchemyError) or not transaction:
                self._error = error
            raise

    def check(self) -> None:
        """Raise the error of a call again, whoever has caught it."""
        if self._error is not None:
            raise self._error


class _Thread(threading.local):
    """What a thread's calls are part of, if anything."""

    lent: _Lent | None = None


class ResultAccess:
    """What the calls of a :class:`ResultStore` are made of. The parameters are the store's.

    For the modules of this package; programs use the store.
    """

    def __init__(
        self,
        dburi: str | URL,
        tables: ResultTables,
        *,
        manager: SessionManager | None,
        engine_options: Mapping[str, Any] | None,
        engine_callback: EngineCallback | Iterable[EngineCallback] | None,
        create_tables: bool | Literal["missing"],
        short_lived_sessions: bool,
        extended: bool,
        notify: bool,
        attempts: int,
    ) -> None:
        """Configure the access. Nothing is connected yet."""
        if manager is not None and not isinstance(manager, SessionManager):
            raise ResultArgumentError(f"manager is a SessionManager, not {hide_secrets(manager)}")
        if manager is not None and engine_callback is not None:
            raise ResultArgumentError("engine_callback belongs to the manager: give it to that")
        check_count("attempts", attempts)
        #: The tables, as this store describes them.
        self.tables = tables
        self.extended = extended
        self.create_tables = create_tables
        self.short_lived_sessions = short_lived_sessions
        self.notify = notify
        self.attempts = attempts
        self.owns_manager = manager is None
        given = Layer("the store's engine_options", engine_options or {})
        self.engine_options = dict(check_options(given).options)
        self._call_options = {} if manager is None else self.engine_options
        #: The database, as it was named.
        self.dburi = parse_url(dburi) if manager is None else dburi
        begins = isinstance(self.dburi, URL) and self.dburi.get_backend_name() in _BEGIN
        options = {**(AUTOCOMMIT if begins else {}), **self.engine_options}
        level = options.get("isolation_level")
        self._commits_itself = manager is None and begins and level == "AUTOCOMMIT"
        #: Where the connections are from.
        self.manager = manager or SessionManager(
            engine_callback, metadata=tables.metadata, pooling="always", engine_options=options
        )
        self._key = self.manager._key(self.dburi)
        check_names(tables, self._key.url.get_backend_name())
        check_execution_options(self.describe(), self.engine_options.get("execution_options"))
        #: Guards what follows.
        self.lock = forking.ProcessLock()
        #: The statements, once the tables were looked at.
        self.statements: Statements | None = None
        self._look_again = math.inf
        #: Who listens to results in this process; see :mod:`.notify`.
        self.listener: Listener | None = None
        self._thread = _Thread()

    def describe(self) -> str:
        """Name the database, without secrets."""
        return self._key.describe()

    def invalidate(self) -> None:
        """Drop the connections and look at the tables again at the next call."""
        self.statements = None
        self.manager.invalidate(self.dburi)
        if self.listener is not None:
            self.listener.dispose()

    def close(self) -> None:
        """Close the connections for good, unless they are those of the caller's manager."""
        if self.owns_manager:
            self.manager.close()
        if self.listener is not None:
            self.listener.dispose()

    def call(
        self,
        work: Callable[[Statements, Connection], Answer],
        *,
        transaction: bool = False,
        attempts: int | None = None,
    ) -> Answer:
        """Do work, and again after a passing error.

        :param transaction: do it in one transaction; else each statement is one.
        :param attempts: how often to try; default: as the store was told.
        """
        if self._thread.lent is not None:
            return self._thread.lent.call(work, transaction=transaction)
        attempts = attempts or self.attempts

        def attempt() -> Answer:
            statements = self.prepared()
            with self.connect(transaction=transaction) as connection:
                return work(statements, connection)

        try:
            return attempt()
        except DBAPIError as error:
            if attempts == 1 or not is_transient(error):
                raise
        return transient_retries(attempts - 1)(attempt)  # the first of them at once

    def select(
        self, ids: Sequence[str], choose: Callable[[Statements], Any]
    ) -> dict[str, TaskResult]:
        """Give those of some tasks that a statement finds.

        :param ids: what check_ids has given.
        :param choose: gives the statement.
        """

        def read(statements: Statements, connection: Connection) -> dict[str, TaskResult]:
            found = (
                TaskResult(*in_order(statements.fields, row))
                for batch in statements.ids.batches(ids)
                for row in connection.execute(choose(statements), batch)
            )
            return {result.task_id: result for result in found}

        return self.call(read) if ids else {}

    @property
    def lent(self) -> _Lent | None:
        """The transaction that the calls of this thread are part of."""
        return self._thread.lent

    @contextmanager
    def lending(self, statements: Statements, connection: Connection) -> Iterator[_Lent]:
        """Have the calls of this thread be part of a connection's transaction during a block.

        If one of them fails, so does the block.
        """
        before = self._thread.lent
        lent = _Lent(statements, connection, 0 if before is None else before.depth + 1)
        try:
            self._thread.lent = lent
            yield lent
        finally:
            self._thread.lent = before
        lent.check()

    def connect(self, *, transaction: bool = False) -> AbstractContextManager[Connection]:
        """Connect, for a block.

        :param transaction: have it be one transaction; else each statement is one.
        """
        engine = self.engine()
        if not self._commits_itself:
            # Somebody else's manager: autocommit would have to be set at each checkout, and the
            # error of a dead connection, which is found so, would reach nobody who knows it. Or
            # a database whose statements are not known.
            return self._begin(engine)
        connection = engine.connect()
        if self.short_lived_sessions:
            _mark_leaving(connection)
        # execution_options, of the engine or by an engine_callback, go before the engine's own
        level = connection.get_execution_options().get("isolation_level", "AUTOCOMMIT")
        if level != "AUTOCOMMIT":
            return _committing(connection)
        return _transaction(connection) if transaction else _Whole(connection)

    @contextmanager
    def _begin(self, engine: Engine) -> Iterator[Connection]:
        with engine.begin() as connection:
            if self.short_lived_sessions:
                _mark_leaving(connection)
            yield connection

    def engine(self) -> Engine:
        """Give the engine of this process."""
        return self.manager.get_engine(self._key, **self._call_options)

    def prepared(self) -> Statements:
        """Give the statements; the tables are looked at, and seen to, at the first time."""
        if self.statements is not None and monotonic() < self._look_again:
            return self.statements
        if self._thread.lent is not None:
            return self._thread.lent.statements
        with self.lock():
            if self.statements is None or monotonic() >= self._look_again:
                statements, settled = prepare(self, self.engine())
                if not statements.layout.task.columns:
                    return statements  # as described; what others make may lack a column
                self.statements = statements
                self._look_again = math.inf if settled else monotonic() + _AGAIN
            return self.statements


def _mark_leaving(connection: Connection) -> None:
    """Have a short-lived connection closed at its checkin."""
    opened = open_connection(connection.connection)
    if opened is not None and not is_memory(connection.engine.url):
        opened.leaves = True


class _Whole:
    """Closes a connection, or gives it up when something else than its errors was raised.

    A time limit, say: a statement's answer may be still to come, and the next one would get it.
    A class, for each result that is stored goes through it: a generator takes three times as long.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> Connection:
        return self._connection

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if error is not None and not isinstance(error, SQLAlchemyError):
                self._connection.invalidate()
        finally:
            self._connection.close()


@contextmanager
def _committing(connection: Connection) -> Iterator[Connection]:
    """Make a transaction of the driver's."""
    with connection, connection.begin():
        yield connection


@contextmanager
def _transaction(connection: Connection) -> Iterator[Connection]:
    """Make a transaction on a connection in autocommit, which stays in that."""
    with connection:
        try:
            for statement in _BEGIN[connection.dialect.name]:
                connection.exec_driver_sql(statement)
            yield connection
            connection.exec_driver_sql("COMMIT")
        except BaseException:  # a time limit, say, also between two statements
            _roll_back(connection)
            raise


@contextmanager
def _savepoint(connection: Connection, depth: int) -> Iterator[None]:
    """Make a part of a transaction that can be undone alone.

    :param depth: of how many others it is a part; MySQL forgets one when another has its name.
    """
    name = f"sessionmgr_{depth}"
    connection.exec_driver_sql(f"SAVEPOINT {name}")
    try:
        yield
    except SQLAlchemyError:
        raise  # then all is undone
    except BaseException:
        connection.exec_driver_sql(f"ROLLBACK TO SAVEPOINT {name}")
        raise
    connection.exec_driver_sql(f"RELEASE SAVEPOINT {name}")


def _roll_back(connection: Connection) -> None:
    if connection.invalidated:
        return
    try:
        if connection.dialect.name == "sqlite":  # which has an error for who has not begun
            connection.connection.rollback()
        else:
            connection.exec_driver_sql("ROLLBACK")
    except BaseException as error:
        connection.invalidate()
        if not isinstance(error, SQLAlchemyError):
            raise

"""Isolates an engine in place, for others may hold it since before.

Its pool is replaced by one that hands out the same connection to everybody, and its dialect gets a
class that has :mod:`.isolation_database` send the statements. COMMIT is never sent.
"""

from __future__ import annotations

import functools
import time
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool import Pool

# No public name exists. Made by a pool itself, a record would run the listeners to "connect" on a
# connection that is in the midst of its transaction.
from sqlalchemy.pool.base import _ConnectionRecord

from . import forking
from .firstuse import FirstUse
from .isolation_savepoints import Work
from .pools import record_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor, ExecutionContext
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
    from sqlalchemy.pool.base import PoolResetState

    from .isolation_database import IsolatedDatabase
    from .monitor import PoolMonitor

__all__ = ("IsolatedPool", "isolate_engine")

_KEY = "sessionmgr_isolated"


class IsolatedPool(Pool):
    """A pool whose checked out connections are all the same one."""

    def __init__(
        self,
        engine: Engine,
        database: IsolatedDatabase,
        monitor: PoolMonitor,
        prepare: Callable[[], None],
    ) -> None:
        """Take the place of an engine's pool, without using it yet.

        :param prepare: is called, with the engine as it was, before the first connection.
        """
        self.own: Any = engine.pool
        super().__init__(
            database.connection,
            echo=self.own.echo,
            reset_on_return=None,
            events=[(_reset, "reset"), (_lose, "invalidate")],
            dialect=engine.dialect,
            _dispatch=self.own.dispatch,
        )
        self.database = database
        self._engine = weakref.ref(engine)
        self._monitor = monitor
        self._prepare = prepare
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._home = forking.process
        self._first_use = FirstUse(self._take, is_async=self._dialect.is_async)

    def _take(self, engine: Engine) -> None:
        self._prepare()
        self.database.take(engine, self.own, self._monitor)

    def connect(self) -> PoolProxiedConnection:
        """Check the one connection out, once more."""
        if self._home is not forking.process:
            self.database.settle()
            self._begin_anew()
        self._monitor.check_loop()
        if not self._first_use.done:
            engine = self._engine()
            assert engine is not None
            self._first_use(engine)
        if not self._first_use.done:  # the connection is for that
            connection: PoolProxiedConnection = self.own.connect()
            return connection
        proxy = super().connect()
        _, work = record_info(proxy)[_KEY]
        self.database.hand_out(proxy, work)
        return proxy

    def _do_get(self) -> ConnectionPoolEntry:
        record = _ConnectionRecord(self, connect=False)
        record.starttime = time.time()
        record.dbapi_connection = self.database.connection()
        record.record_info[_KEY] = self.database, Work()  # type: ignore[index]
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        pass

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        """Leave the connection open: it is the pool's that it was taken from."""

    def dispose(self) -> None:
        """Keep the connection: what is on it would be lost."""

    def recreate(self) -> Pool:
        """Give this pool: there is nothing to make anew."""
        return self

    def status(self) -> str:
        """Describe the pool."""
        return f"IsolatedPool of {self.database.name}"


def _reset(dbapi_connection: DBAPIConnection, record: Any, state: PoolResetState) -> None:
    """Roll back what a connection leaves unfinished; it may have been collected."""
    isolated = None if record is None else record_info(record).get(_KEY)
    if isolated is not None and not state.transaction_was_reset:
        database, work = isolated
        database.abandon(work)


def _lose(
    dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry, error: BaseException | None
) -> None:
    isolated = record_info(record).get(_KEY)
    if isolated is not None:
        isolated[0].lose(error)


class _Isolating(DefaultDialect):
    """What a dialect gains by :func:`isolate_engine`."""

    supports_statement_cache = True
    isolated: IsolatedDatabase | None = None

    def do_execute(
        self,
        cursor: DBAPICursor,
        statement: str,
        parameters: Any,
        context: ExecutionContext | None = None,
    ) -> None:
        execute = super().do_execute
        self._run(statement, context, lambda: execute(cursor, statement, parameters, context))  # type: ignore[no-untyped-call]

    def do_executemany(
        self,
        cursor: DBAPICursor,
        statement: str,
        parameters: Any,
        context: ExecutionContext | None = None,
    ) -> None:
        execute = super().do_executemany
        self._run(statement, context, lambda: execute(cursor, statement, parameters, context))  # type: ignore[no-untyped-call]

    def do_execute_no_params(
        self, cursor: DBAPICursor, statement: str, context: ExecutionContext | None = None
    ) -> None:
        execute = super().do_execute_no_params
        self._run(statement, context, lambda: execute(cursor, statement, context))  # type: ignore[no-untyped-call]

    def _run(
        self, statement: str, context: ExecutionContext | None, send: Callable[[], None]
    ) -> None:
        connection = None if context is None else context.root_connection
        isolated = None if connection is None else record_info(connection.connection).get(_KEY)
        if connection is None or isolated is None:  # it is of the engine's own pool
            send()
        else:
            database, work = isolated
            level = connection.get_execution_options().get("isolation_level")
            database.execute(connection.connection, work, statement, send, level)

    def set_isolation_level(self, dbapi_connection: DBAPIConnection, level: Any) -> None:
        # All is one transaction. In AUTOCOMMIT each statement is one of its own in there.
        if self.isolated is None or not self.isolated.owns(dbapi_connection):
            super().set_isolation_level(dbapi_connection, level)

    def do_begin_twophase(self, connection: Any, xid: Any) -> None:
        isolated = record_info(connection.connection).get(_KEY)
        if isolated is not None:
            isolated[0].refuse_two_phase()
        super().do_begin_twophase(connection, xid)


@functools.cache
def _isolating(dialect_class: Any) -> Any:
    """Give a dialect's class as an isolated engine has it: a subclass of the same name."""
    names = {"__module__": dialect_class.__module__, "__doc__": dialect_class.__doc__}
    if "supports_statement_cache" in vars(dialect_class):  # each class has to say it itself
        names["supports_statement_cache"] = vars(dialect_class)["supports_statement_cache"]
    return type(dialect_class.__name__, (_Isolating, dialect_class), names)


def isolate_engine(
    engine: Engine,
    database: IsolatedDatabase,
    monitor: PoolMonitor,
    prepare: Callable[[], None],
) -> Callable[[], None]:
    """Have an engine use the one connection of an isolated database.

    :param prepare: is called before the first connection, which is of the engine's own pool yet.
    :return: puts the engine back to what it was.
    """
    dialect: Any = engine.dialect
    own = engine.pool
    dialect_class: Any = type(dialect)

    def restore() -> None:
        engine.pool = own
        dialect.__class__ = dialect_class
        del dialect.isolated
        if monitor.retired:  # meanwhile, when it could not find its pool
            monitor.retire()

    engine.pool = IsolatedPool(engine, database, monitor, prepare)
    dialect.__class__ = _isolating(dialect_class)
    dialect.isolated = database
    return restore

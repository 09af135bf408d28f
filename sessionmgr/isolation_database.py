"""One connection in a transaction for all who use a database, until it is rolled back."""

from __future__ import annotations

import asyncio
import functools
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from . import forking
from .engines import leave_alone
from .errors import IsolationError
from .greenlets import TaskLock
from .isolation_savepoints import Savepoints, Work
from .isolation_statements import Kind, kind_of
from .sqlite import autocommit, raw_connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
    from sqlalchemy.pool import Pool, PoolProxiedConnection

    from .monitor import PoolMonitor

__all__ = ("IsolatedDatabase",)

_KNOWN = ("postgresql", "mysql", "mariadb", "sqlite")


class IsolatedDatabase:
    """A database in one transaction, for one or more engines of one thread group or event loop."""

    # Its lock guards the savepoints, and that nothing comes between those of a statement and it.

    def __init__(self, name: str, *, is_async: bool) -> None:
        """Connect to nothing yet.

        :param name: the database's name for error texts.
        :param is_async: whether its engines take an event loop.
        """
        self.name = name
        self._is_async = is_async
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.home = forking.process
        #: the event loop of its connection
        self.loop: asyncio.AbstractEventLoop | None = None
        self._outer: PoolProxiedConnection | None = None
        self._dialect: Any = None
        self._monitor: PoolMonitor | None = None
        self._lost: str | None = None
        self._is_dead = False
        self._commits_itself = False
        self._abandoned: list[Work] = []
        self._proxies: weakref.WeakSet[PoolProxiedConnection] = weakref.WeakSet()
        self._turns = TaskLock() if self._is_async else forking.ProcessLock()()

    def settle(self) -> None:
        """Begin anew in a forked child: the parent's connection, and all on it, is the parent's."""
        if self.home is not forking.process:
            leave_alone(self._outer)  # collected, one of a loop would be complained of
            self._begin_anew()

    def turn(self) -> AbstractContextManager[object]:
        """Give what holds the others back, for ``with``."""
        return self._turns

    # -- the connection

    def take(self, engine: Engine, pool: Pool, monitor: PoolMonitor) -> None:
        """Take the connection of which all is rolled back in the end, for an engine's first use.

        :param pool: the engine's own.
        :raises IsolationError: when nothing is known of the savepoints of its kind of database.
        """
        if engine.dialect.name not in _KNOWN:
            raise IsolationError(
                f"database {self.name}: isolation takes the savepoints of PostgreSQL, MySQL,"
                f" MariaDB or SQLite, and knows none of {engine.dialect.name}"
            )
        with self.turn():
            if self._outer is not None:
                pool.connect().close()  # which initialises the dialect
                return
            outer = pool.connect()
            try:
                self._begin(engine, outer)
            except BaseException:
                outer.close()
                raise
            if self._is_async:
                self.loop = asyncio.get_running_loop()
            self._outer, self._monitor, self._dialect = outer, monitor, engine.dialect
            aborts = engine.dialect.name == "postgresql"
            self._savepoints = Savepoints(self._send, self.name, aborts=aborts)

    def _begin(self, engine: Engine, outer: PoolProxiedConnection) -> None:
        connection = outer.dbapi_connection
        assert connection is not None
        driver = outer.driver_connection
        self._commits_itself = _commits_itself(connection, driver, engine.dialect.name)
        if engine.dialect.name == "postgresql" and not self._commits_itself:
            return  # with the first statement
        raw = raw_connection(driver)
        if not getattr(raw, "in_transaction", False):
            _send(connection, "BEGIN")

    def connection(self) -> DBAPIConnection:
        """Give the connection.

        :raises IsolationError: when it was lost, or the isolation has ended.
        """
        if self._lost is not None:
            raise IsolationError(
                f"database {self.name}: the connection that this isolation keeps was lost"
                f" ({self._lost}), and what was written on it is gone. End the isolation"
            )
        found = None if self._outer is None else self._outer.dbapi_connection
        if found is None:
            raise IsolationError(f"database {self.name}: its isolation has ended; connect anew")
        return found

    def hand_out(self, proxy: PoolProxiedConnection, work: Work) -> None:
        """Have one more checked out connection end its transactions as here.

        Not by the dialect only, for somebody may use it without a Session or Connection.
        """
        replaced: Any = proxy
        replaced.commit = functools.partial(self.commit, work)
        replaced.rollback = functools.partial(self.roll_back, work)
        replaced.detach = _do_nothing  # it is nobody's alone
        if self._dialect.driver == "mysqldb":
            replaced.cursor = functools.partial(self._cursor, weakref.ref(replaced))
        self._proxies.add(proxy)

    def _cursor(self, proxy: weakref.ref[Any], *args: Any) -> DBAPICursor:
        """Make a cursor of mysqlclient's: to close one takes the connection, which others use."""
        holder = proxy()
        assert holder is not None
        cursor: Any = holder.dbapi_connection.cursor(*args)

        def close() -> None:
            del cursor.close
            with self.turn():
                cursor.close()

        cursor.close = close
        return cursor  # type: ignore[no-any-return]

    def owns(self, connection: DBAPIConnection) -> bool:
        """Tell whether a connection is the one that all share."""
        return self._outer is not None and self._outer.dbapi_connection is connection

    def lose(self, error: BaseException | None) -> None:
        """Take note that the connection cannot be used any more."""
        self._lost = "it was invalidated" if error is None else type(error).__name__
        self._is_dead = True

    # -- what is done on it

    def execute(
        self,
        proxy: PoolProxiedConnection,
        work: Work,
        statement: str,
        send: Callable[[], None],
        level: str | None,
    ) -> None:
        """Run a statement of one of those who share the connection.

        :param send: sends it.
        :param level: the isolation level that it asked for; ``None`` for the engine's.
        :raises IsolationError: when it would commit for good, or the connection is not the one
            that is shared here, but a parent process's.
        """
        self._check_shared(proxy)
        kind, label = kind_of(statement, self._dialect.name)
        with self.turn():
            self._check_shared(proxy)  # the isolation may have ended while this waited
            self._undo_abandoned()
            if not self._control(work, kind, label):
                with self._statement(work, level):
                    self._execute(work, kind, send)

    def _check_shared(self, proxy: PoolProxiedConnection) -> None:
        if proxy.dbapi_connection is not self.connection():
            raise _ended(self.name)

    @contextmanager
    def _statement(self, work: Work, level: str | None) -> Iterator[None]:
        """End the transaction with the statement, in AUTOCOMMIT."""
        alone = self._commits_itself if level is None else level.upper() == "AUTOCOMMIT"
        if not alone or work.explicit:
            yield
            return
        try:
            yield
        except self._dialect.loaded_dbapi.Error:
            if self._is_open():
                self._savepoints.roll_back(work)
            raise
        self._savepoints.commit(work)

    def _execute(self, work: Work, kind: Kind, send: Callable[[], None]) -> None:
        if work.failed:
            raise self._dialect.loaded_dbapi.InternalError(
                "current transaction is aborted, commands ignored until end of transaction block"
            )
        if kind is Kind.READ:
            self._savepoints.before_read(work)
        else:
            self._savepoints.before_write(work)
        try:
            send()
        except self._dialect.loaded_dbapi.Error as error:
            self._recover(work, error)
            raise

    def _recover(self, work: Work, error: BaseException) -> None:
        connection = self.connection()
        if self._dialect.is_disconnect(error, connection, None):
            return
        if self._dialect.name == "sqlite":
            raw = raw_connection(self._dialect.get_driver_connection(connection))
            if getattr(raw, "in_transaction", True) is False:
                self._lost = f"{error}, which has ended the transaction"
        self._savepoints.after_failure(work)

    def _control(self, work: Work, kind: Kind, label: str) -> bool:
        """Do what a statement says that is not to be sent; tell whether it was one."""
        if kind is Kind.COMMIT:
            self._savepoints.commit(work)
        elif kind is Kind.ROLLBACK:
            self._savepoints.roll_back(work)
        elif kind is Kind.SAVEPOINT and not work.failed:
            self._savepoints.begin_nested(work, label)
        elif kind is Kind.RELEASE and not work.failed:
            return self._savepoints.release(work, label)
        elif kind is Kind.ROLLBACK_TO:
            return self._savepoints.roll_back_to(work, label)
        elif kind is Kind.TWO_PHASE:
            self.refuse_two_phase()
        elif kind is Kind.SEVERAL:
            raise IsolationError(
                f"database {self.name}: a text of several statements, of which one begins or ends a"
                " transaction, would commit for good. Execute each of them by itself"
            )
        elif kind is Kind.COMMITS:
            raise IsolationError(
                f"database {self.name}: {self._dialect.name} commits at DDL and the like, so that"
                " nothing could be undone any more. Create tables and change the schema before"
                " the isolation begins"
            )
        elif kind is Kind.BEGIN:
            work.explicit = True
        else:
            return kind is Kind.LEVEL
        return True

    def commit(self, work: Work) -> None:
        """End a transaction, and keep what it did until all is rolled back."""
        self._finish(lambda: self._savepoints.commit(work))

    def roll_back(self, work: Work) -> None:
        """Undo a transaction."""
        self._finish(lambda: self._savepoints.roll_back(work))

    def _finish(self, finish: Callable[[], None]) -> None:
        if self._is_open():
            with self.turn():
                if self._is_open():  # it may have ended while this waited
                    self._undo_abandoned()
                    finish()

    def abandon(self, work: Work) -> None:
        """Have a transaction undone before anything else is done.

        Not at once: its connection may have been collected in the midst of another's statement.
        """
        self._abandoned.append(work)

    def _undo_abandoned(self) -> None:
        while self._abandoned:
            with suppress(IsolationError):  # nobody is there to be told
                self._savepoints.roll_back(self._abandoned.pop())

    def _is_open(self) -> bool:
        return self._outer is not None and self._lost is None and self.home is forking.process

    def _send(self, statement: str) -> None:
        connection = self.connection()
        try:
            _send(connection, statement)
        except self._dialect.loaded_dbapi.Error as error:
            if not self._dialect.is_disconnect(error, connection, None):
                self._lost = f"its transaction had ended: {error}"
                self.connection()
            raise

    def refuse_two_phase(self) -> NoReturn:
        """Raise for a transaction in two phases."""
        raise IsolationError(
            f"database {self.name}: a transaction that was prepared for a commit in two phases"
            " cannot be undone with the others. Test it without isolation"
        )

    # -- the end

    def end(self) -> None:
        """Roll everything back, and give the connection back. In its loop, if it has one.

        :raises IsolationError: when something had been committed all the same.
        """
        with self.turn():  # a thread that outlives the isolation may be in the midst of a statement
            self._end(self._leave())

    def _end(self, outer: PoolProxiedConnection | None) -> None:
        if outer is None:
            return
        if self._is_dead:
            outer.invalidate()
            return
        committed = self._lost is None and self._was_ended(outer)
        try:
            if self._commits_itself:  # some drivers send none then
                _send(outer, "ROLLBACK")
            outer.rollback()
        except Exception as error:  # noqa: BLE001 - lost, and with it what was to be rolled back
            outer.invalidate(error)
        else:
            outer.close()
        if committed:
            raise IsolationError(
                f"database {self.name}: its transaction had ended before the isolation did, so what"
                " was written may still be there. The driver's own executescript() and commit() do"
                " that: use SQLAlchemy's, or a raw connection's"
            )

    def _was_ended(self, outer: PoolProxiedConnection) -> bool:
        """Tell whether somebody has committed behind our back; only SQLite's driver knows."""
        raw = raw_connection(outer.driver_connection) if self._dialect.name == "sqlite" else None
        return getattr(raw, "in_transaction", True) is False

    def cut(self) -> None:
        """Close the connection where its event loop cannot do it any more."""
        monitor, outer = self._monitor, self._leave()
        if outer is not None and outer.dbapi_connection is not None and monitor is not None:
            monitor.cut(outer.dbapi_connection)

    def _leave(self) -> PoolProxiedConnection | None:
        """Take the connection from all who still have it."""
        if self.home is not forking.process:
            return None
        outer, self._outer = self._outer, None
        ended: Any = _EndedConnection(self.name)
        proxies: list[Any] = list(self._proxies)
        for proxy in proxies:
            if proxy.dbapi_connection is not None:
                proxy.dbapi_connection = ended
        return outer


class _EndedConnection:
    """Stands for the connection in a Session that outlives its isolation."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> NoReturn:
        raise _ended(self._name)


def _ended(database: str) -> IsolationError:
    return IsolationError(
        f"database {database}: this connection was checked out under an isolation that has ended,"
        " or is the parent process's; close its session, and open another"
    )


def _do_nothing() -> None:
    pass


def _send(connection: DBAPIConnection | PoolProxiedConnection, statement: str) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


def _commits_itself(connection: Any, driver: Any, dialect: str) -> bool:
    """Ask a driver's connection, and SQLAlchemy's adapter of it, for autocommit."""
    if dialect == "sqlite":
        raw = raw_connection(driver)
        return getattr(raw, "isolation_level", "") is None or autocommit(raw) is True
    ask = getattr(driver, "get_autocommit", None)
    if ask is not None:
        return bool(ask())
    return any(getattr(each, "autocommit", None) is True for each in (connection, driver))

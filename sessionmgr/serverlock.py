"""Locks that a database gives: one process at a time, on whatever machine it is."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, func, select, text
from sqlalchemy.exc import DBAPIError

from . import forking
from .errors import SchemaLockError
from .transient import is_lock_timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

__all__ = ("RunLock", "lock_for_writing", "server_lock")

#: Seconds to wait for the lock of a server. SQLite waits by its own setting (busy_timeout).
LOCK_TIMEOUT = 60

_MYSQL = ("mysql", "mariadb")


@contextmanager
def server_lock(
    connection: Connection, purpose: str, database: str, timeout: int | None = None
) -> Iterator[None]:
    """Hold a lock of the database's own until the transaction, or the block, ends.

    PostgreSQL gives an advisory lock of the transaction, not of the session: it works through
    a transaction pooler. MySQL and MariaDB give a named lock, for their DDL commits. SQLite
    has one lock, for writing. Other databases give none.

    :param connection: a connection in a transaction.
    :param purpose: what the lock is for, in 20 characters at most; locks for different purposes
        do not meet.
    :param database: the database's name for error texts.
    :param timeout: seconds to wait for the lock of a server; default: :data:`LOCK_TIMEOUT`.
    :raises SchemaLockError: when PostgreSQL, MySQL or MariaDB does not grant it in time.
    """
    dialect = connection.dialect.name
    timeout = LOCK_TIMEOUT if timeout is None else timeout
    if dialect in _MYSQL:
        with _named_lock(connection, purpose, database, timeout):
            yield
        return
    if dialect == "postgresql":
        _take_advisory_lock(connection, purpose, database, timeout)
    lock_for_writing(connection)
    yield


def lock_for_writing(connection: Connection) -> None:
    """Take SQLite's one lock at once, where the transaction has not; nothing on others."""
    if connection.dialect.name == "sqlite" and not _in_transaction(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


class RunLock:
    """The same lock, without waiting, for work that takes many transactions on other connections.

    It has a connection of its own, outside the pool, and goes when that is closed: by
    :meth:`release`, by the kernel when the process is killed, or by the server. PostgreSQL gives
    it to a transaction that stays open, and so it holds through a transaction pooler too; at READ
    COMMITTED that keeps no snapshot, and holds up no VACUUM. Where the database has only a lock
    for writing, or none, everybody gets it.

    :param engine: gives the engine that the connection is taken from.
    :param purpose: as for :func:`server_lock`.
    """

    def __init__(self, engine: Callable[[], Engine], purpose: str) -> None:
        self._engine = engine
        self._purpose = purpose
        self._connection: Connection | None = None

    def take(self) -> bool:
        """Take the lock; tell whether nobody else has it."""
        engine = self._engine()
        if engine.dialect.name not in ("postgresql", *_MYSQL):
            return True
        connection = engine.connect()
        commits_itself = getattr(connection.connection.driver_connection, "autocommit", False)
        # A fork in the midst of this would leave the child with a connection that is neither
        # its pool's nor its proxy's, hence not severed.
        with forking.gate.section():
            connection.detach()
        self._connection = connection
        granted = False
        try:
            if engine.dialect.name == "postgresql":
                granted = self._take_postgresql(connection, begins=commits_itself is True)
            else:
                granted = _get_lock(connection, self._purpose, 0)
        finally:
            if not granted:
                self.release()
        return granted

    def _take_postgresql(self, connection: Connection, *, begins: bool) -> bool:
        if begins:
            connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        take = func.pg_try_advisory_xact_lock(_number(self._purpose))
        return bool(connection.scalar(select(take)))

    def is_held(self) -> bool:
        """Ask the server whether the lock is still there; it is lost with its connection."""
        if self._connection is None:
            return self._engine().dialect.name not in ("postgresql", *_MYSQL)
        try:
            self._connection.exec_driver_sql("SELECT 1")
        except DBAPIError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Let the lock go, if it is held."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with suppress(DBAPIError):  # it was lost, and the lock with it
            if not connection.invalidated:
                self._let_go(connection)
        with suppress(DBAPIError):
            connection.close()

    def _let_go(self, connection: Connection) -> None:
        """Tell the server, which notices the end of a connection when it comes to it.

        psycopg2 sends no ROLLBACK in autocommit.
        """
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("ROLLBACK")
        else:
            _release_lock(connection, self._purpose)


def _number(purpose: str) -> int:
    """Give the number by which PostgreSQL knows the lock; others' are unlikely to be the same."""
    digest = hashlib.sha256(f"sessionmgr.{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _in_transaction(connection: Connection) -> bool:
    return bool(getattr(connection.connection.driver_connection, "in_transaction", False))


def _take_advisory_lock(connection: Connection, purpose: str, database: str, timeout: int) -> None:
    """Take PostgreSQL's lock for the transaction, whose other statements wait as before."""
    number = _number(purpose)
    before = connection.scalar(select(func.current_setting("lock_timeout")))
    set_timeout = select(func.set_config("lock_timeout", bindparam("timeout"), True))
    connection.execute(set_timeout, {"timeout": f"{max(1, timeout * 1000)}ms"})  # 0: for ever
    try:
        connection.execute(select(func.pg_advisory_xact_lock(number)))
    except DBAPIError as error:
        if not is_lock_timeout(error):
            raise
        high, low = (number >> 32) & 0xFFFFFFFF, number & 0xFFFFFFFF
        find = (
            "SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE datname ="  # noqa: S608 - two numbers
            " current_database() AND locktype = 'advisory' AND granted"
            f" AND (classid, objid) = ({high}, {low})"
        )
        raise _lock_error(purpose, database, timeout, find) from error
    connection.execute(set_timeout, {"timeout": before})


@contextmanager
def _named_lock(
    connection: Connection, purpose: str, database: str, timeout: int
) -> Iterator[None]:
    """Hold a lock of MySQL's or MariaDB's server; DDL commits there, and it outlives that."""
    if not _get_lock(connection, purpose, timeout):
        find = f"SELECT is_used_lock({_lock_name(purpose)})"
        raise _lock_error(purpose, database, timeout, find)
    try:
        yield
    finally:
        if not connection.invalidated:  # else the server has freed it
            _release_lock(connection, purpose)


def _lock_error(purpose: str, database: str, timeout: int, find: str) -> SchemaLockError:
    return SchemaLockError(
        f"database {database}: another connection holds the {purpose} lock since {timeout} s."
        f" Find it with {find}"
    )


def _get_lock(connection: Connection, purpose: str, timeout: int) -> bool:
    return bool(connection.scalar(text(f"SELECT get_lock({_lock_name(purpose)}, {timeout})")))


def _release_lock(connection: Connection, purpose: str) -> None:
    connection.execute(text(f"SELECT release_lock({_lock_name(purpose)})"))


def _lock_name(purpose: str) -> str:
    """Give MySQL's name of a lock: the server's, hence the database's in it.

    It has 64 characters at most.
    """
    return f"concat('sessionmgr.{purpose}.', md5(coalesce(database(), '')))"

"""Locks that a database gives: one process at a time, on whatever machine it is."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from . import forking
from .errors import SchemaLockError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

__all__ = ("RunLock", "lock_for_writing", "server_lock")

#: Seconds for which MySQL and MariaDB wait for their lock. The other databases wait
#: by their own settings (lock_timeout, busy_timeout).
LOCK_TIMEOUT = 60

_MYSQL = ("mysql", "mariadb")


@contextmanager
def server_lock(connection: Connection, purpose: str, database: str) -> Iterator[None]:
    """Hold a lock of the database's own until the transaction, or the block, ends.

    PostgreSQL gives an advisory lock of the transaction, not of the session: it works through
    a transaction pooler. MySQL and MariaDB give a named lock, for their DDL commits. SQLite
    has one lock, for writing. Other databases give none.

    :param connection: a connection in a transaction.
    :param purpose: what the lock is for; locks for different purposes do not meet.
    :param database: the database's name for error texts.
    :raises SchemaLockError: when MySQL or MariaDB does not grant it within 60 s.
    """
    dialect = connection.dialect.name
    if dialect in _MYSQL:
        with _named_lock(connection, purpose, database):
            yield
        return
    if dialect == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_number(purpose))))
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
    :param purpose: what the lock is for.
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
        if connection is not None:
            with suppress(DBAPIError):  # it was lost, and the lock with it
                connection.close()


def _number(purpose: str) -> int:
    """Give the number by which PostgreSQL knows the lock; others' are unlikely to be the same."""
    digest = hashlib.sha256(f"sessionmgr.{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _in_transaction(connection: Connection) -> bool:
    return bool(getattr(connection.connection.driver_connection, "in_transaction", False))


@contextmanager
def _named_lock(connection: Connection, purpose: str, database: str) -> Iterator[None]:
    """Hold a lock of MySQL's or MariaDB's server; DDL commits there, and it outlives that."""
    if not _get_lock(connection, purpose, LOCK_TIMEOUT):
        raise SchemaLockError(
            f"database {database}: another connection holds the {purpose} lock since"
            f" {LOCK_TIMEOUT} s. Find it with SELECT is_used_lock({_lock_name(purpose)})"
        )
    try:
        yield
    finally:
        if not connection.invalidated:  # else the server has freed it
            connection.execute(text(f"SELECT release_lock({_lock_name(purpose)})"))


def _get_lock(connection: Connection, purpose: str, timeout: int) -> bool:
    return bool(connection.scalar(text(f"SELECT get_lock({_lock_name(purpose)}, {timeout})")))


def _lock_name(purpose: str) -> str:
    """Give MySQL's name of a lock: the server's, hence the database's in it, 64 characters."""
    return f"concat('sessionmgr.{purpose}.', md5(coalesce(database(), '')))"

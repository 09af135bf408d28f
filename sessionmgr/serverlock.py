"""Locks that a database gives: one process at a time, on whatever machine it is."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import func, select, text

from .errors import SchemaLockError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

__all__ = ("server_lock",)

#: Seconds for which MySQL and MariaDB wait for their lock. The other databases wait
#: by their own settings (lock_timeout, busy_timeout).
LOCK_TIMEOUT = 60


@contextmanager
def server_lock(
    connection: Connection, purpose: str, database: str, *, wait: bool = True
) -> Iterator[bool]:
    """Hold a lock of the database's own until the transaction, or the block, ends.

    PostgreSQL gives an advisory lock of the transaction, not of the session: it works through
    a transaction pooler. MySQL and MariaDB give a named lock, for their DDL commits. SQLite
    has one lock, for writing. Other databases give none.

    :param connection: a connection in a transaction.
    :param purpose: what the lock is for; locks for different purposes do not meet.
    :param database: the database's name for error texts.
    :param wait: whether to wait for another holder.
    :return: whether it is held: false only where it was not waited for.
    :raises SchemaLockError: when MySQL or MariaDB does not grant it within 60 s.
    """
    dialect = connection.dialect.name
    if dialect in ("mysql", "mariadb"):
        with _named_lock(connection, purpose, database, wait=wait) as held:
            yield held
        return
    held = True
    if dialect == "postgresql":
        take = func.pg_advisory_xact_lock if wait else func.pg_try_advisory_xact_lock
        held = connection.scalar(select(take(_number(purpose)))) is not False
    elif dialect == "sqlite" and not _in_transaction(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    yield held


def _number(purpose: str) -> int:
    """Give the number by which PostgreSQL knows the lock; others' are unlikely to be the same."""
    digest = hashlib.sha256(f"sessionmgr.{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _in_transaction(connection: Connection) -> bool:
    return bool(getattr(connection.connection.driver_connection, "in_transaction", False))


@contextmanager
def _named_lock(
    connection: Connection, purpose: str, database: str, *, wait: bool
) -> Iterator[bool]:
    """Hold a lock of MySQL's or MariaDB's server; DDL commits there, and it outlives that."""
    # lock names are the server's, hence the database's in it; 64 characters are allowed
    name = f"concat('sessionmgr.{purpose}.', md5(coalesce(database(), '')))"
    timeout = LOCK_TIMEOUT if wait else 0
    granted = bool(connection.scalar(text(f"SELECT get_lock({name}, {timeout})")))
    if wait and not granted:
        raise SchemaLockError(
            f"database {database}: another connection holds the {purpose} lock since"
            f" {timeout} s. Find it with SELECT is_used_lock({name})"
        )
    try:
        yield granted
    finally:
        if granted and not connection.invalidated:  # else the server has freed it
            connection.execute(text(f"SELECT release_lock({name})"))

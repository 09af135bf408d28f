"""Which database errors pass by themselves when the work is done again."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    ProgrammingError,
)

__all__ = (
    "is_contention",
    "is_creation_race",
    "is_full",
    "is_hopeless",
    "is_lock_timeout",
    "is_lost",
    "is_transient",
    "is_untranslatable",
    "note",
)

# PostgreSQL's SQLSTATEs: https://www.postgresql.org/docs/current/errcodes-appendix.html
# Serialization failure, deadlock, lock not available.
_LOCK_TIMEOUT_SQLSTATE = "55P03"
_CONTENTION_SQLSTATES = frozenset(("40001", "40P01", _LOCK_TIMEOUT_SQLSTATE))
# Connection exceptions, shutdown, crash, start-up, idle timeout.
_LOST_SQLSTATES = re.compile(r"08...|57P0[1-5]")
# Too many connections.
_FULL_SQLSTATE = "53300"

# Errors of MySQL and MariaDB: https://mariadb.com/kb/en/mariadb-error-code-reference/
# Row changed since it was read, lock wait timeout, deadlock, NOWAIT refused.
_CONTENTION_NUMBERS = frozenset((1020, 1205, 1213, 3572))
# Galera node not ready, shutdown in progress, connection killed, cannot connect, server gone,
# connection lost.
_LOST_NUMBERS = frozenset((1047, 1053, 1927, 2002, 2003, 2006, 2013, 2055))
# Too many connections.
_FULL_NUMBER = 1040

# libpq gives no SQLSTATE for an attempt to connect, only the text. The last two are asyncio's and
# asyncpg's.
_LOST_TEXTS = re.compile(
    r"connection refused|connection reset|server closed the connection"
    r"|the database system is (starting up|shutting down|in recovery|not yet accepting)"
    r"|timeout expired|connection timeout|on socket .* failed: no such file"
    r"|connect call failed|unexpected connection_lost",
    re.IGNORECASE,
)
_FULL_TEXTS = re.compile(
    r"too many clients|too many connections for|remaining connection slots", re.IGNORECASE
)

_SQLITE_LOCKED = re.compile(r"database (table |schema )?is locked")

# Two processes created the same thing at once. 23505 is PostgreSQL's unique index on its own
# catalog, which CREATE TABLE IF NOT EXISTS does not avoid (psycopg/psycopg2#1036).
_DUPLICATE_SQLSTATES = frozenset(("42P07", "42710", "42P06", "23505"))
_DUPLICATE_NUMBERS = frozenset((1050, 1061, 1007, 1826, 4084))

# What no repetition mends. SQLSTATE classes: not supported, data, constraint, authorization, no
# such database or schema, syntax or access rule; and a write to a hot standby, say.
_HOPELESS_SQLSTATES = re.compile(r"(0A|22|23|28|3D|3F|42)...|25006")
# Access denied (to a database, at login, for a command, for a column, for a privilege), unknown
# database, unknown column, no such table, syntax, data too long.
_HOPELESS_NUMBERS = frozenset((1044, 1045, 1049, 1054, 1064, 1142, 1143, 1146, 1227, 1406))
_HOPELESS_TEXTS = re.compile(
    r"password authentication failed|no password supplied|no pg_hba\.conf entry"
    r"|(database|role) .* does not exist|permission denied"
    r"|no such (table|column)|has no column named|syntax error|readonly database"
    r"|unable to open database file|not a database",
    re.IGNORECASE,
)

# Text that another character set lacks. MariaDB says that the collations cannot be mixed, MySQL
# that it cannot convert the text.
_UNTRANSLATABLE_SQLSTATE = "22P05"
_UNTRANSLATABLE_NUMBERS = frozenset((1267, 3988))


def is_transient(error: BaseException) -> bool:
    """Tell whether the same work may well succeed on another attempt.

    True for contention and for a lost connection, or a server that is starting or full. False
    for what stays wrong: constraint violations, missing rights, tables or databases, bad
    passwords.
    """
    return is_contention(error) or is_lost(error) or is_full(error)


def is_contention(error: BaseException) -> bool:
    """Tell whether the database gave way to another transaction.

    That is: a deadlock, a serialization failure, a lock not granted in time, a SQLite file
    that is locked.
    """
    if not isinstance(error, DBAPIError):
        return False
    sqlstate, number, text = _facts(error.orig)
    if sqlstate is None and number is None:
        return _SQLITE_LOCKED.search(text) is not None
    return sqlstate in _CONTENTION_SQLSTATES or number in _CONTENTION_NUMBERS


def is_lock_timeout(error: DBAPIError) -> bool:
    """Tell whether PostgreSQL did not grant a lock in time (``lock_timeout``)."""
    sqlstate, _, _ = _facts(error.orig)
    return sqlstate == _LOCK_TIMEOUT_SQLSTATE


def is_full(error: BaseException) -> bool:
    """Tell whether a server takes no more connections; those that are open are well."""
    if not isinstance(error, DBAPIError):
        return False
    sqlstate, number, text = _facts(error.orig)
    if sqlstate is None and number is None:
        return _FULL_TEXTS.search(text) is not None
    return sqlstate == _FULL_SQLSTATE or number == _FULL_NUMBER


def is_lost(error: BaseException) -> bool:
    """Tell whether a connection was lost, or could not be made for a server that is away."""
    if not isinstance(error, DBAPIError) or is_full(error):
        return False
    sqlstate, number, text = _facts(error.orig)
    return (
        error.connection_invalidated
        or (sqlstate is not None and _LOST_SQLSTATES.fullmatch(sqlstate) is not None)
        or number in _LOST_NUMBERS
        or (sqlstate is None and number is None and _LOST_TEXTS.search(text) is not None)
    )


def is_hopeless(error: BaseException) -> bool:
    """Tell whether an error is known to stay, whatever is tried again.

    Many errors are neither this nor transient: nothing is known of them.
    """
    if not isinstance(error, DBAPIError) or is_transient(error):
        return False
    sqlstate, number, text = _facts(error.orig)
    kinds = (DataError, IntegrityError, NotSupportedError, ProgrammingError)
    return (
        isinstance(error, kinds)
        or (sqlstate is not None and _HOPELESS_SQLSTATES.fullmatch(sqlstate) is not None)
        or number in _HOPELESS_NUMBERS
        or (sqlstate is None and number is None and _HOPELESS_TEXTS.search(text) is not None)
    )


def is_creation_race(error: BaseException) -> bool:
    """Tell whether an error in DDL means that another process created the same thing."""
    if not isinstance(error, DBAPIError):
        return False
    sqlstate, number, text = _facts(error.orig)
    return (
        sqlstate in _DUPLICATE_SQLSTATES
        or number in _DUPLICATE_NUMBERS
        or (sqlstate is None and number is None and "already exists" in text)
    )


def is_untranslatable(error: BaseException) -> bool:
    """Tell whether a text cannot be written in the character set of a column or a database."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, UnicodeEncodeError)  # psycopg writes it itself
    sqlstate, number, _ = _facts(error.orig)
    return sqlstate == _UNTRANSLATABLE_SQLSTATE or number in _UNTRANSLATABLE_NUMBERS


def _facts(orig: BaseException | None) -> tuple[str | None, int | None, str]:
    """Read SQLSTATE, error number and text from a driver's error."""
    driver_error: Any = orig
    sqlstate = getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)
    first = driver_error.args[0] if getattr(driver_error, "args", None) else None
    number = first if isinstance(first, int) else None
    return sqlstate, number, str(orig)


def note(error: BaseException, text: str) -> None:
    """Add a note to an error, where Python has them (3.11 and later)."""
    add_note = getattr(error, "add_note", None)
    if add_note is not None:
        add_note(text)

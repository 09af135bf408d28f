"""What is particular to SQLite: databases in memory, files, and what connections are set to."""

from __future__ import annotations

import asyncio
import functools
import random
import re
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from sqlalchemy.engine import AdaptedConnection

from .transient import note

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = (
    "OPTIONS",
    "FileIdentity",
    "SQLiteSettings",
    "autocommit",
    "check_option",
    "is_memory",
    "is_missing_file",
    "is_read_only",
    "named_file",
    "open_file",
    "raw_connection",
    "roll_back",
    "settings",
)

FileIdentity = tuple[int, int]

#: Engine option -> default. ``None`` leaves what SQLite or the driver does by itself, which waits
#: for locks for 5 s, too.
OPTIONS: Mapping[str, Any] = {
    "sqlite_foreign_keys": True,
    "sqlite_journal_mode": "WAL",
    "sqlite_busy_timeout": 5.0,
    "sqlite_synchronous": "NORMAL",
    "sqlite_transactions": True,
}

_WORDS = {
    "sqlite_journal_mode": ("DELETE", "TRUNCATE", "PERSIST", "MEMORY", "WAL", "OFF"),
    "sqlite_synchronous": ("OFF", "NORMAL", "FULL", "EXTRA"),
}

# Seconds: SQLite counts milliseconds in 32 bits.
_LONGEST_TIMEOUT = 2_147_483

# Seconds between two attempts to change the journal mode, at random up to this.
_PAUSE = 0.02


def is_memory(url: URL) -> bool:
    """Tell whether a URL names a SQLite database that lives in memory.

    Such a database is its connection: it is gone when that is closed. The spellings are those
    of https://www.sqlite.org/inmemorydb.html: no name, ``:memory:``, and URI file names with
    ``mode=memory`` or ``vfs=memdb`` (here also as part of the SQLAlchemy URL's query).
    """
    if url.get_backend_name() != "sqlite":
        return False
    name = url.database or ""
    if not name.startswith("file:"):
        return name in ("", ":memory:")
    return (
        re.split("[?#]", name)[0] in ("file:", "file://", "file::memory:")
        or "memory" in _given(url, "mode")
        or "memdb" in _given(url, "vfs")
    )


def is_read_only(url: URL) -> bool:
    """Tell whether a URL says that nobody writes to a SQLite file, or that nobody locks it.

    Its journal mode cannot be changed: https://www.sqlite.org/uri.html.
    """
    true = re.compile(r"yes|true|on|0*[1-9]\d*", re.IGNORECASE)
    given = [*_given(url, "immutable"), *_given(url, "nolock")]
    return "ro" in _given(url, "mode") or any(true.fullmatch(value) for value in given)


def _given(url: URL, name: str) -> list[str]:
    """Give the values of a parameter of a URI file name, wherever in the URL they are."""
    query = (url.database or "").partition("?")[2]
    return [*parse_qs(query).get(name, ()), *url.normalized_query.get(name, ())]


def is_missing_file(url: URL) -> bool:
    """Tell whether a URL names a SQLite file that is not there; connecting would make it.

    A URI file name is taken to be there.
    """
    name = url.database or ""
    if url.get_backend_name() != "sqlite" or is_memory(url) or name.startswith("file:"):
        return False
    return not Path(name).exists()


def open_file(dbapi_connection: DBAPIConnection) -> FileIdentity | None:
    """Find which file a SQLite connection has open as its main database.

    SQLite answers from memory: the file is not read, and no lock is taken.

    :param dbapi_connection: a connection of the sqlite3 module, or one with its interface.
    :return: device and inode of the file, or ``None`` for a database in memory.
    """
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute("PRAGMA database_list")
        path = next((row[2] for row in cursor.fetchall() if row[1] == "main"), None)
    finally:
        cursor.close()
    return _identity(path) if path else None


def named_file(url: URL) -> FileIdentity | None:
    """Find which file a SQLite URL names, without opening it.

    :return: device and inode, or ``None`` where there is no file, or it is named in another way.
    """
    name = url.database or ""
    if url.get_backend_name() != "sqlite" or is_memory(url):
        return None
    return _identity(unquote(urlsplit(name).path) if name.startswith("file:") else name)


def _identity(path: str) -> FileIdentity | None:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):  # deleted since, or inside a virtual file system of its own
        return None
    return status.st_dev, status.st_ino


def roll_back(dbapi_connection: DBAPIConnection) -> None:
    """End a transaction on a connection that is about to be closed.

    Python closes it for good only once nothing refers to its cursors any more, and the traceback
    of an error in the midst of a statement does. Until then it would keep the file's locks:
    https://www.sqlite.org/c3ref/close.html.
    """
    with suppress(Exception):  # then it is closed as it is; it may be the parent's, and severed
        # SQLAlchemy's adapter of aiosqlite does not tell, its connection does
        if getattr(dbapi_connection, "driver_connection", dbapi_connection).in_transaction:
            dbapi_connection.rollback()


def raw_connection(driver_connection: Any) -> Any:
    """Give the sqlite3 module's connection, which aiosqlite keeps in an attribute of its own.

    :return: ``None`` where aiosqlite's is closed.
    """
    try:
        return getattr(driver_connection, "_conn", driver_connection)
    except ValueError:
        return None


def autocommit(raw: Any) -> bool | None:
    """Give what ``autocommit`` of a sqlite3 connection is set to, since Python 3.12.

    :return: ``None`` where it is not set, and ``isolation_level`` tells instead; or where another
        thread must not ask, as with aiosqlite, unless ``check_same_thread=False``.
    """
    try:
        value = getattr(raw, "autocommit", None)
    except Exception:  # noqa: BLE001 - the driver's own ProgrammingError, whichever driver it is
        return None
    return value if isinstance(value, bool) else None


def check_option(name: str, value: Any) -> Any:
    """Check the value of one of :data:`OPTIONS`.

    :return: the value in the one spelling in which it is compared.
    :raises ValueError: when it cannot be; the text tells what can.
    """
    if value is None:
        return value
    if name in _WORDS:
        if isinstance(value, str) and value.upper() in _WORDS[name]:
            return value.upper()
        raise ValueError(f"one of {', '.join(_WORDS[name])}, or None")
    if name == "sqlite_busy_timeout":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and 0 <= value <= _LONGEST_TIMEOUT:
            return value
        raise ValueError(f"a number of seconds from 0 to {_LONGEST_TIMEOUT}, or None")
    words = ("writes",) if name == "sqlite_transactions" else ()
    if not isinstance(value, bool) and value not in words:
        raise ValueError(", ".join(["True", "False", *map(repr, words)]) + " or None")
    return value


@dataclass(frozen=True)
class SQLiteSettings:
    """What each connection of an engine is set to; ``None`` is left alone.

    :param foreign_keys: whether foreign keys are checked.
    :param journal_mode: the journal mode of the file.
    :param busy_timeout: seconds to wait for a lock.
    :param synchronous: when SQLite waits for the disk.
    :param only_in_wal: set ``synchronous`` in WAL mode only: what loses no more than the last
        commits there can leave a broken file elsewhere.
    :param transactions: whether transactions begin as :mod:`.sqlite_transactions` has it.
    :param at_reads: whether a statement that reads begins one.
    """

    foreign_keys: bool | None
    journal_mode: str | None
    busy_timeout: float | None
    synchronous: str | None
    only_in_wal: bool
    transactions: bool
    at_reads: bool

    def on_connect(self, dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        """Set up a connection that was just made; a listener to a pool's ``connect``."""
        # With autocommit=False it is in a transaction always, where most of this has no effect.
        always = autocommit(raw_connection(entry.driver_connection)) is False
        with closing(dbapi_connection.cursor()) as cursor:
            if always:
                cursor.execute("COMMIT")
            self._set_up(dbapi_connection, cursor)
            if always:
                cursor.execute("BEGIN")

    def _set_up(self, dbapi_connection: DBAPIConnection, cursor: DBAPICursor) -> None:
        if self.busy_timeout is not None:
            cursor.execute(f"PRAGMA busy_timeout={round(self.busy_timeout * 1000)}")
            cursor.fetchall()
        if self.foreign_keys is not None:
            cursor.execute(f"PRAGMA foreign_keys={int(self.foreign_keys)}")
        mode = None
        if self.journal_mode is not None:
            mode = _journal_mode(dbapi_connection, cursor, self.journal_mode)
        if self.synchronous is not None and (mode == "WAL" or not self.only_in_wal):
            cursor.execute(f"PRAGMA synchronous={self.synchronous}")


_shared_settings = functools.lru_cache(SQLiteSettings)  # a thousand engines have the same


def settings(
    url: URL, requested: Mapping[str, Any], named: set[str], *, shared: bool
) -> SQLiteSettings:
    """Give the settings for one SQLite database.

    :param url: the database.
    :param requested: every one of :data:`OPTIONS` -> value.
    :param named: those that somebody asked for.
    :param shared: whether threads use one connection at the same time, as those do that use a
        database in memory.
    """
    in_file = not is_memory(url) and not is_read_only(url)
    timeout = requested["sqlite_busy_timeout"] if "sqlite_busy_timeout" in named else None
    return _shared_settings(
        foreign_keys=requested["sqlite_foreign_keys"],
        journal_mode=requested["sqlite_journal_mode"] if in_file else None,
        busy_timeout=timeout,
        synchronous=requested["sqlite_synchronous"] if in_file else None,
        only_in_wal="sqlite_synchronous" not in named,
        transactions=bool(requested["sqlite_transactions"]),
        at_reads=requested["sqlite_transactions"] is True and not shared,
    )


def _journal_mode(dbapi_connection: DBAPIConnection, cursor: DBAPICursor, wanted: str) -> str:
    """Have a file in a journal mode, and give the one that it is in then.

    A file that may not be written to stays in its own. To change the mode, SQLite takes the
    file's locks in an order in which it does not wait for others (SQLITE_BUSY at once, rather
    than a deadlock): processes that open a new file at the same time would fail.
    """
    begun = monotonic()
    while True:
        try:
            cursor.execute(f"PRAGMA journal_mode={wanted}")
            return str(cursor.fetchall()[0][0]).upper()
        except Exception as error:
            if "readonly" in str(error):
                cursor.execute("PRAGMA journal_mode")
                return str(cursor.fetchall()[0][0]).upper()
            if "locked" not in str(error) or monotonic() >= begun + _busy_timeout(cursor):
                note(
                    error,
                    f"raised while changing the file's journal mode to {wanted}, for which nobody"
                    " else may be reading or writing; sqlite_journal_mode=None leaves it as it is",
                )
                raise
        _pause(dbapi_connection, random.uniform(0.001, _PAUSE))  # noqa: S311 - no secret


def _busy_timeout(cursor: DBAPICursor) -> float:
    cursor.execute("PRAGMA busy_timeout")
    return float(cursor.fetchall()[0][0]) / 1000


def _pause(dbapi_connection: DBAPIConnection, seconds: float) -> None:
    """Wait, without holding up an event loop."""
    if isinstance(dbapi_connection, AdaptedConnection):
        dbapi_connection.run_async(lambda _: asyncio.sleep(seconds))
    else:
        sleep(seconds)

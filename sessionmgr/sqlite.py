"""What is particular to SQLite: databases in memory, and which file a connection has open."""

from __future__ import annotations

import ctypes
import functools
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection

__all__ = (
    "FileIdentity",
    "enter_mutexes",
    "is_memory",
    "is_missing_file",
    "leave_mutexes",
    "open_file",
    "roll_back",
)

FileIdentity = tuple[int, int]


def is_memory(url: URL) -> bool:
    """Tell whether a URL names a SQLite database that lives in memory.

    Such a database is its connection: it is gone when that is closed. The spellings are those
    of https://www.sqlite.org/inmemorydb.html: no name, ``:memory:``, and URI file names with
    ``mode=memory`` (here also as part of the SQLAlchemy URL's query).
    """
    if url.get_backend_name() != "sqlite":
        return False
    name, _, query = (url.database or "").partition("?")
    modes = [*parse_qs(query).get("mode", ()), *url.normalized_query.get("mode", ())]
    return name in ("", ":memory:", "file:", "file::memory:") or "memory" in modes


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
    if not path:
        return None
    try:
        status = Path(path).stat()
    except OSError:  # deleted since, or inside a virtual file system of its own
        return None
    return status.st_dev, status.st_ino


def roll_back(dbapi_connection: DBAPIConnection) -> None:
    """End a transaction on a connection that is about to be closed.

    Python closes it for good only once nothing refers to its cursors any more, and the traceback
    of an error in the midst of a statement does. Until then it would keep the file's locks:
    https://www.sqlite.org/c3ref/close.html.
    """
    with suppress(Exception):  # then it is closed as it is; it may be the parent's, and severed
        if dbapi_connection.in_transaction:
            dbapi_connection.rollback()


# Numbers of SQLite's static mutexes, https://www.sqlite.org/c3ref/c_mutex_fast.html: main,
# memory, open, prng, lru, page cache, and the three of the VFS. Its threads hold them without
# holding the interpreter's lock, so a fork may come at any moment.
_STATIC_MUTEXES = (2, 3, 4, 5, 6, 7, 11, 12, 13)

# Seconds for which a fork tries to have them all, however late it is; they are held for
# microseconds.
_LEAST_WAIT = 0.1

_entered: list[Any] = []


def enter_mutexes(deadline: float) -> bool:
    """Have no other thread inside SQLite's static mutexes, before a fork.

    In the child they would stay locked for good, and its first connection would hang. They
    are tried, not waited for, so their order does not matter.

    :param deadline: when to give up, by ``time.monotonic()``.
    :return: whether all are entered; otherwise none is.
    """
    if "_sqlite3" not in sys.modules:
        return True
    library, mutexes = _static_mutexes()
    deadline = max(deadline, monotonic() + _LEAST_WAIT)
    while len(_entered) < len(mutexes) and monotonic() < deadline:
        for mutex in mutexes:
            if library.sqlite3_mutex_try(mutex) != 0:
                leave_mutexes()
                sleep(0)
                break
            _entered.append(mutex)
    return len(_entered) == len(mutexes)


def leave_mutexes() -> None:
    """Leave what was entered, after a fork, in parent and child."""
    while _entered:
        _static_mutexes()[0].sqlite3_mutex_leave(_entered.pop())


@functools.cache
def _static_mutexes() -> tuple[Any, tuple[Any, ...]]:
    """Find the mutexes of the library that the sqlite3 module uses; none where it hides them."""
    try:
        library = ctypes.PyDLL(sys.modules["_sqlite3"].__file__)
        library.sqlite3_initialize()
        allocate = library.sqlite3_mutex_alloc
        library.sqlite3_mutex_try.argtypes = library.sqlite3_mutex_leave.argtypes = [
            ctypes.c_void_p
        ]
    except (OSError, AttributeError):
        return None, ()
    allocate.restype = ctypes.c_void_p
    return library, tuple(mutex for number in _STATIC_MUTEXES if (mutex := allocate(number)))

"""SQLite's own mutexes, which no other thread may be inside of while a process forks."""

from __future__ import annotations

import ctypes
import functools
import sys
from time import monotonic, sleep
from typing import Any

__all__ = ("enter_mutexes", "leave_mutexes")

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

"""A lock for each database, which exists while somebody wants it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import InvalidRequestError

from .forking import ProcessLock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .urls import DatabaseKey

__all__ = ("DatabaseLocks",)


class _DatabaseLock:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.wanted = 0  # by how many threads, the holder among them
        self.holder: int | None = None


class DatabaseLocks:
    """Re-entrant locks, one for each database."""

    # _lock guards the two dictionaries and `wanted`; `holder` is written by the lock's holder.

    def __init__(self) -> None:
        self._lock = ProcessLock()
        self._locks: dict[DatabaseKey, _DatabaseLock] = {}
        self._waiting: dict[int, _DatabaseLock] = {}  # thread -> the lock it waits for

    @contextmanager
    def hold(self, key: DatabaseKey) -> Iterator[None]:
        """Hold the lock of one database.

        :raises InvalidRequestError: when its holder waits, itself or by others, for a lock that
            this thread holds. Callbacks that ask the manager for each other's databases do that.
        """
        me = threading.get_ident()
        lock = self._announce(me, key)
        try:
            with lock.lock:
                with self._lock():
                    del self._waiting[me]
                    before, lock.holder = lock.holder, me
                try:
                    yield
                finally:
                    lock.holder = before
        finally:
            self._withdraw(me, key, lock)

    def _announce(self, me: int, key: DatabaseKey) -> _DatabaseLock:
        with self._lock():
            lock = self._locks.get(key) or _DatabaseLock()
            last = lock
            while last.holder is not None and last.holder in self._waiting:
                last = self._waiting[last.holder]
            if last.holder == me and lock.holder != me:
                raise InvalidRequestError(
                    f"engine_callback asked the manager for database {key.describe()}, which"
                    " another thread is making, whose engine_callback waits for the one made here"
                )
            lock.wanted += 1
            self._locks[key] = self._waiting[me] = lock
            return lock

    def _withdraw(self, me: int, key: DatabaseKey, lock: _DatabaseLock) -> None:
        with self._lock():
            self._waiting.pop(me, None)
            lock.wanted -= 1
            if not lock.wanted and self._locks.get(key) is lock:
                del self._locks[key]

    def renew(self) -> None:
        """Forget the parent's threads, in a forked child."""
        self._locks = {}
        self._waiting = {}

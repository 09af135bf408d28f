"""The gate at which a fork waits for the work that must not be cut in two."""

from __future__ import annotations

import threading
import weakref
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ("ForkGate",)


class ForkGate:
    """Keeps forks and critical sections apart.

    Every thread has a lock of its own, which is its section; a fork takes those of all other
    threads. So sections never wait for each other, only for forks. They are plain locks
    because a signal's handler may raise anywhere (Celery's soft time limit does): ``with`` on a
    lock is safe from that, and counters are not.

    A section may outlive its thread: that of a greenlet whose event loop was closed while it
    waited there. No fork waits for it.
    """

    # _registry guards _locks: while a fork holds it, no thread gets a lock.

    def __init__(self) -> None:
        self._registry = threading.RLock()
        #: each thread's lock -> the thread
        self._locks: dict[weakref.ref[threading.RLock], threading.Thread] = {}
        self._own = threading.local()

    def section(self) -> AbstractContextManager[object]:
        """Give a critical section of this thread, for ``with``; no other thread forks in it.

        Sections nest.
        """
        lock: threading.RLock | None = getattr(self._own, "lock", None)
        return self._admit() if lock is None else lock

    def _admit(self) -> threading.RLock:
        with self._registry:
            lock = self._own.lock = threading.RLock()
            self._keep(lock)
        return lock

    def _keep(self, lock: threading.RLock) -> None:
        locks = self._locks
        locks[weakref.ref(lock, lambda gone: locks.pop(gone, None))] = threading.current_thread()

    def close(self, timeout: float) -> bool:
        """Close the gate for a fork by this thread.

        :param timeout: seconds to wait for the other threads' sections to end.
        :return: whether all have ended. Where not, the fork goes on beside them.
        """
        deadline = monotonic() + timeout
        if not self._registry.acquire(timeout=timeout):
            return False  # another thread forks, and is stuck
        waits = (lock.acquire(timeout=max(0.0, deadline - monotonic())) for lock in self._others())
        return all(list(waits))

    def _others(self) -> list[threading.RLock]:
        own = getattr(self._own, "lock", None)
        threads = self._locks.copy().items()
        found = (reference() for reference, thread in threads if thread.is_alive())
        return [lock for lock in found if lock is not None and lock is not own]

    def open(self) -> None:
        """Open the gate, in the process that forked."""
        for lock in (*self._others(), self._registry):
            release(lock)

    def renew(self) -> None:
        """Forget the parent's threads, in the forked child: only this one is left."""
        own = getattr(self._own, "lock", None)
        self.__init__()  # type: ignore[misc]  # just that
        # Its own section goes on. One that cannot be had was held by another fork of the parent.
        if own is not None and own.acquire(blocking=False):
            own.release()
            self._own.lock = own
            self._keep(own)


def release(lock: threading.RLock) -> None:
    """Release a lock as often as this thread holds it, which may be never."""
    try:
        while True:
            lock.release()
    except RuntimeError:
        pass

"""What happens around a fork: before it in the parent, and first of all in the child.

The hook is registered once, when this module is imported, and sees every fork of the process,
whoever makes it: ``os.fork``, multiprocessing, billiard, a pre-forking server.
``subprocess`` does not run it (it does with ``preexec_fn``, where it does no harm).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from contextlib import suppress
from time import monotonic
from typing import Any, Protocol

# No public name exists. An inherited locked mutex hangs the child at its first mapped class, and
# the mapper events come too late: before_configured is called with the mutex held.
from sqlalchemy.orm.mapper import _CONFIGURE_MUTEX

from . import sqlite_mutexes
from .gate import ForkGate
from .severing import open_connections, sever_all

__all__ = ("ProcessLock", "become_worker", "gate", "heirs", "inherit", "is_child")

logger = logging.getLogger(__name__)

#: Seconds for which a fork waits for other threads before it goes on with a warning.
FORK_WAIT = 5.0
#: Seconds that the configuration of mappers is given at least, also after all of these.
MAPPERS_WAIT = 1.0

gate = ForkGate()


class Process:
    """Identity of this process; a child gets a new one, unlike a pid never used again."""

    __slots__ = ("forked",)

    def __init__(self, *, forked: bool) -> None:
        self.forked = forked


#: Compared by ``is`` on every checkout, hence a module attribute and no function.
process = Process(forked=False)


class Heir(Protocol):
    """What owns pools: a manager."""

    def _before_fork(self, deadline: float) -> None:
        """Close what a child must not inherit, as far as it can be had by then.

        :param deadline: by ``time.monotonic()``.
        """

    def _after_fork(self) -> None:
        """Begin anew in a child. Must not lock, log or raise."""

    def mark_worker(self) -> None:
        """Keep connections from now on."""

    def _leave(self) -> None:
        """Close the pools of this process, which ends."""


# A plain set, whose copy is atomic: a WeakSet must not be iterated while threads add to it.
_heirs: set[weakref.ref[Heir]] = set()


def inherit(heir: Heir) -> None:
    """Tell ``heir`` of every fork, for as long as it lives."""
    _heirs.add(weakref.ref(heir, _heirs.discard))


def heirs() -> list[Heir]:
    """List who is told of forks."""
    found = (reference() for reference in _heirs.copy())
    return [heir for heir in found if heir is not None]


class ProcessLock:
    """A re-entrant lock that a forked child finds unlocked."""

    __slots__ = ("_locks",)

    def __init__(self) -> None:
        self._locks: dict[Process, threading.RLock] = {}

    def __call__(self) -> threading.RLock:
        """Give the lock of the process that asks. Whatever the parent's is, it is not this."""
        return self._locks.setdefault(process, threading.RLock())  # atomic


def is_child() -> bool:
    """Tell whether this process was started as a worker.

    That is: forked since this module was imported, or started by multiprocessing or billiard
    in any of their ways.
    """
    if process.forked:
        return True
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None and (
        multiprocessing.parent_process() is not None
        or _is_starting(multiprocessing.current_process())
    ):
        return True
    billiard = sys.modules.get("billiard.process")
    if billiard is None:
        return False
    current = billiard.current_process()
    return current._parent_pid is not None or _is_starting(current)


def _is_starting(current: Any) -> bool:
    """Tell whether a spawned process is still unpickling what it is to do.

    Its main module is imported then, with the managers in it; only afterwards does the
    process know its parent.
    """
    return bool(getattr(current, "_inheriting", False))


def become_worker() -> None:
    """Take this process for a worker: its managers keep connections from now on."""
    process.forked = True
    for heir in heirs():
        heir.mark_worker()


# For each thread that is forking: whether it was given the mapper mutex.
_mapper_mutex_held: dict[int, bool] = {}


def _before() -> None:
    """Wait for a clean moment, and hold back what would spoil it."""
    me = threading.get_ident()
    deadline = monotonic() + FORK_WAIT
    clear = gate.close(FORK_WAIT)
    # Mappers are configured in milliseconds, but at any moment: also where all the time went
    # into waiting for a connection, a try without any would find the mutex taken.
    _mapper_mutex_held[me] = mapped = _CONFIGURE_MUTEX.acquire(
        timeout=max(MAPPERS_WAIT, deadline - monotonic())
    )
    if not (clear and mapped):
        _warn("configure mappers" if clear else "make engines or connect")
    if any(connection.file is not None for connection in open_connections.copy()):
        for heir in heirs():
            heir._before_fork(deadline)
    if not sqlite_mutexes.enter_mutexes(deadline):
        _warn("use SQLite")


def _warn(what: str) -> None:
    logger.warning(
        "process %d forks while other threads still %s, after waiting %.0f s: the child may"
        " hang or inherit a connection that is being made. Fork before starting threads",
        os.getpid(),
        what,
        FORK_WAIT,
    )


def _after_in_parent() -> None:
    try:
        sqlite_mutexes.leave_mutexes()
        _release_mapper_mutex()
    finally:
        gate.open()


def _after_in_child() -> None:
    """Cut the child off from the parent's connections, before user code runs.

    Only this thread exists. No lock is taken, nothing is logged, and the cost grows with the
    open connections alone.
    """
    global process
    process = Process(forked=True)
    sqlite_mutexes.leave_mutexes()
    gate.renew()
    _release_mapper_mutex()
    _mapper_mutex_held.clear()
    sever_all()
    for heir in heirs():
        with suppress(Exception):
            heir._after_fork()


def _release_mapper_mutex() -> None:
    if _mapper_mutex_held.pop(threading.get_ident(), False):
        _CONFIGURE_MUTEX.release()


def _register() -> None:
    from . import signals  # takes what only systems with forks have

    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
    # Before a fork the last registered is called first, and after it last: no signal's handler
    # is called in between.
    os.register_at_fork(
        before=signals.hold,
        after_in_parent=signals.let_go,
        after_in_child=signals.let_go_in_child,
    )
    os.register_at_fork(after_in_parent=signals.deliver, after_in_child=signals.deliver)


if hasattr(os, "register_at_fork"):  # Windows starts processes by spawn alone
    _register()

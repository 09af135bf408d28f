"""What an engine is to have done before its pool hands out the first connection."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from . import forking
from .greenlets import TaskLock

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sqlalchemy import Engine

__all__ = ("FirstUse",)

# Whose work is being done in this thread or task.
_under_way: ContextVar[tuple[FirstUse, ...]] = ContextVar("sessionmgr_first_use", default=())


class FirstUse:
    """Work that is done once, before anybody else gets a connection.

    It may check out connections of that very engine. Who comes meanwhile waits; where it fails,
    the error reaches who has begun it, and the next one tries again.
    """

    # The lock guards that the work is done once.

    __slots__ = ("_lock", "_task_lock", "_work", "done")

    def __init__(self, work: Callable[[Engine], object], *, is_async: bool) -> None:
        """Prepare for an engine's first use.

        :param work: is given the engine. It may be done in several processes at once.
        :param is_async: whether the engine's driver takes an event loop.
        """
        self._work = work
        self._lock = forking.ProcessLock()
        self._task_lock = TaskLock() if is_async else None
        #: whether the work was done, here or in the process that this one was forked from
        self.done = False

    def __call__(self, engine: Engine) -> None:
        """Do the work, unless it was done or is being done by the caller."""
        if self.done or self in _under_way.get():
            return
        with self._turn():
            if not self.done:
                self._do(engine)

    def _turn(self) -> AbstractContextManager[object]:
        return self._lock() if self._task_lock is None else self._task_lock

    def _do(self, engine: Engine) -> None:
        outer = _under_way.set((*_under_way.get(), self))
        try:
            self._work(engine)
        finally:
            _under_way.reset(outer)
        self.done = True

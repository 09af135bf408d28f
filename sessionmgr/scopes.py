"""Scoped sessions: one for each scope, of which a forked process begins with none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from . import forking
from .engines import leave_alone

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("forget_at_fork",)

ScopedT = TypeVar("ScopedT")


class _ProcessRegistry:
    """Has the registry of scopes of a ``scoped_session``, and another one in each process.

    The parent's sessions are not closed in a child, not even looked at: they are the parent's.
    """

    def __init__(self, registry: Any, make: Callable[[], Any]) -> None:
        self._registry = registry
        self._make = make
        self._process = forking.process
        self._lock = forking.ProcessLock()

    # Each look of a request at its session comes here: the common case takes no call.

    def _renew(self) -> None:
        with self._lock():  # two threads of a child must not get two registries
            if self._process is not forking.process:
                leave_alone(self._registry)
                self._registry = self._make()
                self._process = forking.process

    def __call__(self) -> Any:
        if self._process is not forking.process:
            self._renew()
        return self._registry()

    def take(self) -> Any:
        """Take the session of the current scope out, or ``None``; of scopes with a function."""
        if self._process is not forking.process:
            self._renew()
        return self._registry.registry.pop(self._registry.scopefunc(), None)

    def forget(self, scope: Any, session: Any) -> bool:
        """Take a session out, if it is that of a scope; tell whether it was."""
        if self._process is not forking.process:
            self._renew()
        sessions = self._registry.registry
        found = sessions.get(scope) is session
        if found:
            del sessions[scope]
        return found

    def has(self) -> bool:
        if self._process is not forking.process:
            self._renew()
        return bool(self._registry.has())

    def set(self, session: Any) -> None:
        if self._process is not forking.process:
            self._renew()
        self._registry.set(session)

    def clear(self) -> None:
        if self._process is not forking.process:
            self._renew()
        self._registry.clear()


def forget_at_fork(make: Callable[[], ScopedT]) -> ScopedT:
    """Make a scoped session that a forked process finds without sessions.

    :param make: makes a ``scoped_session``, or an ``async_scoped_session``.
    """
    scoped: Any = make()
    scoped.registry = _ProcessRegistry(scoped.registry, lambda: make().registry)  # type: ignore[attr-defined]
    return scoped  # type: ignore[no-any-return]

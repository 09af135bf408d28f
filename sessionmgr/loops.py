"""A registry of engines for each event loop, which goes when its loop does."""

from __future__ import annotations

import asyncio
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from . import forking
from .engines import EngineEntry, EngineRegistry, leave_alone
from .errors import EventLoopError
from .greenlets import greenlet_spawn

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import AsyncGenerator, Callable

    from .urls import DatabaseKey

__all__ = ("LoopRegistries", "LoopRegistry", "begin_task")

Entry = EngineEntry[AsyncEngine, async_sessionmaker[AsyncSession]]

#: Seconds for a loop to close its pools at the end of the process; what is left is cut.
_LEAVE_WAIT = 5.0


class LoopRegistry(EngineRegistry[AsyncEngine, async_sessionmaker[AsyncSession]]):
    """The engines of one manager in one event loop; its pools are closed at the loop's end."""

    def __init__(self, max_engines: int | None = None) -> None:
        """Begin empty, in the running loop.

        :param max_engines: as for :class:`EngineRegistry`.
        """
        super().__init__(max_engines)
        self._preparing: dict[DatabaseKey, asyncio.Lock] = {}
        self._ended = False
        self._watcher: AsyncGenerator[None, None] | None = _until_the_end(self)
        with suppress(StopIteration):  # it has reached its yield
            self._watcher.__anext__().send(None)

    def finish(self) -> None:
        """Let every engine go, for the loop ends or was closed. Later ones keep nothing."""
        self._ended = True
        if self.isolation is not None:
            self.isolation.finish(self)
        for entry in self.entries():
            self.pop(entry)
            entry.monitor.finish()
        # These refer to the loop, which would be kept by what it is the weak key of.
        self._preparing = {}
        self._watcher = None

    def leave(self) -> None:
        """Let every engine go at the end of the process, for nobody uses a session any more."""
        for entry in self.entries():
            self.pop(entry)
            entry.monitor.leave()

    def _publish(self, entry: Entry) -> Entry:
        entry = super()._publish(entry)
        if self._ended:  # a generator that ends with the loop as well opens one more session
            entry.monitor.retire()
        return entry

    def preparing(self, key: DatabaseKey) -> asyncio.Lock:
        """Give the lock under which one task looks for a database's tables."""
        return self._preparing.setdefault(key, asyncio.Lock())


class LoopRegistries:
    """The registries of one manager in this process, by event loop.

    A registry learns of the end of its loop as any asynchronous generator does: one that was
    begun in the loop is closed, and may await, in ``loop.shutdown_asyncgens()``, which
    ``asyncio.run`` calls. The registry of a loop that was closed without it is found when
    another loop asks for its own, and its connections are cut.

    The loops are held weakly, but engines and connections refer to the loop that they were made
    in: a loop that nobody closes stays for as long as its engines.
    """

    # _lock guards changes of _registries.

    def __init__(self, max_engines: int | None = None) -> None:
        """Begin without any.

        :param max_engines: as for :class:`EngineRegistry`, in each loop.
        """
        self._max_engines = max_engines
        self._lock = forking.ProcessLock()
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._registries: weakref.WeakKeyDictionary[AbstractEventLoop, LoopRegistry]
        self._registries = weakref.WeakKeyDictionary()

    def current(self) -> LoopRegistry:
        """Give the registry of the running loop.

        :raises EventLoopError: when no event loop is running.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise EventLoopError(
                "an AsyncSessionManager keeps engines for each event loop, and none is running"
                " here: call it in a coroutine, or use a SessionManager"
            ) from None
        registry = self._registries.get(loop)
        return self._admit(loop) if registry is None else registry

    def _admit(self, loop: AbstractEventLoop) -> LoopRegistry:
        self._open()
        registry = LoopRegistry(self._max_engines)
        with self._lock():
            if self._closed:
                registry.close()
            self._registries[loop] = registry
        return registry

    def all(self) -> list[LoopRegistry]:
        """List the registries of every loop that is not closed."""
        return [registry for _, registry in self._open()]

    def others(self) -> list[tuple[AbstractEventLoop, LoopRegistry]]:
        """List the loops beside the running one that have a registry."""
        running = asyncio.get_running_loop()
        return [(loop, registry) for loop, registry in self._open() if loop is not running]

    def _open(self) -> list[tuple[AbstractEventLoop, LoopRegistry]]:
        """List what there is, and cut the connections of loops that were closed."""
        with self._lock():
            found = list(self._registries.items())
            closed = [(loop, registry) for loop, registry in found if loop.is_closed()]
            for loop, _ in closed:
                del self._registries[loop]
        for _, registry in closed:
            registry.finish()
        return [pair for pair in found if pair not in closed]

    def close(self) -> None:
        """Make engines in no loop any more."""
        with self._lock():
            self._closed = True

    def orphan(self) -> None:
        """Close the pools of a manager that is gone, each in its loop."""
        for loop, registry in self._open():
            if len(registry):
                with suppress(RuntimeError):  # it was closed in between, and its pools with it
                    loop.call_soon_threadsafe(begin_task, EngineRegistry.clear, registry)

    def leave(self) -> None:
        """Close the pools at the end of the process, in their loops as far as those stand still."""
        for loop, registry in self._open():
            if len(registry):
                _leave_in(loop, registry)
            registry.clear()

    def abandon(self) -> None:
        """Forget the parent's loops, in a forked child, without looking at them."""
        leave_alone(list(self._registries.items()))
        self._begin()


async def _until_the_end(registry: LoopRegistry) -> AsyncGenerator[None, None]:
    """Wait for the end of the loop, and close the pools then."""
    try:
        yield
    finally:
        await greenlet_spawn(registry.finish)


def _leave_in(loop: AbstractEventLoop, registry: LoopRegistry) -> None:
    """Run a loop once more, to close its pools politely, if that is all that it would run.

    Tasks that are unfinished would go on as well, in a process that is ending.
    """
    # "already running", by another thread, or another one is running in this; a TimeoutError
    with suppress(Exception):
        if not (loop.is_running() or asyncio.all_tasks(loop)):
            leaving = _leave(registry)
            try:
                loop.run_until_complete(leaving)
            finally:
                leaving.close()  # or Python would warn of one that was not run


async def _leave(registry: LoopRegistry) -> None:
    await asyncio.wait_for(greenlet_spawn(registry.leave), _LEAVE_WAIT)


# The tasks that were begun for other threads, for asyncio itself keeps no reference.
_tasks: set[asyncio.Task[None]] = set()


def begin_task(action: Callable[[LoopRegistry], None], registry: LoopRegistry) -> None:
    """Do something with the registry of this loop, which may be about to end.

    If it does, its pools are closed anyway.
    """
    task = asyncio.ensure_future(greenlet_spawn(action, registry))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)

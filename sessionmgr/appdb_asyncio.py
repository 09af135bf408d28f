"""The half of an ApplicationDatabase that is for event loops; it takes greenlet to import."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from .asyncio import AsyncSessionManager
from .greenlets import await_only, greenlet_spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from .urls import DatabaseKey

__all__ = ("AsyncHalf", "off_the_loop")


class AsyncHalf:
    """The manager of an application's engines for event loops, and what makes its sessions."""

    def __init__(self, options: Mapping[str, Any], find_key: Callable[[], DatabaseKey]) -> None:
        """Configure the manager; no loop has to run yet.

        :param options: those of the manager; ``class_`` of its ``session_options`` is that of
            the synchronous session in each asynchronous one.
        :param find_key: finds the database, with a driver for event loops.
        """
        session_options = dict(options["session_options"])
        if "class_" in session_options:
            session_options["sync_session_class"] = session_options.pop("class_")
        self.manager = AsyncSessionManager(**{**options, "session_options": session_options})
        self._find_key = find_key
        self.sessions = _LoopSessions(self.find_engine, session_options)

    def find_engine(self) -> AsyncEngine:
        """Give the engine of the running event loop."""
        return self.manager.get_engine(self._find_key())

    async def run(self, work: Callable[[Engine], object]) -> None:
        """Do synchronous work with that engine, while the loop goes on."""
        await greenlet_spawn(work, self.find_engine().sync_engine)


class _LoopSessions(async_sessionmaker[AsyncSession]):
    """Makes sessions on the engine of the event loop that runs when they are made."""

    def __init__(self, find_engine: Callable[[], AsyncEngine], options: Mapping[str, Any]) -> None:
        super().__init__(**options)
        self._find_engine = find_engine

    def __call__(self, **local_kw: Any) -> AsyncSession:
        """Make a session; on another engine where ``configure`` or the call names one."""
        if local_kw.get("bind") is None and self.kw["bind"] is None:
            local_kw["bind"] = self._find_engine()
        return super().__call__(**local_kw)


def off_the_loop(work: Callable[[], object]) -> None:
    """Do work that waits for the disk in another thread, from inside a greenlet of SQLAlchemy's."""
    await_only(asyncio.to_thread(work))

"""Synchronous code that runs under an event loop, in one of SQLAlchemy's greenlets.

What is here must not be called without greenlet, which asynchronous engines need anyway.
"""

from __future__ import annotations

import asyncio
import importlib

from sqlalchemy.util import await_only, greenlet_spawn

from .errors import MissingExtraError

__all__ = (
    "TaskLock",
    "await_only",
    "check_greenlet",
    "greenlet_spawn",
    "in_greenlet",
    "sleep_in_greenlet",
)


def check_greenlet() -> None:
    """Check that asynchronous engines can be used at all.

    :raises MissingExtraError: when greenlet is not installed.
    """
    try:  # SQLAlchemy's own error comes late, and names its own extra
        importlib.import_module("greenlet")
    except ImportError as error:
        raise MissingExtraError(
            "sessions for event loops take greenlet, which is not installed: pip install"
            " 'sessionmgr[asyncio]', or an extra of a driver's such as sessionmgr[asyncpg]"
        ) from error


def in_greenlet() -> bool:
    """Tell whether something can be awaited here."""
    from sqlalchemy.util import concurrency  # has had it since 2.0.24, which the extra asks for

    return concurrency.in_greenlet()


def sleep_in_greenlet(seconds: float) -> None:
    """Sleep while the event loop goes on."""
    await_only(asyncio.sleep(seconds))


class TaskLock:
    """A lock between the tasks of one event loop, for ``with`` in their greenlets.

    A lock of threads lets them all in at once: they run in the same one.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    def __enter__(self) -> None:
        await_only(self._lock.acquire())

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

"""Closes the pools of a process politely when it ends, in each of the ways a process ends."""

from __future__ import annotations

import atexit
import sys
import threading

from . import forking
from .severing import open_connections

__all__ = ("close_all", "is_leaving", "register")

_registered: forking.Process | None = None
_leaving: forking.Process | None = None


def is_leaving() -> bool:
    """Tell whether this process has closed its pools because it ends."""
    return _leaving is forking.process


def register() -> None:
    """See to it that this process closes its connections when it ends normally.

    Called at each new connection, for a Process of multiprocessing or billiard forgets the
    finalizers it inherited, and only then runs user code. An interpreter's own end runs atexit,
    theirs does not. A billiard *Pool's* workers run neither: see ``sessionmgr.ext.billiard``.
    """
    global _registered
    if _registered is forking.process:
        return
    atexit.unregister(close_all)
    atexit.register(close_all)
    for name in ("multiprocessing.util", "billiard.util"):
        if name in sys.modules:
            # a priority makes it run at the end of a child as well
            sys.modules[name].Finalize(None, close_all, exitpriority=10)
    _registered = forking.process


def close_all() -> None:
    """Close the pools of every manager in this process.

    Connections that were never returned are closed too, unless other threads, which may
    be using them at this moment, are still running.
    """
    global _leaving
    _leaving = forking.process  # engines that are made from now on keep nothing
    for heir in forking.heirs():
        heir._leave()
    if threading.active_count() > 1:
        return
    for connection in open_connections.copy():
        owner = connection.owner()
        if owner is not None:
            owner.close()

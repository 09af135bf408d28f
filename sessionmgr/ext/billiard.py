"""Billiard pools: workers that keep connections, and close them when they leave.

::

    from billiard.pool import Pool
    from sessionmgr.ext.billiard import initializer, on_process_exit

    pool = Pool(8, initializer=initializer, on_process_exit=on_process_exit)

A Pool's worker ends by ``os._exit`` right after ``on_process_exit``: atexit and finalizers never
run there, and without that function servers log a broken connection for each worker.
"""

from __future__ import annotations

import signal

from sessionmgr import exits, forking

__all__ = ("initializer", "on_process_exit")


def initializer() -> None:
    """Make this process a worker for every manager it has, or will make.

    A forked worker is one already; one that was spawned may not have been recognised.
    Call it from an initializer of your own, where the pool needs another.
    """
    forking.become_worker()


def on_process_exit(pid: int, exitcode: int) -> None:
    """Close the pools of every manager in this process.

    A SIGTERM that comes meanwhile ends it at once. Billiard's handler would raise in the midst of a
    connection's goodbye, which SQLAlchemy logs as an error.

    :param pid: the worker's process id, as billiard tells it.
    :param exitcode: its exit status.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exits.close_all()

"""What Celery's workers tell the managers of their processes: keep connections, close them."""

from __future__ import annotations

from typing import Any

from celery import signals
from celery.concurrency import get_implementation
from celery.concurrency.prefork import TaskPool as PreforkPool

from sessionmgr import exits, forking

__all__ = ("listen",)


def listen() -> None:
    """Listen to the signals of workers; doing it again changes nothing."""
    signals.worker_process_shutdown.connect(_leave, weak=False)
    signals.worker_process_init.connect(_become_worker, weak=False)
    signals.worker_init.connect(_serve_in_this_process, weak=False)


def _leave(**_: Any) -> None:
    """Close the connections of a worker that leaves by ``os._exit``."""
    exits.close_all()


def _become_worker(**_: Any) -> None:
    """Have every manager of a spawned worker keep its connections; a forked one does."""
    forking.become_worker()


def _serve_in_this_process(sender: Any = None, **_: Any) -> None:
    """Have every manager keep its connections where tasks run in this very process."""
    pool = get_implementation(sender.pool_cls)
    if not (isinstance(pool, type) and issubclass(pool, PreforkPool)):
        forking.become_worker()

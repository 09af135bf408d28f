"""The Celery app of the workers that :mod:`benchmarks.end_to_end` starts."""

from __future__ import annotations

import os
import time

from celery import Celery

__all__ = ("BACKEND", "BROKER", "app")

BROKER, BACKEND = "SESSIONMGR_BENCHMARK_BROKER", "SESSIONMGR_BENCHMARK_BACKEND"
"""The environment variables with the URLs."""

app = Celery(
    "benchmark",
    broker=os.environ.get(BROKER),
    backend=os.environ.get(BACKEND),
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)


@app.task
def add(x: int, y: int) -> int:
    """Return the sum of two numbers."""
    return x + y


@app.task
def total(numbers: list[int]) -> int:
    """Return the sum of many numbers: the body of the chords."""
    return sum(numbers)


@app.task
def nap(seconds: float) -> float:
    """Sleep."""
    time.sleep(seconds)
    return seconds

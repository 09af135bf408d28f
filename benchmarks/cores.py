"""Gives the servers and what is timed cores of their own, as if they were on two machines.

Left to itself the kernel now wakes client and server on one core and now on two, which makes a
round trip three times as long or as short, for seconds on end.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("clients_core", "servers_cores")


@contextmanager
def clients_core() -> Iterator[None]:
    """Run on the last core only."""
    with _on(slice(-1, None)):
        yield


@contextmanager
def servers_cores() -> Iterator[None]:
    """Run on all cores but the last. A process started here stays on these."""
    with _on(slice(None, -1)):
        yield


@contextmanager
def _on(part: slice) -> Iterator[None]:
    """Run on a part of the cores; where there is one only, or this is not Linux, on all."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(allowed) < 2:
        yield
        return
    os.sched_setaffinity(0, sorted(allowed)[part])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)

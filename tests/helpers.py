"""Waiting for a condition: the one place where tests sleep."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from sessionmgr.greenlets import in_greenlet, sleep_in_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

POLL_INTERVAL = 0.01
"""Seconds between two looks at a condition."""


def wait_until(condition: Callable[[], T], timeout: float = 30.0, message: str = "") -> T:
    """Wait until a condition is true and return its value.

    :param condition: called again and again until it returns something true. An
        :class:`AssertionError` it raises counts as "not yet".
    :param timeout: seconds until giving up.
    :param message: what was waited for, for the error.
    :raises AssertionError: when the condition is still false after ``timeout``; the text gives its
        last value, or the last assertion is its cause.
    """
    deadline = time.monotonic() + timeout
    while True:
        failure = None
        try:
            value = condition()
        except AssertionError as error:
            failure, outcome = error, str(error)
        else:
            if value:
                return value
            outcome = f"last value {value!r}"
        if time.monotonic() >= deadline:
            raise AssertionError(
                f"{message or condition} did not come true in {timeout:g} s: {outcome}"
            ) from failure
        if in_greenlet():  # what is waited for may be the event loop's to do
            sleep_in_greenlet(POLL_INTERVAL)
        else:
            time.sleep(POLL_INTERVAL)

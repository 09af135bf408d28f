"""Operations of a backend see a restart of the database through."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from celery.backends.base import Backend
from celery.utils.time import get_exponential_backoff_interval
from sqlalchemy.exc import DBAPIError

from sessionmgr.transient import is_full, is_lost

if TYPE_CHECKING:
    from collections.abc import Callable

    from sessionmgr.results import ResultStore

__all__ = ("RestartWaiting",)

log = logging.getLogger("sessionmgr")

#: Seconds from the first lost connection in which an operation is tried again: more than most
#: databases take to restart. Redis's backend of Celery tries for 20 s.
PATIENCE = 30.0

#: Seconds, the shortest pause between two attempts, also for who has Celery's pauses at 0.
SHORTEST = 0.01


class RestartWaiting(Backend):  # type: ignore[misc]  # Celery has no type hints
    """What a backend does while its database is away, unless the user says how often to retry.

    Celery's three retries are over within 0.14 s, and what could not be stored is lost.

    :ivar store: where the results are.
    :ivar waits_for_restarts: whether the user has left that to the backend.
    """

    store: ResultStore
    waits_for_restarts: bool

    def _ensure_retryable(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function by Celery's policy; lost connections are not counted by that at first."""
        if not self.waits_for_restarts:
            return super()._ensure_retryable(func, *args, **kwargs)
        deadline: float | None = None  # of all attempts: Celery's loop may call again

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal deadline
            attempt = 0
            while True:
                try:
                    return func(*args, **kwargs)
                except DBAPIError as error:
                    if not self._is_waited_for(error):
                        raise
                    if deadline is None:
                        deadline = monotonic() + PATIENCE
                        self._tell_of_waiting(error)
                    left = deadline - monotonic()
                    if left <= 0.0:
                        raise
                    self.on_backend_retryable_error(error)
                attempt += 1
                self._sleep(min(self._pause(attempt), left))

        call.__name__ = getattr(func, "__name__", "")  # for Celery's log
        return super()._ensure_retryable(call, *args, **kwargs)

    def _is_waited_for(self, error: DBAPIError) -> bool:
        away = is_lost(error) or is_full(error)
        return bool(self.always_retry) and away and self.exception_safe_to_retry(error)

    def _pause(self, attempt: int) -> float:
        """Give the seconds until the next attempt, as Celery has them between its retries."""
        milliseconds: int = get_exponential_backoff_interval(
            self.base_sleep_between_retries_ms, attempt, self.max_sleep_between_retries_ms, True
        )
        return max(milliseconds / 1000, SHORTEST)

    def _tell_of_waiting(self, error: DBAPIError) -> None:
        log.warning(
            "database %s: a connection was lost, or none is to be had; trying again for %.0f s."
            " The error: %s",
            self.store.describe(),
            PATIENCE,
            error.orig,
        )

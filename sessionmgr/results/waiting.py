"""Waits for tasks to end: by looking again and again, less and less often, or by being told."""

from __future__ import annotations

import logging
import math
import time
from time import monotonic
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sessionmgr.errors import ResultArgumentError, ResultTimeoutError
from sessionmgr.transient import is_transient
from sessionmgr.urls import hide_secrets

from .arguments import check_ids
from .notify import listener_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from .access import ResultAccess
    from .notify import Ear, Listener
    from .records import TaskResult

__all__ = ("Pace", "Waiting")

log = logging.getLogger("sessionmgr")

#: Seconds of failures, one after the other, after which a waiter gives up: more than a database
#: takes to restart.
PATIENCE = 60.0

#: How many ids an error text names.
NAMED = 3


class Pace:
    """How long to pause between two looks at the table.

    A tenth of the time waited so far, from 5 ms on. So a task is seen late by a tenth of
    its own duration at most, or by 5 ms, and the number of looks grows with the logarithm of the
    time. A look is part of the pause after it, but the half of a pause at least is a rest.

    When results come the time begins anew, for each of many tasks is to be seen soon. But now a
    pause is at least eight times as long as the look took: tasks that end one by one for an
    hour would otherwise have thousands of ids asked for 200 times a second.

    While results are told, what is looked for are those that are told, and after each such look
    there is a rest, again of eight times what it took. The looks at all tasks are then for
    results stored by somebody who does not tell: from 50 ms on, each doubles the time waited.

    :param longest: seconds, the longest pause.
    """

    SHORTEST = 0.005
    SHORTEST_TOLD = 0.05
    SHARE = 10
    REST = 8

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._shortest = self.SHORTEST
        self._since = monotonic()

    def begin_anew(self, took: float) -> None:
        """Take note of results, which a look of so many seconds has found."""
        self._since = monotonic()
        self._shortest = max(self.SHORTEST, self.REST * took)

    def pause(self, *, told: bool) -> float:
        """Give the seconds until the next look.

        :param told: whether results are told.
        """
        waited = monotonic() - self._since
        wanted = max(self.SHORTEST_TOLD, waited) if told else waited / self.SHARE
        return min(max(self._shortest, wanted), self._longest)


class Waiting:
    """One wait for tasks of a store.

    :param access: the store's.
    :param task_ids: the tasks.
    :param timeout: seconds until giving up; ``None`` for never.
    :param max_interval: seconds, the longest pause between two looks at the table.
    :param on_interval: called after each look that found nothing.
    :raises ResultArgumentError: when an argument cannot be.
    """

    def __init__(
        self,
        access: ResultAccess,
        task_ids: Iterable[str],
        timeout: float | None,
        max_interval: float,
        on_interval: Callable[[], object] | None,
    ) -> None:
        ids = check_ids(task_ids)
        if timeout is not None:
            _check_seconds("timeout", timeout)
        _check_seconds("max_interval", max_interval, above=0.0)
        self._access = access
        self._open = dict.fromkeys(ids)  # a set that keeps the order, for error texts
        self._count = len(self._open)
        self._start = monotonic()
        self._deadline = math.inf if timeout is None else self._start + timeout
        self._on_interval = on_interval
        self._pace = Pace(max_interval)
        self._next = self._start  # look at all tasks
        self._earliest = self._start  # of the next look at those told
        self._listener: Listener | None = None
        self._ear: Ear | None = None
        self._failure: DBAPIError | PoolTimeoutError | None = None
        self._failing_since = 0.0

    def results(self) -> Iterator[TaskResult]:
        """Yield the results as they come.

        :raises ResultTimeoutError: when time is over.
        """
        ids: Collection[str] = self._open
        try:
            while self._open:
                # The last look is one at all tasks that begins when time is over.
                last = ids is self._open and monotonic() >= self._deadline
                found = self._look(ids)
                yield from found
                last = last or self._has_waited_for_the_pool()
                if last and self._open:
                    raise self._timeout_error() from self._failure
                if not found and self._on_interval is not None:
                    self._on_interval()
                if self._open:
                    ids = self._rest()
        finally:
            self._leave()

    def _look(self, ids: Collection[str]) -> list[TaskResult]:
        """Look which tasks have ended, in one statement."""
        start = monotonic()
        try:
            found = self._access.select(list(ids), lambda statements: statements.get_ready)
        except (DBAPIError, PoolTimeoutError) as error:
            if not (isinstance(error, PoolTimeoutError) or is_transient(error)):
                raise
            self._bear(error, start)
            found = {}
        else:
            self._failure = None
        took = monotonic() - start
        told = self._listener is not None and self._listener.listens
        # MySQL finds ids and states that differ in case.
        results = [each for each in found.values() if each.task_id in self._open and each.ready]
        for result in results:
            del self._open[result.task_id]
        if results and told:
            self._earliest = monotonic() + Pace.REST * took
        elif results:
            self._pace.begin_anew(took)
        if ids is self._open or self._failure is not None:
            pause = self._pace.pause(told=told)
            self._next = monotonic() + max(pause - took, pause / 2)
        return sorted(results, key=_end)

    def _has_waited_for_the_pool(self) -> bool:
        """Tell whether time is over, and was spent on a pool that had no connection free.

        A last look would wait for one again, for ``pool_timeout``.
        """
        return isinstance(self._failure, PoolTimeoutError) and monotonic() >= self._deadline

    def _bear(self, error: DBAPIError | PoolTimeoutError, start: float) -> None:
        """Go on after a failed look, for a while.

        The store has tried several times within a fraction of a second. A waiter has time, and
        sees a restart of the database through, and threads that keep all connections.
        """
        if self._failure is None:
            self._failing_since = start
            log.warning(
                "database %s: cannot look for the results of %d tasks; going on for %.0f s. The"
                " error: %s",
                self._access.describe(),
                len(self._open),
                PATIENCE,
                getattr(error, "orig", error),
            )
        self._failure = error
        # a full pool is the caller's own, and so is the timeout, if there is one
        bears = isinstance(error, PoolTimeoutError) and self._deadline < math.inf
        if monotonic() - self._failing_since >= PATIENCE and not bears:
            raise error

    def _rest(self) -> Collection[str]:
        """Sleep until the next look, holding no connection; give the ids to look for."""
        while True:
            end = min(self._next, self._deadline)
            ear = self._listen()
            time.sleep(max(0.0, (end if ear is None else min(self._earliest, end)) - monotonic()))
            if self._listener is None or ear is None:
                return self._open
            told, everything = self._listener.wait(ear, max(0.0, end - monotonic()))
            if everything or monotonic() >= end:
                return self._open
            ended = [task_id for task_id in told if task_id in self._open]
            if ended:
                return ended

    def _listen(self) -> Ear | None:
        """Join those who are told; in a forked child, those there."""
        listener = listener_of(self._access)
        if listener is not self._listener:
            self._leave()
            if listener is not None:
                self._listener, self._ear = listener, listener.join(self._open)
        return self._ear

    def _leave(self) -> None:
        listener, ear = self._listener, self._ear
        self._listener = self._ear = None
        if listener is not None and ear is not None:
            listener.leave(ear)

    def _timeout_error(self) -> ResultTimeoutError:
        names = ", ".join(repr(task_id) for task_id in list(self._open)[:NAMED])
        more = ", ..." if len(self._open) > NAMED else ""
        return ResultTimeoutError(
            f"database {self._access.describe()}: {len(self._open):,} of {self._count:,} tasks have"
            f" not ended after {monotonic() - self._start:.3g} s: {names}{more}"
        )


def _end(result: TaskResult) -> str:
    """Give what sorts results in order of completion."""
    return "" if result.date_done is None else result.date_done.isoformat()


def _check_seconds(name: str, value: object, above: float | None = None) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or math.isnan(value) or (above is not None and value <= above):  # type: ignore[arg-type, operator]  # a number
        kind = "a number of seconds" + ("" if above is None else f" above {above:g}")
        raise ResultArgumentError(f"{name} is {kind}, not {hide_secrets(value)}")

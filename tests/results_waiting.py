"""Threads that wait for results, and stores whose results are told."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sessionmgr import ResultStore
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.servers import Database


WHEN = datetime(2024, 2, 29, 12, 30, 15)  # noqa: DTZ001 - as the table has it

TIMEOUT = 30.0
"""Seconds for results that are bound to come."""

NEVER = 1000.0
"""Seconds that no test takes."""

TELLING = ("psycopg", "psycopg2")
"""Drivers by which results are told."""


class Waiter:
    """A thread that waits for results.

    :param ids: the tasks.
    :param options: of :meth:`ResultStore.wait`.
    """

    def __init__(self, store: ResultStore, ids: Iterable[str], **options: Any) -> None:
        self.got: list[str] = []
        self.error: BaseException | None = None
        self.looks = 0
        results = store.wait(ids, NEVER, on_interval=self._count, **options)
        self.thread = threading.Thread(target=self._run, args=(results,), daemon=True)
        self.thread.start()

    def _run(self, results: Iterator[Any]) -> None:
        try:
            self.got.extend(result.task_id for result in results)
        except BaseException as error:  # noqa: BLE001 - told to the test
            self.error = error

    def _count(self) -> None:
        self.looks += 1

    def has_looked(self, times: int = 1) -> None:
        """Wait until it has looked in vain."""
        goal = self.looks + times
        wait_until(lambda: self.looks >= goal or self.error, TIMEOUT)
        if self.error is not None:
            raise self.error

    def end(self) -> list[str]:
        """Wait until it ends, and return the ids of the results."""
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive(), f"still waiting; got {self.got}"
        if self.error is not None:
            raise self.error
        return self.got


@contextmanager
def told_store(database: Database, **options: Any) -> Iterator[ResultStore]:
    """Open a prepared store that tells results and is told."""
    with ResultStore(database.url, notify=True, **options) as store:
        store.prepare()
        yield store


def listeners(database: Database) -> set[int]:
    """Return the server's ids of the connections that listen."""
    rows = database.server.query(
        "SELECT pid FROM pg_stat_activity WHERE datname = %s AND query LIKE %s",
        database.name,
        "LISTEN %",
    )
    return {pid for (pid,) in rows}


def get(store: ResultStore, *ids: str) -> list[str]:
    """Wait for tasks, and return their ids in the order of their results."""
    return [result.task_id for result in store.wait(ids, TIMEOUT, max_interval=NEVER)]


def one_by_one(store: ResultStore, ids: Iterable[str]) -> Callable[[], None]:
    """Return a function that stores one of the results at each call, if one is left."""
    left = list(ids)

    def store_next() -> None:
        if left:
            store.store(left.pop(0), "FAILURE")

    return store_next

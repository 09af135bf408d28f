"""Sends tasks to the worker, waits for their results, and reads them back."""

from __future__ import annotations

from celery import chord
from tasks import add, app, divide, square, total, worker_stats

TIMEOUT = 60.0
"""Seconds to wait for the worker."""


def main() -> None:
    """Show a task, a chord, a failing task, results read back, and what it took."""
    added = add.delay(2, 3)
    print("a task: 2 + 3 =", added.get(TIMEOUT))

    # The callback is sent by whoever finishes the last part: nothing polls.
    summed = chord(square.s(number) for number in range(20))(total.s())
    print("a chord: the squares of 0 to 19 add up to", summed.get(TIMEOUT))

    failed = divide.delay(1, 0)
    try:
        failed.get(TIMEOUT)
    except ZeroDivisionError as error:
        print("a failing task:", repr(error))

    # Later, or in another program, the ids are enough: here in one query for all three.
    ids = [added.id, summed.id, failed.id]
    found = app.backend.store.get_many(ids)
    print("read back:")
    for result in map(found.__getitem__, ids):
        print(f"  {result.name}: {result.status}, {result.result!r:.60}")

    print("connections of a worker's process:")
    print(worker_stats.delay().get(TIMEOUT))
    print("connections of this process:")
    print(app.backend.session_manager.stats())


if __name__ == "__main__":
    main()

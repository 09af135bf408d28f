"""TaskResult: what is known of one task, as it stands in the table."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = (
    "EXTENDED",
    "FIELDS",
    "READY_STATES",
    "SUCCESS",
    "TaskResult",
    "in_order",
    "utc_now",
)

SUCCESS = "SUCCESS"
"""The state that no later write replaces."""

READY_STATES = frozenset((SUCCESS, "FAILURE", "REVOKED"))
"""The states in which a task has ended: those of ``celery.states.READY_STATES``."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task's state and result: a row of ``celery_taskmeta``.

    The bytes are the caller's own: the store neither reads nor changes them. From ``name`` on,
    the fields are kept by a store with ``extended=True`` alone.

    :param task_id: the task's id, at most 155 characters.
    :param status: its state: ``"SUCCESS"``, ``"FAILURE"``, ``"STARTED"``, or a name of yours, at
        most 50 characters.
    :param result: its result or exception, encoded.
    :param traceback: the traceback of its exception.
    :param date_done: when it ended, in UTC and without a time zone; ``None`` before that.
    :param children: the tasks that it started, encoded.
    :param name: the name of the task.
    :param args: its positional arguments, encoded.
    :param kwargs: its keyword arguments, encoded.
    :param worker: the name of the worker that ran it.
    :param retries: how often it was retried.
    :param queue: the queue it came from.
    :param stamps: its stamped headers, encoded.
    """

    task_id: str
    status: str
    result: bytes | None = field(default=None, repr=False)
    traceback: str | None = field(default=None, repr=False)
    date_done: datetime | None = None
    children: bytes | None = field(default=None, repr=False)
    name: str | None = None
    args: bytes | None = field(default=None, repr=False)
    kwargs: bytes | None = field(default=None, repr=False)
    worker: str | None = None
    retries: int | None = None
    queue: str | None = None
    stamps: bytes | None = field(default=None, repr=False)

    @property
    def ready(self) -> bool:
        """Whether the task has ended."""
        return self.status in READY_STATES


FIELDS = tuple(field.name for field in fields(TaskResult))
EXTENDED = frozenset(FIELDS[FIELDS.index("name") :])


def utc_now() -> datetime:
    """Give the time as the tables have it: in UTC, without a time zone."""
    return datetime.now(timezone.utc).replace(tzinfo=None)


def in_order(names: tuple[str, ...], row: Iterable[Any]) -> Iterator[Any]:
    """Give the values of a row in the order of TaskResult's fields.

    :param names: the fields that the row has.
    """
    if names == FIELDS:
        return iter(row)
    found = dict(zip(names, row, strict=True))
    return (found.get(name) for name in FIELDS)

"""What a manager's pools have done in this process, as values that print and turn into JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ("DatabaseStats", "ManagerStats", "PoolCounts")


@dataclass(slots=True)
class PoolCounts:
    """Counts of one pool in one process.

    :param connects: connections made.
    :param checkouts: times a connection was handed out.
    :param tests: liveness tests sent.
    :param replaced: connections found dead by a test, and replaced.
    :param invalidated: connections given up, for whatever reason.
    :param checked_out: connections in use now.
    :param idle: connections in the pool now.
    """

    connects: int = 0
    checkouts: int = 0
    tests: int = 0
    replaced: int = 0
    invalidated: int = 0
    checked_out: int = 0
    idle: int = 0


@dataclass(frozen=True)
class DatabaseStats:
    """One database of a manager in this process.

    :param database: bind key, or URL without secrets.
    :param pool_class: name of the pool's class.
    :param size: connections the pool keeps; ``None`` where the class has no size.
    :param connects: connections made.
    :param checkouts: times a connection was handed out.
    :param tests: liveness tests sent.
    :param replaced: connections found dead by a test, and replaced.
    :param invalidated: connections given up, for whatever reason.
    :param checked_out: connections in use now.
    :param idle: connections in the pool now.
    """

    database: str
    pool_class: str
    size: int | None
    connects: int
    checkouts: int
    tests: int
    replaced: int
    invalidated: int
    checked_out: int
    idle: int

    def __str__(self) -> str:
        pool = self.pool_class if self.size is None else f"{self.pool_class} of {self.size}"
        return (
            f"{self.database}: {pool}, {self.checked_out} in use, {self.idle} idle;"
            f" {self.connects} connects, {self.checkouts} checkouts, {self.tests} tests,"
            f" {self.replaced} replaced, {self.invalidated} invalidated"
        )


@dataclass(frozen=True)
class ManagerStats:
    """The pools of one manager in one process.

    :param pid: the process.
    :param forked: whether the manager keeps connections because this is a worker.
    :param databases: its databases, in the order in which their engines were made.
    """

    pid: int
    forked: bool
    databases: tuple[DatabaseStats, ...]

    def as_dict(self) -> dict[str, Any]:
        """Give the same as nested dictionaries and lists."""
        return asdict(self)

    def to_json(self) -> str:
        """Give the same as a JSON object."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        kind = "a worker" if self.forked else "not forked"
        lines = [f"process {self.pid} ({kind}), databases: {len(self.databases)}"]
        return "\n  ".join([*lines, *map(str, self.databases)])

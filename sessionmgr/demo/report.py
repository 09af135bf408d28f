"""The demo's numbers: as workers told them, and as the databases hold them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from .work import Answer

if TYPE_CHECKING:
    from .pool import Failure

__all__ = ("DatabaseReport", "DemoReport", "ProcessReport", "Tally")


@dataclass(frozen=True)
class ProcessReport:
    """What one worker did on one database.

    :param pid: the worker.
    :param rows_written: its rows that are in the database.
    :param rows_expected: the tasks that it reported done.
    :param results_stored: its tasks' results that were read back.
    :param sessions_per_second: sessions it opened, by the seconds from the first task's begin to
        the last one's end, of all workers.
    :param engines_made: engines it made.
    :param connections_opened: connections it opened.
    """

    pid: int
    rows_written: int
    rows_expected: int
    results_stored: int
    sessions_per_second: float
    engines_made: int
    connections_opened: int


@dataclass(frozen=True)
class DatabaseReport:
    """One database: the sums of its processes, but for the rows.

    :param database: URL without secrets.
    :param rows_written: the run's rows in the database; 0 when they could not be counted.
    :param rows_expected: the tasks given out for it. Each writes a row and stores a result.
    :param results_stored: the results that were read back; 0 when they could not be.
    :param problems: what went wrong -> how often.
    :param cleaned_up: what became of rows, results and tables; empty for the demo's own files.
    """

    database: str
    rows_written: int
    rows_expected: int
    results_stored: int
    sessions_per_second: float
    engines_made: int
    connections_opened: int
    processes: tuple[ProcessReport, ...]
    problems: dict[str, int]
    cleaned_up: str


@dataclass(frozen=True)
class DemoReport:
    """A run of the demo."""

    start_method: str
    processes: int
    tasks: int
    seconds: float
    databases: tuple[DatabaseReport, ...]

    @property
    def written(self) -> int:
        """The rows that are there."""
        return sum(database.rows_written for database in self.databases)

    @property
    def expected(self) -> int:
        """The rows that should be."""
        return sum(database.rows_expected for database in self.databases)

    @property
    def stored(self) -> int:
        """The results that are there. As many should be as rows."""
        return sum(database.results_stored for database in self.databases)

    @property
    def lost(self) -> int:
        """The rows and the results that are not there."""
        return 2 * self.expected - self.written - self.stored

    def to_json(self) -> str:
        """Give everything as a JSON object."""
        totals = {
            "rows_written": self.written,
            "rows_expected": self.expected,
            "results_stored": self.stored,
            "lost": self.lost,
        }
        return json.dumps({**totals, **asdict(self)}, indent=2)


@dataclass
class Tally:
    """What is heard from the workers while the demo runs."""

    answers: dict[tuple[str, int], Answer] = field(default_factory=dict)
    done: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: Counter[Failure] = field(default_factory=Counter)
    began: float = float("inf")
    ended: float = 0.0

    def add(self, answer: Answer | Failure) -> None:
        """Take an answer in. A worker's latest one holds its numbers."""
        if not isinstance(answer, Answer):
            self.failures[answer] += 1
            return
        process = (answer.database, answer.pid)
        self.answers[process] = answer
        self.done[process] += 1
        self.began = min(self.began, answer.began)
        self.ended = max(self.ended, answer.ended)

    @property
    def seconds(self) -> float:
        """From the first task's begin to the last one's end; never 0, for it divides."""
        return max(1e-6, self.ended - self.began)

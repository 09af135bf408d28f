"""The statements of a request, for finding out which are slow or too many."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from flask import current_app, g, has_app_context
from sqlalchemy import event

if TYPE_CHECKING:
    from types import FrameType

    from sqlalchemy import Engine

__all__ = ("RecordedQuery", "get_recorded_queries", "record")

_NAME = "_sessionmgr_queries"


@dataclass(frozen=True)
class RecordedQuery:
    """A statement that was executed.

    :param statement: its SQL, with placeholders.
    :param parameters: what was sent with it: one collection for each set.
    :param start_time: when it began, in seconds of :func:`time.perf_counter`.
    :param end_time: when the database had answered.
    :param location: the line of the application that it comes from, as far as it is known.
    """

    statement: str | None
    parameters: Any
    start_time: float
    end_time: float
    location: str

    @property
    def duration(self) -> float:
        """How long it took, in seconds."""
        return self.end_time - self.start_time


def get_recorded_queries() -> list[RecordedQuery]:
    """List the statements of the current application context, the oldest first.

    They are recorded where ``SQLALCHEMY_RECORD_QUERIES`` is true.

    :raises RuntimeError: when there is no application context.
    """
    queries: list[RecordedQuery] = g.get(_NAME, [])
    return queries


def record(engine: Engine) -> None:
    """Record the statements of an engine; an ``engine_callback`` of the manager."""
    event.listen(engine, "before_cursor_execute", _begin)
    event.listen(engine, "after_cursor_execute", _end)


def _begin(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, *_: Any
) -> None:
    context.sessionmgr_begun = perf_counter()


def _end(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
) -> None:
    end = perf_counter()
    if has_app_context():
        sets = parameters if many else [parameters]
        query = RecordedQuery(statement, sets, context.sessionmgr_begun, end, _location())
        g.setdefault(_NAME, []).append(query)


def _location() -> str:
    """Find the innermost line of the application's package, or module, that is being executed."""
    name = current_app.import_name
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == name or module.startswith(f"{name}."):
            code = frame.f_code
            return f"{code.co_filename}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return "<unknown>"

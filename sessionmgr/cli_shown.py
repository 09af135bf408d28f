"""How the commands for results show what is in the rows: to a person, and as JSON."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from .results.records import FIELDS, SUCCESS
from .results.report import utc_text

if TYPE_CHECKING:
    from rich.console import Console

    from .results import TaskResult
    from .results.report import Counts

__all__ = ("as_json", "show_counts", "show_task", "time_text")

#: Characters of a value that a person is shown.
_LONGEST = 2000

#: Bytes shown of a value that is no text, or a very long one.
_PREFIX = 48


def show_task(console: Console, task: TaskResult) -> None:
    """Print the fields of a task that have a value, a line or more for each."""
    console.print(Text(_visible(task.task_id), "bold"), soft_wrap=True)
    width = max(map(len, FIELDS))
    for name in FIELDS[1:]:
        value = getattr(task, name)
        if value is not None:
            lines = f"\n{'':{width + 4}}".join(_shown(value).splitlines() or [""])
            style = _colour(task.status) if name == "status" else ""
            line = Text.assemble((f"  {name:{width}}  ", "dim"), (lines, style))
            console.print(line, soft_wrap=True)


def show_counts(console: Console, counts: Counts) -> None:
    """Print a table of the tasks in each state, and what else was counted."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False)
    table.add_column("status", footer="together")
    table.add_column("tasks", footer=f"{counts.tasks:,}", justify="right")
    for status, number in counts.statuses.items():
        table.add_row(Text(_visible(status), _colour(status)), f"{number:,}")
    console.print(table)
    console.print(f"groups  {counts.groups:,}")
    if counts.oldest is not None and counts.newest is not None:
        console.print(f"oldest  {time_text(counts.oldest)}")
        console.print(f"newest  {time_text(counts.newest)}")


def as_json(task: TaskResult) -> dict[str, Any]:
    """Give a task as what turns into JSON.

    :return: field -> value. Bytes are text where they are UTF-8, and else ``null``, with
        ``<field>_base64`` beside it.
    """
    shown: dict[str, Any] = {}
    for name in FIELDS:
        value = getattr(task, name)
        shown[name] = utc_text(value) if isinstance(value, datetime) else value
        if isinstance(value, bytes):
            shown[name] = _decoded(value)
            if shown[name] is None:
                shown[f"{name}_base64"] = base64.b64encode(value).decode()
    return shown


def time_text(when: datetime) -> str:
    """Write a time of a row for a person, to the second."""
    return f"{when:%Y-%m-%d %H:%M:%S} UTC"


def _shown(value: object) -> str:
    if isinstance(value, datetime):
        return time_text(value)
    if not isinstance(value, bytes):
        return _visible(str(value))
    text = _decoded(value)
    if text is not None and len(text) <= _LONGEST:
        return _visible(text)
    prefix = base64.b64encode(value[:_PREFIX]).decode()
    begin = "begins with" if len(value) > _PREFIX else "that is"
    return f"{len(value):,} bytes; in base64 {begin} {prefix}"


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _visible(text: str) -> str:
    """Escape what would steer a terminal: a row may hold anything."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode()
        for each in text
    )


def _colour(status: str) -> str:
    return {SUCCESS: "green", "FAILURE": "red", "REVOKED": "yellow"}.get(status, "")

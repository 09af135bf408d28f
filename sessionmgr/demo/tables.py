"""Shows the demo's report as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from .report import DatabaseReport, DemoReport, ProcessReport

__all__ = ("show",)

_NUMBERS = (
    "rows\nwritten",
    "rows\nexpected",
    "results\nstored",
    "\nsessions/s",
    "engines\nmade",
    "connections\nopened",
)


def show(report: DemoReport, console: Console) -> None:
    """Print a table for each database, and whether anything was lost."""
    for database in report.databases:
        _say(console, database.database, "bold")
        console.print(_table(database))
        for problem, times in database.problems.items():
            _say(console, f"  {times} x {problem}", "yellow")
        if database.cleaned_up:
            _say(console, f"  {database.cleaned_up}", "dim")
        console.print()
    _say(console, _summary(report))
    _say(console, *_verdict(report))


def _say(console: Console, text: str, style: str = "") -> None:
    """Print one line as it is: a URL is neither markup nor to be wrapped."""
    console.print(Text(text, style), soft_wrap=True)


def _table(database: DatabaseReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False)
    table.add_column("\nprocess", footer="together")
    for name, total in zip(_NUMBERS, _numbers(database), strict=True):
        table.add_column(name, footer=total, justify="right")
    for process in database.processes:
        table.add_row(str(process.pid), *_numbers(process))
    return table


def _numbers(line: DatabaseReport | ProcessReport) -> tuple[str, ...]:
    return (
        f"{line.rows_written:,}",
        f"{line.rows_expected:,}",
        f"{line.results_stored:,}",
        f"{line.sessions_per_second:,.0f}",
        f"{line.engines_made:,}",
        f"{line.connections_opened:,}",
    )


def _summary(report: DemoReport) -> str:
    return (
        f"{report.tasks:,} tasks, {report.processes} workers started by {report.start_method},"
        f" {report.seconds:.1f} s."
    )


def _verdict(report: DemoReport) -> tuple[str, str]:
    expected = report.expected
    if not report.lost:
        text = f"Nothing was lost: all {expected:,} rows and {expected:,} results are there."
        return text, "bold green"
    counts = {"rows": report.written, "results": report.stored}
    lost = (
        f"{expected - n:,} of {expected:,} {what}" for what, n in counts.items() if n < expected
    )
    return f"LOST: {' and '.join(lost)} are not there.", "bold red"

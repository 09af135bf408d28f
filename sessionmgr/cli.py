"""The command line: each command reads its options, runs its job and shows the outcome."""

from __future__ import annotations

import platform
import signal
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING

import click
import sqlalchemy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .cli_errors import StoppedError, UnusableError
from .cli_results import results
from .demo import tables
from .demo.pool import INTERRUPTS, START_METHODS, UnusablePoolError
from .demo.run import DemoOptions, run_demo
from .explain import UnusableDatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .demo.pool import Failure
    from .demo.run import Track
    from .demo.work import Answer

__all__ = ("cli",)

LOST = 1


def _versions() -> str:
    try:
        own = metadata.version("sessionmgr")
    except metadata.PackageNotFoundError:
        own = "(not installed)"
    return f"{own}, SQLAlchemy {sqlalchemy.__version__}, Python {platform.python_version()}"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_versions(), message="%(prog)s %(version)s")
def cli() -> None:
    """SQLAlchemy sessions for worker processes: many databases, safe across fork."""


cli.add_command(results)


@cli.command()
@click.option(
    "--url",
    "urls",
    multiple=True,
    metavar="URL",
    help="A database, as SQLAlchemy names it; repeat this for more."
    "  [default: three SQLite files in a temporary folder]",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    default=4,
    show_default=True,
    help="How many workers the pool has.",
)
@click.option(
    "--tasks",
    type=click.IntRange(min=1),
    metavar="N",
    default=2000,
    show_default=True,
    help="How many tasks they get. The databases take turns.",
)
@click.option(
    "--start-method",
    type=click.Choice(START_METHODS),
    metavar="METHOD",
    default="fork",
    show_default=True,
    help=f"How the workers are started: {', '.join(START_METHODS)}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON, and only those.")
@click.pass_context
def demo(
    context: click.Context,
    /,
    urls: tuple[str, ...],
    processes: int,
    tasks: int,
    start_method: str,
    as_json: bool,
) -> None:
    """Have a pool of workers write to several databases, and see that nothing is lost.

    Each task writes one row, reads it back and stores a result in a ResultStore, through one
    SessionManager made before the workers were started. At the end rows and results are counted
    in the databases.

    Databases given by --url get a table sessionmgr_demo, and tables sessionmgr_demo_* for the
    results. What the run wrote is removed at the end, and so are tables that were not there
    before, unless another run uses them. Nothing else is touched.

    Exit status: 0 if every row and every result is there, 1 if something was lost, 2 if the usage
    is wrong or a database cannot be used.
    """
    options = DemoOptions(urls, processes, tasks, start_method)
    _take_interrupts()
    try:
        with _progress(tasks, as_json=as_json) as track:
            report = run_demo(options, track)
    except (UnusableDatabaseError, UnusablePoolError) as error:
        raise UnusableError(str(error)) from None
    except KeyboardInterrupt as interrupt:
        lines = ("interrupted; the workers have ended", *interrupt.args)
        raise StoppedError("\n".join(lines)) from None
    if as_json:
        click.echo(report.to_json())
    else:
        tables.show(report, Console(highlight=False))
    context.exit(LOST if report.lost else 0)


def _take_interrupts() -> None:
    """Have other signals interrupt as Ctrl-C does, but for those ignored, as nohup does."""
    for number in INTERRUPTS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


@contextmanager
def _progress(total: int, *, as_json: bool) -> Iterator[Track]:
    """Give what shows a progress bar, where somebody watches; JSON is left alone."""
    consoles = [Console(stderr=True), *([] if as_json else [Console()])]
    console = next((console for console in consoles if console.is_interactive), None)
    if console is None:
        yield iter
        return
    columns = (TextColumn("tasks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)

    def track(answers: Iterable[Answer | Failure]) -> Iterable[Answer | Failure]:
        progress.start()  # it starts a thread: not before the workers are forked
        return progress.track(answers, total=total)

    try:
        yield track
    finally:
        progress.stop()

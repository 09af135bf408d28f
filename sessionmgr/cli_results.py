"""The commands for task results: look at them, and look after the tables they are in."""

from __future__ import annotations

import functools
import io
import json
import re
import sys
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy.exc import SQLAlchemyError

from .cli_errors import StoppedError, UnusableError
from .cli_shown import as_json as task_as_json
from .cli_shown import show_counts, show_task, time_text
from .demo.databases import connect_options
from .errors import SessionManagerError
from .explain import explain
from .results import ResultStore
from .results.cleanup import delete_expired
from .results.report import count_expired, count_results, has_tasks, missing_ddl
from .results.tables import NAMES, OTHER_NAMES
from .schema import upgrade_tables
from .sqlite import is_missing_file
from .urls import masked, parse_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import URL

__all__ = ("results",)

UNKNOWN = 1

#: What --table may name.
_KINDS = ", ".join((*NAMES, *OTHER_NAMES))

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _read_names(*known: str) -> Callable[..., dict[str, str]]:
    """Make what reads ``task=NAME`` and the like.

    :param known: what may be named.
    """

    def read(_: click.Context, __: click.Parameter, given: Sequence[str]) -> dict[str, str]:
        names = {}
        for each in given:
            kind, _equals, name = each.partition("=")
            if kind not in known or not name:
                options = ", ".join(f"{one}=NAME" for one in known)
                raise click.BadParameter(f"{each!r} is none of {options}")
            names[kind] = name
        return names

    return read


def _read_age(_: click.Context, __: click.Parameter, given: str) -> datetime:
    """Read a number and a unit, and give the time that lies so far back."""
    match = re.fullmatch(r"([0-9]{1,12})([smhdw])", given.strip())
    if match is None:
        raise click.BadParameter(
            f"{given!r} is no age: write a number and s, m, h, d or w, as in 36h"
        )
    try:
        return datetime.now(timezone.utc) - timedelta(**{_UNITS[match[2]]: int(match[1])})
    except OverflowError:
        raise click.BadParameter(f"{given!r} lies before all time") from None


@click.group()
def results() -> None:
    """Look at task results in a database, and look after its tables.

    Name the database by --url, or by the environment variable SESSIONMGR_RESULTS_URL, for others
    may see a command's arguments, and with them the password.

    Exit status: 0 if all went well, 1 if a task is unknown, 2 if the usage is wrong or the
    database cannot be used.
    """
    for stream in (sys.stdout, sys.stderr):  # a row may hold what a terminal has no character for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _on_store(*, needs_tasks: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that name a store, and the store in their place.

    :param needs_tasks: whether the table of the tasks must be there.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @click.option(
            "--url",
            required=True,
            metavar="URL",
            envvar="SESSIONMGR_RESULTS_URL",
            show_envvar=True,
            help="The database, as SQLAlchemy names it, or as Celery's result_backend does.",
        )
        @click.option(
            "--table",
            "tables",
            multiple=True,
            callback=_read_names(*NAMES, *OTHER_NAMES),
            metavar="KIND=NAME",
            help=f"Another name of a table, or of a sequence of ids: {_KINDS}.",
        )
        @click.option(
            "--schema",
            "schemas",
            multiple=True,
            callback=_read_names(*NAMES),
            metavar="KIND=NAME",
            help="The schema that a table is in: of the tasks' (task), of all others (group).",
        )
        @functools.wraps(command)
        def run(url: str, tables: dict[str, str], schemas: dict[str, str], **options: Any) -> None:
            names = {"table_names": tables, "table_schemas": schemas}
            with _opened(url, names, needs_tasks=needs_tasks) as store:
                command(store, **options)

        return run

    return decorate


def _json_option(command: Callable[..., None]) -> Callable[..., None]:
    option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and only that.")
    return option(command)


@results.command()
@_on_store()
@click.argument("task_ids", nargs=-1, required=True, metavar="TASK_ID...")
@_json_option
@click.option("--raw", is_flag=True, help="Print the bytes of one task's result, and only those.")
def show(store: ResultStore, task_ids: tuple[str, ...], *, as_json: bool, raw: bool) -> None:
    """Show the state and the fields of tasks.

    A result that is text is shown as such, of others the size and the beginning. Nothing is
    decoded: a result may be a pickle, which can do anything.
    """
    if raw and (len(task_ids) > 1 or as_json):
        raise click.UsageError("--raw prints the result of one TASK_ID, without --json.")
    found = store.get_many(dict.fromkeys(task_ids))
    known = [found[task_id] for task_id in dict.fromkeys(task_ids) if task_id in found]
    if raw:
        click.echo(b"".join(task.result or b"" for task in known), nl=False)
    elif as_json:
        click.echo(json.dumps([task_as_json(task) for task in known], indent=2))
    else:
        for task in known:
            show_task(Console(highlight=False), task)
    unknown = [task_id for task_id in dict.fromkeys(task_ids) if task_id not in found]
    for task_id in unknown:
        click.echo(f"Nothing is known of task {task_id!r} in {store.describe()}.", err=True)
    if unknown:
        click.get_current_context().exit(UNKNOWN)


@results.command()
@_on_store()
@_json_option
def count(store: ResultStore, *, as_json: bool) -> None:
    """Count the tasks in each state, and the groups; reads the whole table."""
    counts = count_results(store)
    if as_json:
        click.echo(json.dumps(counts.as_dict(), indent=2))
    else:
        show_counts(Console(highlight=False), counts)


@results.command()
@_on_store()
@click.option(
    "--older-than",
    "before",
    callback=_read_age,
    default="1d",
    show_default=True,
    metavar="AGE",
    help="What ended longer ago goes: a number and s, m, h, d or w.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1, max=1_000_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="Rows that go in one transaction.",
)
@click.option("--dry-run", is_flag=True, help="Count what would go, and delete nothing.")
@_json_option
def cleanup(
    store: ResultStore, *, before: datetime, batch_size: int, dry_run: bool, as_json: bool
) -> None:
    """Delete the results of tasks, groups and chords that ended long ago.

    It goes in batches with a commit each, so that nobody who stores has to wait for it, and
    may be interrupted and run again at any time. One cleanup of a table runs at a time: a second
    one says so, and ends with status 0. On SQLite they take turns.
    """
    if dry_run:
        _show_expired(count_expired(store, before), before, as_json=as_json)
        return
    gone = 0

    def remember(number: int) -> None:
        nonlocal gone
        gone = number
        track(number)

    try:
        with _progress(store, before, as_json=as_json) as track:
            deleted = delete_expired(store.access, before, batch_size, remember)
    except KeyboardInterrupt:
        raise StoppedError(f"interrupted; {_rows(gone)} deleted, the rest is there") from None
    if as_json:
        click.echo(json.dumps({"deleted": deleted or 0, "another_is_running": deleted is None}))
    elif deleted is None:
        click.echo(f"Another cleanup is running in {store.describe()}; nothing was deleted here.")
    else:
        click.echo(f"{_rows(deleted)} deleted: what ended before {time_text(before)}.")


@results.command()
@_on_store(needs_tasks=False)
@click.option("--dry-run", is_flag=True, help="Print the statements, and change nothing.")
def upgrade(store: ResultStore, *, dry_run: bool) -> None:
    """Create missing tables, and add missing columns and indexes to those of older versions.

    On MySQL and MariaDB columns for bytes and text are widened as well, and times get fractions
    of seconds. Nothing is removed. It runs under the database's lock, and prints the statements
    that it ran.
    """
    if dry_run:
        statements = missing_ddl(store)
    else:
        engine = store.manager.get_engine(store.dburi)
        name = store.describe()
        statements = upgrade_tables(engine, store.tables.metadata, name, whole=True)
    _print_ddl(statements)
    if not statements:
        click.echo("Nothing to do: the tables have all that they need.")


@results.command()
@_on_store(needs_tasks=False)
def ddl(store: ResultStore) -> None:
    """Print the statements that upgrade would run, for the database's own client to run.

    On an empty database they create everything. Nothing is changed.
    """
    statements = missing_ddl(store)
    _print_ddl(statements)
    if not statements:
        click.echo("Nothing to do: the tables have all that they need.", err=True)


@contextmanager
def _opened(given: str, names: dict[str, Any], *, needs_tasks: bool) -> Iterator[ResultStore]:
    """Give a store, and end the command with one line where it cannot be used.

    :param given: the URL.
    :param names: the store's options that name tables and schemas.
    :param needs_tasks: whether the table of the tasks must be there.
    """
    url: URL | None = None
    try:
        url = parse_url(given.strip().removeprefix("sessionmgr+"))
        options = {"engine_options": connect_options(url), "create_tables": False, **names}
        with ResultStore(url, extended=True, **options) as store:
            _check(store, url, needs_tasks=needs_tasks)
            yield store
    except SessionManagerError as error:
        raise UnusableError(str(error)) from None
    except (SQLAlchemyError, ImportError) as error:
        assert url is not None
        raise UnusableError(
            f"database {masked(url)} cannot be used: {explain(error, url)}"
        ) from None


def _check(store: ResultStore, url: URL, *, needs_tasks: bool) -> None:
    """See that a database can be used, and has what a command needs."""
    name, engine = masked(url), store.manager.get_engine(store.dburi)
    if engine.dialect.is_async:
        raise UnusableError(
            f"database {name}: driver {engine.dialect.driver} is asynchronous; name a synchronous"
            " one"
        )
    if is_missing_file(url):  # connecting would make it
        if needs_tasks:
            raise UnusableError(
                f"database {name}: there is no such file. Correct its name, or have it made:"
                " sessionmgr results upgrade"
            )
        return
    try:
        engine.connect().close()
    except (TypeError, ValueError) as error:  # an option in the URL that the driver does not know
        raise UnusableError(f"database {name} cannot be used: {explain(error, url)}") from None
    if needs_tasks and not has_tasks(store):
        raise UnusableError(
            f"database {name}: there is no table {store.tables.task.fullname}. Name the right one"
            " by --table and --schema, or create it: sessionmgr results upgrade"
        )


@contextmanager
def _progress(
    store: ResultStore, before: datetime, *, as_json: bool
) -> Iterator[Callable[[int], None]]:
    """Give what moves a progress bar, where somebody watches; JSON is left alone."""
    consoles = [Console(stderr=True), *([] if as_json else [Console()])]
    console = next((console for console in consoles if console.is_interactive), None)
    if console is None:
        yield lambda _: None
        return
    total = sum(count_expired(store, before).values())
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("rows", total=total)
        yield lambda gone: progress.update(bar, completed=gone)


def _show_expired(expired: dict[str, int], before: datetime, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(expired, indent=2))
        return
    for table, number in expired.items():
        click.echo(f"{table}: {_rows(number)}")
    click.echo(f"Nothing was deleted; this ended before {time_text(before)}.")


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"


def _print_ddl(statements: list[str]) -> None:
    for statement in statements:
        click.echo(f"{statement};")

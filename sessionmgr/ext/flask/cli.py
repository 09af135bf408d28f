"""``flask shell`` and ``flask sessionmgr``: the databases of an application at the command line."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click
import sqlalchemy as sa
from flask import current_app
from flask.cli import AppGroup
from sqlalchemy.exc import SQLAlchemyError

from sessionmgr.binds import DEFAULT
from sessionmgr.errors import SessionManagerError
from sessionmgr.explain import explain
from sessionmgr.urls import masked

from .databases import no_such_bind

if TYPE_CHECKING:
    from .databases import Engines
    from .extension import SQLAlchemy

__all__ = ("add_models_to_shell", "commands")

FAILED = 1


def add_models_to_shell() -> dict[str, Any]:
    """Give ``flask shell`` the extension, as ``db``, and the models by their names."""
    db = _extension()
    models = {mapper.class_.__name__: mapper.class_ for mapper in db.Model.registry.mappers}
    return {**models, "db": db}


def _extension() -> SQLAlchemy:
    db: SQLAlchemy = current_app.extensions["sqlalchemy"]
    return db


commands = AppGroup("sessionmgr", help="The databases of this application.")


@commands.command("check")
@click.pass_context
def check(context: click.Context, /) -> None:
    """Ask each database for an answer, and say which bind keys of models have none.

    Exit status: 0 if all have answered, 1 if one has not, or is missing.
    """
    db = _extension()
    keys = dict.fromkeys([*db.engines, *db._bind_keys()])
    width = max(len(_name(key)) for key in keys)
    outcomes = [_ask(db.engines, key, width) for key in keys]
    context.exit(0 if all(outcomes) else FAILED)


def _ask(engines: Engines, key: str | None, width: int) -> bool:
    """Ask a database, print what comes of it, and tell whether it has answered."""
    if key not in engines:
        failed = str(no_such_bind(key, engines))
        click.echo(f"{click.style('missing', fg='red')} {_name(key):{width}}  {failed}")
        return False
    engine, failed = engines[key], ""
    begin = perf_counter()
    try:
        with engine.connect() as connection:
            connection.scalar(sa.select(1))
    except Exception as error:  # noqa: BLE001 - whatever it is, the database is not to be had
        failed = explain(error, engine.url)
    took = f"{(perf_counter() - begin) * 1000:.1f} ms"
    outcome = click.style("failed", fg="red") if failed else click.style("ok    ", fg="green")
    click.echo(f"{outcome}  {_name(key):{width}}  {masked(engine.url)}  {failed or took}")
    return not failed


@commands.command("create-all")
@click.option(
    "--bind-key",
    "bind_keys",
    multiple=True,
    metavar="KEY",
    help="Only this database; repeat this for more. That without a bind key is 'default'."
    "  [default: all of them]",
)
def create_all(bind_keys: tuple[str, ...]) -> None:
    """Create the tables that the databases lack.

    Exit status: 0 if they are all there, 1 if one could not be made.
    """
    db = _extension()
    keys = [_key(db, name) for name in bind_keys] or db._bind_keys()
    try:
        databases = db._selected(keys)
        with click.progressbar(databases, label="databases", file=sys.stderr) as bar:
            for key, engine in bar:
                _create(db, key, engine)
    except SessionManagerError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"tables are there in: {', '.join(map(_name, keys))}")


def _create(db: SQLAlchemy, key: str | None, engine: sa.Engine) -> None:
    try:
        db._create(key, engine)
    except SessionManagerError:
        raise  # it tells which database
    except SQLAlchemyError as error:
        reason = explain(error, engine.url)
        raise click.ClickException(f"database {_name(key)}: {reason}") from None


def _key(db: SQLAlchemy, name: str) -> str | None:
    """Find the bind key of a name given to an option."""
    key = None if name == DEFAULT and None in db.engines else name
    if key not in db.engines:
        there = ", ".join(map(_name, db.engines))
        raise click.BadParameter(f"no bind key {name!r}; there are: {there}")
    return key


def _name(bind_key: str | None) -> str:
    return DEFAULT if bind_key is None else bind_key

"""Flask: ``flask shell`` and ``flask sessionmgr``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from sessionmgr.ext.flask import SQLAlchemy
from sessionmgr.ext.flask.cli import add_models_to_shell
from tests.flask_apps import all_bases, make_app, make_user

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flask import Flask

    from tests.servers import Database

pytest_plugins = ["tests.flask_fixtures"]

pytestmark = pytest.mark.usefixtures("flask_apps_closed")

SECRET = "s3cret"


def run(app: Flask, *arguments: str) -> tuple[int, list[str]]:
    """Run a command; return its exit status and the lines that it prints."""
    result = app.test_cli_runner().invoke(args=["sessionmgr", *arguments])
    assert SECRET not in result.output
    return result.exit_code, result.output.splitlines()


@all_bases
def test_shell_has_the_models(make_base: Callable[[], type[Any]], tmp_path: Path) -> None:
    """``flask shell`` has ``db`` and the models by their names, unless told otherwise."""
    app, plain = make_app(tmp_path), make_app(tmp_path)
    db = SQLAlchemy(app, model_class=make_base())
    user = make_user(db)
    SQLAlchemy(plain, add_models_to_shell=False)
    with app.app_context():
        assert add_models_to_shell() == {"db": db, "User": user}
        assert app.make_shell_context()["User"] is user
    with plain.app_context():
        assert "db" not in plain.make_shell_context()


def test_check_asks_every_database(make_database: Callable[..., Database], tmp_path: Path) -> None:
    """Each database has a line, without its password; one that fails is told, with the reason."""
    url = make_database("psycopg").url
    binds = {"users": url, "lost": f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/lost"}
    app = make_app(tmp_path, SQLALCHEMY_BINDS=binds)
    SQLAlchemy(app)
    status, (default, users, lost) = run(app, "check")
    assert status == 1
    assert default.startswith("ok      default  sqlite://  ")
    assert default.endswith(" ms")
    assert users.startswith("ok      users    postgresql+psycopg://")
    assert lost.startswith("failed  lost     postgresql+psycopg://me:***@127.0.0.1:1/lost  ")
    assert "refused" in lost
    assert run(make_ok(tmp_path), "check")[0] == 0


def test_check_tells_of_models_without_a_database(tmp_path: Path) -> None:
    """A bind key that models have and the configuration has not is a failure."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app)
    db.Table("forgotten", db.Column("id", db.Integer), bind_key="nowhere")
    status, (default, nowhere) = run(app, "check")
    assert status == 1
    assert default.startswith("ok")
    assert nowhere.startswith("missing nowhere  there is no bind key 'nowhere'")


def make_ok(folder: Path) -> Flask:
    """Make an application whose databases answer."""
    app = make_app(folder, SQLALCHEMY_BINDS={"other": "sqlite://"})
    SQLAlchemy(app)
    return app


def test_create_all(tmp_path: Path) -> None:
    """Tables are made in every database, or in those that are named."""
    app = make_app(tmp_path, "sqlite:///a.db", SQLALCHEMY_BINDS={"b": "sqlite:///b.db"})
    db = SQLAlchemy(app)
    make_user(db)
    db.Table("log", sa.Column("id", sa.Integer, primary_key=True), bind_key="b")

    def tables() -> list[list[str]]:
        engines = app.extensions["sessionmgr"]
        return [sa.inspect(engines[key]).get_table_names() for key in engines]

    assert run(app, "create-all", "--bind-key", "b")[1][-1] == "tables are there in: b"
    assert tables() == [[], ["log"]]
    assert run(app, "create-all", "--bind-key", "default")[0] == 0
    assert tables() == [["user"], ["log"]]
    assert run(app, "create-all") == (0, ["databases", "tables are there in: default, b"])
    printed = app.test_cli_runner().invoke(args=["sessionmgr", "create-all"])
    assert printed.stdout == "tables are there in: default, b\n"  # the progress is on stderr
    status, lines = run(app, "create-all", "--bind-key", "c")
    assert (status, lines[-1]) == (
        2,
        "Error: Invalid value: no bind key 'c'; there are: default, b",
    )


def test_bind_that_is_called_default(tmp_path: Path) -> None:
    """Where there is no default database, a bind may have its name."""
    app = make_app(tmp_path, None, SQLALCHEMY_BINDS={"default": "sqlite://"})
    SQLAlchemy(app)
    assert run(app, "create-all", "--bind-key", "default")[0] == 0


def test_create_all_that_fails(tmp_path: Path) -> None:
    """A database that cannot be reached, or has no entry, is named."""
    url = f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/lost"
    app = make_app(tmp_path, SQLALCHEMY_BINDS={"lost": url})
    db = SQLAlchemy(app)
    table = db.Table("t", sa.Column("id", sa.Integer, primary_key=True), bind_key="lost")
    status, lines = run(app, "create-all")
    assert status == 1
    assert lines[-1].startswith("Error: database lost: ")
    table.to_metadata(db._metadata_of("nowhere"))
    assert run(app, "create-all", "--bind-key", "default")[0] == 0
    assert "'nowhere'" in run(app, "create-all")[1][-1]

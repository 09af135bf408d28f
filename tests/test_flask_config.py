"""Flask: the documented settings, their defaults and their precedence, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import QueuePool, StaticPool

from sessionmgr import DatabaseURLError, EngineOptionsError, FlaskSetupError
from sessionmgr.ext.flask import SQLAlchemy
from sessionmgr.ext.flask.databases import make_engines
from tests.flask_apps import make_app, make_user

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flask import Flask

    from tests.servers import Database

pytest_plugins = ["tests.flask_fixtures"]

pytestmark = pytest.mark.usefixtures("flask_apps_closed")


def engines_of(app: Flask, **options: Any) -> Any:
    """Initialise an application, and give its engines."""
    SQLAlchemy(app, **options)
    return app.extensions["sessionmgr"]


def test_settings_have_their_documented_defaults(tmp_path: Path) -> None:
    """What the application has not set is set, as others may read it."""
    app = make_app(tmp_path)
    engines_of(app)
    found = {name: value for name, value in app.config.items() if name.startswith("SQLALCHEMY_")}
    assert found == {
        "SQLALCHEMY_DATABASE_URI": "sqlite://",
        "SQLALCHEMY_BINDS": {},
        "SQLALCHEMY_ENGINE_OPTIONS": {},
        "SQLALCHEMY_ECHO": False,
        "SQLALCHEMY_RECORD_QUERIES": False,
        "SQLALCHEMY_TRACK_MODIFICATIONS": False,
    }


def test_defaults_are_not_shared(tmp_path: Path) -> None:
    """What is put into one application's settings does not reach another's."""
    one, other = make_app(tmp_path), make_app(tmp_path)
    engines_of(one)
    one.config["SQLALCHEMY_BINDS"]["late"] = "sqlite://"
    engines_of(other)
    assert other.config["SQLALCHEMY_BINDS"] == {}


def test_no_database_is_an_error(tmp_path: Path) -> None:
    """An application that names no database is told which settings do."""
    with pytest.raises(FlaskSetupError, match="SQLALCHEMY_DATABASE_URI, or SQLALCHEMY_BINDS"):
        SQLAlchemy(make_app(tmp_path, None))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"SQLALCHEMY_DATABASE_URI": "nonsense"}, DatabaseURLError, "^SQLALCHEMY_DATABASE_URI: "),
        ({"SQLALCHEMY_BINDS": {"a": "nonsense"}}, DatabaseURLError, r"^SQLALCHEMY_BINDS\['a'\]: "),
        ({"SQLALCHEMY_BINDS": {"a": {"echo": True}}}, DatabaseURLError, r"binds\['a'\] has no"),
        ({"SQLALCHEMY_BINDS": {"default": "sqlite://"}}, EngineOptionsError, "another name"),
        ({"SQLALCHEMY_ECHO": "yes"}, EngineOptionsError, "ECHO must be True, False or"),
        ({"SQLALCHEMY_BINDS": {"": "sqlite://"}}, EngineOptionsError, "empty bind key"),
        ({"SQLALCHEMY_BINDS": None}, EngineOptionsError, "BINDS must be a dictionary, not NoneT"),
        ({"SQLALCHEMY_BINDS": ["x:s3cret@y"]}, EngineOptionsError, "BINDS must.* not list;"),
        ({"SQLALCHEMY_ENGINE_OPTIONS": None}, EngineOptionsError, "OPTIONS must be a dictionary"),
        ({"SQLALCHEMY_ENGINE_OPTIONS": {5: 1}}, EngineOptionsError, "OPTIONS must have strings"),
        ({"SQLALCHEMY_ENGINE_OPTIONS": {"nonsense": 1}}, EngineOptionsError, "nonsense"),
        ({"SQLALCHEMY_ENGINE_OPTIONS": {"pool": object()}}, EngineOptionsError, "poolclass="),
    ],
    ids=[
        *["url", "url of a bind", "no url", "default", "echo"],
        *["empty key", "no binds", "list of binds", "no options"],
        *["number", "unknown option", "pool"],
    ],
)
def test_wrong_settings_raise_at_init_app(
    settings: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    """What cannot be is told at once, and the application may be set up again."""
    app = make_app(tmp_path, **settings)
    db = SQLAlchemy()
    with pytest.raises(error, match=text):
        db.init_app(app)
    assert not {"sqlalchemy", "sessionmgr"} & app.extensions.keys()


def test_precedence_of_options(tmp_path: Path) -> None:
    """The argument is the default for all; binds override it; ENGINE_OPTIONS the default bind's."""
    app = make_app(
        tmp_path,
        "sqlite:///uri.db",
        SQLALCHEMY_BINDS={
            None: {"url": "sqlite:///bind.db", "pool_size": 2, "max_overflow": 7},
            "one": {"url": "sqlite:///one.db", "pool_size": 3},
            "two": sa.make_url("sqlite:///two.db"),
        },
        SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 4},
    )
    engines = engines_of(app, engine_options={"pool_size": 1, "pool_timeout": 5})
    assert list(engines) == [None, "one", "two"]
    assert [engines[key].pool.size() for key in engines] == [4, 3, 1]
    assert [engines[key].pool._max_overflow for key in engines] == [7, 10, 10]
    assert engines[None].url.database == f"{app.instance_path}/uri.db"


def test_default_bind_without_uri(tmp_path: Path) -> None:
    """The key ``None`` of SQLALCHEMY_BINDS is the default database, too."""
    binds = {None: {"url": "sqlite://", "echo": False}}
    app = make_app(tmp_path, None, SQLALCHEMY_BINDS=binds, SQLALCHEMY_ENGINE_OPTIONS={"echo": True})
    engines = engines_of(app)
    assert engines[None].echo is True
    assert binds == {None: {"url": "sqlite://", "echo": False}}  # which is the application's


def test_echo(tmp_path: Path) -> None:
    """SQLALCHEMY_ECHO is for statements and pools, of engines that do not say otherwise."""
    binds = {"quiet": {"url": "sqlite:///quiet.db", "echo": False}}
    app = make_app(tmp_path, "sqlite:///loud.db", SQLALCHEMY_ECHO=True, SQLALCHEMY_BINDS=binds)
    engines = engines_of(app)
    assert (engines[None].echo, engines[None].pool.echo) == (True, True)
    assert (engines["quiet"].echo, engines["quiet"].pool.echo) == (False, True)


def test_sqlite_files_are_in_the_instance_folder(tmp_path: Path) -> None:
    """A relative path is one in the instance folder, which is made; absolute ones are kept."""
    absolute = f"sqlite:///{tmp_path}/absolute.db"
    binds = {"uri": "sqlite:///file:uri.db?uri=true", "absolute": absolute}
    app = make_app(tmp_path, "sqlite:///app.db", SQLALCHEMY_BINDS=binds)
    db = SQLAlchemy(app)
    with app.app_context():
        db.create_all()
    folder = tmp_path / "instance"
    assert {path.name for path in folder.glob("*.db")} == {"app.db", "uri.db"}
    assert (tmp_path / "absolute.db").exists()


def test_memory_and_absolute_paths_need_no_folder(tmp_path: Path) -> None:
    """The instance folder is made for files that are in it."""
    engines_of(make_app(tmp_path, SQLALCHEMY_BINDS={"a": f"sqlite:///{tmp_path}/a.db"}))
    assert not (tmp_path / "instance").exists()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_memory_is_one_connection_per_bind_key(url: str, tmp_path: Path) -> None:
    """A database in memory is one for all threads and contexts, and another under another key."""
    app = make_app(tmp_path, url, SQLALCHEMY_BINDS={"other": url})
    db = SQLAlchemy(app)
    user = make_user(db)
    db.Table("user", sa.Column("id", sa.Integer, primary_key=True), bind_key="other")
    with app.app_context():
        assert isinstance(db.engine.pool, StaticPool)
        db.create_all([None])
        assert not sa.inspect(db.engines["other"]).has_table("user")
        db.session.add(user(username="one"))
        db.session.commit()
    with app.app_context():
        assert db.session.scalars(sa.select(user.username)).all() == ["one"]


@pytest.mark.parametrize(
    ("url", "options", "charset", "recycle"),
    [
        ("mysql+pymysql://h/d", {}, "utf8mb4", 7200),
        ("mariadb+pymysql://h/d?charset=latin1", {}, "latin1", 7200),
        ("mysql+pymysql://h/d", {"pool_recycle": 60}, "utf8mb4", 60),
    ],
)
def test_mysql_defaults(
    url: str, options: dict[str, Any], charset: str, recycle: int, tmp_path: Path
) -> None:
    """MySQL and MariaDB get UTF-8, and connections before the server drops them."""
    for given, settings in (
        ({"engine_options": options}, {}),
        ({}, {"SQLALCHEMY_ENGINE_OPTIONS": options}),
    ):
        engine = engines_of(make_app(tmp_path, url, **settings), **given)[None]
        assert engine.url.query["charset"] == charset
        assert engine.pool._recycle == recycle


def test_connections_are_kept_in_this_process(tmp_path: Path) -> None:
    """A server need not fork after the application is made for it to have pools."""
    app = make_app(tmp_path, "sqlite:///app.db")
    engines = engines_of(app)
    assert isinstance(engines[None].pool, QueuePool)
    assert not engines.manager.forked


def test_mariadb_gets_utf8(make_database: Callable[..., Database], tmp_path: Path) -> None:
    """The server takes what is sent for UTF-8 of up to four bytes."""
    app = make_app(tmp_path, make_database("pymysql").url)
    db = SQLAlchemy(app)
    with app.app_context():
        assert db.session.scalar(sa.text("SELECT @@character_set_client")) == "utf8mb4"


def test_bind_keys_of_table_functions(tmp_path: Path) -> None:
    """Tables are created, dropped and reflected for one key, several, or all of them."""
    app = make_app(tmp_path, "sqlite:///a.db", SQLALCHEMY_BINDS={"b": "sqlite:///b.db"})
    db = SQLAlchemy(app)
    for key in (None, "b"):
        db.Table("user", sa.Column("id", sa.Integer, primary_key=True), bind_key=key)

    def tables() -> list[list[str]]:
        return [sa.inspect(db.engines[key]).get_table_names() for key in (None, "b")]

    with app.app_context():
        db.create_all("b")
        assert tables() == [[], ["user"]]
        db.create_all(bind_key=[None, "b"])
        assert tables() == [["user"], ["user"]]
        db.drop_all(None)
        assert tables() == [[], ["user"]]
        db.create_all()
        for key in db.engines:
            db.metadatas[key].clear()
        db.reflect("b")
        assert [list(db.metadatas[key].tables) for key in (None, "b")] == [[], ["user"]]
        db.reflect()
        assert list(db.metadata.tables) == ["user"]
        with pytest.deprecated_call():
            assert db.get_engine("b") is db.get_engine(bind="b") is db.engines["b"]
        db.drop_all()
        assert tables() == [[], []]


def test_engines_are_made_for_options_only_once(tmp_path: Path) -> None:
    """The configuration is not read again."""
    app = make_app(tmp_path)
    engines = make_engines(app, {})
    app.config["SQLALCHEMY_BINDS"] = {"late": "sqlite://"}
    assert list(engines) == [None]
    assert repr(engines) == "<Engines of bind keys None>"

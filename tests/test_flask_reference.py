"""Flask: the code blocks of the reference document on sessions, one test each, as written."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.exc import IntegrityError, UnboundExecutionError
from sqlalchemy.orm import scoped_session
from werkzeug.exceptions import NotFound

from sessionmgr.ext.flask import Pagination, Session, SQLAlchemy
from sessionmgr.ext.flask.session import _app_ctx_id, _clause_to_engine
from tests.flask_apps import make_app

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flask import Flask

    from tests.servers import Database

pytest_plugins = ["tests.flask_fixtures"]

pytestmark = pytest.mark.usefixtures("flask_apps_closed")


@pytest.fixture(params=["sqlite", "psycopg", "pymysql"])
def flask_app(
    request: pytest.FixtureRequest, tmp_path: Path, make_database: Callable[..., Database]
) -> Flask:
    """Make an application on a database of each kind, with binds ``users`` and ``logs``."""
    if request.param == "sqlite":
        urls: list[Any] = ["sqlite:///main.db", "sqlite:///users.db", "sqlite:///logs.db"]
    else:
        urls = [make_database(request.param).url] * 3
    return make_app(tmp_path, urls[0], SQLALCHEMY_BINDS={"users": urls[1], "logs": urls[2]})


def parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Give the parameters of a function: name -> kind and default."""
    found = inspect.signature(function).parameters.values()
    return {each.name: (each.kind, each.default) for each in found if each.name != "self"}


POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
KEYWORD = inspect.Parameter.KEYWORD_ONLY
REST = inspect.Parameter.VAR_KEYWORD
REQUIRED = inspect.Parameter.empty


# -- the blocks of the API


def test_session_class(tmp_path: Path) -> None:
    """``Session`` is SQLAlchemy's, takes the extension, and picks engines by bind key."""
    assert issubclass(Session, sa_orm.Session)
    assert parameters(Session.__init__) == {
        "db": (POSITIONAL, REQUIRED),
        "kwargs": (REST, REQUIRED),
    }
    found = parameters(Session.get_bind)
    assert [found[name] for name in ("mapper", "clause", "bind")] == [(POSITIONAL, None)] * 3
    assert found["kwargs"] == (REST, REQUIRED)

    app = make_app(tmp_path, SQLALCHEMY_BINDS={"users": "sqlite://"})
    db = SQLAlchemy(app)
    table = db.Table("t", db.Column("id", db.Integer, primary_key=True), bind_key="users")
    with app.app_context(), Session(db, autoflush=False) as session:
        assert session.get_bind(clause=table) is db.engines["users"]
        assert session.get_bind(clause=table, bind=db.engine) is db.engine
        assert session.get_bind() is db.engine


def test_session_access(tmp_path: Path) -> None:
    """``db.session`` is a ``scoped_session``, one session for each application context."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app)
    assert isinstance(db.session, scoped_session)
    with app.app_context():
        outer = db.session()
        assert isinstance(outer, Session)
        assert db.session() is outer
        with app.app_context():
            assert db.session() is not outer
        assert db.session() is outer
    with pytest.raises(RuntimeError, match="application context"):
        db.session()


def test_query_convenience_methods() -> None:
    """The methods that abort with 404 have the documented parameters."""
    assert parameters(SQLAlchemy.get_or_404) == {
        "entity": (POSITIONAL, REQUIRED),
        "ident": (POSITIONAL, REQUIRED),
        "description": (KEYWORD, None),
        "kwargs": (REST, REQUIRED),
    }
    for method in (SQLAlchemy.first_or_404, SQLAlchemy.one_or_404):
        assert parameters(method) == {
            "statement": (POSITIONAL, REQUIRED),
            "description": (KEYWORD, None),
        }


def test_paginate_signature() -> None:
    """``paginate`` has the documented parameters and defaults."""
    assert parameters(SQLAlchemy.paginate) == {
        "select": (POSITIONAL, REQUIRED),
        "page": (KEYWORD, None),
        "per_page": (KEYWORD, None),
        "max_per_page": (KEYWORD, None),
        "error_out": (KEYWORD, True),
        "count": (KEYWORD, True),
    }


def test_utility_functions(tmp_path: Path) -> None:
    """An engine is found by a clause's bind key, and a context by its id."""
    app = make_app(tmp_path, SQLALCHEMY_BINDS={"users": "sqlite://"})
    db = SQLAlchemy(app)
    table = db.Table("t", db.Column("id", db.Integer, primary_key=True), bind_key="users")
    lost = db.Table("lost", db.Column("id", db.Integer, primary_key=True), bind_key="nowhere")
    with app.app_context():
        assert _clause_to_engine(None, db.engines) is None
        assert _clause_to_engine(sa.text("SELECT 1"), db.engines) is None
        assert _clause_to_engine(sa.select(table.alias()), db.engines) is db.engines["users"]
        assert _clause_to_engine(table, dict(db.engines)) is db.engines["users"]
        plain = sa.Table("plain", sa.MetaData(), sa.Column("id", sa.Integer))
        assert _clause_to_engine(plain, db.engines) is None  # it says nothing of bind keys
        with pytest.raises(UnboundExecutionError, match=r"'nowhere'.*None, 'users'"):
            _clause_to_engine(lost, db.engines)
        first = _app_ctx_id()
        assert isinstance(first, int)
        assert _app_ctx_id() == first
        with app.app_context():
            assert _app_ctx_id() != first
    with pytest.raises(RuntimeError, match="application context"):
        _app_ctx_id()


# -- the blocks of the usage


def test_basic_session_usage(flask_app: Flask) -> None:
    """A record is added and read in an application context."""
    app, db = flask_app, SQLAlchemy(flask_app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        username = db.Column(db.String(50))
        email = db.Column(db.String(50))

    with app.app_context():
        db.create_all()

    # Session is automatically available and scoped to app context
    with app.app_context():
        # Add new record
        user = User(username="john", email="john@example.com")
        db.session.add(user)
        db.session.commit()
        # Query records
        users = db.session.execute(db.select(User)).scalars().all()

    assert users == [user]


def test_using_query_convenience_methods(flask_app: Flask) -> None:
    """Views find a row, or answer 404."""
    app, db = flask_app, SQLAlchemy(flask_app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        username = db.Column(db.String(50))

    @app.route("/user/<int:user_id>")
    def get_user(user_id):  # noqa: ANN001, ANN202 - as written
        # Automatically returns 404 if user not found
        user = db.get_or_404(User, user_id)
        return f"User: {user.username}"

    @app.route("/users/first")
    def first_user():  # noqa: ANN202
        # Get first user or 404 if none exist
        user = db.first_or_404(db.select(User).order_by(User.id))
        return f"First user: {user.username}"

    @app.route("/user/unique/<username>")
    def unique_user(username):  # noqa: ANN001, ANN202
        # Expect exactly one match or 404
        user = db.one_or_404(db.select(User).where(User.username == username))
        return f"User: {user.username}"

    with app.app_context():
        db.create_all()
    client = app.test_client()
    assert [client.get(path).status_code for path in ("/users/first", "/user/1")] == [404, 404]
    with app.app_context():
        db.session.add_all([User(username=name) for name in ("john", "twin", "twin")])
        db.session.commit()
        ids = {user.username: user.id for user in db.session.scalars(db.select(User))}
    assert client.get(f"/user/{ids['john']}").text == "User: john"
    assert client.get("/users/first").text == "First user: john"
    assert client.get("/user/unique/john").text == "User: john"
    for path in ("/user/999", "/user/unique/nobody", "/user/unique/twin"):
        assert client.get(path).status_code == 404


def test_multiple_database_sessions(flask_app: Flask) -> None:
    """One session writes to the databases of its models' bind keys."""
    app, db = flask_app, SQLAlchemy(flask_app)

    # Session automatically selects correct engine based on model bind key
    class User(db.Model):
        __bind_key__ = "users"
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String(50))

    class Log(db.Model):
        __bind_key__ = "logs"
        id = db.Column(db.Integer, primary_key=True)
        message = db.Column(db.String(50))

    with app.app_context():
        db.create_all()
        # These use different databases automatically
        db.session.add(User(name="john"))  # Uses 'users' database
        db.session.add(Log(message="test"))  # Uses 'logs' database
        db.session.commit()

        assert db.session.get_bind(User) is db.engines["users"]
        assert db.session.get_bind(Log) is db.engines["logs"]
        with db.engines["users"].connect() as connection:
            assert connection.scalar(sa.select(User.__table__.c.name)) == "john"
        with db.engines["logs"].connect() as connection:
            assert connection.scalar(sa.select(Log.__table__.c.message)) == "test"
        if db.engine.dialect.name == "sqlite":
            assert sa.inspect(db.engines["users"]).get_table_names() == ["user"]
            assert sa.inspect(db.engines["logs"]).get_table_names() == ["log"]


def test_session_pagination(flask_app: Flask) -> None:
    """A view gives the page that its query string asks for."""
    app, db = flask_app, SQLAlchemy(flask_app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        username = db.Column(db.String(50))

    @app.route("/users")
    def list_users():  # noqa: ANN202
        # Automatically handles page and per_page from request args
        pagination = db.paginate(
            db.select(User).order_by(User.username), per_page=20, max_per_page=100
        )
        return {
            "users": [u.username for u in pagination.items],
            "page": pagination.page,
            "pages": pagination.pages,
            "total": pagination.total,
        }

    with app.app_context():
        db.create_all()
        db.session.add_all([User(username=f"user{i:02}") for i in range(45)])
        db.session.commit()
        assert isinstance(db.paginate(db.select(User).order_by(User.id)), Pagination)
        with pytest.raises(NotFound):
            db.paginate(db.select(User).order_by(User.id), page=4)
    client = app.test_client()
    first, last = client.get("/users").get_json(), client.get("/users?page=3").get_json()
    assert first["users"] == [f"user{i:02}" for i in range(20)]
    assert (first["page"], first["pages"], first["total"]) == (1, 3, 45)
    assert last["users"] == [f"user{i:02}" for i in range(40, 45)]
    for nonsense in ("page=4", "page=0", "page=x"):
        assert client.get(f"/users?{nonsense}").status_code == 404


def test_manual_transaction_control(flask_app: Flask) -> None:
    """A flush gives the id before the commit; after an error nothing is left."""
    app, db = flask_app, SQLAlchemy(flask_app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        username = db.Column(db.String(50), unique=True)

    def add() -> int:
        with app.app_context():
            try:
                user = User(username="john")
                db.session.add(user)
                # Explicit flush to get ID without committing
                db.session.flush()
                user_id = user.id
                # More operations...
                db.session.commit()
            except Exception:
                db.session.rollback()
                raise
        return user_id

    with app.app_context():
        db.create_all()
    assert add() == 1
    with pytest.raises(IntegrityError):
        add()
    with app.app_context():
        assert db.session.scalar(db.select(db.func.count()).select_from(User)) == 1


def test_session_configuration(tmp_path: Path) -> None:
    """Options of the session, and its class, are given to the extension."""
    app = make_app(tmp_path)

    class CustomSession(Session):
        pass

    # Custom session options during extension initialization
    db = SQLAlchemy(
        app,
        session_options={
            "class_": CustomSession,  # Use custom session class
            "expire_on_commit": False,  # Don't expire objects after commit
            "autoflush": False,  # Manual flush control
        },
    )

    with app.app_context():
        session = db.session()
        assert isinstance(session, CustomSession)
        assert (session.expire_on_commit, session.autoflush) == (False, False)

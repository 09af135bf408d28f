"""Flask: the code blocks of the reference document on sessions, one test each, as written.

What runs is ``data/flask-session-management.md``: the document has lost its indentation.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.exc import IntegrityError, UnboundExecutionError
from sqlalchemy.orm import scoped_session
from werkzeug.exceptions import NotFound

from sessionmgr.ext.flask import Model, Pagination, Session, SQLAlchemy
from sessionmgr.ext.flask.session import _app_ctx_id, _clause_to_engine
from tests.flask_apps import make_app

if TYPE_CHECKING:
    from flask import Flask

    from tests.servers import Database

pytest_plugins = ["tests.flask_fixtures"]

COPY = Path(__file__).parent / "data" / "flask-session-management.md"
"""The blocks of the document, with indentation."""

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "flask-session-management.md"
"""The document, which is no part of this repository."""

Run = Callable[..., dict[str, Any]]
"""What ``run_block`` gives."""

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


def blocks(document: Path) -> dict[str, str]:
    """Read the code blocks of a document, by names made of their headings."""
    found: dict[str, str] = {}
    text = document.read_text(encoding="utf-8")
    for part in re.split(r"^##+ ", text, flags=re.MULTILINE):
        heading = part.partition("\n")[0]
        for kind, code in re.findall(r"^```python(.*)\n([^`]+)^```$", part, flags=re.MULTILINE):
            name = heading.lower().replace(" ", "_") + ("_api" if "api" in kind else "")
            assert name not in found
            found[name] = code
    return found


def lines(code: str) -> list[str]:
    """Give the lines of a block without indentation."""
    return [line.strip() for line in code.splitlines()]


@pytest.fixture
def run_block(request: pytest.FixtureRequest) -> Run:
    """Run the block that the test is called after, with names; give these, and what it made."""
    code = blocks(COPY)[request.node.originalname.removeprefix("test_")]

    def run(**names: Any) -> dict[str, Any]:
        names["__name__"] = __name__
        exec(compile(code, COPY, "exec"), names)  # noqa: S102 - it is what is tested
        return names

    return run


def check_parameters(
    function: Callable[..., Any], documented: Callable[..., Any], more: str | None = None
) -> None:
    """See that a function is called as is documented; it may take one thing more by name."""
    has, said = (
        {name: (each.kind, each.default) for name, each in parameters.items()}
        for parameters in (
            inspect.signature(function).parameters,
            inspect.signature(documented).parameters,
        )
    )
    if more is not None:
        assert has.pop(more) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert list(has.items()) == list(said.items())


# -- the document


@pytest.mark.skipif(
    not REFERENCE.exists() and os.environ.get("CI") != "true",
    reason="the reference document is not beside this checkout",
)
def test_blocks_are_those_of_the_document() -> None:
    """What runs here is what is written there, but for the indentation."""
    ours, theirs = blocks(COPY), blocks(REFERENCE)
    assert len(theirs) == REFERENCE.read_text(encoding="utf-8").count("```python") > 0
    assert list(ours) == list(theirs)
    for name, code in theirs.items():
        assert lines(ours[name]) == lines(code)


def test_every_block_has_a_test() -> None:
    """A test is called after each block."""
    assert [name for name in blocks(COPY) if f"test_{name}" not in globals()] == []


# -- the blocks of the API


def test_session_class_api(tmp_path: Path, run_block: Run) -> None:
    """``Session`` is SQLAlchemy's, takes the extension, and picks engines by bind key."""
    documented = run_block(sa_orm=sa_orm)["Session"]
    assert issubclass(Session, documented.__bases__)
    check_parameters(Session.__init__, documented.__init__)
    check_parameters(Session.get_bind, documented.get_bind, more="bind_key")

    app = make_app(tmp_path, SQLALCHEMY_BINDS={"users": "sqlite://"})
    db = SQLAlchemy(app)
    table = db.Table("t", db.Column("id", db.Integer, primary_key=True), bind_key="users")
    with app.app_context(), Session(db, autoflush=False) as session:
        assert session.get_bind(clause=table) is db.engines["users"]
        assert session.get_bind(clause=table, bind=db.engine) is db.engine
        assert session.get_bind() is db.engine


def test_session_access_api(tmp_path: Path, run_block: Run) -> None:
    """``db.session`` is a ``scoped_session``, one session for each application context."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app)
    assert isinstance(run_block()["session"], property)
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


def test_query_convenience_methods_api(run_block: Run) -> None:
    """The methods that abort with 404 have the documented parameters."""
    documented = run_block()
    for name in ("get_or_404", "first_or_404", "one_or_404"):
        check_parameters(getattr(SQLAlchemy, name), documented[name])


def test_session_pagination_api(run_block: Run) -> None:
    """``paginate`` has the documented parameters and defaults."""
    check_parameters(SQLAlchemy.paginate, run_block()["paginate"])


def test_utility_functions_api(tmp_path: Path, run_block: Run) -> None:
    """An engine is found by a clause's bind key, and a context by its id."""
    documented = run_block()
    check_parameters(_clause_to_engine, documented["_clause_to_engine"])
    check_parameters(_app_ctx_id, documented["_app_ctx_id"])

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


def test_basic_session_usage(flask_app: Flask, run_block: Run) -> None:
    """A record is added and read in an application context."""
    app, db = flask_app, SQLAlchemy(flask_app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        username = db.Column(db.String(50))
        email = db.Column(db.String(50))

    with app.app_context():
        db.create_all()

    names = run_block(app=app, db=db, User=User)

    assert names["users"] == [names["user"]]


def test_using_query_convenience_methods(flask_app: Flask, run_block: Run) -> None:
    """Views find a row, or answer 404."""
    app, db = flask_app, SQLAlchemy(flask_app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        username = db.Column(db.String(50))

    run_block(app=app, db=db, User=User)
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


def test_multiple_database_sessions(flask_app: Flask, run_block: Run) -> None:
    """One session writes to the databases of its models' bind keys."""

    class Texts(Model):  # the models of the block are given them, and declare none
        name = sa.Column(sa.String(50))
        message = sa.Column(sa.String(50))

    app, db = flask_app, SQLAlchemy(flask_app, model_class=Texts)
    for key, table in (("users", "user"), ("logs", "log")):
        columns = [sa.Column(name, sa.String(50)) for name in ("name", "message")]
        metadata = sa.MetaData()
        sa.Table(table, metadata, sa.Column("id", sa.Integer, primary_key=True), *columns)
        metadata.create_all(app.extensions["sessionmgr"][key])

    names = run_block(app=app, db=db)

    User, Log = names["User"], names["Log"]  # noqa: N806 - classes
    with app.app_context():
        assert db.session.get_bind(User) is db.engines["users"]
        assert db.session.get_bind(Log) is db.engines["logs"]
        with db.engines["users"].connect() as connection:
            assert connection.scalar(sa.select(User.__table__.c.name)) == "john"
        with db.engines["logs"].connect() as connection:
            assert connection.scalar(sa.select(Log.__table__.c.message)) == "test"
        if db.engine.dialect.name == "sqlite":
            assert sa.inspect(db.engines["users"]).get_table_names() == ["user"]
            assert sa.inspect(db.engines["logs"]).get_table_names() == ["log"]


def test_session_pagination(flask_app: Flask, run_block: Run) -> None:
    """A view gives the page that its query string asks for."""
    app, db = flask_app, SQLAlchemy(flask_app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        username = db.Column(db.String(50))

    run_block(app=app, db=db, User=User)
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


def test_manual_transaction_control(flask_app: Flask, run_block: Run) -> None:
    """A flush gives the id before the commit; after an error nothing is left."""
    app, db = flask_app, SQLAlchemy(flask_app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        username = db.Column(db.String(50), unique=True)

    with app.app_context():
        db.create_all()
    assert run_block(app=app, db=db, User=User)["user_id"] == 1
    with pytest.raises(IntegrityError):
        run_block(app=app, db=db, User=User)
    with app.app_context():
        assert db.session.scalar(db.select(db.func.count()).select_from(User)) == 1


def test_session_configuration(tmp_path: Path, run_block: Run) -> None:
    """Options of the session, and its class, are given to the extension."""
    app = make_app(tmp_path)

    class CustomSession(Session):
        pass

    db = run_block(SQLAlchemy=SQLAlchemy, app=app, CustomSession=CustomSession)["db"]

    with app.app_context():
        session = db.session()
        assert isinstance(session, CustomSession)
        assert (session.expire_on_commit, session.autoflush) == (False, False)

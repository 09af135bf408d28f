"""Flask: 404s, pages, the older queries, and what is known of statements and changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from werkzeug.exceptions import NotFound

from sessionmgr.ext.flask import Pagination, Query, SQLAlchemy
from sessionmgr.ext.flask.record_queries import get_recorded_queries
from sessionmgr.ext.flask.track_modifications import before_models_committed, models_committed
from tests.flask_apps import make_app, make_user

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flask import Flask

pytest_plugins = ["tests.flask_fixtures"]

pytestmark = pytest.mark.usefixtures("flask_apps_closed")


@pytest.fixture
def flask_users(tmp_path: Path) -> tuple[Flask, SQLAlchemy, Any]:
    """Make an application with 45 users."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app)
    user = make_user(db)
    with app.app_context():
        db.create_all()
        db.session.add_all([user(username=f"user{number:02}") for number in range(1, 46)])
        db.session.commit()
    return app, db, user


# -- 404s


def test_found(flask_users: tuple[Flask, SQLAlchemy, Any]) -> None:
    """What is there is given, by selects and by queries."""
    app, db, user = flask_users
    one = sa.select(user).where(user.username == "user01")
    query = sa.orm.Query.filter_by
    with app.app_context():
        found = db.get_or_404(user, 1)
        assert found.username == "user01"
        with db.session.no_autoflush:
            found.username = "changed"
            assert db.get_or_404(user, 1, populate_existing=True).username == "user01"
        assert db.first_or_404(sa.select(user).order_by(user.id)) is found  # of many
        assert db.first_or_404(one) is db.one_or_404(one) is found
        assert user.query.first_or_404() is found
        assert query(user.query, username="user01").one_or_404() is found
        with pytest.warns(sa.exc.LegacyAPIWarning):
            assert user.query.get_or_404(1) is found


MISSING: dict[str, Callable[..., Any]] = {
    "get": lambda db, user, **kw: db.get_or_404(user, 99, **kw),
    "first": lambda db, user, **kw: db.first_or_404(none(user), **kw),
    "none": lambda db, user, **kw: db.one_or_404(none(user), **kw),
    "many": lambda db, user, **kw: db.one_or_404(sa.select(user), **kw),
    "query.first": lambda db, user, **kw: user.query.filter(sa.false()).first_or_404(**kw),
    "query.none": lambda db, user, **kw: user.query.filter(sa.false()).one_or_404(**kw),
    "query.many": lambda db, user, **kw: user.query.one_or_404(**kw),
}
"""Ways to ask for what is not there, or not once."""


def none(user: Any) -> sa.Select[Any]:
    """Select nobody."""
    return sa.select(user).where(user.username == "nobody")


@pytest.mark.parametrize("ask", MISSING.values(), ids=MISSING.keys())
def test_not_found(ask: Callable[..., Any], flask_users: tuple[Flask, SQLAlchemy, Any]) -> None:
    """What is not there, or not once, is a 404, with the description that is given."""
    app, db, user = flask_users

    @app.get("/")
    def view() -> str:
        ask(db, user, description="No such <user>.")
        return "found"

    answer = app.test_client().get("/")
    assert (answer.status_code, "No such &lt;user&gt;." in answer.text) == (404, True)
    with app.app_context(), pytest.raises(NotFound) as caught:
        ask(db, user)
    assert caught.value.description == NotFound.description


# -- pages


@pytest.mark.parametrize("legacy", [False, True], ids=["select", "query"])
@pytest.mark.parametrize(
    ("asked", "arguments", "expected"),
    [
        ("", {}, (1, 20, 20)),
        ("page=3", {}, (3, 20, 5)),
        ("page=2&per_page=30", {}, (2, 30, 15)),
        ("page=2&per_page=30", {"page": 1}, (1, 30, 30)),
        ("per_page=40", {"max_per_page": 10}, (1, 10, 10)),
        ("per_page=40", {"per_page": 5}, (1, 5, 5)),
        ("per_page=200", {}, (1, 200, 45)),
        ("page=x&per_page=y", {"error_out": False}, (1, 20, 20)),
        ("page=0&per_page=-1", {"error_out": False}, (1, 20, 20)),
        ("page=9", {"error_out": False}, (9, 20, 0)),
        ("page=x", {}, None),
        ("page=0", {}, None),
        ("per_page=-1", {}, None),
        ("page=4", {}, None),
    ],
)
def test_pages(
    legacy: bool,
    asked: str,
    arguments: dict[str, Any],
    expected: tuple[int, int, int] | None,
    flask_users: tuple[Flask, SQLAlchemy, Any],
) -> None:
    """A page is that of the arguments, else of the request; nonsense is a 404."""
    app, db, user = flask_users
    with app.test_request_context(f"/?{asked}"):

        def read() -> Any:
            if legacy:
                return user.query.order_by(user.id).paginate(**arguments)
            return db.paginate(sa.select(user).order_by(user.id), **arguments)

        if expected is None:
            with pytest.raises(NotFound):
                read()
            return
        page = read()
        assert type(page) is Pagination
        assert (page.page, page.per_page, len(page.items)) == expected
        assert page.total == 45


def test_pages_turn(flask_users: tuple[Flask, SQLAlchemy, Any]) -> None:
    """The pages beside one are of its size, whatever the request says; there, 404 is asked for."""
    app, db, user = flask_users
    with app.test_request_context("/?page=2&per_page=44"):
        last = db.paginate(sa.select(user).order_by(user.id), max_per_page=500)
        assert [one.id for one in last] == [45]
        first = last.prev()
        assert (first.page, first.per_page, len(first.items)) == (1, 44, 44)
        assert first.next().items == last.items
        assert last.next().items == []
        with pytest.raises(NotFound):
            last.next(error_out=True)
        assert db.paginate(sa.select(user).order_by(user.id), count=False).total is None
        assert user.query.order_by(user.id).paginate(count=False).total is None


def test_pages_without_a_request(flask_users: tuple[Flask, SQLAlchemy, Any]) -> None:
    """A command or a task, which has no query string, gets the first 20."""
    app, db, user = flask_users
    with app.app_context():
        page = db.paginate(sa.select(user).order_by(user.id))
        assert (page.page, page.per_page, page.pages) == (1, 20, 3)


# -- queries


def test_query_classes(tmp_path: Path) -> None:
    """A class of queries may be the extension's, a base's, or one model's."""

    class Mine(Query[Any]):
        pass

    app = make_app(tmp_path)
    db = SQLAlchemy(app, query_class=Mine)

    class Own(db.Model):
        query_class = Query
        id = db.Column(db.Integer, primary_key=True)

    user = make_user(db)
    with app.app_context():
        assert type(user.query) is type(db.session.query(user)) is db.Query is Mine
        assert type(Own.query) is Query


# -- statements and changes


def test_recorded_queries(tmp_path: Path) -> None:
    """The statements of a context are listed, with their parameters, times and origin."""
    app = make_app(tmp_path, SQLALCHEMY_RECORD_QUERIES=True)
    db = SQLAlchemy(app)
    user = make_user(db)
    app.import_name = __name__
    with app.app_context():
        db.create_all()
        before = len(get_recorded_queries())
        db.session.execute(sa.select(user).where(user.id < 5))
        db.session.execute(sa.insert(user.__table__), [{"username": "a"}, {"username": "b"}])
        select, insert = get_recorded_queries()[before:]
    assert "FROM user" in str(select.statement)
    assert (select.parameters, insert.parameters) == ([(5,)], [("a",), ("b",)])
    assert select.duration == select.end_time - select.start_time
    assert "test_flask_queries.py:" in select.location
    assert select.location.endswith("(test_recorded_queries)")
    with app.app_context():
        assert get_recorded_queries() == []
        app.import_name = __name__[:-1]  # a neighbour, not its package
        db.session.execute(sa.text("SELECT 1"))
        assert get_recorded_queries()[-1].location == "<unknown>"
    with db_connection(app) as connection:  # nobody would read it
        connection.execute(sa.text("SELECT 1"))


def db_connection(app: Flask) -> Any:
    """Connect to an application's database without a context."""
    return app.extensions["sessionmgr"][None].connect()


def test_nothing_is_recorded_unasked(flask_users: tuple[Flask, SQLAlchemy, Any]) -> None:
    """Without the setting there is no list."""
    app, db, user = flask_users
    with app.app_context():
        db.session.scalars(sa.select(user)).all()
        assert get_recorded_queries() == []


def test_tracked_modifications(tmp_path: Path) -> None:
    """Signals tell what a commit changes, and not what was rolled back or left as it was."""
    app = make_app(tmp_path, SQLALCHEMY_TRACK_MODIFICATIONS=True)
    silent = make_app(tmp_path)
    db = SQLAlchemy(app)
    db.init_app(silent)
    db.init_app(make_app(tmp_path, SQLALCHEMY_TRACK_MODIFICATIONS=True))  # one more tells no more
    user = make_user(db)
    told: list[tuple[str, list[tuple[Any, str]]]] = []

    def before(sender: Flask, changes: list[tuple[Any, str]]) -> None:
        told.append((f"before {sender is app}", changes))

    def after(sender: Flask, changes: list[tuple[Any, str]]) -> None:
        told.append((f"after {sender is app}", changes))

    def heard(context: Flask, work: Callable[[], Any]) -> list[tuple[str, list[str]]]:
        told.clear()
        with context.app_context():
            db.create_all()
            work()
            db.session.commit()
        return [(when, [done for _, done in changes]) for when, changes in told]

    def both(done: str) -> list[tuple[str, list[str]]]:
        return [("before True", [done]), ("after True", [done])]

    def rename(name: str) -> None:
        db.session.get(user, 1).username = name

    def commit_twice() -> None:
        db.session.add(user(username="twice"))
        db.session.commit()

    def add_in_vain() -> None:
        db.session.add(user(username="vain"))
        db.session.flush()
        db.session.rollback()

    with before_models_committed.connected_to(before), models_committed.connected_to(after):
        assert heard(app, lambda: db.session.add(user(username="a"))) == both("insert")
        assert heard(app, lambda: rename("b")) == both("update")
        assert heard(app, lambda: rename("b")) == []
        assert heard(app, add_in_vain) == []
        assert heard(app, commit_twice) == both("insert")
        assert heard(app, lambda: db.session.delete(db.session.get(user, 1))) == both("delete")
        assert heard(silent, lambda: db.session.add(user(username="a"))) == []

"""Flask: the life of sessions, in contexts, in tasks, after forks, and in several applications."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from celery import Celery, Task
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.pool import NullPool

from sessionmgr import EngineOptionsError, FlaskSetupError, NoSuchBindError
from sessionmgr.ext.flask import Session, SQLAlchemy
from sessionmgr.isolation import isolated
from sessionmgr.serverlock import server_lock
from tests.concurrency import in_child, in_children, in_threads
from tests.flask_apps import make_app, make_user
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flask import Flask

    from tests.servers import Database

pytest_plugins = ["tests.flask_fixtures"]

pytestmark = pytest.mark.usefixtures("flask_apps_closed")


def names(db: SQLAlchemy, user: Any) -> list[str]:
    """Read the user names in a context of its own."""
    return sorted(db.session.scalars(sa.select(user.username)))


# -- contexts


def test_uncommitted_work_is_rolled_back_with_its_context(tmp_path: Path) -> None:
    """What a request has not committed is gone after it, also where it raised."""
    app = make_app(tmp_path, "sqlite:///app.db")
    db = SQLAlchemy(app)
    user = make_user(db)

    @app.post("/<name>/<outcome>")
    def add(name: str, outcome: str) -> str:
        db.session.add(user(username=name))
        db.session.flush()
        if outcome == "error":
            raise ValueError(name)
        if outcome == "commit":
            db.session.commit()
        return name

    with app.app_context():
        db.create_all()
    client = app.test_client()
    for name in ("error", "forgotten", "commit"):
        client.post(f"/{name}/{name}")
    with app.app_context():
        assert names(db, user) == ["commit"]
    assert app.extensions["sessionmgr"].manager.stats().databases[0].checked_out == 0


def test_reading_before_writing_on_sqlite(tmp_path: Path) -> None:
    """A request that reads, and writes after another has, is not told "database is locked"."""
    app = make_app(tmp_path, "sqlite:///app.db")
    db = SQLAlchemy(app)
    user = make_user(db)
    with app.app_context():
        db.create_all()
        db.session.add(user(username="old"))
        db.session.commit()
    with app.app_context():
        mine = db.get_or_404(user, 1)
        with app.app_context():
            db.session.add(user(username="other"))
            db.session.commit()
        mine.username = "new"
        db.session.commit()
        assert names(db, user) == ["new", "other"]


def test_requests_have_sessions_of_their_own(tmp_path: Path) -> None:
    """Requests in threads at the same time do not share a session."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app)

    def request() -> Session:
        with app.test_request_context():
            return db.session()

    assert len(set(in_threads([request] * 4))) == 4


def test_session_outside_a_context_is_an_error(tmp_path: Path) -> None:
    """Without a context there is neither session nor engine; Flask says what to do."""
    db = SQLAlchemy(make_app(tmp_path))
    for use in (
        lambda: db.session.execute(sa.text("SELECT 1")),
        lambda: db.engine,
        lambda: db.engines,
        db.create_all,
    ):
        with pytest.raises(RuntimeError, match=r"app\.app_context\(\)"):
            use()


def test_application_that_was_never_initialised(tmp_path: Path) -> None:
    """The error names the application, and says to call ``init_app``."""
    db = SQLAlchemy()
    with (
        make_app(tmp_path).app_context(),
        pytest.raises(FlaskSetupError, match=r"'tests\.flask_apps'.*init_app\(app\)"),
    ):
        db.session.execute(sa.text("SELECT 1"))


def test_application_of_another_extension(tmp_path: Path) -> None:
    """An application belongs to one extension: a second one is told at once, and when used."""
    app = make_app(tmp_path)
    SQLAlchemy(app)
    with pytest.raises(FlaskSetupError, match="before"):
        SQLAlchemy(app)
    with app.app_context(), pytest.raises(FlaskSetupError, match=r"no second SQLAlchemy\(\)"):
        _ = SQLAlchemy().engine


def test_engines_without_a_context(tmp_path: Path) -> None:
    """Given the application, its engines and their manager need no context."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app)
    engines = app.extensions["sessionmgr"]
    with app.app_context():
        assert engines[None] is db.engine is db.engines.manager.get_engine("default")
    with engines.manager.session() as session:
        assert session.scalar(sa.text("SELECT 1")) == 1


def test_applications_do_not_meet(tmp_path: Path) -> None:
    """One extension serves several applications, each with its databases, also when nested."""
    db = SQLAlchemy()
    user = make_user(db)
    apps = [make_app(tmp_path / name, "sqlite:///app.db") for name in ("one", "two")]
    for app in apps:
        db.init_app(app)
        with app.app_context():
            db.create_all()
    with apps[0].app_context():
        db.session.add(user(username="one"))
        with apps[1].app_context():
            db.session.add(user(username="two"))
            db.session.commit()
            assert names(db, user) == ["two"]
        db.session.commit()
        assert names(db, user) == ["one"]
    engines = [app.extensions["sessionmgr"][None] for app in apps]
    assert engines[0] is not engines[1]


def test_session_keeps_its_application(tmp_path: Path) -> None:
    """Objects that are loaded later come from the database of the session they belong to."""
    db = SQLAlchemy()
    user = make_user(db)
    apps = [make_app(tmp_path / name, "sqlite:///app.db") for name in ("one", "two")]
    for app in apps:
        db.init_app(app)
        with app.app_context():
            db.create_all()
    with apps[0].app_context():
        mine = user(username="one")
        db.session.add(mine)
        db.session.commit()  # which expires it
        with apps[1].app_context():
            assert mine.username == "one"


def test_custom_scope(tmp_path: Path) -> None:
    """``scopefunc`` gives what has one session, instead of the context."""
    app = make_app(tmp_path)
    scope = ["one"]
    db = SQLAlchemy(app, session_options={"scopefunc": lambda: scope[0]})
    with app.app_context():
        first = db.session()
        scope[0] = "two"
        assert db.session() is not first
        scope[0] = "one"
        assert db.session() is first
        db.session.remove()


def test_isolated_application(tmp_path: Path) -> None:
    """What requests and contexts commit is undone, in all databases, also in a context around."""
    app = make_app(tmp_path, "sqlite:///a.db", SQLALCHEMY_BINDS={"users": "sqlite:///b.db"})
    db = SQLAlchemy(app)
    user = make_user(db, "users")
    log = db.Table("log", sa.Column("id", sa.Integer, primary_key=True))

    @app.post("/")
    def add() -> list[int]:
        db.session.add(user(username="new"))
        db.session.execute(sa.insert(log))
        db.session.commit()
        return counts()

    def counts() -> list[int]:
        return [
            len(db.session.execute(select).all()) for select in (sa.select(user), sa.select(log))
        ]

    with app.app_context():
        db.create_all()
    for _ in range(2):
        with app.app_context():
            with isolated(app.extensions["sessionmgr"].manager):
                assert app.test_client().post("/").json == [1, 1]
                assert counts() == [1, 1]
                db.session.execute(sa.insert(log))  # and nobody ends this session in here
            db.session.remove()
            assert counts() == [0, 0]


# -- classes and options of sessions


def test_plain_session_class_is_routed(tmp_path: Path) -> None:
    """A class of SQLAlchemy's sessions picks engines too, its own methods first."""

    class Plain(PlainSession):
        asked: Any = None

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.mine = True

        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            self.asked = True
            return super().get_bind(*args, **kwargs)

    app = make_app(tmp_path, SQLALCHEMY_BINDS={"users": "sqlite://"})
    db = SQLAlchemy(app, session_options={"class_": Plain, "autoflush": False})
    user = make_user(db, "users")
    with app.app_context():
        session = db.session()
        assert isinstance(session, Plain)
        assert session.mine
        assert not session.autoflush
        assert session.get_bind(user) is db.engines["users"]
        assert session.asked


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"class_": dict}, "class_"),
        ({"binds": {}}, "binds"),
        ({"scopefunc": 1}, "scope"),
    ],
    ids=["unknown", "class", "binds", "scopefunc"],
)
def test_wrong_session_options_raise_at_once(options: dict[str, Any], named: str) -> None:
    """An option that cannot be is told when the extension is made."""
    with pytest.raises(EngineOptionsError, match=named):
        SQLAlchemy(session_options=options)


def test_bind_key_without_database(tmp_path: Path) -> None:
    """A model of an unknown bind key, or without one where there is no default, is an error."""
    app = make_app(tmp_path, None, SQLALCHEMY_BINDS={"users": "sqlite://"})
    db = SQLAlchemy(app)
    lost = make_user(db, "nowhere")
    with app.app_context():
        assert None not in db.engines
        with pytest.raises(NoSuchBindError, match=r"'nowhere' in SQLALCHEMY_BINDS.*'users'"):
            db.session.get(lost, 1)
        with pytest.raises(UnboundExecutionError, match=r"SQLALCHEMY_DATABASE_URI.*'users'"):
            db.session.execute(sa.text("SELECT 1"))
        with pytest.raises(NoSuchBindError, match="nowhere"):
            db.create_all()


def test_bind_added_at_run_time(tmp_path: Path) -> None:
    """A database that the manager is given later is found by its key."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app)
    user = make_user(db, "tenant")
    with app.app_context():
        assert "tenant" not in db.engines
        db.engines.manager.add_bind("tenant", "sqlite://")
        assert list(db.engines) == [None, "tenant"]
        assert "default" not in db.engines  # it is None here
        with pytest.raises(NoSuchBindError, match="'default' in SQLALCHEMY_BINDS"):
            _ = db.engines["default"]
        assert len(db.engines) == 2
        db.create_all("tenant")
        assert names(db, user) == []


# -- tasks and forks


def make_task_app(app: Flask) -> Celery:
    """Make a Celery application whose tasks run in a context, as Flask's documentation has it."""

    class FlaskTask(Task):
        def __call__(self, *args: object, **kwargs: object) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery = Celery("tasks", broker="memory://", task_cls=FlaskTask, set_as_current=False)
    celery.conf.update(task_always_eager=True, task_eager_propagates=True)
    return celery


def test_eager_task_inside_a_request(tmp_path: Path) -> None:
    """A task that runs inside a request neither closes nor commits the request's session."""
    app = make_app(tmp_path, "sqlite:///app.db")
    db = SQLAlchemy(app)
    user = make_user(db)
    celery = make_task_app(app)

    @celery.task(name="count", shared=False)
    def count() -> int:
        return len(names(db, user))

    @app.post("/")
    def request() -> list[Any]:
        saved = user(username="saved")
        db.session.add(saved)
        db.session.commit()
        mine = db.session()
        unsaved = user(username="unsaved")
        db.session.add(unsaved)
        before = count.delay().get()
        assert db.session() is mine
        assert unsaved in db.session
        return [before, saved.username]  # which is loaded: it is attached

    with app.app_context():
        db.create_all()
    assert app.test_client().post("/").get_json() == [1, "saved"]
    with app.app_context():
        assert names(db, user) == ["saved"]


def test_objects_are_detached_when_their_context_ends(tmp_path: Path) -> None:
    """What was not loaded in the context is not loaded after it."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app)
    user = make_user(db)
    with app.app_context():
        db.create_all()
        one = user(username="one")
        db.session.add(one)
        db.session.commit()
    with pytest.raises(DetachedInstanceError):
        _ = one.username


@pytest.mark.parametrize("driver", ["sqlite", "psycopg", "pymysql"])
def test_prefork(driver: str, tmp_path: Path, make_database: Callable[..., Database]) -> None:
    """Requests before a fork, in its children and after it, in the parent, all have pools."""
    url = "sqlite:///app.db" if driver == "sqlite" else make_database(driver).url
    app = make_app(tmp_path, url)
    db = SQLAlchemy(app)
    user = make_user(db)

    @app.post("/<name>")
    def add(name: str) -> str:
        db.session.add(user(username=name))
        db.session.commit()
        return type(db.engine.pool).__name__

    with app.app_context():
        db.create_all()

    def serve(*given: str) -> tuple[set[str], int]:
        client = app.test_client()
        pools = {client.post(f"/{name}").text for name in given}
        [stats] = app.extensions["sessionmgr"].manager.stats().databases
        return pools, stats.connects

    before = app.extensions["sessionmgr"][None]
    assert serve("parent-1", "parent-2") == ({"QueuePool"}, 1)
    children = in_children([lambda i=i: serve(f"child-{i}-1", f"child-{i}-2") for i in range(2)])
    assert children == [({"QueuePool"}, 1)] * 2
    pools, _ = serve("parent-3")
    assert pools == {"QueuePool"}
    assert app.extensions["sessionmgr"][None] is before
    with app.app_context():
        assert names(db, user) == [
            *(f"child-{i}-{n}" for i in range(2) for n in (1, 2)),
            *(f"parent-{n}" for n in (1, 2, 3)),
        ]


def test_context_that_is_forked_has_a_new_session(
    tmp_path: Path, make_database: Callable[..., Database]
) -> None:
    """In a context that is open at a fork the child has a session of its own."""
    app = make_app(tmp_path, make_database("psycopg").url)
    db = SQLAlchemy(app)
    user = make_user(db)
    with app.app_context():
        db.create_all()
        db.session.add(user(username="uncommitted"))
        db.session.flush()
        mine = db.session()

        def child() -> bool:
            other = db.session() is not mine and names(db, user) == []
            db.session.remove()
            return other

        assert in_child(child)
        db.session.commit()
        assert names(db, user) == ["uncommitted"]


def test_create_all_waits_for_others_that_create(
    make_database: Callable[..., Database], tmp_path: Path
) -> None:
    """Tables are made under the database's lock, so any number of workers may do so at once."""
    app = make_app(tmp_path, make_database("psycopg").url)
    db = SQLAlchemy(app)
    make_user(db)
    engine = app.extensions["sessionmgr"][None]
    waiting = sa.text(
        "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_locks.database = pg_database.oid"
        " WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"
    )

    held = threading.Event()

    def create() -> None:
        assert held.wait(30)
        with app.app_context():
            db.create_all()

    def look() -> None:
        with engine.connect() as other, other.begin(), server_lock(other, "schema", "test"):
            held.set()
            wait_until(lambda: other.scalar(waiting), message="create_all to wait")
            assert not sa.inspect(other).has_table("user")

    in_threads([look, create])
    assert sa.inspect(engine).has_table("user")


def test_tables_that_are_there_cost_no_lock(tmp_path: Path) -> None:
    """``create_all`` waits for no writer where nothing is to be made."""
    app = make_app(tmp_path, "sqlite:///app.db")
    db = SQLAlchemy(app, engine_options={"sqlite_busy_timeout": 0.0})
    make_user(db)
    with app.app_context():
        db.create_all()
        with db.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            db.create_all()


def test_explicit_pool_class_is_kept(tmp_path: Path) -> None:
    """Who wants no pool gets none."""
    options = {"poolclass": NullPool}
    app = make_app(tmp_path, "sqlite:///app.db", SQLALCHEMY_ENGINE_OPTIONS=options)
    SQLAlchemy(app)
    assert isinstance(app.extensions["sessionmgr"][None].pool, NullPool)


# -- contexts that end in disorder


def fail(error: BaseException | None) -> None:
    """Fail, as a teardown function."""
    raise RuntimeError("teardown")


@pytest.mark.parametrize("raises", [True, False], ids=["teardown raises", "session anew"])
def test_no_context_gets_the_session_of_another(tmp_path: Path, raises: bool) -> None:
    """A session that no teardown has ended is ended with its context, and begins none after it.

    Flask skips what follows a teardown function that raises; one may also use ``db.session`` after
    the extension's, if it was registered before.
    """
    app = make_app(tmp_path, "sqlite:///app.db")
    db = SQLAlchemy()
    user = make_user(db)

    def write(error: BaseException | None = None) -> None:
        db.session.add(user(username="lost"))
        db.session.flush()

    if not raises:
        app.teardown_appcontext(write)
    db.init_app(app)
    with app.app_context():
        db.create_all()
    for _ in range(2):  # the second is likely to be where the first one was
        with app.app_context():
            assert not db.session.new
            assert not db.session().in_transaction()
        if raises:
            app.teardown_appcontext_funcs[1:] = [fail]
            with pytest.raises(RuntimeError, match="teardown"), app.app_context():
                write()
            app.teardown_appcontext_funcs[1:] = []
    assert app.extensions["sessionmgr"].manager.stats().databases[0].checked_out == 0

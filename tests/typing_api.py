"""What users write, for ``mypy --strict`` to check. It is never run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import URL, Engine, MetaData, ScalarResult, Select, make_url, select, union
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from typing_extensions import assert_type

from sessionmgr import (
    ApplicationDatabase,
    AsyncSessionManager,
    Base,
    DatabasePathError,
    DatabaseStats,
    DatabaseURLError,
    EngineOptionsError,
    ForkedSQLiteError,
    IsolationError,
    ManagerClosedError,
    ManagerPickleError,
    ManagerStats,
    MissingExtraError,
    NoSuchBindError,
    PageNotFoundError,
    PaginationError,
    SchemaLockError,
    SessionManager,
    SessionManagerError,
    TemplateError,
    is_transient,
    paginate,
)
from sessionmgr.ext.billiard import initializer, on_process_exit
from sessionmgr.ext.fastapi import AsyncSessions, Sessions, health_router
from sessionmgr.ext.flask import Pagination as FlaskPagination
from sessionmgr.ext.flask import Session as FlaskSession
from sessionmgr.ext.flask import SQLAlchemy
from sessionmgr.isolation import Isolation
from sessionmgr.keyset import KeysetPage, paginate_keyset
from sessionmgr.pagination import AsyncPagination, Pagination
from sessionmgr.testing import isolated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flask import Flask

URL_TEXT = "postgresql+psycopg://app@db/orders"


def callback(engine: Engine) -> None:
    """Take an engine."""


def callback_with_result(engine: Engine) -> Engine:
    """Take an engine, and return what nobody reads."""
    return engine


# -- making managers

plain = SessionManager()
with_callback = SessionManager(callback)
with_callbacks = SessionManager([callback, callback_with_result])
with_lambda = SessionManager(engine_callback=lambda engine: engine.dispose())
complete = SessionManager(
    callback,
    metadata=MetaData(),
    binds={
        "default": URL_TEXT,
        "users": make_url(URL_TEXT),
        "logs": {"url": URL_TEXT, "pool_size": 5},
    },
    pooling="always",
    engine_options={"pool_size": 3, "ping_if_idle": 1.0},
    session_options={"expire_on_commit": False},
    max_engines=100,
)
binds: dict[str, str] = {"default": URL_TEXT}
SessionManager(binds=binds)
options: Mapping[str, Any] = {"pool_size": 3}
SessionManager(engine_options=options)

# -- wrong ones: mypy warns of an ignore that nothing needs

SessionManager(pooling="sometimes")  # type: ignore[arg-type]
SessionManager(max_engines="many")  # type: ignore[arg-type]
SessionManager(callback, MetaData())  # type: ignore[call-arg]
SessionManager(no_such_argument=1)  # type: ignore[call-arg]

# -- engines and sessions


def use(manager: SessionManager, url: URL) -> None:
    """Call everything, with the types that come out."""
    for dburi in (URL_TEXT, url, "users"):
        assert_type(manager.get_engine(dburi), Engine)
        assert_type(manager.get_engine(dburi, pool_size=3), Engine)
        assert_type(manager.session_factory(dburi), Session)
        assert_type(manager.session_factory(dburi, short_lived_sessions=True), Session)
    assert_type(manager.create_session(URL_TEXT), tuple[Engine, sessionmaker[Session]])
    assert_type(manager.create_session(url, True, echo=True), tuple[Engine, sessionmaker[Session]])
    manager.prepare_models(manager.get_engine(url))
    manager.get_engine(7)  # type: ignore[arg-type]

    with manager.session_factory(url) as opened:
        assert_type(opened, Session)
    with manager.begin(url) as session:
        assert_type(session, Session)
    with manager.begin(url, short_lived_sessions=True, pool_size=3) as session:
        assert_type(session, Session)


def count(session: Session) -> int:
    """Work with a result."""
    return len(session.new)


def run(manager: SessionManager) -> None:
    """Get from ``run`` what the work returns."""
    assert_type(manager.run(URL_TEXT, count), int)
    assert_type(manager.run(URL_TEXT, count, attempts=3, pool_size=3), int)
    assert_type(manager.run("users", lambda session: str(session)), str)
    manager.run(URL_TEXT, lambda: None)  # type: ignore[misc,arg-type]


def state(manager: SessionManager) -> None:
    """State, and letting go."""
    assert_type(manager.forked, bool)
    assert_type(manager.prepared, frozenset[str])
    assert_type(manager.metadata, MetaData)
    stats = manager.stats()
    assert_type(stats, ManagerStats)
    assert_type(stats.pid, int)
    assert_type(stats.databases, tuple[DatabaseStats, ...])
    assert_type(stats.databases[0].size, int | None)
    assert_type(stats.to_json(), str)
    assert_type(stats.as_dict(), dict[str, Any])
    stats.pid = 3  # type: ignore[misc]
    manager.mark_worker()
    manager.invalidate(URL_TEXT)
    manager.dispose()
    manager.close()
    with SessionManager() as entered:
        assert_type(entered, SessionManager)


# -- event loops


async def in_loop(manager: AsyncSessionManager) -> None:
    """Use each method of the asynchronous twin."""
    assert_type(manager.get_engine(URL_TEXT, pool_size=3), AsyncEngine)
    engine, maker = manager.create_session(make_url(URL_TEXT), short_lived_sessions=True)
    assert_type(engine, AsyncEngine)
    assert_type(maker, async_sessionmaker[AsyncSession])
    async with await manager.session_factory(URL_TEXT) as session:
        assert_type(session, AsyncSession)
    async with manager.begin("users", write=False) as session:
        assert_type(session, AsyncSession)

    async def count(session: AsyncSession) -> int:
        return 1

    assert_type(await manager.run(URL_TEXT, count, attempts=3), int)
    await manager.prepare_models(engine)
    assert_type(manager.stats(), ManagerStats)
    await manager.invalidate(URL_TEXT)
    await manager.dispose()
    async with manager as entered:
        assert_type(entered, AsyncSessionManager)
    await manager.close()


# -- FastAPI

sessions = Sessions(plain, start_timeout=10.0)
async_sessions = AsyncSessions(AsyncSessionManager(pooling="always"))
app = FastAPI(lifespan=sessions.lifespan)
app.include_router(health_router(sessions, async_sessions))


@app.post("/users")
def add_user(
    users: Annotated[Session, Depends(sessions.get("users"))],
    logs: Annotated[Session, Depends(sessions.get(make_url(URL_TEXT), write=False))],
) -> None:
    """Take sessions that block."""
    assert_type(users, Session)


@app.get("/users")
async def list_users(
    users: Annotated[AsyncSession, Depends(async_sessions.get("users"))],
) -> None:
    """Take an awaited one."""
    assert_type(users, AsyncSession)


# -- an application's own database

database = ApplicationDatabase("App")
ApplicationDatabase(
    "App",
    url=make_url("sqlite://"),
    env_var=None,
    development=Path("dev.db"),
    filename="app.db",
    template=Path("template.db"),
    base=Base,
    root=Path(),
    engine_options={"pool_size": 1},
    session_options={"autoflush": True},
)


async def application() -> None:
    """Use it for threads, and for event loops."""
    assert_type(database.path, Path)
    assert_type(database.data_root, Path)
    assert_type(database.url, URL)
    assert_type(database.engine, Engine)
    assert_type(database.async_engine, AsyncEngine)
    assert_type(database.Base, type[DeclarativeBase])
    assert_type(database.SessionLocal, scoped_session[Session])
    assert_type(database.AsyncSessionLocal, async_sessionmaker[AsyncSession])
    with database.SessionLocal() as session:
        assert_type(session, Session)
    async with database.AsyncSessionLocal() as async_session:
        assert_type(async_session, AsyncSession)
    database.init_db()
    database.ensure_schema()
    await database.async_ensure_schema()
    with database as entered:
        assert_type(entered, ApplicationDatabase)
    async with database as entered:
        assert_type(entered, ApplicationDatabase)


# -- tests


def undone(manager: SessionManager) -> None:
    """Isolate in a block."""
    with isolated(manager) as isolation:
        assert_type(isolation, Isolation)


async def undone_async(manager: AsyncSessionManager, other: SessionManager) -> None:
    """Isolate managers of both kinds in a coroutine."""
    async with isolated(manager, other) as isolation:
        assert_type(isolation, Isolation)


# -- errors, models, billiard

errors: list[type[SessionManagerError]] = [
    DatabaseURLError,
    EngineOptionsError,
    ForkedSQLiteError,
    IsolationError,
    ManagerClosedError,
    ManagerPickleError,
    NoSuchBindError,
    SchemaLockError,
    DatabasePathError,
    MissingExtraError,
    PageNotFoundError,
    PaginationError,
    TemplateError,
]
assert_type(is_transient(ValueError()), bool)


class Order(Base):
    """A mapped class."""

    __tablename__ = "order"


# -- pages


class Line(Base):
    """A mapped class with columns."""

    __tablename__ = "line"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


LINES = select(Line).order_by(Line.id)


def pages(session: Session, scoped: scoped_session[Session]) -> None:
    """Read pages."""
    page = paginate(session, LINES, page=2, per_page=50, max_per_page=None, count=False)
    assert_type(page, Pagination)
    assert_type(page.next(error_out=True), Pagination)
    assert_type(page.items, list[Any])
    assert_type(page.total, int | None)
    assert_type([*page.iter_pages(left_edge=1)], list[int | None])
    assert_type(paginate(scoped, select(Line.id, Line.text), page=None), Pagination)
    assert_type(paginate(session, union(select(Line.id), select(Line.id))), Pagination)
    place = paginate_keyset(session, LINES, after=None)
    assert_type(place, KeysetPage)
    assert_type(place.after, str | None)
    assert_type(paginate_keyset(scoped, select(Line.id, Line.text), after="x"), KeysetPage)
    paginate(session, "SELECT 1")  # type: ignore[call-overload]
    paginate(session, LINES, pages=2)  # type: ignore[call-overload]


async def awaited_pages(session: AsyncSession, scoped: async_scoped_session[AsyncSession]) -> None:
    """Read pages in an event loop."""
    page = await paginate(session, LINES, page=2)
    assert_type(page, AsyncPagination)
    assert_type(await page.prev(), AsyncPagination)
    assert_type(await paginate(scoped, LINES), AsyncPagination)
    assert_type(await paginate_keyset(session, LINES), KeysetPage)


# -- several databases in one session


def tenant_url(bind_key: str) -> URL | None:
    """Find the URL of a tenant."""
    return make_url(f"{URL_TEXT}_{bind_key}") if bind_key.startswith("tenant") else None


def route(manager: SessionManager) -> None:
    """Open routed sessions, with the databases that come and go."""
    SessionManager(binds=binds, resolver=tenant_url)
    SessionManager(resolver=lambda _: {"url": URL_TEXT, "pool_size": 2})
    SessionManager(resolver=URL_TEXT)  # type: ignore[arg-type]
    manager.add_bind("logs", {"url": URL_TEXT, "pool_size": 5})
    manager.remove_bind("logs")
    assert_type(manager.session(expire_on_commit=False, twophase=True), Session)
    assert_type(manager.scoped(), scoped_session[Session])
    assert_type(manager.scoped(lambda: 1), scoped_session[Session])


async def route_in_loop(manager: AsyncSessionManager) -> None:
    """Do the same in an event loop."""
    manager.add_bind("logs", URL_TEXT)
    await manager.remove_bind("logs")
    assert_type(manager.session(), AsyncSession)
    assert_type(manager.scoped(lambda: 1), async_scoped_session[AsyncSession])


# -- Flask

db = SQLAlchemy(engine_options={"pool_size": 5}, session_options={"expire_on_commit": False})


def view(app: Flask, statement: Select[tuple[Line]]) -> None:
    """Use the extension in an application."""
    db.init_app(app)
    assert_type(db.session, scoped_session[FlaskSession])
    assert_type(db.session().get(Order, 1), Order | None)
    assert_type(db.session().scalars(select(Order)), ScalarResult[Order])
    assert_type(db.engine, Engine)
    assert_type(db.engines["logs"], Engine)
    assert_type(db.get_or_404(Line, 1, description="no such line"), Line)
    assert_type(db.paginate(statement, per_page=10), FlaskPagination)
    assert_type(db.metadatas[None], MetaData)
    db.create_all()
    db.drop_all(bind_key=["logs", None])


initializer()
on_process_exit(17, 0)

"""FastAPI: sessions of requests, and the lifespan."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import UniqueConstraint, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sessionmgr import DatabasesNotReadyError, EngineOptionsError, NoSuchBindError, SessionManager
from sessionmgr.ext.fastapi import Sessions, health_router
from tests.fastapi_apps import AnySessions, Application, client, make_app, talk
from tests.items import Item, ItemBase, item_names
from tests.servers.server import APP_PASSWORD
from tests.sqlite_helpers import can_write
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["tests.fastapi_fixtures"]

pytestmark = pytest.mark.usefixtures("no_thread_left")


# -- sessions of requests


@pytest.mark.parametrize(
    ("outcome", "status", "kept"),
    [
        ("", 200, True),
        ("HTTPException", 409, False),
        ("error", 500, False),
        ("returned", 409, True),
        ("rolled back", 200, False),
    ],
)
def test_outcome_decides(application: Application, outcome: str, status: int, kept: bool) -> None:
    """What returns is committed, whatever its status; what raises is rolled back."""

    async def request() -> int:
        async with client(make_app(application.sessions())) as started:
            response = await started.post("/items/one", params={"outcome": outcome})
            assert all(pool.checked_out == 0 for pool in application.manager.stats().databases)
            return response.status_code

    assert asyncio.run(request()) == status
    assert application.names() == (["one"] if kept else [])
    assert application.manager.stats().databases == ()  # the lifespan's end closed them


def test_one_session_for_a_request_and_database(application: Application) -> None:
    """All that depend on one database in a request share a session; another's is its own."""

    async def request() -> list[bool]:
        async with client(make_app(application.sessions())) as started:
            return (await started.get("/shared")).json()

    assert asyncio.run(request()) == [True, True, False]


def test_two_databases_in_a_request(application: Application) -> None:
    """Rows of both databases are kept or dropped together, by the outcome."""

    async def requests() -> None:
        async with client(make_app(application.sessions())) as started:
            assert (await started.post("/both/kept")).status_code == 200
            failed = await started.post("/both/dropped", params={"outcome": "HTTPException"})
            assert failed.status_code == 409
            # the database of the last parameter commits first: its error rolls the other back
            assert (await started.post("/items/users-only")).status_code == 200
            with application.looker.begin("logs") as session:
                session.add(Item(name="taken"))
            assert (await started.post("/both/taken")).status_code == 500

    asyncio.run(requests())
    assert application.names("users") == ["kept", "users-only"]
    assert application.names("logs") == ["kept", "taken"]


@pytest.mark.parametrize("driver", ["sqlite", "aiosqlite"])
def test_requests_that_read_and_write_wait_for_each_other(
    make_application: Callable[..., Application], driver: str
) -> None:
    """On SQLite, none of many requests at once is refused, and no update is lost."""
    application = make_application(driver)

    async def requests() -> list[int]:
        async with client(make_app(application.sessions())) as started:
            assert (await started.post("/items/0")).status_code == 200
            answers = await asyncio.gather(*(started.post("/count") for _ in range(60)))
            return sorted(int(answer.json()) for answer in answers)

    assert asyncio.run(requests()) == list(range(1, 61))
    assert application.names() == ["60"]


@pytest.mark.parametrize(
    ("method", "write", "is_free"),
    [
        ("GET", None, True),
        ("GET", True, False),
        ("POST", None, False),
        ("DELETE", None, False),
        ("POST", False, True),
    ],
)
@pytest.mark.parametrize("driver", ["sqlite", "aiosqlite"])
def test_lock_for_writing_by_method(
    make_application: Callable[..., Application],
    driver: str,
    method: str,
    write: bool | None,
    is_free: bool,
) -> None:
    """A request that may change something has the lock with its first statement, unless told."""
    application = make_application(driver)
    sessions = application.sessions()
    app = FastAPI(lifespan=sessions.lifespan)
    file = Path(str(application.looker.get_engine("users").url.database))

    opened = Depends(sessions.get("users", write=write))

    @app.api_route("/", methods=[method])
    async def free(session: Any = opened) -> bool:
        assert can_write(file)
        read = session.scalars(select(Item))
        if isinstance(session, AsyncSession):
            await read
        return can_write(file)

    async def request() -> bool:
        async with client(app) as started:
            return (await started.request(method, "/")).json()

    assert asyncio.run(request()) is is_free


def test_commit_comes_before_the_response(application: Application) -> None:
    """When the response begins, its row is there for others to see."""
    app = make_app(application.sessions())
    seen = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def watched_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen.append(application.names())
            await send(message)

        await app(scope, receive, watched_send)

    async def request() -> None:
        app_client = client(app)
        async with app_client as started:
            started._transport.app = watched  # type: ignore[attr-defined]
            assert (await started.post("/items/one")).status_code == 200

    asyncio.run(request())
    assert seen == [["one"]]


class PromiseBase(DeclarativeBase):
    """Base of a table whose constraint is looked at by the commit."""


class Promise(PromiseBase):
    """A row with a name that no other row has when a transaction ends."""

    __tablename__ = "promise"
    __table_args__ = (UniqueConstraint("name", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def promise_app(sessions: AnySessions) -> FastAPI:
    """Make an application that adds rows which only the commit refuses."""
    app = FastAPI(lifespan=sessions.lifespan)
    users = Depends(sessions.get("users"))

    @app.post("/{name}")
    async def promise(name: str, session: Any = users) -> str:
        session.add(Promise(name=name))
        if isinstance(session, AsyncSession):
            await session.flush()
        else:
            session.flush()
        return "done"

    return app


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_commit_that_fails_is_an_error_of_the_request(
    make_application: Callable[..., Application], driver: str
) -> None:
    """A constraint that the commit finds broken gives a 500, or what a handler makes of it."""
    application = make_application(driver, "users", metadata=PromiseBase.metadata)
    app = promise_app(application.sessions())

    async def requests() -> list[int]:
        async with client(app) as started:
            codes = [(await started.post("/one")).status_code for _ in range(2)]

            @app.exception_handler(IntegrityError)
            async def conflict(request: Any, error: Exception) -> JSONResponse:
                return JSONResponse({}, status_code=409)

            app.middleware_stack = None  # it was built without the handler
            return [*codes, (await started.post("/one")).status_code]

    assert asyncio.run(requests()) == [200, 500, 409]


def test_session_is_closed_for_good(application: Application) -> None:
    """A streamed response that reads from the session gets an error, and takes no connection."""

    async def request() -> None:
        async with client(make_app(application.sessions())) as started:
            await started.post("/items/one")
            started._transport.raise_app_exceptions = True  # type: ignore[attr-defined]
            with pytest.raises(InvalidRequestError, match="permanently closed"):
                await started.get("/stream")
            assert all(pool.checked_out == 0 for pool in application.manager.stats().databases)

    asyncio.run(request())


def test_session_options_have_the_last_word(make_application: Callable[..., Application]) -> None:
    """Who sets ``close_resets_only`` himself gets sessions that can be used again."""
    application = make_application("sqlite", session_options={"close_resets_only": True})

    async def request() -> str:
        async with client(make_app(application.sessions())) as started:
            await started.post("/items/one")
            return (await started.get("/stream")).text

    assert asyncio.run(request()) == "1"


def test_websocket(application: Application) -> None:
    """A websocket has one session; what it did not commit is rolled back when the client leaves."""
    app = make_app(application.sessions())

    async def conversation() -> list[str]:
        async with client(app):
            return await talk(app, "/talk", "keep this", "not this")

    assert asyncio.run(conversation()) == ["keep this", "keep this, not this"]
    assert application.names() == ["keep this"]


ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0}


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_more_requests_than_threads_and_connections(
    make_application: Callable[..., Application], driver: str
) -> None:
    """Requests that wait for a connection hold no thread, which those that have one need."""
    application = make_application(driver, engine_options=ONE_CONNECTION)

    async def requests() -> list[int]:
        async with client(make_app(application.sessions())) as started:
            paths = (f"/both/{number}" for number in range(60))
            return [r.status_code for r in await asyncio.gather(*map(started.post, paths))]

    assert asyncio.run(requests()) == [200] * 60
    assert len(application.names("users")) == len(application.names("logs")) == 60


def test_request_that_gets_no_connection(make_application: Callable[..., Application]) -> None:
    """A request waits for others' connections as long as the pool would, and says on what."""
    application = make_application(
        "psycopg", "users", engine_options={**ONE_CONNECTION, "pool_timeout": 0.2}
    )
    sessions = application.sessions()
    app = FastAPI(lifespan=sessions.lifespan)
    users = Depends(sessions.get("users"))
    begun, ended = asyncio.Event(), asyncio.Event()

    @app.get("/")
    async def hold(session: Any = users) -> None:
        begun.set()
        await ended.wait()

    async def requests() -> None:
        async with client(app) as started:
            holding = asyncio.create_task(started.get("/"))
            await begun.wait()
            started._transport.raise_app_exceptions = True  # type: ignore[attr-defined]
            with pytest.raises(PoolTimeoutError, match=r"'users' .* 1 requests have all") as e:
                await started.get("/")
            assert APP_PASSWORD not in str(e.value)
            ended.set()
            assert (await holding).status_code == 200
            assert (await started.get("/")).status_code == 200

    asyncio.run(requests())


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_websocket_that_waits_holds_no_connection(
    make_application: Callable[..., Application], driver: str
) -> None:
    """Beside a websocket that has committed, requests get the only connection."""
    application = make_application(driver, engine_options=ONE_CONNECTION)
    app = make_app(application.sessions())

    async def conversation() -> None:
        async with client(app) as started:

            async def request() -> None:
                assert (await started.post("/items/other")).status_code == 200

            assert await talk(app, "/talk", "keep", meanwhile=request) == ["keep"]

    asyncio.run(conversation())
    assert application.names() == ["keep", "other"]


def test_sessions_in_memory() -> None:
    """A database in memory is one for all requests and threads."""
    manager = SessionManager(
        binds={"users": "sqlite://", "logs": "sqlite://"}, metadata=ItemBase.metadata
    )

    async def requests() -> None:
        async with client(make_app(Sessions(manager))) as started:
            for name in ("one", "two"):
                assert (await started.post(f"/items/{name}")).status_code == 200
            with manager.session_factory("users") as session:
                assert item_names(session) == ["one", "two"]

    asyncio.run(requests())


def test_wrong_databases_raise_when_the_application_is_built(application: Application) -> None:
    """An unknown bind key is told of at once, and one callable stands for one database."""
    sessions = application.sessions()
    with pytest.raises(NoSuchBindError, match="'logs', 'users'"):
        sessions.get("nobody")
    assert sessions.get("users") is sessions.get("users")
    assert sessions.get("users") is not sessions.get("logs")
    assert sessions.get("sqlite:///a.db") is sessions.get("db+sqlite:///a.db")
    assert application.manager.stats().databases == ()


def test_dependency_can_be_overridden(application: Application) -> None:
    """Tests of applications put a session of their own in a dependency's place."""
    sessions = application.sessions()
    app = make_app(sessions)
    app.dependency_overrides[sessions.get("users")] = lambda: "theirs"
    app.dependency_overrides[sessions.get("logs")] = lambda: "theirs"

    async def request() -> list[bool]:
        async with client(app) as started:
            return (await started.get("/shared")).json()

    assert asyncio.run(request()) == [True, True, True]


# -- the lifespan


def test_lifespan_prepares_and_keeps_connections(application: Application) -> None:
    """The start makes tables in each bind and keeps connections; a second start works."""
    app = make_app(application.sessions())

    async def start() -> None:
        async with app.router.lifespan_context(app):
            stats = application.manager.stats()
            assert stats.forked
            assert {pool.database for pool in stats.databases} == {"users", "logs"}
            assert application.manager.prepared == {"users", "logs"}
            assert application.names("users") == application.names("logs") == []
        assert application.manager.stats().databases == ()

    for _ in range(2):
        asyncio.run(start())


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("fault", ["refuse", "stall"])
def test_start_without_a_database_fails(
    make_application: Callable[..., Application], driver: str, fault: str
) -> None:
    """An application whose database is down, or does not answer, says which and does not start."""
    application = make_application(driver)
    target = application.looker._key("logs").url
    with TCPProxy(target) as proxy:
        urls = {"users": application.looker._key("users").url, "logs": proxy.url}
        if fault == "stall":
            del urls["users"]  # which may take longer, too, on a busy machine
        broken = Application(driver, urls)
        getattr(proxy, fault)()
        sessions = broken.sessions(start_timeout=30.0 if fault == "refuse" else 0.3)

        async def start() -> None:
            async with sessions.lifespan():
                pytest.fail("it started")

        with pytest.raises(DatabasesNotReadyError) as caught:
            asyncio.run(start())
        text = str(caught.value)
        assert f"1 of its {len(urls)} databases" in text
        assert "database 'logs' (postgresql+" in text
        assert APP_PASSWORD not in text
        why = {"refuse": "cannot be reached", "stall": "no answer in 0.3 s (start_timeout)"}
        assert why[fault] in text
        assert broken.manager.stats().databases == ()


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan"), "2", None, True])
def test_time_limits_are_checked(seconds: Any) -> None:
    """A time limit is a positive number of seconds."""
    with pytest.raises(EngineOptionsError, match="start_timeout must be a positive number"):
        Sessions(SessionManager(), start_timeout=seconds)
    with pytest.raises(EngineOptionsError, match="timeout must be a positive number"):
        health_router(Sessions(SessionManager()), timeout=seconds)

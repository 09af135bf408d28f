"""FastAPI: the endpoint that shows the databases' health."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from sessionmgr import EngineOptionsError, SessionManager
from sessionmgr.ext.fastapi import Sessions, health_router
from tests.fastapi_apps import ASYNC_DRIVERS, AnySessions, Application, asking_threads, client
from tests.servers.server import APP_PASSWORD
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.servers import Database
    from tests.servers.postgresql import PostgreSQL

pytest_plugins = ["tests.fastapi_fixtures"]

pytestmark = pytest.mark.usefixtures("no_thread_left")


def health_app(sessions: AnySessions, timeout: float = 30.0) -> FastAPI:
    """Make an application with a health endpoint, and one that needs no database."""
    app = FastAPI(lifespan=sessions.lifespan)
    app.include_router(health_router(sessions, timeout=timeout))

    @app.get("/alive")
    async def alive() -> bool:
        return True

    return app


def test_health_of_databases_that_answer(application: Application) -> None:
    """Each bind and each other database in use is shown, with its pool, without passwords."""
    manager = application.manager
    other = manager._key("users").url

    async def request() -> dict[str, Any]:
        async with client(health_app(application.sessions())) as started:
            manager.get_engine(other)
            response = await started.get("/health/databases")
            assert response.status_code == 200
            assert APP_PASSWORD not in response.text
            return response.json()

    health = asyncio.run(request())
    assert health["reachable"]
    assert [database["database"] for database in health["databases"]] == [
        "users",
        "logs",
        str(manager._key(other)),
    ]
    for database in health["databases"]:
        assert database["reachable"]
        assert database["error"] is None
        assert database["latency"] > 0
        [pool] = database["pools"]
        assert (pool["checked_out"], pool["idle"]) == (0, 1)


NO_ANSWER = "no answer in 0.3 s"
LOST = "OperationalError: it cannot be reached, or the connection was lost"


def sick_error(response: Any) -> str:
    """Return why the one database of an application is shown as not reachable."""
    assert response.status_code == 503
    [shown] = response.json()["databases"]
    assert (shown["reachable"], shown["latency"]) == (False, None)
    return str(shown["error"])


SWALLOWED = (
    "psycopg",
    "psycopg2",
    "pymysql",
    "mysqlclient",
    "asyncpg",
    "psycopg-async",
    "asyncmy",
    "aiomysql",
)


@pytest.mark.parametrize("idle", [True, False], ids=["pooled", "connecting"])
@pytest.mark.parametrize("driver", SWALLOWED)
def test_health_of_a_database_that_swallows(
    make_application: Callable[..., Application], driver: str, idle: bool
) -> None:
    """A database that does not answer is told of in time, holds one connection, and comes back.

    Who asks first gives up first, and breaks the connection off. Who asks with him finds that it
    is lost if it comes to that before his own time is up; not where the connection was being made,
    or tested, for then another one is made, in vain.
    """
    application = make_application(driver, "users")
    with TCPProxy(application.looker._key("users").url) as proxy:
        # SQLAlchemy 2.0 cannot test connections of these beside PyMySQL 1.2
        ping = None if driver in ("asyncmy", "aiomysql") else 0.0
        watched = Application(driver, {"users": proxy.url}, engine_options={"ping_if_idle": ping})
        app = health_app(watched.sessions(), timeout=0.3)

        async def requests() -> None:
            async with client(app) as started:
                if not idle:
                    await forget(watched.manager)
                proxy.stall()
                arrived: list[Any] = []

                async def ask(path: str) -> None:
                    arrived.append(await started.get(path))

                paths = ["/health/databases", "/health/databases", "/alive"]
                await asyncio.gather(*map(ask, paths))
                alive, *sick = arrived
                assert alive.request.url.path == "/alive"  # it did not wait for the database
                assert alive.status_code == 200
                first, second = map(sick_error, sick)
                assert first == NO_ANSWER
                assert second in ({NO_ANSWER, LOST} if idle and ping is None else {NO_ANSWER})
                assert len(asking_threads()) <= 1
                proxy.resume()
                while (await started.get("/health/databases")).status_code != 200:
                    assert len(asking_threads()) <= 1
                [pool] = watched.manager.stats().databases
                assert (pool.checked_out, pool.idle) == (0, 1)

        asyncio.run(asyncio.wait_for(requests(), 60.0))


@pytest.mark.parametrize("ping", [0.0, None], ids=["tested", "untested"])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg", "psycopg-async"])
def test_health_gives_up_a_connection_that_hangs(
    make_application: Callable[..., Application], driver: str, ping: float | None
) -> None:
    """A connection that never answers is broken off, and the next question gets another one."""
    application = make_application(driver, "users", engine_options={"ping_if_idle": ping})
    app = health_app(application.sessions(), timeout=0.3)

    async def requests(backends: list[int]) -> None:
        async with client(app) as started:
            name = application.looker._key("users").url.database
            [backend] = application.server.connections(name)
            backends.append(backend)
            os.kill(backend, signal.SIGSTOP)
            response = await started.get("/health/databases")
            assert response.status_code == 503
            assert response.json()["databases"][0]["error"] == "no answer in 0.3 s"
            while (await started.get("/health/databases")).status_code != 200:
                assert len(asking_threads()) <= 1
            [pool] = application.manager.stats().databases
            assert (pool.checked_out, pool.idle) == (0, 1)

    stopped: list[int] = []
    try:
        asyncio.run(asyncio.wait_for(requests(stopped), 30.0))
    finally:
        for backend in stopped:
            os.kill(backend, signal.SIGCONT)


async def forget(manager: Any) -> None:
    """Drop the pools of a manager of either kind."""
    disposal: Awaitable[None] | None = manager.dispose()
    if disposal is not None:
        await disposal


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_health_of_a_stopped_server(
    make_database: Callable[..., Database],
    private_postgresql: PostgreSQL,
    tmp_path: Path,
    driver: str,
) -> None:
    """A server that stops is told of, beside a database that goes on, and found when it is back."""
    base = ASYNC_DRIVERS.get(driver, (driver, ""))[0]
    url = make_database(base, private_postgresql).url
    running = make_database(base).url
    application = Application(driver, {"users": url, "logs": running})

    async def requests() -> None:
        async with client(health_app(application.sessions())) as started:
            assert (await started.get("/health/databases")).status_code == 200
            private_postgresql.process.stop()
            # the first finds out; with SQLAlchemy 2.0 asyncpg has no good words for it
            assert (await started.get("/health/databases")).status_code == 503
            response = await started.get("/health/databases")
            assert response.status_code == 503
            users, logs = response.json()["databases"]
            assert (users["reachable"], logs["reachable"]) == (False, True)
            assert "it cannot be reached, or the connection was lost" in users["error"]
            assert APP_PASSWORD not in response.text
            private_postgresql.process.start()
            assert (await started.get("/health/databases")).status_code == 200

    asyncio.run(requests())


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "asyncpg", "asyncmy"])
def test_health_of_a_database_that_refuses(
    make_application: Callable[..., Application], driver: str
) -> None:
    """A wrong password is told of in words of our own, which hold no secret."""
    application = make_application(driver, "users")
    manager = application.manager
    wrong = manager._key("users").url.set(password="wrong-password-that-nobody-may-see")

    async def request() -> dict[str, Any]:
        async with client(health_app(application.sessions())) as started:
            manager.get_engine(wrong)
            response = await started.get("/health/databases")
            assert response.status_code == 503
            assert "nobody-may-see" not in response.text
            return response.json()

    users, refused = asyncio.run(request())["databases"]
    assert users["reachable"]
    assert refused["error"].endswith(
        ": it refuses: check user, password, the database's name, and rights"
    )


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_health_of_a_pool_in_use(make_application: Callable[..., Application], driver: str) -> None:
    """A pool without a free connection is told of, with its numbers."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    application = make_application(driver, "users", engine_options=options)

    async def request() -> dict[str, Any]:
        async with client(health_app(application.sessions())) as started:
            connection = application.manager.get_engine("users").connect()
            if driver == "asyncpg":
                await connection
            response = await started.get("/health/databases")
            closing = connection.close()
            if driver == "asyncpg":
                await closing
            assert response.status_code == 503
            assert (await started.get("/health/databases")).status_code == 200
            return response.json()

    [users] = asyncio.run(request())["databases"]
    assert "all connections of the pool were in use" in users["error"]
    assert users["pools"][0]["checked_out"] == 1


def test_health_of_several_sessions_in_the_openapi(application: Application) -> None:
    """One endpoint shows the databases of several managers, at a path of choice, with its model."""
    other = Sessions(SessionManager(binds={"memory": "sqlite://"}))
    app = FastAPI()
    app.include_router(health_router(application.sessions(), other, path="/databases"))

    async def request() -> tuple[Any, Any]:
        async with client(app) as started:
            health = (await started.get("/databases")).json()
            await forget(application.manager)
            return health, (await started.get("/openapi.json")).json()

    health, openapi = asyncio.run(request())
    names = [database["database"] for database in health["databases"]]
    assert names == ["users", "logs", "memory"]
    responses = openapi["paths"]["/databases"]["get"]["responses"]
    for code in ("200", "503"):
        schema = responses[code]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Health"}
    assert set(openapi["components"]["schemas"]["DatabaseHealth"]["required"]) == {
        "database",
        "reachable",
        "latency",
        "error",
        "pools",
    }


@pytest.mark.parametrize("wrong", [(), (SessionManager(),)], ids=["none", "manager"])
def test_health_router_takes_sessions(wrong: tuple[Any, ...]) -> None:
    """A health endpoint without sessions, or of something else, is an error."""
    with pytest.raises(EngineOptionsError, match="takes one or more Sessions or AsyncSessions"):
        health_router(*wrong)

"""Two applications that do the same, with sessions that block and with awaited ones."""

# Without "from __future__ import annotations": FastAPI reads those of the functions in here.

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import URL, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sessionmgr import SessionManager
from sessionmgr.asyncio import AsyncSessionManager
from sessionmgr.ext.fastapi import AsyncSessions, Sessions
from tests.items import Item, ItemBase, count_items, item_names

__all__ = (
    "ASYNC_DRIVERS",
    "AnySessions",
    "Application",
    "asking_threads",
    "async_app",
    "client",
    "make_app",
    "sync_app",
    "talk",
)

AnySessions = Sessions | AsyncSessions

ASYNC_DRIVERS = {
    "asyncpg": ("psycopg", "postgresql+asyncpg"),
    "psycopg-async": ("psycopg", "postgresql+psycopg"),
    "asyncmy": ("pymysql", "mysql+asyncmy"),
    "aiomysql": ("pymysql", "mysql+aiomysql"),
    "aiosqlite": ("sqlite", "sqlite+aiosqlite"),
}
"""Async driver -> the driver by which the tests look at its databases, and the dialect."""


class Application:
    """Databases with bind keys, sessions on them, and another manager to look at them.

    :param driver: one of DRIVERS, ``sqlite``, or one of :data:`ASYNC_DRIVERS`.
    :param urls: bind key -> URL, for a driver that blocks.
    :param options: of the manager.
    """

    def __init__(self, driver: str, urls: dict[str, URL | str], **options: Any) -> None:
        self.driver = driver
        #: where its databases are; None for files
        self.server: Any = None
        self.looker = SessionManager(binds=urls, metadata=ItemBase.metadata)
        options = {"metadata": ItemBase.metadata, **options}
        if driver in ASYNC_DRIVERS:
            name = ASYNC_DRIVERS[driver][1]
            binds = {key: bind.url.set(drivername=name) for key, bind in self._keys()}
            self.manager: Any = AsyncSessionManager(binds=binds, **options)
        else:
            self.manager = SessionManager(binds=urls, **options)

    def _keys(self) -> Iterator[tuple[str, Any]]:
        for key in self.looker._binds.databases():
            yield key, self.looker._key(key)

    def sessions(self, **options: Any) -> AnySessions:
        """Make sessions on the databases."""
        kind = AsyncSessions if self.driver in ASYNC_DRIVERS else Sessions
        return kind(self.manager, **options)

    def names(self, bind: str = "users") -> list[str]:
        """Return the names of the items in a database."""
        with self.looker.session_factory(bind) as session:
            return item_names(session)


def make_app(sessions: Sessions | AsyncSessions) -> FastAPI:
    """Make the application for sessions of either kind, with the bind keys users and logs."""
    return sync_app(sessions) if isinstance(sessions, Sessions) else async_app(sessions)


def sync_app(sessions: Sessions) -> FastAPI:
    """Make the application with path operations that run in threads.

    What a path operation with a response model returns, as of ``/both``, is checked in one, too.
    """
    app = FastAPI(lifespan=sessions.lifespan)
    Users = Annotated[Session, Depends(sessions.get("users"))]  # noqa: N806 - a type
    Logs = Annotated[Session, Depends(sessions.get("logs"))]  # noqa: N806 - a type

    def current_user(
        session: Users,
    ) -> Session:
        return session

    @app.post("/items/{name}")
    def add(name: str, users: Users, outcome: str = "") -> Any:
        users.add(Item(name=name))
        users.flush()
        if outcome == "rolled back":
            users.rollback()
        return end(outcome)

    @app.post("/both/{name}")
    def add_to_both(name: str, users: Users, logs: Logs, outcome: str = "") -> dict[str, str]:
        users.add(Item(name=name))
        users.flush()
        logs.add(Item(name=name))
        return end(outcome)

    @app.post("/count")
    def count(users: Users) -> str:
        item = users.scalars(select(Item)).one()
        item.name = str(int(item.name) + 1)
        return item.name

    @app.get("/shared")
    def shared(
        first: Users,
        second: Users,
        user: Annotated[Session, Depends(current_user)],
        logs: Logs,
    ) -> list[bool]:
        return [first is second, first is user, first is logs]

    @app.get("/stream")
    def stream(users: Users) -> StreamingResponse:
        def lines() -> Iterator[str]:
            yield str(count_items(users))

        return StreamingResponse(lines())

    @app.websocket("/talk")
    async def talk_to(websocket: WebSocket, users: Users) -> None:
        await websocket.accept()
        while True:
            text = await websocket.receive_text()
            users.add(Item(name=text))
            names = item_names(users)
            if text.startswith("keep"):
                users.commit()
            await websocket.send_text(", ".join(names))

    return app


def async_app(sessions: AsyncSessions) -> FastAPI:
    """Make the application with path operations that are coroutines."""
    app = FastAPI(lifespan=sessions.lifespan)
    Users = Annotated[AsyncSession, Depends(sessions.get("users"))]  # noqa: N806 - a type
    Logs = Annotated[AsyncSession, Depends(sessions.get("logs"))]  # noqa: N806 - a type

    async def current_user(
        session: Users,
    ) -> AsyncSession:
        return session

    @app.post("/items/{name}")
    async def add(name: str, users: Users, outcome: str = "") -> Any:
        users.add(Item(name=name))
        await users.flush()
        if outcome == "rolled back":
            await users.rollback()
        return end(outcome)

    @app.post("/both/{name}")
    async def add_to_both(name: str, users: Users, logs: Logs, outcome: str = "") -> dict[str, str]:
        users.add(Item(name=name))
        await users.flush()
        logs.add(Item(name=name))
        return end(outcome)

    @app.post("/count")
    async def count(users: Users) -> str:
        item = (await users.scalars(select(Item))).one()
        item.name = str(int(item.name) + 1)
        return item.name

    @app.get("/shared")
    async def shared(
        first: Users,
        second: Users,
        user: Annotated[AsyncSession, Depends(current_user)],
        logs: Logs,
    ) -> list[bool]:
        return [first is second, first is user, first is logs]

    @app.get("/stream")
    async def stream(users: Users) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield str(await users.scalar(select(Item.id)))

        return StreamingResponse(lines())

    @app.websocket("/talk")
    async def talk_to(websocket: WebSocket, users: Users) -> None:
        await websocket.accept()
        while True:
            text = await websocket.receive_text()
            users.add(Item(name=text))
            names = await users.run_sync(item_names)
            if text.startswith("keep"):
                await users.commit()
            await websocket.send_text(", ".join(names))

    return app


def end(outcome: str) -> Any:
    """End a path operation in the way that a test wants."""
    if outcome == "HTTPException":
        raise HTTPException(409)
    if outcome == "error":
        raise RuntimeError("the path operation failed")
    if outcome == "returned":
        return JSONResponse({}, status_code=409)
    return {}


@asynccontextmanager
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Start an application in this process, and give a client of it; errors arrive as 500."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60.0) as started,
    ):
        yield started


async def talk(
    app: FastAPI, path: str, *texts: str, meanwhile: Callable[[], Awaitable[None]] | None = None
) -> list[str]:
    """Send texts to a websocket, each after the answer to the last, leave, and give answers.

    :param meanwhile: awaited after each answer.
    """
    to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    answers: list[str] = []
    left = iter(
        [
            *({"type": "websocket.receive", "text": text} for text in texts),
            {"type": "websocket.disconnect", "code": 1001},
        ]
    )
    to_app.put_nowait({"type": "websocket.connect"})

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "websocket.send":
            answers.append(message["text"])
            if meanwhile is not None:
                await meanwhile()
        if message["type"] in ("websocket.accept", "websocket.send"):
            to_app.put_nowait(next(left))

    scope = {
        "type": "websocket",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "subprotocols": [],
        "scheme": "ws",
    }
    with contextlib.suppress(WebSocketDisconnect):
        await app(scope, to_app.get, send)
    return answers


def asking_threads() -> list[threading.Thread]:
    """Return the threads in which databases are asked or prepared."""
    return [thread for thread in threading.enumerate() if thread.name == "sessionmgr-fastapi"]

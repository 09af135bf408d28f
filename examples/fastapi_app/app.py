"""An application with two databases, users and logs, and sessions of both kinds on each."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import URL, DateTime, String, make_url, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, Session, mapped_column

from sessionmgr import AsyncSessionManager, Base, SessionManager
from sessionmgr.ext.fastapi import AsyncSessions, Sessions, health_router

DATA = Path(__file__).parent / "data"
DATA.mkdir(exist_ok=True)

URLS = {
    "users": os.environ.get("USERS_URL", f"sqlite:///{DATA}/users.db"),
    "logs": os.environ.get("LOGS_URL", f"sqlite:///{DATA}/logs.db"),
}

ASYNC_DIALECTS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql+psycopg": "postgresql+asyncpg",
    "mysql+pymysql": "mysql+asyncmy",
}


def async_url(url: str) -> URL:
    """Name the same database for its async driver."""
    parsed = make_url(url)
    return parsed.set(drivername=ASYNC_DIALECTS.get(parsed.drivername, parsed.drivername))


# Each process keeps up to five connections for each manager and database. More requests at
# once wait for one.
POOL = {"pool_size": 5, "max_overflow": 0}

manager = SessionManager(binds=URLS, engine_options=POOL)
async_manager = AsyncSessionManager(
    binds={key: async_url(url) for key, url in URLS.items()}, engine_options=POOL
)
sessions = Sessions(manager)
async_sessions = AsyncSessions(async_manager)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Prepare both databases, and close their pools at the end."""
    async with sessions.lifespan(app), async_sessions.lifespan(app):
        yield


app = FastAPI(title="Users and logs", lifespan=lifespan)
app.include_router(health_router(sessions, async_sessions))

Users = Annotated[Session, Depends(sessions.get("users"))]
Logs = Annotated[Session, Depends(sessions.get("logs"))]
AsyncUsers = Annotated[AsyncSession, Depends(async_sessions.get("users"))]
AsyncLogs = Annotated[AsyncSession, Depends(async_sessions.get("logs"))]


class User(Base):
    """Somebody; in the database users."""

    __tablename__ = "user_account"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


class Log(Base):
    """Something that happened; in the database logs."""

    __tablename__ = "log"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), default=lambda: datetime.now(timezone.utc)
    )
    text: Mapped[str] = mapped_column(String(200))


class NewUser(BaseModel):
    """What a user is made of."""

    name: str


class UserOut(NewUser):
    """A user, as the database has it."""

    model_config = ConfigDict(from_attributes=True)

    id: int


@app.post("/users", status_code=201)
def add_user(new: NewUser, users: Users, logs: Logs) -> UserOut:
    """Add a user, and say so in the logs: both databases commit before the response is sent."""
    user = User(name=new.name)
    users.add(user)
    users.flush()  # the database gives the id
    logs.add(Log(text=f"{new.name} was added"))
    return UserOut.model_validate(user)


@app.get("/users")
def list_users(users: Users) -> list[UserOut]:
    """List all users."""
    found = users.scalars(select(User).order_by(User.id))
    return [UserOut.model_validate(user) for user in found]


@app.post("/users/{name}/visits", status_code=201)
async def add_visit(name: str, users: AsyncUsers, logs: AsyncLogs) -> None:
    """Note that a user was here."""
    if await users.scalar(select(User).where(User.name == name)) is None:
        raise HTTPException(404, f"there is no user {name}")
    logs.add(Log(text=f"{name} was here"))


@app.get("/logs")
async def list_logs(logs: AsyncLogs, limit: int = 20) -> list[str]:
    """List what happened, the last first."""
    return list(await logs.scalars(select(Log.text).order_by(Log.id.desc()).limit(limit)))


@app.exception_handler(IntegrityError)
async def conflict(request: Request, error: IntegrityError) -> JSONResponse:
    """Answer 409 where a row contradicts another, whether a flush or the commit finds out."""
    return JSONResponse({"detail": "there is one already"}, status_code=409)

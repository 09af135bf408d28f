"""FastAPI: a session for each request and database, a lifespan, and a health endpoint.

::

    manager = SessionManager(binds={"users": url, "logs": url})
    sessions = Sessions(manager)
    app = FastAPI(lifespan=sessions.lifespan)
    app.include_router(health_router(sessions))

    Users = Annotated[Session, Depends(sessions.get("users"))]

    @app.post("/users")
    def add_user(name: str, users: Users) -> None:
        users.add(User(name=name))

What the path operation did is committed before the response is sent, and rolled back when it
raises.
"""

from .asyncio import AsyncSessions
from .health import DatabaseHealth, Health, health_router
from .sessions import Sessions

__all__ = ("AsyncSessions", "DatabaseHealth", "Health", "Sessions", "health_router")

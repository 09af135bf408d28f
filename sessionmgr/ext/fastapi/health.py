"""The health of an application's databases, as an endpoint."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from fastapi import APIRouter, Response, status
from pydantic import BaseModel, Field

from sessionmgr.errors import EngineOptionsError
from sessionmgr.stats import DatabaseStats  # noqa: TC001 - pydantic reads the annotation
from sessionmgr.urls import hide_secrets

from .asking import NoAnswerError, Probe, check_seconds, reason
from .sessions import RequestSessions

__all__ = ("DatabaseHealth", "Health", "health_router")


class DatabaseHealth(BaseModel):
    """One database, as one process of the application sees it."""

    database: str = Field(description="Bind key, or URL without secrets")
    reachable: bool = Field(description="Whether it answered in time")
    latency: float | None = Field(
        description="Seconds that a connection of the pool and `SELECT 1` took"
    )
    error: str | None = Field(description="Why it is not reachable")
    pools: list[DatabaseStats] = Field(description="Numbers of its pools in this process")


class Health(BaseModel):
    """The databases of an application, as one of its processes sees them."""

    reachable: bool = Field(description="Whether every database answered in time")
    pid: int = Field(description="The process that answers")
    databases: list[DatabaseHealth]


def health_router(
    *sessions: RequestSessions[Any, Any],
    timeout: float = 2.0,
    path: str = "/health/databases",
) -> APIRouter:
    """Give a router with an endpoint that asks every database whether it answers.

    These are all binds, and each other database that has an engine. They are asked at the same
    time, through their pools. The answer is 200 when all of them are reachable, else 503, and
    comes after ``timeout`` at the latest. It has no secret in it, but user names, hosts and
    numbers: ``app.include_router(health_router(...), dependencies=[...])`` guards it.

    :param sessions: one or more :class:`Sessions` or :class:`AsyncSessions`.
    :param timeout: seconds that each database has to answer.
    :param path: where the endpoint is.
    :raises EngineOptionsError: when no sessions are given, or something else, or ``timeout`` is not
        a positive number.
    """
    check_seconds("timeout", timeout)
    given: tuple[object, ...] = sessions
    wrong = [one for one in given if not isinstance(one, RequestSessions)]
    if wrong or not given:
        shown = hide_secrets(wrong[0]) if wrong else "nothing"
        raise EngineOptionsError(
            f"health_router takes one or more Sessions or AsyncSessions, not {shown}"
        )
    router = APIRouter(tags=["health"])

    @router.get(
        path,
        summary="Health of the databases",
        responses={
            status.HTTP_503_SERVICE_UNAVAILABLE: {
                "model": Health,
                "description": "A database did not answer in time",
            }
        },
    )
    async def database_health(response: Response) -> Health:
        databases = await asyncio.gather(
            *(_ask(one, probe, timeout) for one in sessions for probe in one._asked())
        )
        reachable = all(database.reachable for database in databases)
        if not reachable:
            response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
        return Health(reachable=reachable, pid=os.getpid(), databases=databases)

    return router


async def _ask(sessions: RequestSessions[Any, Any], probe: Probe, timeout: float) -> DatabaseHealth:
    latency = error = None
    try:
        latency = await probe.ask(timeout)
    except NoAnswerError:
        error = f"no answer in {timeout:g} s"
    except Exception as failure:  # noqa: BLE001 - whatever it is, the database is not to be had
        error = reason(failure)
    return DatabaseHealth(
        database=probe.key.name,
        reachable=error is None,
        latency=latency,
        error=error,
        pools=sessions._pools(probe.key),
    )

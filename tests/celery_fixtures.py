"""Fixtures: Celery workers that tests share, started when first asked for, and clients."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from tests.celery_backend_app import make_app
from tests.celery_workers import Service, close_app, serving
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from celery import Celery
    from sqlalchemy import URL

    from tests.servers import Servers
    from tests.servers.redis import Redis

SERVICES = (
    ("fork", "psycopg"),
    ("spawn", "psycopg"),
    ("threads", "psycopg"),
    ("gevent", "psycopg"),
    ("eventlet", "psycopg"),
    ("solo", "psycopg"),
    ("fork", "pymysql"),
    ("gevent", "pymysql"),
    ("eventlet", "pymysql"),
    ("fork", "sqlite"),
    ("threads", "sqlite"),
)
"""The workers that tests share: the pool, and the driver of their database."""


@pytest.fixture(scope="session")
def make_service(servers: Servers, redis_server: Redis) -> Iterator[Callable[..., Service]]:
    """Return a function that gives the worker of a pool and a driver, which all tests share.

    It has ``result_extended`` and ``task_track_started`` set.
    """
    running: dict[tuple[str, str], Service] = {}

    def make(pool: str, driver: str) -> Service:
        if (pool, driver) not in running:
            database = None
            if driver != "sqlite":
                server = servers.shared("postgresql" if driver == "psycopg" else "mariadb")
                database = Database(server, server.create_database(), driver)
                ends.callback(server.drop_database, database.name)
            running[pool, driver] = ends.enter_context(
                serving(redis_server, pool, database, result_extended=True, task_track_started=True)
            )
        return running[pool, driver]

    with contextlib.ExitStack() as ends:
        yield make
        for service in running.values():
            service.worker.tell_to_stop()  # all at once: it takes each a while


@pytest.fixture(params=SERVICES, ids=["-".join(each) for each in SERVICES])
def service(request: pytest.FixtureRequest, make_service: Callable[..., Service]) -> Service:
    """Return each of the workers that all tests share."""
    return make_service(*request.param)


@pytest.fixture
def make_client() -> Iterator[Callable[..., Celery]]:
    """Return a function that makes an application without a broker, for a result backend."""
    apps: list[Celery] = []

    def make(url: str, **settings: Any) -> Celery:
        app = make_app({"broker_url": "memory://", "result_backend": url, **settings}, "client-")
        apps.append(app)
        return app

    yield make
    for app in apps:
        close_app(app)


@pytest.fixture
def make_reader(url: URL, make_client: Callable[..., Celery]) -> Callable[..., Celery]:
    """Return a function that makes an application with a serializer, on the module's database."""

    def make(serializer: str, **settings: Any) -> Celery:
        return make_client(
            f"sessionmgr+{url.render_as_string(hide_password=False)}",
            result_serializer=serializer,
            result_accept_content=[serializer],
            **settings,
        )

    return make

"""The units of work that are compared, each as a function that does one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from celery.app.defaults import DEFAULTS as CELERY_DEFAULTS
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery.backends.database.session import SessionManager as CelerySessionManager
    from sqlalchemy import URL
    from sqlalchemy.orm import Session

    from sessionmgr import SessionManager

__all__ = (
    "bare_driver",
    "celery",
    "exposed",
    "managed",
    "plain_sqlalchemy",
    "set_pragmas",
    "unit_of_work",
)

SELECT_ONE = text("SELECT 1")

MODULES = {"mysqldb": "MySQLdb"}
"""SQLAlchemy's name for a driver -> its module, where that differs."""

CELERY_OPTIONS: dict[str, Any] = CELERY_DEFAULTS["database_engine_options"]
"""What Celery's result backend passes in every call (pool_pre_ping=True, pool_recycle=3600)."""


PRAGMAS = ("foreign_keys=ON", "journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000")
"""What sessionmgr sets for a SQLite file."""


def set_pragmas(connection: Any, record: object = None) -> None:
    """Set up a connection of the sqlite3 module as sessionmgr does."""
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def unit_of_work(open_session: Callable[[], Session]) -> Callable[[], None]:
    """Make the unit of work: open a session, ``SELECT 1``, fetch, close."""

    def work() -> None:
        with open_session() as session:
            session.scalar(SELECT_ONE)

    return work


def managed(manager: SessionManager, url: URL) -> Callable[[], None]:
    """Make the unit of work of sessionmgr."""
    dburi = exposed(url)
    return unit_of_work(lambda: manager.session_factory(dburi))


def celery(manager: CelerySessionManager, url: URL) -> Callable[[], None]:
    """Make the unit of work of Celery's manager, used as its result backend uses it."""
    dburi = exposed(url)
    return unit_of_work(lambda: manager.session_factory(dburi, **CELERY_OPTIONS))


def plain_sqlalchemy(url: URL, **options: Any) -> Callable[[], None]:
    """Make the unit of work of an Engine and a sessionmaker that are kept.

    :param options: of ``create_engine``.
    """
    return unit_of_work(sessionmaker(create_engine(url, **options)))


def bare_driver(url: URL) -> Callable[[], None]:
    """Make the unit of work without SQLAlchemy: connect, ``SELECT 1``, fetch, close."""
    name = url.get_driver_name()
    connect = importlib.import_module(MODULES.get(name, name)).connect
    database = "dbname" if url.get_backend_name() == "postgresql" else "database"
    arguments = url.translate_connect_args(username="user", database=database)

    def work() -> None:
        connection = connect(**arguments)
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            cursor.fetchone()
        connection.close()

    return work


def exposed(url: URL) -> str:
    """Write a URL as users do, with its password."""
    return url.render_as_string(hide_password=False)

"""Secrets: a password is shown nowhere, wherever in a URL or in the options it stands."""

from __future__ import annotations

import dataclasses
import functools
import logging
import traceback
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from sessionmgr import (
    DatabaseURLError,
    EngineOptionsError,
    ManagerClosedError,
    NoSuchBindError,
    SchemaLockError,
    SessionManager,
    serverlock,
)
from sessionmgr.urls import hide_secrets
from tests.helpers import wait_until
from tests.items import Item, ItemBase, kill_connection
from tests.servers.server import APP_USER
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator

    from sqlalchemy.orm import Session

    from tests.async_facade import ManagerClass
    from tests.servers import Database

SECRET = "gEheim/p@ss:word#1"
TRACES = ("gEheim", "p@ss", "p%40ss", "word#1", "word%231")
"""Parts of the secret as it is and as it stands in a URL, of which none may show."""


class Watcher:
    """Collects what is shown, to check that the secret is not in it."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self._shown: list[str] = []

    def show(self, *values: object) -> None:
        """Take what a print, a log or a debugger shows of values."""
        for value in values:
            self._shown += [repr(value), str(value), f"{value}"]
            if isinstance(value, BaseException):
                self._shown += traceback.format_exception(value)  # with its notes and causes

    def show_manager(self, manager: SessionManager) -> None:
        """Take what is seen of a manager and of all that belongs to it."""
        stats = manager.stats()
        self.show(manager, stats, stats.to_json(), stats.as_dict(), manager.prepared)
        self.show(manager._engines, manager._sessions, vars(manager._registry))
        for key, engine in manager._engines.items():
            self.show(key, engine, engine.url, engine.pool, vars(engine.pool))
        self.show(*manager._registry.entries())

    def raised(self, error: type[BaseException], call: Callable[[], object]) -> None:
        """Take the error that a call raises."""
        with pytest.raises(error) as caught:
            call()
        self.show(caught.value)

    def check(self) -> None:
        """Check that nothing of the secret is in what was shown, or in any log record."""
        formatter = logging.Formatter("%(message)s")
        shown = self._shown + [formatter.format(record) for record in self._caplog.records]
        assert shown
        leaks = [
            text[max(0, place - 80) : place + 40]
            for text in shown
            for place in map(text.find, TRACES)
            if place >= 0
        ]
        assert not leaks, "\n".join(dict.fromkeys(leaks))


@pytest.fixture
def watcher(caplog: pytest.LogCaptureFixture) -> Iterator[Watcher]:
    """Return a watcher that sees every log record too; it checks at the end of the test."""
    for name in ("", "sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "sessionmgr"):
        caplog.set_level(logging.DEBUG, name)
    watcher = Watcher(caplog)
    yield watcher
    watcher.check()


@dataclasses.dataclass
class Guarded:
    """A database whose role has the secret as its password.

    :param database: the database.
    :param url: its URL for that role, with the secret unless it is in the options.
    :param options: engine options.
    :param manager_class: the class of its managers.
    """

    database: Database
    url: URL
    options: dict[str, Any]
    manager_class: ManagerClass

    def manager(self, **arguments: Any) -> SessionManager:
        """Return a manager with the bind key ``"guarded"``."""
        return self.manager_class(
            metadata=ItemBase.metadata,
            binds={"guarded": {"url": self.url} | self.options},
            engine_options=self.options,
            pooling="always",
            **arguments,
        )


EVERYWHERE = [
    (driver, place)
    for driver in ("psycopg", "psycopg2", "pymysql", "mysqlclient")
    for place in ("userinfo", "query", "connect_args", "sslpassword")
    if place != "sslpassword" or driver.startswith("psycopg")
]

# asyncpg, psycopg's twin, takes no sslpassword
TWINS_PLACES = [pair for pair in EVERYWHERE if pair != ("psycopg", "sslpassword")]

pytestmark = pytest.mark.twin_cases(guarded=TWINS_PLACES)

in_each_place = pytest.mark.parametrize(
    "guarded", [pair for pair in EVERYWHERE if pair[0] == "psycopg"], ids="-".join, indirect=True
)


@pytest.fixture(params=EVERYWHERE, ids="-".join)
def guarded(
    request: pytest.FixtureRequest,
    make_database: Callable[..., Database],
    manager_class: ManagerClass,
) -> Iterator[Guarded]:
    """Return a database whose role has the secret as its password, for each place to give it."""
    driver, place = request.param
    database = make_database(driver)
    server, role = database.server, f"role_{uuid.uuid4().hex[:12]}"
    if driver.startswith("psycopg"):
        server.query(f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}' IN ROLE {APP_USER}")
        server.query(f"ALTER ROLE {role} SET role = {APP_USER}")  # who then owns the tables
    else:
        server.query(f"CREATE USER {role}@'%' IDENTIFIED BY '{SECRET}'")
        server.query(f"GRANT ALL ON {database.name}.* TO {role}@'%'")
    url, options = database.url.set(username=role, password=SECRET), {}
    if place in ("query", "connect_args"):  # set(password=None) would leave it
        url = URL.create(url.drivername, role, None, url.host, url.port, url.database)
    if place == "query":
        url = url.update_query_dict({"password": SECRET})
    elif place == "connect_args":
        options = {"connect_args": {"password": SECRET}}
    elif place == "sslpassword":
        url = url.update_query_dict({"sslpassword": SECRET})
    yield Guarded(database, url, options, manager_class)
    server.kill(*database.connections())
    server.query(f"DROP ROLE {role}" if driver.startswith("psycopg") else f"DROP USER {role}@'%'")


def test_nothing_shows_at_work(guarded: Guarded, watcher: Watcher) -> None:
    """Connecting, working, losing a connection, invalidating and closing show no secret."""
    with guarded.manager() as manager:
        for dburi in (guarded.url, guarded.url.render_as_string(hide_password=False), "guarded"):
            with manager.begin(dburi) as session:
                session.add(Item(name=f"row {len(watcher._shown)}"))
                watcher.show(session.get_bind(), session.connection())
            engine, factory = manager.create_session(dburi)
            watcher.show(engine, factory, factory.kw)
            with manager.session_factory(dburi) as session:
                kill_connection(session, guarded.database)
                watcher.raised(DBAPIError, lambda s=session: s.execute(text("SELECT 1")))
            watcher.show_manager(manager)
        manager.invalidate(guarded.url)
        manager.dispose()
        watcher.show_manager(manager)
    watcher.raised(ManagerClosedError, lambda: manager.session_factory(guarded.url))


@in_each_place
def test_logs_are_watched(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    """SQLAlchemy tells of connections where the other tests look for secrets."""
    for name in ("sqlalchemy.engine", "sqlalchemy.pool"):
        caplog.set_level(logging.DEBUG, name)
    with guarded.manager() as manager, manager.session_factory("guarded") as session:
        session.execute(text("SELECT 1"))
    assert "Created new connection" in caplog.text
    assert "SELECT 1" in caplog.text


def test_nothing_shows_when_connecting_fails(guarded: Guarded, watcher: Watcher) -> None:
    """A refused connect, a missing database and a wrong password show no secret."""
    wrong = [
        guarded.url.set(database="no_such_database"),
        guarded.url.set(username="no_such_role"),
    ]
    with guarded.manager() as manager, TCPProxy(guarded.url) as proxy:
        proxy.refuse()
        for url in (*wrong, proxy.url):
            watcher.raised(DBAPIError, lambda url=url: manager.session_factory(url))
            watcher.raised(DBAPIError, lambda url=url: manager.run(url, lambda _: None, attempts=2))
        watcher.show_manager(manager)


@in_each_place
def test_nothing_shows_in_what_run_and_callbacks_tell(guarded: Guarded, watcher: Watcher) -> None:
    """The notes that errors get name the database without the secret."""

    def lose(session: Session) -> None:
        kill_connection(session, guarded.database)
        session.execute(text("SELECT 1"))

    def refuse(engine: object) -> None:
        raise LookupError("of the callback")

    with guarded.manager() as manager:
        watcher.raised(DBAPIError, lambda: manager.run("guarded", lose, attempts=2))
        watcher.raised(DBAPIError, lambda: manager.run(guarded.url, lose, attempts=2))
    with guarded.manager(engine_callback=refuse) as manager:
        watcher.raised(LookupError, lambda: manager.get_engine("guarded"))
        watcher.raised(LookupError, lambda: manager.get_engine(guarded.url))


@in_each_place
def test_nothing_shows_in_errors_of_options(guarded: Guarded, watcher: Watcher) -> None:
    """Options that conflict, contradict or are unknown are told without secrets."""
    other = {"connect_args": {"password": f"{SECRET}2", "nested": {"token": SECRET}}}
    with guarded.manager() as manager:
        manager.get_engine("guarded")
        manager.get_engine(guarded.url)
        for dburi in ("guarded", guarded.url):
            for options in (other, {"pool_size": 9}, {"unknown": 1}, {"password": SECRET}):
                watcher.raised(
                    EngineOptionsError,
                    lambda dburi=dburi, options=options: manager.get_engine(dburi, **options),
                )
        fresh = guarded.url.set(database="other")
        for options in ({"unknown": 1}, {"password": SECRET}):
            watcher.raised(
                EngineOptionsError, lambda options=options: manager.get_engine(fresh, **options)
            )
        watcher.raised(
            EngineOptionsError,
            lambda: manager.get_engine(fresh, poolclass=NullPool, pool_size=3),
        )


@pytest.mark.parametrize("guarded", [("pymysql", "userinfo"), ("pymysql", "query")], indirect=True)
def test_nothing_shows_when_the_schema_lock_is_not_granted(
    guarded: Guarded, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the lock names the database without the secret."""
    monkeypatch.setattr(serverlock, "LOCK_TIMEOUT", 0)
    holder = create_engine(guarded.database.url, poolclass=NullPool)
    with guarded.manager() as manager, holder.connect() as connection:
        connection.scalar(text("SELECT get_lock(concat('sessionmgr.schema.', md5(database())), 0)"))
        watcher.raised(SchemaLockError, lambda: manager.session_factory("guarded"))
        watcher.raised(SchemaLockError, lambda: manager.session_factory(guarded.url))
    wait_until(lambda: not guarded.database.connections())


@pytest.mark.parametrize(
    ("dburi", "error"),
    [
        (f"postgresql://user:{SECRET}", DatabaseURLError),
        (f"postgresql//user:{SECRET}@host/db", NoSuchBindError),
        (f"postgresql:/user:{SECRET}@host/db", NoSuchBindError),
        (f"user:{SECRET}@host/db", NoSuchBindError),
        (f"{SECRET}://user:{SECRET}@host/db", DatabaseURLError),
        (f"postgresql://user@host:{SECRET}/db", DatabaseURLError),
        (f" ://user:{SECRET}@host/db", DatabaseURLError),
        ((SECRET, SECRET), DatabaseURLError),
    ],
    ids=["port", "no colon", "one slash", "no scheme", "scheme", "port of host", "empty", "tuple"],
)
def test_nothing_shows_of_a_url_that_cannot_be_read(
    watcher: Watcher,
    dburi: Any,
    error: type[Exception],
    manager_class: ManagerClass,
    sqlite: str,
) -> None:
    """What cannot be read as a URL may have a password in any place, and is not shown."""
    with manager_class(binds={"users": f"{sqlite}://"}) as manager:
        for method in (manager.get_engine, manager.session_factory, manager.invalidate):
            watcher.raised(error, lambda method=method: method(dburi))
        watcher.show_manager(manager)


def connect(password: str) -> sqlite3.Connection:
    """Open a database, as a ``creator`` that was given a password."""
    raise AssertionError(len(password))


@pytest.mark.parametrize(
    "value",
    [
        {"password": SECRET},
        {"PASSWD": SECRET},
        {"sslpassword": SECRET},
        {"nested": {"auth_token": SECRET}},
        {"nested": [{"client_secret": SECRET}]},
        {"nested": ({"api_key": SECRET},)},
        {"url": make_url("postgresql://host/db").set(username="u", password=SECRET)},
        {"url": make_url("postgresql://host/db").update_query_dict({"password": SECRET})},
        {"creator": functools.partial(connect, SECRET)},
        {"creator": functools.partial(connect, password=SECRET)},
    ],
    ids=["password", "case", "ssl", "dict", "list", "tuple", "url", "query", "args", "keywords"],
)
def test_values_of_options_are_shown_without_secrets(
    watcher: Watcher, value: dict[str, Any]
) -> None:
    """The values that error texts show of options have no secret in them, at any depth."""
    watcher.show(hide_secrets(value))


@pytest.mark.twin_cases(call=["connect_args", "engine_options"])
@pytest.mark.parametrize("call", ["prepare_models", "connect_args", "engine_options"])
def test_text_in_the_place_of_something_else(call: str, manager_class: ManagerClass) -> None:
    """Where text cannot be, it is not repeated: it may be a URL that nobody can read, or worse."""
    text: Any = f"app:{SECRET}@db/orders"
    with manager_class() as manager:
        calls = {
            "prepare_models": lambda: manager.prepare_models(text),
            "connect_args": lambda: manager.get_engine("sqlite://", connect_args=text),
            "engine_options": lambda: manager_class(engine_options=text),
        }
        with pytest.raises(EngineOptionsError, match="not str") as caught:
            calls[call]()
    assert not any(trace in str(caught.value) for trace in TRACES)

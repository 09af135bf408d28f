"""What users write, for ``mypy --strict`` to check. It is never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Engine, MetaData, make_url
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import assert_type

from sessionmgr import (
    Base,
    DatabaseStats,
    DatabaseURLError,
    EngineOptionsError,
    ForkedSQLiteError,
    ManagerClosedError,
    ManagerPickleError,
    ManagerStats,
    NoSuchBindError,
    SchemaLockError,
    SessionManager,
    SessionManagerError,
    is_transient,
)
from sessionmgr.ext.billiard import initializer, on_process_exit

if TYPE_CHECKING:
    from collections.abc import Mapping

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


# -- errors, models, billiard

errors: list[type[SessionManagerError]] = [
    DatabaseURLError,
    EngineOptionsError,
    ForkedSQLiteError,
    ManagerClosedError,
    ManagerPickleError,
    NoSuchBindError,
    SchemaLockError,
]
assert_type(is_transient(ValueError()), bool)


class Order(Base):
    """A mapped class."""

    __tablename__ = "order"


initializer()
on_process_exit(17, 0)

"""The registry: one Engine per database in this process, with its sessionmaker and monitor."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.pool import QueuePool

from . import forking
from .errors import EngineOptionsError, IsolationError, ManagerClosedError
from .locks import DatabaseLocks
from .monitor import PoolMonitor
from .pools import watched
from .sqlite import is_memory
from .sqlite_transactions import attach
from .stats import DatabaseStats
from .transient import note
from .urls import hidden

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy import URL, Engine, MetaData
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from .isolation import ManagerIsolation
    from .options import ResolvedOptions
    from .urls import DatabaseKey

__all__ = (
    "BindT",
    "EngineEntry",
    "EngineRegistry",
    "MakerT",
    "leave_alone",
    "make_async_engine",
    "make_engine",
)

#: What sessions are bound to: Engine, or AsyncEngine.
BindT = TypeVar("BindT")
#: What makes them: sessionmaker, or async_sessionmaker.
MakerT = TypeVar("MakerT")

#: PQTRANS_ACTIVE and PQTRANS_UNKNOWN of libpq: a statement is in progress, the connection is bad.
#: https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQTRANSACTIONSTATUS
_AMIDST = frozenset((1, 4))


@dataclass(eq=False, slots=True)
class EngineEntry(Generic[BindT, MakerT]):
    """What a process, or an event loop, has for one database.

    :param key: the database.
    :param requested: the options that its engine was asked for with.
    :param engine: its engine.
    :param bind: the engine, in the form that callers get.
    :param monitor: the monitor of the engine's pool.
    :param pooled: whether connections were to be kept when it was made.
    :param factory: its sessionmaker, once one was asked for.
    :param prepared: whether its tables are known to be there.
    """

    key: DatabaseKey
    requested: Mapping[str, Any] = field(repr=False)  # passwords may be in them
    engine: Engine
    bind: BindT
    monitor: PoolMonitor
    pooled: bool
    factory: MakerT | None = None
    prepared: bool = False

    def keep(self, factory: MakerT) -> MakerT:
        """Give the sessionmaker that is kept: this one, where it is the first."""
        if self.factory is None:
            self.factory = factory
        return self.factory

    def stats(self) -> DatabaseStats:
        """Give the numbers of the engine's pool."""
        pool = self.engine.pool
        size = pool.size() if isinstance(pool, QueuePool) else None
        counts = asdict(self.monitor.counts())
        return DatabaseStats(self.key.name, type(pool).__name__, size, **counts)


def make_engine(
    key: DatabaseKey,
    options: ResolvedOptions,
    callbacks: Sequence[Callable[[Engine], Any]],
    *,
    pooled: bool,
) -> EngineEntry[Engine, Any]:
    """Make an engine, and let the callbacks have it before it connects.

    :raises EngineOptionsError: when ``create_engine`` does not know an option.
    """
    # looked up here, where OpenTelemetry may have put its own in place
    with _naming(key):
        engine = sqlalchemy.create_engine(key.url, **_arguments(options))
    monitor = _hand_over(engine, key, options, callbacks)
    return EngineEntry(key, options.requested, engine, engine, monitor, pooled)


def make_async_engine(
    key: DatabaseKey,
    options: ResolvedOptions,
    callbacks: Sequence[Callable[[Engine], Any]],
    *,
    pooled: bool,
) -> EngineEntry[AsyncEngine, Any]:
    """Make an AsyncEngine, and let the callbacks have its ``sync_engine`` before it connects.

    :raises EngineOptionsError: when ``create_async_engine`` does not know an option.
    """
    import sqlalchemy.ext.asyncio as extension

    with _naming(key):
        engine = extension.create_async_engine(key.url, **_arguments(options))
    if engine.dialect.driver == "asyncpg":
        _wrap_connect_errors(engine.dialect)
    monitor = _hand_over(engine.sync_engine, key, options, callbacks)
    return EngineEntry(key, options.requested, engine.sync_engine, engine, monitor, pooled)


def _wrap_connect_errors(dialect: Any) -> None:
    """Have asyncpg's failures to connect raised as DBAPI errors, which SQLAlchemy wraps.

    It knows none of the network's, and before SQLAlchemy 2.1 none of the server's; nor those of
    the codecs that it sets up on each new connection. As they are, nobody could tell that it is
    the database which is away.
    """
    connect = dialect.connect

    def connect_or_tell(*arguments: Any, **options: Any) -> DBAPIConnection:
        with _wrapped(dialect.dbapi):
            return connect(*arguments, **options)  # type: ignore[no-any-return]

    dialect.connect = connect_or_tell
    for name in ("setup_asyncpg_json_codec", "setup_asyncpg_jsonb_codec"):
        setattr(dialect, name, _set_up_or_tell(getattr(dialect, name), dialect.dbapi))


def _set_up_or_tell(
    set_up: Callable[[DBAPIConnection], Awaitable[None]], dbapi: Any
) -> Callable[[DBAPIConnection], Awaitable[None]]:
    async def set_up_or_tell(connection: DBAPIConnection) -> None:
        with _wrapped(dbapi):
            await set_up(connection)

    return set_up_or_tell


@contextmanager
def _wrapped(dbapi: Any) -> Iterator[None]:
    """Raise an error of asyncpg's, or the network's, as one of SQLAlchemy's adapter."""
    try:
        yield
    except dbapi.asyncpg.InterfaceError as error:  # "connection is closed"
        raise dbapi.InterfaceError(str(error)) from error
    except (OSError, asyncio.TimeoutError, dbapi.asyncpg.PostgresError) as error:
        expired = isinstance(error, (TimeoutError, asyncio.TimeoutError))  # one since 3.11
        text = "connection timeout expired" if expired else str(error)
        wrapped = dbapi.OperationalError(text)
        wrapped.sqlstate = wrapped.pgcode = getattr(error, "sqlstate", None)
        raise wrapped from error


def _arguments(options: ResolvedOptions) -> dict[str, Any]:
    return {**options.arguments, "poolclass": watched(options.arguments["poolclass"])}


@contextmanager
def _naming(key: DatabaseKey) -> Iterator[None]:
    """Name the database in what SQLAlchemy says of options that cannot be."""
    try:
        yield
    except (TypeError, ArgumentError) as error:
        # "cannot be used": a pool class of the other kind, synchronous or not
        if not str(error).startswith("Invalid argument(s)") and "cannot be used" not in str(error):
            raise
        raise EngineOptionsError(f"database {key.describe()}: {error}") from error


def _hand_over(
    engine: Engine,
    key: DatabaseKey,
    options: ResolvedOptions,
    callbacks: Sequence[Callable[[Engine], Any]],
) -> PoolMonitor:
    """Watch a new engine, and give it to the callbacks."""
    monitor = PoolMonitor(engine, key.describe(), options.ping_if_idle)
    if options.sqlite is not None:
        attach(engine, options.sqlite)
    else:
        sqlalchemy.event.listen(engine, "handle_error", _give_up_if_interrupted)
    try:
        for callback in callbacks:
            callback(engine)
    except BaseException as error:
        note(error, "raised by engine_callback; no engine was kept")
        monitor.retire()
        raise
    return monitor


def _give_up_if_interrupted(context: ExceptionContext) -> None:
    """Give up a connection on which the driver was interrupted.

    Celery's soft time limit, for one, is an Exception that a signal's handler raises there. The
    server's answer would be taken for that to the next statement, or the driver would take no
    statement any more. SQLAlchemy sees to interrupts that are no Exception. SQLite has no server,
    and one in memory would be lost by an argument that the driver does not take.
    """
    if context.is_disconnect or isinstance(context.original_exception, IsolationError):
        return
    if isinstance(context.original_exception, context.dialect.loaded_dbapi.Error):
        interrupted = _is_amidst_a_statement(context)
    else:
        unsent = context.statement is not None and context.execution_context is None
        interrupted = not unsent
    if interrupted:
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False


def _is_amidst_a_statement(context: ExceptionContext) -> bool:
    """Tell whether libpq is still waiting for an answer after psycopg's error.

    "connection socket closed", for one, says so of a connection that psycopg takes for open. Every
    later statement would be refused: "another command is already in progress".
    """
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return False
    driver: Any = connection.connection.driver_connection
    status = getattr(getattr(driver, "info", None), "transaction_status", None)
    return status in _AMIDST


class EngineRegistry(Generic[BindT, MakerT]):
    """The engines of one manager in this process, or in one event loop.

    Finding an engine takes no lock. Making one takes the lock of its database alone, so two
    databases are made side by side.
    """

    # _lock guards every change of _entries, and _closed. A database's own lock guards that it
    # is made once, and _making. It also guards every change of ready, _routes and _tables.

    def __init__(self, max_engines: int | None = None) -> None:
        """Begin empty.

        :param max_engines: how many to keep; ``None`` for any number. Beyond it the one that
            was idle for longest goes. Engines in use are never let go.
        """
        self._max_engines = max_engines
        self._entries: dict[str, EngineEntry[BindT, MakerT]] = {}
        #: The hot path: a database as callers spell it -> its entry, tables prepared. Changed
        #: as a whole or by adding; read without a lock.
        self.ready: dict[str | URL, EngineEntry[BindT, MakerT]] = {}
        #: The same of routed sessions, by bind key, and by a table's metadata: that is here once
        #: its tables are known to be there, and for as long as somebody else has it.
        self._routes: dict[str | None, EngineEntry[BindT, MakerT]] = {}
        self._tables: WeakKeyDictionary[MetaData, EngineEntry[BindT, MakerT]] = WeakKeyDictionary()
        #: What undoes a test on these engines, for who ends them.
        self.isolation: ManagerIsolation | None = None
        self._lock = forking.ProcessLock()
        self._database_locks = DatabaseLocks()
        self._making: set[DatabaseKey] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: str) -> EngineEntry[BindT, MakerT] | None:
        """Find what there is for a database, by its :class:`DatabaseKey` or its bind key."""
        return self._entries.get(key)

    def find_engine(self, engine: BindT) -> EngineEntry[BindT, MakerT] | None:
        """Find the entry that an engine belongs to."""
        return next((entry for entry in self.entries() if entry.bind is engine), None)

    def entries(self) -> list[EngineEntry[BindT, MakerT]]:
        """List what there is, in the order in which it was made."""
        return list(self._entries.values())

    def lock(self, key: DatabaseKey) -> AbstractContextManager[None]:
        """Hold the lock of one database, for ``with``."""
        return self._database_locks.hold(key)

    def get(
        self, key: DatabaseKey, make: Callable[[], EngineEntry[BindT, MakerT]]
    ) -> EngineEntry[BindT, MakerT]:
        """Find a database's entry, or make it.

        :param key: the database.
        :param make: makes its entry; called while no process is forked.
        :raises ManagerClosedError: after ``close()``.
        """
        entry = self._entries.get(key)
        if entry is not None:
            return entry
        with self.lock(key):
            entry = self._entries.get(key)
            if entry is not None:
                return entry
            if key in self._making:
                raise InvalidRequestError(
                    f"engine_callback asked the manager for database {key.describe()}, whose"
                    " engine it is being given: use that one"
                )
            self.check_open()
            self._making.add(key)
            try:
                # Dialect, driver and what callbacks need may be imported here: a child that is
                # forked in the midst of an import hangs at its own.
                with forking.gate.section():
                    entry = make()
            except Exception as error:
                note(error, f"while making the engine of database {key.describe()}")
                raise
            finally:
                self._making.discard(key)
            return self._publish(entry)

    def _publish(self, entry: EngineEntry[BindT, MakerT]) -> EngineEntry[BindT, MakerT]:
        with self._lock():
            if not self._closed:
                self._entries[entry.key] = entry
        if self._closed:
            entry.monitor.retire()
            self.check_open()
        return entry

    def surplus(self) -> list[EngineEntry[BindT, MakerT]]:
        """Choose the entries to let go so that ``max_engines`` is kept, oldest first."""
        if self._max_engines is None or len(self._entries) <= self._max_engines:
            return []
        excess = len(self._entries) - self._max_engines
        oldest_first = sorted(self.entries()[:-1], key=lambda entry: entry.monitor.last_used)
        # a database in memory is its engine's one connection, hence always in use
        idle = (
            entry
            for entry in oldest_first
            if not entry.monitor.in_use and not is_memory(entry.key.url)
        )
        return list(islice(idle, excess))

    def find_route(
        self, bind_key: str | None, metadata: MetaData | None
    ) -> EngineEntry[BindT, MakerT] | None:
        """Find what routed sessions use for a table's metadata, or for a bind key without one."""
        return self._routes.get(bind_key) if metadata is None else self._tables.get(metadata)

    def mark_route(
        self, bind_key: str | None, metadata: MetaData | None, entry: EngineEntry[BindT, MakerT]
    ) -> None:
        """Have routed sessions find an entry without another look, unless it was let go."""
        with self._lock():
            if self._entries.get(entry.key) is not entry:
                return
            if metadata is None:
                self._routes[bind_key] = entry
            else:
                self._tables[metadata] = entry

    def mark_ready(self, dburi: str | URL, entry: EngineEntry[BindT, MakerT]) -> None:
        """Have sessions for a database, spelled like this, made without another look."""
        with self._lock():
            if self._entries.get(entry.key) is entry and dburi not in self.ready:
                self.ready[entry.key if dburi == entry.key else hidden(dburi)] = entry

    def forget_tables(self) -> None:
        """Have sessions look again whether the databases have their tables."""
        with self._lock():
            self.ready = {}
            self._tables = WeakKeyDictionary()

    def pop(self, entry: EngineEntry[BindT, MakerT]) -> None:
        """Forget an engine; its monitor is to be retired."""
        with self._lock():
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]
            self.ready = {name: ready for name, ready in self.ready.items() if ready is not entry}
            self._routes = {name: to for name, to in self._routes.items() if to is not entry}
            tables = {metadata: to for metadata, to in self._tables.items() if to is not entry}
            self._tables = WeakKeyDictionary(tables)

    def close_idle_files(self, deadline: float) -> None:
        """Close idle connections to SQLite files, before a fork that waits until a deadline."""
        for entry in self.entries():
            entry.monitor.close_idle_files(deadline)

    def clear(self) -> None:
        """Let every engine go, also when a cancellation comes in the midst of it."""
        for entry in self.entries():
            self.pop(entry)
            try:
                entry.monitor.retire()
            except BaseException:
                self.clear()
                raise

    def close(self) -> None:
        """Let every engine go, and make no more."""
        with self._lock():
            self._closed = True
        self.clear()

    def check_open(self) -> None:
        """Raise when the registry is closed.

        :raises ManagerClosedError: after ``close()``.
        """
        if self._closed:
            raise ManagerClosedError(
                "this manager is closed; make another one, or use dispose() to drop its pools and"
                " go on with it"
            )

    def abandon(self) -> None:
        """Forget the parent's engines, in a forked child, without looking at them."""
        leave_alone((self._entries, self.ready, self._routes, self._tables))
        self._entries = {}
        self.ready = {}
        self._routes = {}
        self._tables = WeakKeyDictionary()
        self._database_locks.renew()
        self._making = set()


_left_alone: list[object] = []


def leave_alone(inherited: object) -> None:
    """Keep what a forked child inherited and does not need, untouched, for good.

    To collect a thousand engines would cost the child more than to leave them in the memory
    that it shares with its parent.
    """
    _left_alone.append(inherited)

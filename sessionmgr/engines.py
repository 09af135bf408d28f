"""The registry: one Engine per database in this process, with its sessionmaker and monitor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.pool import QueuePool

from . import forking
from .errors import EngineOptionsError, ManagerClosedError
from .locks import DatabaseLocks
from .monitor import PoolMonitor, watched
from .sqlite import is_memory
from .stats import DatabaseStats
from .transient import note

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy import Engine
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import Session, sessionmaker

    from .options import ResolvedOptions
    from .urls import DatabaseKey

__all__ = ("EngineEntry", "EngineRegistry", "leave_alone", "make_engine")

#: PQTRANS_ACTIVE and PQTRANS_UNKNOWN of libpq: a statement is in progress, the connection is bad.
#: https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQTRANSACTIONSTATUS
_AMIDST = frozenset((1, 4))


@dataclass(eq=False, slots=True)
class EngineEntry:
    """What a process has for one database.

    :param key: the database.
    :param requested: the options that its engine was asked for with.
    :param engine: its engine.
    :param monitor: the monitor of the engine's pool.
    :param pooled: whether connections were to be kept when it was made.
    :param factory: its sessionmaker, once one was asked for.
    :param prepared: whether its tables are known to be there.
    """

    key: DatabaseKey
    requested: Mapping[str, Any] = field(repr=False)  # passwords may be in them
    engine: Engine
    monitor: PoolMonitor
    pooled: bool
    factory: sessionmaker[Session] | None = None
    prepared: bool = False

    def keep(self, factory: sessionmaker[Session]) -> sessionmaker[Session]:
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
) -> EngineEntry:
    """Make an engine, and let the callbacks have it before it connects.

    :raises EngineOptionsError: when ``create_engine`` does not know an option.
    """
    arguments = {**options.arguments, "poolclass": watched(options.arguments["poolclass"])}
    try:
        # looked up here, where OpenTelemetry may have put its own in place
        engine = sqlalchemy.create_engine(key.url, **arguments)
    except TypeError as error:
        if not str(error).startswith("Invalid argument(s)"):
            raise
        raise EngineOptionsError(f"database {key.describe()}: {error}") from error
    monitor = PoolMonitor(engine, key.describe(), options.ping_if_idle)
    sqlalchemy.event.listen(engine, "handle_error", _give_up_if_interrupted)
    try:
        for callback in callbacks:
            callback(engine)
    except BaseException as error:
        note(error, "raised by engine_callback; no engine was kept")
        monitor.retire()
        raise
    return EngineEntry(key, options.requested, engine, monitor, pooled)


def _give_up_if_interrupted(context: ExceptionContext) -> None:
    """Give up a connection on which the driver was interrupted.

    Celery's soft time limit, for one, is an Exception that a signal's handler raises there. The
    server's answer would be taken for that to the next statement, or the driver would take no
    statement any more. SQLAlchemy sees to interrupts that are no Exception.
    """
    if context.is_disconnect:
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


class EngineRegistry:
    """The engines of one manager in this process.

    Finding an engine takes no lock. Making one takes the lock of its database alone, so two
    databases are made side by side.
    """

    # _lock guards every change of _entries, and _closed. A database's own lock guards that it
    # is made once, and _making.

    def __init__(self, max_engines: int | None = None) -> None:
        """Begin empty.

        :param max_engines: how many to keep; ``None`` for any number. Beyond it the one that
            was idle for longest goes. Engines in use are never let go.
        """
        self._max_engines = max_engines
        self._entries: dict[DatabaseKey, EngineEntry] = {}
        self._lock = forking.ProcessLock()
        self._database_locks = DatabaseLocks()
        self._making: set[DatabaseKey] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: DatabaseKey) -> EngineEntry | None:
        """Find what there is for a database."""
        return self._entries.get(key)

    def find_engine(self, engine: Engine) -> EngineEntry | None:
        """Find the entry that an engine belongs to."""
        return next((entry for entry in self.entries() if entry.engine is engine), None)

    def entries(self) -> list[EngineEntry]:
        """List what there is, in the order in which it was made."""
        return list(self._entries.values())

    def lock(self, key: DatabaseKey) -> AbstractContextManager[None]:
        """Hold the lock of one database, for ``with``."""
        return self._database_locks.hold(key)

    def get(self, key: DatabaseKey, make: Callable[[], EngineEntry]) -> EngineEntry:
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

    def _publish(self, entry: EngineEntry) -> EngineEntry:
        with self._lock():
            if not self._closed:
                self._entries[entry.key] = entry
        if self._closed:
            entry.monitor.retire()
            self.check_open()
        return entry

    def surplus(self) -> list[EngineEntry]:
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

    def pop(self, entry: EngineEntry) -> None:
        """Forget an engine; its monitor is to be retired."""
        with self._lock():
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]

    def close_idle_files(self, deadline: float) -> None:
        """Close idle connections to SQLite files, before a fork that waits until a deadline."""
        for entry in self.entries():
            entry.monitor.close_idle_files(deadline)

    def clear(self) -> None:
        """Let every engine go."""
        for entry in self.entries():
            self.pop(entry)
            entry.monitor.retire()

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
                "this SessionManager is closed; make another one, or use dispose() to"
                " drop its pools and go on with it"
            )

    def abandon(self) -> None:
        """Forget the parent's engines, in a forked child, without looking at them."""
        leave_alone(self._entries)
        self._entries = {}
        self._database_locks.renew()
        self._making = set()


_left_alone: list[object] = []


def leave_alone(inherited: object) -> None:
    """Keep what a forked child inherited and does not need, untouched, for good.

    To collect a thousand engines would cost the child more than to leave them in the memory
    that it shares with its parent.
    """
    _left_alone.append(inherited)

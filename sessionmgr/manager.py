"""SessionManager: sessions over any number of databases, one manager for a tree of processes."""

from __future__ import annotations

import os
import pickle
import weakref
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import URL, Engine, MetaData, event
from sqlalchemy.orm import sessionmaker

from . import exits, forking
from .config import EngineCallback, check_callbacks, check_metadata, read_binds, show_key
from .engines import EngineEntry, EngineRegistry, leave_alone, make_engine
from .errors import EngineOptionsError, ManagerPickleError, NoSuchBindError
from .models import Base
from .monitor import open_connection
from .options import (
    Layer,
    check_count,
    check_options,
    check_session_options,
    conflict,
    request,
    resolve,
)
from .schema import create_tables, has_tables
from .sqlite import is_memory
from .stats import ManagerStats
from .transactions import run_transaction, transaction
from .urls import DatabaseKey, hidden, hide_secrets, list_names, parse_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction
    from typing_extensions import Self

__all__ = ("SessionManager",)

Result = TypeVar("Result")
Pooling = Literal["forked", "always", "never"]


class SessionManager:
    """Sessions for worker processes, over any number of databases, safe across fork.

    Make one where the program starts, and use it in every process that is forked from there::

        manager = SessionManager()

        with manager.begin("postgresql+psycopg://app@db/orders") as session:
            session.add(Order(...))

    Any number of threads may call anything at any time. A manager pickles as its configuration.
    """

    def __init__(
        self,
        engine_callback: EngineCallback | Iterable[EngineCallback] | None = None,
        *,
        metadata: MetaData | None = None,
        binds: Mapping[str, str | URL | Mapping[str, Any]] | None = None,
        pooling: Pooling = "forked",
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        max_engines: int | None = None,
    ) -> None:
        """Configure a manager. Nothing is connected, imported or created yet.

        :param engine_callback: called with each Engine once, after it was made and before it
            connects or anybody else has it; or several such callables, called in their order.
        :param metadata: the tables that a database is to have before the first session on it;
            default: those of ``sessionmgr.Base``.
        :param binds: bind key -> URL, or -> ``{"url": URL, option: value, ...}`` with engine
            options for that database. A bind key holds no ``://``.
        :param pooling: ``"forked"``: keep connections in workers only; ``"always"`` or
            ``"never"``: whatever the process is.
        :param engine_options: options of ``sqlalchemy.create_engine`` for every database, and
            ``ping_if_idle``: the seconds idle after which a pooled connection is tested at
            checkout (default 1.0; 0: every time; ``None``: never). Default options:
            ``pool_recycle=3600`` (seconds), ``pool_use_lifo=True``.
        :param session_options: options of ``sqlalchemy.orm.sessionmaker``.
        :param max_engines: how many engines to keep at most; the one that was idle for longest
            goes first, engines in use and databases in memory stay. The tables of an engine
            that was let go are looked for again when it comes back. Default: no limit.
        :raises EngineOptionsError: when an option's value cannot be, or a session option is
            unknown; an unknown engine option raises when an engine is made, for each
            dialect has its own.
        :raises DatabaseURLError: when a bind has no URL, or one that cannot be read.
        """
        if pooling not in ("forked", "always", "never"):
            raise EngineOptionsError(
                f"pooling must be 'forked', 'always' or 'never', not {hide_secrets(pooling)}"
            )
        if max_engines is not None:
            check_count("max_engines", max_engines)
        check_metadata(metadata)
        callbacks = check_callbacks(engine_callback)
        single = engine_callback is None or callable(engine_callback)
        #: What each new Engine is given to.
        self.engine_callback = engine_callback if single else callbacks
        self.pooling = pooling
        #: Whether this process is a worker, in which connections are kept.
        self.forked = forking.is_child()
        self._metadata = metadata
        self._max_engines = max_engines
        self._engine_options = check_options(
            Layer("the manager's engine_options", engine_options or {})
        )
        self._requested = request((self._engine_options,))
        check_session_options(session_options or {})
        self._session_options = dict(session_options or {})
        # Sessions are of this one's class until create_session() has made a sessionmaker for
        # their database: a class, with its events, takes a third of what an engine takes.
        maker = sessionmaker(**self._session_options)
        self._session_class: type[Session] = maker.class_
        self._session_arguments = {name: maker.kw[name] for name in maker.kw.keys() - {"bind"}}
        self._short_lived_maker: sessionmaker[Session] | None = None
        self._binds = read_binds(binds)
        self._registry = EngineRegistry(max_engines)
        # databases known to have their tables; inherited by children
        self._prepared: set[DatabaseKey] = set()
        # The hot path: a database as callers spell it -> its entry, tables prepared. Changed
        # under the lock, as a whole or by adding; read without it.
        self._ready: dict[str | URL, EngineEntry] = {}
        self._lock = forking.ProcessLock()
        forking.inherit(self)
        weakref.finalize(self, self._registry.clear).atexit = False  # exits does it there

    # -- engines and sessions

    def get_engine(self, dburi: str | URL, **kwargs: Any) -> Engine:
        """Return the engine of a database, the same one in each call of a process.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param kwargs: options of ``create_engine``, over the manager's and the bind's.
        :return: the engine. It belongs to the manager: do not dispose of it, ``invalidate``.
        :raises DatabaseURLError: when ``dburi`` cannot be read.
        :raises NoSuchBindError: when it is a bind key without an entry.
        :raises EngineOptionsError: when an option is unknown, contradicts another, or differs
            from that of the engine that is there.
        :raises ManagerClosedError: after ``close()``.
        """
        return self._entry(self._key(dburi), kwargs).engine

    def create_session(
        self, dburi: str | URL, short_lived_sessions: bool = False, **kwargs: Any
    ) -> tuple[Engine, sessionmaker[Session]]:
        """Return the engine and the sessionmaker of a database, the same ones in each call.

        The database's tables are not looked at; ``session_factory`` does that.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param short_lived_sessions: give a sessionmaker of the caller's own whose sessions
            leave no connection behind: each closes its own when it ends.
        :param kwargs: as for :meth:`get_engine`, which also tells what is raised.
        """
        entry = self._entry(self._key(dburi), kwargs)
        if not short_lived_sessions:
            return entry.engine, self._factory(entry)
        options = {**self._session_options, "class_": self._short_lived().class_}
        return entry.engine, sessionmaker(bind=entry.engine, **options)

    def session_factory(self, dburi: str | URL, **kwargs: Any) -> Session:
        """Open a session on a database whose tables are there.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param kwargs: as for :meth:`create_session`, which also tells what is raised.
        :return: a session; close it, or use it in a ``with`` statement, which does.
        """
        if not kwargs:
            try:
                ready = self._ready.get(dburi)
            except TypeError:  # not hashable: it is told below what a database is named by
                ready = None
            if ready is not None:
                if ready.factory is not None:
                    return ready.factory()
                return self._session_class(bind=ready.engine, **self._session_arguments)
        return self._open(dburi, **kwargs)

    def _open(self, dburi: str | URL, short_lived_sessions: bool = False, **kwargs: Any) -> Session:
        key = self._key(dburi)
        entry = self._entry(key, kwargs)
        self._prepare(entry)
        if short_lived_sessions:
            return self._short_lived()(bind=entry.engine)
        with self._lock():
            if self._registry.find(key) is entry and dburi not in self._ready:
                self._ready[key if dburi == key else hidden(dburi)] = entry
        if entry.factory is not None:
            return entry.factory()
        return self._session_class(bind=entry.engine, **self._session_arguments)

    def prepare_models(self, engine: Engine) -> None:
        """Create the tables that the engine's database lacks.

        They are looked for once for an engine of this manager, and at each call for another.
        Tables that are there need no right to create any. Missing ones are created under a lock
        that the database gives, so any number of processes may do this at once.

        :param engine: an engine of this manager, or another.
        :raises SchemaLockError: when a server does not grant the lock within 60 s.
        """
        if not isinstance(engine, Engine):
            raise EngineOptionsError(
                f"prepare_models takes an Engine, not {hide_secrets(engine)}; session_factory(url)"
                " prepares by itself"
            )
        entry = self._registry.find_engine(engine)
        if entry is not None:
            self._prepare(entry)
        elif not has_tables(engine, self.metadata):
            create_tables(engine, self.metadata, DatabaseKey(engine.url).describe())

    # -- units of work

    def begin(self, dburi: str | URL, **kwargs: Any) -> AbstractContextManager[Session]:
        """Open a session in a transaction, for a ``with`` statement.

        The end of the block commits, an exception rolls back; both close the session.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param kwargs: as for :meth:`session_factory`.
        """
        return transaction(self.session_factory(dburi, **kwargs))

    def run(
        self,
        dburi: str | URL,
        work: Callable[[Session], Result],
        *,
        attempts: int = 5,
        **kwargs: Any,
    ) -> Result:
        """Do work in a transaction, again with a new session when it failed by a passing error.

        Passing are deadlocks, serialization failures, locks not granted in time, and lost
        connections. After one of these the work may be done twice, should the connection be
        lost in the commit itself. Waits between attempts are random, growing from 10 ms to 1 s.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param work: is called with the session; it must not commit by itself.
        :param attempts: how often to try at most.
        :param kwargs: as for :meth:`session_factory`.
        :return: what ``work`` returned. Objects of the session are expired by its commit unless
            ``session_options`` has ``expire_on_commit=False``.
        :raises EngineOptionsError: when ``attempts`` is not a whole number of at least 1.
        """
        check_count("attempts", attempts)
        if not callable(work):
            raise EngineOptionsError(f"work must be callable, not {hide_secrets(work)}")
        return run_transaction(
            lambda: self.session_factory(dburi, **kwargs),
            work,
            attempts,
            lambda: self._key(dburi).describe(),
        )

    # -- state

    @property
    def metadata(self) -> MetaData:
        """The tables that every database of the manager is to have."""
        return Base.metadata if self._metadata is None else self._metadata

    @property
    def prepared(self) -> frozenset[str]:
        """The databases known to have their tables: bind keys, or URLs without secrets."""
        keys = {entry.key for entry in self._registry.entries() if entry.prepared}
        return frozenset(key.name for key in keys | self._prepared)

    @property
    def _engines(self) -> dict[DatabaseKey, Engine]:
        return {entry.key: entry.engine for entry in self._registry.entries()}

    @property
    def _sessions(self) -> dict[DatabaseKey, sessionmaker[Session]]:
        entries = self._registry.entries()
        return {entry.key: entry.factory for entry in entries if entry.factory is not None}

    def mark_worker(self) -> None:
        """Keep connections from now on: for workers that are not forked.

        Call it where threads, gevent, eventlet or solo workers start, or a spawned process that
        neither multiprocessing nor billiard started. Engines made before are let go.
        """
        self.forked = True  # first: an engine that is just being made is looked at afterwards
        for entry in self._registry.entries():
            if self._is_outdated(entry):
                self._drop(entry)

    def stats(self) -> ManagerStats:
        """Give the numbers of every pool of this process."""
        databases = tuple(entry.stats() for entry in self._registry.entries())
        return ManagerStats(os.getpid(), self.forked, databases)

    # -- letting go

    def invalidate(self, dburi: str | URL) -> None:
        """Forget one database: its engine, its sessionmaker, and that its tables are there.

        Sessions in use finish; then their connections close. Others are not touched.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :raises DatabaseURLError: when ``dburi`` cannot be read.
        :raises NoSuchBindError: when it is a bind key without an entry.
        """
        key = self._key(dburi)
        entry = self._registry.find(key)
        if entry is not None:
            self._drop(entry, tables=True)
        else:
            self._prepared.discard(key)

    def dispose(self) -> None:
        """Close the pools of this process. The manager stays usable, with new ones."""
        self._registry.clear()
        with self._lock():
            self._ready = {}

    def close(self) -> None:
        """Close the pools of this process for good: no session can be opened any more."""
        self._registry.close()
        with self._lock():
            self._ready = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "worker" if self.forked else "not forked"
        return f"<SessionManager: {kind}, pooling={self.pooling!r}, engines={len(self._registry)}>"

    # -- forks and pickles

    def _before_fork(self, deadline: float) -> None:
        self._registry.close_idle_files(deadline)

    def _after_fork(self) -> None:
        """Begin anew in a forked child: without engines, with the knowledge of the tables."""
        leave_alone(self._ready)
        self._ready = {}
        self._registry.abandon()
        self.forked = True

    def __reduce__(self) -> tuple[Any, ...]:
        configuration = {
            "engine_callback": self.engine_callback,
            "metadata": self._metadata,
            "binds": {
                key: {**bind.options, "url": url} for key, (url, bind) in self._binds.items()
            },
            "pooling": self.pooling,
            "engine_options": dict(self._engine_options.options),
            "session_options": self._session_options,
            "max_engines": self._max_engines,
        }
        for name, value in configuration.items():
            try:
                pickle.dumps(value)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ManagerPickleError(
                    f"{name} of this SessionManager cannot be pickled, which starting a process"
                    f" by spawn or forkserver takes: {error}. Give functions and classes that"
                    " can be imported by name"
                ) from error
        return _from_configuration, (configuration,)

    # -- inside

    def _key(self, dburi: str | URL) -> DatabaseKey:
        if isinstance(dburi, DatabaseKey):
            return dburi
        if isinstance(dburi, str) and "://" not in dburi:
            bind = self._binds.get(dburi)
            if bind is None:
                raise NoSuchBindError(
                    f"there is no bind key {show_key(dburi)}, and without '://' it is no URL. Bind"
                    f" keys of this manager: {list_names(self._binds)}"
                )
            url, _ = bind
            return DatabaseKey(url, dburi)
        return DatabaseKey(parse_url(dburi))

    def _entry(self, key: DatabaseKey, kwargs: Mapping[str, Any]) -> EngineEntry:
        call = check_options(Layer("this call", kwargs)) if kwargs else None

        def make() -> EngineEntry:
            bind = self._binds[key][1] if key in self._binds else None
            layers = [layer for layer in (self._engine_options, bind, call) if layer is not None]
            requested = self._requested if len(layers) == 1 else request(layers)
            pooled = self._keeps_connections()
            options = resolve(key, requested, layers, pooled=pooled)
            return make_engine(key, options, check_callbacks(self.engine_callback), pooled=pooled)

        entry = self._registry.get(key, make)
        while self._is_outdated(entry):
            self._drop(entry)
            entry = self._registry.get(key, make)
        if call is not None:
            error = conflict(key, entry.requested, call)
            if error is not None:
                raise error
        for old in self._registry.surplus():
            if old is not entry:
                self._drop(old, tables=True)
        return entry

    def _keeps_connections(self) -> bool:
        if exits.is_leaving():
            return False
        return self.pooling == "always" or (self.pooling == "forked" and self.forked)

    def _is_outdated(self, entry: EngineEntry) -> bool:
        """Tell whether an engine was made before this process was marked as a worker, or ended."""
        return entry.pooled is not self._keeps_connections() and not is_memory(entry.key.url)

    def _factory(self, entry: EngineEntry) -> sessionmaker[Session]:
        if entry.factory is not None:
            return entry.factory
        factory = sessionmaker(bind=entry.engine, **self._session_options)
        with self._lock():
            return entry.keep(factory)

    def _short_lived(self) -> sessionmaker[Session]:
        """Give the sessionmaker of short-lived sessions; SQLAlchemy never forgets a listener."""
        with self._lock():
            if self._short_lived_maker is None:
                self._short_lived_maker = sessionmaker(**self._session_options)
                event.listen(self._short_lived_maker, "after_begin", _leave_nothing)
            return self._short_lived_maker

    def _prepare(self, entry: EngineEntry) -> None:
        if self._is_prepared(entry):
            return
        # Outside the lock: threads must not queue behind a server that does not answer.
        if has_tables(entry.engine, self.metadata):
            self._mark_prepared(entry)
            return
        with self._registry.lock(entry.key):
            if not self._is_prepared(entry):
                create_tables(entry.engine, self.metadata, entry.key.describe())
                self._mark_prepared(entry)

    def _mark_prepared(self, entry: EngineEntry) -> None:
        entry.prepared = True
        with self._lock():
            # not if it was invalidated meanwhile: the tables may be gone again
            current = self._registry.find(entry.key) is entry
            if current and not is_memory(entry.key.url):
                self._prepared.add(entry.key)

    def _is_prepared(self, entry: EngineEntry) -> bool:
        return entry.prepared or entry.key in self._prepared

    def _drop(self, entry: EngineEntry, *, tables: bool = False) -> None:
        """Let an engine go; with ``tables``, forget that its database has them."""
        with self._lock():
            self._registry.pop(entry)
            if tables:
                self._prepared.discard(entry.key)
            self._ready = {name: ready for name, ready in self._ready.items() if ready is not entry}
        entry.monitor.retire()


def _leave_nothing(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    """Have the connection of a short-lived session closed at its checkin."""
    opened = open_connection(connection.connection)
    # in memory the one connection is the database
    if opened is not None and not is_memory(connection.engine.url):
        opened.leaves = True


def _from_configuration(configuration: dict[str, Any]) -> SessionManager:
    return SessionManager(**configuration)

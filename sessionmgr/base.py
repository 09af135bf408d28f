"""What every manager is: a configuration, and the engines that are made from it."""

from __future__ import annotations

import os
import pickle
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Literal

from . import exits, forking
from .binds import DEFAULT, Binds
from .config import EngineCallback, check_callbacks, check_metadata
from .engines import BindT, EngineEntry, EngineRegistry, MakerT
from .errors import EngineOptionsError, ManagerPickleError
from .greenlets import in_greenlet
from .models import Base
from .options import (
    Layer,
    check_count,
    check_options,
    check_routed_options,
    conflict,
    request,
    resolve,
)
from .routing import check_spans
from .schema import create_within, has_all
from .sqlite import is_memory
from .stats import ManagerStats
from .urls import DatabaseKey, hide_secrets, parse_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sqlalchemy import URL, Connection, Engine, MetaData

    from .binds import BindValue, Resolver
    from .isolation import ManagerIsolation

__all__ = ("BaseManager", "Pooling")

Pooling = Literal["forked", "always", "never"]


class BaseManager(ABC, Generic[BindT, MakerT]):
    """The base of SessionManager, and of its asynchronous twin."""

    def __init__(
        self,
        engine_callback: EngineCallback | Iterable[EngineCallback] | None = None,
        *,
        metadata: MetaData | None = None,
        binds: Mapping[str, BindValue] | None = None,
        resolver: Resolver | None = None,
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
            options for that database. A bind key holds no ``://``. Tables whose metadata has no
            ``info["bind_key"]`` are in ``"default"``.
        :param resolver: is called with a bind key that is not in ``binds`` (a tenant's, say), and
            gives what would be there, or ``None``. Its answer is kept for as long as the engine
            that is made with it: until ``invalidate``, or until ``max_engines`` lets it go. Any
            thread may call it, and several may ask for one key at the same time.
        :param pooling: ``"forked"``: keep connections in workers only; ``"always"`` or
            ``"never"``: whatever the process is.
        :param engine_options: options of ``sqlalchemy.create_engine`` for every database, and
            ``ping_if_idle``: the seconds idle after which a pooled connection is tested at
            checkout (default 1.0; 0: every time; ``None``: never). Default options:
            ``pool_recycle=3600`` (seconds), ``pool_use_lifo=True``. For SQLite, and set aside for
            other databases; ``None`` leaves SQLite's own setting alone:
            ``sqlite_foreign_keys`` (default True): check foreign keys;
            ``sqlite_journal_mode`` ("WAL"): of files that can be written to;
            ``sqlite_busy_timeout`` (5.0): seconds to wait for a lock, unless the driver is given a
            ``timeout``;
            ``sqlite_synchronous`` ("NORMAL", in WAL mode only; another, or this when it is named,
            in every mode): when to wait for the disk;
            ``sqlite_transactions`` (True): a transaction begins with its first statement, deferred
            when that reads, else IMMEDIATE; "writes": with the first that does not read;
            False: as the driver has it.
        :param session_options: options of ``sqlalchemy.orm.sessionmaker``, or of
            ``sqlalchemy.ext.asyncio.async_sessionmaker`` for an asynchronous manager.
        :param max_engines: how many engines to keep at most; the one that was idle for longest
            goes first, engines in use and databases in memory stay; those that were in use then
            go when an engine is asked for later. The tables of an engine that was let go are looked
            for again when it comes back. Default: no limit.
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
        self._check_session_options({} if session_options is None else session_options)
        self._session_options = dict(session_options or {})
        # Sessions are of this one's class until create_session() has made a sessionmaker for
        # their database: a class, with its events, takes a third of what an engine takes.
        maker = self._make_sessionmaker()
        self._session_class = maker.class_
        self._session_arguments = {name: maker.kw[name] for name in maker.kw.keys() - {"bind"}}
        self._binds = Binds(binds, resolver)
        # databases known to have their tables; inherited by children
        self._prepared: set[DatabaseKey] = set()
        self._short_lived_maker: MakerT | None = None
        self._routed_maker: MakerT | None = None
        # what undoes a test
        self._isolation: ManagerIsolation | None = None
        self._lock = forking.ProcessLock()
        self._set_up()
        forking.inherit(self)

    # -- what the two kinds of manager do each in its way

    _check_session_options: Callable[[Mapping[str, Any]], None]
    #: Whether engines belong to event loops.
    _in_loops = False
    #: Gives the class of a database's dialect; raises where its driver is of the other kind.
    _dialect: Callable[[DatabaseKey], Any]

    @abstractmethod
    def _make_engine(self, *arguments: Any, **options: Any) -> EngineEntry[BindT, MakerT]:
        """Make an engine, as :func:`sessionmgr.engines.make_engine` does."""

    @abstractmethod
    def _set_up(self) -> None:
        """Make what the engines are kept in."""

    @abstractmethod
    def _registries(self) -> list[EngineRegistry[BindT, MakerT]]:
        """List the registries of this process."""

    @abstractmethod
    def _make_sessionmaker(self, **arguments: Any) -> Any:
        """Make a sessionmaker with the manager's options, and these."""

    @abstractmethod
    def _make_short_lived(self) -> MakerT:
        """Make the sessionmaker of sessions that close their connections."""

    @abstractmethod
    def _make_routed(self) -> MakerT:
        """Make the sessionmaker of sessions that pick their engines."""

    @abstractmethod
    def _prepare_tables(
        self,
        registry: EngineRegistry[BindT, MakerT],
        entry: EngineEntry[BindT, MakerT],
        metadata: MetaData,
    ) -> None:
        """Create the tables of a metadata that a database lacks."""

    # -- bind keys

    def add_bind(self, bind_key: str, bind: BindValue) -> None:
        """Add a database under a bind key; in this process, and in those forked from it later.

        A ``resolver`` serves processes that are there already.

        :param bind_key: the key; it holds no ``://``.
        :param bind: URL, or ``{"url": URL, option: value, ...}``.
        :raises EngineOptionsError: when the key stands for another database, or for other options.
        :raises DatabaseURLError: when there is no URL, or it cannot be read.
        """
        self._binds.add(bind_key, bind, self._answered)

    def _take_bind(self, bind_key: str) -> DatabaseKey:
        """Take a bind key away; the engine is to be let go.

        :raises NoSuchBindError: when it is none.
        """
        key = self._binds.remove(bind_key)
        for entry in self._entries():
            # Joins of its tables with others, where it was the same database, are looked at anew.
            entry.engine.clear_compiled_cache()
        return key

    # -- state

    @property
    def metadata(self) -> MetaData:
        """The tables that every database of the manager is to have."""
        return Base.metadata if self._metadata is None else self._metadata

    @property
    def prepared(self) -> frozenset[str]:
        """The databases known to have their tables: bind keys, or URLs without secrets."""
        keys = {entry.key for entry in self._entries() if entry.prepared}
        return frozenset(key.name for key in keys | self._prepared)

    @property
    def _engines(self) -> dict[DatabaseKey, BindT]:
        return {entry.key: entry.bind for entry in self._entries()}

    @property
    def _sessions(self) -> dict[DatabaseKey, MakerT]:
        return {entry.key: entry.factory for entry in self._entries() if entry.factory is not None}

    def mark_worker(self) -> None:
        """Keep connections from now on: for workers that are not forked.

        Call it where threads, gevent, eventlet or solo workers start, or a spawned process that
        neither multiprocessing nor billiard started. Engines made before are let go.
        """
        self.forked = True  # first: an engine that is just being made is looked at afterwards
        for registry in self._registries():
            for entry in registry.entries():
                if self._is_outdated(entry):
                    self._drop(registry, entry)

    def stats(self) -> ManagerStats:
        """Give the numbers of every pool of this process."""
        databases = tuple(entry.stats() for entry in self._entries())
        return ManagerStats(os.getpid(), self.forked, databases)

    def __repr__(self) -> str:
        kind = "worker" if self.forked else "not forked"
        return (
            f"<{type(self).__name__}: {kind}, pooling={self.pooling!r},"
            f" engines={len(self._entries())}>"
        )

    # -- forks, pickles and the end

    def _before_fork(self, deadline: float) -> None:
        for registry in self._registries():
            registry.close_idle_files(deadline)

    def _after_fork(self) -> None:
        """Begin anew in a forked child: without engines, with the knowledge of the tables."""
        self._abandon()
        self.forked = True

    def _abandon(self) -> None:
        """Forget the parent's engines, in a forked child, without looking at them."""
        for registry in self._registries():
            registry.abandon()

    def _leave(self) -> None:
        """Close the pools at the end of the process."""
        for registry in self._registries():
            registry.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        configuration = {
            "engine_callback": self.engine_callback,
            "metadata": self._metadata,
            "binds": self._binds.configuration(),
            "resolver": self._binds.resolver,
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
                    f"{name} of this {type(self).__name__} cannot be pickled, which starting a"
                    f" process by spawn or forkserver takes: {error}. Give functions and classes"
                    " that can be imported by name"
                ) from error
        return _from_configuration, (type(self), configuration)

    # -- inside

    def _entries(self) -> list[EngineEntry[BindT, MakerT]]:
        return [entry for registry in self._registries() for entry in registry.entries()]

    def _key(self, dburi: str | URL) -> DatabaseKey:
        if isinstance(dburi, DatabaseKey):
            return dburi
        if isinstance(dburi, str) and "://" not in dburi:
            return self._binds.find(dburi) or self._answered(dburi) or self._binds.resolve(dburi)
        return DatabaseKey(parse_url(dburi))

    def _answered(self, bind_key: str) -> DatabaseKey | None:
        """Find what the resolver has answered, and an engine was made with."""
        found = (registry.find(bind_key) for registry in self._registries())
        entry = next(filter(None, found), None)
        return None if entry is None or not self._binds.is_current(entry.key) else entry.key

    def _entry(
        self,
        registry: EngineRegistry[BindT, MakerT],
        key: DatabaseKey,
        kwargs: Mapping[str, Any],
    ) -> EngineEntry[BindT, MakerT]:
        """Find what a registry has for a database, or make it.

        :param kwargs: the engine options of the call.
        """
        call = check_options(Layer("this call", kwargs)) if kwargs else None

        def make() -> EngineEntry[BindT, MakerT]:
            current = self._current(key)
            given = (self._engine_options, current.options, call)
            layers = [layer for layer in given if layer is not None]
            requested = self._requested if len(layers) == 1 else request(layers)
            pooled = self._keeps_connections()
            options = resolve(current, self._dialect(current), requested, layers, pooled=pooled)
            callbacks = check_callbacks(self.engine_callback)
            entry = self._watch_spans(self._make_engine(current, options, callbacks, pooled=pooled))
            if self._isolation is not None:
                self._isolation.add(registry, entry)
            return entry

        entry = registry.get(key, make)
        while self._is_outdated(entry):
            self._drop(registry, entry)
            entry = registry.get(key, make)
        if call is not None:
            error = conflict(key, entry.requested, call)
            if error is not None:
                raise error
        for old in registry.surplus():
            if old is not entry:
                self._drop(registry, old, tables=True)
        return entry

    def _current(self, key: DatabaseKey) -> DatabaseKey:
        """Give what a bind key stands for when its engine is made: it may have been removed.

        :raises NoSuchBindError: when it was, since it was looked up; the engine would be nobody's.
        """
        if key.bind_key is None or self._binds.is_current(key):
            return key
        return self._binds.find(key.bind_key) or self._binds.resolve(key.bind_key)

    def _keeps_connections(self) -> bool:
        if exits.is_leaving():
            return False
        return self.pooling == "always" or (self.pooling == "forked" and self.forked)

    def _is_outdated(self, entry: EngineEntry[BindT, MakerT]) -> bool:
        """Tell whether an engine was made before this process was marked as a worker, or ended."""
        return entry.pooled is not self._keeps_connections() and not is_memory(entry.key.url)

    def _factory(self, entry: EngineEntry[BindT, MakerT]) -> MakerT:
        if entry.factory is not None:
            return entry.factory
        factory: MakerT = self._make_sessionmaker(bind=entry.bind)
        with self._lock():
            return entry.keep(factory)

    def _short_lived(self) -> MakerT:
        """Give the sessionmaker of short-lived sessions; SQLAlchemy never forgets a listener."""
        with self._lock():
            if self._short_lived_maker is None:
                self._short_lived_maker = self._make_short_lived()
            return self._short_lived_maker

    def _routed(self, options: Mapping[str, Any]) -> MakerT:
        """Give the sessionmaker of routed sessions, for these options.

        :raises EngineOptionsError: when one of them is unknown, or cannot be.
        """
        if self._routed_maker is None or options:
            check_routed_options(
                {**self._session_options, **options}, self._check_session_options, set(options)
            )
        with self._lock():
            if self._routed_maker is None:
                self._routed_maker = self._make_routed()
            return self._routed_maker

    def _route(
        self,
        registry: EngineRegistry[BindT, MakerT],
        bind_key: str | None,
        metadata: MetaData | None,
        connection: Callable[[], Connection] | None,
    ) -> Engine:
        """Give a routed session the engine of a bind key, as ``_find_engine`` of its class."""
        entry = registry.find_route(bind_key, metadata)
        if entry is None:
            entry = self._entry(registry, self._key(DEFAULT if bind_key is None else bind_key), {})
            if metadata is None or self._has_tables(registry, entry, metadata, connection):
                registry.mark_route(bind_key, metadata, entry)
        return entry.engine

    def _has_tables(
        self,
        registry: EngineRegistry[BindT, MakerT],
        entry: EngineEntry[BindT, MakerT],
        metadata: MetaData,
        connection: Callable[[], Connection] | None,
    ) -> bool:
        """See that a database has the tables of a metadata; tell whether it has them for good."""
        if entry.engine.dialect.is_async and not in_greenlet():
            return False  # get_bind() was called where nothing can be awaited
        if connection is not None:  # another one may not be to be had, or wait for this one
            if has_all(connection(), metadata):
                return True
            if entry.engine.dialect.name == "sqlite":
                create_within(connection(), metadata)
                return False  # a rollback takes them away
        self._prepare_tables(registry, entry, metadata)
        return True

    def _watch_spans(self, entry: EngineEntry[BindT, MakerT]) -> EngineEntry[BindT, MakerT]:
        if entry.key.bind_key is not None:
            check_spans(entry.engine, self._binds.database_of)
        return entry

    def _make_session(self, entry: EngineEntry[BindT, MakerT]) -> Any:
        if entry.factory is not None:
            return entry.factory()  # type: ignore[operator]  # a sessionmaker of either kind
        return self._session_class(bind=entry.bind, **self._session_arguments)

    def _mark_prepared(
        self, registry: EngineRegistry[BindT, MakerT], entry: EngineEntry[BindT, MakerT]
    ) -> None:
        entry.prepared = True
        with self._lock():
            # not if it was invalidated meanwhile: the tables may be gone again
            current = registry.find(entry.key) is entry
            if current and not is_memory(entry.key.url):
                self._prepared.add(entry.key)

    def _is_prepared(self, entry: EngineEntry[BindT, MakerT]) -> bool:
        return entry.prepared or entry.key in self._prepared

    def _drop(
        self,
        registry: EngineRegistry[BindT, MakerT],
        entry: EngineEntry[BindT, MakerT],
        *,
        tables: bool = False,
    ) -> None:
        """Let an engine go; with ``tables``, forget that its database has them."""
        if tables:
            self._prepared.discard(entry.key)
        registry.pop(entry)
        entry.monitor.retire()


def _from_configuration(kind: Callable[..., Any], configuration: dict[str, Any]) -> Any:
    return kind(**configuration)

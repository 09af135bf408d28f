"""SessionManager: sessions over any number of databases, one manager for a tree of processes."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import URL, Engine, event
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .base import BaseManager
from .engines import EngineEntry, EngineRegistry, make_engine
from .errors import EngineOptionsError
from .options import check_count, check_scope, check_session_options, sync_dialect
from .pools import leave_nothing
from .routing import routed
from .schema import create_tables, has_tables
from .scopes import forget_at_fork
from .transactions import run_transaction, transaction
from .urls import DatabaseKey, hide_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import AbstractContextManager

    from sqlalchemy import MetaData
    from typing_extensions import Self

__all__ = ("SessionManager",)

Result = TypeVar("Result")
Entry = EngineEntry[Engine, sessionmaker[Session]]


class SessionManager(BaseManager[Engine, sessionmaker[Session]]):
    """Sessions for worker processes, over any number of databases, safe across fork.

    Make one where the program starts, and use it in every process that is forked from there::

        manager = SessionManager()

        with manager.begin("postgresql+psycopg://app@db/orders") as session:
            session.add(Order(...))

    Any number of threads may call anything at any time. A manager pickles as its configuration.
    """

    _check_session_options = staticmethod(check_session_options)
    _dialect = staticmethod(sync_dialect)

    def _set_up(self) -> None:
        self._registry: EngineRegistry[Engine, sessionmaker[Session]] = EngineRegistry(
            self._max_engines
        )
        weakref.finalize(self, self._registry.clear).atexit = False  # exits does it there

    def _registries(self) -> list[EngineRegistry[Engine, sessionmaker[Session]]]:
        return [self._registry]

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
        return self._entry(self._registry, self._key(dburi), kwargs).engine

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
        entry = self._entry(self._registry, self._key(dburi), kwargs)
        if not short_lived_sessions:
            return entry.engine, self._factory(entry)
        return entry.engine, self._make_sessionmaker(
            bind=entry.engine, class_=self._short_lived().class_
        )

    def session_factory(self, dburi: str | URL, **kwargs: Any) -> Session:
        """Open a session on a database whose tables are there.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param kwargs: as for :meth:`create_session`, which also tells what is raised.
        :return: a session; close it, or use it in a ``with`` statement, which does.
        """
        if not kwargs:
            try:
                ready = self._registry.ready.get(dburi)
            except TypeError:  # not hashable: it is told below what a database is named by
                ready = None
            if ready is not None:
                session: Session = self._make_session(ready)
                return session
        return self._open(dburi, **kwargs)

    def _open(self, dburi: str | URL, short_lived_sessions: bool = False, **kwargs: Any) -> Session:
        entry = self._entry(self._registry, self._key(dburi), kwargs)
        self._prepare(entry)
        if short_lived_sessions:
            return self._short_lived()(bind=entry.engine)
        self._registry.mark_ready(dburi, entry)
        session: Session = self._make_session(entry)
        return session

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
                f"prepare_models takes an Engine, not {type(engine).__name__}; session_factory(url)"
                " prepares by itself"
            )
        entry = self._registry.find_engine(engine)
        if entry is not None:
            self._prepare(entry)
        elif not has_tables(engine, self.metadata):
            create_tables(engine, self.metadata, DatabaseKey(engine.url).describe())

    # -- sessions over several databases

    def session(self, **options: Any) -> Session:
        """Open a session that picks the engine of each statement by its tables' bind key.

        The key is ``metadata.info["bind_key"]``; without one it is ``"default"``. Tables that a
        database lacks are created before the first statement on one of its metadata's. A
        :class:`sessionmgr.routing.RoutedSession` tells what a commit over several databases is.

        :param options: options of the session; with ``bind`` it is for that engine alone.
        :return: a session; close it, or use it in a ``with`` statement, which does.
        :raises EngineOptionsError: when an option is unknown, or is one of the manager's only.
        """
        maker = self._routed_maker
        if maker is None or options:
            maker = self._routed(options)
        return maker(**options)

    def scoped(self, scope: Callable[[], Hashable] | None = None) -> scoped_session[Session]:
        """Give a ``scoped_session`` of such sessions.

        A process that is forked begins with none: the parent's are the parent's.

        :param scope: gives what has one session: a request, a task; default: the thread.
        """
        check_scope(scope)
        routed = self._routed({})
        factory = sessionmaker(class_=routed.class_, **routed.kw)
        return forget_at_fork(lambda: scoped_session(factory, scopefunc=scope))

    def _find_engine(self, *wanted: Any) -> Engine:
        return self._route(self._registry, *wanted)

    # -- units of work

    def begin(
        self, dburi: str | URL, *, write: bool = True, **kwargs: Any
    ) -> AbstractContextManager[Session]:
        """Open a session in a transaction, for a ``with`` statement.

        The end of the block commits, an exception rolls back; both close the session.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param write: on SQLite, take the lock for writing at once (BEGIN IMMEDIATE). With False a
            block that begins by reading holds up no writer; should it write afterwards, and
            another have written since, it is told "database is locked". On other databases it
            changes nothing.
        :param kwargs: as for :meth:`session_factory`.
        """
        return transaction(self.session_factory(dburi, **kwargs), write=write)

    def run(
        self,
        dburi: str | URL,
        work: Callable[[Session], Result],
        *,
        attempts: int = 5,
        write: bool = True,
        **kwargs: Any,
    ) -> Result:
        """Do work in a transaction, again with a new session when it failed by a passing error.

        Passing are deadlocks, serialization failures, locks not granted in time, and lost
        connections. After one of these the work may be done twice, should the connection be
        lost in the commit itself. Waits between attempts are random, growing from 10 ms to 1 s.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or bind key.
        :param work: is called with the session; it must not commit by itself.
        :param attempts: how often to try at most.
        :param write: as for :meth:`begin`. With False, work that reads before it writes is done
            again when another transaction has written in between.
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
            write=write,
        )

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
            self._drop(self._registry, entry, tables=True)
        else:
            self._prepared.discard(key)

    def remove_bind(self, bind_key: str) -> None:
        """Take a database away from this process, as ``invalidate`` does, with its bind key.

        :param bind_key: a key of ``binds``, or an added one. Without it the resolver is asked.
        :raises NoSuchBindError: when it is none.
        """
        key = self._take_bind(bind_key)
        with self._registry.lock(key):  # after whoever is just making its engine
            self.invalidate(key)

    def dispose(self) -> None:
        """Close the pools of this process. The manager stays usable, with new ones."""
        self._registry.clear()

    def close(self) -> None:
        """Close the pools of this process for good: no session can be opened any more."""
        self._registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside

    def _make_engine(self, *arguments: Any, **options: Any) -> Entry:
        return make_engine(*arguments, **options)

    def _make_sessionmaker(self, **arguments: Any) -> sessionmaker[Session]:
        return sessionmaker(**{**self._session_options, **arguments})

    def _make_short_lived(self) -> sessionmaker[Session]:
        maker = self._make_sessionmaker()
        event.listen(maker, "after_begin", leave_nothing)
        return maker

    def _make_routed(self) -> sessionmaker[Session]:
        plain = self._session_options.get("class_", Session)
        find_engine = partial(self._route, self._registry)
        return self._make_sessionmaker(class_=routed(plain, find_engine))

    def _prepare_tables(
        self,
        registry: EngineRegistry[Engine, sessionmaker[Session]],
        entry: Entry,
        metadata: MetaData,
    ) -> None:
        if metadata is self.metadata:
            self._prepare(entry)
        elif not has_tables(entry.engine, metadata):
            with registry.lock(entry.key):
                create_tables(entry.engine, metadata, entry.key.describe())

    def _prepare(self, entry: Entry) -> None:
        if self._is_prepared(entry):
            return
        # Outside the lock: threads must not queue behind a server that does not answer.
        if has_tables(entry.engine, self.metadata):
            self._mark_prepared(self._registry, entry)
            return
        with self._registry.lock(entry.key):
            if not self._is_prepared(entry):
                create_tables(entry.engine, self.metadata, entry.key.describe())
                self._mark_prepared(self._registry, entry)

"""DatabaseBackend: Celery's face of a ResultStore."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery import states
from celery.backends.base import BaseBackend, decompress_payload
from celery.exceptions import ImproperlyConfigured
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import ResultBase, result_from_tuple
from celery.utils.imports import symbol_by_name
from celery.utils.time import maybe_timedelta
from kombu.utils.encoding import ensure_bytes
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError, InterfaceError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm.exc import StaleDataError

from sessionmgr import forking
from sessionmgr.errors import ResultTimeoutError, SessionManagerError
from sessionmgr.results import READY_STATES, ResultStore, TaskResult
from sessionmgr.results.models import map_tables
from sessionmgr.results.records import EXTENDED
from sessionmgr.results.waiting import Pace
from sessionmgr.transient import is_hopeless, is_lost
from sessionmgr.urls import masked, parse_url

from .chords import ChordCounting
from .pickles import dumps, loads
from .restarts import RestartWaiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from celery import Celery
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session
    from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState


__all__ = ("DatabaseBackend",)

log = logging.getLogger("sessionmgr")

#: What Celery's backend tries again, and a pool that had no connection free in time.
RETRYABLE = (
    DatabaseError,
    InterfaceError,
    InvalidRequestError,
    StaleDataError,
    PoolTimeoutError,
)

#: The first byte of every pickle since protocol 2.
PICKLE_MARK = b"\x80"

#: As many connections at most as SQLAlchemy's pool opens, but all of them are kept: beyond its five
#: it closes each after use, and a gevent worker opens one for every few tasks.
POOL = {"pool_size": 15, "max_overflow": 0}

#: The key in the info of a connection on which a session has begun a transaction.
_SESSION = "sessionmgr_result_session"

_lock = forking.ProcessLock()
# app -> what its backends are configured with -> the store; guarded by _lock
_stores: WeakKeyDictionary[Celery, dict[str, ResultStore]] = WeakKeyDictionary()


def _store_of(app: Celery, url: Any, **options: Any) -> ResultStore:
    """Give the one store of an app for a database, whichever thread's backend asks."""
    # not str(): that of a URL object masks the password
    rendered = parse_url(url).render_as_string(hide_password=False)
    key = repr((rendered, sorted(options.items(), key=lambda item: item[0])))
    with _lock():
        stores = _stores.setdefault(app, {})
        if key not in stores:
            stores[key] = ResultStore(url, attempts=1, **options)
        return stores[key]


class DatabaseBackend(ChordCounting, RestartWaiting, BaseBackend):  # type: ignore[misc]  # Celery has no type hints
    """Celery's face of a :class:`~sessionmgr.ResultStore`.

    Threads have a backend object each, as Celery wants it, and share the store of their app.
    """

    supports_native_join = True
    supports_result_compression = True

    def __init__(
        self,
        dburi: str | None = None,
        engine_options: dict[str, Any] | None = None,
        url: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Read the configuration of the app, and see to the tables.

        :param dburi: URL of the database; default: the setting ``database_url``.
        :param engine_options: added to the setting ``database_engine_options``.
        :param url: the same as ``dburi``, for ``result_backend``.
        :param kwargs: ``short_lived_sessions`` and ``engine_callback`` in place of the settings,
            and what Celery gives every backend.
        :raises ImproperlyConfigured: when there is no URL, or the callback is none.
        """
        super().__init__(expires_type=maybe_timedelta, url=url, **kwargs)
        conf = self.app.conf
        # as Celery's database backend has it, unless the user has set them
        for name, value in (("always_retry", True), ("max_retries", 3)):
            if not conf.value_set_for(f"result_backend_{name}") or getattr(self, name) is None:
                setattr(self, name, value)
        self.waits_for_restarts = not conf.value_set_for("result_backend_max_retries")
        self.url = _database_url(url) or dburi or conf.database_url
        if not self.url:
            raise ImproperlyConfigured(
                "no database for the results: put its URL after 'sessionmgr+' in result_backend,"
                " or into the setting database_url"
            )
        self.engine_options = {**(conf.database_engine_options or {}), **(engine_options or {})}
        if self.engine_options.get("pool_recycle", -1) is None:
            self.engine_options["pool_recycle"] = -1  # Celery's manual has None for "never"
        self.short_lived_sessions = kwargs.get(
            "short_lived_sessions", conf.database_short_lived_sessions
        )
        transport = conf.result_backend_transport_options or {}
        #: Where the results are.
        self.store = _store_of(
            self.app,
            self.url,
            extended=bool(self.extended_result),
            table_names=conf.database_table_names,
            table_schemas=conf.database_table_schemas,
            engine_options=_pooled(self.engine_options),
            engine_callback=_callback(kwargs, conf),
            create_tables=conf.database_create_tables_at_setup is True or "missing",
            short_lived_sessions=bool(self.short_lived_sessions),
            notify=bool(transport.get("notify", False)),
        )
        if conf.database_create_tables_at_setup is True:
            self._create_tables()

    # -- results

    def _store_result(
        self,
        task_id: str | None,
        result: Any,
        state: str | None,
        traceback: str | None = None,
        request: Any = None,
        **kwargs: Any,
    ) -> None:
        if task_id is None:  # a task that was called as a function; nobody can ask for this
            return
        state = state or states.PENDING  # update_state(meta=...) alone; the column's default
        children = self.current_task_children(request)
        self.store.store(
            task_id,
            state,
            self._encoded(result),
            traceback=traceback,
            children=self._encoded(children) if children else None,
            **(self._extended(state, request) if self.store.extended else {}),
        )

    def _extended(self, state: str, request: Any) -> dict[str, Any]:
        meta = self._get_result_meta(None, state, None, request, format_date=False, encode=True)
        extended = {name: meta.get(name) for name in EXTENDED}
        headers = meta.get("stamped_headers")
        if headers:
            stamps = {name: meta[name] for name in headers if name in meta}
            info = {"stamped_headers": headers, "stamps": stamps}
            extended["stamps"] = self._encoded(info)
        return extended

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        return self._meta(self.store.get(task_id) or TaskResult(task_id, states.PENDING))

    def _meta(self, row: TaskResult) -> dict[str, Any]:
        """Decode a row into what Celery calls a task's meta."""
        meta: dict[str, Any] = {
            "task_id": row.task_id,
            "status": row.status,
            "result": self._decode_stored(row.result),
            "traceback": row.traceback,
            "date_done": row.date_done,
            "children": self._decode_stored(row.children),
        }
        if self.store.extended:
            meta.update(
                name=row.name,
                args=self.decode(row.args),
                kwargs=self.decode(row.kwargs),
                worker=row.worker,
                retries=row.retries,
                queue=row.queue,
                **self._stamps(row.stamps),
            )
        decoded: dict[str, Any] = self.meta_from_decoded(meta)
        return decoded

    def _stamps(self, payload: bytes | None) -> dict[str, Any]:
        if payload is None:
            return {}
        try:
            info = self.decode(payload)
            stamps = info.get("stamps", {})
            return {**{k: info[k] for k in ("stamped_headers",) if k in info}, **stamps}
        except Exception as error:  # noqa: BLE001 - serializers have error trees of their own
            log.warning("the stamps of a task cannot be decoded, hence are left out: %s", error)
            return {}

    def _encoded(self, value: Any) -> bytes:
        encoded: bytes = ensure_bytes(self.encode(value))  # type: ignore[no-untyped-call]  # kombu
        return encoded

    def _encode(self, data: Any) -> Any:
        if self.serializer != "pickle":
            return super()._encode(data)
        return self.content_type, self.content_encoding, dumps(data)

    def decode(self, payload: Any) -> Any:
        """Decode what the serializer has encoded."""
        if payload and self.serializer == "pickle" and self.content_type in (self.accept or ()):
            return loads(decompress_payload(payload), self)
        return super().decode(payload)

    def _decode_stored(self, payload: bytes | None) -> Any:
        """Decode what Celery stored; before 5.7 it pickled, whatever the serializer.

        What the serializer cannot read and does not begin as a pickle is an error, so nothing
        else is ever unpickled (celery/celery#3025).
        """
        try:
            return self.decode(payload)
        except Exception as error:
            if payload is None or payload[:1] != PICKLE_MARK:
                raise
            log.warning("reading a pickle, as Celery before 5.7 stored it: %s", error)
            return loads(payload, self)

    def task_result_exists(self, task_id: str) -> bool:
        """Tell whether anything is known of a task."""
        return bool(self._ensure_retryable(self._task_result_exists, task_id=task_id))

    def _task_result_exists(self, task_id: str) -> bool:
        return self.store.exists(task_id)

    def _forget(self, task_id: str) -> None:
        self.store.forget(task_id)

    # -- waiting

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float | None = 0.5,
        no_ack: bool = True,
        on_message: Callable[[Any], object] | None = None,
        on_interval: Callable[[], object] | None = None,
        max_iterations: int | None = None,
        READY_STATES: frozenset[str] = READY_STATES,  # noqa: N803 - Celery's name
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give ids and metas of tasks as they end: one query for all of them at each look.

        :param task_ids: ids of tasks.
        :param timeout: seconds to wait for them.
        :param interval: the longest pause between two looks, in seconds; the first are shorter.
        :param on_message: is called with each meta.
        :param on_interval: is called at each look that found nothing.
        :param max_iterations: how often to look; default: until all have ended.
        :raises celery.exceptions.TimeoutError: when some have not ended after ``timeout``.
        """
        self._ensure_not_eager()
        open_ids = set(task_ids)
        for task_id in list(open_ids):
            meta = self._cache.get(task_id)
            if meta is not None and meta["status"] in READY_STATES:
                open_ids.discard(task_id)
                yield task_id, meta
        for row in self._ended(open_ids, timeout, interval, on_interval, max_iterations):
            meta = self._meta(row)
            if row.status == states.SUCCESS:  # what else there is another run may replace
                self._cache[row.task_id] = meta
            if on_message is not None:
                on_message(meta)
            yield row.task_id, meta

    def _ended(
        self,
        task_ids: set[str],
        timeout: float | None,
        interval: float | None,
        on_interval: Callable[[], object] | None,
        max_iterations: int | None = None,
    ) -> Iterator[TaskResult]:
        # Celery's backend takes 0 for no pause; here that is the shortest there is
        longest = 0.5 if interval is None else interval or Pace.SHORTEST
        if max_iterations:
            timeout = (max_iterations - 1) * longest
        try:
            yield from self.store.wait(
                task_ids, timeout, max_interval=longest, on_interval=on_interval
            )
        except ResultTimeoutError as error:
            if not max_iterations:
                raise CeleryTimeoutError("The operation timed out.") from error

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], object] | None = None,
    ) -> dict[str, Any]:
        """Wait for a task, and give its meta.

        The arguments, and what raises, are those of :meth:`get_many`.
        """
        for _, meta in self.get_many([task_id], timeout, interval, on_interval=on_interval):
            return meta
        raise CeleryTimeoutError("The operation timed out.")

    # -- groups

    def _save_group(self, group_id: str, result: Any) -> Any:
        # with every serializer: Celery's backend then makes it one of its app, too
        value = result.as_tuple() if isinstance(result, ResultBase) else result
        self.store.save_group(group_id, self._encoded(value))
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        saved = self.store.restore_group(group_id)
        if saved is None:
            return None
        value = self._decode_stored(saved[0])
        result = None if value is None else result_from_tuple(value, self.app)
        return {"taskset_id": group_id, "result": result, "date_done": saved[1]}

    def _delete_group(self, group_id: str) -> None:
        self.store.delete_group(group_id)

    # -- upkeep

    def cleanup(self) -> None:
        """Delete what is older than ``result_expires``."""
        self._ensure_retryable(self._cleanup)

    def _cleanup(self) -> None:
        if self.expires is not None:
            self.store.cleanup(datetime.now(timezone.utc) - self.expires)

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Tell whether to try again: not what is known to stay, such as a missing right."""
        return (
            isinstance(exc, RETRYABLE)
            and not isinstance(exc, SessionManagerError)
            and not is_hopeless(exc)
        )

    def on_backend_retryable_error(self, exc: BaseException) -> None:
        """Drop the connections, if one was lost.

        Not where the server takes no more of them: new ones are the last to be had then.
        """
        if is_lost(exc):
            self.store.invalidate()

    def _create_tables(self) -> None:
        self._ensure_retryable(self.ResultSession).close()

    # -- what users of Celery's database backend find there

    @property
    def session_manager(self) -> Any:
        """The SessionManager of the app."""
        return self.store.manager

    @property
    def task_cls(self) -> type[Any]:
        """The mapped class of the tasks, for queries in a :meth:`ResultSession`."""
        models = map_tables(self.store.tables)
        return models.task_extended if self.store.extended else models.task

    @property
    def taskset_cls(self) -> type[Any]:
        """The mapped class of the groups."""
        return map_tables(self.store.tables).group

    @property
    def extended_result(self) -> Any:
        """The setting ``result_extended``."""
        return self.app.conf.find_value_for_key("extended", "result")

    def ResultSession(self, session_manager: Any = None) -> Session:  # noqa: N802 - Celery's name
        """Open a session on the results, with transactions; close it."""
        self.store.prepare()
        manager = session_manager or self.session_manager
        engine, maker = manager.create_session(self.store.dburi, bool(self.short_lived_sessions))
        if not event.contains(engine, "reset", _roll_back_abandoned):
            event.listen(engine, "reset", _roll_back_abandoned)
        level = "SERIALIZABLE" if engine.dialect.name == "sqlite" else "READ COMMITTED"
        session: Session = maker(bind=engine.execution_options(isolation_level=level))
        event.listen(session, "after_begin", _mark)
        return session

    def as_uri(self, include_password: bool = False) -> str:
        """Give the URL, with its password or, by default, without any secret."""
        url = parse_url(self.url)
        return url.render_as_string(hide_password=False) if include_password else masked(url)

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        ours = {"dburi": self.url, "expires": self.expires, "engine_options": self.engine_options}
        return super().__reduce__(args, {**(kwargs or {}), **ours})


def _mark(_: object, __: object, connection: Connection) -> None:
    """Note that a session has a transaction on a connection."""
    connection.info[_SESSION] = True


def _roll_back_abandoned(
    dbapi_connection: Any, record: ConnectionPoolEntry | None, state: PoolResetState
) -> None:
    """Roll back the transaction of a session that was let go in its midst.

    The pool of a store does not, for its connections are in autocommit; when they are put back
    into that, what such a session wrote would be committed. A connection without a record has
    left the pool: it is closed next.
    """
    marked = record is not None and record.info.pop(_SESSION, False)
    if marked and not (state.transaction_was_reset or state.terminate_only):
        dbapi_connection.rollback()


def _database_url(url: str | None) -> str | None:
    """Give the URL in ``result_backend``; ``sessionmgr://`` alone means ``database_url``."""
    return None if url in (None, "", "sessionmgr://") else url


def _pooled(options: dict[str, Any]) -> dict[str, Any]:
    """Add :data:`POOL` to options that say nothing of the pool's size or class."""
    return options if options.keys() & {*POOL, "poolclass"} else {**POOL, **options}


def _callback(kwargs: dict[str, Any], conf: Any) -> Any:
    """Give the function that gets the engines.

    :raises ImproperlyConfigured: when it is none.
    """
    callback = kwargs.get("engine_callback", conf.database_engine_callback)
    if isinstance(callback, str):
        callback = symbol_by_name(callback)
    if callback is not None and not callable(callback):
        raise ImproperlyConfigured(f"database_engine_callback must be callable, not {callback!r}")
    return callback

"""The result backends that are compared: sessionmgr's, Celery's SQL and its Redis backend."""

from __future__ import annotations

from datetime import datetime, timezone
from itertools import count
from typing import TYPE_CHECKING, Any

from celery import Celery

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL

    from sessionmgr import ResultStore


__all__ = ("backend", "bare_upsert", "fetching", "storing", "storing_bytes")

PAYLOAD = {"answer": 42, "text": "a result of ordinary size" * 4}

ENCODED = b"x" * 120
"""As long as the payload is when it is encoded."""

FIELDS = ("task_id", "status", "result", "date_done", "traceback", "children")


def backend(url: str, **settings: Any) -> Any:
    """Make the backend that an app with this ``result_backend`` uses.

    :param settings: further settings of the app.
    """
    app = Celery("benchmark", set_as_current=False, result_backend=url)
    app.conf.update(result_backend=url, **settings)
    return app.backend


def storing(backend: Any) -> Callable[[], object]:
    """Make the work of storing the result of one task, each time of another one."""
    numbers = count()
    return lambda: backend.store_result(f"{backend.url}{next(numbers)}"[-100:], PAYLOAD, "SUCCESS")


def storing_bytes(store: ResultStore) -> Callable[[], object]:
    """Make the work of storing an encoded result, without Celery."""
    numbers = count()
    return lambda: store.store(f"store{next(numbers)}", "SUCCESS", ENCODED)


def fetching(backend: Any) -> Callable[[], object]:
    """Make the work of fetching the result of one task that has ended."""
    backend.store_result("fetched", PAYLOAD, "SUCCESS")
    return lambda: backend.get_task_meta("fetched", cache=False)


def bare_upsert(store: ResultStore, url: URL) -> Callable[[], object]:
    """Make the work of sending the store's own upsert through a connection of the driver's."""
    engine = store.manager.get_engine(store.dburi)
    arguments, options = engine.dialect.create_connect_args(url)
    connection: Any = engine.dialect.loaded_dbapi.connect(*arguments, **options)
    engine.dialect.set_isolation_level(connection, "AUTOCOMMIT")
    compiled = store.access.prepared().store_ready.statement.compile(
        dialect=engine.dialect, column_keys=list(FIELDS)
    )
    sql, order = str(compiled), compiled.positiontup
    numbers = count()
    cursor = connection.cursor()

    def work() -> None:
        now: Any = datetime.now(timezone.utc).replace(tzinfo=None)
        if engine.dialect.name == "sqlite":
            now = now.isoformat(" ")
        values = (f"bare{next(numbers)}", "SUCCESS", ENCODED, now, None, None)
        row = {**compiled.params, **dict(zip(FIELDS, values, strict=True))}
        cursor.execute(sql, row if order is None else [row[key] for key in order])

    return work

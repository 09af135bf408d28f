"""Databases for the tests of result stores, and the tables that versions of Celery made there."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    DateTime,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    NullPool,
    Sequence,
    String,
    Table,
    Text,
    create_engine,
    event,
    text,
)

from sessionmgr.results import access, statements, upsert
from sessionmgr.results.cleanup import lock_purpose
from sessionmgr.serverlock import server_lock
from tests.servers import DRIVERS
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    import selectors
    import socket
    from collections.abc import Iterator, Mapping

    import pytest
    from sqlalchemy import URL, Engine

    from sessionmgr import ResultStore

__all__ = (
    "ELSEWHERE",
    "EXTENDED_COLUMNS",
    "NEW_COLUMNS",
    "RESULT_DRIVERS",
    "CountingProxy",
    "be_elsewhere",
    "celery_tables",
    "cleanup_lock",
    "columns_of",
    "counted_statements",
    "make_celery_tables",
    "plain_engine",
    "rows_of",
)

RESULT_DRIVERS = (*DRIVERS, "sqlite")
"""The drivers of the servers, and SQLite's."""

ELSEWHERE = ("psycopg-elsewhere", "mysqlclient-elsewhere", "sqlite-elsewhere")
"""Drivers of databases that are taken for ones of which nothing is known: no upsert, no BEGIN."""

EXTENDED_COLUMNS = ("name", "args", "kwargs", "worker", "retries", "queue")
"""What Celery's tables have since 4.4, also where ``result_extended`` is off."""

NEW_COLUMNS = ("children", "stamps")
"""What Celery 5.7 added, to old tables too."""


def be_elsewhere(driver: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have stores take a database of :data:`ELSEWHERE` for one of which they know nothing.

    :return: the driver's name.
    """
    driver, _, elsewhere = driver.partition("-")
    if elsewhere:
        monkeypatch.setattr(access, "_BEGIN", {})
        make = upsert.make_upsert

        def make_elsewhere(_: str, *args: Any, **options: Any) -> Any:
            return make("elsewhere", *args, **options)

        monkeypatch.setattr(statements, "make_upsert", make_elsewhere)
    return driver


class CountingProxy(TCPProxy):
    """A proxy that counts round trips: how often the client spoke after the server had.

    Only for one connection at a time.
    """

    trips = 0
    _client: socket.socket | None = None
    _client_spoke = False

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        self._client = client
        super()._forward(client, server)

    def _pass_on(self, selector: selectors.BaseSelector) -> bool:
        for key, _ in selector.select():
            speaks = key.fileobj is self._client
            self.trips += speaks and not self._client_spoke
            self._client_spoke = speaks
        return super()._pass_on(selector)


@contextmanager
def plain_engine(url: URL | str) -> Iterator[Engine]:
    """Give an engine of plain SQLAlchemy that leaves nothing open."""
    engine = create_engine(url, poolclass=NullPool)
    yield engine
    engine.dispose()


def rows_of(url: URL | str, statement: str, **values: object) -> list[tuple[Any, ...]]:
    """Run a statement in a transaction of its own and return its rows, if any."""
    with plain_engine(url) as engine, engine.begin() as connection:
        result = connection.execute(text(statement), values)
        return [tuple(row) for row in result] if result.returns_rows else []


def columns_of(url: URL | str, table: str = "celery_taskmeta") -> set[str]:
    """Return the names of the columns that a table has."""
    with plain_engine(url) as engine, engine.connect() as connection:
        return set(connection.execute(text(f"SELECT * FROM {table} WHERE 1 = 0")).keys())


@contextmanager
def counted_statements(store: ResultStore) -> Iterator[list[str]]:
    """Give a list that grows by each statement of a store's engine."""
    engine = store.manager.get_engine(store.dburi)
    seen: list[str] = []

    def note(*args: Any) -> None:
        seen.append(args[2])

    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)


@contextmanager
def cleanup_lock(store: ResultStore) -> Iterator[None]:
    """Hold the lock of those who clean up the store's tables, on a connection of its own."""
    with (
        plain_engine(store.dburi) as engine,
        engine.begin() as connection,
        server_lock(connection, lock_purpose(connection, store.tables), "another's"),
    ):
        yield


def celery_tables(version: str, *, ids: str = "sequence", extended: bool = False) -> MetaData:
    """Describe the tables of a version of Celery.

    What they have in common with real ones, :mod:`tests.test_celery_old_rows` holds them to.

    :param version: ``"4.4"``, ``"5.2"``, ``"5.6"`` or ``"5.7"``. The first two made the same
        tables; 5.6.3 added indexes on ``date_done``, and 5.7 columns.
    :param ids: where ids come from: ``"sequence"``, as SQLAlchemy makes it of Celery's models
        on PostgreSQL and MariaDB; ``"auto"`` for SERIAL and AUTO_INCREMENT, as MySQL has it and
        MariaDB had it until SQLAlchemy 1.4; or ``"identity"``.
    :param extended: whether there are the columns for ``result_extended``, as in all tables that
        were made by 4.4 and later; without them tables are older, and a later version's own
        columns were added to them.
    """
    metadata, newest, indexed = MetaData(), version == "5.7", version in ("5.6", "5.7")
    task = [
        Column("task_id", String(155), unique=True),
        Column("status", String(50)),
        Column("result", LargeBinary),
        Column("date_done", DateTime, index=indexed),
        Column("traceback", Text),
    ]
    if newest:
        task.append(Column("children", LargeBinary))
    if extended:
        kinds: Mapping[str, Any] = {
            "args": LargeBinary,
            "kwargs": LargeBinary,
            "retries": Integer,
            "stamps": LargeBinary,
        }
        names = (*EXTENDED_COLUMNS, "stamps") if newest else EXTENDED_COLUMNS
        task += [Column(name, kinds.get(name, String(155))) for name in names]
    group = [
        Column("taskset_id", String(155), unique=True),
        Column("result", LargeBinary),
        Column("date_done", DateTime, index=indexed),
    ]
    for table, sequence, columns in (
        ("celery_taskmeta", "task_id_sequence", task),
        ("celery_tasksetmeta", "taskset_id_sequence", group),
    ):
        Table(table, metadata, _id(ids, sequence), *columns, sqlite_autoincrement=True)
    return metadata


def _id(ids: str, sequence: str) -> Column[Any]:
    source: dict[str, Any] = {"sequence": Sequence(sequence), "identity": Identity()}
    extra = [source[ids]] if ids in source else []
    return Column("id", Integer, *extra, primary_key=True, autoincrement=True)


def make_celery_tables(
    url: URL | str, version: str, *, ids: str = "sequence", extended: bool = False
) -> MetaData:
    """Create the tables of a version of Celery; the parameters are those of celery_tables."""
    metadata = celery_tables(version, ids=ids, extended=extended)
    with plain_engine(url) as engine:
        metadata.create_all(engine)
    return metadata

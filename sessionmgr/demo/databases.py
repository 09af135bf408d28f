"""The demo's databases: opened, counted and left as they were found."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, func, select
from sqlalchemy.exc import SQLAlchemyError

from sessionmgr.errors import DatabaseURLError
from sessionmgr.explain import UnusableDatabaseError, explain
from sessionmgr.manager import SessionManager
from sessionmgr.sqlite import is_memory
from sessionmgr.urls import masked, parse_url

from .results import TABLES, count_results, result_id
from .traces import Traces
from .work import Base, Row, count_engine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy.orm import Session

    from sessionmgr.results import ResultStore

__all__ = ("DemoDatabase", "connect_options", "database_urls", "make_manager", "opened")

#: Seconds for a server to accept a connection, on drivers that would wait for minutes.
CONNECT_TIMEOUT = 10
_TIMEOUT_DRIVERS = re.compile(r"(postgresql|mysql|mariadb)(\+(psycopg|psycopg2|pymysql|mysqldb))?")

#: The number of a row, and of a result, that is written before the workers start.
_ANNOUNCEMENT = -1


@contextmanager
def database_urls(given: Sequence[str]) -> Iterator[dict[str, URL]]:
    """Give each database a bind key; where none is given, make three SQLite files.

    :param given: URLs.
    :return: bind key -> URL.
    :raises UnusableDatabaseError: when a URL cannot be read, or not be used by several
        processes, or is given twice.
    """
    if given:
        yield {f"database{n}": url for n, url in enumerate(_read(given), start=1)}
        return
    with TemporaryDirectory(prefix="sessionmgr-demo-") as folder:
        names = ("first", "second", "third")
        yield {
            name: URL.create("sqlite", database=str(Path(folder, f"{name}.db"))) for name in names
        }


def _read(given: Sequence[str]) -> list[URL]:
    urls: list[URL] = []
    for text in given:
        try:
            url = parse_url(text)
        except DatabaseURLError as error:
            raise UnusableDatabaseError(str(error)) from None
        if is_memory(url):
            raise UnusableDatabaseError(
                f"database {masked(url)} is in memory, where other processes cannot see it;"
                " name a file: sqlite:///demo.db"
            )
        if url in urls:
            raise UnusableDatabaseError(
                f"database {masked(url)} is given twice; name each database once"
            )
        urls.append(url)
    return urls


def make_manager(urls: dict[str, URL]) -> SessionManager:
    """Make the one manager of the demo.

    :param urls: bind key -> URL.
    """
    return SessionManager(
        count_engine,
        metadata=Base.metadata,
        binds={key: {"url": url, **connect_options(url)} for key, url in urls.items()},
    )


def connect_options(url: URL) -> dict[str, Any]:
    """Give the engine options that bound the time for connecting, where the URL does not."""
    if not _TIMEOUT_DRIVERS.fullmatch(url.drivername) or "connect_timeout" in url.query:
        return {}
    return {"connect_args": {"connect_timeout": CONNECT_TIMEOUT}}


class DemoDatabase:
    """One database, as the process sees it that counts rows and results."""

    def __init__(self, store: ResultStore, key: str, url: URL, run: str) -> None:
        """Name a database; nothing is connected yet.

        :param store: where its results go; the store's manager has the database.
        :param key: its bind key.
        :param url: its URL.
        :param run: identity of the run, which its rows bear.
        """
        self.key = key
        self.url = url
        self.name = masked(url)
        self._store = store
        self._manager = store.manager
        self._run = run
        self._rows = Traces(
            "rows",
            f"table {Row.__tablename__}",
            table=Base.metadata.tables[Row.__tablename__],
            mine=Row.run == run,
        )
        self._results = Traces(
            "results",
            f"tables {TABLES}",
            table=store.tables.task,
            mine=store.tables.task.c.task_id.startswith(run),
        )

    @property
    def cleaned_up(self) -> str:
        """What became of the rows, the results and the tables; empty before :meth:`clean_up`."""
        return "; ".join(filter(None, (self._rows.outcome, self._results.outcome)))

    def open(self) -> None:
        """Make sure that rows and results can be written.

        :raises UnusableDatabaseError: when they cannot.
        """
        try:
            self._rows.begin(self._manager, self.key, self._write_row)
            self._results.begin(self._manager, self.key, self._store_result)
        except (SQLAlchemyError, ImportError) as error:
            raise UnusableDatabaseError(
                f"database {self.name} cannot be used: {explain(error, self.url)}"
            ) from None

    def _write_row(self) -> None:
        def write(session: Session) -> None:
            session.add(Row(run=self._run, number=_ANNOUNCEMENT, pid=os.getpid()))

        self._manager.run(self.key, write)

    def _store_result(self) -> None:
        self._store.store(result_id(self._run, _ANNOUNCEMENT), "STARTED")

    def count_rows(self) -> dict[int, int]:
        """Count the run's rows that are there.

        :return: pid of the worker -> how many it has written.
        """
        mine = (Row.run == self._run, Row.number > _ANNOUNCEMENT)
        query = select(Row.pid, func.count().label("rows")).where(*mine).group_by(Row.pid)
        return self._manager.run(
            self.key, lambda session: {line.pid: line.rows for line in session.execute(query)}
        )

    def count_results(self, numbers: Iterable[int]) -> dict[int, int]:
        """Count the results that are there.

        :param numbers: those of the tasks.
        :return: pid of the worker -> how many it has stored.
        """
        return count_results(self._store, self._run, numbers)

    def clean_up(self) -> None:
        """Remove what the run has written, and the tables that it alone uses."""
        for traces in (self._rows, self._results):
            traces.remove(self._manager, self.key, self.url)


@contextmanager
def opened(databases: Sequence[DemoDatabase], *, clean_up: bool) -> Iterator[None]:
    """Open databases, and clean up in each that was written to, whatever happens.

    :param clean_up: whether to do that; the demo's own files are deleted anyway.
    :raises UnusableDatabaseError: when one cannot be used.
    :raises KeyboardInterrupt: when that came; its arguments tell what was cleaned up.
    """
    try:
        with ExitStack() as stack:
            for database in databases:
                if clean_up:
                    stack.callback(database.clean_up)
                database.open()
            yield
    except KeyboardInterrupt:
        outcomes = (f"{d.name}: {d.cleaned_up}" for d in databases if d.cleaned_up)
        raise KeyboardInterrupt(*outcomes) from None

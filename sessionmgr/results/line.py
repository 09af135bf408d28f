"""One PostgreSQL connection that is told of results, outside its pool."""

from __future__ import annotations

import select
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from sessionmgr import forking

from .upsert import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

__all__ = ("DRIVERS", "Line", "LineError")

#: The drivers, as SQLAlchemy names them, whose connections can be read without a statement.
DRIVERS = frozenset(("psycopg", "psycopg2"))


class LineError(Exception):
    """The driver failed, most likely because the connection was lost; its error is the cause."""


class Line:
    """A connection of an engine that listens. It is for one thread at a time.

    It leaves the pool, which would otherwise have one connection less to give, but it is still
    severed in forked children and closed at the end of the process.

    :param engine: an engine whose driver is one of :data:`DRIVERS`.
    :raises LineError: when no connection can be made.
    """

    def __init__(self, engine: Engine) -> None:
        self._home = forking.process
        self._error: type[Exception] = engine.dialect.loaded_dbapi.Error
        with self._errors():  # which raw_connection(), unlike connect(), does not wrap
            self._proxy = engine.raw_connection()
        self._driver = cast("Any", self._proxy.driver_connection)  # None once it is detached
        # A fork in the midst of this would leave the child with a connection that is neither
        # its pool's nor its proxy's, hence not severed.
        with forking.gate.section():
            self._proxy.detach()
        self._psycopg = engine.dialect.driver == "psycopg"
        if self._psycopg:
            # what comes while a statement runs; without this it would be kept for ever
            self._driver.add_notify_handler(_ignore)

    def listen(self) -> None:
        """Begin to listen. What is committed from now on is heard.

        :raises LineError: when the connection was lost, or this server does not allow it.
        """
        with self._errors():
            if not self._driver.autocommit:
                self._driver.rollback()
                self._driver.autocommit = True
            self._say(f"LISTEN {CHANNEL}")

    def unlisten(self) -> None:
        """Listen no more.

        :raises LineError: when the connection was lost.
        """
        with self._errors():
            self._say(f"UNLISTEN {CHANNEL}")

    def read(self, seconds: float) -> list[str]:
        """Wait until something is told.

        :param seconds: for how long at most.
        :return: the ids of tasks.
        :raises LineError: when the connection was lost.
        """
        with self._errors():
            told = self._take()
            if not told and _is_readable(self._driver.fileno(), seconds):
                told = self._take()
            return told

    def close(self, *, lost: bool = False) -> None:
        """Close the connection. In a forked child it is not this process's to close.

        :param lost: do not try to bring it into order first, as pools do.
        """
        if self._home is not forking.process or not self._proxy.is_valid:
            return
        if lost:
            with forking.gate.section():
                self._driver.close()
                self._proxy.invalidate()
        else:
            self._proxy.close()

    def _say(self, statement: str) -> None:
        with self._driver.cursor() as cursor:
            cursor.execute(statement)

    def _take(self) -> list[str]:
        if self._psycopg:
            libpq = self._driver.pgconn
            libpq.consume_input()
            return [told.extra.decode() for told in iter(libpq.notifies, None)]
        self._driver.poll()
        told, self._driver.notifies = self._driver.notifies, []
        return [each.payload for each in told]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise LineError(str(error).strip()) from error


def _ignore(_: object) -> None:
    """Take no notice."""


def _is_readable(descriptor: int, seconds: float) -> bool:
    # Looked up here, where gevent and eventlet may have put their own in place. Not epoll: its
    # descriptor would be inherited by children. Eventlet leaves select() alone.
    if not hasattr(select, "poll"):
        return bool(select.select([descriptor], [], [], seconds)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))

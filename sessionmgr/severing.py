"""Connections that a fork must not share, and what makes them harmless in the child.

Every DBAPI connection of this process has an :class:`OpenConnection`. In a forked child
:func:`sever_all` lays a dead socket over the descriptor of each, and puts a
:class:`SeveredConnection` where SQLAlchemy holds the driver's object. The object itself is
never used, closed or collected in the child: some drivers say goodbye to the server when
theirs is (mysqlclient does after ``Engine.dispose(close=False)``, apache/airflow#56879), and
SQLite deletes a write-ahead log that is still in use.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from .sqlite import FileIdentity, open_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from .monitor import PoolMonitor

__all__ = ("OpenConnection", "SeveredConnection", "forked_files", "open_connections", "sever_all")

#: The open connections of this process. Adding and discarding are atomic, so no lock that
#: a child could inherit locked is needed.
open_connections: set[OpenConnection] = set()

#: SQLite files which a parent had open when it forked this process, or one before it. A process
#: has one table of locks per file, so this one must not open them: it would believe to
#: hold the parent's locks (https://www.sqlite.org/howtocorrupt.html, section 2.6). No new file
#: gets the inode of one that was deleted: the connection that is kept below has it open.
forked_files: set[FileIdentity] = set()

# The drivers' objects of severed connections. One reference too many keeps the list, and with
# it every object in it, from being collected even when the interpreter ends.
_inherited: list[object] = []
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_inherited))

#: Seconds for aiosqlite's thread to close its connection.
_CLOSE_WAIT = 5.0

_dead: tuple[int, tuple[int, int]] | None = None


class OpenConnection:
    """One DBAPI connection: what severs it, and the counts that the pool's events keep.

    The counts are written by the thread that has the connection checked out, so they need no
    lock. (Where a pool has threads share one, as StaticPool does, they may miss some; ``users``
    does not.)
    """

    __slots__ = (
        "_descriptor",
        "_dialect",
        "_socket",
        "checkouts",
        "file",
        "fresh",
        "idle_since",
        "leaves",
        "monitor",
        "owner",
        "proxies",
        "proxy",
        "tests",
        "users",
    )

    def __init__(
        self,
        entry: ConnectionPoolEntry,
        dbapi_connection: DBAPIConnection,
        dialect: Dialect,
        monitor: PoolMonitor,
    ) -> None:
        """Take note of a connection that was just made.

        :param entry: the pool's record of it. It is not kept alive: a connection that the
            user and the pool have let go is closed by its driver, as ever.
        :param dbapi_connection: the connection, not yet in ``entry``.
        :param dialect: its dialect.
        :param monitor: who is told what the pool does with it.
        """
        self.monitor = monitor
        self.owner: weakref.ref[Any] = weakref.ref(entry)
        #: the connection until its first checkout: SQLAlchemy puts it into ``entry`` only
        #: after it was made, and a fork may come between.
        self.fresh: DBAPIConnection | None = dbapi_connection
        self.proxy: weakref.ref[PoolProxiedConnection] | None = None
        #: the proxies of those who share it, where the pool has threads or tasks do that
        self.proxies: tuple[weakref.ref[PoolProxiedConnection], ...] = ()
        self.checkouts = self.tests = self.users = 0
        #: time.monotonic() of the last checkin; None before it.
        self.idle_since: float | None = None
        #: whether the connection is to be closed at its checkin.
        self.leaves = False
        self._dialect = dialect
        self.file = open_file(dbapi_connection) if dialect.name == "sqlite" else None
        self._descriptor = _find_descriptor(dialect.get_driver_connection(dbapi_connection))
        self._socket = _socket_identity(self._descriptor)
        if self._socket is not None:
            _dead_socket()  # made here, where an error reaches the caller

    @property
    def dbapi_connection(self) -> DBAPIConnection | None:
        """The connection; ``None`` when it is closed or was let go.

        Where a proxy has it, the proxy tells: the pool's record of a connection that is being
        detached may have another one already.
        """
        for holder in (self.proxy, self.owner):
            held = None if holder is None else holder()
            if held is not None and held.dbapi_connection is not None:
                return held.dbapi_connection
        return None if self.owner() is None else self.fresh

    def share(self, proxy: PoolProxiedConnection) -> None:
        """Take note of one more who shares the connection. For one thread at a time."""
        self.proxies = (*filter(_is_out, self.proxies), weakref.ref(proxy))

    def count_users(self) -> int:
        """Count those who share it, for SQLAlchemy tells of the first of their checkins only."""
        return sum(map(_is_out, self.proxies))

    def detach(self) -> None:
        """Follow a connection that leaves its pool for good, with the proxy that has it."""
        if self.proxy is not None:
            self.owner = self.proxy

    def cut(self, dbapi_connection: DBAPIConnection) -> None:
        """Close the connection where its event loop cannot: it is closed, or in another thread.

        The server sees the end at once. The driver's object learns of it as far as it can.

        :param dbapi_connection: the connection, which may have left its record by now.
        """
        self._lay_dead_socket()
        driver: Any = self._dialect.get_driver_connection(dbapi_connection)
        finish = getattr(getattr(driver, "pgconn", None), "finish", None)  # psycopg
        with suppress(Exception):  # "Event loop is closed"
            if finish is not None:
                finish()
            else:
                self._dialect.do_terminate(dbapi_connection)
            if self.file is not None:
                driver._thread.join(_CLOSE_WAIT)  # aiosqlite's closes the file, and ends

    def shut_down(self) -> None:
        """Shut the socket down, in the process that has the connection.

        Whoever waits for an answer on it gets an error of the driver's. Any thread may do this;
        no fork may come meanwhile.
        """
        if self._socket is None:
            return
        with suppress(OSError):  # it was closed
            # A copy stays what it is, while the connection's own number may become another file's.
            copy = os.dup(self._descriptor)
            try:
                if _socket_identity(copy) == self._socket:
                    with socket.socket(fileno=copy) as end:
                        copy = -1
                        end.shutdown(socket.SHUT_RDWR)
            finally:
                if copy >= 0:
                    os.close(copy)

    def sever(self) -> None:
        """Make the connection harmless in a forked child. Takes no lock and never raises."""
        dbapi_connection = self.dbapi_connection
        if dbapi_connection is None:
            return
        _inherited.append(dbapi_connection)
        self.leaves = True
        severed = SeveredConnection(self._dialect)
        for holder in (self.owner(), self.proxy() if self.proxy is not None else None):
            if holder is not None and holder.dbapi_connection is dbapi_connection:
                holder.dbapi_connection = severed
        if self.file is not None:
            forked_files.add(self.file)
        self._lay_dead_socket()

    def _lay_dead_socket(self) -> None:
        # The number may be another file's by now, where user code has closed it behind the
        # driver's back. The socket's inode tells.
        if self._socket is not None and _socket_identity(self._descriptor) == self._socket:
            _lay_dead_socket_over(self._descriptor)


def _lay_dead_socket_over(descriptor: int) -> None:
    try:
        os.dup2(_dead_socket(), descriptor, inheritable=False)
    except OSError:  # no descriptor is left for a dead socket
        os.close(descriptor)


def _is_out(proxy: weakref.ref[PoolProxiedConnection]) -> bool:
    """Tell whether a proxy was not checked in yet."""
    found = proxy()
    return found is not None and found.dbapi_connection is not None


class SeveredConnection:
    """Stands for a connection of the parent process in a Session that a child inherited.

    Ending the transaction does nothing and succeeds; any other use is a disconnect.
    """

    # What the dialects of PostgreSQL ask to find out whether an error was a disconnect.
    closed = broken = True

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def rollback(self) -> None:
        """Do nothing: the transaction is the parent's."""

    def close(self) -> None:
        """Do nothing: the connection is the parent's."""

    terminate = close

    def is_closed(self) -> bool:
        """Answer asyncpg's dialect."""
        return True

    def __getattr__(self, name: str) -> NoReturn:
        text = (
            f"this connection belongs to the process that forked process {os.getpid()};"
            " end the session here and open one of this process's own"
        )
        dbapi: Any = self._dialect.loaded_dbapi
        if self._dialect.name in ("mysql", "mariadb"):
            raise dbapi.OperationalError(2013, text)  # CR_SERVER_LOST
        if self._dialect.name == "sqlite":
            # the words by which SQLAlchemy knows a closed SQLite connection
            raise dbapi.ProgrammingError(f"Cannot operate on a closed database. {text}")
        raise dbapi.OperationalError(text)


def sever_all() -> None:
    """Sever every connection that this process inherited. For the forked child."""
    inherited = open_connections.copy()
    open_connections.clear()
    for connection in inherited:
        # no failure with one, whatever its driver does, may leave the others as they are
        with suppress(Exception):
            connection.sever()


def _dead_socket() -> int:
    """Give the descriptor of a socket whose other end is closed.

    It reads as ended and cannot be written to. It is checked each time, for a daemon may have
    closed every descriptor it found.
    """
    global _dead
    if _dead is None or _socket_identity(_dead[0]) != _dead[1]:
        ours, other = socket.socketpair()
        other.close()
        status = os.fstat(ours.fileno())
        _dead = ours.detach(), (status.st_dev, status.st_ino)
    return _dead[0]


def _socket_identity(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def _find_descriptor(driver_connection: Any) -> int:
    """Ask a driver's connection for its socket; -1 where it tells of none.

    psycopg, psycopg2 and mysqlclient have ``fileno``; PyMySQL, and pg8000 have a socket in an
    attribute; asyncpg, aiomysql and asyncmy a transport.
    """
    for path in _SOCKET_PATHS:
        found = driver_connection
        for name in path:
            found = getattr(found, name, None)
        if found is not None:
            return _descriptor_of(found)
    return -1


_SOCKET_PATHS = (
    ("fileno",),
    ("_sock", "fileno"),
    ("_usock", "fileno"),
    ("_transport", "get_extra_info"),
    ("_writer", "transport", "get_extra_info"),
)


def _descriptor_of(ask: Callable[..., Any]) -> int:
    if ask.__name__ == "get_extra_info":
        found = ask("socket")
        return -1 if found is None else int(found.fileno())
    return int(ask())

"""Asks databases whether they answer: all at once, each once at a time, and none for ever."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from contextvars import ContextVar
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event, literal, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sessionmgr import forking
from sessionmgr.errors import EngineOptionsError, SessionManagerError
from sessionmgr.pools import WatchedPool, open_connection
from sessionmgr.transient import is_contention, is_full, is_hopeless, is_lost
from sessionmgr.urls import hide_secrets

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

    from sessionmgr.severing import OpenConnection
    from sessionmgr.urls import DatabaseKey

__all__ = (
    "QUESTION",
    "Asking",
    "NoAnswerError",
    "Probe",
    "ThreadAsking",
    "asked",
    "check_seconds",
    "in_thread",
    "reason",
)

T = TypeVar("T")

#: What a database is asked; SQLAlchemy writes it as each of them wants it.
QUESTION = select(literal(1))

#: Seconds after which a question that cannot be given up is left to its fate, and asked anew: a
#: driver may wait for good for a server that took the connection and never greets.
LEFT_AFTER = 60.0


class NoAnswerError(Exception):
    """A database did not answer in the time that it was given."""


class Asking(ABC):
    """One question to one database, under way."""

    # _lock guards _connection: once the question is answered, the connection may be another's.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: OpenConnection | None = None

    @abstractmethod
    def is_over(self) -> bool:
        """Tell whether it has ended, or nothing can be expected of it any more."""

    @abstractmethod
    def answer(self) -> asyncio.Future[float]:
        """Give the future seconds that it took, for the running loop."""

    @abstractmethod
    def give_up(self) -> None:
        """End it as soon as may be."""

    def note(self, connection: OpenConnection | None) -> None:
        """Take note of the connection that the question is put on, or that it is answered."""
        with self._lock:
            self._connection = connection

    def break_off(self) -> bool:
        """Break the connection that waits for an answer; the pool then throws it away.

        :return: whether there was one: while it is being made, it is not known.
        """
        with self._lock:
            if self._connection is None:
                return False
            with forking.gate.section():
                self._connection.shut_down()
            self._connection = None
            return True


class Probe:
    """Asks one database, once at a time: who asks meanwhile waits for the same answer.

    A database that does not answer thus holds one connection, however often it is asked.

    :param key: the database.
    :param begin: begins to ask it.
    """

    def __init__(self, key: DatabaseKey, begin: Callable[[DatabaseKey], Asking]) -> None:
        self.key = key
        self._begin = begin
        self._asking: Asking | None = None

    async def ask(self, timeout: float) -> float:
        """Wait for an answer.

        :param timeout: seconds to wait at most.
        :return: the seconds that it took to get a connection and an answer.
        :raises NoAnswerError: when there is none in time.
        """
        asking = self._asking
        if asking is None or asking.is_over():
            asking = self._asking = self._begin(self.key)
        answer = asking.answer()
        answer.add_done_callback(_look_at_error)
        done, _ = await asyncio.wait({answer}, timeout=timeout)
        if not done:
            asking.give_up()
        if not done or answer.cancelled():  # it may be given up by another who waits for it
            raise NoAnswerError
        return answer.result()


def _look_at_error(answer: asyncio.Future[float]) -> None:
    """Let asyncio not complain of an error that comes when nobody waits any more."""
    if not answer.cancelled():
        answer.exception()


#: The question that the running thread, or task, puts.
asked: ContextVar[Asking] = ContextVar("sessionmgr_asked")


class ThreadAsking(Asking):
    """Asks a database in a thread, which is no hindrance to the end of the process."""

    def __init__(self, get_engine: Callable[[], Engine]) -> None:
        """Begin to ask.

        :param get_engine: gives the engine; called in the thread, for it may import a driver.
        """
        super().__init__()
        self._get_engine = get_engine
        self._begun = monotonic()
        self._future = in_thread(self._ask)

    def is_over(self) -> bool:
        """Tell whether it has ended, or has taken too long to wait on."""
        return self._future.done() or monotonic() - self._begun > LEFT_AFTER

    def answer(self) -> asyncio.Future[float]:
        """Give the future seconds that it took, for the running loop."""
        return asyncio.wrap_future(self._future)

    def give_up(self) -> None:
        """Break the connection off; a thread that is still connecting goes on."""
        self.break_off()

    def _ask(self) -> float:
        begun = perf_counter()
        asked.set(self)
        with self._get_engine().connect() as connection:
            connection.execute(QUESTION)
            self.note(None)
        return perf_counter() - begun


@event.listens_for(WatchedPool, "checkout", insert=True)
def _on_checkout(
    dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection
) -> None:
    """Tell who asks of the connection before it is tested, where an answer may fail to come."""
    asking = asked.get(None)
    if asking is not None:
        asking.note(open_connection(entry))


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function in a thread of its own.

    The threads of an executor, or of FastAPI, are waited for when the process ends.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
            future.set_exception(error)

    threading.Thread(target=run, name="sessionmgr-fastapi", daemon=True).start()
    return future


def reason(error: BaseException) -> str:
    """Say in a few words why a database does not answer.

    The driver's own words are left out: others may read this, and nobody knows what is in them.
    """
    if isinstance(error, SessionManagerError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError):
        return f"{type(error).__name__}: its driver is not installed"
    # errors of connecting come from asyncpg as they are
    known = isinstance(error, (SQLAlchemyError, OSError))
    looked_at = error if known else DBAPIError(None, None, error)
    for applies, words in _REASONS:
        if applies(looked_at):
            return f"{type(error).__name__}: {words}"
    return type(error).__name__


def _is_away(error: BaseException) -> bool:
    return is_lost(error) or isinstance(error, OSError)


_REASONS: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
    (is_full, "it takes no more connections"),
    (_is_away, "it cannot be reached, or the connection was lost"),
    (is_contention, "it is locked"),
    (is_hopeless, "it refuses: check user, password, the database's name, and rights"),
    (
        lambda error: isinstance(error, PoolTimeoutError),
        "all connections of the pool were in use; pool_size and max_overflow limit them",
    ),
)


def check_seconds(name: str, seconds: Any) -> None:
    """Check a time limit.

    :raises EngineOptionsError: when it is not a positive number.
    """
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < float("inf"):
        raise EngineOptionsError(
            f"{name} must be a positive number of seconds, not {hide_secrets(seconds)}"
        )

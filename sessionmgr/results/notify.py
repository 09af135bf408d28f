"""Hears of results as they are stored: PostgreSQL's LISTEN, on one connection for all threads."""

from __future__ import annotations

import logging
import threading
import weakref
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from sessionmgr import exits, forking
from sessionmgr.errors import ManagerClosedError

from .line import DRIVERS, Line, LineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sqlalchemy import Engine

    from .access import ResultAccess

__all__ = ("Ear", "Listener", "listener_of")

log = logging.getLogger("sessionmgr")

#: Seconds for which a thread reads at a time: so long may it take to let go of a connection
#: that is being read.
SLICE = 0.5

#: Seconds until a listening connection that was lost, or could not be made, is tried again; they
#: double up to the longest while it is not to be had. A hot standby lets nobody listen.
RETRY = 1.0
LONGEST_RETRY = 60.0


class Ear:
    """What one who waits has heard, until it is taken."""

    # guarded by the listener's lock, which is that of woken

    __slots__ = ("all", "ids", "told", "woken")

    def __init__(self, ids: Iterable[str], lock: threading.RLock) -> None:
        #: The tasks that are waited for.
        self.ids = tuple(ids)
        #: Those of them that have ended, as was told.
        self.told: set[str] = set()
        #: Whether some may have ended without a word.
        self.all = False
        self.woken = threading.Condition(lock)


class Listener:
    """Hears of the results of one store, in one process, for all its threads.

    No thread is started. One of those that wait, the leader, reads the connection and tells the
    others; when it has what it waits for, another one leads. The connection listens only while
    somebody waits: PostgreSQL keeps what a listening connection does not read, and in the end
    takes no more from anybody.

    :param engine: gives the engine that the connection is taken from.
    :param name: how log texts call its database.
    :param keep: whether the connection stays open when nobody waits.
    """

    # _lock guards every field. Whoever is _leader is alone with _line, and uses it without the
    # lock.

    def __init__(self, engine: Callable[[], Engine], name: str, *, keep: bool) -> None:
        #: The process it is for; a forked child has one of its own.
        self.home = forking.process
        self._engine = engine
        self._name = name
        self._keep = keep
        self._lock = threading.RLock()
        self._joined: set[Ear] = set()
        self._resting: set[Ear] = set()  # those in wait() that do not lead
        self._by_task: dict[str, list[Ear]] = {}
        self._leader: Ear | None = None
        self._line: Line | None = None
        self._finalizer: weakref.finalize[..., Listener] | None = None
        #: Whether results are heard of now.
        self.listens = False
        self._lets_go = False  # the leader is to close the connection
        self._let_go = threading.Condition(self._lock)
        self._retry_at = 0.0
        self._pause = 0.0  # seconds until the next attempt, where the last one failed
        forking.inherit(self)

    # -- for those who wait

    def join(self, ids: Iterable[str]) -> Ear:
        """Begin to wait for tasks; :meth:`leave` must follow."""
        with self._lock:
            ear = Ear(ids, self._lock)
            ear.all = self.listens  # they may have ended since the caller looked
            for task_id in ear.ids:
                self._by_task.setdefault(task_id, []).append(ear)
            self._joined.add(ear)
            return ear

    def leave(self, ear: Ear) -> None:
        """Wait no more."""
        if self.home is not forking.process:
            return
        with self._lock:
            self._forget(ear)
            if self._leader is ear:  # a signal's handler raised when it was about to lead
                self._leader = None
            if self._joined or self._leader is not None or not self.listens:
                self._appoint()
                return
            self._leader = ear
            self.listens = False
        with self._leading():
            if self._keep and self._line is not None:
                self._line.unlisten()
            else:
                self._close_line()

    def wait(self, ear: Ear, seconds: float) -> tuple[set[str], bool]:
        """Sleep until something is heard.

        :param ear: of this caller.
        :param seconds: for how long at most.
        :return: those tasks that have ended, and whether others may have without a word.
        """
        deadline = monotonic() + seconds
        while self._rest(ear, deadline):
            told: list[str] = []
            with self._leading():
                if self.listens and self._line is not None:
                    told = self._line.read(min(SLICE, max(0.0, deadline - monotonic())))
                else:
                    self._listen()
            self._tell(told)
        with self._lock:
            told_here, ear.told = ear.told, set()
            everything, ear.all = ear.all, False
            return told_here, everything

    def _forget(self, ear: Ear) -> None:
        self._joined.discard(ear)
        for task_id in ear.ids:
            others = [each for each in self._by_task.get(task_id, ()) if each is not ear]
            if others:
                self._by_task[task_id] = others
            else:
                self._by_task.pop(task_id, None)

    def _rest(self, ear: Ear, deadline: float) -> bool:
        """Sleep until something is heard, or time is over; true when the caller is to lead."""
        with self._lock:
            self._resting.add(ear)
            try:
                while not (ear.told or ear.all or monotonic() >= deadline):
                    if self._may_lead():
                        self._leader = ear
                        return True
                    ear.woken.wait(deadline - monotonic())
                return False
            finally:
                self._resting.discard(ear)
                self._appoint()

    def _may_lead(self) -> bool:
        return self._leader is None and monotonic() >= self._retry_at and not exits.is_leaving()

    def _appoint(self) -> None:
        """Have somebody else lead, when nobody does."""
        if self._leader is None and self._resting:
            next(iter(self._resting)).woken.notify()

    def _tell(self, task_ids: Iterable[str]) -> None:
        with self._lock:
            for task_id in task_ids:
                for ear in self._by_task.get(task_id, ()):
                    ear.told.add(task_id)
                    ear.woken.notify()

    def _have_all_look(self) -> None:
        """Tell those who wait that results may have come without a word."""
        with self._lock:
            for ear in tuple(self._joined):  # a collected wait() may leave in the midst of this
                ear.all = True
                ear.woken.notify()

    # -- for the leader

    @contextmanager
    def _leading(self) -> Iterator[None]:
        """Do what the leader does, and step down."""
        try:
            yield
        except (LineError, SQLAlchemyError) as error:
            self._fail(error)
        except BaseException:
            # a signal's handler raised, and nobody knows how far the driver got
            self._close_line(lost=True)
            raise
        finally:
            with self._lock:
                if self._lets_go:
                    self._close_line()
                self._leader, self._lets_go = None, False
                self._let_go.notify_all()
                self._appoint()

    def _listen(self) -> None:
        if self._line is not None:
            try:
                self._line.listen()
            except LineError:  # it was lost while nobody listened; a new one may be had
                self._close_line(lost=True)
        if self._line is None:
            self._line = line = Line(self._engine())
            self._finalizer = weakref.finalize(self, line.close)
            self._finalizer.atexit = False  # dispose() is called there
            line.listen()
        self.listens, self._pause = True, 0.0
        self._have_all_look()

    def _fail(self, error: Exception) -> None:
        """Go on without listening, for a while."""
        self._close_line(lost=True)
        is_first = not self._pause
        self._pause = min(2 * self._pause or RETRY, LONGEST_RETRY)
        self._retry_at = monotonic() + self._pause
        if is_first and not isinstance(error, ManagerClosedError):
            log.warning(
                "database %s: the connection that listens for task results was lost or cannot be"
                " had; looking for them again and again meanwhile. The error: %s",
                self._name,
                error,
            )

    def _close_line(self, *, lost: bool = False) -> None:
        """Close the connection; by the leader, or while nobody leads."""
        line, self._line = self._line, None
        self.listens = False
        if self._finalizer is not None:
            self._finalizer.detach()
        if line is not None:
            line.close(lost=lost)
            if not exits.is_leaving():  # a look now would be cut off by the end of the process
                self._have_all_look()

    # -- for store and process

    def dispose(self) -> None:
        """Close the connection; it is made anew when somebody waits."""
        if self.home is not forking.process:
            return
        with self._lock:
            if self._leader is None:
                self._close_line()
            else:
                self._lets_go = True
                self._let_go.wait_for(lambda: not self._lets_go, 2 * SLICE)

    def _leave(self) -> None:
        """Close the connection at the end of the process."""
        self.dispose()

    def _before_fork(self, deadline: float) -> None:
        """Let the connection be: the child's copy is severed."""

    def _after_fork(self) -> None:
        """Leave all to the parent: the child's store takes another listener."""

    def mark_worker(self) -> None:
        """Go on: the connection is kept in any process."""


def listener_of(access: ResultAccess) -> Listener | None:
    """Give the listener of a store in this process, or ``None`` where there is none to have."""
    statements = access.statements
    if statements is None or not statements.notifies:
        return None
    listener = access.listener
    if listener is not None and listener.home is forking.process:
        return listener
    if access.engine().dialect.driver not in DRIVERS:
        return None
    with access.lock():
        listener = access.listener
        if listener is None or listener.home is not forking.process:
            keep = not access.short_lived_sessions
            listener = Listener(access.engine, access.describe(), keep=keep)
            access.listener = listener
        return listener

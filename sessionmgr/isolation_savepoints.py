"""The savepoints that stand for transactions where many of them share one that is rolled back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from .errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Savepoints", "Work")


class Work:
    """What one checked out connection has done since it last committed or rolled back."""

    __slots__ = ("explicit", "failed", "lost", "merged", "undid")

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin anew, as after a commit or rollback."""
        #: whether it was begun by a statement, and ends by one, also in AUTOCOMMIT
        self.explicit = False
        #: whether a statement failed, on a database that takes none then but a rollback
        self.failed = False
        #: whether another's rollback has undone it
        self.lost = False
        #: whether another's commit has made it part of what that did
        self.merged = False
        #: whether it failed after others had committed, and they were undone with it
        self.undid = False


@dataclass(eq=False, slots=True)
class _Savepoint:
    """One savepoint on the server.

    :param work: whose it is; ``None`` for one that only keeps a failing read from doing harm.
    :param name: its name there.
    :param label: the name that the work gave it; ``None`` where it stands for a transaction.
    :param holds: whether others have committed into it.
    """

    work: Work | None
    name: str
    label: str | None = None
    holds: bool = False


class Savepoints:
    """A stack of savepoints on one connection, as deep as transactions overlap.

    Each transaction begins with its first statement that writes: one that has only read has
    nothing to undo, and nobody else's work is undone with it. A statement is always sent where the
    savepoint on top is its own, or nobody's; so on PostgreSQL, where a failed one leaves only the
    way back to a savepoint, that way is taken at once and the others can go on.
    """

    # The owner's lock guards all of it: one statement at a time.

    def __init__(self, send: Callable[[str], None], database: str, *, aborts: bool) -> None:
        """Begin without any.

        :param send: runs a statement on the connection.
        :param database: its name for error texts.
        :param aborts: whether a failed statement ends the transaction, as on PostgreSQL.
        """
        self._send = send
        self._database = database
        self._aborts = aborts
        self._stack: list[_Savepoint] = []
        self._made = 0

    # -- statements

    def before_read(self, work: Work) -> None:
        """Prepare for a statement that only reads.

        :raises IsolationError: when the work was undone by another's rollback.
        """
        self._check(work)
        if self._aborts and not self._is_on_top(work) and not self._is_on_top(None):
            self._push(None)

    def before_write(self, work: Work) -> None:
        """Prepare for any other statement.

        :raises IsolationError: when the work was undone by another's rollback.
        """
        self._check(work)
        if self._is_on_top(work):
            return
        if self._is_on_top(None):
            self._stack[-1].work = work
        else:
            self._push(work)

    def after_failure(self, work: Work) -> None:
        """Have the connection take statements again after one has failed.

        A transaction of which nothing is left goes at once: what others commit until its rollback
        is not to be undone by that.
        """
        if not self._aborts:
            return
        work.failed = True
        top = self._stack[-1]
        self._send(f"ROLLBACK TO SAVEPOINT {top.name}")
        work.undid |= top.holds
        top.holds = False
        if top.work is work and top.label is None:
            self._send(f"RELEASE SAVEPOINT {top.name}")
            self._stack.pop()

    # -- transactions

    def commit(self, work: Work) -> None:
        """Keep what was done, until all is rolled back.

        :raises IsolationError: when it was undone by another's rollback.
        """
        if work.failed:  # as the server does
            self.roll_back(work)
            return
        if work.lost:
            work.begin()
            self._refuse_lost()
        self._release(self._first(work))
        work.begin()

    def roll_back(self, work: Work) -> None:
        """Undo what was done.

        :raises IsolationError: when that cannot be done, or has undone what others committed.
        """
        merged, holds = work.merged, work.undid
        work.begin()
        position = self._first(work)
        if position is not None:
            name = self._stack[position].name
            self._send(f"ROLLBACK TO SAVEPOINT {name}")
            self._send(f"RELEASE SAVEPOINT {name}")
            holds |= self._cut(position, work)
        if merged:
            self._refuse_merged()
        if holds:
            self._tell_of_others()

    # -- savepoints of the work's own

    def begin_nested(self, work: Work, label: str) -> None:
        """Make a savepoint."""
        self.before_write(work)
        self._push(work, label)

    def release(self, work: Work, label: str) -> bool:
        """Release a savepoint; tell whether there was one."""
        self._check(work)
        position = self._find(work, label)
        self._release(position)
        return position is not None

    def roll_back_to(self, work: Work, label: str) -> bool:
        """Go back to a savepoint, which stays; tell whether there was one.

        :raises IsolationError: when that has undone what others committed.
        """
        self._check(work)
        position = self._find(work, label)
        if position is None:
            return False
        savepoint = self._stack[position]
        self._send(f"ROLLBACK TO SAVEPOINT {savepoint.name}")
        holds = self._cut(position + 1, work) or savepoint.holds or work.undid
        work.failed = work.undid = savepoint.holds = False
        if holds:
            self._tell_of_others()
        return True

    # -- inside

    def _is_on_top(self, work: Work | None) -> bool:
        return bool(self._stack) and self._stack[-1].work is work

    def _push(self, work: Work | None, label: str | None = None) -> None:
        # Names of our own: MySQL forgets a savepoint when another gets its name.
        self._made += 1
        name = f"sessionmgr_{self._made}"
        self._send(f"SAVEPOINT {name}")
        self._stack.append(_Savepoint(work, name, label))

    def _first(self, work: Work) -> int | None:
        found = (position for position, s in enumerate(self._stack) if s.work is work)
        return next(found, None)

    def _find(self, work: Work, label: str) -> int | None:
        for position in reversed(range(len(self._stack))):
            savepoint = self._stack[position]
            if savepoint.work is work and savepoint.label == label:
                return position
        return None

    def _release(self, position: int | None) -> None:
        if position is None:
            return
        owner = self._stack[position].work
        self._send(f"RELEASE SAVEPOINT {self._stack[position].name}")
        for savepoint in self._stack[position:]:
            if savepoint.work is not None and savepoint.work is not owner:
                savepoint.work.merged = True
        del self._stack[position:]
        if self._stack and not self._is_on_top(owner):
            self._stack[-1].holds = True

    def _cut(self, position: int, owner: Work) -> bool:
        """Drop the savepoints from a position on, and tell whether others had committed there."""
        gone = self._stack[position:]
        del self._stack[position:]
        for savepoint in gone:
            if savepoint.work is not None and savepoint.work is not owner:
                savepoint.work.lost = True
        return any(savepoint.holds for savepoint in gone)

    def _check(self, work: Work) -> None:
        if work.lost:
            self._refuse_lost()

    def _refuse_lost(self) -> NoReturn:
        raise IsolationError(
            f"database {self._database}: what this session has written was undone by the rollback"
            " of another that had begun to write before it: isolated, all share one connection."
            " Roll this session back, and have one end before the other writes"
        )

    def _refuse_merged(self) -> NoReturn:
        raise IsolationError(
            f"database {self._database}: what this session has written cannot be rolled back any"
            " more, for another that had begun to write before it has committed since: isolated,"
            " all share one connection. Have one end before the other commits"
        )

    def _tell_of_others(self) -> NoReturn:
        raise IsolationError(
            f"database {self._database}: this rollback has also undone what another session had"
            " committed since this one began to write: isolated, all share one connection. End"
            " this session before the other one writes"
        )

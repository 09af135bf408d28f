"""Chords: counts the parts that have returned, and lets one of them, the last, go on."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sessionmgr.errors import ResultStoreError

from .records import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection

    from .access import ResultAccess
    from .chord_statements import ChordStatements
    from .statements import Statements

__all__ = ("ChordBegun", "ChordPart", "Chords")

#: The position of a part that has none: after all others.
LAST = 2**31 - 1

#: How often going on from a chord is tried: pauses of 0.5 s on average make it half a minute, more
#: than most databases take to restart. Nobody else tries again who knows what is published.
ATTEMPTS = 60


@dataclass(frozen=True, slots=True)
class ChordPart:
    """One part of a chord, as it returned.

    :param task_id: the id of its task.
    :param status: the state in which it ended.
    :param result: its result or exception, encoded.
    """

    task_id: str
    status: str
    result: bytes | None = field(repr=False)


@dataclass(slots=True)
class ChordBegun:
    """A chord that is applied while the callback of another one is published.

    :param go_on: goes on from it.
    :param size: how many parts it has, once that is known.
    """

    go_on: Callable[[], object] | None
    size: int | None = None


class Chords:
    """The chords of a store: of each, its size and the parts that have returned.

    A part is counted once, however often it is delivered, and what it costs does not depend on
    the size. The right to go on belongs to who sets ``fired``: that row stays locked until the
    callback is published, so when a worker is killed in between the database takes the right
    back, and the part, delivered again, has another try.

    A callback may be a chord. What the publishing thread writes meanwhile belongs to the same
    transaction. That chord's own row is written last: its parts may return by then, and must not
    wait for a lock for as long as publishing takes, for a driver that knows nothing of greenlets
    would stop the publishing one as well. So they may all have returned before the number of
    them is known, and then it goes on in that transaction too. If that is rolled back, nobody has
    seen the number; the chord is published again, and what has returned stays counted.
    """

    def __init__(self, access: ResultAccess) -> None:
        self._access = access

    def supported(self) -> bool:
        """Tell whether the database has the tables, and a way to count in them."""
        return self._access.prepared().chords is not None

    def begin(self, group_id: str, go_on: Callable[[], object] | None = None) -> None:
        """Begin to count; a chord with this id that has gone on is forgotten.

        One that has not is applied twice, as its message was delivered twice: then parts may
        return meanwhile, and none may be forgotten.

        :param group_id: the chord's header.
        :param go_on: is called, before :meth:`fire` returns, when this is called while that
            publishes and all parts have returned by its end. It is to call :meth:`fire` for
            this chord.
        """
        lent = self._access.lent
        if lent is None:
            self._execute("forget_late", "begin", group=group_id, now=utc_now())
        else:
            lent.begun[group_id] = ChordBegun(go_on)

    def set_size(self, group_id: str, size: int) -> None:
        """Tell how many parts there are, before the last is sent; others may have returned."""
        lent = self._access.lent
        if lent is None or group_id not in lent.begun:
            self._execute("resize", group=group_id, size=size, now=utc_now())
        else:
            lent.begun[group_id].size = size

    def add(self, group_id: str) -> None:
        """Tell of one part more."""
        self._execute("add", group=group_id, now=utc_now())

    def part_returned(
        self,
        group_id: str,
        task_id: str,
        position: int | None,
        status: str,
        result: bytes | None,
        store: Callable[[], object] | None = None,
    ) -> bool:
        """Count a part.

        :param group_id: the chord's header.
        :param task_id: the part's task.
        :param position: its place among the parts, from 0; ``None``: after the others.
        :param status: the state in which it ended.
        :param result: its result or exception, encoded.
        :param store: is called after it is counted. What it calls of the store, in this thread,
            has the transaction of the counting. If all parts have returned, it is only tried.
        :return: whether all parts have returned, and nobody has gone on from there: a part that
            is delivered again is told so again until somebody has.
        """
        row = {
            "group": group_id,
            "task": task_id,
            "position": LAST if position is None else position,
            "status": status,
            "result": result,
            "now": utc_now(),
        }

        def count(statements: Statements, connection: Connection) -> bool:
            complete = _is_complete(self._known(statements).count(connection, row))
            if store is not None:
                with self._access.lending(statements, connection), _tried(connection, complete):
                    store()
            return complete

        at_once = store is None and self._known(self._access.prepared()).counts_at_once
        return self._access.call(count, transaction=not at_once)

    def fire(
        self,
        group_id: str,
        publish: Callable[[list[ChordPart]], object],
        store: Callable[[], object] | None = None,
    ) -> bool:
        """Go on from a chord whose parts have all returned, unless somebody has.

        :param group_id: the chord's header.
        :param publish: is called with the parts, in their order, while others who try the same
            wait. What it calls of the store, in this thread, has this call's connection and
            transaction. If it raises, the right to go on is given back.
        :param store: is called before that, in the same transaction, and also when somebody has
            gone on.
        :return: whether this call went on.
        """
        published = undone = False

        def work(statements: Statements, connection: Connection) -> bool:
            nonlocal published, undone
            known, values = self._known(statements), {"group": group_id, "now": utc_now()}
            claimed = connection.execute(known.claim, values).rowcount
            if store is not None:
                with self._access.lending(statements, connection):
                    store()
            if not claimed:
                return published  # by this call: the answer to its commit was lost
            if not published or undone:
                parts = [ChordPart(*row) for row in connection.execute(known.parts, values)]
                with self._access.lending(statements, connection) as lent:
                    publish(parts)
                    while lent.begun:
                        self._begin_late(*lent.begun.popitem())
                published, undone = True, lent.used  # undone, if this is not committed
            connection.execute(known.forget, values)
            return True

        try:
            return self._access.call(work, transaction=True, attempts=ATTEMPTS)
        except Exception:
            if published:  # a time limit, say: nobody is to publish it again
                self._access.call(work, transaction=True)
            raise

    def give_up(self, group_id: str) -> bool:
        """Go on from a chord without its parts; tell whether nobody else has."""

        def work(statements: Statements, connection: Connection) -> bool:
            known, values = self._known(statements), {"group": group_id, "now": utc_now()}
            claimed = bool(connection.execute(known.claim, values).rowcount)
            connection.execute(known.forget, values)
            return claimed

        return self._access.call(work, transaction=True, attempts=ATTEMPTS)

    # -- inside

    def _begin_late(self, group_id: str, begun: ChordBegun) -> None:
        """Begin to count after parts were sent, in the transaction of the call that sent them."""

        def work(statements: Statements, connection: Connection) -> bool:
            known = self._known(statements)
            values = {"group": group_id, "now": utc_now(), "size": begun.size}
            for statement in (known.forget_late, known.begin, known.resize):
                connection.execute(statement, values)
            return _is_complete(connection.execute(known.look, values).one())

        if self._access.call(work) and begun.go_on is not None:
            begun.go_on()

    def _execute(self, *names: str, **values: Any) -> None:
        def work(statements: Statements, connection: Connection) -> None:
            for name in names:
                connection.execute(getattr(self._known(statements), name), values)

        self._access.call(work)

    def _known(self, statements: Statements) -> ChordStatements:
        if statements.chords is None:
            raise ResultStoreError(
                f"database {self._access.describe()} has no tables for chords, or no upsert to"
                " count with. Create them with 'python -m sessionmgr results upgrade'"
            )
        return statements.chords


@contextmanager
def _tried(connection: Connection, undone: bool) -> Iterator[None]:
    """Undo what a transaction has done in a block, if it is to be undone."""
    if not undone:
        yield
        return
    connection.exec_driver_sql("SAVEPOINT sessionmgr_tried")
    yield
    connection.exec_driver_sql("ROLLBACK TO SAVEPOINT sessionmgr_tried")


def _is_complete(counted: Any) -> bool:
    returned, size, added, fired = counted
    return fired is None and size is not None and returned >= size + added

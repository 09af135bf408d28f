"""Chords: counts the parts that have returned, and lets one of them, the last, go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sessionmgr.errors import ResultStoreError

from .records import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from .chord_statements import ChordStatements
    from .statements import Statements
    from .store import ResultStore

__all__ = ("ChordPart", "Chords")

#: The position of a part that has none: after all others.
LAST = 2**31 - 1


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


class Chords:
    """The chords of a store: of each, its size and the parts that have returned.

    A part is counted once, however often it is delivered, and what it costs does not depend on
    the size. The right to go on belongs to who sets ``fired``: that row stays locked until the
    callback is published, so when a worker is killed in between the database takes the right
    back, and the part, delivered again, has another try.
    """

    def __init__(self, store: ResultStore) -> None:
        self._store = store

    def supported(self) -> bool:
        """Tell whether the database has the tables, and a way to count in them."""
        return self._store._prepared().chords is not None

    def begin(self, group_id: str) -> None:
        """Begin to count; a chord that was applied before with this id is forgotten."""
        self._execute("forget", "begin", group=group_id, now=utc_now())

    def set_size(self, group_id: str, size: int) -> None:
        """Tell how many parts there are, once that is known: parts may have returned by then."""
        self._execute("resize", group=group_id, size=size, now=utc_now())

    def add(self, group_id: str) -> None:
        """Tell of one part more."""
        self._execute("add", group=group_id)

    def part_returned(
        self, group_id: str, task_id: str, position: int | None, status: str, result: bytes | None
    ) -> bool:
        """Count a part.

        :param group_id: the chord's header.
        :param task_id: the part's task.
        :param position: its place among the parts, from 0; ``None``: after the others.
        :param status: the state in which it ended.
        :param result: its result or exception, encoded.
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
            returned, size, added, fired = self._known(statements).count(connection, row)
            return fired is None and size is not None and returned >= size + added

        at_once = self._known(self._store._prepared()).counts_at_once
        return self._store._call(count, transaction=not at_once)

    def fire(self, group_id: str, publish: Callable[[list[ChordPart]], object]) -> bool:
        """Go on from a chord whose parts have all returned, unless somebody has.

        :param group_id: the chord's header.
        :param publish: is called with the parts, in their order, while others who try the same
            wait. If it raises, the right to go on is given back.
        :return: whether this call went on.
        """
        published = False

        def work(statements: Statements, connection: Connection) -> bool:
            nonlocal published
            known, values = self._known(statements), {"group": group_id, "now": utc_now()}
            if not connection.execute(known.claim, values).rowcount:
                return published  # by this call: the answer to its commit was lost
            if not published:
                rows = connection.execute(known.parts, values)
                publish([ChordPart(*row) for row in rows])
                published = True
            connection.execute(known.forget, values)
            return True

        return self._store._call(work, transaction=True, attempts=5)

    def give_up(self, group_id: str) -> bool:
        """Go on from a chord without its parts; tell whether nobody else has."""

        def work(statements: Statements, connection: Connection) -> bool:
            known, values = self._known(statements), {"group": group_id, "now": utc_now()}
            claimed = bool(connection.execute(known.claim, values).rowcount)
            connection.execute(known.forget, values)
            return claimed

        return self._store._call(work, transaction=True, attempts=5)

    # -- inside

    def _execute(self, *names: str, **values: Any) -> None:
        def work(statements: Statements, connection: Connection) -> None:
            for name in names:
                connection.execute(getattr(self._known(statements), name), values)

        self._store._call(work)

    def _known(self, statements: Statements) -> ChordStatements:
        if statements.chords is None:
            raise ResultStoreError(
                f"database {self._store.describe()} has no tables for chords, or no upsert to"
                " count with. Create them with 'python -m sessionmgr results upgrade'"
            )
        return statements.chords

"""Pages of a select by the place where the one before ended: ``paginate_keyset(after=...)``."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy import inspect

from .keyset_compare import rows_after
from .keyset_cursor import damaged, read_cursor, write_cursor
from .keyset_order import find_order
from .page_statements import counting, entities_of, merges_rows, one_column
from .paging import PER_PAGE, page_arguments
from .transient import is_untranslatable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Sequence

    from sqlalchemy import Result
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session
    from sqlalchemy.sql.selectable import GenerativeSelect

    # how many types it has differs between SQLAlchemy 2.0 and 2.1
    AnySelect = GenerativeSelect

__all__ = ("KeysetPage", "paginate_keyset")


@dataclass(frozen=True)
class KeysetPage:
    """A page of a select, and where it ends.

    :param items: what stands on it.
    :param per_page: how many there may be.
    :param after: the cursor to ask for the next page with; None if this is the last one.
    """

    items: list[Any]
    per_page: int
    after: str | None

    @property
    def has_next(self) -> bool:
        """Whether there is a page after this one."""
        return self.after is not None

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items of this page."""
        return iter(self.items)


@overload
def paginate_keyset(
    session: Session | scoped_session[Any],
    select: AnySelect,
    *,
    after: str | None = None,
    per_page: int | None = PER_PAGE,
    max_per_page: int | None = 100,
) -> KeysetPage: ...


@overload
def paginate_keyset(
    session: AsyncSession | async_scoped_session[Any],
    select: AnySelect,
    *,
    after: str | None = None,
    per_page: int | None = PER_PAGE,
    max_per_page: int | None = 100,
) -> Awaitable[KeysetPage]: ...


def paginate_keyset(
    session: Any,
    select: AnySelect,
    *,
    after: str | None = None,
    per_page: int | None = PER_PAGE,
    max_per_page: int | None = 100,
) -> KeysetPage | Awaitable[KeysetPage]:
    """Read the page after another one, at a cost that does not grow with the pages before it.

    Rows that are added or deleted meanwhile do not move the others to another page.

    :param session: what reads it. For an asynchronous session the page is awaited.
    :param select: the statement, with an ORDER BY whose keys are never NULL. What tells its rows
        apart is added to that: the primary key of its entity, or those of its tables.
    :param after: where to go on: ``after`` of the page before; None for the first page.
    :param per_page: number of rows on a page; None is 20.
    :param max_per_page: what larger values of ``per_page`` are cut to; None is no limit.
    :raises PageNotFoundError: when ``per_page`` is no integer from 1, or ``after`` is damaged or of
        a select in another order.
    :raises PaginationError: when the select has no keyset pages: rows cannot be told apart, a key
        may be NULL, it has no ORDER BY, or has LIMIT or GROUP BY; or ``max_per_page`` is nonsense.
    """
    _, size = page_arguments(1, per_page, max_per_page, error_out=True)
    reading = _Reading(select, after, size, _dialect_of(session, select))
    if iscoroutinefunction(session.execute):
        return _load(session, reading)
    with reading.sent():
        result = session.execute(reading.statement)
    reading.take(result)
    question = reading.question()
    return reading.page(bool(question is not None and session.scalar(question)))


def _dialect_of(session: Any, select: Any) -> str:
    entity = next(iter(entities_of(select)), None)
    bind = session.get_bind(None if entity is None else inspect(entity).mapper, clause=select)
    name: str = bind.dialect.name
    return name


async def _load(session: AsyncSession, reading: _Reading) -> KeysetPage:
    with reading.sent():
        result = await session.execute(reading.statement)
    reading.take(result)
    question = reading.question()
    return reading.page(bool(question is not None and await session.scalar(question)))


class _Reading:
    """How a page is read, without I/O.

    The rows of :attr:`statement` go to :meth:`take`, then the answer to :meth:`question`, if there
    is one, to :meth:`page`.
    """

    def __init__(self, select: Any, after: str | None, per_page: int, dialect: str) -> None:
        self._keys = find_order(select, dialect)
        self._select = select
        self._per_page = per_page
        values = None if after is None else read_cursor(self._keys, after)
        ordered = select.order_by(None).order_by(*(key.ordered for key in self._keys))
        keyed = ordered.add_columns(
            *(key.fetched.label(f"keyset_{number}") for number, key in enumerate(self._keys))
        )
        self.statement = self._after(keyed, values).limit(per_page + 1)
        self._continued = values is not None
        self._items: list[Any] = []
        self._values: Sequence[Sequence[Any]] = []

    def _after(self, select: Any, values: Sequence[Any] | None) -> Any:
        return select if values is None else select.where(rows_after(self._keys, values))

    @contextmanager
    def sent(self) -> Iterator[None]:
        """Tell of a cursor's text that no row can have, around what sends the statement.

        :raises PageNotFoundError: when the key's character set lacks it.
        """
        try:
            yield
        except Exception as error:
            if self._continued and is_untranslatable(error):
                raise damaged() from None
            raise

    def take(self, result: Result[Any]) -> None:
        """Take the rows apart, into what is shown and its keys."""
        if entities_of(self._select):
            result = result.unique()
        rows = result.freeze()
        width = len(self._select.column_descriptions)
        shown = rows().columns(*range(width))
        self._items = list(shown.scalars() if one_column(self._select) else shown)
        self._values = rows().columns(*range(width, width + len(self._keys))).all()

    def question(self) -> Any:
        """Select whether there is more, where the rows do not tell."""
        if len(self._items) > self._per_page or not (self._items and merges_rows(self._select)):
            return None
        return counting(self._after(self._select, self._values[-1]).limit(1))

    def page(self, more: bool) -> KeysetPage:
        """Give the page.

        :param more: what the database answered.
        """
        items = self._items[: self._per_page]
        more = more or len(self._items) > self._per_page
        after = write_cursor(self._keys, self._values[len(items) - 1]) if more else None
        return KeysetPage(items, self._per_page, after)

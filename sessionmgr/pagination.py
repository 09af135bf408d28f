"""Pages of a select by number: ``paginate(session, select, page=2)``."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, overload

from .pagination_asyncio import AsyncPagination
from .paging import PER_PAGE, BasePagination, page_arguments

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session
    from typing_extensions import Self

    from .page_statements import Statement

__all__ = ("AsyncPagination", "Pagination", "page_arguments", "paginate")


class Pagination(BasePagination):
    """A page of a select: its items, and what there is beside it.

    ``items``, ``page``, ``per_page``, ``max_per_page`` and ``total`` (None where the rows were not
    counted) are what they are called.
    """

    def __init__(
        self,
        session: Session | scoped_session[Any],
        select: Statement,
        *,
        page: int | None = 1,
        per_page: int | None = PER_PAGE,
        max_per_page: int | None = 100,
        error_out: bool = True,
        count: bool = True,
    ) -> None:
        """Read a page; the arguments are those of :func:`paginate`, with what it raises."""
        super().__init__(
            session,
            select,
            page=page,
            per_page=per_page,
            max_per_page=max_per_page,
            error_out=error_out,
            count=count,
        )
        self._take(session.execute(self._wanted()))
        question = self._question()
        if question is not None:
            self._learn(session.scalar(question) or 0)
        self._check()

    def prev(self, *, error_out: bool = False) -> Self:
        """Read the page before this one; before the first page that is the first.

        :raises PageNotFoundError: when there is none, and ``error_out``.
        """
        return self._turn(self.page - 1, error_out)

    def next(self, *, error_out: bool = False) -> Self:
        """Read the page after this one; after the last page it has no items.

        :raises PageNotFoundError: when there is none, and ``error_out``.
        """
        return self._turn(self.page + 1, error_out)

    def _turn(self, page: int, error_out: bool) -> Self:
        return type(self)(self._session, self._select, **self._arguments(page, error_out))


@overload
def paginate(
    session: Session | scoped_session[Any],
    select: Statement,
    *,
    page: int | None = 1,
    per_page: int | None = PER_PAGE,
    max_per_page: int | None = 100,
    error_out: bool = True,
    count: bool = True,
) -> Pagination: ...


@overload
def paginate(
    session: AsyncSession | async_scoped_session[Any],
    select: Statement,
    *,
    page: int | None = 1,
    per_page: int | None = PER_PAGE,
    max_per_page: int | None = 100,
    error_out: bool = True,
    count: bool = True,
) -> Awaitable[AsyncPagination]: ...


def paginate(
    session: Any, select: Statement, **arguments: Any
) -> Pagination | Awaitable[AsyncPagination]:
    """Read a page of what a select gives.

    :param session: what reads it. For an asynchronous session the page is awaited.
    :param select: the statement, of entities, columns or a union; with an ORDER BY, for without
        one a database may give other rows to a page each time. Within its LIMIT and OFFSET, if any.
    :param page: number of the page, from 1; None is 1.
    :param per_page: number of rows on a page; None is 20.
    :param max_per_page: what larger values of ``per_page`` are cut to; None is no limit.
    :param error_out: whether a page that is not there is an error. If not, nonsense stands for
        page 1 and 20 rows a page, and a page after the last one has no items.
    :param count: whether to find ``total`` and ``pages``. The rows of a page that is not full tell
        them; otherwise it takes a second statement.
    :raises PageNotFoundError: when ``page`` or ``per_page`` is no integer from 1 whose OFFSET has
        64 bits, or a page other than the first is empty; and ``error_out``.
    :raises PaginationError: when ``max_per_page`` is nonsense, or the LIMIT or OFFSET of the select
        is an expression.
    """
    if iscoroutinefunction(session.execute):
        return AsyncPagination.load(session, select, **arguments)
    return Pagination(session, select, **arguments)

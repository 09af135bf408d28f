"""Pages by number: their arguments, their arithmetic, and what their rows tell; no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import PageNotFoundError, PaginationError
from .page_statements import LARGEST, check_select, counting, merges_rows, read, window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Result, Select

    from .page_statements import Statement

__all__ = ("BasePagination", "page_arguments")

PER_PAGE = 20
"""Rows of a page, where nothing else is said, or nonsense."""


def page_arguments(
    page: object, per_page: object, max_per_page: int | None, error_out: bool
) -> tuple[int, int]:
    """Check what a client asked for.

    :param page: number of the page, from 1; None is 1.
    :param per_page: number of rows on a page, at least 1; None is 20.
    :param max_per_page: what larger values of ``per_page`` are cut to; None is no limit.
    :param error_out: whether nonsense is an error, or stands for None.
    :return: page and per_page.
    :raises PageNotFoundError: when one of them is no integer or out of range, and ``error_out``.
    :raises PaginationError: when ``max_per_page``, which is the application's, is nonsense.
    """
    if max_per_page is not None and not _is_number(max_per_page):
        raise PaginationError(
            f"max_per_page={_shown(max_per_page)}: it is an integer from 1, or None for no limit"
        )
    limit = LARGEST - 1 if max_per_page is None else min(max_per_page, LARGEST - 1)
    if max_per_page is not None and isinstance(per_page, int) and per_page > limit:
        per_page = limit
    size = _checked("per_page", per_page, min(PER_PAGE, limit), limit, error_out)
    return _checked("page", page, 1, (LARGEST - 1) // size, error_out), size


def _checked(name: str, value: Any, default: int, largest: int, error_out: bool) -> int:
    if value is None:
        return default
    if _is_number(value) and value <= largest:
        return int(value)
    if error_out:
        raise PageNotFoundError(
            f"{name}={_shown(value)} was asked for: {name} is an integer from 1 to {largest}"
        )
    return default


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print the longest
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:47]}..."


class BasePagination:
    """What pages for sessions and for asynchronous sessions have in common.

    How one is read: the rows of :meth:`_wanted` go to :meth:`_take`, then the answer to
    :meth:`_question`, if there is one, to :meth:`_learn`; :meth:`_check` has the last word.
    """

    def __init__(
        self,
        session: Any,
        select: Statement,
        *,
        page: int | None = 1,
        per_page: int | None = PER_PAGE,
        max_per_page: int | None = 100,
        error_out: bool = True,
        count: bool = True,
    ) -> None:
        """Check the arguments; nothing is read yet.

        :raises PageNotFoundError: when ``page`` or ``per_page`` is nonsense, and ``error_out``.
        :raises PaginationError: when ``max_per_page`` is nonsense, or the statement no select.
        """
        check_select(select)
        self.page, self.per_page = page_arguments(page, per_page, max_per_page, error_out)
        self.max_per_page = max_per_page
        self.items: list[Any] = []
        self.total: int | None = None
        self._session = session
        self._select: Any = select
        self._error_out = error_out
        self._count = count
        self._merges = merges_rows(select)
        self._more = False

    # -- reading

    def _wanted(self) -> Any:
        """Select the page's rows, and one more where that tells whether there is another page."""
        ahead = 0 if self._count or self._merges else 1
        return window(self._select, self._offset, self.per_page + ahead)

    def _take(self, result: Result[Any]) -> None:
        rows = read(result, self._select)
        self._more = len(rows) > self.per_page
        self.items = rows[: self.per_page]

    def _question(self) -> Select[Any] | None:
        """Select the number that the page's rows do not tell, if there is any."""
        if self._count:
            if not self._tells_total():
                return counting(self._select)
            self.total = self._offset + len(self.items)
        elif self._merges and self.items:
            return counting(window(self._select, self._offset + self.per_page, 1))
        return None

    def _tells_total(self) -> bool:
        """Tell whether the page is not full, and so the last one."""
        if not self.items:
            return self.page == 1
        return len(self.items) < self.per_page and not self._merges

    def _learn(self, number: int) -> None:
        if self._count:
            # Rows may have been deleted since the page was read: what is shown was there.
            self.total = max(number, self._offset + len(self.items) if self.items else 0)
        else:
            self._more = number > 0

    def _check(self) -> None:
        if self.items or self.page == 1 or not self._error_out:
            return
        there = (
            "there is nothing on it"
            if self.total is None
            else f"the last one of {self.total} rows, {self.per_page} to a page, is {self.pages}"
        )
        raise PageNotFoundError(f"page {self.page} was asked for: {there}")

    def _arguments(self, page: int, error_out: bool) -> dict[str, Any]:
        """Give the arguments for another page of the same select."""
        return {
            "page": page,
            "per_page": self.per_page,
            "max_per_page": self.max_per_page,
            "error_out": error_out,
            "count": self._count,
        }

    # -- what pages tell

    @property
    def _offset(self) -> int:
        return (self.page - 1) * self.per_page

    @property
    def pages(self) -> int:
        """The number of pages; 0 where there are no rows, or they were not counted."""
        return -(-(self.total or 0) // self.per_page)

    @property
    def has_prev(self) -> bool:
        """Whether this is not the first page."""
        return self.page > 1

    @property
    def prev_num(self) -> int | None:
        """The number of the page before, or None."""
        return self.page - 1 if self.has_prev else None

    @property
    def has_next(self) -> bool:
        """Whether there is a page after this one; known also where rows were not counted."""
        return self.page < self.pages if self._count else self._more

    @property
    def next_num(self) -> int | None:
        """The number of the page after, or None."""
        return self.page + 1 if self.has_next else None

    @property
    def first(self) -> int:
        """The number of the first item on this page, from 1; 0 where there are no items."""
        return self._offset + 1 if self.items else 0

    @property
    def last(self) -> int:
        """The number of the last item on this page; 0 where there are no items."""
        return self._offset + len(self.items) if self.items else 0

    def iter_pages(
        self,
        *,
        left_edge: int = 2,
        left_current: int = 2,
        right_current: int = 4,
        right_edge: int = 2,
    ) -> Iterator[int | None]:
        """Iterate over the numbers for a row of links to pages; None stands for those left out.

        :param left_edge: how many of the first pages.
        :param left_current: how many pages before this one.
        :param right_current: how many pages after this one.
        :param right_edge: how many of the last pages.
        """
        pages, middle_end = self.pages, self.page + right_current
        shown = {
            *range(1, min(left_edge, pages) + 1),
            *range(max(1, self.page - left_current), min(middle_end, pages) + 1),
            *range(max(middle_end, pages - right_edge) + 1, pages + 1),
        }
        before = 0
        for number in sorted(shown):
            if number > before + 1:
                yield None
            yield number
            before = number
        if before < pages:
            yield None

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items of this page."""
        return iter(self.items)

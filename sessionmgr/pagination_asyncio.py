"""Pages of a select by number, for asynchronous sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .paging import BasePagination

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from typing_extensions import Self

    from .page_statements import Statement

__all__ = ("AsyncPagination",)


class AsyncPagination(BasePagination):
    """A page of a select; the twin of :class:`~sessionmgr.pagination.Pagination`.

    It is made by :meth:`load`; :meth:`prev` and :meth:`next` are awaited.
    """

    @classmethod
    async def load(
        cls,
        session: AsyncSession | async_scoped_session[Any],
        select: Statement,
        **arguments: Any,
    ) -> Self:
        """Read a page.

        :param arguments: as for :class:`~sessionmgr.pagination.Pagination`, with what it raises.
        """
        pagination = cls(session, select, **arguments)
        pagination._take(await session.execute(pagination._wanted()))
        question = pagination._question()
        if question is not None:
            pagination._learn(await session.scalar(question) or 0)
        pagination._check()
        return pagination

    async def prev(self, *, error_out: bool = False) -> Self:
        """Read the page before this one; before the first page that is the first.

        :raises PageNotFoundError: when there is none, and ``error_out``.
        """
        return await self._turn(self.page - 1, error_out)

    async def next(self, *, error_out: bool = False) -> Self:
        """Read the page after this one; after the last page it has no items.

        :raises PageNotFoundError: when there is none, and ``error_out``.
        """
        return await self._turn(self.page + 1, error_out)

    async def _turn(self, page: int, error_out: bool) -> Self:
        return await self.load(self._session, self._select, **self._arguments(page, error_out))

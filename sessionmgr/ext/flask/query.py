"""``User.query``: SQLAlchemy's older form of queries, with 404s and pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from flask import abort
from sqlalchemy import orm
from sqlalchemy.exc import MultipleResultsFound, NoResultFound

from .pagination import paginate

if TYPE_CHECKING:
    from .pagination import Pagination

__all__ = ("Query",)

EntityT = TypeVar("EntityT")


class Query(orm.Query[EntityT]):
    """A query with 404s for views. ``db.get_or_404(...)`` and its like are for selects."""

    def get_or_404(self, ident: Any, description: str | None = None) -> EntityT:
        """Get an object by its primary key, or abort with 404.

        :param ident: the primary key.
        :param description: what the 404 says; default: a text of Werkzeug's.
        """
        found: EntityT | None = self.get(ident)
        if found is None:
            abort(404, description=description)
        return found

    def first_or_404(self, description: str | None = None) -> EntityT:
        """Get the first result, or abort with 404.

        :param description: as for :meth:`get_or_404`.
        """
        found = self.first()
        if found is None:
            abort(404, description=description)
        return found

    def one_or_404(self, description: str | None = None) -> EntityT:
        """Get the only result; where there is none, or more than one, abort with 404.

        :param description: as for :meth:`get_or_404`.
        """
        try:
            return self.one()
        except (NoResultFound, MultipleResultsFound):
            abort(404, description=description)

    def paginate(
        self,
        *,
        page: int | None = None,
        per_page: int | None = None,
        max_per_page: int | None = None,
        error_out: bool = True,
        count: bool = True,
    ) -> Pagination:
        """Read a page of the results; the arguments are those of ``db.paginate``."""
        statement: Any = self.statement  # for DML there are no queries
        return paginate(
            self.session,
            statement,
            page=page,
            per_page=per_page,
            max_per_page=max_per_page,
            error_out=error_out,
            count=count,
        )

"""Pages in a Flask application: their numbers come from the request, and nonsense is a 404."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import abort, has_request_context, request

from sessionmgr import pagination
from sessionmgr.errors import PageNotFoundError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session

    from sessionmgr.page_statements import Statement

__all__ = ("Pagination", "paginate")


class Pagination(pagination.Pagination):
    """A page of a select: its items, and what there is beside it.

    ``db.paginate`` makes it. Where there is no such page, and ``error_out``, it is a 404: also for
    ``prev(error_out=True)`` and ``next(error_out=True)``.
    """

    def __init__(
        self, session: Session | scoped_session[Any], select: Statement, **arguments: Any
    ) -> None:
        """Read a page; the arguments are those of :func:`sessionmgr.pagination.paginate`.

        :raises werkzeug.exceptions.NotFound: when there is no such page, and ``error_out``.
        """
        try:
            super().__init__(session, select, **arguments)
        except PageNotFoundError:
            abort(404)


def paginate(
    session: Session | scoped_session[Any],
    select: Statement,
    *,
    page: int | None,
    per_page: int | None,
    error_out: bool,
    **arguments: Any,
) -> Pagination:
    """Read the page that the application, or else the request's query string, asks for.

    :param page: number of the page, from 1; ``None`` asks the request.
    :param per_page: rows on a page; ``None`` asks the request.
    :param error_out: whether a page that is not there is a 404.
    :param arguments: ``max_per_page`` and ``count``.
    """
    return Pagination(
        session,
        select,
        page=_requested("page", page, error_out=error_out),
        per_page=_requested("per_page", per_page, error_out=error_out),
        error_out=error_out,
        **arguments,
    )


def _requested(name: str, given: int | None, *, error_out: bool) -> int | None:
    if given is not None or not has_request_context():
        return given
    text = request.args.get(name)
    try:
        return None if text is None else int(text)
    except ValueError:
        if error_out:
            abort(404)
        return None

"""Sessions of a Flask application: their databases, and the context that they live in."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask.globals import app_ctx
from sqlalchemy import orm

from sessionmgr.routing import RoutedSession, bind_key_of, find_table

from .databases import no_such_bind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flask.ctx import AppContext

    from .databases import Engines
    from .extension import SQLAlchemy

__all__ = ("Session", "current_context", "session_class")

#: Gives the application context, as the proxy finds it; without one it raises RuntimeError.
current_context: Callable[[], AppContext] = app_ctx._get_current_object  # type: ignore[attr-defined]


class _AppSession(RoutedSession):
    """A session on the databases of the application in whose context it is first used."""

    _db: SQLAlchemy
    _engines: Engines | None = None
    _context: weakref.ref[Any] | None = None

    def _belong(self, db: SQLAlchemy) -> None:
        """Note whose session this is, and have it ended with its context at the latest.

        Flask leaves out the teardown functions that follow one that has raised, and one of those
        may open a session anew. The next context may be at the same address.
        """
        self._db = db
        try:
            context = current_context()
        except RuntimeError:
            return
        scope, this = id(context), weakref.ref(self)
        self._context = weakref.ref(context, lambda _: db._end_forgotten(scope, this()))

    def _find_engine(self, bind_key: str | None, *_: Any) -> sa.Engine:
        engines = self._engines
        if engines is None:
            engines = self._engines = self._db.engines
        return engines[bind_key]


class Session(_AppSession):
    """A session that picks the engine of each statement by the bind key of its tables.

    The application is the one in whose context it first needs a database. Tables are not created:
    ``db.create_all()`` does that. What a commit over several databases is,
    :class:`sessionmgr.routing.RoutedSession` tells.
    """

    def __init__(self, db: SQLAlchemy, **kwargs: Any) -> None:
        """Open a session; it is for ``db.session`` to do so.

        :param db: the extension.
        :param kwargs: options of :class:`sqlalchemy.orm.Session`.
        """
        super().__init__(**kwargs)
        self._belong(db)


def session_class(given: type[Any]) -> type[orm.Session]:
    """Give the class of an application's sessions: one that takes ``db`` and picks engines.

    :param given: a subclass of :class:`Session`, or of SQLAlchemy's own, which is made one that
        does; its methods come first.
    """
    if issubclass(given, Session):
        return given

    def init(self: Any, db: SQLAlchemy, **kwargs: Any) -> None:
        self._belong(db)
        super(own, self).__init__(**kwargs)

    bases = (_AppSession,) if given is orm.Session else (given, _AppSession)
    names = {"__init__": init, "__module__": given.__module__, "__doc__": given.__doc__}
    own: type[orm.Session] = type(given.__name__, bases, names)
    return own


def _clause_to_engine(
    clause: sa.ClauseElement | None, engines: Mapping[str | None, sa.Engine]
) -> sa.Engine | None:
    """Find the engine of a statement by the bind key of its first table.

    :param clause: a statement, or a part of one.
    :param engines: bind key -> engine.
    :return: ``None`` where there is no table, or its metadata says nothing of bind keys.
    :raises NoSuchBindError: when ``engines`` has none for the key.
    """
    table = None if clause is None else find_table(clause)
    if table is None or "bind_key" not in table.metadata.info:
        return None
    bind_key = bind_key_of(table)
    if bind_key not in engines:
        raise no_such_bind(bind_key, engines)
    return engines[bind_key]


def _app_ctx_id() -> int:
    """Give what tells the current application context from the others there are.

    :raises RuntimeError: when there is none.
    """
    return id(current_context())

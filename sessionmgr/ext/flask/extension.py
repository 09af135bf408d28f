"""``db``: what a Flask application's models, sessions, engines and tables are reached by."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from flask import abort
from sqlalchemy import orm
from sqlalchemy.exc import MultipleResultsFound, NoResultFound

from sessionmgr.binds import DEFAULT
from sessionmgr.errors import FlaskSetupError
from sessionmgr.options import check_routed_options, check_scope, check_session_options
from sessionmgr.schema import create_tables, drop_tables, has_tables
from sessionmgr.scopes import forget_at_fork
from sessionmgr.urls import masked

from .cli import add_models_to_shell as models_in_shell
from .cli import commands
from .databases import make_engines, no_such_bind
from .model import Model, is_declarative, make_model
from .pagination import paginate
from .query import Query
from .record_queries import record
from .session import Session, _app_ctx_id, current_context, session_class
from .table import make_table_class
from .track_modifications import track

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flask import Flask

    from .databases import Engines
    from .pagination import Pagination

__all__ = ("SQLAlchemy",)

EntityT = TypeVar("EntityT")

#: What stands for all bind keys.
_ALL = "__all__"


class SQLAlchemy:
    """SQLAlchemy for Flask applications: one object for any number of them.

    It has the names of ``sqlalchemy`` and ``sqlalchemy.orm`` too: ``db.Column``, ``db.select``.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        metadata: sa.MetaData | None = None,
        session_options: Mapping[str, Any] | None = None,
        query_class: type[Query[Any]] = Query,
        model_class: type[Any] = Model,
        engine_options: Mapping[str, Any] | None = None,
        add_models_to_shell: bool = True,
        disable_autonaming: bool = False,
    ) -> None:
        """Make the extension, and prepare an application for it.

        :param app: the application; or give it to :meth:`init_app` later.
        :param metadata: where tables without a bind key are; default: a new one. A
            ``DeclarativeBase`` has its own.
        :param session_options: options of :class:`sqlalchemy.orm.Session`; ``class_``: a subclass
            of :class:`Session`, or of SQLAlchemy's; ``scopefunc``: gives what has one session.
        :param query_class: the class of ``Model.query``, ``session.query()`` and ``db.Query``.
        :param model_class: what models derive from: a subclass of ``DeclarativeBase`` or
            ``DeclarativeBaseNoMeta``, with ``MappedAsDataclass`` or without; or any class, for
            models with ``db.Column``.
        :param engine_options: default options of ``create_engine`` for every database of every
            application, and those of :class:`sessionmgr.SessionManager`.
        :param add_models_to_shell: whether ``flask shell`` has the models, and ``db``.
        :param disable_autonaming: whether models name their tables themselves.
        :raises FlaskModelError: when ``model_class`` cannot be.
        :raises EngineOptionsError: when a session option is unknown, or cannot be.
        """
        self._engine_options = dict(engine_options or {})
        self._add_models_to_shell = add_models_to_shell
        self.Query = query_class
        #: The tables of each bind key: bind key -> metadata.
        self.metadatas: dict[str | None, sa.MetaData] = {
            None: _default_metadata(model_class, metadata)
        }
        self.Table = make_table_class(self._metadata_of)
        self.Model = make_model(self, model_class, self.metadata, named=not disable_autonaming)
        #: The session of the application context; it is closed when that ends.
        self.session: orm.scoped_session[Session] = self._make_scoped_session(session_options or {})
        if app is not None:
            self.init_app(app)

    # -- applications

    def init_app(self, app: Flask) -> None:
        """Prepare an application by its configuration, which is not read again.

        :param app: the application.
        :raises FlaskSetupError: when it has been prepared before, or names no database.
        :raises DatabaseURLError: when a URL cannot be read.
        :raises EngineOptionsError: when an engine option is unknown, or cannot be.
        """
        if "sqlalchemy" in app.extensions:
            raise FlaskSetupError(
                f"application {app.name!r} has been given to a SQLAlchemy extension before: make"
                " one SQLAlchemy(), import it where it is needed, and call its init_app(app) once"
            )
        callbacks = [record] if app.config.get("SQLALCHEMY_RECORD_QUERIES") else []
        engines = make_engines(app, self._engine_options, callbacks)
        for key in engines:
            self._metadata_of(key)
        app.extensions["sqlalchemy"] = self
        app.extensions["sessionmgr"] = engines
        if app.config["SQLALCHEMY_TRACK_MODIFICATIONS"]:
            track(self.session.session_factory)
        app.teardown_appcontext(self._end_session)
        if self._add_models_to_shell:
            app.shell_context_processor(models_in_shell)
        app.cli.add_command(commands)

    def _end_session(self, error: BaseException | None) -> None:
        registry: Any = self.session.registry  # of forget_at_fork
        session = registry.take()
        if session is not None:
            session._context = None  # which need not end it any more
            session.close()

    def _end_forgotten(self, scope: int, session: orm.Session | None) -> None:
        """End a session whose context is gone, where that has not been done."""
        registry: Any = self.session.registry  # of forget_at_fork
        if session is not None and registry.forget(scope, session):
            session.close()

    # -- sessions

    def _make_scoped_session(self, options: Mapping[str, Any]) -> orm.scoped_session[Session]:
        check_routed_options(options, _check_session, set())
        arguments = {"query_cls": self.Query, **options}
        scope = arguments.pop("scopefunc", _app_ctx_id)
        given = arguments.pop("class_", Session)
        factory: Any = orm.sessionmaker(class_=session_class(given), db=self, **arguments)
        return forget_at_fork(lambda: orm.scoped_session(factory, scope))

    # -- engines

    @property
    def engines(self) -> Engines:
        """The engines of the current application: bind key -> engine; ``None``: the default one.

        Without an application context they are ``app.extensions["sessionmgr"]``. Their
        ``manager`` is the :class:`sessionmgr.SessionManager` that keeps them.

        :raises RuntimeError: when there is no application context.
        :raises FlaskSetupError: when the application was not given to this extension.
        """
        app = current_context().app
        extensions = app.extensions
        if extensions.get("sqlalchemy") is not self:
            raise FlaskSetupError(
                f"the current application, {app.name!r}, has not been given to this"
                " SQLAlchemy extension: call its init_app(app), and make no second SQLAlchemy()"
            )
        engines: Engines = extensions["sessionmgr"]
        return engines

    @property
    def engine(self) -> sa.Engine:
        """The engine of the current application's default database.

        :raises NoSuchBindError: when it has none.
        """
        return self.engines[None]

    def get_engine(self, bind_key: str | None = None, **kwargs: Any) -> sa.Engine:
        """Give an engine of the current application; ``db.engines[bind_key]`` is the newer way.

        :param bind_key: the bind key; ``bind`` is its older name.
        :raises NoSuchBindError: when there is none.
        """
        warnings.warn(
            "db.get_engine(key) is deprecated; use db.engines[key], or db.engine",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.engines[kwargs.get("bind", bind_key)]

    # -- tables

    @property
    def metadata(self) -> sa.MetaData:
        """The tables that have no bind key."""
        return self.metadatas[None]

    def _metadata_of(self, bind_key: str | None) -> sa.MetaData:
        """Give the metadata of a bind key; a new one names constraints as the default one does."""
        if bind_key not in self.metadatas:
            self.metadatas[bind_key] = sa.MetaData(
                naming_convention=self.metadata.naming_convention, info={"bind_key": bind_key}
            )
        return self.metadatas[bind_key]

    def create_all(self, bind_key: str | Iterable[str | None] | None = _ALL) -> None:
        """Create the tables that databases lack; any number of processes may do this at once.

        :param bind_key: a bind key, ``None`` for the default database, or several of these;
            default: all of them.
        :raises NoSuchBindError: when there is no database for one of them.
        """
        for key, engine in self._selected(bind_key):
            self._create(key, engine)

    def _create(self, key: str | None, engine: sa.Engine) -> None:
        metadata = self.metadatas[key]
        if not has_tables(engine, metadata):
            create_tables(engine, metadata, f"{key or DEFAULT!r} ({masked(engine.url)})")

    def drop_all(self, bind_key: str | Iterable[str | None] | None = _ALL) -> None:
        """Drop the tables that databases have; the arguments are those of :meth:`create_all`."""
        for key, engine in self._selected(bind_key):
            drop_tables(engine, self.metadatas[key])

    def reflect(self, bind_key: str | Iterable[str | None] | None = _ALL) -> None:
        """Read from databases which tables they have, into ``db.metadatas``.

        :param bind_key: as for :meth:`create_all`.
        :raises NoSuchBindError: when there is no database for one of them.
        """
        for key, engine in self._selected(bind_key):
            self.metadatas[key].reflect(engine)

    def _bind_keys(self) -> list[str | None]:
        """List the bind keys that have a database, or tables that should have one."""
        engines, metadatas = self.engines, self.metadatas
        return [key for key in metadatas if key in engines or metadatas[key].tables]

    def _selected(
        self, bind_key: str | Iterable[str | None] | None
    ) -> list[tuple[str | None, sa.Engine]]:
        """Find the engines of bind keys, before anything is done with one of them."""
        engines = self.engines
        if bind_key == _ALL:
            bind_key = self._bind_keys()
        elif bind_key is None or isinstance(bind_key, str):
            bind_key = [bind_key]
        keys = list(bind_key)
        for key in keys:
            if key not in self.metadatas:
                raise no_such_bind(key, engines)
        return [(key, engines[key]) for key in keys]

    # -- relationships, of which the dynamic ones have queries

    def relationship(self, *args: Any, **kwargs: Any) -> Any:
        """Make a :func:`sqlalchemy.orm.relationship` whose queries are of ``db.Query``."""
        return orm.relationship(*args, **self._with_query(kwargs))

    def dynamic_loader(self, argument: Any, **kwargs: Any) -> Any:
        """Make a :func:`sqlalchemy.orm.dynamic_loader` whose queries are of ``db.Query``."""
        return orm.dynamic_loader(argument, **self._with_query(kwargs))

    def _with_query(self, options: dict[str, Any]) -> dict[str, Any]:
        backref = options.get("backref")
        if backref is not None:
            name, given = (backref, {}) if isinstance(backref, str) else backref
            options["backref"] = (name, {"query_class": self.Query, **given})
        return {"query_class": self.Query, **options}

    # -- for views

    def get_or_404(
        self, entity: type[EntityT], ident: Any, *, description: str | None = None, **kwargs: Any
    ) -> EntityT:
        """Get an object by its primary key, or abort with 404.

        :param entity: the model.
        :param ident: the primary key.
        :param description: what the 404 says; default: a text of Werkzeug's.
        :param kwargs: options of ``session.get``.
        :raises werkzeug.exceptions.NotFound: when there is none.
        """
        found: EntityT | None = self.session.registry().get(entity, ident, **kwargs)
        if found is None:
            abort(404, description=description)
        return found

    def first_or_404(self, statement: sa.Select[Any], *, description: str | None = None) -> Any:
        """Get the first result of a select, or abort with 404.

        :param statement: the select; of its first row the first column is given.
        :param description: as for :meth:`get_or_404`.
        :raises werkzeug.exceptions.NotFound: when there is none.
        """
        found = self.session.execute(statement).scalar()
        if found is None:
            abort(404, description=description)
        return found

    def one_or_404(self, statement: sa.Select[Any], *, description: str | None = None) -> Any:
        """Get the only result of a select; where there is none, or another, abort with 404.

        :param statement: the select; of its row the first column is given.
        :param description: as for :meth:`get_or_404`.
        :raises werkzeug.exceptions.NotFound: when there is not exactly one.
        """
        try:
            return self.session.execute(statement).scalar_one()
        except (NoResultFound, MultipleResultsFound):
            abort(404, description=description)

    def paginate(
        self,
        select: sa.Select[Any],
        *,
        page: int | None = None,
        per_page: int | None = None,
        max_per_page: int | None = None,
        error_out: bool = True,
        count: bool = True,
    ) -> Pagination:
        """Read a page of what a select gives.

        :param select: the select; with an ORDER BY, or a row may be on two pages, or on none.
        :param page: number of the page; default: ``page`` of the request's query string, or 1.
        :param per_page: rows on a page; default: ``per_page`` of the query string, or 20.
        :param max_per_page: what larger values of ``per_page`` are cut to; default: no limit.
        :param error_out: whether a page that is not there, or nonsense, is a 404. If not, page 1
            and 20 rows a page are read instead of nonsense.
        :param count: whether to count the rows, for ``total`` and ``pages``.
        :raises werkzeug.exceptions.NotFound: when there is no such page, and ``error_out``.
        """
        return paginate(
            self.session,
            select,
            page=page,
            per_page=per_page,
            max_per_page=max_per_page,
            error_out=error_out,
            count=count,
        )

    # -- SQLAlchemy's names

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            for module in (sa, orm):
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(
            f"neither this {type(self).__name__} extension nor sqlalchemy or sqlalchemy.orm has"
            f" {name!r}"
        )

    def __repr__(self) -> str:
        keys = ", ".join("no bind key" if key is None else repr(key) for key in self.metadatas)
        return f"<{type(self).__name__}: tables of {keys}>"


def _default_metadata(model_class: Any, given: sa.MetaData | None) -> sa.MetaData:
    """Choose where tables without a bind key are: a base's own metadata, where it has one."""
    own: sa.MetaData | None = getattr(model_class, "metadata", None)
    if given is not None and isinstance(model_class, type) and is_declarative(model_class):
        warnings.warn(
            f"the metadata argument is ignored: {model_class.__name__} has its own, which"
            " `metadata = MetaData(...)` in its body sets",
            DeprecationWarning,
            stacklevel=3,
        )
        given = None
    chosen = own if given is None else given
    metadata = sa.MetaData() if chosen is None else chosen
    metadata.info["bind_key"] = None
    return metadata


def _check_session(options: Mapping[str, Any]) -> None:
    """Check the options of sessions; those of a class of one's own, that class checks."""
    check_scope(options.get("scopefunc"))
    check_session_options(
        {
            name: orm.Session if value is Session else value
            for name, value in options.items()
            if name not in ("scopefunc", "db")
        }
    )

"""ApplicationDatabase: an application's own database, found, made and ready at its first use."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL, Engine, MetaData
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import ThreadLocalRegistry

from . import forking
from .datafile import DataFile, check_file_name, check_path, check_path_like
from .drivers import url_for
from .errors import DatabasePathError, EngineOptionsError, ManagerClosedError
from .manager import SessionManager
from .models import Base
from .options import Layer, check_options, check_session_options
from .pools import WatchedPool
from .schema import create_tables, has_tables
from .sqlite import is_memory
from .template import copy_template
from .urls import DatabaseKey, hide_secrets, masked, parse_url

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
    from sqlalchemy.orm import DeclarativeBase
    from typing_extensions import Self

    from .appdb_asyncio import AsyncHalf

__all__ = ("ApplicationDatabase",)

# Objects are used after their commit, in windows and in responses; nothing is written before
# commit() or flush() says so.
_SESSION_OPTIONS = {"autoflush": False, "expire_on_commit": False}

# A window's session reads, and writes what its user has changed minutes later, beside the
# program's other threads and tasks: it must not be refused because one of them wrote meanwhile.
_ENGINE_OPTIONS = {"sqlite_transactions": "writes"}


class _Place(NamedTuple):
    """Where the database is: its URL, and its file, where it is one."""

    url: URL
    path: Path | None


class ApplicationDatabase:
    """An application's own database, with sessions for threads and for event loops.

    Make one in a module of the application, and import from there::

        db = ApplicationDatabase("InkLinkOS", template="data/template.db")
        SessionLocal = db.SessionLocal

        with SessionLocal() as session:
            clients = session.query(Client).all()

    Nothing is opened or created before the first connection, from whichever engine or session.
    That one has the file there, its folder, and its tables. Where the database is, is found
    out once; what the environment says later does not move it.
    """

    # _lock guards that _place and _async_half are made once; two equal _keys do no harm.

    def __init__(
        self,
        name: str,
        *,
        url: str | URL | None = None,
        env_var: str | None = "DB_PATH",
        development: str | os.PathLike[str] = "dev.db",
        filename: str | None = None,
        template: str | os.PathLike[str] | None = None,
        base: type[DeclarativeBase] = Base,
        root: str | os.PathLike[str] | None = None,
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Say what the database is. Nothing is looked for yet.

        :param name: the application's name, as that of the folder for its user's data.
        :param url: any database instead of a file that is found by the rules below; the
            environment variable is not looked at then. One URL serves both kinds of drivers:
            the other's is derived from it.
        :param env_var: the environment variable that names the file, before all else, if it is
            set and not empty; ``None`` for none.
        :param development: the file where the program is not frozen, relative to ``root``.
        :param filename: the file's name in the user's data folder, where the program is frozen
            (PyInstaller); default: the name in lower case with ``.db``.
        :param template: a SQLite database whose copy the file begins as; relative to ``root``,
            in a frozen program to its data files. Default: it begins empty.
        :param base: the declarative base whose tables the database is to have.
        :param root: the project's folder; default: the nearest one, from that of the module
            which makes this upwards, with a pyproject.toml, setup.cfg, setup.py or .git, else
            the module's.
        :param engine_options: as for :class:`SessionManager`, for both kinds of engines, over
            ``sqlite_transactions="writes"``: what a session has read is no part of its
            transaction, which begins when it writes, and waits for others to end theirs.
        :param session_options: options of ``sessionmaker``, over ``autoflush=False`` and
            ``expire_on_commit=False``. A ``class_`` is also that of the session inside each
            AsyncSession.
        :raises DatabasePathError: when a name cannot be one of a file.
        :raises DatabaseURLError: when the URL cannot be read.
        :raises EngineOptionsError: when an option cannot be.
        """
        self.name = check_file_name("name", name)
        #: The declarative base whose tables the database is to have.
        self.Base = base
        self._metadata = _metadata_of(base)
        self._url = None if url is None else parse_url(url)
        self._template = None if template is None else check_path_like("template", template)
        if self._template is not None and self._url is not None and _file_of(self._url) is None:
            raise EngineOptionsError(
                f"template= is what a SQLite file begins as, and {masked(self._url)} is no such"
                " file's URL"
            )
        self._file = DataFile(
            self.name,
            _check_variable(env_var),
            check_path_like("development", development),
            check_file_name("filename", f"{name.lower()}.db" if filename is None else filename),
            None if root is None else check_path_like("root", root),
            _folder_of(sys._getframe(1).f_globals.get("__file__")),
        )
        self._engine_options = check_options(Layer("engine_options", engine_options or {})).options
        check_session_options(session_options or {})
        self._session_options = {**_SESSION_OPTIONS, **(session_options or {})}
        self._manager = SessionManager(**self._manager_options())
        self._lock = forking.ProcessLock()
        self._place: _Place | None = None
        self._keys: dict[bool, DatabaseKey] = {}  # whether for event loops -> with such a driver
        self._async_half: AsyncHalf | None = None
        self._closed = False
        #: Makes sessions for threads, one for each: a ``scoped_session``.
        self.SessionLocal = scoped_session(_Sessions(self._find_engine, self._session_options))

    # -- where it is

    @property
    def path(self) -> Path:
        """The database's file, in full; it may not be there yet.

        :raises DatabasePathError: when no file can be there, or the database is none.
        """
        place = self._locate()
        if place.path is None:
            raise DatabasePathError(
                f"database {masked(place.url)} of {self.name!r} has no path: it is no file that"
                " this process opens by its name. Its url says where it is"
            )
        return place.path

    @property
    def data_root(self) -> Path:
        """The folder of the database's file; see :attr:`path`."""
        return self.path.parent

    @property
    def url(self) -> URL:
        """The database's URL, as it was given, or that of its file."""
        return self._locate().url

    def _locate(self) -> _Place:
        place = self._place
        if place is None:
            with self._lock():
                place = self._place = self._place or self._find_place()
        return place

    def _find_place(self) -> _Place:
        if self._url is None:
            path = self._file.find()
            return _Place(parse_url(URL.create("sqlite", database=str(path))), path)
        name = _file_of(self._url)
        if name is None:
            return _Place(self._url, None)
        # SQLAlchemy would look from the current folder anew at each connect.
        path = check_path(name, "url=", "name a file in a folder that can be written to")
        return _Place(parse_url(self._url.set(database=str(path))), path)

    # -- engines and sessions

    @property
    def engine(self) -> Engine:
        """The engine for threads, the same one each time. Disposing of it is :meth:`dispose`'s.

        :raises DatabasePathError: when the file cannot be where it is said to be.
        :raises DatabaseURLError: when no synchronous driver is known for the URL's.
        :raises MissingExtraError: when none is installed.
        :raises ManagerClosedError: after :meth:`close`.
        """
        return self._find_engine()

    def _find_engine(self) -> Engine:
        return self._manager.get_engine(self._key(is_async=False))

    @property
    def async_engine(self) -> AsyncEngine:
        """The engine of the running event loop; see :attr:`engine` for what is raised.

        Each loop has one, so ask where it is used, not when a module is imported.
        """
        return self._asynchronous().find_engine()

    @property
    def AsyncSessionLocal(self) -> async_sessionmaker[AsyncSession]:  # noqa: N802 - as SessionLocal
        """Makes sessions for the event loop that runs when it is called, in any loop."""
        return self._asynchronous().sessions

    def _asynchronous(self) -> AsyncHalf:
        half = self._async_half
        if half is None:
            from .appdb_asyncio import AsyncHalf  # takes greenlet

            with self._lock():
                half = self._async_half
                if half is None:
                    half = self._async_half = AsyncHalf(
                        self._manager_options(), partial(self._key, is_async=True)
                    )
        return half

    def _manager_options(self) -> dict[str, Any]:
        return {
            "engine_callback": self._watch,
            "metadata": self._metadata,
            "pooling": "always",  # a desktop program is one process
            "engine_options": {**_ENGINE_OPTIONS, **self._engine_options},
            "session_options": self._session_options,
        }

    def _key(self, *, is_async: bool) -> DatabaseKey:
        if self._closed:
            raise ManagerClosedError(f"the database of {self.name!r} is closed: make another one")
        key = self._keys.get(is_async)
        if key is None:
            url = url_for(self._locate().url, is_async=is_async)
            key = self._keys[is_async] = DatabaseKey(parse_url(url))
        return key

    # -- first use

    def _watch(self, engine: Engine) -> None:
        pool = engine.pool
        assert isinstance(pool, WatchedPool)
        assert pool.monitor is not None
        pool.monitor.before_first_checkout(self._make_ready)

    def _make_ready(self, engine: Engine) -> None:
        """Have file and tables there; any number of threads and processes may at once."""
        path = self._locate().path
        if path is not None and (self._template is not None or not path.exists()):
            provide = partial(self._provide_file, path)
            if engine.dialect.is_async:
                from .appdb_asyncio import off_the_loop

                off_the_loop(provide)
            else:
                provide()
        self._create_missing(engine)

    def _provide_file(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabasePathError(
                f"the folder of {self.name!r}'s database {path} cannot be made: {error.strerror}"
            ) from error
        if self._template is not None:
            copy_template(self._file.bundled(self._template), path)

    def _create_missing(self, engine: Engine) -> None:
        if not has_tables(engine, self._metadata):
            create_tables(engine, self._metadata, DatabaseKey(engine.url).describe())

    def ensure_schema(self) -> None:
        """Create the tables that are missing; those that are there stay as they are.

        The first use has done so for the models that were imported by then.

        :raises sqlalchemy.exc.SQLAlchemyError: when the database is not to be had, or gives no
            right to create them.
        """
        self._create_missing(self.engine)

    def init_db(self) -> None:
        """Create the tables that are missing: :meth:`ensure_schema` by its other name."""
        self.ensure_schema()

    async def async_ensure_schema(self) -> None:
        """Create the tables that are missing, as :meth:`ensure_schema` does, in an event loop."""
        await self._asynchronous().run(self._create_missing)

    # -- letting go

    def dispose(self) -> None:
        """Close the pool for threads. Everything stays usable, with a new one."""
        self._manager.dispose()
        # A scoped session is bound to the engine that was there at its thread's first.
        self.SessionLocal.registry = ThreadLocalRegistry(self.SessionLocal.session_factory)

    async def async_dispose(self) -> None:
        """Close the pool of the running event loop. Everything stays usable, with a new one."""
        if self._async_half is not None:
            await self._async_half.manager.dispose()

    def close(self) -> None:
        """Close the pool for threads, for good; no session of either kind can be opened then."""
        self._closed = True
        self._manager.close()
        self.SessionLocal.registry = ThreadLocalRegistry(self.SessionLocal.session_factory)

    async def async_close(self) -> None:
        """Close the pools of the running event loop and for threads, for good."""
        self.close()
        if self._async_half is not None:
            await self._async_half.manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.async_close()

    def __repr__(self) -> str:
        where = "not used yet" if self._place is None else masked(self._place.url)
        return f"<ApplicationDatabase {self.name!r}: {where}>"


class _Sessions(sessionmaker[Session]):
    """Makes sessions on the engine that there is when they are made."""

    def __init__(self, find_engine: Callable[[], Engine], options: Mapping[str, Any]) -> None:
        super().__init__(**options)
        self._find_engine = find_engine

    def __call__(self, **local_kw: Any) -> Session:
        """Make a session; on another engine where ``configure`` or the call names one."""
        if local_kw.get("bind") is None and self.kw["bind"] is None:
            local_kw["bind"] = self._find_engine()
        return super().__call__(**local_kw)


def _metadata_of(base: Any) -> MetaData:
    metadata = getattr(base, "metadata", None)
    if not isinstance(metadata, MetaData):
        raise EngineOptionsError(
            f"base must be a declarative base, whose models have the tables, not"
            f" {hide_secrets(base)}"
        )
    return metadata


def _check_variable(env_var: object) -> str | None:
    if env_var is None:
        return None
    if not isinstance(env_var, str) or not env_var or "=" in env_var or "\0" in env_var:
        raise EngineOptionsError(
            f"env_var must be the name of an environment variable, or None for none, not"
            f" {hide_secrets(env_var)}"
        )
    return env_var


def _folder_of(module_file: str | None) -> Path | None:
    return None if module_file is None else Path(module_file).absolute().parent


def _file_of(url: URL) -> str | None:
    """Give the name of a SQLite URL's file, unless it is in memory or named by a URI."""
    name = url.database
    if url.get_backend_name() != "sqlite" or is_memory(url) or not name:
        return None
    return None if name.startswith("file:") else name

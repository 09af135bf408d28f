"""The databases of a Flask application: read from its configuration, kept by a SessionManager."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sessionmgr.binds import DEFAULT, show
from sessionmgr.errors import DatabaseURLError, EngineOptionsError, FlaskSetupError, NoSuchBindError
from sessionmgr.manager import SessionManager
from sessionmgr.sqlite import is_memory
from sessionmgr.urls import hide_secrets, parse_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import sqlalchemy as sa
    from flask import Flask

    from sessionmgr.config import EngineCallback

__all__ = ("Engines", "make_engines", "no_such_bind")

#: Seconds. MySQL and MariaDB close connections after eight hours without a statement, see
#: https://dev.mysql.com/doc/refman/8.4/en/server-system-variables.html#sysvar_wait_timeout
_MYSQL_RECYCLE = 7200

#: Views read, and write later on: a transaction that began with the reading would be refused
#: ("database is locked") whenever another one has written in between.
_DEFAULTS: Mapping[str, Any] = {"sqlite_transactions": "writes"}

_SETTINGS: Mapping[str, Any] = {
    "SQLALCHEMY_DATABASE_URI": None,
    "SQLALCHEMY_BINDS": {},
    "SQLALCHEMY_ENGINE_OPTIONS": {},
    "SQLALCHEMY_ECHO": False,
    "SQLALCHEMY_RECORD_QUERIES": False,
    "SQLALCHEMY_TRACK_MODIFICATIONS": False,
}


class Engines(Mapping["str | None", "sa.Engine"]):
    """The engines of an application: bind key -> engine; ``None`` is the default one's key.

    They are those of this process: in a forked one the same keys give others.
    """

    def __init__(self, manager: SessionManager, bind_keys: Mapping[str, str | None]) -> None:
        """Look at the engines of a manager.

        :param manager: keeps them.
        :param bind_keys: the manager's bind keys -> the application's, where they differ.
        """
        #: Keeps the engines; ``add_bind`` adds another database to it.
        self.manager = manager
        self._bind_keys = bind_keys

    def __getitem__(self, bind_key: str | None) -> sa.Engine:
        own = self._own(bind_key)
        if own is None:
            raise no_such_bind(bind_key, self)
        try:
            return self.manager._find_engine(own, None, None)
        except NoSuchBindError:  # the manager knows nothing of Flask's settings
            raise no_such_bind(bind_key, self) from None

    def __iter__(self) -> Iterator[str | None]:
        # not their text, which is for people
        keys = (key.bind_key or DEFAULT for key in self.manager._binds.databases())
        return (self._bind_keys.get(key, key) for key in keys)

    def __len__(self) -> int:
        return len(self.manager._binds.databases())

    def __contains__(self, bind_key: object) -> bool:
        own = self._own(bind_key)
        return own is not None and self.manager._binds.find(own) is not None

    def _own(self, bind_key: Any) -> str | None:
        """Give the manager's bind key, or ``None`` where the application's cannot be one."""
        own: str = DEFAULT if bind_key is None else bind_key
        return own if self._bind_keys.get(own, own) == bind_key else None

    def __repr__(self) -> str:
        return f"<Engines of bind keys {', '.join(map(repr, self))}>"


def no_such_bind(bind_key: str | None, there: Iterable[str | None]) -> NoSuchBindError:
    """Make the error for a bind key without a database.

    :param bind_key: the key.
    :param there: the bind keys that there are.
    """
    keys = ", ".join(repr(key) for key in there) or "none"
    if bind_key is None:
        return NoSuchBindError(
            "there is no default database, which tables without a bind key are in: set"
            f" SQLALCHEMY_DATABASE_URI, or give them one of the bind keys there are: {keys}"
        )
    return NoSuchBindError(
        f"there is no bind key {show(bind_key)} in SQLALCHEMY_BINDS. Bind keys of this application:"
        f" {keys}"
    )


def make_engines(
    app: Flask,
    engine_options: Mapping[str, Any],
    callbacks: Iterable[EngineCallback] = (),
) -> Engines:
    """Make the engines of an application by its configuration, which is not read again.

    They keep connections, in every process: gunicorn's workers need not be forked after this, and
    forks are safe all the same.

    :param app: the application.
    :param engine_options: default options of ``create_engine`` for every database.
    :param callbacks: are given each engine that is made.
    :raises FlaskSetupError: when the configuration names no database.
    :raises DatabaseURLError: when a URL cannot be read.
    :raises EngineOptionsError: when an option is unknown, a bind key cannot be, or a setting is no
        dictionary.
    """
    for name, default in _SETTINGS.items():
        app.config.setdefault(name, default if default is None else type(default)(default))
    echo = app.config["SQLALCHEMY_ECHO"]
    if echo not in (True, False, None, "debug"):
        raise EngineOptionsError(
            f"the setting SQLALCHEMY_ECHO must be True, False or 'debug', not {hide_secrets(echo)}"
        )
    general = {**_DEFAULTS, "echo": echo, "echo_pool": echo, **engine_options}
    databases = _read(app)
    manager = SessionManager(
        tuple(callbacks),
        binds={
            DEFAULT if key is None else key: _fitted(app, key, options, engine_options)
            for key, options in databases.items()
        },
        pooling="always",
        engine_options=general,
    )
    engines = Engines(manager, {DEFAULT: None} if None in databases else {})
    for key in engines:
        engines[key]  # what cannot be is told now
    return engines


def _read(app: Flask) -> dict[str | None, dict[str, Any]]:
    """Read what the configuration has for each bind key: ``{"url": URL, option: value, ...}``."""
    config = app.config
    for name in ("SQLALCHEMY_BINDS", "SQLALCHEMY_ENGINE_OPTIONS"):
        _check_mapping(name, config[name])
    binds = {
        key: dict(bind) if isinstance(bind, Mapping) else {"url": bind}
        for key, bind in config["SQLALCHEMY_BINDS"].items()
    }
    uri = config["SQLALCHEMY_DATABASE_URI"]
    default = [] if uri is None and None not in binds else [None]
    found: dict[str | None, dict[str, Any]] = {key: {} for key in (*default, *binds)}
    for key in found:
        found[key].update(binds.get(key, {}))
    if default:
        found[None].update(config["SQLALCHEMY_ENGINE_OPTIONS"])
    if uri is not None:
        found[None]["url"] = uri
    if not found:
        raise FlaskSetupError(
            f"application {app.name!r} has no database: set SQLALCHEMY_DATABASE_URI, or"
            " SQLALCHEMY_BINDS, before init_app"
        )
    if "" in found:
        raise EngineOptionsError(
            "SQLALCHEMY_BINDS has an empty bind key: give that bind a name, or take the key None"
            " for the default database"
        )
    if None in found and DEFAULT in found:
        raise EngineOptionsError(
            f"SQLALCHEMY_BINDS has the bind key {DEFAULT!r}, by which sessionmgr calls the database"
            " of SQLALCHEMY_DATABASE_URI: take another name for that bind"
        )
    return found


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise EngineOptionsError(
            f"the setting {name} must be a dictionary, not {type(value).__name__}; leave it out, or"
            " set it to {}, where there is nothing to set"
        )
    if name == "SQLALCHEMY_ENGINE_OPTIONS" and not all(isinstance(key, str) for key in value):
        raise EngineOptionsError(f"the setting {name} must have strings as names of options")


def _fitted(
    app: Flask, bind_key: str | None, options: Mapping[str, Any], engine_options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Add the defaults for a kind of database to the options of a bind."""
    if "url" not in options:
        return options  # the manager tells which bind has none
    try:
        url: sa.URL = parse_url(options["url"])
    except DatabaseURLError as error:
        raise DatabaseURLError(f"{_setting_of(app, bind_key)}: {error}") from None
    backend = url.get_backend_name()
    if backend == "sqlite":
        return {**options, "url": _in_instance_folder(app, url)}
    if backend not in ("mysql", "mariadb"):
        return {**options, "url": url}
    if "charset" not in url.query:
        url = url.update_query_dict({"charset": "utf8mb4"})
    recycle = engine_options.get("pool_recycle", _MYSQL_RECYCLE)
    return {"pool_recycle": recycle, **options, "url": url}


def _setting_of(app: Flask, bind_key: str | None) -> str:
    if bind_key is None and app.config["SQLALCHEMY_DATABASE_URI"] is not None:
        return "SQLALCHEMY_DATABASE_URI"
    return f"SQLALCHEMY_BINDS[{'None' if bind_key is None else show(bind_key)}]"


def _in_instance_folder(app: Flask, url: sa.URL) -> sa.URL:
    """Place a SQLite file with a relative path in the application's instance folder, made here."""
    if is_memory(url):
        return url
    name = url.database or ""
    scheme = "file:" if name.startswith("file:") else ""
    path = name.removeprefix(scheme)
    if path.startswith("/"):
        return url
    folder = Path(app.instance_path)
    folder.mkdir(parents=True, exist_ok=True)
    return url.set(database=f"{scheme}{folder / path}")

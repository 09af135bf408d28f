"""Engine options: merged from their layers, and fitted to the pool class that applies.

The layers, from general to particular: sessionmgr's defaults, the manager's
``engine_options``, the options of a bind, the keyword arguments of a call. A later layer adds
to the earlier ones and replaces what it names; nothing else of them is lost.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, Pool, QueuePool, StaticPool

from .errors import EngineOptionsError
from .sqlite import OPTIONS as SQLITE_OPTIONS
from .sqlite import SQLiteSettings, check_option, is_memory, settings
from .urls import hide_secrets, list_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from .urls import DatabaseKey

__all__ = (
    "DEFAULTS",
    "Layer",
    "ResolvedOptions",
    "async_dialect",
    "check_async_session_options",
    "check_count",
    "check_options",
    "check_session_options",
    "conflict",
    "request",
    "resolve",
    "sync_dialect",
)

#: pool_recycle stays under the eight hours of MySQL's wait_timeout and the one hour after
#: which many proxies and firewalls forget an idle connection. LIFO lets the surplus of a burst
#: grow idle and be recycled. ping_if_idle: a second is far longer than the gaps of a busy
#: worker, and shorter than any idle timeout in use.
DEFAULTS: Mapping[str, Any] = {
    "pool_recycle": 3600,
    "pool_use_lifo": True,
    "ping_if_idle": 1.0,
    **SQLITE_OPTIONS,
}

# What is not for create_engine.
_OWN = frozenset(("ping_if_idle", *SQLITE_OPTIONS))

# create_engine's names of the parameters that the pools' constructors call otherwise; see the
# ``pool_*`` entries in https://docs.sqlalchemy.org/en/21/core/engines.html
_POOL_PREFIXED = frozenset(
    ("recycle", "timeout", "use_lifo", "logging_name", "reset_on_return", "events", "pre_ping")
)

# The pool's own plumbing: create_engine supplies these itself.
_POOL_INTERNAL = frozenset(("self", "creator", "dialect", "args", "kw", "kwargs"))

_ASYNC_DRIVERS = {
    "postgresql": "postgresql+psycopg:// or postgresql+asyncpg://",
    "mysql": "mysql+asyncmy:// or mysql+aiomysql://",
    "mariadb": "mariadb+asyncmy:// or mariadb+aiomysql://",
    "sqlite": "sqlite+aiosqlite://",
}

_WHOLE_NUMBERS = frozenset(("pool_size", "max_overflow"))
_SECONDS = frozenset(("pool_timeout", "pool_recycle", "ping_if_idle"))


@dataclass(frozen=True)
class Layer:
    """The options of one origin.

    :param origin: where they were given, for error texts.
    :param options: option name -> value, named as for ``create_engine``.
    """

    origin: str
    options: Mapping[str, Any] = field(repr=False)  # passwords may be in them


@dataclass(frozen=True)
class ResolvedOptions:
    """What an engine is made with.

    :param requested: every option that was merged, whether or not the pool class takes it.
    :param arguments: the keyword arguments for ``create_engine``.
    :param ping_if_idle: seconds idle after which a connection is tested at checkout, or
        ``None`` for no test.
    :param sqlite: what connections are set to, on SQLite.
    """

    requested: Mapping[str, Any] = field(repr=False)
    arguments: Mapping[str, Any] = field(repr=False)
    ping_if_idle: float | None
    sqlite: SQLiteSettings | None


def check_options(layer: Layer) -> Layer:
    """Check what can be checked of a layer without a database, and copy it.

    ``pool_pre_ping`` and ``ping_if_idle`` speak of one thing: ``pool_pre_ping=True`` asks for
    the liveness test, with its window; ``pool_pre_ping=False`` is ``ping_if_idle=None``.

    :raises EngineOptionsError: when a value cannot be, or the two contradict each other.
    """
    _check_mapping(layer.origin, "options", layer.options)
    reserved = layer.options.keys() & {"url", "_initialize", "_is_async"}
    if reserved:
        raise EngineOptionsError(f"{layer.origin}: {list_names(reserved)} cannot be set there")
    options = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in layer.options.items()
    }
    if options.get("connect_args") is not None:
        _check_mapping(layer.origin, "connect_args", options["connect_args"])
    for name in options.keys() & (_WHOLE_NUMBERS | _SECONDS):
        _check_number(layer.origin, name, options[name])
    for name in options.keys() & SQLITE_OPTIONS.keys():
        try:
            options[name] = check_option(name, options[name])
        except ValueError as error:
            raise EngineOptionsError(
                f"{layer.origin}: {name} must be {error}, not {hide_secrets(options[name])}"
            ) from None
    _check_pool(layer.origin, options)
    if "pool_pre_ping" in options and "ping_if_idle" in options:
        _check_liveness(layer.origin, options)
        del options["pool_pre_ping"]
    return Layer(layer.origin, options)


def _check_mapping(origin: str, name: str, value: object) -> None:
    if not isinstance(value, Mapping):  # which is not shown: it may be anything
        raise EngineOptionsError(
            f"{origin}: {name} must be a mapping of name -> value, not {type(value).__name__}"
        )


def _check_pool(origin: str, options: Mapping[str, Any]) -> None:
    if "pool" in options:
        raise EngineOptionsError(
            f"{origin}: a pool object belongs to the process that made it, and engines are made in"
            " each: name its class and its source, poolclass= and creator="
        )
    pool_class = options.get("poolclass")
    if pool_class is not None and not (
        isinstance(pool_class, type) and issubclass(pool_class, Pool)
    ):
        raise EngineOptionsError(
            f"{origin}: poolclass={hide_secrets(pool_class)} is no class of pools"
        )


def _check_liveness(origin: str, options: Mapping[str, Any]) -> None:
    if bool(options["pool_pre_ping"]) is (options["ping_if_idle"] is None):
        both = {name: options[name] for name in ("pool_pre_ping", "ping_if_idle")}
        raise EngineOptionsError(
            f"{origin}: {hide_secrets(both)} contradict each other; name one of them"
        )


def _check_number(origin: str, name: str, value: object) -> None:
    if name == "ping_if_idle" and value is None:
        return
    lowest = -1 if name in ("pool_recycle", "max_overflow") else 0
    number = isinstance(value, int if name in _WHOLE_NUMBERS else (int, float))
    if not number or isinstance(value, bool) or not value >= lowest:  # type: ignore[operator]  # a number
        unit = "a whole number" if name in _WHOLE_NUMBERS else "a number of seconds"
        raise EngineOptionsError(
            f"{origin}: {name} must be {unit} of at least {lowest}, not {hide_secrets(value)}"
        )


def check_session_options(options: Mapping[str, Any]) -> None:
    """Check the names of options for ``sessionmaker``.

    :raises EngineOptionsError: when the session's class does not know one.
    """
    _check_session_mapping(options)
    session_class = _check_class("class_", options.get("class_", Session), Session)
    _check_session_names(session_class, options.keys() - {"class_"})


def check_async_session_options(options: Mapping[str, Any]) -> None:
    """Check the names of options for ``async_sessionmaker``.

    :raises EngineOptionsError: when neither the session's class nor that of the synchronous
        session inside it knows one.
    """
    from sqlalchemy.ext.asyncio import AsyncSession

    _check_session_mapping(options)
    session_class = _check_class("class_", options.get("class_", AsyncSession), AsyncSession)
    half = options.get("sync_session_class") or session_class.sync_session_class
    _check_class("sync_session_class", half, Session)
    own = {"class_", *inspect.signature(session_class.__init__).parameters}
    if session_class.__init__ is AsyncSession.__init__:  # or another may take what it likes
        _check_session_names(half, options.keys() - own)


def check_routed_options(
    options: Mapping[str, Any], check: Callable[[Mapping[str, Any]], None], named: AbstractSet[str]
) -> None:
    """Check the options of a session that picks its engines.

    :param options: the manager's ``session_options``, and those of the call over them.
    :param check: checks ``session_options``.
    :param named: the names of the call's options.
    :raises EngineOptionsError: when one is unknown, or for a manager only.
    """
    if "binds" in options:
        raise EngineOptionsError(
            "session(): the option binds is SQLAlchemy's own way to pick engines; give the"
            " metadata of the tables an info['bind_key'], or open Session(binds=...) yourself"
        )
    for name in named & {"class_", "sync_session_class"}:
        raise EngineOptionsError(f"session(): {name} is one of the manager's session_options")
    if isinstance(options.get("bind"), (str, URL)):
        raise EngineOptionsError(
            "session(): bind takes an engine or a connection; session_factory() opens a session on"
            " one database by its URL or bind key"
        )
    check({name: value for name, value in options.items() if name != "bind"})


def _check_session_mapping(options: Mapping[str, Any]) -> None:
    _check_mapping("the manager's session_options", "options", options)
    if "bind" in options:
        raise EngineOptionsError("session_options: bind is each session's own database")


def _check_class(name: str, value: Any, base: type[Any]) -> Any:
    if not isinstance(value, type) or not issubclass(value, base):
        raise EngineOptionsError(
            f"session_options: {name} must be a subclass of {base.__name__}, not"
            f" {hide_secrets(value)}"
        )
    return value


def _check_session_names(session_class: type[Any], names: AbstractSet[str]) -> None:
    known = inspect.signature(session_class.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    unknown = names - known.keys()
    if unknown:
        raise EngineOptionsError(
            f"session_options: {session_class.__name__} does not take {list_names(unknown)}"
        )


def check_scope(scope: object) -> None:
    """Check a scope function.

    :raises EngineOptionsError: when it cannot be called.
    """
    if scope is not None and not callable(scope):
        raise EngineOptionsError(f"scope must be callable, not {hide_secrets(scope)}")


def check_count(name: str, value: object) -> None:
    """Check a count.

    :raises EngineOptionsError: when it is not a whole number of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise EngineOptionsError(
            f"{name} must be a whole number of at least 1, not {hide_secrets(value)}"
        )


def sync_dialect(key: DatabaseKey) -> Any:
    """Give the class of a database's dialect, which is typed without ``get_pool_class``.

    :raises EngineOptionsError: when its driver is asynchronous.
    """
    dialect = key.url.get_dialect()
    if dialect.is_async:
        raise EngineOptionsError(
            f"database {key.describe()}: {dialect.driver} is an asynchronous driver; name a"
            " synchronous one"
        )
    return dialect


def async_dialect(key: DatabaseKey) -> Any:
    """Give the class of a database's asynchronous dialect.

    :raises EngineOptionsError: when its driver is not asynchronous.
    """
    dialect = key.url.get_dialect(_is_async=True)
    if not dialect.is_async:
        known = _ASYNC_DRIVERS.get(key.url.get_backend_name())
        raise EngineOptionsError(
            f"database {key.describe()}: {dialect.driver} is no asynchronous driver; name one"
            + (f" in the URL, {known}" if known else "")
        )
    return dialect


def request(layers: Sequence[Layer]) -> dict[str, Any]:
    """Merge layers of options over the defaults.

    :param layers: checked layers, from general to particular.
    """
    requested = dict(DEFAULTS)
    for layer in layers:
        requested.update(merge(requested, layer))
    return requested


def resolve(
    key: DatabaseKey,
    dialect: Any,
    requested: Mapping[str, Any],
    layers: Sequence[Layer],
    *,
    pooled: bool,
) -> ResolvedOptions:
    """Fit the options that were asked for to the pool class of one database.

    An explicit ``poolclass`` is always kept. Otherwise it is ``StaticPool`` for a
    SQLite database in memory, ``NullPool`` where nothing is pooled, else the dialect's own.
    Options that a pool class *chosen here* does not take are set aside.

    :param key: the database.
    :param dialect: the class of its dialect.
    :param requested: the merged layers.
    :param layers: the layers that they come from.
    :param pooled: whether connections are to be kept.
    :raises EngineOptionsError: when a layer names a pool class together with, or before, an
        option that the class does not take; or when SQLite's busy timeout is named twice.
    """
    arguments = {name: value for name, value in requested.items() if name not in _OWN}
    ping_if_idle: float | None = requested["ping_if_idle"]

    # Classes of pools; typed so, mypy would take them for unhashable.
    kept: Any = StaticPool if is_memory(key.url) else dialect.get_pool_class(key.url)
    explicit = _explicit_pool(layers)
    chosen: Any
    if explicit is not None:
        chosen = layers[explicit].options["poolclass"]
    else:
        chosen = kept if pooled or is_memory(key.url) else NullPool
    arguments["poolclass"] = chosen
    sizing = _pool_options(QueuePool) | _pool_options(kept)
    unfit = (arguments.keys() & sizing) - _pool_options(chosen)
    if explicit is not None:
        _refuse_contradiction(key, layers, explicit, unfit)
    for name in unfit:
        del arguments[name]
    if chosen is NullPool and explicit is None:
        # The connection is closed instead: to reset it first would cost a round trip.
        arguments.setdefault("pool_reset_on_return", None)

    if is_memory(key.url):
        # The one connection is the database: it must not be recycled, and every thread uses it.
        arguments.pop("pool_recycle", None)
        ping_if_idle = None
        if issubclass(chosen, (StaticPool, QueuePool)):
            # One thread at a time, or SQLite's own lock; for files SQLAlchemy has it so.
            connect_args = arguments.get("connect_args", {})
            arguments["connect_args"] = {"check_same_thread": False, **connect_args}
    sqlite = None
    if key.url.get_backend_name() == "sqlite":
        requested = _with_drivers_timeout(key, requested, layers)
        shared = issubclass(chosen, StaticPool)
        sqlite = settings(key.url, requested, _named(layers), shared=shared)
    return ResolvedOptions(requested, arguments, ping_if_idle, sqlite)


def _named(layers: Sequence[Layer]) -> set[str]:
    return {name for layer in layers for name in layer.options}


def _with_drivers_timeout(
    key: DatabaseKey, requested: Mapping[str, Any], layers: Sequence[Layer]
) -> Mapping[str, Any]:
    """Take SQLite's busy timeout from where the driver is given it, where that is."""
    connect_args = requested.get("connect_args") or {}
    given = connect_args.get("timeout", key.url.query.get("timeout"))
    if given is None:
        return requested
    named = requested["sqlite_busy_timeout"]
    if "sqlite_busy_timeout" in _named(layers) and named is not None:
        raise EngineOptionsError(
            f"database {key.describe()}: sqlite_busy_timeout={named}, and"
            f" timeout={hide_secrets(given)} in connect_args or the URL, are the same thing for"
            " SQLite's driver. Drop one of the two"
        )
    return {**requested, "sqlite_busy_timeout": float(given)}


def merge(base: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
    """Give what a layer asks for on top of ``base``, ``pool_pre_ping`` in terms of the test."""
    options = dict(layer.options)
    pre_ping = options.pop("pool_pre_ping", None)
    if pre_ping is not None:
        window = base.get("ping_if_idle")
        default = DEFAULTS["ping_if_idle"] if window is None else window
        options["ping_if_idle"] = default if pre_ping else None
    return options


def conflict(
    key: DatabaseKey, requested: Mapping[str, Any], call: Layer
) -> EngineOptionsError | None:
    """Compare the options of a call with those of the engine that is there.

    :param key: the database.
    :param requested: what the engine was asked for with.
    :param call: the checked options of the call.

    :return: the error to raise, naming both sides; ``None`` when they agree.
    """
    asked = merge(requested, call)
    differing = {
        name for name, value in asked.items() if name not in requested or requested[name] != value
    }
    if not differing:
        return None
    there = {name: requested[name] for name in differing if name in requested}
    return EngineOptionsError(
        f"database {key.describe()}: its engine was made with {_show(there)}, but this call"
        f" asks for {_show({name: asked[name] for name in differing})}. A database has one engine"
        " per process: name the same options in every call, or none, or invalidate() the"
        " database first"
    )


def _show(options: Mapping[str, Any]) -> str:
    shown = hide_secrets(dict(sorted(options.items())))
    return shown if options else "none of these options"


@functools.cache
def _pool_options(pool_class: Any) -> frozenset[str]:
    """Read from a pool class which options of ``create_engine`` it takes."""
    names = {
        name
        for cls in pool_class.__mro__
        if "__init__" in vars(cls)
        for name in inspect.signature(vars(cls)["__init__"]).parameters
        if not name.startswith("_")
    }
    return frozenset(
        f"pool_{name}" if name in _POOL_PREFIXED else "echo_pool" if name == "echo" else name
        for name in names - _POOL_INTERNAL
    )


def _explicit_pool(layers: Sequence[Layer]) -> int | None:
    return max(
        (
            position
            for position, layer in enumerate(layers)
            if layer.options.get("poolclass") is not None
        ),
        default=None,
    )


def _refuse_contradiction(
    key: DatabaseKey, layers: Sequence[Layer], explicit: int, unfit: set[str]
) -> None:
    """Raise where an option was named beside, or after, a pool class that does not take it."""
    pool_layer = layers[explicit]
    pool_class: type[Pool] = pool_layer.options["poolclass"]
    for layer in layers[explicit:]:
        named = unfit & layer.options.keys()
        if named:
            given = {name: layer.options[name] for name in named}
            raise EngineOptionsError(
                f"database {key.describe()}: {layer.origin} asks for {_show(given)}, which"
                f" {pool_class.__name__}, the poolclass of {pool_layer.origin}, does not take."
                " Drop one of the two"
            )

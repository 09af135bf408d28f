"""Engine options: merged from their layers, and fitted to the pool class that applies.

The layers, from general to particular: sessionmgr's defaults, the manager's
``engine_options``, the options of a bind, the keyword arguments of a call. A later layer adds
to the earlier ones and replaces what it names; nothing else of them is lost.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, Pool, QueuePool, StaticPool

from .errors import EngineOptionsError
from .sqlite import is_memory
from .urls import hide_secrets, list_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .urls import DatabaseKey

__all__ = (
    "DEFAULTS",
    "Layer",
    "ResolvedOptions",
    "check_count",
    "check_options",
    "check_session_options",
    "conflict",
    "request",
    "resolve",
)

#: pool_recycle stays under the eight hours of MySQL's wait_timeout and the one hour after
#: which many proxies and firewalls forget an idle connection. LIFO lets the surplus of a burst
#: grow idle and be recycled. ping_if_idle: a second is far longer than the gaps of a busy
#: worker, and shorter than any idle timeout in use.
DEFAULTS: Mapping[str, Any] = {
    "pool_recycle": 3600,
    "pool_use_lifo": True,
    "ping_if_idle": 1.0,
}

# create_engine's names of the parameters that the pools' constructors call otherwise; see the
# ``pool_*`` entries in https://docs.sqlalchemy.org/en/21/core/engines.html
_POOL_PREFIXED = frozenset(
    ("recycle", "timeout", "use_lifo", "logging_name", "reset_on_return", "events", "pre_ping")
)

# The pool's own plumbing: create_engine supplies these itself.
_POOL_INTERNAL = frozenset(("self", "creator", "dialect", "args", "kw", "kwargs"))

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
    """

    requested: Mapping[str, Any] = field(repr=False)
    arguments: Mapping[str, Any] = field(repr=False)
    ping_if_idle: float | None


def check_options(layer: Layer) -> Layer:
    """Check what can be checked of a layer without a database, and copy it.

    ``pool_pre_ping`` and ``ping_if_idle`` speak of one thing: ``pool_pre_ping=True`` asks for
    the liveness test, with its window; ``pool_pre_ping=False`` is ``ping_if_idle=None``.

    :raises EngineOptionsError: when a number is none or out of its range, or the two
        contradict each other.
    """
    if not isinstance(layer.options, Mapping):
        raise EngineOptionsError(
            f"{layer.origin}: options are a mapping of name -> value, not"
            f" {hide_secrets(layer.options)}"
        )
    reserved = layer.options.keys() & {"url", "_initialize", "_is_async"}
    if reserved:
        raise EngineOptionsError(f"{layer.origin}: {list_names(reserved)} cannot be set there")
    options = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in layer.options.items()
    }
    for name in options.keys() & (_WHOLE_NUMBERS | _SECONDS):
        _check_number(layer.origin, name, options[name])
    if "pool" in options:
        raise EngineOptionsError(
            f"{layer.origin}: a pool object belongs to the process that made it, and engines are"
            " made in each: name its class and its source, poolclass= and creator="
        )
    pool_class = options.get("poolclass")
    if pool_class is not None and not (
        isinstance(pool_class, type) and issubclass(pool_class, Pool)
    ):
        raise EngineOptionsError(
            f"{layer.origin}: poolclass={hide_secrets(pool_class)} is no class of pools"
        )
    if "pool_pre_ping" in options and "ping_if_idle" in options:
        if bool(options["pool_pre_ping"]) is (options["ping_if_idle"] is None):
            both = {name: options[name] for name in ("pool_pre_ping", "ping_if_idle")}
            raise EngineOptionsError(
                f"{layer.origin}: {hide_secrets(both)} contradict each other; name one of them"
            )
        del options["pool_pre_ping"]
    return Layer(layer.origin, options)


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
    if not isinstance(options, Mapping):
        raise EngineOptionsError(
            f"session_options: options are a mapping of name -> value, not {hide_secrets(options)}"
        )
    if "bind" in options:
        raise EngineOptionsError("session_options: bind is each session's own database")
    session_class = options.get("class_", Session)
    known = inspect.signature(session_class.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    unknown = options.keys() - known.keys() - {"class_"}
    if unknown:
        raise EngineOptionsError(
            f"session_options: {session_class.__name__} does not take {list_names(unknown)}"
        )


def check_count(name: str, value: object) -> None:
    """Check a count.

    :raises EngineOptionsError: when it is not a whole number of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise EngineOptionsError(
            f"{name} must be a whole number of at least 1, not {hide_secrets(value)}"
        )


def request(layers: Sequence[Layer]) -> dict[str, Any]:
    """Merge layers of options over the defaults.

    :param layers: checked layers, from general to particular.
    """
    requested = dict(DEFAULTS)
    for layer in layers:
        requested.update(merge(requested, layer))
    return requested


def resolve(
    key: DatabaseKey, requested: Mapping[str, Any], layers: Sequence[Layer], *, pooled: bool
) -> ResolvedOptions:
    """Fit the options that were asked for to the pool class of one database.

    An explicit ``poolclass`` is always kept. Otherwise it is ``StaticPool`` for a
    SQLite database in memory, ``NullPool`` where nothing is pooled, else the dialect's own.
    Options that a pool class *chosen here* does not take are set aside.

    :param key: the database.
    :param requested: the merged layers.
    :param layers: the layers that they come from.
    :param pooled: whether connections are to be kept.
    :raises EngineOptionsError: when a layer names a pool class together with, or before, an
        option that the class does not take.
    """
    arguments = {name: value for name, value in requested.items() if name != "ping_if_idle"}
    ping_if_idle: float | None = requested["ping_if_idle"]

    dialect: Any = key.url.get_dialect()  # typed without get_pool_class, which all have
    if dialect.is_async:
        raise EngineOptionsError(
            f"database {key.describe()}: {dialect.driver} is an asynchronous driver; name a"
            " synchronous one"
        )
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
        if chosen is StaticPool:
            connect_args = arguments.get("connect_args", {})
            arguments["connect_args"] = {"check_same_thread": False, **connect_args}
    return ResolvedOptions(requested, arguments, ping_if_idle)


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

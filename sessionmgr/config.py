"""Checks what a manager is configured with, when it is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import URL, Engine, MetaData

from .errors import DatabaseURLError, EngineOptionsError
from .options import Layer, check_options
from .urls import hide_secrets, list_names, parse_url

__all__ = ("Bind", "EngineCallback", "check_callbacks", "check_metadata", "read_binds", "show_key")

EngineCallback = Callable[[Engine], Any]

#: A database's URL, and the engine options of its own.
Bind = tuple[URL, Layer]


def check_callbacks(callback: Any) -> tuple[EngineCallback, ...]:
    """Give engine callbacks as a tuple.

    :param callback: a callable, several of them, or ``None``.
    :raises EngineOptionsError: when one cannot be called.
    """
    if callback is None:
        return ()
    if callable(callback) or not isinstance(callback, Iterable):
        callback = (callback,)
    callbacks = tuple(callback)
    for one in callbacks:
        if not callable(one):
            raise EngineOptionsError(
                f"engine_callback must be a callable or several of them, not {hide_secrets(one)}"
            )
    return callbacks


def check_metadata(metadata: object) -> None:
    """Check that tables are given as a MetaData.

    :raises EngineOptionsError: when they are not; a declarative base is a likely slip.
    """
    if metadata is not None and not isinstance(metadata, MetaData):
        raise EngineOptionsError(
            "metadata must be a MetaData (of a declarative base: Base.metadata), not"
            f" {hide_secrets(metadata)}"
        )


def read_binds(binds: object) -> dict[str, Bind]:
    """Read ``binds``: bind key -> URL, or -> ``{"url": URL, option: value, ...}``.

    :raises DatabaseURLError: when a key or a URL cannot be one, or a bind has no URL.
    :raises EngineOptionsError: when an option's value cannot be.
    """
    if binds is None:
        return {}
    if not isinstance(binds, Mapping):
        raise DatabaseURLError(f"binds is a mapping of bind key -> URL, not {hide_secrets(binds)}")
    return {key: _read_bind(key, bind) for key, bind in binds.items()}


def _read_bind(key: object, bind: Any) -> Bind:
    if not isinstance(key, str) or "://" in key:
        raise DatabaseURLError(f"binds: a bind key is a string without '://', not {show_key(key)}")
    origin = f"binds[{key!r}]"
    if not isinstance(bind, Mapping):
        return parse_url(bind), Layer(origin, {})
    options = dict(bind)
    if "url" not in options:
        raise DatabaseURLError(f"{origin} has no 'url'; it has {list_names(options)}")
    return parse_url(options.pop("url")), check_options(Layer(origin, options))


def show_key(key: object) -> str:
    """Show what should be a bind key, and may be a mistyped URL with a password in it."""
    plain = isinstance(key, str) and re.fullmatch(r"[\w. -]*", key)
    return repr(key) if plain else f"(a {type(key).__name__}, not shown)"

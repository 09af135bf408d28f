"""The bind keys of a manager: those it was given, those added since, and a resolver's answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import URL

from . import forking
from .errors import DatabaseURLError, EngineOptionsError, NoSuchBindError
from .options import Layer, check_options
from .sqlite import is_memory
from .transient import note
from .urls import DatabaseKey, hide_secrets, list_names, parse_url

__all__ = ("DEFAULT", "BindValue", "Binds", "Resolver")

#: What a bind key stands for: a URL, or ``{"url": URL, option: value, ...}``.
BindValue = str | URL | Mapping[str, Any]

#: Gives what an unknown bind key stands for, or ``None``.
Resolver = Callable[[str], BindValue | None]

#: The bind key of tables whose metadata names none.
DEFAULT = "default"


class Binds:
    """The databases that a manager knows by a bind key."""

    # _lock guards changes of _keys, which is replaced as a whole and read without it.

    def __init__(self, binds: object, resolver: object) -> None:
        """Read what a manager is configured with.

        :param binds: bind key -> :data:`BindValue`, or ``None``.
        :param resolver: a :data:`Resolver`, or ``None``.
        :raises DatabaseURLError: when a key or a URL cannot be one, or a bind has no URL.
        :raises EngineOptionsError: when an option's value cannot be, or the resolver be called.
        """
        if binds is None:
            binds = {}
        if not isinstance(binds, Mapping):
            raise DatabaseURLError(
                f"binds is a mapping of bind key -> URL, not {hide_secrets(binds)}"
            )
        if resolver is not None and not callable(resolver):
            raise EngineOptionsError(
                f"resolver must be callable with a bind key, not {hide_secrets(resolver)}"
            )
        self.resolver: Resolver | None = resolver
        self._keys = {key: _read(key, bind) for key, bind in binds.items()}
        self._lock = forking.ProcessLock()

    def __bool__(self) -> bool:
        return bool(self._keys) or self.resolver is not None

    def databases(self) -> list[DatabaseKey]:
        """List the databases that have a bind key, without those of the resolver."""
        return list(self._keys.values())

    def configuration(self) -> dict[str, dict[str, Any]]:
        """Give them as they are configured: bind key -> ``{"url": URL, option: value, ...}``."""
        return {
            str(key): {**(key.options.options if key.options else {}), "url": key.url}
            for key in self.databases()
        }

    def find(self, bind_key: str) -> DatabaseKey | None:
        """Find the database of a bind key, without the resolver."""
        return self._keys.get(bind_key)

    def resolve(self, bind_key: str) -> DatabaseKey:
        """Ask the resolver for the database of an unknown bind key.

        :raises NoSuchBindError: when there is no resolver, or it does not know either.
        :raises DatabaseURLError: when its answer is no URL.
        """
        if self.resolver is None:
            raise self._unknown(bind_key, "")
        try:
            answer = self.resolver(bind_key)
        except Exception as error:
            note(error, f"raised by the manager's resolver, asked for bind key {show(bind_key)}")
            raise
        if answer is None:
            raise self._unknown(bind_key, ", nor does the resolver know it")
        return _read(bind_key, answer, "the resolver's answer for ", _Answer)

    def _unknown(self, bind_key: str, asked: str) -> NoSuchBindError:
        return NoSuchBindError(
            f"there is no bind key {show(bind_key)}, and without '://' it is no URL{asked}. Bind"
            f" keys of this manager: {list_names(self._keys)}"
        )

    def add(
        self, bind_key: str, bind: BindValue, answered: Callable[[str], DatabaseKey | None]
    ) -> None:
        """Add a database, or nothing where it is there with the same URL and options.

        :param answered: gives what the resolver has answered, where an engine was made with it.
        :raises EngineOptionsError: when the key stands for another database or other options.
        """
        new = _read(bind_key, bind)
        with self._lock():
            known = self._keys.get(new)
            old = answered(new) if known is None else known
            if old is not None and _content(old) != _content(new):
                end = "invalidate() the resolver's" if known is None else "remove_bind() it"
                raise EngineOptionsError(
                    f"bind key {old.describe()} is there already, with another URL or other"
                    f" options; {end} first"
                )
            if known is None:
                self._keys = {**self._keys, new: new}

    def remove(self, bind_key: str) -> DatabaseKey:
        """Take a database away.

        :raises NoSuchBindError: when it is not there.
        """
        with self._lock():
            key = self._keys.get(bind_key)
            if key is None:
                raise self._unknown(bind_key, "")
            self._keys = {name: each for name, each in self._keys.items() if each is not key}
        return key

    def database_of(self, bind_key: str) -> object:
        """Give what tells the database of a bind key from another one."""
        try:
            key = self._keys.get(bind_key) or self.resolve(bind_key)
        except NoSuchBindError:
            return bind_key
        return bind_key if is_memory(key.url) else key.url

    def is_current(self, key: DatabaseKey) -> bool:
        """Tell whether a bind key still stands for this database, or for what a resolver said."""
        current = self._keys.get(key)
        return current is key if current is not None else isinstance(key, _Answer)


class _Answer(DatabaseKey):
    """The identity of a database that the resolver knows."""

    __slots__ = ()


def _read(
    key: object, bind: Any, whose: str = "", kind: type[DatabaseKey] = DatabaseKey
) -> DatabaseKey:
    if not isinstance(key, str) or "://" in key:
        raise DatabaseURLError(f"binds: a bind key is a string without '://', not {show(key)}")
    origin = f"{whose}binds[{key!r}]"
    if not isinstance(bind, Mapping):
        return kind(_read_url(bind, origin), key, Layer(origin, {}))
    options = dict(bind)
    if "url" not in options:
        raise DatabaseURLError(f"{origin} has no 'url'; it has {list_names(options)}")
    url = _read_url(options.pop("url"), origin)
    return kind(url, key, check_options(Layer(origin, options)))


def _read_url(url: Any, origin: str) -> URL:
    try:
        return parse_url(url)
    except DatabaseURLError as error:
        raise DatabaseURLError(f"{origin}: {error}") from None


def _content(key: DatabaseKey) -> tuple[URL, Mapping[str, Any]]:
    return key.url, key.options.options if key.options else {}


def show(key: object) -> str:
    """Show what should be a bind key, and may be a mistyped URL with a password in it."""
    plain = isinstance(key, str) and re.fullmatch(r"[\w. -]*", key)
    return repr(key) if plain else f"(a {type(key).__name__}, not shown)"

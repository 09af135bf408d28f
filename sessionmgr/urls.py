"""Database URLs: one spelling for each database, and a form without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from .errors import DatabaseURLError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

    from .options import Layer

__all__ = ("DatabaseKey", "MaskedURL", "hidden", "hide_secrets", "is_secret", "masked", "parse_url")

_MASK = "***"

# Whole words and parts of words by which drivers and services call their secrets. A schema-less
# connection string may hold anything, so those are masked whole.
_SECRET_NAME = re.compile(
    r"passw(or)?ds?\d*$|passphrase|passcode|pwd\d*$|secret|token|credential|auth|jwt|^sig$|signature|^key$"
    r"|(api|access|account|private|shared)[-_]?\w*key|^(odbc_connect|dsn|conninfo|pass)$",
    re.IGNORECASE,
)

# Text that looks like a URL or a connection string.
_SECRET_TEXT = re.compile(r"://|\b(password|pwd|secret|token)\w*\s*=", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Tell whether an option or a query parameter of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def hide_secrets(value: object) -> str:
    """Show an option's value with every secret inside it masked.

    :param value: a URL, or any value; collections are searched in depth for names that hold
        secrets, and of other objects only the type is shown.
    """
    if isinstance(value, URL):
        return masked(value)
    if isinstance(value, Mapping):
        shown = (
            f"{name!r}: {_MASK if is_secret(str(name)) else hide_secrets(item)}"
            for name, item in value.items()
        )
        return "{" + ", ".join(shown) + "}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{type(value).__name__}({', '.join(map(hide_secrets, value))})"
    if isinstance(value, str):
        return _MASK if _SECRET_TEXT.search(value) else repr(value)
    if value is None or isinstance(value, (int, float, type, FunctionType)):
        return repr(value)
    return f"<{type(value).__name__}>"


def masked(url: URL) -> str:
    """Render a URL without the secrets in its userinfo and in its query string."""
    placeholder = "SECRET-MASK"
    hidden = {name: placeholder for name in url.query if is_secret(name)}
    shown = URL.render_as_string(url.update_query_dict(hidden), hide_password=True)
    return shown.replace(placeholder, _MASK)


class MaskedURL(URL):
    """A URL that hides the secrets of its query string wherever URL hides the password.

    Engines are made with it, so that SQLAlchemy's own ``repr`` and logs show none.
    """

    __slots__ = ()

    def render_as_string(self, hide_password: bool = True) -> str:
        """Render the URL, with or without its secrets."""
        return masked(self) if hide_password else super().render_as_string(hide_password=False)

    def __hash__(self) -> int:
        return hash(URL._make(self))  # URL hashes its text; equal URLs must hash alike


def parse_url(dburi: str | URL) -> MaskedURL:
    """Read a database URL in any of its spellings.

    ``postgres://`` and a leading ``db+`` (Celery's prefix) are understood.

    :param dburi: a URL string or a :class:`sqlalchemy.URL`.
    :raises DatabaseURLError: when it is neither, or cannot be read as one.
    """
    if isinstance(dburi, str):
        url = _read(dburi.strip().removeprefix("db+"))
    elif isinstance(dburi, URL):
        url = dburi.set(drivername=dburi.drivername.removeprefix("db+"))
    else:
        raise DatabaseURLError(
            f"a database is named by a URL string, a sqlalchemy.URL or a bind key, not by"
            f" {type(dburi).__name__}"
        )
    if url.host is not None and "@" in url.host:
        # make_url ends the password at the first @; the rest of it would be shown as the host
        raise DatabaseURLError(
            f"the host of a {url.drivername} URL has an '@' in it: write the '@' of a password as"
            " %40"
        )
    dialect, plus, driver = url.drivername.partition("+")
    if dialect == "postgres":
        url = url.set(drivername=f"postgresql{plus}{driver}")
    return MaskedURL._make(url)


def _read(text: str) -> URL:
    reason = "no URL"
    try:
        text.encode()  # surrogates, of an argument that was not UTF-8, no driver takes
        return make_url(text)
    except UnicodeEncodeError:
        reason = "a character of it is none of Unicode's"
    except ValueError:
        reason = "its port is not a number"
    except ArgumentError:
        pass
    # Raised out here: the text may hold a password anywhere, and so may the errors above.
    raise DatabaseURLError(
        f"cannot read the database URL of {len(text)} characters that begins with"
        f" {_beginning(text)!r}: {reason}. Write it as dialect+driver://user:password@host/database,"
        " special characters in the password percent-encoded"
    )


def _beginning(text: str) -> str:
    scheme = re.match(r"[\w+.-]{1,40}://", text)
    return scheme.group() if scheme else "..."


class DatabaseKey(str):
    """The identity of one database of a manager: a bind key, or the normalised URL.

    It compares and hashes as that string, so a plain string finds it in a dictionary, but
    ``str()``, ``repr()`` and formatting give the form without secrets.
    """

    __slots__ = ("bind_key", "options", "url")

    url: URL
    bind_key: str | None
    options: Layer | None

    def __new__(cls, url: URL, bind_key: str | None = None, options: Layer | None = None) -> Self:
        """Make the key of a database.

        :param url: where the database is.
        :param bind_key: its bind key; without one the URL itself is the identity.
        :param options: the engine options of its bind.
        """
        identity = bind_key if bind_key is not None else url.render_as_string(hide_password=False)
        self = super().__new__(cls, identity)
        self.url = url
        self.bind_key = bind_key
        self.options = options
        return self

    @property
    def name(self) -> str:
        """The bind key, or the URL without secrets."""
        return masked(self.url) if self.bind_key is None else self.bind_key

    def describe(self) -> str:
        """Name the database for an error text: the bind key with its masked URL."""
        shown = masked(self.url)
        return shown if self.bind_key is None else f"{self.bind_key!r} ({shown})"

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return repr(self.name)

    def __format__(self, spec: str) -> str:
        return format(self.name, spec)

    def __reduce__(self) -> tuple[type[DatabaseKey], tuple[Any, ...]]:
        return DatabaseKey, (self.url, self.bind_key, self.options)


class _HiddenURL(str):
    """A URL as its caller spelled it, which finds and is found, but does not show itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(_MASK)


def hidden(dburi: str | URL) -> str | URL:
    """Give what equals ``dburi``, as a key of a dictionary, and shows no secret."""
    return _HiddenURL(dburi) if isinstance(dburi, str) else MaskedURL._make(dburi)


def list_names(names: Iterable[str]) -> str:
    """Join names for an error text, in alphabetical order."""
    return ", ".join(repr(name) for name in sorted(names)) or "none"

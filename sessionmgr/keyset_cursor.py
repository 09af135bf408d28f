"""The cursor of a keyset page: the last row's keys, as text that may stand in a URL."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from datetime import date, datetime, time, timezone
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import types

from .errors import PageNotFoundError, PaginationError
from .page_statements import LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .keyset_order import Key

__all__ = ("damaged", "read_cursor", "write_cursor")

LONGEST = 8192
"""Characters of a cursor that is read: longer ones are in no URL."""

DIGEST = 12
"""Bytes of the digest; it finds damage, and is no signature."""

_TAGGED: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    # a datetime is a date as well, so it comes first
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "decimal": (Decimal, str, Decimal),
    "uuid": (UUID, str, UUID),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}
"""Tag -> type, and what makes text of a value and a value of text."""

_NUMBERS = (bool, int, float, Decimal)
"""Types of which a driver may give one for another."""

_SCALARS = (str, *_NUMBERS, *(kind for kind, *_ in _TAGGED.values()))
"""All types of which there are values in a cursor."""


def write_cursor(keys: Sequence[Key], values: Sequence[Any]) -> str:
    """Put the keys of a row into text.

    :raises PaginationError: when one is NULL, or of a type that has no text.
    """
    pairs = zip(keys, values, strict=True)
    packed = [_pack(key, value) for key, value in pairs]
    text = json.dumps([_digest(keys, packed), *packed], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_cursor(keys: Sequence[Key], cursor: object) -> list[Any]:
    """Take the keys of a row out of text.

    :raises PageNotFoundError: when the text is damaged, or of a select in another order.
    """
    try:
        return _read(keys, cursor)
    except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError):
        pass  # a message may hold what a client has sent: that is left out
    raise damaged()


def damaged() -> PageNotFoundError:
    """Make the error for a cursor that is not one of ours."""
    return PageNotFoundError(
        "the cursor that was asked for is damaged, or of a select in another order: begin with"
        " after=None"
    )


def _read(keys: Sequence[Key], cursor: object) -> list[Any]:
    if not isinstance(cursor, str) or len(cursor) > LONGEST:
        raise TypeError
    padded = cursor + "=" * (-len(cursor) % 4)
    digest, *packed = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    if digest != _digest(keys, packed):
        raise ValueError
    return [_unpack(key, value) for key, value in zip(keys, packed, strict=True)]


def _digest(keys: Sequence[Key], packed: list[Any]) -> str:
    """Sum up an order and a place in it."""
    parts: list[Any] = [packed]
    for key in keys:
        compiled = key.expression.compile()
        parts += [str(compiled), key.descending, sorted(compiled.params.items())]
    text = json.dumps(parts, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[: 2 * DIGEST]


def _pack(key: Key, value: Any) -> Any:
    if isinstance(value, Enum):
        value = _names_of(key).get(value)
    if value is None:
        raise PaginationError(
            f"ORDER BY {key.expression} was NULL in a row, or had no value of its Enum: order by"
            f" coalesce({key.expression}, ...), whose last value is never NULL"
        )
    if isinstance(value, str | bool | int) or (isinstance(value, float) and not math.isnan(value)):
        return value
    for tag, (kind, to_text, _) in _TAGGED.items():
        if isinstance(value, kind):
            return [tag, to_text(value)]
    raise PaginationError(
        f"ORDER BY {key.expression} has the value {value!r}, which no cursor can carry: order by a"
        " number, a text, a time, a UUID, bytes or an Enum"
    )


def _unpack(key: Key, packed: Any) -> Any:
    value = packed
    if isinstance(packed, list):
        tag, text = packed
        if not isinstance(text, str):
            raise TypeError
        value = _TAGGED[tag][2](text)
    kind: types.TypeEngine[Any] = types.NullType() if key.stored else key.expression.type
    if isinstance(kind, types.Enum) and kind.enum_class is not None:
        return {name: member for member, name in _names_of(key).items()}[value]
    if isinstance(kind, types.Float):
        value = float(value)
    if not _fits(value, kind):
        raise ValueError
    if isinstance(value, float) and math.isinf(value) and key.dialect in ("mysql", "mariadb"):
        raise ValueError
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(timezone.utc)  # PostgreSQL knows no zone 16 hours away
    return value


def _fits(value: Any, kind: types.TypeEngine[Any]) -> bool:
    """Tell whether a value can be sent for a type; with others drivers or databases find fault."""
    if isinstance(value, str):
        value.encode()
        fine = "\0" not in value
        if isinstance(kind, types.Enum):
            fine = value in kind.enums
        elif isinstance(kind, types.Uuid):
            UUID(value)
    elif isinstance(value, bool):
        fine = isinstance(kind, types.Boolean | types.NullType | types.TypeDecorator)
    elif isinstance(value, int):
        fine = abs(value) <= (2 * LARGEST + 1 if getattr(kind, "unsigned", False) else LARGEST)
    elif isinstance(value, Decimal):
        fine = value.is_finite() and abs(value.adjusted()) <= 1000
    else:
        fine = value is not None and value == value  # NaN is not
    return fine and isinstance(value, _python_types(kind))


def _python_types(kind: types.TypeEngine[Any]) -> tuple[type, ...]:
    if isinstance(kind, types.NullType | types.TypeDecorator):
        return _SCALARS
    if isinstance(kind, types.Boolean):
        return (bool,)
    try:
        python_type = kind.python_type
    except NotImplementedError:  # of a type that only some databases have
        return _SCALARS
    return _NUMBERS if python_type in _NUMBERS else (python_type,)


def _names_of(key: Key) -> dict[Enum, str]:
    """Map members of the Enum to what stands in the column."""
    kind = key.expression.type
    if not isinstance(kind, types.Enum) or kind.enum_class is None:
        return {}
    return dict(zip(kind.enum_class, kind.enums, strict=True))

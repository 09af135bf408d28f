"""Checks what a store is given, and puts it into the form in which the tables have it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from sessionmgr.errors import EngineOptionsError, ResultArgumentError
from sessionmgr.urls import hide_secrets, list_names

from .records import EXTENDED, READY_STATES, utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = (
    "check_bytes",
    "check_execution_options",
    "check_id",
    "check_ids",
    "check_values",
    "in_utc",
)


def check_id(given: Any, name: str = "task_id") -> str:
    """Give an id, if it is one.

    MySQL would take the number 5 for every id that begins with a 5. PostgreSQL keeps no NUL,
    and half of a surrogate pair cannot be sent to any database.

    :raises ResultArgumentError: when it is no text, empty, or has such a character in it.
    """
    if isinstance(given, str) and given and "\0" not in given and _is_unicode(given):
        return given
    raise ResultArgumentError(
        f"{name} is a text that is not empty, without NUL characters and lone surrogates, not"
        f" {hide_secrets(given)}"
    )


def check_ids(given: Iterable[str]) -> list[str]:
    """List ids, if they are some.

    :raises ResultArgumentError: when one is none, or they are one text.
    """
    try:
        ids = None if isinstance(given, (str, bytes)) else list(given)
    except TypeError:
        ids = None
    if ids is None:
        raise ResultArgumentError(
            f"task_ids is a list of ids, or another iterable, not {hide_secrets(given)}; of one"
            " id make a list"
        )
    return [check_id(each) for each in ids]


def check_bytes(name: str, key: str, given: Any, kind: str = "task") -> bytes:
    """Give a value, if it is bytes: the caller is to encode it.

    :raises ResultArgumentError: when it is not.
    """
    if isinstance(given, bytes):
        return given
    raise ResultArgumentError(
        f"{name} of {kind} {key!r} is bytes, not {_kind(given)}: encode it first"
    )


def check_execution_options(database: str, options: Any) -> None:
    """Check the execution options of an engine, as far as a store is concerned.

    :param database: the database's name for error texts.
    :raises EngineOptionsError: when they have a map of schemas, which is for statements that
        SQLAlchemy compiles each time: results would be stored in one schema, and read in another.
    """
    if isinstance(options, Mapping) and options.get("schema_translate_map"):
        raise EngineOptionsError(
            f"database {database}: a store of results takes no schema_translate_map; name the"
            " schemas in table_schemas={'task': ..., 'group': ...}"
        )


def in_utc(when: datetime, name: str) -> datetime:
    """Give a time as the rows have it; without a time zone it is UTC.

    :param name: how error texts call it.
    :raises ResultArgumentError: when the years do not reach that far.
    """
    if when.tzinfo is None:
        return when
    try:
        return when.astimezone(timezone.utc).replace(tzinfo=None)
    except OverflowError:
        raise ResultArgumentError(
            f"{name}: {when.isoformat()} is out of the range of dates in UTC"
        ) from None


def check_values(fields: Mapping[str, Any], further: Mapping[str, Any], *, extended: bool) -> Any:
    """Give the values of a row.

    :param fields: those of the fields that every store has.
    :param further: those of further fields.
    :param extended: whether the store has these.
    :raises ResultArgumentError: when a value is of a wrong kind.
    """
    unknown = further.keys() - EXTENDED
    if unknown:
        raise ResultArgumentError(
            f"a TaskResult has no field {list_names(unknown)}; name {list_names(EXTENDED)}"
        )
    if further and not extended:
        raise ResultArgumentError(
            f"{list_names(further)}: this store is not extended; make it with extended=True"
        )
    values = {**fields, **further}
    task_id = check_id(values["task_id"])
    check_id(values["status"], "status")
    for name, value in values.items():
        if value is not None and name in _CHECKS:
            values[name] = _CHECKS[name](name, task_id, value)
    if values["date_done"] is None and values["status"] in READY_STATES:
        values["date_done"] = utc_now()
    return values


def _text(name: str, task_id: str, given: Any) -> str:
    """Give a text without what a database refuses: file names and messages may have it."""
    if not isinstance(given, str):
        raise ResultArgumentError(f"{name} of task {task_id!r} is a text, not {_kind(given)}")
    return given.replace("\0", "\\x00").encode(errors="backslashreplace").decode()


def _number(name: str, task_id: str, given: Any) -> int:
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    raise ResultArgumentError(f"{name} of task {task_id!r} is a whole number, not {_kind(given)}")


def _date(name: str, task_id: str, given: Any) -> datetime:
    if isinstance(given, datetime):
        return in_utc(given, f"{name} of task {task_id!r}")
    raise ResultArgumentError(f"{name} of task {task_id!r} is a datetime, not {_kind(given)}")


def _kind(given: Any) -> str:
    return type(given).__name__


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


#: Field -> what gives a value of it, which is not None, as the tables have it.
_CHECKS: dict[str, Callable[[str, str, Any], Any]] = {
    **dict.fromkeys(("result", "children", "args", "kwargs", "stamps"), check_bytes),
    **dict.fromkeys(("traceback", "name", "worker", "queue"), _text),
    "retries": _number,
    "date_done": _date,
}

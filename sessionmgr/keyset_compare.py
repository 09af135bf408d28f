"""The condition for rows that come after a place, in a form that each database has an index for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    Numeric,
    Time,
    and_,
    bindparam,
    func,
    literal,
    or_,
    tuple_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.sql.compiler import SQLCompiler

    from .keyset_order import Key

__all__ = ("rows_after",)


def rows_after(keys: Sequence[Key], values: Sequence[Any]) -> ColumnElement[bool]:
    """Make the condition for rows after a place.

    Its first part holds for the first key alone, so that an index on that key is of use in any
    database.

    :param keys: the order.
    :param values: the keys of the row at the place.
    """
    lefts = [_ranked(key.expression, key) for key in keys]
    rights = [_ranked(_bound(key, value), key) for key, value in zip(keys, values, strict=True)]
    falls = [key.descending for key in keys]
    after: ColumnElement[bool]
    if len(keys) == 1:
        return _beyond(lefts[0], rights[0], falls[0])
    if len(set(falls)) == 1:
        after = (_RowsLess if falls[0] else _RowsGreater)(*lefts, *rights)
    else:
        after = _expanded(lefts, rights, falls)
    first = lefts[0] <= rights[0] if falls[0] else lefts[0] >= rights[0]
    return and_(first, after)


def _bound(key: Key, value: Any) -> ColumnElement[Any]:
    """Send a value as what it is where that compares as well: PostgreSQL is told the type.

    An integer may be too large for the column's, or a time in a zone where the column has none;
    EXTRACT gives fractions, and SQLAlchemy calls them integers.
    """
    kind = key.expression.type
    plain = isinstance(kind, NullType | Integer | Numeric | Float | Date | DateTime | Time)
    return literal(value) if key.stored or plain else literal(value, kind)


def _beyond(
    left: ColumnElement[Any], right: ColumnElement[Any], falls: bool
) -> ColumnElement[bool]:
    return left < right if falls else left > right


def _expanded(
    lefts: Sequence[ColumnElement[Any]], rights: Sequence[ColumnElement[Any]], falls: Sequence[bool]
) -> ColumnElement[bool]:
    """Write ``a > 1 OR a = 1 AND (b > 2 OR b = 2 AND ...)``."""
    *equal, last = zip(lefts, rights, falls, strict=True)
    condition = _beyond(*last)
    for left, right, fall in reversed(equal):
        condition = or_(_beyond(left, right, fall), and_(left == right, condition))
    return condition


class _Rows(FunctionElement[bool]):
    """Compares two rows; the first half of the arguments is the left one.

    It says nothing of its type: MariaDB would be asked whether a Boolean is equal to 1, and would
    use no index for that.
    """

    falls = False

    def halves(self) -> tuple[list[Any], list[Any]]:
        both = list(self.clauses)
        return both[: len(both) // 2], both[len(both) // 2 :]


class _RowsGreater(_Rows):
    """``(a, b) > (1, 2)``."""

    inherit_cache = True


class _RowsLess(_Rows):
    """``(a, b) < (1, 2)``."""

    inherit_cache = True
    falls = True


@compiles(_RowsGreater)
@compiles(_RowsLess)
def _compile_expanded(rows: _Rows, compiler: SQLCompiler, **kw: Any) -> str:
    # MariaDB and MySQL compare rows, but look at all of an index for it.
    lefts, rights = rows.halves()
    condition = _expanded(lefts, rights, [rows.falls] * len(lefts))
    return f"({compiler.process(condition, **kw)})"


@compiles(_RowsGreater, "postgresql", "sqlite")
@compiles(_RowsLess, "postgresql", "sqlite")
def _compile_rows(rows: _Rows, compiler: SQLCompiler, **kw: Any) -> str:
    lefts, rights = rows.halves()
    return compiler.process(_beyond(tuple_(*lefts), tuple_(*rights), rows.falls), **kw)


# -- ENUM of MySQL


class _Rank(FunctionElement[Any]):
    """A value of an Enum, as what the database orders by; the other arguments are all values."""

    inherit_cache = True


@compiles(_Rank)
def _compile_value(rank: _Rank, compiler: SQLCompiler, **kw: Any) -> str:
    return compiler.process(next(iter(rank.clauses)), **kw)


@compiles(_Rank, "mysql", "mariadb")
def _compile_field(rank: _Rank, compiler: SQLCompiler, **kw: Any) -> str:
    # Its ENUM is ordered by position, and compared as text.
    return compiler.process(func.field(*rank.clauses), **kw)


def _ranked(expression: ColumnElement[Any], key: Key) -> ColumnElement[Any]:
    kind = key.expression.type
    if not isinstance(kind, Enum) or not kind.native_enum:
        return expression
    names: list[ColumnElement[str]] = [
        bindparam(None, name, literal_execute=True) for name in kind.enums
    ]
    return _Rank(expression, *names)

"""The order of a select's rows, completed by a key so that no two rows are at the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Alias,
    Column,
    Double,
    Float,
    Join,
    Numeric,
    Table,
    cast,
    inspect,
    type_coerce,
)
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Case,
    ColumnClause,
    ColumnElement,
    Label,
    Null,
    Over,
    UnaryExpression,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ScalarSelect
from sqlalchemy.types import NullType

from .errors import PaginationError
from .page_statements import entities_of, final_froms, one_column

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import FromClause, Select

__all__ = ("Key", "find_order")


@dataclass(frozen=True)
class Key:
    """One expression by which rows are ordered.

    :param expression: the expression.
    :param descending: whether its largest values come first.
    :param dialect: the name of the dialect that compares it.
    """

    expression: ColumnElement[Any]
    descending: bool
    dialect: str

    @property
    def stored(self) -> bool:
        """Whether a cursor holds what the database does, whatever type that stands for.

        SQLite compares what it was given: ``CURRENT_TIMESTAMP`` has no microseconds, SQLAlchemy's
        times do, and a Numeric keeps digits beyond its scale, which SQLAlchemy leaves out.
        """
        return self.dialect == "sqlite"

    @property
    def ordered(self) -> ColumnElement[Any]:
        """Its place in an ORDER BY."""
        return self.expression.desc() if self.descending else self.expression.asc()

    @property
    def fetched(self) -> ColumnElement[Any]:
        """What gives its value as exactly as it is compared.

        MariaDB shows six digits of a FLOAT, and PostgreSQL's REAL comes as its shortest decimal.
        A NUMERIC may be mapped to floats, which have fewer digits.
        """
        if self.stored:
            return type_coerce(self.expression, NullType())
        if isinstance(self.expression.type, Float):
            return cast(self.expression, Double())
        if isinstance(self.expression.type, Numeric):
            return type_coerce(self.expression, Numeric())
        return self.expression


def find_order(select: Select[Any], dialect: str) -> tuple[Key, ...]:
    """List the keys of an ORDER BY; to these is added what tells rows with equal ones apart.

    That is the primary key of the entity, or of the tables that are joined, in the direction of the
    last key.

    :param dialect: the name of the database's dialect.
    :raises PaginationError: when rows cannot be told apart, a key may be NULL, or the select has
        what cannot be continued by a condition (LIMIT, GROUP BY, no ORDER BY).
    """
    _refuse_others(select)
    keys = [_read(element, select, dialect) for element in select._order_by_clauses]
    known = {key.expression for key in keys}
    for column in _row_key(select):
        if column not in known:
            keys.append(Key(column, keys[-1].descending, dialect))
    outer = {column for from_ in final_froms(select) for column in _outer_columns(from_)}
    for key in keys:
        _refuse_nulls(key.expression, outer)
    return tuple(keys)


def _refuse_others(select: Select[Any]) -> None:
    # There is no public way to ask a select for these.
    if not hasattr(select, "column_descriptions"):
        raise PaginationError("a union has no keyset pages: select from it as a subquery's alias")
    if not select._order_by_clauses:
        raise PaginationError("a select has keyset pages in the order of its ORDER BY; it has none")
    if _is_limited(select):
        raise PaginationError("a select with LIMIT, OFFSET or FETCH has no keyset pages")
    if select._group_by_clauses:
        raise PaginationError("a select with GROUP BY has no keyset pages: use paginate()")
    if (select._distinct or select._distinct_on) and not (
        one_column(select) and entities_of(select)
    ):
        raise PaginationError("a DISTINCT select has keyset pages if it is of one entity")


def _is_limited(select: Select[Any]) -> bool:
    parts = (select._limit_clause, select._offset_clause, select._fetch_clause)
    return any(part is not None for part in parts)


# -- what stands in ORDER BY


def _read(element: Any, select: Select[Any], dialect: str) -> Key:
    """Take a key out of its direction and label."""
    descending = False
    while True:
        if isinstance(element, UnaryExpression):
            if element.modifier in (operators.nulls_first_op, operators.nulls_last_op):
                raise PaginationError(
                    f"ORDER BY {element}: keyset pages are of keys that are never NULL: use"
                    " coalesce() instead of NULLS FIRST and NULLS LAST"
                )
            if element.modifier not in (operators.asc_op, operators.desc_op):
                break
            descending = element.modifier is operators.desc_op
        elif element.__visit_name__ == "textual_label_reference":
            element = Label(None, _named(element.element, select))
        elif not isinstance(element, Label) and element.__visit_name__ != "label_reference":
            break
        element = element.element
    if any(isinstance(part, Over) for part in visitors.iterate(element)):
        raise PaginationError(f"ORDER BY {element}: no condition can be made of a window function")
    return Key(element, descending, dialect)


def _named(name: str, select: Select[Any]) -> ColumnElement[Any]:
    try:
        return select.selected_columns[name]
    except KeyError:
        raise PaginationError(f"ORDER BY {name!r}: the select has no column of that name") from None


# -- what tells rows apart


def _row_key(select: Select[Any]) -> Iterator[ColumnElement[Any]]:
    entities = entities_of(select)
    if entities and one_column(select):
        [entity] = entities
        mapper = inspect(entity).mapper
        for column in mapper.primary_key:
            yield getattr(entity, mapper.get_property_by_column(column).key).expression
        return
    froms = final_froms(select)
    if not froms:
        raise PaginationError("a select without a table has no keyset pages")
    for from_ in froms:
        yield from _key_of(from_)


def _key_of(from_: FromClause) -> Iterator[ColumnElement[Any]]:
    if isinstance(from_, Join):
        yield from _key_of(from_.left)
        if not _finds_one(from_):
            yield from _key_of(from_.right)
    elif isinstance(from_, Table | Alias) and from_.primary_key:
        yield from from_.primary_key
    else:
        raise PaginationError(
            f"rows of {getattr(from_, 'name', None) or 'a subquery'} have no primary key to tell"
            " them apart: keyset pages are of entities and of tables that have one"
        )


def _finds_one(join: Join) -> bool:
    """Tell whether a join adds at most one row to each: it asks for the whole primary key."""
    own = set(join.right.c)
    asked: set[object] = set()
    for condition in _conjuncts(join.onclause):
        if isinstance(condition, BinaryExpression) and condition.operator is operators.eq:
            left, right = condition.left, condition.right
            for side, other in ((left, right), (right, left)):
                if own.isdisjoint(visitors.iterate(other)):
                    asked.add(side)
    key = set(join.right.primary_key)
    return bool(key) and key <= asked


def _conjuncts(clause: Any) -> Iterator[Any]:
    if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
        for part in clause.clauses:
            yield from _conjuncts(part)
    else:
        yield clause


# -- what may be NULL


def _outer_columns(from_: FromClause) -> Iterator[object]:
    """List the columns that are NULL where an outer join finds nothing."""
    if isinstance(from_, Join):
        if from_.full:
            yield from from_.left.c
        if from_.isouter or from_.full:
            yield from from_.right.c
        yield from _outer_columns(from_.left)
        yield from _outer_columns(from_.right)


def _refuse_nulls(expression: ColumnElement[Any], outer: set[object]) -> None:
    if _may_be_null(expression, outer):
        raise PaginationError(
            f"ORDER BY {expression} may be NULL, and no row comes after NULL: order by"
            f" coalesce({expression}, ...), whose last value is never NULL"
        )


#: What gives NULL where there is nothing at the place: of JSON, and of arrays.
_MISSING = (operators.getitem, operators.json_getitem_op, operators.json_path_getitem_op)


def _may_be_null(expression: Any, outer: set[object]) -> bool:
    """Tell whether a value may be NULL, as far as its columns say."""
    if isinstance(expression, Null | ScalarSelect):
        return True
    if isinstance(expression, Case) and expression.else_ is None:
        return True
    if isinstance(expression, BinaryExpression) and expression.operator in _MISSING:
        return True
    if isinstance(expression, BindParameter):
        return expression.value is None
    if isinstance(expression, ColumnClause):
        nullable = expression.nullable if isinstance(expression, Column) else True
        return nullable or expression in outer
    if isinstance(expression, FunctionElement):
        parts = [_may_be_null(part, outer) for part in expression.clauses]
        if expression.name == "coalesce":
            return all(parts)
        return any(parts) or expression.name == "nullif"
    return any(_may_be_null(part, outer) for part in expression.get_children())

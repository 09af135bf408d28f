"""What is asked of a database for a page of a select: its rows, their number, more rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import CTE, Subquery, func, inspect, literal_column, select
from sqlalchemy.orm.interfaces import CriteriaOption, UserDefinedOption
from sqlalchemy.sql.selectable import GenerativeSelect

from .errors import PaginationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from sqlalchemy import FromClause, Result, Select

    # A select, or a union; how many types these have, SQLAlchemy 2.0 and 2.1 see differently.
    Statement: TypeAlias = GenerativeSelect

__all__ = (
    "LARGEST",
    "check_select",
    "counting",
    "entities_of",
    "final_froms",
    "merges_rows",
    "one_column",
    "read",
    "window",
)

LARGEST = 2**63 - 1
"""The largest LIMIT or OFFSET: PostgreSQL and SQLite count in 64 bits."""


def check_select(statement: object) -> None:
    """Check that a statement is one that the database can be asked for a part of.

    :raises PaginationError: when it is not.
    """
    if not isinstance(statement, GenerativeSelect):
        raise PaginationError(
            f"{type(statement).__name__} cannot be shown in pages: give a select, or a union of"
            " selects; of text() or from_statement() the database cannot be asked for a part"
        )


def window(statement: Any, offset: int, limit: int) -> Any:
    """Cut rows out of those that a select gives, within the LIMIT and OFFSET of its own.

    :param offset: number of rows to leave out.
    :param limit: number of rows to give at most.
    :raises PaginationError: when its own LIMIT or OFFSET is no plain number of rows.
    """
    own_limit, own_offset = _own_limits(statement)
    if own_limit is not None:
        limit = max(0, min(limit, own_limit - offset))
    if own_offset + offset > LARGEST:  # nothing is there
        return statement.limit(0)
    return statement.limit(limit).offset(own_offset + offset)


def _own_limits(statement: Any) -> tuple[int | None, int]:
    # There is no public way to ask a select for these.
    fetch = statement._fetch_clause_options or {}
    if any(fetch.values()):
        raise PaginationError("FETCH with ties or a percentage cannot be shown in pages: use limit")
    limit = statement._limit_clause
    if limit is None:
        limit = statement._fetch_clause
    offset = statement._offset_clause
    return (
        None if limit is None else _number(limit, "LIMIT"),
        0 if offset is None else _number(offset, "OFFSET"),
    )


def _number(clause: object, name: str) -> int:
    value = getattr(clause, "value", None)  # that of a bound parameter
    if not isinstance(value, int):
        raise PaginationError(
            f"the {name} of the select is {clause}: a select that is shown in pages may only have"
            " an integer there"
        )
    return value


def counting(statement: Any) -> Select[Any]:
    """Count the rows that a select gives, without its order, its eager loads and its locks.

    Eager loads are left out by SQLAlchemy from all subqueries; so are loader criteria, which
    decide what rows there are, and hence go to the statement around it.
    """
    unordered = statement.order_by(None)
    unordered._for_update_arg = None  # nothing public takes FOR UPDATE away; this is our copy
    counted = select(func.count()).select_from(unordered.subquery())
    kept = [
        option
        for option in getattr(statement, "_with_options", ())
        if isinstance(option, CriteriaOption | UserDefinedOption)
    ]
    return counted.options(*kept).execution_options(**statement.get_execution_options())


def _columns(statement: Any) -> list[Any]:
    """Describe the columns and entities; of a union there are but columns."""
    return getattr(statement, "column_descriptions", None) or [
        {"expr": column} for column in statement.selected_columns
    ]


def entities_of(statement: Any) -> list[Any]:
    """List the entities that a select gives as a whole."""
    found = [column.get("entity") for column in _columns(statement)]
    return [
        entity
        for entity, column in zip(found, _columns(statement), strict=True)
        if entity is not None and column["expr"] is entity
    ]


def one_column(statement: Any) -> bool:
    """Tell whether a select gives one entity or column, and not rows of several."""
    return len(_columns(statement)) == 1


def final_froms(statement: Any) -> Sequence[FromClause]:
    """List what stands after FROM, without the joins of eager loads."""
    # What is ordered or grouped by the name of a column would look for it in vain.
    bare: Select[Any] = (
        statement.order_by(None)
        .group_by(None)
        .with_only_columns(literal_column("1"), maintain_column_froms=True)
    )
    return bare.get_final_froms()


def merges_rows(statement: Any) -> bool:
    """Tell whether rows may be one when shown: a join can give an entity more than once."""
    entities = entities_of(statement)
    if not entities:
        return False
    froms = final_froms(statement)
    own = {inspect(entity).selectable for entity in entities}
    # What a subquery repeats, an entity aliased to it repeats.
    return len(froms) > 1 or froms[0] not in own or isinstance(froms[0], Subquery | CTE)


def read(result: Result[Any], statement: Any) -> list[Any]:
    """Take what is shown: entities or values where a select gives one of them, else rows.

    Entities are not repeated; joined eager loads of collections would do that.
    """
    if entities_of(statement):
        result = result.unique()
    return list(result.scalars() if one_column(statement) else result)

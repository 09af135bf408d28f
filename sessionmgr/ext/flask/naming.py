"""Names of tables after those of their models, and which models get one."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Column, MetaData, PrimaryKeyConstraint, Table
from sqlalchemy.orm import declared_attr

__all__ = ("camel_to_snake_case", "drop_empty_table", "set_table_name", "table_of")

_WORD_BEGINS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?!^)(?=[A-Z][a-z])")


def camel_to_snake_case(name: str) -> str:
    """Write a name in lower case, its words joined by underscores: ``HTTPLog`` is ``http_log``."""
    return _WORD_BEGINS.sub("_", name).lower().lstrip("_")


def set_table_name(model: Any) -> None:
    """Name the table of a class that is about to be mapped, where it is to have a name."""
    if _wants_name(model):
        model.__tablename__ = camel_to_snake_case(model.__name__)


def _wants_name(model: Any) -> bool:
    """Tell whether a class needs a name: it has none, or the one of the model it inherits from.

    Attributes of the class are not touched: they may be properties that cost something.
    """
    if _says(model, "__abstract__") or "__table__" in vars(model):
        return False
    for base in model.__mro__:
        if "__tablename__" in vars(base):
            if isinstance(vars(base)["__tablename__"], declared_attr):
                return False
            return base is not model and _is_mapped(base)
    return True


def _says(model: Any, name: str) -> bool:
    return bool(vars(model).get(name, False))


def _is_mapped(model: Any) -> bool:
    return "__mapper__" in vars(model)


def table_of(model: Any, name: str, metadata: MetaData, *parts: Any, **options: Any) -> Any:
    """Make the table of a model, as its ``__table_cls__``.

    A model without a primary key of its own shares the table of the model that it inherits from.
    One whose table the metadata has already, reflected or made before, takes that.

    :return: the table; ``None`` where it shares its parent's.
    """
    schema = options.get("schema", metadata.schema)
    known = f"{schema}.{name}" if schema else name
    has_key = any(
        isinstance(part, PrimaryKeyConstraint) or (isinstance(part, Column) and part.primary_key)
        for part in parts
    )
    shares = any("__table__" in vars(base) for base in model.__mro__[1:])
    if known in metadata.tables or has_key or not shares:
        return Table(name, metadata, *parts, **options)
    if "__tablename__" in vars(model):
        del model.__tablename__
    return None


def drop_empty_table(model: Any) -> None:
    """Let a model that shares its parent's table inherit the attribute, once it is mapped."""
    if vars(model).get("__table__", model) is None:
        del model.__table__

"""``db.Table``: tables that find their metadata by a bind key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("make_table_class",)


class _TableMeta(type(sa.Table)):  # type: ignore[misc]  # the class of tables, whatever it is
    """Supplies the metadata where a table is made without."""

    _metadata_of: Callable[[str | None], sa.MetaData]

    def __call__(
        cls,
        name: Any,
        *parts: Any,
        bind_key: str | None = None,
        metadata: sa.MetaData | None = None,
        **options: Any,
    ) -> sa.Table:
        if not isinstance(name, str):  # SQLAlchemy's annotated form of a table
            annotated: sa.Table = super().__call__(name, *parts, **options)
            return annotated
        if not (parts and isinstance(parts[0], sa.MetaData)):
            parts = (cls._metadata_of(bind_key) if metadata is None else metadata, *parts)
        table: sa.Table = super().__call__(name, *parts, **options)
        return table


def make_table_class(metadata_of: Callable[[str | None], sa.MetaData]) -> Any:
    """Make a class of tables.

    ``db.Table("name", db.Column(...), bind_key="users")`` is in the metadata of the bind key, or in
    the one that it is given, as SQLAlchemy's own.

    :param metadata_of: gives the metadata of a bind key.
    """

    class Table(sa.Table, metaclass=_TableMeta):
        """A table in the metadata of its ``bind_key``."""

    Table._metadata_of = staticmethod(metadata_of)
    return Table

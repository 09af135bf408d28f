"""Sees to the tables of a store: looks at them, and creates what is missing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from sessionmgr.errors import SchemaLockError
from sessionmgr.schema import create_tables, has_tables, upgrade_tables
from sessionmgr.transient import is_transient

from .arguments import check_execution_options
from .layout import read_layout
from .statements import Statements

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from .access import ResultAccess
    from .layout import Layout

__all__ = ("prepare",)

log = logging.getLogger("sessionmgr")

#: Seconds to wait for the lock of a server where nothing is missing but columns that may be NULL.
_SHORT = 5


def prepare(access: ResultAccess, engine: Engine) -> tuple[Statements, bool]:
    """Look what a database has, create what it lacks, and make the statements for it.

    :return: the statements, and whether they are for good: where somebody else held the lock, he
        may have been about to add what is missing.
    :raises EngineOptionsError: when the engine's options cannot be.
    """
    check_execution_options(access.describe(), engine.get_execution_options())
    layout, settled = _look(access), True
    if _is_to_change(access, engine, layout):
        settled = _change(access, engine, layout)
        layout = _look(access)
    statements = Statements(
        engine.dialect.name,
        access.tables,
        layout,
        extended=access.extended,
        notify=access.notify,
    )
    return statements, settled


def _change(access: ResultAccess, engine: Engine, layout: Layout) -> bool:
    """Create what is missing, if that may be; tell whether nobody held the lock for too long."""
    change = create_tables if access.create_tables == "missing" else upgrade_tables
    database = access.describe()
    try:
        change(engine, access.tables.metadata, database, timeout=_patience(access, layout))
    except (DBAPIError, SchemaLockError) as error:
        # the right is missing, say; what is there is enough if the results have a table
        if is_transient(error) or not layout.task.columns:
            raise
        log.warning(
            "database %s: tables or columns for task results are missing and cannot be"
            " created; going on with those that are there. The statements to have run by"
            " somebody who may: python -m sessionmgr results ddl. The error: %s",
            database,
            getattr(error, "orig", error),
        )
        return not isinstance(error, SchemaLockError)
    return True


def _patience(access: ResultAccess, layout: Layout) -> int | None:
    """Give the seconds to wait for the lock, or ``None`` for as long as anybody waits for it."""
    if access.statements is not None:
        return 0  # it has worked so far, and goes on
    return _SHORT if layout.has_tables() else None


def _is_to_change(access: ResultAccess, engine: Engine, layout: Layout) -> bool:
    if access.create_tables == "missing":
        return not has_tables(engine, access.tables.metadata)
    return access.create_tables and layout.lacks(access.tables)


def _look(access: ResultAccess) -> Layout:
    with access.connect() as connection:
        return read_layout(connection, access.tables)

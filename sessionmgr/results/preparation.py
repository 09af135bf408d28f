"""Sees to the tables of a store: looks at them, and creates what is missing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from sessionmgr.schema import create_tables, has_tables, upgrade_tables
from sessionmgr.transient import is_transient

from .layout import read_layout
from .statements import Statements

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from .access import ResultAccess
    from .layout import Layout

__all__ = ("prepare",)

log = logging.getLogger("sessionmgr")


def prepare(store: ResultAccess, engine: Engine) -> Statements:
    """Look what a database has, create what it lacks, and make the statements for it."""
    layout = _look(store)
    if _is_to_change(store, engine, layout):
        change = create_tables if store.create_tables == "missing" else upgrade_tables
        try:
            change(engine, store.tables.metadata, store.describe())
        except DBAPIError as error:
            # the right is missing, say; what is there is enough if the results have a table
            if is_transient(error) or not layout.task.columns:
                raise
            log.warning(
                "database %s: tables or columns for task results are missing and cannot be"
                " created; going on with those that are there. The statements to have run by"
                " somebody who may: python -m sessionmgr results ddl. The error: %s",
                store.describe(),
                error.orig,
            )
        layout = _look(store)
    return Statements(
        engine.dialect.name,
        store.tables,
        layout,
        extended=store.extended,
        notify=store.notify,
    )


def _is_to_change(store: ResultAccess, engine: Engine, layout: Layout) -> bool:
    if store.create_tables == "missing":
        return not has_tables(engine, store.tables.metadata)
    return store.create_tables and layout.lacks(store.tables)


def _look(store: ResultAccess) -> Layout:
    with store._connect() as connection:
        return read_layout(connection, store.tables)

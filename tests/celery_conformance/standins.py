"""Puts sessionmgr's classes where Celery's tests import them from."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import celery

import sessionmgr
from sessionmgr.ext.celery.backend import DatabaseBackend, log
from sessionmgr.results.models import map_tables
from sessionmgr.results.tables import build_tables
from sessionmgr.schema import upgrade_tables

if TYPE_CHECKING:
    from sqlalchemy import Engine

__all__ = ("replace",)

TABLES = build_tables()
MODELS = map_tables(TABLES)


class SessionManager(sessionmgr.SessionManager):
    """A SessionManager with the tables for results, as Celery's has them without being told."""

    def __init__(self, engine_callback: Any = None) -> None:
        super().__init__(engine_callback, metadata=TABLES.metadata)

    def prepare_models(self, engine: Engine) -> None:
        # Celery's manager adds the columns that old tables lack; here a store has that done.
        upgrade_tables(engine, self.metadata, "the tests' database")


class ResultModelBase:
    """What Celery's mapped classes have in common is, for its users, their metadata."""

    metadata = TABLES.metadata


def replace() -> str:
    """Replace the public names in the modules of Celery's backend; give Celery's version."""
    package, models, session = (
        import_module(f"celery.backends.database{name}") for name in ("", ".models", ".session")
    )
    classes = {
        "Task": MODELS.task,
        "TaskExtended": MODELS.task_extended,
        "TaskSet": MODELS.group,
        "SessionManager": SessionManager,
        "ResultModelBase": ResultModelBase,
        "DatabaseBackend": DatabaseBackend,
        "logger": log,
    }
    for module in (package, models, session):
        for name in classes.keys() & vars(module).keys():
            setattr(module, name, classes[name])
    return f"Celery {celery.__version__} from {sys.modules['celery'].__path__[0]}"

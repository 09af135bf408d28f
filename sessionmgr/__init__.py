"""SQLAlchemy sessions for worker processes: many databases, safe across fork."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .appdb import ApplicationDatabase
from .errors import (
    DatabasePathError,
    DatabasesNotReadyError,
    DatabaseURLError,
    EngineOptionsError,
    EventLoopError,
    FlaskModelError,
    FlaskSetupError,
    ForkedSQLiteError,
    IsolationError,
    ManagerClosedError,
    ManagerPickleError,
    MissingExtraError,
    NoSuchBindError,
    PageNotFoundError,
    PaginationError,
    ResultArgumentError,
    ResultStoreError,
    ResultTimeoutError,
    ResultTooLongError,
    SchemaLockError,
    SessionManagerError,
    SpannedBindsError,
    TemplateError,
)
from .manager import SessionManager
from .models import Base
from .pagination import paginate
from .results import ResultStore, TaskResult
from .stats import DatabaseStats, ManagerStats
from .transient import is_transient

if TYPE_CHECKING:
    from .asyncio import AsyncSessionManager

__all__ = (
    "ApplicationDatabase",
    "AsyncSessionManager",
    "Base",
    "DatabasePathError",
    "DatabaseStats",
    "DatabaseURLError",
    "DatabasesNotReadyError",
    "EngineOptionsError",
    "EventLoopError",
    "FlaskModelError",
    "FlaskSetupError",
    "ForkedSQLiteError",
    "IsolationError",
    "ManagerClosedError",
    "ManagerPickleError",
    "ManagerStats",
    "MissingExtraError",
    "NoSuchBindError",
    "PageNotFoundError",
    "PaginationError",
    "ResultArgumentError",
    "ResultStore",
    "ResultStoreError",
    "ResultTimeoutError",
    "ResultTooLongError",
    "SchemaLockError",
    "SessionManager",
    "SessionManagerError",
    "SpannedBindsError",
    "TaskResult",
    "TemplateError",
    "is_transient",
    "paginate",
)


def __getattr__(name: str) -> Any:
    """Import what needs SQLAlchemy's asyncio extension when it is asked for."""
    if name == "AsyncSessionManager":
        from .asyncio import AsyncSessionManager

        return AsyncSessionManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

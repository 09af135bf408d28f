"""SQLAlchemy sessions for worker processes: many databases, safe across fork."""

from .errors import (
    DatabaseURLError,
    EngineOptionsError,
    ForkedSQLiteError,
    ManagerClosedError,
    ManagerPickleError,
    NoSuchBindError,
    ResultArgumentError,
    ResultStoreError,
    ResultTimeoutError,
    ResultTooLongError,
    SchemaLockError,
    SessionManagerError,
)
from .manager import SessionManager
from .models import Base
from .results import ResultStore, TaskResult
from .stats import DatabaseStats, ManagerStats
from .transient import is_transient

__all__ = (
    "Base",
    "DatabaseStats",
    "DatabaseURLError",
    "EngineOptionsError",
    "ForkedSQLiteError",
    "ManagerClosedError",
    "ManagerPickleError",
    "ManagerStats",
    "NoSuchBindError",
    "ResultArgumentError",
    "ResultStore",
    "ResultStoreError",
    "ResultTimeoutError",
    "ResultTooLongError",
    "SchemaLockError",
    "SessionManager",
    "SessionManagerError",
    "TaskResult",
    "is_transient",
)

"""Task results in a database: a store without any framework, in Celery's tables."""

from .records import READY_STATES, TaskResult
from .store import ResultStore

__all__ = ("READY_STATES", "ResultStore", "TaskResult")

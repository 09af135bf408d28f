"""Mapped classes on the tables of a store, for those who query results by the ORM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from sqlalchemy.orm import configure_mappers, registry

from sessionmgr import forking

from .records import EXTENDED, FIELDS

if TYPE_CHECKING:
    from .tables import ResultTables

__all__ = ("ResultModels", "map_tables")

_lock = forking.ProcessLock()
# names and schemas -> the classes, as long as anybody has them; guarded by _lock
_models: WeakValueDictionary[tuple[Any, ...], ResultModels] = WeakValueDictionary()


@dataclass(frozen=True)
class ResultModels:
    """The mapped classes of stores whose tables have the same names.

    They are called, made and shown as those of Celery's database backend.

    :param task: the tasks, without the extended fields.
    :param task_extended: the tasks with them.
    :param group: the groups.
    """

    task: type[Any]
    task_extended: type[Any]
    group: type[Any]


class _Row:
    """What the mapped classes have in common."""

    _fields: ClassVar[tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Give the fields; what cannot be loaded, because the table lacks it, is ``None``."""
        return {name: self._loaded(name) for name in self._fields}

    def _loaded(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except Exception:  # noqa: BLE001 - each driver has its own for a missing column
            return None


class _Task(_Row):
    """A row of the tasks' table."""

    task_id: Any
    status: Any

    def __init__(self, task_id: str) -> None:
        """Begin a row.

        :param task_id: the task's id.
        """
        self.task_id = task_id

    def __repr__(self) -> str:
        return f"<Task {self.task_id} state: {self.status}>"


class _TaskSet(_Row):
    """A row of the groups' table."""

    taskset_id: Any
    result: Any

    def __init__(self, taskset_id: str, result: bytes) -> None:
        """Begin a row.

        :param taskset_id: the group's id.
        :param result: its results, encoded.
        """
        self.taskset_id = taskset_id
        self.result = result

    def __repr__(self) -> str:
        return f"<TaskSet: {self.taskset_id}>"


def map_tables(tables: ResultTables) -> ResultModels:
    """Give the mapped classes of a store's tables.

    Stores with the same names and schemas share them. The classes never change: another
    store's names are other classes.

    :param tables: the tables of the store.
    """
    key = (tables.task.name, tables.task.schema, tables.group.name, tables.group.schema)
    with forking.gate.section(), _lock():
        models = _models.get(key)
        if models is None:
            models = _models[key] = _map(tables)
        return models


def _map(tables: ResultTables) -> ResultModels:
    mapping = registry(metadata=tables.metadata)

    def mapped(name: str, base: type[_Row], table: Any, fields: tuple[str, ...]) -> type[Any]:
        made = type(name, (base,), {"__doc__": base.__doc__, "_fields": fields})
        mapping.map_imperatively(made, table, include_properties=["id", *fields])
        return made

    short = tuple(name for name in FIELDS if name not in EXTENDED)
    models = ResultModels(
        mapped("Task", _Task, tables.task, short),
        mapped("TaskExtended", _Task, tables.task, FIELDS),
        mapped("TaskSet", _TaskSet, tables.group, ("taskset_id", "result", "date_done")),
    )
    configure_mappers()
    return models

"""ResultStore: task results in a database, one statement for each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sessionmgr.errors import ResultArgumentError
from sessionmgr.urls import hide_secrets

from .access import ResultAccess
from .arguments import check_bytes, check_id, check_ids, check_values
from .chords import Chords
from .cleanup import delete_expired
from .records import EXTENDED, FIELDS, READY_STATES, SUCCESS, TaskResult, in_order, utc_now
from .tables import build_tables
from .waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import datetime

    from sqlalchemy import URL, Connection
    from typing_extensions import Self

    from sessionmgr.config import EngineCallback
    from sessionmgr.manager import SessionManager

    from .statements import Statements

__all__ = ("ResultStore",)


class ResultStore:
    """The results of tasks in one database, in the tables that Celery has.

    ::

        store = ResultStore("postgresql+psycopg://app@db/results")
        store.store("42", "SUCCESS", b"done")
        store.get("42").result

    Any number of threads and forked processes may use one store. It pickles as its
    configuration. Every call is one statement and one transaction; those that change something
    may be repeated, and are, when a connection was lost or the database gave way to another
    transaction.
    """

    def __init__(
        self,
        dburi: str | URL,
        *,
        manager: SessionManager | None = None,
        extended: bool = False,
        table_names: Mapping[str, str] | None = None,
        table_schemas: Mapping[str, str] | None = None,
        engine_options: Mapping[str, Any] | None = None,
        engine_callback: EngineCallback | Iterable[EngineCallback] | None = None,
        create_tables: bool | Literal["missing"] = True,
        short_lived_sessions: bool = False,
        notify: bool = False,
        attempts: int = 5,
    ) -> None:
        """Configure a store. Nothing is connected yet.

        :param dburi: URL string, :class:`sqlalchemy.URL`, or a bind key of ``manager``.
        :param manager: the manager to take connections from; it stays the caller's to close.
            Default: one of the store's own, which keeps connections in every process and has
            them in autocommit, which saves MySQL's drivers four round trips for each call.
        :param extended: keep ``name``, ``args``, ``kwargs``, ``worker``, ``retries``, ``queue``
            and ``stamps`` of tasks as well.
        :param table_names: ``"task"``, ``"group"``, ``"chord"`` or ``"part"`` -> name of that
            table; ``"task_sequence"`` or ``"group_sequence"`` -> name of the sequence of its ids.
        :param table_schemas: ``"task"`` or ``"group"`` -> schema of that table; chords' tables
            are in that of the groups.
        :param engine_options: options of ``create_engine`` for the database.
        :param engine_callback: what the store's own manager gives each Engine to.
        :param create_tables: create what is missing of tables and columns, once, under the
            database's lock. Where that is not allowed the columns that are there are used.
            ``"missing"`` creates tables alone, and changes none.
        :param short_lived_sessions: leave no connection open between calls.
        :param notify: on PostgreSQL, tell every result to those who wait for it
            (``NOTIFY``): :meth:`wait` then sleeps until it is there.
        :param attempts: how often to try a call that fails by a passing error.
        :raises ResultArgumentError: when an argument cannot be.
        :raises EngineOptionsError: when an option cannot be.
        :raises DatabaseURLError: when ``dburi`` cannot be read.
        """
        #: What the calls are made of.
        self.access = ResultAccess(
            dburi,
            build_tables(table_names, table_schemas),
            manager=manager,
            engine_options=engine_options,
            engine_callback=engine_callback,
            create_tables=create_tables,
            short_lived_sessions=short_lived_sessions,
            extended=extended,
            notify=notify,
            attempts=attempts,
        )
        self._names, self._schemas = table_names, table_schemas
        #: The database, as it was named.
        self.dburi = self.access.dburi
        #: Where the connections are from.
        self.manager = self.access.manager
        #: The tables, as this store describes them.
        self.tables = self.access.tables
        #: Whether the extended fields are kept.
        self.extended = extended
        #: The chords that are counted in this database.
        self.chords = Chords(self.access)

    # -- results

    def store(
        self,
        task_id: str,
        status: str,
        result: bytes | None = None,
        *,
        traceback: str | None = None,
        children: bytes | None = None,
        date_done: datetime | None = None,
        **extended: Any,
    ) -> bool:
        """Store the state and the result of a task: one statement, one round trip.

        A SUCCESS that is there stays: a task that was delivered twice does not lose its result.

        :param task_id: the task's id.
        :param status: its state.
        :param result: its result, encoded.
        :param traceback: the traceback of its exception.
        :param children: the tasks that it started, encoded.
        :param date_done: when it ended; default: now, if the state is one in which tasks have
            ended. A time zone is turned into UTC.
        :param extended: the further fields of :class:`TaskResult`, for an extended store.
        :return: whether it was stored; ``False`` when a SUCCESS was there. After a connection
            that was lost in the middle, this may be the SUCCESS of this very call.
        :raises ResultArgumentError: when there is no such field, or a value is of a wrong kind.
        :raises ResultTooLongError: when a value does not fit in its column.
        """
        fields = {
            "task_id": task_id,
            "status": status,
            "result": result,
            "traceback": traceback,
            "children": children,
            "date_done": date_done,
        }
        values = check_values(fields, extended, extended=self.extended)
        ready = status in READY_STATES

        def write(statements: Statements, connection: Connection) -> bool:
            row = {name: values.get(name) for name in statements.fields}
            statements.layout.task.check(self.tables.task.name, row)
            upsert = statements.store_ready if ready else statements.store
            return upsert.write(connection, row)

        return self.access.call(write)

    def store_many(self, results: Iterable[TaskResult]) -> None:
        """Store many results at once, in one transaction.

        Of several results of one task the last counts, but for a SUCCESS, which stays.

        :param results: what to store; ``date_done`` is set as by :meth:`store`.
        :raises ResultArgumentError: when one is no :class:`TaskResult`.
        :raises ResultTooLongError: when a value does not fit in its column.
        """
        latest: dict[str, dict[str, Any]] = {}
        for each in results:
            if not isinstance(each, TaskResult):
                raise ResultArgumentError(f"not a TaskResult: {hide_secrets(each)}")
            if latest.get(check_id(each.task_id), {}).get("status") != SUCCESS:
                fields = {name: getattr(each, name) for name in FIELDS}
                extended = {name: fields.pop(name) for name in EXTENDED}
                given = {name: value for name, value in extended.items() if value is not None}
                latest[each.task_id] = check_values(fields, given, extended=self.extended)

        # In one order, whoever stores: two that lock the same rows in different orders deadlock.
        ordered = sorted(latest.items())
        ready = any(values["status"] in READY_STATES for values in latest.values())

        def write(statements: Statements, connection: Connection) -> None:
            rows = [{name: row.get(name) for name in statements.fields} for _, row in ordered]
            for row in rows:
                statements.layout.task.check(self.tables.task.name, row)
            upsert = statements.store_ready if ready else statements.store
            upsert.write_many(connection, rows)

        if latest:
            self.access.call(write, transaction=True)

    def get(self, task_id: str) -> TaskResult | None:
        """Give what is known of a task, or ``None``."""
        check_id(task_id)

        def read(statements: Statements, connection: Connection) -> TaskResult | None:
            row = connection.execute(statements.get, {"id": task_id}).first()
            return None if row is None else TaskResult(*in_order(statements.fields, row))

        return self.access.call(read)

    def exists(self, task_id: str) -> bool:
        """Tell whether anything is known of a task."""
        check_id(task_id)
        return self.access.call(
            lambda statements, connection: (
                connection.execute(statements.exists, {"id": task_id}).first() is not None
            )
        )

    def get_many(self, task_ids: Iterable[str]) -> dict[str, TaskResult]:
        """Give what is known of many tasks.

        :param task_ids: their ids.
        :return: task id -> result, of those of which something is known. PostgreSQL and SQLite
            are asked once for 100,000 ids, MySQL and MariaDB for 10,000, others for 500.
        """
        return self.access.select(check_ids(task_ids), lambda statements: statements.get_many)

    def wait(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        *,
        max_interval: float = 0.5,
        on_interval: Callable[[], object] | None = None,
    ) -> Iterator[TaskResult]:
        """Wait for tasks to end, and yield their results in order of completion.

        In a table of MySQL's or MariaDB's that Celery made there are whole seconds: tasks that
        ended in the same one come in any order, until ``results upgrade`` has changed it.

        The table is looked at in as few statements as by :meth:`get_many`, at once and then after
        pauses that grow from 5 ms to ``max_interval``: a task is seen late by a tenth of the
        time it took. With ``notify=True``, on PostgreSQL with psycopg or psycopg2, it is seen
        at once: one connection of the process listens while any of its threads wait. No other
        is held between looks. A database that is away for less than a minute is waited for, and
        so is a pool whose connections are all in use; with a ``timeout``, for that long.

        :param task_ids: their ids; the result of each comes once.
        :param timeout: seconds from now until giving up; 0 looks once. Default: never.
        :param max_interval: the longest pause, in seconds.
        :param on_interval: called after each look that found nothing.
        :raises ResultTimeoutError: when tasks are open and ``timeout`` is over.
        :raises ResultArgumentError: when an argument cannot be.
        """
        return Waiting(self.access, task_ids, timeout, max_interval, on_interval).results()

    def forget(self, task_ids: str | Iterable[str]) -> None:
        """Delete the results of tasks, also those that are a SUCCESS.

        :param task_ids: one id, or several.
        """
        ids = [check_id(task_ids)] if isinstance(task_ids, str) else check_ids(task_ids)

        def delete(statements: Statements, connection: Connection) -> None:
            for batch in statements.ids.batches(ids):
                connection.execute(statements.forget, batch)

        self.access.call(delete)

    # -- groups

    def save_group(self, group_id: str, result: bytes) -> None:
        """Save a group of results, encoded; one that is there is replaced."""
        check_id(group_id, "group_id")
        check_bytes("result", group_id, result, "group")
        row = {"taskset_id": group_id, "result": result, "date_done": utc_now()}

        def write(statements: Statements, connection: Connection) -> None:
            statements.layout.group.check(self.tables.group.name, row)
            statements.store_group.write(connection, row)

        self.access.call(write)

    def restore_group(self, group_id: str) -> tuple[bytes, datetime] | None:
        """Give a saved group, encoded, and when it was saved; ``None`` when there is none."""
        check_id(group_id, "group_id")

        def read(statements: Statements, connection: Connection) -> tuple[bytes, datetime] | None:
            row = connection.execute(statements.get_group, {"id": group_id}).first()
            return None if row is None else (row.result, row.date_done)

        return self.access.call(read)

    def delete_group(self, group_id: str) -> None:
        """Delete a saved group."""
        check_id(group_id, "group_id")
        self.access.call(
            lambda statements, connection: connection.execute(
                statements.delete_group, {"id": group_id}
            )
        )

    def cleanup(
        self,
        before: datetime,
        batch_size: int = 1000,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Delete tasks and groups that ended before a time, and chords that came no further.

        A chord is as old as the last of its parts that returned, and so is what it keeps.
        Each batch is a transaction, short enough for those who store at the same time. One
        runner at a time deletes from a table of tasks on PostgreSQL, MySQL and MariaDB: while
        another one does, this returns 0 at once. A connection of its own has the lock for the
        whole run. On SQLite runners take turns, batch by batch. What has not ended has no time,
        and stays.

        :param before: the time; without a time zone it is UTC.
        :param batch_size: rows in a batch, at most.
        :param progress: is told after each batch how many rows are gone by now.
        :return: how many rows are gone.
        :raises ResultArgumentError: when an argument cannot be.
        """
        return delete_expired(self.access, before, batch_size, progress) or 0

    # -- state

    def describe(self) -> str:
        """Name the database, without secrets."""
        return self.access.describe()

    def prepare(self) -> None:
        """See to the tables now, rather than at the first call."""
        self.access.prepared()

    def invalidate(self) -> None:
        """Drop the connections and look at the tables again at the next call."""
        self.access.invalidate()

    def close(self) -> None:
        """Close the connections for good, unless they are those of the caller's manager."""
        self.access.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ResultStore: {self.describe()}, extended={self.extended}>"

    def __reduce__(self) -> tuple[Any, ...]:
        access = self.access
        options = {
            "manager": None if access.owns_manager else self.manager,
            "extended": self.extended,
            "table_names": self._names,
            "table_schemas": self._schemas,
            "engine_options": access.engine_options,
            "engine_callback": self.manager.engine_callback if access.owns_manager else None,
            "create_tables": access.create_tables,
            "short_lived_sessions": access.short_lived_sessions,
            "notify": access.notify,
            "attempts": access.attempts,
        }
        return _from_options, (self.dburi, options)


def _from_options(dburi: str | URL, options: dict[str, Any]) -> ResultStore:
    return ResultStore(dburi, **options)

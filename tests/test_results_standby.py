"""Result stores on a hot standby of PostgreSQL, which can be read, and where nobody may listen."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest
from celery import Celery
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import DBAPIError, InternalError

from sessionmgr import ResultStore, TaskResult
from sessionmgr.results import notify
from sessionmgr.transient import is_lost
from tests.celery_workers import close_app
from tests.helpers import wait_until
from tests.results_helpers import columns_of, rows_of
from tests.results_waiting import TELLING, WHEN, Waiter
from tests.servers import Database
from tests.servers.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sessionmgr.ext.celery import DatabaseBackend
    from tests.servers import Server, Servers


WITH_ONE_DRIVER = pytest.mark.parametrize("pair", ["psycopg"], indirect=True)


class Pair(NamedTuple):
    """The same database on a server and on its standby."""

    primary: Database
    standby: Database

    def catch_up(self) -> None:
        """Wait until the standby has all that its primary has written."""
        # The last argument: send it, and what comes before, without waiting for more.
        emit = "SELECT pg_logical_emit_message(false, 'test', '', true)::text"
        [(end,)] = self.primary.server.query(emit)
        caught_up = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        wait_until(lambda: self.standby.server.query(caught_up, end) == [(True,)])


@pytest.fixture(scope="module")
def server_pair(servers: Servers) -> Iterator[tuple[Server, Server]]:
    """Run a server and a hot standby of it."""
    with (
        servers.private("postgresql") as primary,
        servers.private("postgresql", primary=primary) as standby,
    ):
        yield primary, standby


@pytest.fixture(params=TELLING)
def pair(
    request: pytest.FixtureRequest,
    server_pair: tuple[Server, Server],
    make_database: Callable[..., Database],
) -> Pair:
    """Create a database with a store's tables, once with each driver by which results are told."""
    server, standby = server_pair
    primary = make_database(request.param, server)
    with ResultStore(primary.url) as store:
        store.prepare()
    made = Pair(primary, Database(standby, primary.name, request.param))
    made.catch_up()
    return made


def test_results_are_looked_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody may listen results come all the same: one warning, and ever fewer attempts."""
    monkeypatch.setattr(notify, "RETRY", 0.01)
    standby = pair.standby.server
    mark = standby.log_mark()

    def refusals() -> int:
        return int(standby.log_text(mark).count("cannot execute LISTEN during recovery"))

    ids = [str(number) for number in range(4)]
    with (
        ResultStore(pair.primary.url, notify=True) as store,
        ResultStore(pair.standby.url, notify=True) as reader,
    ):
        waiters = [Waiter(reader, ids) for _ in range(3)]
        wait_until(lambda: refusals() >= 2)
        for task_id in ids:
            store.store(task_id, "SUCCESS", b"done")
            wait_until(lambda n=task_id: all(n in waiter.got for waiter in waiters))
        assert [waiter.end() for waiter in waiters] == [ids] * 3
    assert refusals() <= 12  # of pauses that double from 0.01 s on these are 40 s
    [record] = caplog.records
    assert "cannot execute LISTEN during recovery" in record.getMessage()


@WITH_ONE_DRIVER
def test_reads_use_the_tables_of_the_primary(pair: Pair) -> None:
    """All that reads works, and nothing has to be created."""
    with ResultStore(pair.primary.url) as store:
        store.store("1", "SUCCESS", b"done")
        store.save_group("g", b"group")
    pair.catch_up()
    with ResultStore(pair.standby.url) as reader:
        found = reader.get("1")
        assert found is not None
        assert found.result == b"done"
        assert reader.get_many(["1", "2"]) == {"1": found}
        assert (reader.exists("1"), reader.exists("2")) == (True, False)
        assert list(reader.wait(["1"], 0)) == [found]
        assert reader.restore_group("g") is not None


@WITH_ONE_DRIVER
def test_reads_do_without_missing_columns(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """A column that the primary's table lacks cannot be added here: one warning."""
    rows_of(pair.primary.url, "ALTER TABLE celery_taskmeta DROP COLUMN children")
    rows_of(pair.primary.url, "INSERT INTO celery_taskmeta (id, task_id) VALUES (1, '1')")
    pair.catch_up()
    with ResultStore(pair.standby.url) as reader:
        assert reader.exists("1")
        assert reader.get("1") is not None
    [record] = caplog.records
    assert "cannot execute ALTER TABLE in a read-only transaction" in record.getMessage()
    assert "children" not in columns_of(pair.standby.url)


def test_writes_are_refused_at_once(pair: Pair) -> None:
    """What writes raises the server's own error, and is not tried again."""
    mark = pair.standby.server.log_mark()
    old = TaskResult("0", "SUCCESS", date_done=WHEN)
    with ResultStore(pair.primary.url) as store:
        store.store_many([old])
    pair.catch_up()
    writes: list[tuple[str, Callable[[ResultStore], object]]] = [
        ("INSERT", lambda store: store.store("1", "SUCCESS")),
        ("INSERT", lambda store: store.store_many([old])),
        ("INSERT", lambda store: store.save_group("g", b"group")),
        ("DELETE", lambda store: store.forget("1")),
        ("DELETE", lambda store: store.cleanup(WHEN + timedelta(days=1))),
    ]
    with ResultStore(pair.standby.url, notify=True) as reader:
        for statement, write in writes:
            with pytest.raises(InternalError, match=f"cannot execute {statement} in a read-only"):
                write(reader)
    refusals = pair.standby.server.log_text(mark).count("ERROR:  cannot execute")
    assert refusals == len(writes)


@pytest.fixture
def make_backend() -> Iterator[Callable[[Database], DatabaseBackend]]:
    """Return a function that makes the backend of an app of its own."""
    apps: list[Celery] = []

    def make(database: Database) -> DatabaseBackend:
        apps.append(app := Celery("sessionmgr-standby", set_as_current=False))
        url = database.url.render_as_string(hide_password=False)
        app.conf.update(
            result_backend=f"sessionmgr+{url}", result_backend_transport_options={"notify": True}
        )
        return app.backend

    yield make
    for app in apps:
        close_app(app)


@WITH_ONE_DRIVER
def test_celery_backend_is_refused_at_once(
    pair: Pair, make_backend: Callable[[Database], DatabaseBackend]
) -> None:
    """Celery's client gets results there; what it stores is refused by the first attempt."""
    make_backend(pair.primary).mark_as_done("1", 42)
    backend = make_backend(pair.standby)
    mark = pair.standby.server.log_mark()
    assert backend.wait_for("1", timeout=30.0)["result"] == 42
    with pytest.raises(InternalError, match="cannot execute INSERT in a read-only"):
        backend.mark_as_done("2", 42)
    assert pair.standby.server.log_text(mark).count("ERROR:  cannot execute INSERT") == 1


@WITH_ONE_DRIVER
def test_standby_that_is_not_consistent_yet_is_away(pair: Pair) -> None:
    """One that starts, and waits for what its primary has still to send, is lost for now."""
    standby = pair.standby.server
    assert standby.log is not None
    rows_of(pair.primary.url, "CREATE TABLE more (id INTEGER)")
    pair.primary.server.query("SELECT pg_switch_wal()")
    rows_of(pair.primary.url, "INSERT INTO more VALUES (1)")
    pair.catch_up()
    standby.process.stop()
    logs = (standby.log.parent / "data" / "pg_wal").glob("[0-9A-F]" * 24)
    max(logs).unlink()  # what it has replayed, and will not find again
    urls = [standby.url(driver, pair.standby.name) for driver in TELLING]
    errors: list[DBAPIError] = []

    def is_inconsistent() -> bool:
        for url in urls:
            with pytest.raises(DBAPIError) as caught:
                create_engine(url, poolclass=NullPool).connect()
            errors.append(caught.value)
        return "not yet accepting connections" in str(errors[-1])

    # without its primary, which would send it
    command = [*standby.process.command, "-c", "primary_conninfo="]
    process = ServerProcess(command, standby.log, is_inconsistent)
    process.start()
    try:
        is_inconsistent()
        assert {is_lost(error) for error in errors} == {True}
    finally:
        process.stop()
        standby.process.start()

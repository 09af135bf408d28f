"""Chords on real Celery workers: the callback runs once, whatever happens to the parts."""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from celery import chain, chord, group, uuid
from celery.app.task import Context
from celery.exceptions import ChordError, SoftTimeLimitExceeded
from celery.signals import after_task_publish
from kombu.exceptions import EncodeError
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError  # noqa: A004 - of a pool; there is no other here

from sessionmgr import ResultTooLongError
from tests.celery_backend_app import PUBLISHING_DIES, make_app
from tests.celery_workers import Service, serving
from tests.concurrency import in_threads
from tests.helpers import wait_until
from tests.results_helpers import counted_statements, make_celery_tables, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from celery import Celery
    from celery.canvas import Signature

    from tests.servers import Database
    from tests.servers.redis import Redis

pytest_plugins = ["tests.celery_fixtures"]

LATE = {"task_acks_late": True, "task_reject_on_worker_lost": True}
"""Settings with which a task is delivered again when its process was killed."""

CHORD_SERVICES = (("fork", "psycopg"), ("fork", "pymysql"), ("threads", "sqlite"))


@pytest.fixture(params=CHORD_SERVICES, ids=["-".join(each) for each in CHORD_SERVICES])
def counting(request: pytest.FixtureRequest, make_service: Callable[..., Service]) -> Service:
    """Return a worker for each kind of database that chords are counted in."""
    return make_service(*request.param)


def signatures(app: Celery) -> tuple[Callable[..., Signature], ...]:
    """Return what makes signatures of the tasks ``add`` and ``total``."""

    def add(*numbers: int) -> Signature:
        return app.signature("add", numbers)

    def total(name: str = "total") -> Signature:
        return app.signature("total", kwargs={"name": name})

    return add, total


def chord_tables_are_empty_of(service: Service, group_id: str) -> bool:
    """Return whether no part of a chord is kept any more."""
    url = service.app.backend.store.dburi
    statement = "SELECT count(*) FROM sessionmgr_chord_part WHERE group_id = :id"
    return rows_of(url, statement, id=group_id) == [(0,)]


def runs_settle(service: Service, name: str, expected: int) -> None:
    """Assert that a callback runs so often, and not once more while a task goes through."""
    wait_until(lambda: service.counters.value(name) >= expected, timeout=60.0)
    for _ in range(4):
        service.call("add", 1, 1)
    assert service.counters.value(name) == expected


@pytest.mark.parametrize("parts", [20, 200])
def test_callback_runs_once_with_all_results(parts: int, counting: Service) -> None:
    """The callback gets the result of each part, in order, and its parts are forgotten."""
    app, name = counting.app, uuid()
    add, total = signatures(app)
    result = chord([add(i) for i in range(parts)], app=app)(total(name))
    assert result.get(timeout=60.0) == sum(range(parts))
    runs_settle(counting, name, 1)
    assert chord_tables_are_empty_of(counting, result.parent.id)


@pytest.mark.soak
def test_thousand_parts(make_service: Callable[..., Service]) -> None:
    """A chord of a thousand parts is a chord like others."""
    service = make_service("fork", "psycopg")
    add, _ = signatures(service.app)
    collect = service.app.signature("collect")
    result = chord([add(i) for i in range(1000)], app=service.app)(collect)
    assert result.get(timeout=90.0) == list(range(1000))


def in_headers(app: Celery) -> dict[str, tuple[Any, int]]:
    """Return what stands in the header of a chord -> the sum of all results."""
    add, total = signatures(app)

    def grouped(*parts: Any) -> Any:
        return group(parts, app=app)

    def chained(*parts: Any) -> Any:
        return chain(*parts, app=app)

    def ignoring() -> Signature:
        return add(7).set(ignore_result=True)

    return {
        "chains": ([chained(add(1, 1), add(5)), chained(add(2), add(3), add(4))], 16),
        "chord": ([chord([add(1), add(2)], total(), app=app), add(4)], 7),
        "chord of chords": (
            [chord([chord([add(1), add(2)], total(), app=app), add(4)], total(), app=app), add(8)],
            15,
        ),
        "groups": ([grouped(add(1), add(2)), grouped(add(3), add(4)), add(5)], 15),
        "group of groups": ([grouped(grouped(add(1), add(2)), add(3)), add(4)], 10),
        "chain ending in a group": ([chained(add(1), grouped(add(1), add(2))), add(5)], 10),
        "replaced": ([app.signature("replaced", (1,)), add(2)], 103),
        "replaced by a group": ([app.signature("replaced_by_group", (1,)), add(2)], 7),
        "ignored results": ([ignoring(), add(2)], 9),
        "one part": ([add(3)], 3),
    }


HEADERS = (
    "chains",
    "chord",
    "chord of chords",
    "groups",
    "group of groups",
    "chain ending in a group",
    "replaced",
    "replaced by a group",
    "ignored results",
    "one part",
)


@pytest.mark.parametrize("header", HEADERS)
def test_headers(header: str, counting: Service) -> None:
    """Whatever stands in a header, the callback gets the result of each part."""
    name = uuid()
    _, total = signatures(counting.app)
    parts, expected = in_headers(counting.app)[header]
    result = chord(parts, app=counting.app)(total(name))
    assert result.get(timeout=60.0) == expected
    runs_settle(counting, name, 1)


def test_generator_and_empty_headers(counting: Service) -> None:
    """Parts may come from a generator, and there may be none."""
    add, total = signatures(counting.app)
    made = (add(i) for i in range(10))
    assert chord(made, app=counting.app)(total()).get(timeout=60.0) == 45
    assert chord([], app=counting.app)(total()).get(timeout=60.0) == 0


def test_part_that_adds_a_part(counting: Service) -> None:
    """The callback waits for a part that another one has added."""
    add, _ = signatures(counting.app)
    parts = [counting.app.signature("growing", (1,)), add(2)]
    result = chord(parts, app=counting.app)(counting.app.signature("collect"))
    assert sorted(result.get(timeout=60.0)) == [1, 2, 1001]


def test_group_in_a_chain_becomes_a_chord(counting: Service) -> None:
    """What follows a group in a chain gets the results of the group."""
    add, total = signatures(counting.app)
    parts = group([add(1), add(2)], app=counting.app)
    result = chain(parts, total(), add(10), app=counting.app)()
    assert result.get(timeout=60.0) == 13


def test_group_as_callback(counting: Service) -> None:
    """Each task of a group gets the results."""
    add, total = signatures(counting.app)
    body = group([total(), total()], app=counting.app)
    result = chord([add(1), add(2)], app=counting.app)(body)
    assert result.get(timeout=60.0) == [3, 3]


def chords_as_callbacks(app: Celery) -> dict[str, tuple[Any, int]]:
    """Return what has a chord as the callback of a chord -> its result."""
    add, total = signatures(app)

    def totals() -> group:
        return group([total(), total()], app=app)

    inner = chord(totals(), total(), app=app)
    innermost = chord(totals(), chord(totals(), total(), app=app), app=app)
    return {
        "chain of groups": (chain(group([add(1), add(2)], app=app), totals(), total(), app=app), 6),
        "chord": (chord([add(1), add(2)], inner, app=app), 6),
        "chord of a chord": (chord([add(1), add(2)], innermost, app=app), 12),
    }


ONE_CONNECTION = {"database_engine_options": {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}}
"""Settings with which a process has one connection to its database."""


FRUGAL = (*CHORD_SERVICES, ("threads", "psycopg"), ("gevent", "psycopg"))


@pytest.fixture(params=FRUGAL, ids="-".join)
def frugal(
    request: pytest.FixtureRequest, redis_server: Redis, make_database: Callable[..., Database]
) -> Iterator[Service]:
    """Run a worker with one connection in each process, for each kind of database."""
    pool, driver = request.param
    database = None if driver == "sqlite" else make_database(driver)
    with serving(redis_server, pool, database, **ONE_CONNECTION) as service:
        yield service


def test_chord_as_callback_of_a_chord(frugal: Service) -> None:
    """A callback that is a chord is begun with the connection that the last part has."""
    for body, (signature, expected) in chords_as_callbacks(frugal.app).items():
        assert signature.apply_async().get(timeout=30.0) == expected, body


def test_failing_part_of_a_chord_as_callback(frugal: Service) -> None:
    """It fails the callback of that chord, also while the chord is still being published."""
    add, total = signatures(frugal.app)
    fail = frugal.app.signature("fail", ("bad part",), immutable=True)
    inner = chord([fail] + [total()] * 50, total(), app=frugal.app)
    result = chord([add(1), add(2)], inner, app=frugal.app).apply_async()
    with pytest.raises(ChordError, match="bad part"):
        frugal.app.AsyncResult(result.id).get(timeout=30.0)


def test_failing_part_fails_the_callback(counting: Service) -> None:
    """The callback fails with a ChordError that names the part, and its errback is called once."""
    app, name = counting.app, uuid()
    add, total = signatures(app)
    body = total(name).on_error(app.signature("errback", kwargs={"name": name}))
    result = chord([add(1), app.signature("fail", ("bad part",)), add(2)], app=app)(body)
    with pytest.raises(ChordError, match=r"LookupError.*bad part"):
        app.AsyncResult(result.id).get(timeout=60.0)
    wait_until(lambda: counting.counters.value(f"{name}-ChordError") == 1)
    runs_settle(counting, name, 0)
    assert counting.counters.value(f"{name}-ChordError") == 1


def test_failing_chain_in_a_header_fails_the_callback(counting: Service) -> None:
    """A chain that fails in its first task is a part that failed."""
    app = counting.app
    add, total = signatures(app)
    failing = chain(app.signature("fail", ("bad link",)), add(1), app=app)
    result = chord([add(1), failing], app=app)(total())
    with pytest.raises(ChordError, match="bad link"):
        app.AsyncResult(result.id).get(timeout=60.0)


def test_parts_that_are_delivered_twice_count_once(counting: Service) -> None:
    """When every message of a header comes twice, at the same time, the callback runs once."""
    app, name, group_id = counting.app, uuid(), uuid()
    add, total = signatures(app)
    body = total(name)
    body.freeze()
    app.backend.apply_chord((group_id, []), body)
    app.backend.set_chord_size(group_id, 20)
    parts = [
        add(i).set(task_id=uuid(), group_id=group_id, group_index=i, chord=body) for i in range(20)
    ]

    def send() -> None:
        for part in parts:
            part.apply_async()

    in_threads([send, send])
    assert app.AsyncResult(body.id).get(timeout=60.0) == sum(range(20))
    for part in parts:
        part.apply_async()
    runs_settle(counting, name, 1)


def test_no_polling_task_is_run(counting: Service) -> None:
    """Nothing polls: Celery's task ``chord_unlock`` is never sent."""
    add, total = signatures(counting.app)
    chord([add(1), add(2)], app=counting.app)(total()).get(timeout=60.0)
    assert "Task celery.chord_unlock[" not in counting.worker.text()


def test_part_costs_the_same_in_a_large_chord(counting: Service) -> None:
    """Storing and counting a part takes as many statements in a chord of 1,000 as in one of 20."""
    backend, (_, total) = counting.app.backend, signatures(counting.app)
    numbers = set()
    for size in (20, 1000):
        group_id = uuid()
        backend.apply_chord((group_id, []), total())
        backend.set_chord_size(group_id, size)
        for position in range(size - 1):
            part = Context(id=uuid(), group=group_id, group_index=position, chord=dict(total()))
            with counted_statements(backend.store) as statements:
                backend.mark_as_done(part.id, 1, part)
            numbers.add(len(statements))
    assert len(numbers) == 1


def test_callback_finds_the_results_of_all_parts(counting: Service) -> None:
    """When it runs, no part is on its way to the database any more."""
    add, _ = signatures(counting.app)
    chords = []
    for _ in range(50):
        ids = [uuid(), uuid()]
        header = [add(1).set(task_id=each) for each in ids]
        callback = counting.app.signature("states", kwargs={"ids": ids})
        chords.append(chord(header, app=counting.app)(callback))
    found = [each.get(timeout=60.0) for each in chords]
    assert found == [["SUCCESS", "SUCCESS"]] * len(chords)


@pytest.mark.parametrize("last", [False, True])
def test_part_that_cannot_be_stored_is_no_success(
    last: bool, make_database: Callable[..., Database]
) -> None:
    """The chord goes on with its failure: nobody is told a result that is not kept."""
    database = make_database("pymysql")
    make_celery_tables(database.url, "5.2")  # results of 64 KiB at most, and no chords
    url = f"sessionmgr+{database.url.render_as_string(hide_password=False)}"
    settings = {"broker_url": "memory://", "result_backend": url}
    app = make_app({**settings, "database_create_tables_at_setup": False}, "test")
    _, total = signatures(app)
    body, group_id = total(), uuid()
    body.freeze()
    with closing(app.backend.store):
        app.backend.apply_chord((group_id, []), body)
        app.backend.set_chord_size(group_id, 1 if last else 2)
        part, other = (
            Context(id=uuid(), group=group_id, group_index=index, chord=dict(body))
            for index in range(2)
        )
        with published() as names:
            with pytest.raises(ResultTooLongError):
                app.backend.mark_as_done(part.id, "x" * 100_000, part)
            app.backend.mark_as_failure(part.id, ValueError("too long"), request=part)
            if not last:
                app.backend.mark_as_done(other.id, 1, other)
        assert names == []
        assert app.AsyncResult(part.id).state == "FAILURE"
        assert isinstance(app.AsyncResult(body.id).result, ChordError)


@contextmanager
def published() -> Iterator[list[str]]:
    """Give a list that grows by the name of each task that this process sends."""
    names: list[str] = []

    def note(sender: str, **_: object) -> None:
        names.append(sender)

    after_task_publish.connect(note)
    try:
        yield names
    finally:
        after_task_publish.disconnect(note)


def wrapped_time_limit() -> Exception:
    """Return what a serializer makes of a soft time limit that interrupts it."""
    error = EncodeError("SoftTimeLimitExceeded()")
    error.__cause__ = SoftTimeLimitExceeded()
    return error


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded, TimeoutError, wrapped_time_limit])
@pytest.mark.parametrize(
    ("statement", "sent"),
    [("UPDATE sessionmgr_chord", 0), ("DELETE FROM sessionmgr_chord_part", 1)],
    ids=["before", "after"],
)
def test_interrupted_publishing(
    statement: str, sent: int, error: Callable[[], Exception], tmp_path: Path
) -> None:
    """A part that is interrupted before or after it publishes fails no callback, nor repeats it."""
    backend = f"sessionmgr+sqlite:///{tmp_path / 'results.db'}"
    app, group_id = make_app({"broker_url": "memory://", "result_backend": backend}, ""), uuid()
    store, body = app.backend.store, app.signature("total")
    body.freeze()
    errors = [error()]
    expected = type(errors[0])

    def interrupt(_connection: object, clause: object, *_: object) -> None:
        if str(clause).startswith(statement) and errors:
            raise errors.pop()

    store.chords.begin(group_id)
    store.chords.set_size(group_id, 1)
    event.listen(store.manager.get_engine(store.dburi), "before_execute", interrupt)
    part = Context(id=uuid(), group=group_id, group_index=0, chord=dict(body))
    with published() as names, closing(store):
        with pytest.raises(expected):
            app.backend.on_chord_part_return(part, "SUCCESS", 5)
        assert (names, app.AsyncResult(body.id).state) == (["total"] * sent, "PENDING")
        for _ in range(2):
            app.backend.on_chord_part_return(part, "SUCCESS", 5)
        assert (names, app.AsyncResult(body.id).state) == (["total"], "PENDING")


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_part_whose_worker_is_killed(
    driver: str, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """A part is delivered again when its process was killed, and the callback runs once."""
    database = None if driver == "sqlite" else make_database(driver)
    with serving(redis_server, "fork", database, **LATE) as service:
        app, name = service.app, uuid()
        add, total = signatures(app)
        parts = [add(i) for i in range(10)]
        parts[3:3] = [app.signature("die_once", (uuid(), 1000))]
        parts[7:7] = [app.signature("die_once", (uuid(), 1000))]
        result = chord(parts, app=app)(total(name))
        assert result.get(timeout=60.0) == 2045
        runs_settle(service, name, 1)


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_last_part_whose_worker_is_killed_before_it_goes_on(
    driver: str, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """A process is killed that had counted the last part: delivered again, that part goes on."""
    database = None if driver == "sqlite" else make_database(driver)
    environment = {PUBLISHING_DIES: "1"}
    with serving(redis_server, "fork", database, environment=environment, **LATE) as service:
        app, name = service.app, uuid()
        add, total = signatures(app)
        result = chord([add(i) for i in range(5)], app=app)(total(name))
        assert result.get(timeout=60.0) == 10
        runs_settle(service, name, 1)
        assert service.counters.value("publishing") == 2


@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_worker_killed_while_it_publishes_a_chord(
    driver: str, redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """A process is killed that has published a part of a chord: its callback runs once."""
    database = None if driver == "sqlite" else make_database(driver)
    environment = {PUBLISHING_DIES: "2"}
    with serving(redis_server, "fork", database, environment=environment, **LATE) as service:
        app, name = service.app, uuid()
        add, total = signatures(app)
        inner = chord([total(), total()], total(name), app=app)
        result = chord([add(i) for i in range(5)], inner, app=app).apply_async()
        assert result.get(timeout=60.0) == 20
        runs_settle(service, name, 1)
        assert service.counters.value("publishing") == 5


def test_without_tables_for_chords(
    redis_server: Redis, make_database: Callable[..., Database]
) -> None:
    """Without the tables for chords, and the right to make them, Celery polls."""
    database = make_database("psycopg")
    make_celery_tables(database.url, "5.7", extended=True)
    database.server.query(f"ALTER DATABASE {database.name} OWNER TO postgres")
    with serving(redis_server, "fork", database, result_chord_retry_interval=0.1) as service:
        add, total = signatures(service.app)
        result = chord([add(1), add(2)], app=service.app)(total())
        assert result.get(timeout=60.0) == 3
        wait_until(lambda: "Task celery.chord_unlock[" in service.worker.text())

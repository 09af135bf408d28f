"""``ResultStore.chords``: parts are counted, and one goes on, whatever happens at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event, update
from sqlalchemy.exc import DBAPIError

from sessionmgr import ResultStore
from sessionmgr.results.records import utc_now
from sessionmgr.results.report import count_expired
from tests.helpers import wait_until
from tests.results_helpers import plain_engine
from tests.tcp_proxy import TCPProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from sqlalchemy import URL

    from sessionmgr.results.chords import ChordPart, Chords
    from tests.servers import Database

pytest_plugins = ["tests.results_fixtures"]

ONE_PER_DATABASE = pytest.mark.parametrize("url", ["psycopg", "pymysql", "sqlite"], indirect=True)


def applied(chords: Chords, group_id: str, size: int) -> None:
    """Apply a chord."""
    chords.begin(group_id)
    chords.set_size(group_id, size)


def part(chords: Chords, group_id: str, position: int) -> bool:
    """Have a part return, and tell whether the chord is complete."""
    return chords.part_returned(group_id, f"part-{position}", position, "SUCCESS", b"%d" % position)


def fired(chords: Chords, group_id: str) -> list[bytes | None]:
    """Go on from a chord, and return the results of its parts; none, if that was done."""
    results: list[bytes | None] = []

    def publish(parts: list[ChordPart]) -> None:
        results.extend(each.result for each in parts)

    chords.fire(group_id, publish)
    return results


def test_restart_of_the_database_is_seen_through(make_database: Callable[..., Database]) -> None:
    """A chord goes on, once, when its database is away for a while and comes back."""
    attempts: list[int] = []

    def come_back(*_: object) -> None:
        attempts.append(1)
        if len(attempts) == 8:
            proxy.accept()

    with (
        TCPProxy(make_database("psycopg").url) as proxy,
        ResultStore(proxy.url, attempts=1) as store,
    ):
        applied(store.chords, "chord", 1)
        assert part(store.chords, "chord", 0)
        event.listen(store.manager.get_engine(proxy.url), "do_connect", come_back)
        proxy.refuse()
        proxy.cut()
        assert fired(store.chords, "chord") == [b"0"]
        assert len(attempts) >= 8
        assert fired(store.chords, "chord") == []


def complete_outer(chords: Chords) -> None:
    """Have a chord with one part be complete."""
    applied(chords, "outer", 1)
    assert part(chords, "outer", 0)


@pytest.fixture
def in_thread() -> Iterator[Callable[..., Future[bool]]]:
    """Return what starts a function in a thread of its own."""
    with ThreadPoolExecutor() as threads:
        yield threads.submit


@ONE_PER_DATABASE
def test_part_of_a_chord_that_is_being_published(
    store: ResultStore, url: URL | str, in_thread: Callable[..., Future[bool]]
) -> None:
    """When all parts return while their chord is still being published, one goes on from it."""
    complete_outer(store.chords)
    with ResultStore(url) as other:
        other.prepare()
        returning: list[Future[bool]] = []
        went_on: list[bytes | None] = []

        def publish(_: object) -> None:
            store.chords.begin("inner", lambda: went_on.extend(fired(store.chords, "inner")))
            store.chords.set_size("inner", 2)
            returning.extend(in_thread(part, other.chords, "inner", i) for i in range(2))
            done = wait(returning, timeout=0.5).done
            # SQLite has one lock for all
            assert len(done) == (0 if store.describe().startswith("sqlite") else 2)

        assert store.chords.fire("outer", publish)
        if any(each.result(30.0) for each in returning):
            went_on += fired(other.chords, "inner")
        assert went_on == [b"0", b"1"]
        assert fired(store.chords, "inner") == []


@ONE_PER_DATABASE
def test_chord_that_is_published_again(store: ResultStore) -> None:
    """What is begun while a publishing fails is undone; parts that returned stay counted."""
    complete_outer(store.chords)

    def publish_a_half(_: object) -> None:
        applied(store.chords, "inner", 2)
        raise LookupError("half-way")

    with pytest.raises(LookupError, match="half-way"):
        store.chords.fire("outer", publish_a_half)
    assert not part(store.chords, "inner", 0)
    assert not part(store.chords, "inner", 1)  # the number of parts went with the claim
    assert store.chords.fire("outer", lambda _: applied(store.chords, "inner", 2))
    assert part(store.chords, "inner", 0)  # delivered again: it was counted before
    assert fired(store.chords, "inner") == [b"0", b"1"]
    assert not part(store.chords, "inner", 1)


@ONE_PER_DATABASE
def test_chord_that_cannot_go_on_while_another_is_published(store: ResultStore) -> None:
    """Where one chord goes on from a publishing and fails, it is given up, and it alone."""
    complete_outer(store.chords)
    gave_up: list[bool] = []

    def cannot(_: object) -> None:
        applied(store.chords, "undone", 1)
        raise LookupError("part failed")

    def go_on() -> None:
        with pytest.raises(LookupError, match="part failed"):
            store.chords.fire("inner", cannot)
        gave_up.append(store.chords.give_up("inner"))

    def publish(_: object) -> None:
        store.chords.begin("inner", go_on)
        part(store.chords, "inner", 0)
        store.chords.set_size("inner", 1)

    assert store.chords.fire("outer", publish)
    assert gave_up == [True]
    assert fired(store.chords, "inner") == fired(store.chords, "outer") == []
    assert not part(store.chords, "undone", 0)


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_connection_lost_while_a_chord_is_published(
    driver: str, make_database: Callable[..., Database]
) -> None:
    """When a connection is lost before the commit, a chord is published again, others are not."""
    database = make_database(driver)
    runs = {"outer": 0, "plain": 0}
    with ResultStore(database.url) as store:
        complete_outer(store.chords)
        applied(store.chords, "plain", 1)
        part(store.chords, "plain", 0)

        def publish(group_id: str) -> None:
            runs[group_id] += 1
            if group_id == "outer":
                applied(store.chords, "inner", 1)
            if runs[group_id] == 1:
                database.server.kill(*database.connections())
                wait_until(lambda: not database.connections())

        for group_id in runs:
            assert store.chords.fire(group_id, lambda _, group_id=group_id: publish(group_id))
        assert runs == {"outer": 2, "plain": 1}
        assert part(store.chords, "inner", 0)


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_result_is_stored_also_where_another_has_gone_on(
    driver: str, make_database: Callable[..., Database]
) -> None:
    """The claim is lost with the connection, and another delivery has it before the next try."""
    database = make_database(driver)
    with ResultStore(database.url) as store, ResultStore(database.url) as other:
        applied(store.chords, "chord", 1)
        part(store.chords, "chord", 0)
        other.prepare()

        def publish(_: object) -> None:
            database.server.kill(*database.connections())
            wait_until(lambda: not database.connections())
            assert other.chords.fire("chord", lambda _: None)

        assert store.chords.fire("chord", publish, lambda: store.store("0", "SUCCESS", b"mine"))
        assert store.get("0").result == b"mine"  # type: ignore[union-attr]


@ONE_PER_DATABASE
def test_failed_call_fails_the_publishing(store: ResultStore, url: URL | str) -> None:
    """Whoever catches the error of a call while publishing: nothing is committed."""
    complete_outer(store.chords)

    def publish(_: object) -> None:
        applied(store.chords, "inner", 1)
        for _ in range(2):
            with pytest.raises(DBAPIError):
                store.access.call(
                    lambda _, connection: connection.exec_driver_sql("SELECT nothing")
                )

    with pytest.raises(DBAPIError):
        store.chords.fire("outer", publish)
    assert store.chords.fire("outer", lambda _: None)
    with ResultStore(url) as other:
        assert not part(other.chords, "inner", 0)


@ONE_PER_DATABASE
@pytest.mark.parametrize("kind", ["part", "added", "size"])
def test_running_chord_does_not_expire(store: ResultStore, kind: str) -> None:
    """A chord whose last part returned lately is complete, whenever it began; others expire."""
    names = ("running", "forgotten")
    for group_id in names:
        store.save_group(group_id, b"header")
        applied(store.chords, group_id, 3)
        part(store.chords, group_id, 0)
    with plain_engine(store.dburi) as engine, engine.begin() as connection:
        for table in (store.tables.group, store.tables.chord, store.tables.part):
            connection.execute(update(table).values(date_done=utc_now() - timedelta(hours=2)))
    {
        "part": lambda: part(store.chords, "running", 1),
        "added": lambda: store.chords.add("running"),
        "size": lambda: store.chords.set_size("running", 3),
    }[kind]()
    before = utc_now() - timedelta(hours=1)
    assert sum(count_expired(store, before).values()) == 3
    assert store.cleanup(before) == 3
    assert [store.restore_group(group_id) is not None for group_id in names] == [True, False]
    rest = range(1, 4 if kind == "added" else 3)
    assert [part(store.chords, "running", i) for i in rest][-1]
    assert fired(store.chords, "running") == [b"%d" % i for i in range(rest.stop)]


@ONE_PER_DATABASE
def test_chord_that_has_gone_on_is_applied_again(store: ResultStore) -> None:
    """A chord with the id of one that has gone on counts anew, also parts that came late."""
    for _ in range(2):
        applied(store.chords, "outer", 2)
        store.chords.add("outer")
        assert [part(store.chords, "outer", i) for i in range(3)] == [False, False, True]
        assert fired(store.chords, "outer") == [b"0", b"1", b"2"]
        assert not part(store.chords, "outer", 1)

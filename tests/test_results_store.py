"""ResultStore: what it keeps, what it answers, and in how many statements."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url, text

from sessionmgr import ResultStore, TaskResult
from sessionmgr.results.records import FIELDS
from tests.results_helpers import (
    ELSEWHERE,
    RESULT_DRIVERS,
    CountingProxy,
    be_elsewhere,
    counted_statements,
    make_celery_tables,
    rows_of,
)
from tests.schema_helpers import database_url
from tests.servers import DRIVERS, Database

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

pytest_plugins = ["tests.results_fixtures"]

WHEN = datetime(2024, 2, 29, 12, 30, 15)  # noqa: DTZ001 - as the table has it


@pytest.fixture(params=[*RESULT_DRIVERS, *ELSEWHERE])
def url(
    request: pytest.FixtureRequest,
    make_database: Callable[..., Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> URL | str:
    """Return the URL of an empty database, with each driver, and of those that are not known."""
    return database_url(be_elsewhere(request.param, monkeypatch), make_database, tmp_path)


# -- one result


def test_everything_comes_back(url: URL | str) -> None:
    """An extended store gives back every field as it was given."""
    stored = TaskResult(
        "42", "FAILURE", bytes(range(256)), "Traceback: naïve",
        WHEN, b"[]", "tasks.add", b"(1,)", b"{}", "worker@host", 3, "mail", b"{'a': 1}",
    )  # fmt: skip
    fields = {name: getattr(stored, name) for name in FIELDS}
    with ResultStore(url, extended=True) as store:
        assert store.get("42") is None
        assert not store.exists("42")
        assert store.store(**fields) is True
        assert store.get("42") == stored
        assert store.exists("42")
        assert store.get_many(["42"]) == {"42": stored}


def test_plain_store_leaves_extended_columns_alone(url: URL | str) -> None:
    """A store that is not extended neither reads nor writes what an extended one wrote."""
    with ResultStore(url, extended=True) as extended, ResultStore(url) as plain:
        extended.store("1", "STARTED", name="tasks.add", retries=2)
        assert plain.get("1") == TaskResult("1", "STARTED")
        assert plain.store("1", "SUCCESS", b"2", date_done=WHEN)
        found = extended.get("1")
    assert found == TaskResult("1", "SUCCESS", b"2", date_done=WHEN, name="tasks.add", retries=2)


def test_success_is_never_replaced(store: ResultStore) -> None:
    """A store is answered with True until there is a SUCCESS, with False from then on."""
    for chain in (
        ["STARTED", "FAILURE", "SUCCESS", "FAILURE", "STARTED", "SUCCESS"],
        ["SUCCESS", "SUCCESS", "RETRY"],
        ["PENDING", "STARTED", "STARTED", "RETRY", "REVOKED", "FAILURE", "FAILURE"],
    ):
        task_id = "-".join(chain)
        last = chain.index("SUCCESS") if "SUCCESS" in chain else len(chain) - 1
        answers = [store.store(task_id, state, b"%d" % i) for i, state in enumerate(chain)]
        assert answers == [i <= last for i in range(len(chain))]
        found = store.get(task_id)
        assert found is not None
        assert (found.status, found.result) == (chain[last], b"%d" % last)


@pytest.mark.parametrize("charset", ["latin1", "utf8mb4", "utf16"])
@pytest.mark.parametrize("driver", ["pymysql", "mysqlclient"])
def test_states_that_differ_in_case_are_replaced(
    make_database: Callable[..., Database], driver: str, charset: str
) -> None:
    """Only SUCCESS is final on MySQL too, whatever the characters of table and connection are."""
    url = make_database(driver).url
    make_celery_tables(url, "5.7")
    rows_of(url, f"ALTER TABLE celery_taskmeta MODIFY status VARCHAR(50) CHARACTER SET {charset}")
    for client in ("utf8mb4", "latin1"):
        with ResultStore(url.update_query_dict({"charset": client})) as store:
            states = ["success", "Success", "FAILURE", "SUCCESS", "success", "FAILURE"]
            told = [store.store(client, state) for state in states]
            assert told == [True, True, True, True, False, False]
            store.store_many([TaskResult(client, "Success"), TaskResult("new", "Success")])
            store.store_many([TaskResult("new", "RETRY")])
            found = {task.task_id: task.status for task in store.get_many([client, "new"]).values()}
            assert found == {client: "SUCCESS", "new": "RETRY"}


def test_same_failure_again_is_stored(store: ResultStore) -> None:
    """A row that does not change by it counts as stored, on MySQL too."""
    assert store.store("1", "FAILURE", b"x", date_done=WHEN)
    assert store.store("1", "FAILURE", b"x", date_done=WHEN)


def test_answers_do_not_depend_on_what_was_ignored_before(store: ResultStore) -> None:
    """After an ignored store, the next one of the connection is answered for itself."""
    store.store("done", "SUCCESS")
    for number in range(3):
        assert store.store("done", "STARTED") is False
        assert store.store(f"new {number}", "STARTED") is True
        assert store.store(f"new {number}", "FAILURE") is True


def test_row_without_status_is_replaced(store: ResultStore, url: URL | str) -> None:
    """A row whose status is NULL counts as one that is not finished."""
    store.store("1", "STARTED")
    rows_of(url, "UPDATE celery_taskmeta SET status = NULL")
    assert store.store("1", "SUCCESS", b"1") is True
    assert store.store("1", "FAILURE", b"2") is False
    found = store.get("1")
    assert found is not None
    assert (found.status, found.result) == ("SUCCESS", b"1")


def test_stamps_stay_when_a_later_store_has_none(url: URL | str) -> None:
    """Stamps are kept by a store without stamps, and replaced by one with others."""
    with ResultStore(url, extended=True) as store:
        store.store("1", "STARTED", stamps=b"one", name="a")
        store.store("1", "RETRY", name="b")
        found = store.get("1")
        assert found is not None
        assert (found.stamps, found.name) == (b"one", "b")
        store.store("1", "SUCCESS", stamps=b"two")
        found = store.get("1")
        assert found is not None
        assert (found.stamps, found.name) == (b"two", None)


@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE", "REVOKED", "STARTED", "RETRY", "MINE"])
def test_ready_states_get_a_date(local: ResultStore, status: str) -> None:
    """date_done is the present in UTC for states in which tasks have ended, else NULL."""
    before = datetime.now(timezone.utc).replace(tzinfo=None)
    local.store("1", status)
    local.store_many([TaskResult("2", status)])
    for found in local.get_many(["1", "2"]).values():
        assert found.ready is (status in ("SUCCESS", "FAILURE", "REVOKED"))
        assert (found.date_done is not None) is found.ready
        if found.date_done is not None:
            assert before <= found.date_done <= before + timedelta(minutes=1)


def test_time_zones_are_turned_into_utc(store: ResultStore) -> None:
    """A date with a time zone is stored in UTC, one without as it is."""
    there = WHEN.replace(tzinfo=timezone(timedelta(hours=-5)))
    store.store("aware", "SUCCESS", date_done=there)
    store.store("naive", "SUCCESS", date_done=WHEN)
    dates = {
        found.task_id: found.date_done for found in store.get_many(["aware", "naive"]).values()
    }
    assert dates == {"aware": WHEN + timedelta(hours=5), "naive": WHEN}


def test_ids_are_any_text(store: ResultStore) -> None:
    """Ids of up to 155 characters of any kind come back by every way."""
    ids = ["x" * 155, "a'b\"c\\d%s%(x)s:name", "two words; --", "naïve"]
    for task_id in ids:
        assert store.store(task_id, "SUCCESS", b"1")
        found = store.get(task_id)
        assert found is not None
        assert found.task_id == task_id
    assert store.get_many([*ids, "other"]).keys() == set(ids)
    for task_id in ids:
        store.forget(task_id)
        assert not store.exists(task_id)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "sqlite"])
def test_ids_in_every_script(
    make_database: Callable[..., Database], tmp_path: Path, driver: str
) -> None:
    """Ids, tracebacks and names beyond Latin script come back by every way."""
    word = "日本-\N{GRINNING FACE}"
    with ResultStore(database_url(driver, make_database, tmp_path), extended=True) as store:
        store.store(word, "FAILURE", traceback=word, name=word)
        store.store_many([TaskResult(word * 2, "FAILURE", traceback=word)])
        found = store.get_many([word, word * 2])
        assert [each.traceback for each in found.values()] == [word, word]
        assert found[word].name == word


@pytest.mark.parametrize("driver", ["pymysql", "mysqlclient"])
def test_ids_in_every_script_where_mysql_has_utf8(
    make_database: Callable[..., Database], driver: str
) -> None:
    """A MariaDB database whose character set is utf8mb4 keeps them too."""
    database, word = make_database(driver), "日本-\N{GRINNING FACE}"
    database.server.query(f"ALTER DATABASE {database.name} CHARACTER SET utf8mb4")
    with ResultStore(database.url) as store:
        store.store(word, "FAILURE", traceback=word)
        found = store.get(word)
        assert found is not None
        assert (found.task_id, found.traceback) == (word, word)
        assert list(store.get_many([word])) == [word]


# -- many results


def test_get_many_takes_any_iterable(store: ResultStore) -> None:
    """Lists, generators, sets and duplicates are fine; ids that are not known are left out."""
    store.store_many([TaskResult(f"{i}", "SUCCESS", str(i).encode()) for i in range(5)])
    expected = {f"{i}": str(i).encode() for i in range(5)}
    asked = [str(i) for i in range(5)]
    for ids in (asked, (each for each in asked), set(asked), asked * 3, [*asked, "none", "nada"]):
        found = store.get_many(ids)
        assert {task_id: each.result for task_id, each in found.items()} == expected
    assert store.get_many(["none"]) == {}


def test_nothing_asked_is_nothing_said(store: ResultStore) -> None:
    """Without ids or results no statement is made."""
    store.prepare()
    with counted_statements(store) as statements:
        assert store.get_many([]) == {}
        assert store.get_many(iter(())) == {}
        store.forget([])
        store.store_many([])
    assert statements == []


def test_five_thousand_at_once(store: ResultStore) -> None:
    """store_many takes 5,000 results, get_many asks for them in one statement, forget too."""
    ids = [f"task-{i}" for i in range(5000)]
    store.store_many(TaskResult(each, "SUCCESS", each.encode()) for each in ids)
    with counted_statements(store) as statements:
        found = store.get_many(ids)
        assert len(statements) == 1
        store.forget(ids[1:])
        assert len(statements) == 2
    assert found.keys() == set(ids)
    assert all(each.result == task_id.encode() for task_id, each in found.items())
    assert list(store.get_many(ids)) == ids[:1]


def test_last_of_several_results_counts_but_success_stays(store: ResultStore) -> None:
    """In store_many as in store; what was a SUCCESS before stays as well."""
    store.store("old", "SUCCESS", b"old")
    store.store("running", "STARTED")
    store.store_many(
        [
            TaskResult("a", "STARTED", b"1"),
            TaskResult("a", "FAILURE", b"2"),
            TaskResult("b", "FAILURE", b"1"),
            TaskResult("b", "SUCCESS", b"2"),
            TaskResult("b", "FAILURE", b"3"),
            TaskResult("old", "FAILURE", b"new"),
            TaskResult("old", "SUCCESS", b"new"),
            TaskResult("running", "RETRY", b"new"),
        ]
    )
    found = store.get_many(["a", "b", "old", "running"])
    assert {each.task_id: (each.status, each.result) for each in found.values()} == {
        "a": ("FAILURE", b"2"),
        "b": ("SUCCESS", b"2"),
        "old": ("SUCCESS", b"old"),
        "running": ("RETRY", b"new"),
    }


def test_store_many_stores_all_or_nothing(store: ResultStore, url: URL | str) -> None:
    """When the database refuses the last row, none of the others is there."""
    store.prepare()
    backend = make_url(url).get_backend_name()
    if backend == "sqlite":
        refuse = (
            "CREATE TRIGGER refuse BEFORE INSERT ON celery_taskmeta WHEN NEW.task_id = 'z'"
            " BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
    else:
        refuse = "ALTER TABLE celery_taskmeta ADD CONSTRAINT refused CHECK (task_id <> 'z')"
    rows_of(url, refuse)
    ids = [f"{i}" for i in range(2500)]
    with pytest.raises(Exception, match="refused") as caught:
        store.store_many(TaskResult(each, "FAILURE") for each in [*ids, "z"])
    if backend == "mysql":
        assert len(str(caught.value)) < 3000, "not a statement of a thousand rows"
    with pytest.raises(Exception, match="refused"):
        store.store_many([TaskResult("a", "SUCCESS"), TaskResult("z", "STARTED")])
    assert store.get_many([*ids, "a"]) == {}
    assert store.store("after", "SUCCESS"), "the connection is in no transaction"
    assert rows_of(url, "SELECT task_id FROM celery_taskmeta") == [("after",)]


# -- groups and forgetting


def test_groups_are_saved_replaced_and_deleted(store: ResultStore) -> None:
    """A group comes back with the time it was saved; a second save replaces the first."""
    before = datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0)
    assert store.restore_group("g") is None
    store.save_group("g", b"first")
    store.save_group("g", b"second")
    store.save_group("other", b"other")
    found = store.restore_group("g")
    assert found is not None
    assert found[0] == b"second"
    assert before <= found[1] <= before + timedelta(minutes=1)
    store.delete_group("g")
    store.delete_group("none")
    assert store.restore_group("g") is None
    assert store.restore_group("other") is not None


def test_forget_takes_one_id_or_several(store: ResultStore) -> None:
    """What is forgotten is gone, a SUCCESS too, and may be stored anew."""
    store.store_many([TaskResult(each, "SUCCESS", b"old") for each in "abcd"])
    store.forget("a")
    store.forget(each for each in ("b", "b", "none"))
    assert sorted(store.get_many(list("abcd"))) == ["c", "d"]
    assert store.store("a", "FAILURE", b"new")


# -- round trips


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_call_is_one_round_trip(make_database: Callable[..., Database], driver: str) -> None:
    """Each call is one question to the server and its answer: no BEGIN, COMMIT or ROLLBACK."""
    database = make_database(driver)
    options = {"ping_if_idle": None}
    with CountingProxy(database.url) as proxy, ResultStore(proxy.url, engine_options=options) as s:
        calls: dict[str, Callable[[], Any]] = {
            "new": lambda: s.store("new", "STARTED", b"1"),
            "known": lambda: s.store("known", "SUCCESS", b"1"),
            "ignored": lambda: s.store("known", "FAILURE", b"2"),
            "get": lambda: s.get("known"),
            "get_many": lambda: s.get_many(["known", "new", "none"]),
            "exists": lambda: s.exists("known"),
            "save_group": lambda: s.save_group("g", b"1"),
            "restore_group": lambda: s.restore_group("g"),
            "delete_group": lambda: s.delete_group("g"),
            "forget": lambda: s.forget("new"),
        }
        for call in list(calls.values()) * 7:  # psycopg prepares what it was given five times
            call()
        trips = {}
        for name, call in calls.items():
            before = proxy.trips
            call()
            trips[name] = proxy.trips - before
    assert trips == dict.fromkeys(calls, 1)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_postgresql_is_told_nothing_but_the_upsert(
    make_database: Callable[..., Database], driver: str
) -> None:
    """Its log has one INSERT for each store of a new connection's, and no transaction around it."""
    database = make_database(driver)
    with ResultStore(database.url) as store:
        store.prepare()
        database.server.query(f"ALTER DATABASE {database.name} SET log_statement = 'all'")
        store.manager.dispose()  # for the setting holds for new connections
        store.exists("1")
        mark = database.server.log_mark()
        for state in ("STARTED", "SUCCESS", "FAILURE"):
            store.store("1", state)
        lines = [
            line.split("statement: ")[-1].split("execute <unnamed>: ")[-1]
            for line in database.server.log_text(mark).splitlines()
            if f"@{database.name} LOG: " in line and ("statement: " in line or "execute" in line)
        ]
    assert [line.partition(" (")[0] for line in lines] == ["INSERT INTO celery_taskmeta"] * 3


@pytest.mark.parametrize("driver", ["pymysql", "mysqlclient"])
def test_mariadb_is_asked_one_question_for_each_store(
    make_database: Callable[..., Database], driver: str
) -> None:
    """Its own count of questions grows by one with each store."""
    with ResultStore(make_database(driver).url) as store:
        store.prepare()
        questions = text("SHOW SESSION STATUS LIKE 'Questions'")

        def count() -> int:
            with store.manager.get_engine(store.dburi).connect() as connection:
                return int(connection.execute(questions).one()[1])

        count()
        around = -count() + count()
        before = count()
        for state in ("STARTED", "SUCCESS", "FAILURE"):
            store.store("1", state)
        assert count() - before - around == 3


@pytest.mark.parametrize(
    ("driver", "ids", "most"),
    [
        ("psycopg", None, 10),
        ("pymysql", None, 10),
        ("mysqlclient", None, 10),
        ("pymysql", "sequence", 10),
        ("mysqlclient", "auto", 10),
    ],
)
def test_five_thousand_results_take_few_round_trips(
    make_database: Callable[..., Database], driver: str, ids: str | None, most: int
) -> None:
    """store_many goes to the server once for a thousand rows, wherever their ids come from."""
    database = make_database(driver)
    if ids is not None:
        make_celery_tables(database.url, "5.7", ids=ids)
    rows = [TaskResult(f"{i}", "SUCCESS", b"1") for i in range(5000)]
    with CountingProxy(database.url) as proxy, ResultStore(proxy.url) as store:
        store.prepare()
        store.store("0", "FAILURE")
        before = proxy.trips
        with counted_statements(store) as statements:
            store.store_many(rows)
        assert sum(each.startswith("INSERT") for each in statements) == 5
        assert proxy.trips - before <= most
        assert len(store.get_many(str(i) for i in range(5000))) == 5000
    numbers = rows_of(database.url, "SELECT count(DISTINCT id) FROM celery_taskmeta WHERE id > 0")
    assert numbers == [(5000,)]

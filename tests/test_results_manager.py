"""Where a store has its connections from, its tables, and its configuration."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import inspect, make_url

from sessionmgr import ResultStore, SessionManager, TaskResult
from tests.items import Item, ItemBase, item_names
from tests.results_helpers import (
    plain_engine,
    rows_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL, Engine

    from tests.servers import Database

pytest_plugins = ["tests.results_fixtures"]


def serializable(engine: Engine) -> None:
    """Set a level on an engine, as an ``engine_callback``."""
    engine.update_execution_options(isolation_level="SERIALIZABLE")


# -- where connections come from


def test_shared_manager_is_not_disturbed(url: URL | str) -> None:
    """A store on the user's manager commits at once, in the midst of the user's transaction."""
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        store = ResultStore(url, manager=manager)
        store.prepare()
        sqlite = make_url(url).get_backend_name() == "sqlite"
        with manager.session_factory(url) as session:
            if not sqlite:  # which has one writer
                session.add(Item(name="row"))
                session.flush()
            assert store.store("1", "SUCCESS", b"1")
            assert rows_of(url, "SELECT task_id FROM celery_taskmeta") == [("1",)]
            store.store_many([TaskResult("2", "SUCCESS")])
            session.rollback()
        store.close()
        with manager.begin(url) as session:
            assert item_names(session) == []
            session.add(Item(name="row"))
        with manager.session_factory(url) as session:
            session.add(Item(name="undone"))
            session.flush()
        with manager.session_factory(url) as session:
            assert item_names(session) == ["row"], "its connections are in no autocommit"
            assert manager.get_engine(url).pool.checkedout() == 1  # type: ignore[attr-defined]
        assert store.get_many(["1", "2"]).keys() == {"1", "2"}, "close() left the manager open"


def test_bind_key_names_the_database(tmp_path: Path) -> None:
    """With a manager a store takes a bind key, and its errors name it."""
    binds = {"results": f"sqlite:///{tmp_path / 'results.db'}", "other": "sqlite://"}
    with SessionManager(binds=binds) as manager:
        store = ResultStore("results", manager=manager)
        assert store.store("1", "SUCCESS", b"1")
        assert "'results'" in repr(store)
        assert manager.get_engine("results") is manager.get_engine(store.dburi)
    assert rows_of(binds["results"], "SELECT task_id FROM celery_taskmeta") == [("1",)]


def test_two_stores_have_tables_of_their_own(url: URL | str) -> None:
    """Stores with other table names in one process neither see nor make each other's tables."""
    names = {"task": "my_tasks", "group": "my_groups"}
    with ResultStore(url) as usual, ResultStore(url, table_names=names) as named:
        named.store("1", "SUCCESS", b"named")
        named.save_group("g", b"named")
        with plain_engine(url) as engine, engine.connect() as connection:
            tables = inspect(connection).get_table_names()
        assert {"my_tasks", "my_groups"} <= set(tables)
        assert not {"celery_taskmeta", "celery_tasksetmeta"} & set(tables)
        assert usual.get("1") is None
        assert usual.store("1", "FAILURE", b"usual")
        usual.save_group("g", b"usual")
        assert [s.get("1").result for s in (usual, named)] == [b"usual", b"named"]  # type: ignore[union-attr]
        assert [s.restore_group("g")[0] for s in (usual, named)] == [b"usual", b"named"]  # type: ignore[index]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_schemas_on_postgresql(make_database: Callable[..., Database], driver: str) -> None:
    """Each table goes into its schema, with the sequence of its ids; public stays empty."""
    url = make_database(driver).url
    rows_of(url, "CREATE SCHEMA tasks")
    rows_of(url, "CREATE SCHEMA groups")
    schemas = {"task": "tasks", "group": "groups"}
    for _ in range(2):
        with ResultStore(url, table_schemas=schemas, table_names={"task": "mine"}) as store:
            store.store("1", "SUCCESS", b"1")
            store.save_group("g", b"1")
            assert store.get_many(["1"]).keys() == {"1"}
            assert store.restore_group("g") is not None
    tables = "SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema"
    found = rows_of(url, f"{tables} IN ('public', 'tasks', 'groups')")
    assert {("tasks", "mine"), ("groups", "celery_tasksetmeta")} <= set(found)
    assert not [name for schema, name in found if schema == "public"]


# -- its configuration


def test_store_pickles_as_its_configuration(tmp_path: Path) -> None:
    """What arrives in another process stores in the same tables with the same options."""
    url = f"sqlite:///{tmp_path / 'one.db'}"
    with ResultStore(
        url,
        extended=True,
        table_names={"task": "mine"},
        engine_options={"pool_size": 3},
        create_tables=False,
        short_lived_sessions=True,
        notify=True,
        attempts=2,
    ) as original:
        original.manager.get_engine(url)
        copy = pickle.loads(pickle.dumps(original))  # noqa: S301 - our own
        with copy:
            assert copy.__reduce__() == original.__reduce__()
            assert copy.tables.task.name == "mine"
            assert copy.manager.get_engine(url).pool.size() == 3
            assert copy.manager.get_engine(url) is not original.manager.get_engine(url)


def test_store_on_a_shared_manager_pickles_with_it(tmp_path: Path) -> None:
    """The manager goes with the store, by its own configuration."""
    binds = {"results": f"sqlite:///{tmp_path / 'one.db'}"}
    with SessionManager(binds=binds) as manager:
        ResultStore("results", manager=manager).store("1", "SUCCESS", b"1")
        copy = pickle.loads(pickle.dumps(ResultStore("results", manager=manager)))  # noqa: S301
        with copy.manager:
            assert copy.get("1").result == b"1"


def test_memory_database_is_one_for_all_threads() -> None:
    """A store in memory keeps its results for as long as it is open."""
    with ResultStore("sqlite://") as store, ResultStore("sqlite://") as other:
        store.store("1", "SUCCESS", b"1")
        store.store_many([TaskResult("2", "SUCCESS")])
        assert store.get_many(["1", "2"]).keys() == {"1", "2"}
        assert other.get("1") is None


@pytest.mark.parametrize(
    "options",
    [
        {"engine_options": {"isolation_level": "SERIALIZABLE"}},
        {"engine_options": {"execution_options": {"isolation_level": "SERIALIZABLE"}}},
        {"engine_callback": serializable},
    ],
    ids=["engine", "execution", "callback"],
)
def test_isolation_level_of_the_users(url: URL | str, options: dict[str, Any]) -> None:
    """What is stored is committed at any isolation level, wherever that is said."""
    with ResultStore(url, **options) as store:
        assert store.store("1", "SUCCESS")
        store.store_many([TaskResult("2", "SUCCESS")])
        store.save_group("3", b"")
    with ResultStore(url) as another:
        assert another.get_many(["1", "2"]).keys() == {"1", "2"}
        assert another.restore_group("3") is not None

"""Many databases of one manager: each has its own engine, tables and state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from sessionmgr import Base, SessionManager
from tests.concurrency import in_both_phases, in_child
from tests.helpers import wait_until
from tests.items import Item, ItemBase, connection_id, count_items, item_names
from tests.servers.server import APP_USER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

    from tests.async_facade import ManagerClass
    from tests.servers import Database


def recreate(database: Database) -> None:
    """Drop a database and create it anew, empty, under the same name."""
    server, name = database.server, database.name
    server.kill(*server.connections(name))
    wait_until(lambda: not server.connections(name))
    server.query(f"DROP DATABASE {name}")  # its grants stay in MariaDB
    owner = f" OWNER {APP_USER}" if database.is_postgresql else ""
    server.query(f"CREATE DATABASE {name}{owner}")


def add_item(manager: SessionManager, dburi: str | URL, name: str) -> list[str]:
    """Add a row to a database, and return the names of all its rows."""
    with manager.begin(dburi) as session:
        session.add(Item(name=name))
    with manager.session_factory(dburi) as session:
        return item_names(session)


@in_both_phases
def test_each_database_gets_its_tables(
    make_database: Callable[..., Database],
    tmp_path: Path,
    call: Callable,
    manager_class: ManagerClass,
    sqlite: str,
) -> None:
    """Every database that a manager meets gets the tables, whatever its kind and order."""
    urls = [make_database(driver).url for driver in ("psycopg", "psycopg", "pymysql", "pymysql")]
    urls.append(make_url(f"{sqlite}:///{tmp_path / 'one.db'}"))
    with manager_class(metadata=ItemBase.metadata) as manager:

        def add_to_each() -> list[list[str]]:
            return [
                add_item(manager, url, f"row of {position}") for position, url in enumerate(urls)
            ]

        assert call(add_to_each) == [[f"row of {position}"] for position in range(len(urls))]


def test_default_metadata_is_of_the_base(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """A manager without ``metadata`` prepares the classes of ``sessionmgr.Base``."""

    def prepare() -> int:
        class Thing(Base):
            __table__ = Item.__table__.to_metadata(Base.metadata)

        with (
            manager_class() as manager,
            manager.begin(f"{sqlite}:///{tmp_path / 'one.db'}") as session,
        ):
            session.add(Thing(name="thing"))
            return count_items(session)

    assert in_child(prepare) == 1
    assert manager_class().metadata is Base.metadata


def test_state_is_per_database(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """Engine, sessionmaker, preparation and counts of one database are not another's."""
    first, second = make_database("psycopg"), make_database("pymysql")
    with manager_class(metadata=ItemBase.metadata, pooling="always") as manager:
        add_item(manager, first.url, "row")
        engine, factory = manager.create_session(second.url)
        assert manager.get_engine(first.url) is not engine
        assert manager.create_session(first.url)[1] is not factory
        assert manager.prepared == {str(first.url)}
        used, untouched = manager.stats().databases
        assert (used.database, used.connects, used.idle) == (str(first.url), 1, 1)
        assert (untouched.database, untouched.connects, untouched.checkouts) == (
            str(second.url),
            0,
            0,
        )


def test_database_that_fails_leaves_others_alone(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """A database that cannot be reached is none of another's business, on the same server."""
    database = make_database("psycopg")
    with manager_class(metadata=ItemBase.metadata, pooling="always") as manager:
        add_item(manager, database.url, "before")
        with pytest.raises(DBAPIError, match="does not exist"):
            manager.session_factory(database.url.set(database="no_such_database"))
        assert add_item(manager, database.url, "after") == ["after", "before"]
        assert manager.prepared == {str(database.url)}
        assert len(database.connections()) == 1


def test_invalidate_leaves_others_alone(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """Invalidating one database keeps the engines and server connections of the others."""
    first, second = make_database("psycopg"), make_database("psycopg")
    with manager_class(metadata=ItemBase.metadata, pooling="always") as manager:
        for database in (first, second):
            add_item(manager, database.url, "row")
        engines = [manager.get_engine(database.url) for database in (first, second)]
        kept = second.connections()
        assert len(kept) == 1

        manager.invalidate(first.url)

        wait_until(lambda: not first.connections())
        assert second.connections() == kept
        assert manager.prepared == {str(second.url)}
        assert manager.get_engine(first.url) is not engines[0]
        assert manager.get_engine(second.url) is engines[1]
        with manager.session_factory(second.url) as session:
            assert {connection_id(session)} == kept


@pytest.mark.parametrize("pooling", ["always", "never"])
@pytest.mark.twin_cases(pooling=["always"])
def test_invalidate_recreates_tables_of_a_dropped_database(
    database: Database,
    pooling: str,
    manager_class: ManagerClass,
) -> None:
    """After ``invalidate`` a database that was dropped and made anew gets its tables again."""
    with manager_class(metadata=ItemBase.metadata, pooling=pooling) as manager:
        add_item(manager, database.url, "lost")
        recreate(database)
        manager.invalidate(database.url)
        assert add_item(manager, database.url, "new") == ["new"]


@in_both_phases
def test_invalidate_recreates_tables_of_a_deleted_file(
    tmp_path: Path, call: Callable, manager_class: ManagerClass, sqlite: str
) -> None:
    """After ``invalidate`` a SQLite file that was deleted is made anew, with its tables."""
    path = tmp_path / "one.db"
    with manager_class(metadata=ItemBase.metadata) as manager:
        add_item(manager, f"{sqlite}:///{path}", "lost")
        path.unlink()

        def begin_anew() -> list[str]:
            manager.invalidate(f"{sqlite}:///{path}")
            return add_item(manager, f"{sqlite}:///{path}", "new")

        assert call(begin_anew) == ["new"]


def test_invalidate_of_an_unknown_database_does_nothing(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """A database that was never used can be invalidated; neither engine nor file is made."""
    with manager_class() as manager:
        manager.invalidate(f"{sqlite}:///{tmp_path / 'one.db'}")
        assert manager._engines == {}
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("postgresql+psycopg://u:p@h/d", make_url("postgresql+psycopg://u:p@h/d")),
        ("postgres+psycopg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("db+postgresql+psycopg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        (make_url("db+postgres+psycopg://u:p@h/d"), "postgresql+psycopg://u:p@h/d"),
        ("  mysql+pymysql://u:p@h/d\n", "mysql+pymysql://u:p@h/d"),
        ("mysql+pymysql://u:a%2Fb@h/d", "mysql+pymysql://u:a%2fb@h/d"),
        ("mysql+pymysql://h/d?a=1&b=2", "mysql+pymysql://h/d?b=2&a=1"),
        ("db+sqlite:///one.db", make_url("sqlite:///one.db")),
    ],
    ids=["URL", "postgres", "db+", "db+ of URL", "space", "escapes", "query order", "sqlite"],
)
def test_spellings_of_a_url_share_an_engine(
    first: str | URL, second: str | URL, manager_class: ManagerClass, as_twin: Callable
) -> None:
    """Two spellings of one URL are one database, to find as well as to invalidate."""
    first, second = as_twin(first), as_twin(second)
    with manager_class() as manager:
        engine, factory = manager.create_session(first)
        assert manager.create_session(second) == (engine, factory)
        assert len(manager.stats().databases) == 1
        manager.invalidate(second)
        assert manager._engines == {}


@pytest.mark.parametrize(
    "other",
    [
        "postgresql+psycopg://u:q@h/d",
        "postgresql+psycopg://u:p@h/e",
        "postgresql+psycopg2://u:p@h/d",
        "postgresql+psycopg://u:p@h/d?sslmode=require",
    ],
    ids=["password", "database", "driver", "query"],
)
def test_different_urls_have_different_engines(
    other: str, manager_class: ManagerClass, as_twin: Callable
) -> None:
    """URLs that differ in what a connection is made with do not share an engine."""
    with manager_class() as manager:
        engine = manager.get_engine(as_twin("postgresql+psycopg://u:p@h/d"))
        assert manager.get_engine(as_twin(other)) is not engine


@in_both_phases
def test_bind_keys_with_the_same_url_have_their_own_engines(
    call: Callable, manager_class: ManagerClass, sqlite: str
) -> None:
    """Two bind keys of ``sqlite://`` are two databases, and ``sqlite://`` itself is a third."""
    binds = {"left": f"{sqlite}://", "right": {"url": f"{sqlite}://"}}
    with manager_class(metadata=ItemBase.metadata, binds=binds) as manager:

        def add_to_each() -> list[list[str]]:
            return [add_item(manager, name, name) for name in ("left", "right", f"{sqlite}://")]

        assert call(add_to_each) == [["left"], ["right"], [f"{sqlite}://"]]


def test_bind_keys_are_invalidated_one_by_one(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """To invalidate a bind key leaves another one with the same URL, and the URL, alone."""
    database = make_database("psycopg")
    binds = {"left": database.url, "right": database.url}
    with manager_class(metadata=ItemBase.metadata, binds=binds, pooling="always") as manager:
        for dburi in ("left", "right", database.url):
            add_item(manager, dburi, f"row {len(manager.prepared)}")
        assert manager.prepared == {"left", "right", str(database.url)}
        engines = {dburi: manager.get_engine(dburi) for dburi in ("left", "right", database.url)}
        assert len(database.connections()) == 3

        manager.invalidate("left")

        wait_until(lambda: len(database.connections()) == 2)
        assert manager.prepared == {"right", str(database.url)}
        assert manager.get_engine("left") is not engines["left"]
        assert manager.get_engine("right") is engines["right"]
        assert manager.get_engine(database.url) is engines[database.url]


def test_names_of_databases_are_what_stats_and_registry_show(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """The registry is found by plain strings: a bind key, or the URL as it is normalised."""
    url = f"{sqlite}:///{tmp_path / 'one.db'}"
    with manager_class(metadata=ItemBase.metadata, binds={"files": url}) as manager:
        by_key, by_url = manager.get_engine("files"), manager.get_engine(f"db+{url}")
        assert manager._engines == {"files": by_key, url: by_url}
        assert manager._sessions == {}
        factory = manager.create_session("files")[1]
        assert manager._sessions == {"files": factory}
        assert [stats.database for stats in manager.stats().databases] == ["files", url]

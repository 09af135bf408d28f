"""``prepare_models``: tables are made once, by whoever comes first, and without noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    NullPool,
    Table,
    create_engine,
    event,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.orm import Mapper

from tests.concurrency import in_child, in_children
from tests.items import ItemBase, count_items
from tests.schema_helpers import (
    Mood,
    Statements,
    database_url,
    fail_always,
    powerless_role,
    rich_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.async_facade import ManagerClass
    from tests.servers import Database

PROCESSES = 32

ONE_PER_SERVER = pytest.mark.parametrize("driver", ["psycopg", "pymysql"])


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql", "mysqlclient", "sqlite"])
@pytest.mark.twin_cases(driver=["psycopg", "pymysql", "sqlite"])
def test_many_processes_prepare_an_empty_database_at_once(
    make_database: Callable[..., Database],
    tmp_path: Path,
    driver: str,
    manager_class: ManagerClass,
    sqlite: str,
) -> None:
    """32 processes that start on an empty database raise nothing and make everything once."""
    url = database_url(driver, make_database, tmp_path, sqlite)
    metadata = rich_metadata()
    person = metadata.tables["person"]
    # SQLite has writers wait for each other, and gives up after 5 s unless it is told otherwise
    options = {"connect_args": {"timeout": 60}} if driver == "sqlite" else None
    manager = manager_class(metadata=metadata, engine_options=options)

    def start(position: int) -> None:
        with manager.begin(url) as session:
            session.execute(person.insert().values(name=f"person {position}", mood=Mood.GOOD))
        manager.close()

    in_children([lambda i=i: start(i) for i in range(PROCESSES)])

    with manager.session_factory(url) as session:
        assert session.scalar(select(func.count()).select_from(person)) == PROCESSES
        assert set(session.scalars(select(person.c.mood))) == {Mood.GOOD}
        tickets = set(session.scalars(select(person.c.ticket)))
        inspector = inspect(session.connection())
        assert set(inspector.get_table_names()) == {"person", "other"}
        indexes = {index["name"] for index in inspector.get_indexes("person")}
        assert indexes == {"ix_person_name", "person_name_mood"}
    if driver != "sqlite":
        assert tickets == set(range(1, PROCESSES + 1))
    manager.close()


def test_many_processes_leave_no_error_in_the_log(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """PostgreSQL's log has no ``ERROR`` line when 32 processes start on an empty database."""
    database = make_database("psycopg")
    mark = database.server.log_mark()
    with manager_class(metadata=rich_metadata()) as manager:
        in_children([lambda: manager.session_factory(database.url).close()] * PROCESSES)
    lines = [line for line in database.server.log_text(mark).splitlines() if database.name in line]
    assert not [line for line in lines if "ERROR:" in line or "FATAL:" in line]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ", "AUTOCOMMIT"])
@ONE_PER_SERVER
def test_isolation_level_of_the_engine_does_not_matter(
    make_database: Callable[..., Database],
    driver: str,
    level: str,
    manager_class: ManagerClass,
) -> None:
    """Processes prepare at once whatever isolation the engine is set to, and then have it."""
    database = make_database(driver)
    mark = database.server.log_mark()
    metadata = rich_metadata()
    person = metadata.tables["person"]
    options = {"isolation_level": level}
    with manager_class(metadata=metadata, engine_options=options) as manager:

        def start() -> str:
            with manager.session_factory(database.url) as session:
                session.execute(person.insert())
                session.rollback()
                return session.connection().get_isolation_level()

        levels = set(in_children([start] * 8))
        with manager.session_factory(database.url) as session:
            rows = session.scalar(select(func.count()).select_from(person))
            assert set(inspect(session.connection()).get_table_names()) == {"person", "other"}
        if level == "AUTOCOMMIT":  # no level of transactions, which is what the server tells
            assert rows == 8
        else:
            assert (rows, levels) == (0, {level})
    lines = database.server.log_text(mark).splitlines()
    assert not [line for line in lines if database.name in line and "ERROR:" in line]


def test_tables_that_exist_need_no_right_and_one_look(
    database: Database, manager_class: ManagerClass
) -> None:
    """A role that may not create anything works where the tables are; one statement sees it."""
    with manager_class(metadata=ItemBase.metadata) as owner:
        owner.session_factory(database.url).close()
    statements = Statements()
    with (
        powerless_role(database) as url,
        manager_class(statements.watch, metadata=ItemBase.metadata) as manager,
    ):
        with manager.session_factory(url) as session:
            looks = list(statements)
            assert count_items(session) == 0
        assert len(looks) == 1
        assert "item" not in looks[0].lower()
        assert looks[0].lstrip().split()[0] in ("SELECT", "SHOW")


@ONE_PER_SERVER
def test_lock_is_the_databases_own(
    make_database: Callable[..., Database], driver: str, manager_class: ManagerClass
) -> None:
    """A process that prepares one database holds up nobody on another of the same server."""
    first, second = make_database(driver), make_database(driver)
    metadata = rich_metadata()

    def prepare_the_other(_connection: Any) -> None:
        if len(attempts) == 1:
            with manager_class(metadata=metadata) as manager:
                manager.session_factory(second.url).close()

    attempts = fail_always(metadata, prepare_the_other)
    with manager_class(metadata=metadata) as manager:
        manager.session_factory(first.url).close()
    assert len(attempts) == 2


@ONE_PER_SERVER
def test_tables_are_looked_for_once_per_process_tree(
    make_database: Callable[..., Database],
    driver: str,
    manager_class: ManagerClass,
) -> None:
    """After the parent has prepared a database, neither it nor a child looks again."""
    url = make_database(driver).url
    statements = Statements()
    with manager_class(statements.watch, metadata=ItemBase.metadata) as manager:
        manager.session_factory(url).close()
        statements.clear()

        def use() -> list[str]:
            manager.session_factory(url).close()
            manager.prepare_models(manager.get_engine(url))
            return list(statements)

        assert use() == []
        assert in_child(use) == []


@ONE_PER_SERVER
def test_only_missing_tables_are_made(
    make_database: Callable[..., Database], driver: str, manager_class: ManagerClass
) -> None:
    """A database that has one of the tables gets the other, and keeps the rows of the first."""
    url = make_database(driver).url
    metadata = rich_metadata()
    other = metadata.tables["other"]
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        other.create(connection)
        connection.execute(other.insert().values(id=7, mood=Mood.BAD))
    with manager_class(metadata=metadata) as manager, manager.session_factory(url) as session:
        assert session.scalar(select(other.c.id)) == 7
        assert session.scalar(select(func.count()).select_from(metadata.tables["person"])) == 0


def test_tables_of_several_schemas(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """Tables are looked for and made in the schemas they belong to, translated ones among them."""
    database = make_database("psycopg")
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.begin() as connection:
        for name in ("sales", "stock"):
            connection.execute(text(f"CREATE SCHEMA {name}"))
    metadata, statements = MetaData(), Statements()
    for name in (None, "sales", "tenant"):
        Table("same", metadata, Column("id", Integer, primary_key=True), schema=name)
    options = {"execution_options": {"schema_translate_map": {"tenant": "stock"}}}

    def prepare() -> int:
        statements.clear()
        with manager_class(statements.watch, metadata=metadata, engine_options=options) as manager:
            manager.session_factory(database.url).close()
        return len(statements)

    assert prepare() > 3
    with engine.connect() as connection:
        for name in (None, "sales", "stock"):
            assert inspect(connection).get_table_names(schema=name) == ["same"]
    assert prepare() == 3


def test_engine_of_somebody_else_is_prepared(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """``prepare_models`` takes any engine, not only one of the manager's."""
    engine = create_engine(make_database("psycopg").url, poolclass=NullPool)
    with manager_class(metadata=ItemBase.metadata) as manager:
        manager.prepare_models(engine)
        assert manager._engines == {}
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["item"]


def test_engine_and_sessionmaker_alone_make_no_tables(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """``get_engine`` and ``create_session`` do not look at the tables."""
    url = f"{sqlite}:///{tmp_path / 'one.db'}"
    with manager_class(metadata=ItemBase.metadata) as manager:
        engine, factory = manager.create_session(url)
        with factory() as session:
            assert inspect(session.connection()).get_table_names() == []
        assert manager.prepared == frozenset()
        manager.prepare_models(engine)
        assert manager.prepared == {url}


def test_mappers_are_configured_first(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """A table that a mapper brings when it is configured is among those that are made."""

    def prepare() -> list[str]:
        metadata = rich_metadata()

        def add_table(*_: object) -> None:
            Table("late", metadata, Column("id", Integer, primary_key=True))

        event.listen(Mapper, "after_configured", add_table)

        class Late(ItemBase):
            __tablename__ = "unused"
            id = Column(Integer, primary_key=True)

        with (
            manager_class(metadata=metadata) as manager,
            manager.session_factory(f"{sqlite}:///{tmp_path / 'one.db'}") as session,
        ):
            return inspect(session.connection()).get_table_names()

    assert in_child(prepare) == ["late", "other", "person"]

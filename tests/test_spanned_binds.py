"""Statements and classes over several bind keys: refused, unless these are one database."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, delete, insert, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    foreign,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)

from sessionmgr import SessionManager, SpannedBindsError
from sessionmgr.routing import _look_again as event_of_mappers
from sessionmgr.routing import find_metadata
from tests.concurrency import in_threads
from tests.routed_models import MainBase, Order, Person, orders, person

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["tests.routing_fixtures"]


def test_join_over_databases_is_refused(files: SessionManager) -> None:
    """A statement over tables of two databases names them, and their bind keys."""
    query = select(Order).join(Person, Person.id == Order.person_id)
    named = r"'orders' of bind key 'default', 'person' of bind key 'users'"
    with files.session() as session:
        session.add(Order(person_id=1))
        for _ in range(2):  # the second time SQLAlchemy might have had it compiled
            with pytest.raises(SpannedBindsError, match=named):
                session.execute(query)
        with pytest.raises(SpannedBindsError, match=named):
            session.execute(select(Order).options(joinedload(Order.person)))
        with pytest.raises(SpannedBindsError, match="'orders' of bind key 'default'"):
            session.execute(insert(orders).from_select(["person_id"], select(person.c.id)))
        with pytest.raises(SpannedBindsError, match=named):
            session.execute(
                delete(orders).where(orders.c.id == select(person.c.id).scalar_subquery())
            )
        assert session.scalars(select(Order).options(selectinload(Order.person))).all()


def test_class_over_databases_is_refused(files: SessionManager) -> None:
    """A class whose joined tables are of two bind keys cannot be used, and is told why."""

    class Base(DeclarativeBase):
        metadata = MetaData(info={"bind_key": "users"})

    class Party(Base):
        __tablename__ = "party"
        id: Mapped[int] = mapped_column(primary_key=True)

    with files.session() as session:
        session.add(Party())
        session.flush()

        class Customer(Party):
            metadata = MetaData()
            __tablename__ = "customer"
            id: Mapped[int] = mapped_column(ForeignKey(Party.id), primary_key=True)

        with pytest.raises(SpannedBindsError, match="class Customer is mapped to tables"):
            session.execute(select(Customer))
        session.add(Customer())
        with pytest.raises(SpannedBindsError, match="of bind key 'users'"):
            session.flush()


def test_concrete_class_over_databases_is_refused(files: SessionManager) -> None:
    """A hierarchy with a table for each class is of one bind key: a flush asks for its base."""

    class Base(DeclarativeBase):
        metadata = MetaData(info={"bind_key": "users"})

    class Party(Base):
        __tablename__ = "party"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Customer(Party):
        metadata = MetaData()
        __tablename__ = "customer"
        id: Mapped[int] = mapped_column(primary_key=True)
        __mapper_args__ = {"concrete": True}  # noqa: RUF012

    with files.session() as session:
        session.add(Customer())
        with pytest.raises(SpannedBindsError, match="class Party and its kin are mapped to"):
            session.flush()
        with pytest.raises(SpannedBindsError, match="'customer' of bind key 'default'"):
            session.get_bind(Customer)


def test_classes_are_found_while_others_are_configured(files: SessionManager) -> None:
    """Another thread may make what is known of classes be forgotten at any time."""
    done = threading.Event()

    def forget() -> None:
        while not done.is_set():
            event_of_mappers()

    def find() -> None:
        try:
            for _ in range(20_000):
                assert find_metadata(Person, None) is Person.metadata
        finally:
            done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads([forget, find])
    finally:
        sys.setswitchinterval(interval)


def test_table_between_databases_is_refused(files: SessionManager) -> None:
    """A relationship through a table of another bind key than its target's is told both."""

    class Base(DeclarativeBase):
        metadata = MetaData(info={"bind_key": "users"})

    links = Table("links", MetaData(), Column("a", Integer, primary_key=True), Column("b", Integer))

    class Club(Base):
        __tablename__ = "club"
        id: Mapped[int] = mapped_column(primary_key=True)
        members: Mapped[list[Club]] = relationship(
            secondary=links,
            primaryjoin=lambda: Club.id == foreign(links.c.a),
            secondaryjoin=lambda: Club.id == foreign(links.c.b),
        )

    globals()["Club"] = Club  # the annotation is looked up in here
    with files.session() as session:
        session.add(Club(members=[Club()]))
        with pytest.raises(SpannedBindsError, match=r"'links' of .*'default', 'club' of .*'users'"):
            session.flush()


def test_join_in_one_database_is_not(tmp_path: Path) -> None:
    """Two bind keys of one file may be joined; so may a table with a schema, wherever that is."""
    url = f"sqlite:///{tmp_path / 'one.db'}"
    other = Table("other", MetaData(info={"bind_key": "x"}), Column("id", Integer), schema="main")
    with (
        SessionManager(metadata=MainBase.metadata, binds={"default": url, "users": url}) as manager,
        manager.session() as session,
    ):
        session.add(Person(name="Ann"))
        session.commit()
        session.execute(select(Order).join(Person, Person.id == Order.person_id))
        other.create(session.connection())
        session.execute(select(Order).join(other, other.c.id == Order.person_id))


def test_join_with_a_resolvers_database(tmp_path: Path) -> None:
    """Keys that a resolver gives one URL for may be joined."""
    url = f"sqlite:///{tmp_path / 'one.db'}"
    with (
        SessionManager(metadata=MainBase.metadata, resolver=lambda _: url) as manager,
        manager.session() as session,
    ):
        session.add(Person(name="Ann"))
        session.commit()
        session.execute(select(Order).join(Person, Person.id == Order.person_id))


def test_join_with_a_database_that_moved(tmp_path: Path) -> None:
    """A join that was sent when two keys were one database is refused when they are not."""
    url = f"sqlite:///{tmp_path / 'one.db'}"
    query = select(Order).join(Person, Person.id == Order.person_id)
    binds = {"default": url, "users": url}
    with SessionManager(metadata=MainBase.metadata, binds=binds, pooling="always") as manager:
        with manager.session() as session:
            session.execute(select(Person))
            session.execute(query)
        manager.remove_bind("users")
        manager.add_bind("users", f"sqlite:///{tmp_path / 'two.db'}")
        with manager.session() as session, pytest.raises(SpannedBindsError):
            session.execute(query)


def test_join_over_memory_is_refused() -> None:
    """Two databases in memory are two, though their URLs are the same."""
    binds = {"default": "sqlite://", "users": "sqlite://"}
    with (
        SessionManager(metadata=MainBase.metadata, binds=binds) as manager,
        manager.session() as session,
        pytest.raises(SpannedBindsError, match="of bind key 'users'"),
    ):
        session.execute(select(Order).join(Person, Person.id == Order.person_id))

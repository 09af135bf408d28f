"""Joins over bind keys that stand for one database, or did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, select

from sessionmgr import SessionManager, SpannedBindsError
from tests.routed_models import MainBase, Order, Person

if TYPE_CHECKING:
    from pathlib import Path


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

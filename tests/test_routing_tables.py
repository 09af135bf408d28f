"""Tables of routed sessions: made where they are missing, on connections that can be had."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from sessionmgr import AsyncSessionManager
from tests.routed_models import MainBase, Order, Person, notes, orders

if TYPE_CHECKING:
    from pathlib import Path

    from tests.async_facade import ManagerClass

pytest_plugins = ["tests.routing_fixtures"]


@pytest.mark.parametrize("name", ["one.db", ""], ids=["file", "memory"])
def test_second_metadata_of_a_locked_file(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str, name: str
) -> None:
    """Tables of a second metadata are made in the transaction that has the file's lock."""
    url = f"{sqlite}:///{tmp_path / name}" if name else f"{sqlite}://"
    with manager_class(metadata=MainBase.metadata, binds={"default": url}) as manager:
        for end in (Session.rollback, Session.commit, Session.commit):
            with manager.session() as session:
                session.add(Order(person_id=1))
                session.flush()
                session.execute(insert(notes))
                end(session)
        with manager.session() as session:
            assert session.scalar(select(func.count()).select_from(notes)) == 2


def test_asking_for_the_bind_prepares_nothing(tmp_path: Path) -> None:
    """A coroutine that asks for an engine cannot wait for tables; the first statement does."""
    binds = {key: f"sqlite+aiosqlite:///{tmp_path / key}.db" for key in ("default", "users")}

    async def main() -> None:
        manager = AsyncSessionManager(metadata=MainBase.metadata, binds=binds)
        async with manager, manager.session() as session:
            assert (await session.scalars(select(Order))).all() == []
            assert session.get_bind(Person).url.database.endswith("users.db")
            assert (await session.scalars(select(Person))).all() == []

    asyncio.run(main())


@pytest.mark.parametrize("drivers", [("psycopg", "pymysql")], ids=["pg"])
def test_second_metadata_takes_no_second_connection(
    databases: dict[str, Any], manager_class: ManagerClass, drivers: tuple[str, str]
) -> None:
    """A transaction looks for further tables on its own connection, which may be the only one."""
    del drivers
    with manager_class(binds=databases, metadata=MainBase.metadata) as manager:
        for table in (notes, orders):
            with manager.session() as session:
                session.execute(select(table))
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    manager = manager_class(binds=databases, pooling="always", engine_options=options)
    with manager, manager.session() as session:
        session.execute(insert(orders).values(person_id=1))
        assert session.execute(select(notes)).all() == []

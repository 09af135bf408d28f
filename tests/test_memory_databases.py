"""SQLite databases in memory: the one connection is the database, and is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.pool import StaticPool

from sessionmgr.sqlite import is_memory
from tests.concurrency import here, in_both_phases, in_threads
from tests.items import Item, ItemBase, item_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

    from sessionmgr import SessionManager
    from tests.async_facade import ManagerClass

SPELLINGS = [
    "sqlite://",
    "sqlite:///",
    "sqlite:///:memory:",
    "sqlite+pysqlite://",
    "sqlite+pysqlite:///:memory:",
    "db+sqlite://",
    make_url("sqlite:///:memory:"),
    "sqlite:///file::memory:?uri=true",
    "sqlite:///file::memory:?cache=shared&uri=true",
    "sqlite:///file:named?mode=memory&uri=true",
    "sqlite:///file:shared?mode=memory&cache=shared&uri=true",
    "sqlite:///file:?uri=true",
]

in_each_spelling = pytest.mark.parametrize("url", SPELLINGS, ids=str)


def add(manager: SessionManager, url: str | URL, name: str) -> None:
    """Add a row in a session of its own."""
    with manager.begin(url) as session:
        session.add(Item(name=name))


def names(manager: SessionManager, url: str | URL) -> list[str]:
    """Read all rows in a session of its own."""
    with manager.session_factory(url) as session:
        return item_names(session)


@in_each_spelling
@in_both_phases
@pytest.mark.parametrize("pooling", ["forked", "always", "never"])
@pytest.mark.twin_cases(pooling=["always"], call=[here])
def test_memory_database_keeps_its_one_connection(
    url: str | URL,
    call: Callable,
    pooling: Any,
    manager_class: ManagerClass,
    as_twin: Callable,
) -> None:
    """Sessions one after the other, and from threads, see one database, on one connection."""
    url = as_twin(url)

    def use() -> list[str]:
        with manager_class(metadata=ItemBase.metadata, pooling=pooling) as manager:
            add(manager, url, "first")
            in_threads([lambda: add(manager, url, "from a thread")])
            [found] = in_threads([lambda: names(manager, url)])
            [stats] = manager.stats().databases
            assert (stats.connects, stats.pool_class) == (1, "StaticPool")
            return found

    assert call(use) == ["first", "from a thread"]


@in_both_phases
@pytest.mark.parametrize(
    "options",
    [
        {"pool_recycle": 0},
        {"pool_pre_ping": True, "ping_if_idle": 0},
        {"pool_size": 3, "max_overflow": 0, "pool_timeout": 1, "pool_use_lifo": True},
        {"connect_args": {"timeout": 3}},
        {"connect_args": {"check_same_thread": False}},
        {"poolclass": StaticPool, "pool_recycle": 0},
    ],
    ids=["recycle", "ping", "sizes", "connect_args", "check_same_thread", "StaticPool"],
)
def test_no_option_costs_a_memory_database_its_rows(
    call: Callable, options: Any, manager_class: ManagerClass, sqlite: str
) -> None:
    """Options that replace connections elsewhere, or replace ``connect_args``, do no harm here."""

    def use() -> list[str]:
        with manager_class(metadata=ItemBase.metadata, engine_options=options) as manager:
            add(manager, f"{sqlite}://", "first")
            in_threads([lambda: add(manager, f"{sqlite}://", "second")])
            return names(manager, f"{sqlite}://")

    assert call(use) == ["first", "second"]


@in_both_phases
def test_short_lived_sessions_keep_a_memory_database(
    call: Callable, manager_class: ManagerClass, sqlite: str
) -> None:
    """Short-lived sessions leave the connection of a database in memory open."""

    def use() -> list[str]:
        with manager_class(metadata=ItemBase.metadata) as manager:
            for name in ("first", "second"):
                with manager.begin(f"{sqlite}://", short_lived_sessions=True) as session:
                    session.add(Item(name=name))
            return names(manager, f"{sqlite}://")

    assert call(use) == ["first", "second"]


@in_both_phases
def test_invalidate_begins_a_memory_database_anew(
    call: Callable, manager_class: ManagerClass, sqlite: str
) -> None:
    """After ``invalidate`` a database in memory is another one, with its tables."""

    def use() -> list[str]:
        with manager_class(metadata=ItemBase.metadata) as manager:
            add(manager, f"{sqlite}://", "lost")
            manager.invalidate(f"{sqlite}://")
            return names(manager, f"{sqlite}://")

    assert call(use) == []


def test_memory_database_outlives_the_eviction_of_others(
    tmp_path: Path, manager_class: ManagerClass, sqlite: str
) -> None:
    """``max_engines`` takes no database in memory, whose rows would be gone."""
    with manager_class(metadata=ItemBase.metadata, max_engines=1) as manager:
        add(manager, f"{sqlite}://", "kept")
        for name in ("one", "two", "three"):
            add(manager, f"{sqlite}:///{tmp_path / name}.db", name)
        assert names(manager, f"{sqlite}://") == ["kept"]


def test_refused_argument_leaves_the_rows(manager_class: ManagerClass, sqlite: str) -> None:
    """An argument that the driver does not take, for it has more than 64 bits, loses nothing."""
    url = f"{sqlite}://"
    with manager_class(metadata=ItemBase.metadata) as manager:
        add(manager, url, "kept")
        with manager.session_factory(url) as session, pytest.raises(OverflowError):
            session.get(Item, 10**30)
        assert names(manager, url) == ["kept"]


@in_each_spelling
def test_is_memory_knows_every_spelling(url: str | URL) -> None:
    """Each spelling of a database in memory is known as one."""
    assert is_memory(make_url(str(url).removeprefix("db+")))


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///memory",
        "sqlite:///:memory:.db",
        "sqlite:////tmp/memory.db",
        "sqlite:///file:/tmp/one.db?mode=ro&uri=true",
        "sqlite:///file:/tmp/one.db?cache=shared&uri=true",
        "mysql+pymysql://h/:memory:",
        "postgresql+psycopg://",
    ],
)
def test_is_memory_knows_what_is_none(url: str) -> None:
    """Files with similar names, and databases on servers, are none."""
    assert not is_memory(make_url(url))

"""Bind keys that come and go, a resolver for those that are unknown, and scoped sessions."""

from __future__ import annotations

import asyncio
import gc
import pickle
import random
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import MetaData, create_engine, make_url, select

from sessionmgr import (
    AsyncSessionManager,
    DatabaseURLError,
    EngineOptionsError,
    NoSuchBindError,
    SessionManager,
)
from tests.concurrency import in_both_phases, in_child, in_threads
from tests.helpers import wait_until
from tests.items import Item, ItemBase, connection_id, item_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from tests.async_facade import ManagerClass
    from tests.servers import Database

SECRET = "s3cret"


def add(manager: SessionManager, dburi: str, name: str) -> list[str]:
    """Add a row, and return the names of all."""
    with manager.begin(dburi) as session:
        session.add(Item(name=name))
    with manager.session_factory(dburi) as session:
        return item_names(session)


@in_both_phases
def test_databases_are_added_and_removed(
    manager_class: ManagerClass, tmp_path: Path, sqlite: str, call: Callable
) -> None:
    """An added database is used as the others are, and one that was removed is unknown."""

    def run() -> None:
        with manager_class(metadata=ItemBase.metadata, binds={"a": f"{sqlite}://"}) as manager:
            url = f"{sqlite}:///{tmp_path / 'b.db'}"
            manager.add_bind("b", {"url": url, "echo": False})
            manager.add_bind("b", {"url": make_url(url), "echo": False})
            assert add(manager, "b", "row") == ["row"]
            with pytest.raises(EngineOptionsError, match=r"'b' .* is there already.*remove_bind"):
                manager.add_bind("b", f"{sqlite}:///{tmp_path / 'c.db'}")
            manager.remove_bind("b")
            with pytest.raises(NoSuchBindError, match=r"no bind key 'b'.*: 'a'"):
                manager.get_engine("b")
            with pytest.raises(NoSuchBindError, match="no bind key 'b'"):
                manager.remove_bind("b")
            assert manager.prepared == frozenset()
            manager.add_bind("b", f"{sqlite}:///{tmp_path / 'c.db'}")
            assert add(manager, "b", "other") == ["other"]

    call(run)


def test_session_outlives_its_bind(
    make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """A session in use finishes when its database is removed; then its connection closes."""
    database = make_database("psycopg")
    with manager_class(metadata=ItemBase.metadata, pooling="always") as manager:
        manager.add_bind("tenant", database.url)
        with manager.session_factory("tenant") as session:
            used = connection_id(session)
            manager.remove_bind("tenant")
            assert connection_id(session) == used
            session.add(Item(name="row"))
            session.commit()
        wait_until(lambda: not database.connections())


@pytest.mark.parametrize(
    ("bind_key", "bind", "error", "told"),
    [
        ("a://b", "sqlite://", DatabaseURLError, "bind key"),
        (7, "sqlite://", DatabaseURLError, "bind key"),
        ("key", {"echo": True}, DatabaseURLError, r"binds\['key'\] has no 'url'"),
        ("key", f"postgresql//u:{SECRET}@h/d", DatabaseURLError, r"binds\['key'\]: cannot read"),
        ("key", {"url": 7}, DatabaseURLError, r"binds\['key'\]: .* not by int"),
        ("key", {"url": "sqlite://", "ping_if_idle": "x"}, EngineOptionsError, "ping_if_idle"),
    ],
)
def test_wrong_binds_are_told(bind_key: Any, bind: Any, error: type[Exception], told: str) -> None:
    """What cannot be a bind is refused when it is added, by its name, and shows no password."""
    with SessionManager() as manager:
        with pytest.raises(error, match=told) as caught:
            manager.add_bind(bind_key, bind)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("bind", [7, {"echo": True}, f"postgresql//u:{SECRET}@h/d"])
def test_wrong_answers_are_told(bind: Any) -> None:
    """What cannot be a bind is refused when a resolver gives it, and shows no password."""
    with SessionManager(resolver=lambda _: bind) as manager:
        with pytest.raises(DatabaseURLError) as caught:
            manager.get_engine("tenant1")
        assert SECRET not in str(caught.value)


class Tenants:
    """A resolver that counts how often it is asked; it can be pickled."""

    def __init__(self, template: str) -> None:
        self.template = template
        self.asked: list[str] = []

    def __call__(self, bind_key: str) -> str | None:
        """Give a tenant's URL."""
        self.asked.append(bind_key)
        return self.template.format(bind_key) if bind_key.startswith("tenant") else None


@in_both_phases
def test_resolver_answers_for_unknown_keys(
    manager_class: ManagerClass, tmp_path: Path, sqlite: str, call: Callable
) -> None:
    """A resolver is asked once for each engine, again when that is gone, and not for known keys."""
    tenants = Tenants(f"{sqlite}:///{tmp_path}/{{}}.db")
    manager = manager_class(
        metadata=ItemBase.metadata, binds={"main": f"{sqlite}://"}, resolver=tenants
    )

    def run() -> None:
        with manager:
            add(manager, "main", "main")
            assert tenants.asked == []
            for name in ("1", "2"):
                add(manager, "tenant1", name)
            assert tenants.asked == ["tenant1"]
            engine = manager.get_engine("tenant1")
            assert engine is manager.get_engine("tenant1")
            manager.invalidate("tenant1")
            assert add(manager, "tenant1", "3") == ["1", "2", "3"]
            assert tenants.asked == ["tenant1", "tenant1"]
            with pytest.raises(NoSuchBindError, match=r"'other'.*nor does the resolver.*: 'main'"):
                manager.get_engine("other")

    call(run)


def test_resolvers_answer_is_not_shadowed(
    manager_class: ManagerClass, tmp_path: Path, sqlite: str
) -> None:
    """A key that the resolver has answered for stands for no other database until it is let go."""
    tenants = Tenants(f"{sqlite}:///{tmp_path}/{{}}.db")
    with manager_class(metadata=ItemBase.metadata, resolver=tenants) as manager:
        add(manager, "tenant1", "row")
        manager.add_bind("tenant1", f"{sqlite}:///{tmp_path}/tenant1.db")
        add(manager, "tenant2", "row")
        other = f"{sqlite}:///{tmp_path}/other.db"
        with pytest.raises(EngineOptionsError, match=r"'tenant2' .* is there already.*invalidate"):
            manager.add_bind("tenant2", other)
        manager.invalidate("tenant2")
        manager.add_bind("tenant2", other)
        assert add(manager, "tenant2", "other") == ["other"]


def test_routes_while_engines_go(tmp_path: Path) -> None:
    """Threads ask for engines that others let go: no error, and none that was let go is kept."""
    binds = {f"k{number}": f"sqlite:///{tmp_path / 'one.db'}" for number in range(200)}
    keys = list(binds)

    def ask(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(1500):
            with manager.session() as session:
                session.get_bind(bind_key=chosen.choice(keys))

    def let_go() -> None:
        chosen = random.Random(0)
        for _ in range(3000):
            manager.invalidate(chosen.choice(keys))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with SessionManager(metadata=MetaData(), binds=binds, pooling="always") as manager:
            in_threads([let_go, *(lambda seed=seed: ask(seed) for seed in range(3))])
            kept = {id(engine) for engine in manager._engines.values()}
            for key in keys:
                route = manager._registry.find_route(key, None)
                assert route is None or id(route.bind) in kept
    finally:
        sys.setswitchinterval(interval)


def test_resolver_that_raises_is_named(manager_class: ManagerClass) -> None:
    """The resolver's own error arrives, and says for which key it was asked."""

    def fail(bind_key: str) -> str:
        raise LookupError("the directory is away")

    with manager_class(resolver=fail) as manager:
        with pytest.raises(LookupError) as caught:
            manager.get_engine("tenant1")
        assert "bind key 'tenant1'" in caught.value.__notes__[0]
    with pytest.raises(EngineOptionsError, match="resolver must be callable"):
        manager_class(resolver="postgresql://")


def test_manager_pickles_with_its_binds(manager_class: ManagerClass, tmp_path: Path) -> None:
    """What was added, and the resolver, arrive in another process."""
    original = manager_class(resolver=Tenants("sqlite:///{}"), binds={"a": "sqlite://"})
    original.add_bind("b", {"url": "sqlite:///b.db", "echo": True})
    original.add_bind("c", "sqlite:///c.db")
    original.remove_bind("a")
    with original, pickle.loads(pickle.dumps(original)) as arrived:  # noqa: S301 - our own
        assert arrived._binds.configuration() == original._binds.configuration()
        assert list(arrived._binds.configuration()) == ["b", "c"]
        assert arrived._binds.resolve("tenant1").url == make_url("sqlite:///tenant1")


@pytest.mark.parametrize("kind", ["files", "psycopg"])
def test_many_tenants_share_few_engines(
    make_database: Callable[..., Database],
    manager_class: ManagerClass,
    tmp_path: Path,
    sqlite: str,
    kind: str,
) -> None:
    """Threads use any number of tenants at random: no error, and no more engines than allowed."""
    if kind == "files":
        urls = {f"tenant{n}": f"{sqlite}:///{tmp_path / str(n)}.db" for n in range(40)}
    else:
        urls = {f"tenant{n}": make_database(kind).url for n in range(6)}
    limit = 3

    def use(seed: int, rounds: int) -> None:
        chosen = random.Random(seed)
        for number in range(rounds):
            key = chosen.choice(list(urls))
            with manager.begin(key) as session:
                session.add(Item(name=f"{key}.{seed}.{number}"))
                session.flush()
                names = item_names(session)
                assert all(name.startswith(f"{key}.") for name in names)

    manager = manager_class(
        metadata=ItemBase.metadata,
        resolver=urls.get,
        max_engines=limit,
        pooling="always",
        session_options={"expire_on_commit": False},
    )
    with manager:
        in_threads([lambda seed=seed: use(seed, 15) for seed in range(4)])
        in_child(lambda: use(99, 5))
        use(100, 1)
        assert len(manager.stats().databases) == limit
        count = 0
        for key in urls:
            with manager.session_factory(key) as session:
                count += len(item_names(session))
        assert count == 4 * 15 + 5 + 1


def test_removed_while_being_made(tmp_path: Path) -> None:
    """An engine that a thread is just making for a removed key is not kept, nor made later."""
    threads: list[threading.Thread] = []

    def remove(engine: Engine) -> None:
        threads.append(threading.Thread(target=manager.remove_bind, args=("a",)))
        threads[0].start()
        wait_until(lambda: manager._binds.find("a") is None)

    with SessionManager(remove, binds={"a": f"sqlite:///{tmp_path / 'a.db'}"}) as manager:
        key = manager._key("a")
        manager.get_engine("a")
        threads[0].join()
        assert manager.stats().databases == ()
        with pytest.raises(NoSuchBindError):
            manager.get_engine(key)  # looked up before it was removed
        assert manager.stats().databases == ()


def test_moved_before_being_made(manager_class: ManagerClass, tmp_path: Path, sqlite: str) -> None:
    """A key that is removed or added after it was looked up has the engine that it stands for."""
    tenants = Tenants(f"{sqlite}:///{tmp_path}/{{}}.db")
    other = f"{sqlite}:///{tmp_path}/other.db"
    with manager_class(binds={"tenant1": other}, resolver=tenants) as manager:
        key = manager._key("tenant1")
        manager.remove_bind("tenant1")
        engine = manager.get_engine(key)
        assert engine.url.database == f"{tmp_path}/tenant1.db"
        assert manager.get_engine("tenant1") is engine

        key = manager._key("tenant2")
        manager.add_bind("tenant2", other)
        engine = manager.get_engine(key)
        assert engine.url.database == f"{tmp_path}/other.db"
        assert manager.get_engine("tenant2") is engine
        assert tenants.asked == ["tenant1", "tenant2"]


def test_scoped_sessions(tmp_path: Path) -> None:
    """One session for each scope, threads by default; a forked child begins with none."""
    binds = {"default": f"sqlite:///{tmp_path / 'one.db'}"}
    current = ["a"]
    with SessionManager(metadata=ItemBase.metadata, binds=binds) as manager:
        by_name, by_thread = manager.scoped(lambda: current[0]), manager.scoped()
        first = by_name()
        by_name.add(Item(name="row"))
        assert first.new
        current[0] = "b"
        assert by_name() is not first
        current[0] = "a"
        assert by_name() is first
        by_name.commit()

        def of_thread() -> Session:
            try:
                return by_thread()
            finally:
                by_thread.remove()

        assert len({id(s) for s in [*in_threads([of_thread] * 2), by_thread()]}) == 3
        inherited = by_thread()
        inherited.add(Item(name="never"))

        def in_the_child() -> tuple[bool, bool, list[str]]:
            return by_thread() is inherited, by_name() is first, item_names(by_name())

        assert in_child(in_the_child) == (False, False, ["row"])
        assert by_thread() is inherited
        by_thread.remove()
        by_name.remove()
        with pytest.raises(EngineOptionsError, match="scope must be callable"):
            manager.scoped("request")


def test_scoped_session_on_an_engine_of_ones_own(
    tmp_path: Path, make_database: Callable[[str], Database]
) -> None:
    """A child that asks for its session does not end the transaction of its parent's.

    That engine's connection is not severed: collected, the session would roll back on it.
    """
    engine = create_engine(make_database("psycopg").url)
    ItemBase.metadata.create_all(engine)
    binds = {"default": f"sqlite:///{tmp_path / 'one.db'}"}
    with SessionManager(metadata=ItemBase.metadata, binds=binds) as manager:
        scoped = manager.scoped(lambda: 1)
        scoped(bind=engine).add(Item(name="row"))
        scoped.flush()

        def in_the_child() -> list[str]:
            names = item_names(scoped())
            gc.collect()
            return names

        assert in_child(in_the_child) == []
        scoped.commit()
        assert item_names(scoped()) == ["row"]
        scoped.remove()
    engine.dispose()


def test_scoped_sessions_of_tasks(tmp_path: Path) -> None:
    """An asynchronous manager's scoped sessions serve each task with its own."""
    binds = {"default": f"sqlite+aiosqlite:///{tmp_path / 'one.db'}"}

    async def add_row(scoped: Any, name: str) -> int:
        scoped.add(Item(name=name))
        await asyncio.sleep(0)
        await scoped.commit()
        found = id(scoped())
        await scoped.remove()
        return found

    async def main() -> None:
        async with AsyncSessionManager(metadata=ItemBase.metadata, binds=binds) as manager:
            scoped = manager.scoped(asyncio.current_task)
            tasks = [asyncio.create_task(add_row(scoped, name)) for name in "abc"]
            await asyncio.gather(*tasks)
            names = (await scoped.scalars(select(Item.name))).all()
            assert sorted(names) == ["a", "b", "c"]
            await scoped.remove()

    asyncio.run(main())

"""The pytest plugin: tests that see nothing of each other."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

from sessionmgr import SessionManager
from tests.isolation_helpers import BEFORE, fill, names
from tests.items import ItemBase, open_transactions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Database

pytest_plugins = ["pytester"]

TESTS = """
    import asyncio

    import pytest

    from sessionmgr import AsyncSessionManager, SessionManager
    from sessionmgr.testing import isolated
    from tests.items import Item, ItemBase, item_names

    URL, ASYNC_URL = {url!r}, {async_url!r}
    manager = SessionManager(metadata=ItemBase.metadata, pooling="always")
    async_manager = AsyncSessionManager(metadata=ItemBase.metadata)
    engine = manager.get_engine(URL)


    @pytest.fixture
    def session_manager():
        return manager


    def check(managed):
        with managed.begin(URL) as session:
            assert item_names(session) == ["before"]
            session.add(Item(name="inside"))
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM item").scalar() == 2


    def test_one(isolate):
        isolate(manager)
        check(manager)


    def test_two(isolated_session_manager):
        check(isolated_session_manager)


    def test_three():
        with isolated(manager):
            check(manager)
        with isolated(manager):
            check(manager)


    async def work():
        for name in ("one", "two"):
            async with async_manager.begin(ASYNC_URL) as session:
                session.add(Item(name=name))
        async with await async_manager.session_factory(ASYNC_URL) as session:
            assert await session.run_sync(item_names) == ["before", "one", "two"]


    @pytest.mark.parametrize("turn", [1, 2])
    def test_async(isolate, turn):
        isolate(async_manager, manager)
        asyncio.run(work())


    @pytest.mark.parametrize("turn", [1, 2])
    def test_async_block(turn):
        async def main():
            async with isolated(async_manager):
                await work()

        asyncio.run(main())


    @pytest.mark.parametrize("turn", [1, 2])
    def test_async_in_a_loop_that_stops(isolate, turn):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin(isolate))
        loop.run_until_complete(work())
        loops.append(loop)


    loops = []


    @pytest.fixture(autouse=True)
    def close_loops():
        yield
        while loops:
            loop = loops.pop()
            loop.run_until_complete(async_manager.dispose())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


    async def begin(isolate):
        isolate(async_manager)


    def test_failing(isolate):
        isolate(manager)
        check(manager)
        raise RuntimeError("on purpose")
"""


def arguments() -> list[str]:
    """Return what loads the plugin, unless pytest does by itself."""
    return [] if is_registered() else ["-p", "sessionmgr.testing"]


def is_registered() -> bool:
    """Return whether the installed package tells pytest of its plugin."""
    return bool(entry_points(group="pytest11", name="sessionmgr"))


def test_tests_see_nothing_of_each_other(
    make_database: Callable[..., Database],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each test finds the database as it was, in whichever order, also after one that fails."""
    database = make_database("psycopg")
    asyncpg = database.url.set(drivername="postgresql+asyncpg")
    texts = [url.render_as_string(hide_password=False) for url in (database.url, asyncpg)]
    with SessionManager(metadata=ItemBase.metadata, pooling="always") as manager:
        fill(manager, database.url)
        pytester.makepyfile(dedent(TESTS).format(url=texts[0], async_url=texts[1]))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        # In this process, drivers that it imports first would be imported again afterwards.
        result = pytester.runpytest_subprocess(*arguments(), "-W", "error")
        result.assert_outcomes(passed=9, failed=1)
        assert open_transactions(database) == set()
        assert names(manager, database.url) == BEFORE


def test_the_plugin_is_registered(request: pytest.FixtureRequest) -> None:
    """An installation tells pytest of the plugin."""
    if not is_registered():
        pytest.skip("the package was installed before it had the plugin: make install")
    [entry] = entry_points(group="pytest11", name="sessionmgr")
    assert entry.value == "sessionmgr.testing"
    assert request.config.pluginmanager.has_plugin("sessionmgr")

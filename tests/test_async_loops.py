"""Event loops: each has engines of its own, and leaves no connection and no warning behind."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import URL, Engine, MetaData, event, func, select
from sqlalchemy.exc import InvalidRequestError

from sessionmgr import (
    AsyncSessionManager,
    EngineOptionsError,
    EventLoopError,
    ManagerClosedError,
    MissingExtraError,
)
from tests.async_helpers import ASYNC_DRIVERS, AsyncDatabase, identity, make_async_database, scalar
from tests.concurrency import in_threads
from tests.helpers import wait_until
from tests.items import Item, ItemBase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.servers import Database

TINY = {"pool_size": 2, "max_overflow": 0}
"""A pool with fewer connections than there are tasks: some have to wait, which binds its queue."""


@pytest.fixture(params=ASYNC_DRIVERS)
def there(
    request: pytest.FixtureRequest, make_database: Callable[..., Database], tmp_path: Path
) -> AsyncDatabase:
    """Make a database for each of the asynchronous drivers."""
    return make_async_database(request.param, make_database, tmp_path)


@pytest.fixture
def asyncpg(make_database: Callable[..., Database], tmp_path: Path) -> AsyncDatabase:
    """Make a database on PostgreSQL."""
    return make_async_database("asyncpg", make_database, tmp_path)


def manage() -> AsyncSessionManager:
    """Make a manager of items that keeps a few connections."""
    return AsyncSessionManager(pooling="always", metadata=ItemBase.metadata, engine_options=TINY)


def test_without_greenlet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named where the manager is made."""
    monkeypatch.setitem(sys.modules, "greenlet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sessionmgr\[asyncio\]'"):
        AsyncSessionManager()


def test_work_that_cannot_be_awaited_raises(tmp_path: Path) -> None:
    """A function for the synchronous twin is told apart; what it did is rolled back."""

    async def main() -> int | None:
        url = f"sqlite+aiosqlite:///{tmp_path}/x.db"
        async with manage() as manager:
            with pytest.raises(EngineOptionsError, match=r"coroutine function.* returned NoneType"):
                await manager.run(url, lambda session: session.add(Item(name="x")))
            async with manager.begin(url) as session:
                return await session.scalar(select(func.count()).select_from(Item))

    assert asyncio.run(main()) == 0


async def use(manager: AsyncSessionManager, url: URL, tasks: int = 4) -> None:
    """Use more sessions at once than the pool has connections."""

    async def one() -> object:
        async with await manager.session_factory(url) as session:
            return await scalar(session)

    assert await asyncio.gather(*(one() for _ in range(tasks))) == [1] * tasks


def test_loops_that_follow_one_another(there: AsyncDatabase) -> None:
    """200 loops in one process: no error, no warning, no connection and no loop stays."""
    manager = manage()
    loops = []

    async def run() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await use(manager, there.url)

    for _ in range(200):
        asyncio.run(run())
    gc.collect()
    assert [loop for loop in loops if loop() is not None] == []
    assert manager.stats().databases == ()
    wait_until(lambda: not there.connections())


def test_loops_beside_one_another(there: AsyncDatabase) -> None:
    """Two threads have a loop each, and connections of their own."""
    manager = manage()

    def run() -> None:
        for _ in range(20):
            asyncio.run(use(manager, there.url))

    in_threads([run, run])
    wait_until(lambda: not there.connections())


def test_a_loop_keeps_its_connections(asyncpg: AsyncDatabase) -> None:
    """In one loop sessions share a pool, and statistics tell of it; its end closes it."""
    manager = manage()

    async def run() -> set[int]:
        seen = set()
        for _ in range(10):
            async with manager.begin(asyncpg.url) as session:
                seen.add(await identity(session))
        [stats] = manager.stats().databases
        assert (stats.pool_class, stats.connects, stats.idle) == ("AsyncAdaptedQueuePool", 1, 1)
        assert asyncpg.connections() == seen
        return seen

    first = asyncio.run(run())
    wait_until(lambda: not asyncpg.connections())
    assert len(first) == 1
    assert asyncio.run(run()) != first


def test_loop_that_runs_again(there: AsyncDatabase) -> None:
    """A loop that stops and runs again has kept its connections."""
    manager = manage()
    with asyncio_loop() as loop:
        for _ in range(3):
            loop.run_until_complete(use(manager, there.url))
        [stats] = manager.stats().databases
        assert stats.connects <= 2
        loop.run_until_complete(manager.close())
    wait_until(lambda: not there.connections())


class asyncio_loop:  # noqa: N801 - used as a function
    """An event loop for a ``with`` statement, closed at its end as old programs do."""

    def __enter__(self) -> asyncio.AbstractEventLoop:
        self.loop = asyncio.new_event_loop()
        return self.loop

    def __exit__(self, *exception: object) -> None:
        self.loop.close()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # by asyncio, of its transports
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_loop_that_was_closed_without_a_word(there: AsyncDatabase) -> None:
    """Where nothing told of a loop's end, its connections are closed once another loop begins."""
    manager = manage()
    with asyncio_loop() as loop:
        loop.run_until_complete(use(manager, there.url))
    old = there.connections()
    assert old
    asyncio.run(use(manager, there.url))
    wait_until(lambda: not old & there.connections())
    gc.collect()


def test_block_closes_the_connections_of_its_loop(there: AsyncDatabase) -> None:
    """``async with manager`` in each of many loops; the manager stays usable."""
    manager = manage()

    async def run() -> None:
        async with manager:
            await use(manager, there.url)
        wait_until(lambda: not there.connections())

    for _ in range(3):
        asyncio.run(run())


def test_closed_manager(there: AsyncDatabase) -> None:
    """``close()`` is final, in every loop."""
    manager = manage()

    async def run() -> None:
        await use(manager, there.url)
        await manager.close()
        wait_until(lambda: not there.connections())

    async def refused() -> None:
        with pytest.raises(ManagerClosedError, match="this manager is closed"):
            await manager.session_factory(there.url)

    asyncio.run(run())
    asyncio.run(refused())


def test_loops_that_begin_and_end_while_others_look(tmp_path: Path) -> None:
    """Numbers, disposal and new loops in several threads do not disturb each other."""
    manager = manage()
    url = URL.create("sqlite+aiosqlite", database=f"{tmp_path}/file.db")

    async def begin() -> None:
        manager.get_engine(url)

    def run_loops() -> None:
        for _ in range(40):
            asyncio.run(begin())

    def look() -> None:
        for _ in range(400):
            manager.stats()

    def dispose() -> None:
        for _ in range(40):
            asyncio.run(manager.dispose())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads([run_loops, run_loops, run_loops, look, dispose])
    finally:
        sys.setswitchinterval(interval)


def test_session_that_is_opened_while_the_loop_ends(there: AsyncDatabase) -> None:
    """What a generator that ends with the loop opens then is closed with its session."""
    manager = manage()

    async def hold() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.sleep(0.01)  # the manager's own generator has ended by then
            await use(manager, there.url, tasks=1)

    generator = hold()

    async def run() -> None:
        await use(manager, there.url)
        await generator.__anext__()

    asyncio.run(run())
    wait_until(lambda: not there.connections())


def test_dispose_in_one_loop_closes_the_pools_of_all(asyncpg: AsyncDatabase) -> None:
    """Other threads' loops close their pools themselves; they go on with new ones."""
    manager = manage()
    used, disposed = threading.Barrier(2), threading.Event()

    async def other() -> None:
        await use(manager, asyncpg.url)
        await asyncio.to_thread(used.wait)
        await asyncio.to_thread(disposed.wait)
        await use(manager, asyncpg.url)

    async def run() -> None:
        await use(manager, asyncpg.url)
        await asyncio.to_thread(used.wait)
        await manager.dispose()
        await asyncio.to_thread(wait_until, lambda: not asyncpg.connections())
        disposed.set()
        await use(manager, asyncpg.url)

    in_threads([lambda: asyncio.run(run()), lambda: asyncio.run(other())])
    wait_until(lambda: not asyncpg.connections())


def test_engine_of_another_loop(asyncpg: AsyncDatabase) -> None:
    """A loop is told which engine it must not use, instead of waiting for ever."""
    manager = manage()
    other: list[AsyncEngine] = []
    there, done = threading.Event(), threading.Event()

    async def keep() -> None:
        other.append(manager.get_engine(asyncpg.url))
        there.set()
        await asyncio.to_thread(done.wait)

    async def use_it() -> None:
        await asyncio.to_thread(there.wait)
        try:
            with pytest.raises(EventLoopError, match="belongs to another event loop"):
                await other[0].connect()
            assert manager.get_engine(asyncpg.url) is not other[0]
        finally:
            done.set()

    in_threads([lambda: asyncio.run(keep()), lambda: asyncio.run(use_it())])


def test_engine_of_an_earlier_loop(there: AsyncDatabase) -> None:
    """An engine that outlived its loop works in another, without keeping connections."""
    manager = manage()

    async def get() -> AsyncEngine:
        await use(manager, there.url)
        return manager.get_engine(there.url)

    engine = asyncio.run(get())

    async def use_it() -> None:
        for _ in range(2):
            async with engine.connect() as connection:
                assert await connection.scalar(select(func.count()).select_from(Item)) == 0

    asyncio.run(use_it())
    wait_until(lambda: not there.connections())


def test_no_loop() -> None:
    """Without an event loop the error says what to do."""
    with pytest.raises(EventLoopError, match="none is running here: call it in a coroutine"):
        AsyncSessionManager().get_engine("sqlite+aiosqlite://")


def test_generators_that_end_with_the_loop_go_on_using_their_sessions(
    there: AsyncDatabase,
) -> None:
    """A session that an unfinished generator holds at the loop's end can still be rolled back."""
    manager = manage()
    ended = []

    async def hold() -> AsyncIterator[object]:
        async with manager.begin(there.url) as session:
            try:
                yield await scalar(session)
            finally:
                ended.append(await scalar(session, "SELECT 2"))

    generators = []

    async def run() -> None:
        generator = hold()
        generators.append(generator)  # or it would end with this coroutine
        assert await generator.__anext__() == 1

    asyncio.run(run())
    assert ended == [2]
    wait_until(lambda: not there.connections())


def test_memory_database_is_one_for_the_tasks_of_a_loop() -> None:
    """Tasks that begin at once share the one connection; another loop has a database of its own."""
    manager = AsyncSessionManager(metadata=ItemBase.metadata)

    async def add(number: int) -> None:
        async with await manager.session_factory("sqlite+aiosqlite://") as session:
            session.add(Item(name=f"{number}"))
            await session.commit()

    async def connect(_: int) -> int:
        async with manager.get_engine("sqlite+aiosqlite://").connect() as connection:
            return id((await connection.get_raw_connection()).driver_connection)

    async def run() -> int:
        assert len(set(await asyncio.gather(*map(connect, range(5))))) == 1
        for number in range(5):
            await add(number)
        async with await manager.session_factory("sqlite+aiosqlite://") as session:
            return await session.scalar(select(func.count()).select_from(Item)) or 0

    assert [asyncio.run(run()) for _ in range(2)] == [5, 5]


def test_manager_that_is_let_go(there: AsyncDatabase) -> None:
    """A manager that nobody refers to any more closes its connections, while its loop runs."""

    async def run() -> None:
        manager = manage()
        await use(manager, there.url)
        del manager
        gc.collect()
        await asyncio.to_thread(wait_until, lambda: not there.connections())

    asyncio.run(run())


def test_begin_is_for_one_block(asyncpg: AsyncDatabase) -> None:
    """A block that is entered twice is refused, instead of losing its first session."""
    manager = manage()

    async def run() -> None:
        block = manager.begin(asyncpg.url)
        async with block:
            with pytest.raises(InvalidRequestError, match="call it again for another"):
                await block.__aenter__()
        [stats] = manager.stats().databases
        assert stats.checked_out == 0

    asyncio.run(run())


def test_connection_lost_while_it_is_set_up(make_database: Callable[..., Database]) -> None:
    """SQLAlchemy asks the server for asyncpg's codecs: what fails there is done again as well."""
    database = make_database("asyncpg")
    killed = []

    def kill_first(dbapi_connection: Any, record: object) -> None:
        if not killed:
            killed.append(dbapi_connection.driver_connection.get_server_pid())
            database.server.kill(killed[0])
            wait_until(lambda: killed[0] not in database.connections())

    def callback(engine: Engine) -> None:
        event.listen(engine, "connect", kill_first, insert=True)

    async def main() -> object:
        async with AsyncSessionManager(callback, metadata=MetaData()) as manager:
            return await manager.run(database.url, scalar)

    assert asyncio.run(main()) == 1
    assert len(killed) == 1

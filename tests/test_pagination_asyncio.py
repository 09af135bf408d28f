"""Pages by number for asynchronous sessions: the same, awaited."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import joinedload

from sessionmgr import PageNotFoundError, paginate
from sessionmgr.pagination import AsyncPagination
from tests.async_helpers import make_async_database
from tests.shelves import Author, Book, fill_shelf

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.servers import Database

    OnShelf = Callable[[Callable[[AsyncSession], Awaitable[None]]], None]

BOOKS = select(Book).order_by(Book.id)


@pytest.fixture(params=["asyncpg", "aiosqlite"])
def on_shelf(
    request: pytest.FixtureRequest, make_database: Callable[..., Database], tmp_path: Path
) -> OnShelf:
    """Return what runs work with an asynchronous session on a database of authors and books."""
    database = make_async_database(request.param, make_database, tmp_path)

    async def run(work: Callable[[AsyncSession], Awaitable[None]]) -> None:
        engine = create_async_engine(database.url)
        async with engine.connect() as connection:
            await connection.run_sync(fill_shelf)
            await connection.commit()
        async with AsyncSession(engine) as session:
            await work(session)
        await engine.dispose()

    return lambda work: asyncio.run(run(work))


def told(page: AsyncPagination) -> tuple[Any, ...]:
    """Return what a page tells."""
    return ([book.id for book in page], page.page, page.total, page.pages, page.has_next)


def test_pages(on_shelf: OnShelf) -> None:
    """Pages are read, turned, counted, and missed, as by a session that blocks."""

    async def work(session: AsyncSession) -> None:
        page = await paginate(session, BOOKS, page=2, per_page=8)
        assert type(page) is AsyncPagination
        assert told(page) == (list(range(9, 17)), 2, 21, 3, True)
        assert told(await page.next()) == (list(range(17, 22)), 3, 21, 3, False)
        assert told(await page.prev()) == (list(range(1, 9)), 1, 21, 3, True)
        uncounted = await paginate(session, BOOKS, page=2, per_page=8, count=False)
        assert told(uncounted) == (list(range(9, 17)), 2, None, 0, True)
        assert list(page.iter_pages()) == [1, 2, 3]
        with pytest.raises(PageNotFoundError, match="page 4 was asked for"):
            await (await page.next()).next(error_out=True)
        with pytest.raises(PageNotFoundError, match="page=0 was asked for"):
            await paginate(session, BOOKS, page=0)

    on_shelf(work)


def test_statements(on_shelf: OnShelf) -> None:
    """Eager loads need nothing more; joins are cut by rows."""

    async def work(session: AsyncSession) -> None:
        eager = select(Author).options(joinedload(Author.books)).order_by(Author.id)
        page = await paginate(session, eager, per_page=5)
        assert [len(author.books) for author in page] == [0, 1, 2, 3, 4]
        joined = select(Author).join(Author.books).order_by(Book.id)
        page = await paginate(session, joined, page=4, per_page=5, count=False)
        assert ([author.id for author in page], page.has_next) == ([7], True)

    on_shelf(work)


def test_scoped_session(tmp_path: Path) -> None:
    """An asynchronous scoped session stays one, from page to page."""

    async def work() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/one.db")
        async with engine.connect() as connection:
            await connection.run_sync(fill_shelf)
            await connection.commit()
        maker = async_sessionmaker(engine)
        sessions = async_scoped_session(maker, scopefunc=asyncio.current_task)
        page = await paginate(sessions, BOOKS, per_page=8)
        await sessions.remove()
        assert [book.id for book in await page.next()] == list(range(9, 17))
        await sessions.remove()
        await engine.dispose()

    asyncio.run(work())

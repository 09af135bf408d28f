"""Keyset pages: cursors that are none, and selects that have no such pages."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    JSON,
    String,
    Uuid,
    case,
    create_engine,
    func,
    literal,
    literal_column,
    null,
    select,
    type_coerce,
    union,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from sessionmgr import PageNotFoundError, PaginationError
from sessionmgr.keyset import paginate_keyset
from sessionmgr.keyset_cursor import _digest, write_cursor
from sessionmgr.keyset_order import find_order
from tests.servers import ASYNC_DRIVERS, DRIVERS
from tests.shelves import Author, Book, filled_shelf
from tests.test_keyset import COLUMNS, Thing, ThingBase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL

    from tests.servers import Database

TEXT_UUID = type_coerce(Thing.uid, Uuid(as_uuid=False))

STATEMENT = select(Book).order_by(Book.title, Book.year.desc())


@pytest.fixture(scope="module")
def reader() -> Iterator[Session]:
    """Return a session for authors and books in memory."""
    with filled_shelf("sqlite://") as engine, Session(engine) as session:
        yield session


def cursor_of(session: Session, statement: Any) -> str:
    """Return the cursor of the first page."""
    cursor = paginate_keyset(session, statement, per_page=2).after
    assert cursor is not None
    return cursor


# -- cursors


def test_cursor_is_for_urls(reader: Session) -> None:
    """A cursor is text that needs no quoting, and holds JSON."""
    cursor = cursor_of(reader, STATEMENT)
    assert re.fullmatch(r"[\w-]+", cursor)
    digest, *values = json.loads(base64.urlsafe_b64decode(cursor + "=="))
    assert len(digest) == 24
    assert values == ["book 0", 2002, 8]


@pytest.mark.parametrize(
    "cursor",
    ["", "?", "x", "ö", "W10", "e30", "NQ", "bnVsbA", "W" * 10_000, "WyJhIl0=", 7, b"W10"],
)
def test_nonsense_for_a_cursor(reader: Session, cursor: Any) -> None:
    """What is no cursor is not found, and not shown in the error."""
    with pytest.raises(PageNotFoundError, match=r"^the cursor .* is damaged") as got:
        paginate_keyset(reader, STATEMENT, after=cursor)
    assert got.value.__context__ is None


def test_damaged_cursors(reader: Session) -> None:
    """A cursor of which any part is changed, missing or added is not found."""
    cursor = cursor_of(reader, STATEMENT)
    chance = random.Random(7)
    for _ in range(300):
        place = chance.randrange(len(cursor))
        kept = chance.choice((cursor[:place], cursor[: place + 1]))
        damaged = (
            kept + chance.choice("abcXYZ019-_") * chance.choice((0, 1, 2)) + cursor[place + 1 :]
        )
        if damaged != cursor:
            with pytest.raises(PageNotFoundError):
                paginate_keyset(reader, STATEMENT, after=damaged)


@pytest.mark.parametrize(
    "other",
    [
        STATEMENT.order_by(None).order_by(Book.title, Book.year),
        STATEMENT.order_by(None).order_by(Book.year.desc(), Book.title),
        STATEMENT.order_by(None).order_by(Book.title.desc(), Book.year.desc()),
        STATEMENT.order_by(None).order_by(Book.title),
        select(Author).order_by(Author.name),
        STATEMENT.order_by(None).order_by(func.coalesce(Book.title, "x"), Book.year.desc()),
    ],
)
def test_cursor_of_another_order(reader: Session, other: Any) -> None:
    """A cursor is for the order of its select, whatever else that selects or leaves out."""
    cursor = cursor_of(reader, STATEMENT)
    assert paginate_keyset(reader, STATEMENT.where(Book.year > 2000), after=cursor).items
    with pytest.raises(PageNotFoundError):
        paginate_keyset(reader, other, after=cursor)


def test_values_in_an_expression_are_of_the_order(reader: Session) -> None:
    """Two orders that differ by a value only are two."""
    one, two = (select(Author).order_by(func.coalesce(Author.born, year)) for year in (1, 2))
    cursor = cursor_of(reader, one)
    assert paginate_keyset(reader, one, after=cursor).items
    with pytest.raises(PageNotFoundError):
        paginate_keyset(reader, two, after=cursor)


FORGED: list[Any] = [
    None,
    [],
    {},
    "text",
    "nul\0",
    "\ud800",
    2**63,
    10**400,
    float("nan"),
    ["decimal", "NaN"],
    ["decimal", "1e999999"],
    ["decimal", "x"],
    ["datetime", "2024"],
    ["date", "2024-02-30"],
    ["uuid", "7"],
    ["bytes", "7"],
    ["pickle", "x"],
    ["date"],
    [["date"], 7],
    ["uuid", 7],
    ["bytes", 7],
    ["datetime", "0001-01-01T00:00:00+14:00"],
]

ODD: list[Any] = [
    True,
    7,
    -(2**40),
    1.5,
    float("inf"),
    "other",
    ["decimal", "1e900"],
    ["decimal", "1e-900"],
    ["datetime", "9999-12-31T23:59:59"],
    ["datetime", "2024-01-01T00:00:00+23:59"],
    ["date", "0001-01-01"],
    ["time", "23:59:59+05:00"],
]


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_forged_cursors(make_database: Callable[..., Database], driver: str) -> None:
    """Values that no driver or database would take are not sent, though the digest be right."""
    with filled_shelf(make_database(driver).url) as engine, Session(engine) as session:
        for column, honest in ((Book.year, 2001), (Book.title, "book 1")):
            statement = select(Book).order_by(column)
            keys = find_order(statement, engine.dialect.name)
            for value in FORGED:
                if value == "text" and column is Book.title:
                    continue
                forged = [value, 7]
                text = json.dumps([_digest(keys, forged), *forged])
                cursor = base64.urlsafe_b64encode(text.encode()).decode()
                with pytest.raises(PageNotFoundError):
                    paginate_keyset(session, statement, after=cursor)
            text = json.dumps([_digest(keys, [honest, 7]), honest, 7])
            cursor = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
            assert paginate_keyset(session, statement, after=cursor).items


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pymysql"])
def test_forged_cursors_of_all_types(make_database: Callable[..., Database], driver: str) -> None:
    """A value of any type, for a key of any type, is not found, or some place in the order."""
    engine = create_engine(make_database(driver).url)
    ThingBase.metadata.create_all(engine)
    keys = [getattr(Thing, name) for name in COLUMNS]
    with Session(engine) as session:
        for statement in [select(Thing).order_by(key) for key in [*keys, TEXT_UUID]]:
            order = find_order(statement, engine.dialect.name)
            for value in FORGED + ODD:
                forged = [value, 7]
                text = json.dumps([_digest(order, forged), *forged])
                cursor = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
                with suppress(PageNotFoundError):
                    paginate_keyset(session, statement, after=cursor)
    engine.dispose()


class LatinBase(DeclarativeBase):
    """Base of a table in a character set of few letters."""


class Word(LatinBase):
    """A word of Western Europe."""

    __tablename__ = "word"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(
        String(20).with_variant(mysql.VARCHAR(20, charset="latin1"), "mysql", "mariadb")
    )


@pytest.fixture
def latin_url(make_database: Callable[..., Database], driver: str) -> Iterator[URL]:
    """Return the URL of a database whose words are in Latin-1."""
    database = make_database(driver)
    if not database.is_postgresql:
        yield database.url
        return
    name = f"{database.name}_latin"
    database.server.query(
        f"CREATE DATABASE {name} OWNER {database.url.username} ENCODING 'LATIN1' LC_COLLATE 'C'"
        " LC_CTYPE 'C' TEMPLATE template0"
    )
    try:
        yield database.url.set(database=name)
    finally:
        database.server.drop_database(name)


@pytest.mark.parametrize("driver", [*DRIVERS, *ASYNC_DRIVERS])
def test_text_that_no_row_can_have(latin_url: URL) -> None:
    """A forged text in letters that the key's character set lacks is not found; others are."""

    def read(session: Session) -> None:
        session.add_all([Word(text=text) for text in ("côte", "coté", "été")])
        session.commit()
        statement = select(Word.text).order_by(Word.text, Word.id)
        keys = find_order(statement, session.get_bind().dialect.name)
        assert paginate_keyset(session, statement, after=write_cursor(keys, ["dé", 1])).items
        with pytest.raises(PageNotFoundError, match=r"^the cursor .* is damaged"):
            paginate_keyset(session, statement, after=write_cursor(keys, ["日本", 1]))

    async def read_async() -> None:
        engine = create_async_engine(latin_url)
        async with engine.begin() as connection:
            await connection.run_sync(LatinBase.metadata.create_all)
        async with AsyncSession(engine) as session:
            await session.run_sync(read)
            statement = select(Word.text).order_by(Word.text, Word.id)
            keys = find_order(statement, engine.dialect.name)
            await session.rollback()
            with pytest.raises(PageNotFoundError, match=r"^the cursor .* is damaged"):
                await paginate_keyset(session, statement, after=write_cursor(keys, ["日本", 1]))
        await engine.dispose()

    if latin_url.get_dialect().is_async:
        asyncio.run(read_async())
        return
    engine = create_engine(latin_url)
    LatinBase.metadata.create_all(engine)
    with Session(engine) as session:
        read(session)
    engine.dispose()


@pytest.mark.parametrize("driver", ["pymysql"])
def test_texts_of_the_selects_own(latin_url: URL) -> None:
    """A text in the select itself that the database cannot compare is the driver's error."""
    engine = create_engine(latin_url)
    LatinBase.metadata.create_all(engine)
    statement = select(Word.text).where(Word.text > "日本").order_by(Word.text)
    with Session(engine) as session, pytest.raises(DBAPIError, match="collations"):
        paginate_keyset(session, statement)
    engine.dispose()


# -- selects that have no keyset pages

KEYLESS = select(Book.title, Book.year).subquery()
BOOK_OF = aliased(Book)

REFUSED: dict[str, tuple[Any, str]] = {
    "no order": (select(Book), "it has none"),
    "nullable": (select(Author).order_by(Author.born), r"author.born may be NULL.*coalesce\("),
    "falling": (select(Author).order_by(Author.born.desc()), "coalesce"),
    "within": (select(Author).order_by(func.abs(Author.born) + 1), "coalesce"),
    "coalesce": (
        select(Author).order_by(func.coalesce(Author.born, null())),
        "coalesce",
    ),
    "nullif": (select(Book).order_by(func.nullif(Book.year, 2001)), "coalesce"),
    "case": (select(Book).order_by(case((Book.year > 1, 1))), "coalesce"),
    "scalar subquery": (
        select(Author).order_by(select(Book.id).where(Book.id == Author.id).scalar_subquery()),
        "coalesce",
    ),
    "unknown": (select(Book).order_by(literal_column("title")), "coalesce"),
    "nulls first": (select(Book).order_by(Book.year.nulls_first()), "NULLS FIRST"),
    "nulls last": (select(Book).order_by(Book.year.desc().nulls_last()), "NULLS LAST"),
    "outer join": (
        select(Book, Author).outerjoin(Book.author).order_by(Author.name),
        "author.name may be NULL",
    ),
    "full join": (
        select(Book.id, Author.id).join(Book.author, full=True).order_by(Book.id),
        "book.id may be NULL",
    ),
    "outer join of many": (
        select(Author.name, Book.title).outerjoin(Author.books).order_by(Author.name),
        "book.id may be NULL",
    ),
    "no table": (select(literal(1).label("one")).order_by("one"), "without a table"),
    "subquery": (select(KEYLESS).order_by(KEYLESS.c.title), "no primary key"),
    "union": (
        union(select(Book.id), select(Author.id)).order_by("id"),
        "a union has no keyset pages",
    ),
    "group by": (
        select(Book.title, func.count()).group_by(Book.title).order_by(Book.title),
        "GROUP BY",
    ),
    "distinct": (select(Book.title).distinct().order_by(Book.title), "DISTINCT"),
    "limit": (select(Book).order_by(Book.id).limit(3), "LIMIT"),
    "offset": (select(Book).order_by(Book.id).offset(3), "OFFSET"),
    "window": (
        select(Book).order_by(func.row_number().over(order_by=Book.year)),
        "window function",
    ),
    "unknown label": (select(Book).order_by("nothing"), "no column of that name"),
}


@pytest.mark.parametrize(("statement", "text"), REFUSED.values(), ids=REFUSED)
def test_selects_without_keyset_pages(reader: Session, statement: Any, text: str) -> None:
    """What cannot be continued by a condition is refused, with the way out."""
    with pytest.raises(PaginationError, match=text):
        paginate_keyset(reader, statement)


def test_json_without_the_key(reader: Session) -> None:
    """A place in JSON, or in an array, may hold nothing, whatever its column says."""
    document = type_coerce(Book.title, JSON())["key"]
    for place in (document.as_string(), document, type_coerce(Book.title, JSON())[("a", "b")]):
        with pytest.raises(PaginationError, match="may be NULL"):
            paginate_keyset(reader, select(Book).order_by(place))


def test_null_that_no_column_announced(reader: Session) -> None:
    """A function that gives NULL nevertheless is found where the cursor would hold it."""
    missing = func.json_extract("{}", "$.missing", type_=String())
    statement = select(Book).order_by(missing)
    with pytest.raises(PaginationError, match=r"was NULL in a row.*order by coalesce\("):
        paginate_keyset(reader, statement, per_page=2)
    cursor_of(reader, select(Book).order_by(func.coalesce(missing, "")))


def test_values_that_no_cursor_carries() -> None:
    """A type of key that has no text is named."""
    keys = find_order(select(Book).order_by(Book.id), "sqlite")
    for value in (timedelta(1), float("nan")):
        with pytest.raises(PaginationError, match="which no cursor can carry"):
            write_cursor(keys, [value])

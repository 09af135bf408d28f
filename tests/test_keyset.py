"""Keyset pages: all rows in their order, whatever their types and whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import enum
import uuid
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    DateTime,
    Double,
    Enum,
    Float,
    Numeric,
    String,
    case,
    create_engine,
    extract,
    func,
    select,
)
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, joinedload, mapped_column
from sqlalchemy.sql.operators import desc_op

from sessionmgr import PageNotFoundError
from sessionmgr.keyset import KeysetPage, paginate_keyset
from tests.async_helpers import make_async_database
from tests.shelves import Author, Book, fill_shelf, filled_shelf, statements_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL, Engine

    from tests.servers import Database

DRIVERS = ["sqlite", "psycopg", "pymysql"]

AWARE = datetime(2024, 5, 17, 23, 59, 58, tzinfo=timezone.utc)


class Color(enum.Enum):
    """In an order that is not the alphabet's."""

    RED = "r"
    GREEN = "g"
    BLUE = "b"


class ThingBase(DeclarativeBase):
    """Base of the tests' own."""


class Thing(ThingBase):
    """A row with a column of every type that a cursor carries."""

    __tablename__ = "thing"

    id: Mapped[int] = mapped_column(primary_key=True)
    whole: Mapped[int]
    text: Mapped[str] = mapped_column(String(50))
    flag: Mapped[bool]
    amount: Mapped[Decimal] = mapped_column(Numeric(10, 3))
    single: Mapped[float] = mapped_column(Float(20))
    double: Mapped[float] = mapped_column(Double())
    at: Mapped[datetime]
    zoned: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    day: Mapped[date]
    clock: Mapped[time]
    uid: Mapped[uuid.UUID]
    raw: Mapped[bytes]
    color: Mapped[Color]
    letter: Mapped[Color] = mapped_column(
        Enum(Color, native_enum=False, values_callable=lambda all_: [one.value for one in all_])
    )
    size: Mapped[str] = mapped_column(Enum("small", "large", "huge", name="size"))


COLUMNS = [column.key for column in Thing.__table__.columns if column.key != "id"]


def things() -> Iterator[Thing]:
    """Make 14 rows, of which some share each value."""
    for number in range(1, 15):
        part = number * 5 % 7
        yield Thing(
            id=number,
            whole=part - 3,
            text="zoë~'\"%:"[part:] * 2,
            flag=part > 3,
            amount=Decimal(part) / 8,
            single=part / 10 + 16777.2,
            double=part / 10,
            at=AWARE.replace(tzinfo=None) + timedelta(seconds=part),
            zoned=AWARE + timedelta(hours=part),
            day=date(2024, 2, 27) + timedelta(days=part),
            clock=time(12, 59, part),
            uid=uuid.UUID(int=part << 120 | part),
            raw=bytes([255 - part, 0, 10]),
            color=list(Color)[part % 3],
            letter=list(Color)[part % 3],
            size=["small", "large", "huge"][part % 3],
        )


def walk(session: Session, statement: Any, per_page: int = 3) -> list[Any]:
    """Read all pages, and return what stands on them."""
    page, shown = paginate_keyset(session, statement, per_page=per_page), []
    shown += page
    while page.has_next:
        assert len(shown) < 100, "the pages do not end"
        assert len(page.items) <= per_page
        page = paginate_keyset(session, statement, per_page=per_page, after=page.after)
        assert page.items
        shown += page
    return shown


@pytest.fixture(params=DRIVERS)
def url(request: pytest.FixtureRequest, make_database: Callable[..., Database]) -> URL | str:
    """Return the URL of an empty database, of each kind."""
    return "sqlite://" if request.param == "sqlite" else make_database(request.param).url


@pytest.fixture
def shelf(url: URL | str) -> Iterator[Engine]:
    """Return an engine of authors and books."""
    with filled_shelf(url) as engine:
        yield engine


@pytest.fixture
def books() -> Iterator[Session]:
    """Return a session for authors and books in memory."""
    with filled_shelf("sqlite://") as engine, Session(engine) as session:
        yield session


# -- all rows in their order


@pytest.mark.filterwarnings("ignore:Dialect sqlite:sqlalchemy.exc.SAWarning")
def test_types(url: URL | str) -> None:
    """Keys of every type lead from page to page, in both directions, and beside another key."""
    engine = create_engine(url)
    ThingBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(things())
        session.commit()
        for name in COLUMNS:
            column = getattr(Thing, name)
            falling = select(Thing.id).order_by(column.desc(), Thing.id)
            assert walk(session, falling) == session.scalars(falling).all(), name
            rising = select(Thing).order_by(column)
            expected = session.scalars(rising.order_by(Thing.id)).all()
            assert walk(session, rising) == expected, name
    engine.dispose()


class Stamped(ThingBase):
    """A row whose values the database has otherwise than SQLAlchemy gives them."""

    __tablename__ = "stamped"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    ratio: Mapped[float] = mapped_column(Numeric(30, 20, asdecimal=False))


STAMPED = {
    "the server's time": Stamped.at,
    "digits beyond the scale": Stamped.price,
    "digits beyond a float": Stamped.ratio,
    "fractions of seconds": extract("epoch", Stamped.at),
}


def test_keys_that_lose_something_on_the_way(url: URL | str) -> None:
    """Rows are compared as the database has them, not as SQLAlchemy shows them."""
    engine = create_engine(url)
    ThingBase.metadata.create_all(engine)
    with Session(engine) as session:
        for number in range(1, 9):
            ratio = Decimal("0.1234567890123") + Decimal(10 - number).scaleb(-20)
            session.add(Stamped(price=Decimal("1.005"), ratio=ratio))
            session.commit()  # PostgreSQL's time is the transaction's
        for name, key in STAMPED.items():
            if name == "fractions of seconds" and engine.dialect.name != "postgresql":
                continue
            for order in (key.asc(), key.desc()):
                last = Stamped.id.desc() if order.modifier is desc_op else Stamped.id
                expected = session.scalars(select(Stamped.id).order_by(order, last)).all()
                assert walk(session, select(Stamped.id).order_by(order)) == expected, name
    engine.dispose()


LABELLED = (Book.year + 1).label("next")
OTHER = aliased(Book)
STATEMENTS: dict[str, Any] = {
    "key": select(Book).order_by(Book.id),
    "key, falling": select(Book).order_by(Book.id.desc()),
    "ties": select(Book).order_by(Book.year),
    "ties, falling": select(Book).order_by(Book.year.desc()),
    "two keys": select(Book).order_by(Book.title, Book.year),
    "mixed": select(Book).order_by(Book.title.desc(), Book.year),
    "mixed, of three": select(Book).order_by(Book.title, Book.year.desc(), Book.id),
    "label": select(Book, LABELLED).order_by(LABELLED.desc(), Book.title),
    "named label": select(Book.id, LABELLED).order_by("next"),
    "expression": select(Book).order_by(func.lower(Book.title) + "x", -Book.year),
    "coalesce": select(Author).order_by(func.coalesce(Author.born, 7), Author.name),
    "case": select(Book).order_by(case((Book.year > 2001, 1), else_=0)),
    "alias": select(OTHER).order_by(OTHER.title),
    "many to one": select(Book).join(Book.author).order_by(Author.name, Book.title),
    "many to one, columns": select(Book.title, Author.name)
    .join(Book.author)
    .order_by(Author.name.desc()),
    "key of no other's": select(Author.name, Book.id)
    .join(Book, Book.id == Book.year - 2000 + Author.id)
    .order_by(Author.name),
    "one to many": select(Author.name, Book.title).join(Author.books).order_by(Author.name),
    "outer": select(Book, Author.name).outerjoin(Book.author).order_by(Book.title),
    "self join": select(Book.id, OTHER.id)
    .join(OTHER, Book.author_id == OTHER.author_id)
    .order_by(Book.title),
    "eager": select(Author).options(joinedload(Author.books)).order_by(Author.name.desc()),
    "eager, joined": select(Book)
    .join(Book.author)
    .options(joinedload(Book.author).joinedload(Author.books))
    .order_by(Author.name),
    "repeated": select(Author).join(Author.books).order_by(Author.name),
    "distinct": select(Author).join(Author.books).distinct().order_by(Author.name),
    "table": select(Book.__table__).order_by(Book.__table__.c.title),
    "where": select(Book).where(Book.year > 2000, Book.id > 3).order_by(Book.year),
}


def test_orders(shelf: Engine) -> None:
    """Pages of a select are its rows in its order, none twice, none left out."""
    with Session(shelf) as session:
        for name, statement in STATEMENTS.items():
            result = session.execute(statement)
            if name in ("eager", "eager, joined", "repeated"):
                result = result.unique()
            rows = [row[0] if len(row) == 1 else row for row in result]
            for per_page in (1, 4, len(rows)):
                shown = walk(session, statement, per_page)
                assert len(shown) == len(rows), name
                assert set(shown) == set(rows), name


def test_ties_are_in_the_order_of_the_key(shelf: Engine) -> None:
    """The primary key is added to the order, in the direction of what is last in it."""
    years = {number: 2000 + number % 3 for number in range(1, 22)}
    with Session(shelf) as session:
        rising = walk(session, select(Book.id).order_by(Book.year), 4)
        assert rising == sorted(years, key=lambda number: (years[number], number))
        mixed = walk(session, select(Book.id).order_by(Book.author_id, Book.year.desc()), 4)
        author = {book.id: book.author_id for book in session.scalars(select(Book))}
        assert mixed == sorted(years, key=lambda n: (author[n], -years[n], -n))


def test_rows_that_come_and_go(shelf: Engine) -> None:
    """Rows added and deleted between pages, before and after the place, move no other row."""
    statement = select(Book).order_by(Book.year, Book.title.desc())
    with Session(shelf) as session:
        before = [book.id for book in walk(session, statement)]
        page = paginate_keyset(session, statement, per_page=5)
        shown = [book.id for book in page]
        for number in range(3):
            unseen = [book for book in before if book not in shown]
            with Session(shelf) as writer, writer.begin():
                for book in (shown[-1], unseen[1]):
                    writer.delete(writer.get_one(Book, book))
                writer.add(Book(id=100 + number, title="a", year=1990, author_id=1))
                writer.add(Book(id=200 + number, title="a", year=2090, author_id=1))
            before.remove(unseen[1])
            session.rollback()
            page = paginate_keyset(session, statement, per_page=5, after=page.after)
            shown += [book.id for book in page]
        page = paginate_keyset(session, statement, per_page=5, after=page.after)
        assert not page.has_next
        assert shown + [book.id for book in page] == [*before, 202, 201, 200]


def test_last_page_is_known(books: Session) -> None:
    """The page that ends with the last row has no cursor, also when it is full."""
    statement = select(Book).order_by(Book.year)
    page = paginate_keyset(books, statement, per_page=21)
    assert (len(page.items), page.after, page.has_next) == (21, None, False)
    page = paginate_keyset(books, statement, per_page=20)
    assert page.after is not None
    last = paginate_keyset(books, statement, per_page=20, after=page.after)
    assert (len(last.items), last.has_next) == (1, False)
    empty = paginate_keyset(books, select(Book).where(Book.id < 0).order_by(Book.id))
    assert (empty.items, empty.per_page, empty.after) == ([], 20, None)


def test_rows_keep_their_names(books: Session) -> None:
    """What a select gives is what it gives without pages: the keys are not among it."""
    statement = select(Book.title, Author.name).join(Book.author).order_by(Book.year)
    row = paginate_keyset(books, statement).items[0]
    assert row._fields == ("title", "name")
    assert row.name == row[1]
    assert len(paginate_keyset(books, select(Book.title).order_by(Book.id)).items[0]) == 6


def test_one_statement_for_a_page(books: Session) -> None:
    """One more row tells whether there is a page after this one; nothing is counted."""
    with statements_of(books.get_bind()) as statements:
        for statement in (
            select(Book).order_by(Book.title),
            select(Book.title, Author.name).join(Book.author).order_by(Book.title),
            select(Author).options(joinedload(Author.books)).order_by(Author.name),
        ):
            page = paginate_keyset(books, statement, per_page=6)
            paginate_keyset(books, statement, per_page=6, after=page.after)
    assert len(statements) == 6


def test_size_of_pages(books: Session) -> None:
    """Sizes are checked and cut as those of pages by number are."""
    statement = select(Book).order_by(Book.id)
    assert paginate_keyset(books, statement, per_page=9, max_per_page=4).per_page == 4
    assert paginate_keyset(books, statement, per_page=None).per_page == 20
    with pytest.raises(PageNotFoundError, match="per_page=0 was asked for"):
        paginate_keyset(books, statement, per_page=0)


@pytest.mark.parametrize("driver", ["asyncpg", "aiosqlite"])
def test_asynchronous_session(
    make_database: Callable[..., Database], tmp_path: Path, driver: str
) -> None:
    """The page of an asynchronous session is awaited."""
    database = make_async_database(driver, make_database, tmp_path)

    async def work() -> None:
        engine = create_async_engine(database.url)
        async with engine.connect() as connection:
            await connection.run_sync(fill_shelf)
            await connection.commit()
        async with AsyncSession(engine) as session:
            for statement in (
                select(Book).order_by(Book.title.desc(), Book.year),
                select(Author).join(Author.books).order_by(Author.name),
            ):
                page = await paginate_keyset(session, statement, per_page=4)
                shown = list(page)
                while page.has_next:
                    page = await paginate_keyset(session, statement, per_page=4, after=page.after)
                    assert type(page) is KeysetPage
                    shown += page
                assert set(shown) == set(await session.scalars(statement))
                assert len(set(shown)) == len(shown)
        await engine.dispose()

    asyncio.run(work())

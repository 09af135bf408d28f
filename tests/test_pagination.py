"""Pages by number: what they hold, what they tell, and what is asked of the database for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Integer, column, create_engine, delete, event, func, select, text, union
from sqlalchemy.orm import (
    Session,
    aliased,
    contains_eager,
    joinedload,
    scoped_session,
    sessionmaker,
    with_loader_criteria,
)

from sessionmgr import PageNotFoundError, PaginationError, paginate
from sessionmgr.pagination import Pagination, page_arguments
from tests.shelves import Author, Book, ShelfBase, fill_shelf, filled_shelf, statements_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Engine

    from tests.servers import Database

BOOKS = select(Book).order_by(Book.id)
AUTHORS = select(Author).order_by(Author.id)


@pytest.fixture(scope="module")
def shelf() -> Iterator[Engine]:
    """Return an engine of authors and books in memory."""
    with filled_shelf("sqlite://") as engine:
        yield engine


@pytest.fixture
def reader(shelf: Engine) -> Iterator[Session]:
    """Return a session that reads them."""
    with Session(shelf) as session:
        yield session


def state(page: Pagination) -> dict[str, Any]:
    """Return what a page tells."""
    names = ("page", "per_page", "total", "pages", "prev_num", "next_num", "first", "last")
    return {name: getattr(page, name) for name in names} | {"items": len(page.items)}


# -- what a page tells


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"page": 1},
            {"prev_num": None, "next_num": 2, "first": 1, "last": 5, "items": 5},
        ),
        (
            {"page": 2},
            {"prev_num": 1, "next_num": 3, "first": 6, "last": 10, "items": 5},
        ),
        (
            {"page": 5},
            {"prev_num": 4, "next_num": None, "first": 21, "last": 21, "items": 1},
        ),
        (
            {"page": 6, "error_out": False},
            {"prev_num": 5, "next_num": None, "first": 0, "last": 0, "items": 0},
        ),
    ],
)
def test_pages(reader: Session, asked: dict[str, Any], told: dict[str, Any]) -> None:
    """A page tells its place among 21 rows, 5 to a page, counted or not."""
    page = paginate(reader, BOOKS, per_page=5, **asked)
    assert state(page) == told | {"page": asked["page"], "per_page": 5, "total": 21, "pages": 5}
    assert (page.has_prev, page.has_next) == (page.page > 1, page.page < 5)
    assert list(page) == page.items
    uncounted = paginate(reader, BOOKS, per_page=5, count=False, **asked)
    assert state(uncounted) == state(page) | {"total": None, "pages": 0}
    assert uncounted.items == page.items


@pytest.mark.parametrize("per_page", [7, 21, 20, 22])
@pytest.mark.parametrize("count", [True, False])
def test_has_next_at_the_boundaries(reader: Session, per_page: int, count: bool) -> None:
    """The last page is known as such, also when it is full; all pages together are all rows."""
    page, seen = paginate(reader, BOOKS, per_page=per_page, count=count), []
    seen += page
    while page.has_next:
        page = page.next(error_out=True)
        seen += page
    assert [book.id for book in seen] == list(range(1, 22))
    assert page.page == -(-21 // per_page)


def test_first_page_may_be_empty(shelf: Engine, reader: Session) -> None:
    """A table without rows has one empty page, which is no error; its second one is."""
    nothing = select(Book).where(Book.id < 0)
    with statements_of(shelf) as statements:
        page = paginate(reader, nothing)
    assert len(statements) == 1  # nobody has to count
    place = {"prev_num": None, "next_num": None, "first": 0, "last": 0}
    assert state(page) == place | {"page": 1, "per_page": 20, "total": 0, "pages": 0, "items": 0}
    assert list(page.iter_pages()) == []
    with pytest.raises(PageNotFoundError, match="page 2 was asked for: the last one of 0 rows"):
        paginate(reader, nothing, page=2)


def test_turning_pages_keeps_the_settings(reader: Session) -> None:
    """``prev`` and ``next`` go on with the sizes, the limit, and the counting of their page."""
    page = paginate(reader, BOOKS, page=2, per_page=150, max_per_page=8, count=False)
    for turned in (page.prev(), page.next()):
        assert (turned.per_page, turned.max_per_page, turned.total) == (8, 8, None)
    assert [book.id for book in page.next()] == [17, 18, 19, 20, 21]
    assert page.prev().prev().page == 1
    with pytest.raises(PageNotFoundError):
        page.prev().prev(error_out=True)
    assert page.next().next().items == []
    with pytest.raises(PageNotFoundError, match="page 4 was asked for: there is nothing on it"):
        page.next().next(error_out=True)


def test_no_limit_of_rows(reader: Session) -> None:
    """Pages have 100 rows at most, unless another limit is given, or none."""
    assert paginate(reader, BOOKS, per_page=10**30).per_page == 100
    assert paginate(reader, BOOKS, per_page=101, max_per_page=None).per_page == 101
    assert paginate(reader, BOOKS, per_page=7, max_per_page=6).per_page == 6
    assert paginate(reader, BOOKS, max_per_page=6).per_page == 6


# -- what may be asked for


@pytest.mark.parametrize("name", ["page", "per_page"])
@pytest.mark.parametrize(
    "value",
    [0, -1, "2", "2" * 5000, 2.0, True, b"1", [1], 2**63, 10**5000],
    ids=["zero", "-1", "text", "long", "float", "True", "bytes", "list", "64 bits", "huge"],
)
def test_nonsense(reader: Session, name: str, value: object) -> None:
    """What is no integer from 1, or leads beyond 64 bits, is not found, or what is usual."""
    asked: dict[str, Any] = {name: value, "max_per_page": None}
    with pytest.raises(PageNotFoundError, match=f"^{name}=.* was asked for") as caught:
        paginate(reader, BOOKS, **asked)
    assert isinstance(caught.value, LookupError)
    assert len(str(caught.value)) < 160
    page = paginate(reader, BOOKS, **asked, error_out=False)
    assert (page.page, page.per_page, len(page.items)) == (1, 20, 20)


def test_largest_pages(reader: Session) -> None:
    """The last OFFSET of 64 bits is sent; what is beyond never reaches the database."""
    assert paginate(reader, BOOKS, page=(2**63 - 2) // 20, error_out=False).items == []
    assert paginate(reader, BOOKS, page=(2**63 - 2) // 20 + 1, error_out=False).page == 1
    assert paginate(reader, BOOKS, per_page=2**70, max_per_page=2**80).per_page == 2**63 - 2
    assert len(paginate(reader, BOOKS, per_page=2**63 - 2, max_per_page=None).items) == 21
    assert paginate(reader, BOOKS.offset(2**63 - 1), page=2, error_out=False).items == []
    later = BOOKS.offset(2**62)
    assert paginate(reader, later, page=2**62, per_page=2, error_out=False).items == []
    with pytest.raises(PageNotFoundError):
        paginate(reader, BOOKS, page=(2**63 - 2) // 20 + 1)


def test_arguments_without_a_session() -> None:
    """Arguments can be checked by themselves; what was not given is what is usual."""
    assert page_arguments(3, 50, 100, True) == (3, 50)
    assert page_arguments(None, None, 100, True) == (1, 20)
    assert page_arguments(None, None, 5, True) == (1, 5)
    assert page_arguments("x", -1, 5, False) == (1, 5)
    with pytest.raises(PageNotFoundError, match="page='x' was asked for: page is an integer"):
        page_arguments("x", 20, None, True)


@pytest.mark.parametrize("limit", [0, -1, "100", True])
def test_nonsense_of_the_application(limit: Any) -> None:
    """A limit that is none is the application's mistake, and no 404."""
    with pytest.raises(PaginationError, match="max_per_page="):
        page_arguments(1, 20, limit, False)


# -- links


@pytest.mark.parametrize(
    ("page", "links"),
    [
        (1, [1, 2, 3, 4, 5, None, 20, 21]),
        (7, [1, 2, None, 5, 6, 7, 8, 9, 10, 11, None, 20, 21]),
        (5, [1, 2, 3, 4, 5, 6, 7, 8, 9, None, 20, 21]),
        (21, [1, 2, None, 19, 20, 21]),
    ],
)
def test_links(reader: Session, page: int, links: list[int | None]) -> None:
    """Links are to the edges and the pages around this one, with a gap for those left out."""
    assert list(paginate(reader, BOOKS, page=page, per_page=1).iter_pages()) == links


def test_links_with_other_widths(reader: Session) -> None:
    """Each of the widths is a number of pages, and may be 0."""
    page = paginate(reader, BOOKS, page=10, per_page=1)
    narrow = page.iter_pages(left_edge=0, left_current=1, right_current=1, right_edge=0)
    assert list(narrow) == [None, 9, 10, 11, None]
    wide = page.iter_pages(left_edge=1, left_current=20, right_current=20, right_edge=1)
    assert list(wide) == list(range(1, 22))
    beyond = paginate(reader, BOOKS, page=24, per_page=1, error_out=False)
    assert list(beyond.iter_pages(left_current=4)) == [1, 2, None, 20, 21]


# -- what is asked of the database


@pytest.mark.parametrize(
    ("arguments", "count", "sent"),
    [
        ({"page": 1, "per_page": 20}, True, 2),
        ({"page": 2, "per_page": 20}, True, 1),
        ({"page": 1, "per_page": 22}, True, 1),
        ({"page": 1, "per_page": 21}, True, 2),
        ({"page": 9, "per_page": 20}, True, 2),
        ({"page": 1, "per_page": 20}, False, 1),
        ({"page": 9, "per_page": 20}, False, 1),
    ],
)
def test_counting_is_left_out_where_the_page_tells(
    shelf: Engine, reader: Session, arguments: dict[str, Any], count: bool, sent: int
) -> None:
    """A page that is not full is the last one, and its rows tell the total."""
    with statements_of(shelf) as statements:
        paginate(reader, BOOKS, count=count, error_out=False, **arguments)
    assert len(statements) == sent


def test_what_counts(shelf: Engine, reader: Session) -> None:
    """The rows are counted without their order and what is loaded with them."""
    with statements_of(shelf) as statements:
        page = paginate(reader, AUTHORS.options(joinedload(Author.books)), per_page=2)
    assert page.total == 7
    assert statements[1].startswith("SELECT count(*)")
    assert "ORDER BY" not in statements[1]
    assert "book" not in statements[1]


def test_counting_takes_no_locks(make_database: Callable[..., Database]) -> None:
    """A page FOR UPDATE locks the rows on it, and not all those that are counted."""
    with filled_shelf(make_database("psycopg").url) as engine, Session(engine) as session:
        locked = paginate(session, BOOKS.with_for_update(), per_page=2)
        assert (len(locked.items), locked.total) == (2, 21)
        with Session(engine) as other:
            free = other.scalars(BOOKS.with_for_update(skip_locked=True))
            assert [book.id for book in free] == list(range(3, 22))


def by_event(session: Session) -> None:
    """Show the session books from 15 on only."""

    def narrow(state: Any) -> None:
        state.statement = state.statement.options(with_loader_criteria(Book, Book.id >= 15))

    event.listen(session, "do_orm_execute", narrow)


def test_loader_criteria_are_for_the_count_too(reader: Session) -> None:
    """Rows that an option of the select, or an event of the session, leaves out are not counted."""
    few = BOOKS.options(with_loader_criteria(Book, Book.id >= 15))
    assert paginate(reader, few, per_page=5).total == 7
    by_event(reader)
    assert paginate(reader, BOOKS, per_page=5).total == 7


def test_total_is_no_less_than_what_is_shown(shelf: Engine, reader: Session) -> None:
    """Rows that are deleted between the two statements do not make a page be beyond the last."""
    page = Pagination(reader, BOOKS, page=2, per_page=5)
    page._learn(3)  # what the count would give then
    assert (page.total, page.pages, page.has_next) == (10, 2, False)


# -- statements of all kinds

TITLES = select(Book.title, func.count().label("books")).group_by(Book.title)
OTHER = aliased(Book)
NAMES = select(Author, func.lower(Author.name).label("low"))

STATEMENTS: dict[str, tuple[Any, int]] = {
    "column": (select(Book.id).order_by(Book.id), 21),
    "distinct": (select(Book.title).distinct().order_by(Book.title), 4),
    "group by": (TITLES.order_by(Book.title), 4),
    "having": (TITLES.having(func.count() > 5).order_by(Book.title), 1),
    "columns of a join": (select(Book.title, Author.name).join(Book.author).order_by(Book.id), 21),
    "alias": (select(OTHER).order_by(OTHER.id.desc()), 21),
    "two entities": (select(Book, Author).join(Book.author).order_by(Book.id), 21),
    "union": (union(select(Author.name), select(Book.title)).order_by("name"), 11),
    "union of two columns": (
        union(select(Author.id, Author.name), select(Book.id, Book.title)).order_by("id", "name"),
        28,
    ),
    "subquery": (select(Book).where(Book.author.has(Author.id > 6)).order_by(Book.id), 6),
    "table": (select(Book.__table__).order_by(Book.__table__.c.id), 21),
    "eager": (AUTHORS.options(joinedload(Author.books)), 7),
    "limit": (BOOKS.limit(7), 7),
    "offset": (BOOKS.offset(17), 4),
    "limit and offset": (BOOKS.limit(7).offset(17), 4),
    "no rows": (BOOKS.limit(0), 0),
    "grouped by a label": (NAMES.group_by("low").order_by("low"), 7),
    "eager, with limits": (AUTHORS.options(joinedload(Author.books)).limit(5).offset(1), 5),
}


def test_pages_beyond_a_limit_are_empty(reader: Session) -> None:
    """No row after the select's own LIMIT is shown, however far beyond it the page is."""
    for page in (2, 3, 4, 20):
        found = paginate(reader, BOOKS.limit(5), page=page, per_page=5, error_out=False)
        assert (found.items, found.total, found.has_next) == ([], 5, False)


@pytest.mark.parametrize(("statement", "total"), STATEMENTS.values(), ids=STATEMENTS)
@pytest.mark.parametrize("count", [True, False])
def test_statements(reader: Session, statement: Any, total: int, count: bool) -> None:
    """Pages of a select are its rows in their order, none twice, none left out."""
    result = reader.execute(statement)
    if statement._with_options:  # an eager load
        result = result.unique()
    rows: list[Any] = [row[0] if len(row) == 1 else row for row in result]
    assert len(rows) == total
    page = paginate(reader, statement, per_page=3, count=count)
    shown = list(page)
    assert page.total == (total if count else None)
    while page.has_next:
        page = page.next(error_out=True)
        shown += page
    assert shown == rows


def test_rows_have_names(reader: Session) -> None:
    """Several columns come as rows with their names, one column as its values."""
    assert paginate(reader, TITLES.order_by(Book.title)).items[0].books == 5
    titles = paginate(reader, select(Book.title).order_by(Book.id)).items
    assert titles[:5] == ["book 1", "book 2", "book 3", "book 0", "book 1"]


def test_eager_loads_do_not_change_pages(shelf: Engine, reader: Session) -> None:
    """A page has as many authors as without their books, and each one has all of his."""
    statement = AUTHORS.options(joinedload(Author.books))
    page = paginate(reader, statement, page=2, per_page=3, count=False)
    assert [author.id for author in page] == [4, 5, 6]
    assert page.has_next
    with statements_of(shelf) as statements:
        assert [len(author.books) for author in page] == [3, 4, 5]
    assert statements == []


JOINED = select(Author, Book.id.label("book")).join(Author.books).subquery()


@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize(
    "statement",
    [
        select(Author).join(Author.books).order_by(Book.id),
        select(aliased(Author, JOINED)).order_by(JOINED.c.book),
    ],
    ids=["join", "alias of a subquery"],
)
def test_joins_that_repeat_entities(reader: Session, statement: Any, count: bool) -> None:
    """Pages are cut by rows; an author whose rows are all on one page stands there once."""
    expected = [{2, 3, 4}, {4, 5}, {6}, {7}, {7}]
    page = paginate(reader, statement, per_page=5, count=count)
    for number, ids in enumerate(expected, 1):
        assert page.page == number
        assert {author.id for author in page} == ids
        assert len(page.items) == len(ids)
        assert page.has_next == (number < 5)
        assert page.total == (21 if count else None)
        page = page.next()
    with pytest.raises(PageNotFoundError):
        paginate(reader, statement, page=6, per_page=5, count=count)


def test_contains_eager(reader: Session) -> None:
    """A join that is also what is loaded is cut by rows, as everywhere in SQLAlchemy."""
    statement = select(Author).join(Author.books).options(contains_eager(Author.books))
    page = paginate(reader, statement.order_by(Book.id), page=5, per_page=5)
    assert ([author.id for author in page], page.total) == ([7], 21)


@pytest.mark.parametrize(
    "statement",
    [
        BOOKS.limit(func.abs(3)),
        BOOKS.offset(func.abs(3)),
        BOOKS.fetch(3, with_ties=True),
        BOOKS.fetch(3, percent=True),
    ],
)
def test_limits_that_are_no_number(reader: Session, statement: Any) -> None:
    """A select whose own limit only the database knows is refused."""
    with pytest.raises(PaginationError):
        paginate(reader, statement)


@pytest.mark.parametrize(
    "statement", [text("SELECT 1"), text("SELECT 1 AS a").columns(column("a", Integer))]
)
def test_statement_without_parts_is_told(reader: Session, statement: Any) -> None:
    """What the database cannot be asked for a part of is refused, and told so."""
    with pytest.raises(PaginationError, match="give a select"):
        paginate(reader, statement)


# -- sessions of all kinds


def test_scoped_session(shelf: Engine) -> None:
    """A scoped session stays one, from page to page."""
    sessions = scoped_session(sessionmaker(shelf))
    page = paginate(sessions, BOOKS, per_page=5)
    sessions.remove()
    assert [book.id for book in page.next()] == [6, 7, 8, 9, 10]
    sessions.remove()


def test_session_with_several_databases(tmp_path: Path) -> None:
    """Rows and their number come from the database that the session has for them."""
    engines = [create_engine(f"sqlite:///{tmp_path / name}.db") for name in ("one", "two")]
    fill_shelf(engines[1])
    statements = [BOOKS, select(Book.id), select(Book, Author).join(Book.author)]
    for key in (Book, Book.__table__, ShelfBase):
        with Session(engines[0], binds={key: engines[1]}) as session:
            for statement in statements:
                assert paginate(session, statement, per_page=5).total == 21
    for engine in engines:
        engine.dispose()


def test_execution_options_are_for_both_statements(tmp_path: Path) -> None:
    """Names of schemas that the select translates are translated for the count as well."""
    two = tmp_path / "two.db"
    with (
        filled_shelf(f"sqlite:///{two}"),
        filled_shelf("sqlite://") as one,
        Session(one) as session,
    ):
        session.execute(delete(Book))
        session.connection().exec_driver_sql(f"ATTACH '{two}' AS two")
        translated = BOOKS.execution_options(schema_translate_map={None: "two"})
        assert paginate(session, translated, per_page=5).total == 21


class Shown(Pagination):
    """What an application derives."""


def test_derived_classes_stay(reader: Session) -> None:
    """A page of a derived class turns into one of that class."""
    assert type(Shown(reader, BOOKS, per_page=5).next()) is Shown


@pytest.mark.parametrize("driver", ["psycopg2", "pymysql"])
def test_servers(make_database: Callable[..., Database], driver: str) -> None:
    """The same on PostgreSQL and MariaDB, also with the largest numbers."""
    with filled_shelf(make_database(driver).url) as engine, Session(engine) as session:
        page = paginate(session, AUTHORS.options(joinedload(Author.books)), page=2, per_page=3)
        assert ([author.id for author in page], page.total) == ([4, 5, 6], 7)
        last = paginate(session, BOOKS, page=(2**63 - 2) // 20, error_out=False)
        assert (last.items, last.total) == ([], 21)
        assert paginate(session, BOOKS.fetch(6), per_page=5).total == 6
        assert len(paginate(session, BOOKS, per_page=2**63 - 2, max_per_page=None).items) == 21

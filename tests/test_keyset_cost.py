"""What a keyset page costs: as much at the end of a table as at its beginning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Index, create_engine, event, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sessionmgr import paginate
from sessionmgr.keyset import paginate_keyset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from tests.servers import Database

ROWS = 4000
PER_PAGE = 20


class LogBase(DeclarativeBase):
    """Base of the tests' own."""


class Entry(LogBase):
    """A row of a table in which many have the same day."""

    __tablename__ = "entry"
    __table_args__ = (
        Index("entry_day", "day", "id"),
        Index("entry_mixed", "hour", text("day DESC"), text("id DESC")),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[int]
    hour: Mapped[int]


ORDERS = {
    "key": (Entry.id,),
    "key, falling": (Entry.id.desc(),),
    "ties": (Entry.day,),
    "ties, falling": (Entry.day.desc(),),
    "mixed": (Entry.hour, Entry.day.desc()),
}


def filled(url: Any) -> Engine:
    """Return an engine of a database with a long table."""
    engine = create_engine(url)
    LogBase.metadata.create_all(engine)
    rows = [{"id": n, "day": n // 1500, "hour": n // 8} for n in range(1, ROWS + 1)]
    with engine.begin() as connection:
        connection.execute(insert(Entry), rows)
    return engine


def deep_cursor(session: Session, statement: Any) -> str:
    """Return the cursor that leads to the page 1,000 rows before the end."""
    page = paginate_keyset(session, statement, per_page=ROWS - 1000, max_per_page=None)
    assert page.after is not None
    return page.after


def plans(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """List the nodes of a plan."""
    yield node
    for part in node.get("Plans", ()):
        yield from plans(part)


def rows_read(session: Session, work: Callable[[], object]) -> int:
    """Return how many rows PostgreSQL reads for the first statement of some work."""
    connection = session.connection()
    sent: list[tuple[str, Any]] = []
    event.listen(
        connection,
        "before_cursor_execute",
        lambda _connection, _cursor, statement, values, *_: sent.append((statement, values)),
    )
    work()
    statement, values = sent[0]
    cursor = connection.connection.cursor()
    cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", values)
    [(found,)] = cursor.fetchall()
    cursor.close()
    leaves = [node for node in plans(found[0]["Plan"]) if "Plans" not in node]
    return sum(
        int((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
        for node in leaves
    )


def test_rows_that_postgresql_reads(make_database: Callable[..., Database]) -> None:
    """A keyset page deep in the table reads its own rows; one by OFFSET all those before it."""
    engine = filled(make_database("psycopg").url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE entry"))
    for name, order in ORDERS.items():
        statement = select(Entry).order_by(*order)
        with Session(engine) as session:
            cursor = deep_cursor(session, statement)
            read = rows_read(session, lambda s=statement, c=cursor: keyset(session, s, c))
            assert read <= 2 * PER_PAGE, name
        with Session(engine) as session:
            read = rows_read(session, lambda s=statement: offset(session, s))
            assert read >= ROWS - 1000, name
    engine.dispose()


def keyset(session: Session, statement: Any, cursor: str) -> None:
    """Read a page."""
    page = paginate_keyset(session, statement, after=cursor, per_page=PER_PAGE)
    assert len(page.items) == PER_PAGE


def offset(session: Session, statement: Any) -> None:
    """Read the same page by its number."""
    page = paginate(session, statement, page=(ROWS - 1000) // PER_PAGE, count=False)
    assert len(page.items) == PER_PAGE


def test_rows_that_mariadb_reads(make_database: Callable[..., Database]) -> None:
    """The same, by what MariaDB counts."""
    engine = filled(make_database("pymysql").url)

    def reads(session: Session) -> int:
        rows = session.execute(text("SHOW SESSION STATUS LIKE 'Handler_read%'"))
        return sum(int(count) for _, count in rows)

    with Session(engine) as session:
        session.execute(text("ANALYZE TABLE entry"))
        before = reads(session)
        looking = reads(session) - before
        for name, order in ORDERS.items():
            statement = select(Entry).order_by(*order)
            cursor = deep_cursor(session, statement)
            before = reads(session)
            keyset(session, statement, cursor)
            assert reads(session) - before - looking <= 2 * PER_PAGE, name
            before = reads(session)
            offset(session, statement)
            assert reads(session) - before >= ROWS - 1000, name
    engine.dispose()


@pytest.mark.parametrize("order", ORDERS)
def test_sqlite_searches_an_index(order: str) -> None:
    """SQLite goes to the place by an index, and sorts nothing but what is tied."""
    engine = filled("sqlite://")
    with Session(engine) as session:
        statement = select(Entry).order_by(*ORDERS[order])
        cursor = deep_cursor(session, statement)
        sent: list[Any] = []
        event.listen(
            session.connection(),
            "before_cursor_execute",
            lambda _connection, _cursor, statement, values, *_: sent.append((statement, values)),
        )
        keyset(session, statement, cursor)
        [(asked, values)] = sent
        plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}", values)
        steps = [row[3] for row in plan]
        assert steps[0].startswith("SEARCH entry USING ")
    engine.dispose()

"""Authors and their books, for tests to page through, and the statements that are sent for them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import ForeignKey, String, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL, Connection, Engine


class ShelfBase(DeclarativeBase):
    """Base of the tests' own, so that ``sessionmgr.Base`` stays as it is."""


class Author(ShelfBase):
    """Somebody with any number of books."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    born: Mapped[int | None]
    books: Mapped[list[Book]] = relationship(back_populates="author", order_by="Book.id")


class Book(ShelfBase):
    """A book of one author."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(50))
    year: Mapped[int] = mapped_column(default=2000)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


def fill_shelf(engine: Engine | Connection) -> None:
    """Add 7 authors; author n has n - 1 books, of years that repeat, which makes 21."""
    ShelfBase.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all(Author(id=number, name=f"author {number}") for number in range(1, 8))
        session.flush()
        of = [number for number in range(1, 8) for _ in range(number - 1)]
        session.add_all(
            Book(id=number, title=f"book {number % 4}", year=2000 + number % 3, author_id=author)
            for number, author in enumerate(of, 1)
        )


@contextmanager
def filled_shelf(url: str | URL) -> Iterator[Engine]:
    """Give an engine of a database with the authors and books."""
    engine = create_engine(url)
    fill_shelf(engine)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def statements_of(engine: Engine) -> Iterator[list[str]]:
    """Collect the text of the statements that are sent meanwhile."""
    sent: list[str] = []

    def collect(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", collect)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", collect)

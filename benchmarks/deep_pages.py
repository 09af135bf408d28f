"""The first page of a table, and one at its end: by OFFSET, and by keyset.

A page has 20 of the 20,000 rows, in the order of two columns that have an index, from PostgreSQL by
one session of sessionmgr's. ``offset`` is ``paginate(count=False)``, ``keyset`` is
``paginate_keyset``; 1 and 1000 are the numbers of the page.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import Index, create_engine, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sessionmgr import paginate
from sessionmgr.keyset import paginate_keyset

from .contenders import exposed
from .report import Panel, Report, Target
from .timing import Plan, alternate

if TYPE_CHECKING:
    from collections.abc import Callable

    from .context import Context

PAGES = 1000
PER_PAGE = 20

TARGETS = (
    Target("keyset 1000", "keyset 1", 1.5),
    Target("offset 1000", "offset 1", 1.5, at_most=False),
    Target("keyset 1", "offset 1", 2.0),
)


class Base(DeclarativeBase):
    """Base of this table only."""


class Line(Base):
    """A row; 20 have the same hour."""

    __tablename__ = "line"
    __table_args__ = (Index("line_hour", "hour", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hour: Mapped[int]


LINES = select(Line).order_by(Line.hour, Line.id)


def run(context: Context) -> Report:
    """Measure with one session."""
    report = context.report("deep_pages", __doc__)
    plan = Plan(3, 0.01) if context.quick else Plan(101, 0.05)
    place = ("PostgreSQL", "psycopg")
    engine = create_engine(exposed(context.url(*place)))
    _fill(engine)
    with Session(engine) as session:
        times = alternate(_contenders(session), plan)
    engine.dispose()
    samples = {name: [1e3 * time for time in rounds] for name, rounds in times.items()}
    report.panels.append(Panel("a page of 20,000 rows, PostgreSQL", "ms", samples, TARGETS))
    context.add_versions(report, [place])
    return report


def _fill(engine: Any) -> None:
    Base.metadata.create_all(engine)
    rows = [{"id": n, "hour": n // 20} for n in range(PAGES * PER_PAGE)]
    with engine.begin() as connection:
        connection.execute(insert(Line), rows)
        connection.execute(text("ANALYZE line"))


def _contenders(session: Session) -> dict[str, Callable[[], object]]:
    before = paginate_keyset(
        session, LINES, per_page=(PAGES - 1) * PER_PAGE, max_per_page=None
    ).after
    return {
        "offset 1": partial(paginate, session, LINES, page=1, count=False),
        "offset 1000": partial(paginate, session, LINES, page=PAGES, count=False),
        "keyset 1": partial(paginate_keyset, session, LINES),
        "keyset 1000": partial(paginate_keyset, session, LINES, after=before),
    }

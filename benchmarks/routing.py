"""What it costs to find the database of a statement by the bind key of its tables.

``plain Session`` is SQLAlchemy's, bound to one engine. The others are ``manager.session()``, of
managers with so many bind keys, each used before; the statement's is one of them. All read one
row of a SQLite file, on a connection that is kept, by the same kind of engine. A ``statement`` is
one of many in a session that is open; a ``session`` is opened, has one statement, and is closed.
``and 5 us`` is the figure of the plain Session with five microseconds added: the most that
routing may cost.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from sqlalchemy import MetaData, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from sessionmgr import SessionManager

from .report import Curves, Panel, Report, Target
from .timing import Plan, alternate

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

    from .context import Context

KEY = "items"

ALLOWED = 5.0
"""Microseconds that routing may add to a statement."""

FLAT = 1.05
"""How much more a statement may take with the most bind keys than with one."""

PLAIN, BOUND = "plain Session", f"plain Session and {ALLOWED:g} us"


class Base(DeclarativeBase):
    """Base of what is read."""

    metadata = MetaData(info={"bind_key": KEY})


class Item(Base):
    """What is read."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


COLUMNS = select(Item.__table__.c.id, Item.__table__.c.name).where(Item.__table__.c.id == 1)
OBJECT = select(Item).where(Item.id == 1)

STATEMENTS: dict[str, Callable[[Session], object]] = {
    "execute(select(table.c...))": lambda session: session.execute(COLUMNS).one(),
    "scalars(select(Model))": lambda session: session.scalars(OBJECT).one(),
    "get(Model, 1)": lambda session: session.get(Item, 1, populate_existing=True),
}


def run(context: Context) -> Report:
    """Measure with 1, 10 and 1,000 bind keys."""
    report = context.report("routing", __doc__)
    steps = [1, 10, 100] if context.quick else [1, 10, 1000]
    plan = Plan(3, 0.001) if context.quick else Plan(201, 0.01)
    with tempfile.TemporaryDirectory() as folder:
        managers = [_manager(f"sqlite:///{folder}/{number}.db", number) for number in steps]
        found = _measure(managers, steps, plan)
        for manager in managers:
            manager.close()
    report.panels += [_panel(title, steps, samples) for title, samples in found.items()]
    report.curves.append(_curves(steps, found))
    return report


def _manager(url: str, number: int) -> SessionManager:
    """Make a manager with so many bind keys, each with an engine that was used."""
    names = [f"other {each}" for each in range(1, number)]
    names.insert(number // 2, KEY)
    binds = {name: url if name == KEY else "sqlite://" for name in names}
    manager = SessionManager(binds=binds, metadata=MetaData(), pooling="always")
    for name in names:
        manager.get_engine(name).connect().close()
    with manager.session() as session:
        session.add(Item(id=1, name="one"))
        session.commit()
    return manager


def _measure(
    managers: list[SessionManager], steps: list[int], plan: Plan
) -> dict[str, dict[str, list[float]]]:
    """Give the microseconds of each kind of statement, by contender."""
    plain = sessionmaker(managers[0].get_engine(KEY))
    opened: dict[str, Callable[[], Session]] = {PLAIN: plain}
    opened |= {_name(step): each.session for step, each in zip(steps, managers, strict=True)}
    found = {}
    for title, statement in STATEMENTS.items():
        found[f"statement: {title}"] = _in_open_sessions(opened, statement, plan)
    first = next(iter(STATEMENTS.values()))
    contenders = {name: _with_session(make, first) for name, make in opened.items()}
    found[f"session: {next(iter(STATEMENTS))}"] = alternate(contenders, plan)
    return {
        title: {name: [1e6 * time for time in rounds] for name, rounds in times.items()}
        for title, times in found.items()
    }


def _in_open_sessions(
    opened: dict[str, Callable[[], Session]], statement: Callable[[Session], object], plan: Plan
) -> dict[str, list[float]]:
    sessions = {name: make() for name, make in opened.items()}
    contenders = {name: _with(session, statement) for name, session in sessions.items()}
    times = alternate(contenders, plan)
    for session in sessions.values():
        session.close()
    return times


def _with(session: Session, statement: Callable[[Session], object]) -> Callable[[], object]:
    return lambda: statement(session)


def _with_session(
    make: Callable[[], Session], statement: Callable[[Session], object]
) -> Callable[[], object]:
    def work() -> None:
        with make() as session:
            statement(session)

    return work


def _name(step: int) -> str:
    return f"{step:,d} bind key{'s' * (step > 1)}"


def _panel(title: str, steps: list[int], samples: dict[str, list[float]]) -> Panel:
    most, one = _name(steps[-1]), _name(steps[0])
    bounded = {**samples, BOUND: [figure + ALLOWED for figure in samples[PLAIN]]}
    targets = (Target(most, BOUND, 1.0), Target(most, one, FLAT))
    return Panel(title, "us", bounded, targets)


def _curves(steps: list[int], found: dict[str, dict[str, list[float]]]) -> Curves:
    """Give what routing adds, in each round."""
    more = {
        title: [
            [figures[number] - plain for figures in map(samples.__getitem__, map(_name, steps))]
            for number, plain in enumerate(samples[PLAIN])
        ]
        for title, samples in found.items()
    }
    return Curves("what routing adds", "us", "bind keys", steps, more)

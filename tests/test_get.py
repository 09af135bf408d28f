"""``get()`` of routed sessions: by a select that is made once, and the same as SQLAlchemy's."""

from __future__ import annotations

import gc
import re
import uuid
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import ForeignKey, String, event, func, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    joinedload,
    mapped_column,
    relationship,
    scoped_session,
    with_loader_criteria,
)
from sqlalchemy.types import TypeDecorator

from sessionmgr import SessionManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Engine, Select
    from sqlalchemy.orm import Mapper, ORMExecuteState
    from sqlalchemy.sql.operators import ColumnOperators

    from tests.servers import Database

    Case = Callable[[Any], object]

UID = uuid.UUID(int=7)


class Base(DeclarativeBase):
    """Base of this module's classes."""


class Lower(TypeDecorator[str]):
    """Text that is kept, and looked for, in small letters."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: object) -> Any:
        """Make the letters small."""
        return None if value is None else value.lower()

    class comparator_factory(TypeDecorator.Comparator[Any]):  # noqa: N801 - SQLAlchemy's name
        """Compares after the server has made letters small."""

        def __eq__(self, other: object) -> ColumnOperators:  # type: ignore[override]
            return func.lower(self.expr) == other


class Animal(Base):
    """What has a single table, and kinds in it."""

    __tablename__ = "animal"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(String(20))
    toys: Mapped[list[Toy]] = relationship(lazy="joined", order_by="Toy.id")

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012


class Dog(Animal):
    """An animal in the same table."""

    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012


class Fish(Animal):
    """An animal with a table of its own, too."""

    __tablename__ = "fish"

    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    depth: Mapped[int]

    __mapper_args__ = {"polymorphic_identity": "fish"}  # noqa: RUF012


class Toy(Base):
    """What an animal has several of."""

    __tablename__ = "toy"

    id: Mapped[int] = mapped_column(primary_key=True)
    animal_id: Mapped[int] = mapped_column(ForeignKey("animal.id"))


class Word(Base):
    """What has text as its key."""

    __tablename__ = "word"

    text: Mapped[str] = mapped_column(Lower, primary_key=True)
    sense: Mapped[str] = mapped_column(String(20))


class Thing(Base):
    """What has a UUID as its key."""

    __tablename__ = "thing"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)


class Pair(Base):
    """What has a key of two columns."""

    __tablename__ = "pair"

    left: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    right: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


@pytest.fixture(params=["pysqlite", "psycopg", "pymysql"])
def manager(
    request: pytest.FixtureRequest, make_database: Callable[[str], Database], tmp_path: Path
) -> Iterator[SessionManager]:
    """Return a manager of one database, with rows."""
    file = f"sqlite:///{tmp_path / 'get.db'}"
    url = file if request.param == "pysqlite" else make_database(request.param).url
    with SessionManager(metadata=Base.metadata, binds={"default": url}, pooling="always") as made:
        with made.begin("default") as session:
            session.add_all(
                (
                    Animal(id=1, name="any"),
                    Dog(id=2, name="Rex"),
                    Fish(id=3, name="Bob", depth=5),
                    Thing(id=UID),
                    Word(text="home", sense="house"),
                    Pair(left=1, right=2),
                )
            )
            session.flush()
            session.add_all(Toy(id=number, animal_id=2) for number in (1, 2, 3))
        yield made


def outcome(case: Case, session: Any) -> object:
    """Tell what a case gives: of objects what they are, of errors what they say."""
    try:
        return shown(case(session))
    except Exception as error:  # noqa: BLE001 - it is compared
        said = str(error).partition("\n[SQL")[0]
        return type(error).__name__, re.sub("0x[0-9a-f]+", "", said)


def shown(value: object) -> object:
    """Show an object by its class and its loaded attributes, without the others."""
    if isinstance(value, Base):
        loaded = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        return type(value).__name__, {k: shown(v) for k, v in sorted(loaded.items())}
    return [shown(each) for each in value] if isinstance(value, (list, tuple)) else value


def again(session: Any) -> object:
    """Get what the session has, by a key of its type, and of another."""
    first = session.get(Animal, 1)
    return session.get(Animal, 1) is first, session.get(Animal, "1") is first


def of_another_kind(session: Any) -> object:
    """Get rows of other kinds than the class, of which its sub-classes are found."""
    return session.get(Dog, 2), session.get(Dog, 1), session.get(Fish, 2), session.get(Fish, 3)


def expired(session: Any) -> object:
    """Get what has expired, which is read again."""
    kept = session.get(Dog, 2)
    session.expire_all()
    return session.get(Animal, 2) is kept, kept


def gone(session: Any) -> object:
    """Get what is marked to be deleted, then what was."""
    kept = session.get(Thing, UID)
    session.delete(kept)
    marked = session.get(Thing, UID) is kept
    session.flush()
    return marked, session.get(Thing, UID)


def pending(session: Any) -> object:
    """Get what was added, and is flushed first."""
    session.add(Animal(id=9, name="new"))
    return session.get(Animal, 9)


def not_flushed(session: Any) -> object:
    """Get it where nothing is flushed."""
    session.add(Animal(id=9, name="new"))
    with session.no_autoflush:
        return session.get(Animal, 9)


def with_criteria(session: Any) -> object:
    """Get by criteria that a listener adds."""

    def add(state: ORMExecuteState) -> None:
        if state.is_select and not state.is_column_load and not state.is_relationship_load:
            state.statement = state.statement.options(
                with_loader_criteria(Animal, Animal.name != "Rex")
            )

    event.listen(session, "do_orm_execute", add)
    return session.get(Animal, 1), session.get(Animal, 2)


def with_options(session: Any) -> object:
    """Get with each option that there is."""
    held = session.get(Dog, 2)
    held.name = "changed"
    with session.no_autoflush:
        anew = session.get(Dog, 2, populate_existing=True)
    return (
        anew is held,
        held.name,
        session.get(Animal, 1, options=[joinedload(Animal.toys)]),
        session.get(Animal, 3, with_for_update=True),
        session.get(Toy, 1, execution_options={"populate_existing": True}),
        session.get(Toy, 2, identity_token=0),
    )


CASES: list[Case] = [
    again,
    of_another_kind,
    expired,
    gone,
    pending,
    not_flushed,
    with_criteria,
    with_options,
    lambda session: session.get(Dog, 2),
    lambda session: session.get(Animal, 77),
    lambda session: session.get(Animal.__mapper__, 1),
    lambda session: session.get(Thing, UID),
    lambda session: session.get(Thing, uuid.UUID(int=8)),
    lambda session: session.get(Word, "HOME"),
    lambda session: session.get(Pair, (1, 2)),
    lambda session: session.get(Pair, 1),
    lambda session: session.get(Pair, {"left": 1, "right": 2}),
    lambda session: session.get(Animal, {"id": 1}),
    lambda session: session.get(Animal, [1]),
    lambda session: session.get(Animal, (1, 2)),
    lambda session: session.get(Animal, True),
    lambda session: session.get(Animal, 2**70),
    lambda session: session.get(aliased(Animal), 1),
    lambda session: session.get(Animal(id=1), 1),
    lambda session: session.get(Animal, 1, with_for_updates=False),
    lambda session: session.get(Animal, 1, refresh=None),
    lambda session: session.get(int, 1),
    lambda session: session.get("Animal", 1),
    lambda session: session.get_one(Animal, 1),
    lambda session: session.get_one(Animal, 77),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_same_as_sqlalchemy(manager: SessionManager, case: Case) -> None:
    """Objects, errors and the number of statements are those of a plain session."""
    engine = manager.get_engine("default")
    with Session(engine) as plain, statements(engine) as expected:
        theirs = outcome(case, plain)
    with manager.session() as session, statements(engine) as seen:
        ours = outcome(case, session)
    assert ours == theirs
    assert len(seen) == len(expected)


class statements:  # noqa: N801 - used as a function
    """Lists the statements of an engine, while in its block."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: list[str] = []

    def _note(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        self._seen.append(statement)

    def __enter__(self) -> list[str]:
        event.listen(self._engine, "before_cursor_execute", self._note)
        return self._seen

    def __exit__(self, *_: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._note)


@pytest.mark.parametrize("manager", ["psycopg", "pymysql"], indirect=True)
def test_lock_without_flags(manager: SessionManager) -> None:
    """An empty dictionary of flags is FOR UPDATE, though it is not true."""
    with manager.session() as session, statements(manager.get_engine("default")) as seen:
        session.get(Thing, UID, with_for_update={})
    assert [statement.rstrip()[-10:] for statement in seen] == ["FOR UPDATE"]


@pytest.mark.parametrize("manager", ["pysqlite"], indirect=True)
@pytest.mark.parametrize("base_loads", ["*", None])
def test_class_that_comes_later(manager: SessionManager, base_loads: str | None) -> None:
    """Its columns are loaded along with those of its base, which was loaded before."""

    class Later(DeclarativeBase):
        pass

    class Plant(Later):
        __tablename__ = "plant"

        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(20))

        __mapper_args__ = {  # noqa: RUF012
            "polymorphic_on": "kind",
            "polymorphic_identity": "plant",
            "with_polymorphic": base_loads,
        }

    engine = manager.get_engine("default")
    Later.metadata.create_all(engine)
    with manager.session() as session:
        assert session.get(Plant, 1) is None

    class Tree(Plant):
        __tablename__ = "tree"

        id: Mapped[int] = mapped_column(ForeignKey("plant.id"), primary_key=True)
        height: Mapped[int]

        __mapper_args__ = {  # noqa: RUF012
            "polymorphic_identity": "tree",
            "polymorphic_load": None if base_loads else "inline",
        }

    Later.metadata.create_all(engine)
    with manager.begin("default") as session:
        session.add(Tree(id=1, height=30))
    with manager.session() as session, statements(engine) as seen:
        found = session.get(Plant, 1)
        assert isinstance(found, Tree)
        assert found.height == 30
    assert len(seen) == 1


@pytest.mark.parametrize("manager", ["pysqlite"], indirect=True)
def test_select_is_made_once(manager: SessionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a class; also for a scoped session, which names all options of get()."""
    made = []

    def record(mapper: Mapper[Any]) -> Select[Any]:
        made.append(mapper)
        return select(mapper)

    monkeypatch.setattr("sessionmgr.primary_keys.select", record)

    class Once(Base):
        __tablename__ = "once"

        id: Mapped[int] = mapped_column(primary_key=True)

    Base.metadata.create_all(manager.get_engine("default"))
    scoped = manager.scoped(lambda: 1)
    assert isinstance(scoped, scoped_session)
    for number in range(3):
        with manager.session() as session:
            assert session.get(Once, number) is None
        assert scoped.get(Once, number) is None
    scoped.remove()
    assert made == [Once.__mapper__]


@pytest.mark.parametrize("manager", ["pysqlite"], indirect=True)
def test_class_is_not_kept_alive(manager: SessionManager) -> None:
    """What is kept for a class goes with it."""

    class Base2(DeclarativeBase):
        pass

    class Short(Base2):
        __tablename__ = "animal"

        id: Mapped[int] = mapped_column(primary_key=True)

    with manager.session() as session:
        assert session.get(Short, 1) is not None
    manager.get_engine("default").clear_compiled_cache()
    left = weakref.ref(Short)
    del Short, Base2, session
    gc.collect()
    assert left() is None

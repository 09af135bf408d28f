"""Routed sessions: each statement goes to the database of its tables' bind key."""

from __future__ import annotations

import gc
import re
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import (
    DDL,
    Column,
    Index,
    Integer,
    MetaData,
    Sequence,
    Table,
    delete,
    event,
    exists,
    func,
    insert,
    lambda_stmt,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.orm import (
    Session,
    aliased,
)
from sqlalchemy.orm.exc import UnmappedClassError
from sqlalchemy.schema import CreateIndex, CreateSequence, CreateTable, DropTable

from sessionmgr import (
    EngineOptionsError,
    NoSuchBindError,
    SessionManager,
    paginate,
)
from sessionmgr.routing import RoutedSession, routed
from tests.isolation_helpers import undone
from tests.items import open_transactions
from tests.routed_models import (
    Address,
    Employee,
    MainBase,
    Order,
    Person,
    orders,
    person,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.async_facade import ManagerClass
    from tests.servers import Database

pytest_plugins = ["tests.routing_fixtures"]

servers = pytest.mark.parametrize(
    "drivers", [("psycopg", "pymysql"), ("pymysql", "psycopg"), None], ids=["pg", "my", "sqlite"]
)


@servers
def test_one_session_writes_to_both(router: SessionManager) -> None:
    """What is added goes to the databases of its tables, which are made; a commit is on both."""
    with router.session() as session:
        ann = Employee(name="Ann", desk=1, addresses=[Address(street="High Street")])
        session.add(ann)
        session.flush()
        session.add(Order(person_id=ann.id))
        session.commit()
    with router.session_factory("users") as users, router.session_factory("default") as default:
        assert users.scalars(select(Person.name)).all() == ["Ann"]
        assert len(default.scalars(select(Order)).all()) == 1
    with router.session() as session:
        assert session.scalars(select(Person)).one().desk == 1
        assert session.scalars(select(Order)).one().person.addresses[0].street == "High Street"


@servers
def test_rollback_is_on_both(router: SessionManager) -> None:
    """An error in one database undoes what the transaction did in the other."""
    with router.session() as session, session.begin():
        session.add(Person(id=1, name="Ann"))
    with router.session() as session:
        session.add(Order(person_id=1))
        session.flush()
        with pytest.raises(IntegrityError):
            session.execute(insert(person).values(id=1, name="Ann", kind="person"))
    with router.session() as session:
        assert session.scalars(select(Order)).all() == []


alias, cte = person.alias(), select(person).cte()

STATEMENTS = {
    "table": select(person),
    "columns": select(person.c.id, person.c.name),
    "count": select(func.count()).select_from(person),
    "alias": select(alias),
    "aliased": select(aliased(Person)),
    "subquery": select(select(person).subquery()),
    "lateral": select(func.max(select(person.c.id).subquery().c.id)),
    "cte": select(cte).where(cte.c.id > 0),
    "join": select(text("1")).select_from(person.join(alias, person.c.id == alias.c.id)),
    "union": union_all(select(person.c.id), select(person.c.id)),
    "exists": select(exists().where(person.c.id == 1)),
    "scalar": select(select(func.count(person.c.id)).scalar_subquery()),
    "insert": insert(person).values(name="Bob", kind="person"),
    "insert from": insert(person).from_select(
        ["id", "name", "kind"], select(person.c.id + 100, person.c.name + "2", person.c.kind)
    ),
    "update": update(person).values(kind="person").where(person.c.id == 1),
    "delete": delete(person).where(person.c.id == 3),
    "orm insert": insert(Person).values(name="Cid"),
    "orm update": update(Person).values(name="Dan").where(Person.id == 1),
    "orm delete": delete(Address).where(Address.id == 1),
    "orm count": select(func.count()).select_from(Person),
    "orm column": select(Person.name),
    "orm subquery": select(func.count()).select_from(select(Person).subquery()),
    "orm from": select(text("1")).select_from(Employee),
    "orm union": select(Person).union(select(Person)),
    "orm union of columns": union_all(select(Person.id), select(Person.id)).order_by("id"),
    "lambda": lambda_stmt(lambda: select(Person)),
    "lambda of a union": lambda_stmt(lambda: union_all(select(Person.id), select(Person.id))),
    "textual": select(Person).from_statement(text("SELECT * FROM person")),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_statements_find_their_database(files: SessionManager, name: str) -> None:
    """Whatever form a statement has, it is run where its tables are."""
    with files.session() as session, session.begin():
        session.add(Person(name="Ann"))
        session.flush()
        session.execute(STATEMENTS[name])


@pytest.mark.parametrize(
    "read",
    [
        lambda session, statement: session.scalar(statement),
        lambda session, statement: session.scalars(statement),
        lambda session, statement: session.execute(statement=statement),
        paginate,
    ],
    ids=["scalar", "scalars", "execute", "pages"],
)
def test_unions_find_their_database(files: SessionManager, read: Callable[..., object]) -> None:
    """However they are read; what a statement says of its database comes first."""
    both = union_all(select(Person.id), select(Person.id)).order_by("id")
    with files.session() as session:
        read(session, both)
        with pytest.raises(OperationalError, match="no such table"):
            session.execute(both, bind_arguments={"bind_key": "default"})


def test_what_has_no_table_is_for_the_default(files: SessionManager) -> None:
    """Text goes to the default database, or where the bind arguments say."""
    default, users = files.get_engine("default"), files.get_engine("users")
    with files.session() as session:
        assert session.get_bind() is default
        assert session.get_bind(clause=text("SELECT 1")) is default
        assert session.get_bind(clause=select(text("1"))) is default
        assert session.get_bind(Order) is default
        assert session.get_bind(Person) is users
        assert session.get_bind(aliased(Person)) is users
        assert session.get_bind(clause=person) is users
        assert session.get_bind(bind_key="users") is users
        assert session.get_bind(Order, bind_key="users") is users
        assert session.connection(bind_arguments={"mapper": Person}).engine is users
        assert session.get_bind(Person, bind=default) is default
        session.execute(text("SELECT * FROM person"), bind_arguments={"bind_key": "users"})
        session.execute(text("SELECT 1"), bind_arguments={"bind": users})


def test_classes_of_ones_own_keep_their_methods(files: SessionManager) -> None:
    """What a class of sessions does with statements is done, wherever it stands among the bases."""
    seen: list[str] = []

    class Noting(Session):
        def execute(self, statement: Any, *args: Any, **options: Any) -> Any:
            seen.append(type(statement).__name__)
            return super().execute(statement, *args, **options)

    class Last(RoutedSession, Noting):
        _find_engine = staticmethod(files._find_engine)

    with Last() as session:
        session.execute(STATEMENTS["orm union"])
    with routed(Noting, files._find_engine)() as session:
        session.execute(STATEMENTS["orm union"])
        session.get(Person, 1)
    assert seen == ["CompoundSelect", "CompoundSelect", "Select"]


def test_explicit_bind_wins(files: SessionManager) -> None:
    """A session that is given an engine, or a connection, uses nothing else."""
    default = files.get_engine("default")
    with files.session(bind=default) as session:
        assert session.get_bind(Person) is default
    with default.connect() as connection, files.session(bind=connection) as session:
        assert session.get_bind(Person) is connection


def test_unknown_bind_key_is_told(tmp_path: Path) -> None:
    """The error lists the bind keys that there are; nothing is sent anywhere."""
    with SessionManager(binds={"logs": f"sqlite:///{tmp_path / 'x.db'}"}) as manager:
        with manager.session() as session:
            with pytest.raises(NoSuchBindError, match=r"no bind key 'users'.*: 'logs'"):
                session.execute(select(Person))
            with pytest.raises(NoSuchBindError, match="no bind key 'default'"):
                session.execute(text("SELECT 1"))
            with pytest.raises(UnmappedClassError):
                session.get_bind(int)
        assert manager.stats().databases == ()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nonsense": 1}, "does not take 'nonsense'"),
        ({"binds": {}}, "binds is SQLAlchemy's own"),
        ({"class_": Session}, "class_ is one of the manager's"),
        ({"bind": "users"}, "session_factory"),
    ],
)
def test_wrong_options_are_told(files: SessionManager, options: dict[str, Any], text: str) -> None:
    """An option that a routed session does not have is refused when it is given."""
    with pytest.raises(EngineOptionsError, match=text):
        files.session(**options)


def test_session_options_and_class_are_kept(tmp_path: Path) -> None:
    """The manager's session options hold, and methods of its session class come first."""
    asked = []

    class Own(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            asked.append(kwargs.get("clause"))
            return super().get_bind(*args, **kwargs)

    with SessionManager(
        metadata=MainBase.metadata,
        binds={"default": f"sqlite:///{tmp_path / 'x.db'}"},
        session_options={"class_": Own, "expire_on_commit": False},
    ) as manager:
        with manager.session() as session:
            assert isinstance(session, Own)
            assert not session.expire_on_commit
            session.execute(select(Order))
        with manager.session(expire_on_commit=True) as session:
            assert session.expire_on_commit
    assert len(asked) == 1


def test_engine_stays_the_transactions(files: SessionManager) -> None:
    """A transaction goes on with the engine that it began with; the next one takes the new."""
    with files.session() as session:
        session.add(Person(name="Ann"))
        session.flush()
        before = session.get_bind(Person)
        files.invalidate("users")
        assert session.get_bind(Person) is before
        assert session.scalar(select(func.count()).select_from(Person)) == 1
        session.commit()
        assert session.get_bind(Person) is files.get_engine("users")
        assert session.get_bind(Person) is not before
    with files.session() as session:
        for _ in range(2):
            with session.begin():
                assert session.get_bind(Person) is files.get_engine("users")
            files.invalidate("users")


def test_asking_keeps_no_engine(files: SessionManager, tmp_path: Path) -> None:
    """What a session was only asked for does not decide where a later transaction goes."""
    with files.session() as session:
        session.get_bind(Person)
        files.remove_bind("users")
        files.add_bind("users", f"sqlite:///{tmp_path / 'moved.db'}")
        session.add(Person(name="Ann"))
        session.commit()
    with files.session_factory("users") as moved:
        assert moved.scalars(select(Person.name)).all() == ["Ann"]


def test_metadata_is_not_kept(files: SessionManager) -> None:
    """Tables that a program makes or reflects each time anew are collected with their metadata."""
    metadata = MetaData()
    table = Table("passing", metadata, Column("id", Integer))
    with files.session() as session:
        session.execute(select(table))
    left = weakref.ref(metadata)
    files.get_engine("default").clear_compiled_cache()
    del metadata, table, session
    gc.collect()
    assert left() is None


@servers
def test_routing_sends_nothing_of_its_own(router: SessionManager) -> None:
    """Once the tables are known to be there, a statement is the only one that is sent."""
    with router.session() as session:
        session.scalars(select(Order)).all()
        session.scalars(select(Person)).all()
    sent: list[str] = []
    for key in ("default", "users"):
        event.listen(
            router.get_engine(key),
            "before_cursor_execute",
            lambda connection, cursor, statement, *rest: sent.append(statement),
        )
    with router.session() as session:
        session.scalars(select(Order)).all()
        session.scalars(select(Person)).all()
    assert [re.search(r"FROM (\w+)", statement)[1] for statement in sent] == ["orders", "person"]


@pytest.mark.parametrize("drivers", [("psycopg2", "pymysql"), ("mysqlclient", "psycopg")], ids=str)
def test_two_phase_commit(
    drivers: tuple[str, str], make_database: Callable[..., Database], manager_class: ManagerClass
) -> None:
    """With twophase=True each database has promised to commit before any of them does."""
    first, second = (make_database(driver) for driver in drivers)
    binds = {"default": first.url, "users": second.url}
    with manager_class(metadata=MainBase.metadata, binds=binds) as manager:
        with manager.session(twophase=True) as session:
            session.add_all([Order(person_id=1), Person(name="Ann")])
            session.flush()
            session.prepare()
            with manager.session() as other:
                assert other.scalars(select(Person)).all() == []
            session.commit()
        with manager.session(twophase=True) as session:
            session.add_all([Order(person_id=2), Person(name="Bob")])
            session.flush()
            session.prepare()
            session.rollback()
        with manager.session() as session:
            assert session.scalars(select(Person.name)).one() == "Ann"
            assert session.scalars(select(Order.person_id)).one() == 1
    assert not open_transactions(first) | open_transactions(second)


def test_two_phase_commit_on_sqlite_is_refused(files: SessionManager) -> None:
    """A database that has no two-phase commit is named before anything is sent."""
    with files.session(twophase=True) as session:
        session.add(Order(person_id=1))
        with pytest.raises(InvalidRequestError, match="'default': sqlite has no two-phase commit"):
            session.flush()


def test_bulk_operations(files: SessionManager) -> None:
    """Bulk operations of the ORM go to the databases of their classes."""
    with files.session() as session, session.begin():
        session.bulk_save_objects([Order(person_id=1), Person(name="Ann"), Order(person_id=2)])
        session.bulk_insert_mappings(Person, [{"name": "Bob"}, {"name": "Cid"}])
        session.execute(insert(Person), [{"name": "Dan"}, {"name": "Eve"}])
        session.bulk_update_mappings(Order, [{"id": 1, "person_id": 5}])
    with files.session() as session:
        assert session.scalar(select(func.count()).select_from(Person)) == 5
        assert sorted(session.scalars(select(Order.person_id))) == [2, 5]


@servers
def test_isolation_of_routed_sessions(
    router: SessionManager, drivers: tuple[str, str] | None
) -> None:
    """What a routed session does in an isolated test is undone on each database."""
    if drivers is not None:  # MariaDB commits at DDL: its tables have to be there
        with router.session() as session:
            assert not [*session.scalars(select(Person)), *session.scalars(select(Order))]
    for _ in range(2):
        with undone(router):
            with router.session() as session:
                session.add_all([Person(name="Ann"), Order(person_id=1)])
                session.commit()
            with router.session() as session:
                assert session.scalars(select(Person.name)).one() == "Ann"
                assert session.scalars(select(Order)).one()
    with router.session() as session:
        assert session.scalars(select(Person)).all() == []
        assert session.scalars(select(Order)).all() == []


@pytest.mark.parametrize("item", [CreateTable, DropTable, lambda table: table.c.id])
def test_schema_items_find_their_database(files: SessionManager, item: Callable) -> None:
    """DDL goes to the database of its table."""
    with files.session() as session:
        assert session.get_bind(clause=item(person)).url.database.endswith("users.db")
        assert session.get_bind(clause=item(orders)).url.database.endswith("default.db")


@pytest.mark.parametrize(
    "ask",
    [
        lambda sequence: select(sequence.next_value()),
        lambda sequence: select(select(sequence.next_value() + 1).subquery()),
        lambda sequence: sequence,
        CreateSequence,
    ],
    ids=["select", "subquery", "itself", "ddl"],
)
def test_sequences_find_their_database(files: SessionManager, ask: Callable) -> None:
    """A statement without a table goes to the database of the metadata of its sequence."""
    keyed = Sequence("keyed", metadata=MetaData(info={"bind_key": "users"}))
    with files.session() as session:
        assert session.get_bind(clause=ask(keyed)).url.database.endswith("users.db")
        for other in (Sequence("no_metadata"), Sequence("no_key", metadata=MetaData())):
            assert session.get_bind(clause=ask(other)).url.database.endswith("default.db")
        for neither in (DDL("SELECT 1"), CreateIndex(Index("of_no_table")), text("SELECT 1")):
            assert session.get_bind(clause=neither).url.database.endswith("default.db")


@pytest.mark.parametrize(
    "drivers", [("psycopg", "pymysql"), ("pymysql", "psycopg")], ids=["pg", "my"]
)
def test_sequences_of_a_database(
    router: SessionManager, drivers: tuple[str, str], manager_class: ManagerClass
) -> None:
    """Numbers are taken from a sequence that only the database of its bind key has."""
    del drivers, manager_class
    numbers = Sequence("numbers", metadata=MetaData(info={"bind_key": "users"}))
    with router.session() as session:
        session.execute(CreateSequence(numbers), bind_arguments={"bind_key": "users"})
        session.commit()
        first = session.scalar(select(numbers.next_value()))
        assert [first, session.scalar(numbers)] == [1, 2]


def test_engines_are_one_transactions(files: SessionManager, tmp_path: Path) -> None:
    """The next transaction asks anew, also when its first connection was asked for by engine."""
    with files.session() as session:
        assert not [*session.scalars(select(Person)), *session.scalars(select(Order))]
        default = session.get_bind(Order)
        session.commit()
        files.remove_bind("users")
        files.add_bind("users", f"sqlite:///{tmp_path}/moved.db")
        session.connection(bind_arguments={"bind": default})
        assert session.get_bind(Person).url.database.endswith("moved.db")

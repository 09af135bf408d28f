"""Flask: models and tables on every kind of base, their names and bind keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    declarative_base,
    declared_attr,
    relationship,
)

from sessionmgr.errors import FlaskModelError
from sessionmgr.ext.flask import Model, Query, SQLAlchemy
from sessionmgr.ext.flask.model import DefaultMeta, camel_to_snake_case
from tests.flask_apps import all_bases, make_app, make_user

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ["tests.flask_fixtures"]

pytestmark = pytest.mark.usefixtures("flask_apps_closed")


def key() -> Any:
    """Make the column of a primary key."""
    return sa.Column(sa.Integer, primary_key=True)


# -- every base


@all_bases
def test_models_are_written_and_read(make_base: Callable[[], type[Any]], tmp_path: Path) -> None:
    """A model is kept in the database of its bind key, under the name made from its own."""
    app = make_app(tmp_path, SQLALCHEMY_BINDS={"users": "sqlite://"})
    base = make_base()
    db = SQLAlchemy(app, model_class=base)
    user = make_user(db, "users")
    assert issubclass(user, base)
    assert user.__tablename__ == "user"
    assert user.metadata is db.metadatas["users"]
    with app.app_context():
        db.create_all()
        assert sa.inspect(db.engines["users"]).has_table("user")
        assert not sa.inspect(db.engine).has_table("user")
        db.session.add(user(username="john"))
        db.session.commit()
        found = db.session.scalars(db.select(user)).one()
        assert (found.id, found.username) == (1, "john")
        assert user.query.filter_by(username="john").one() is found


@all_bases
def test_repr_of_models(make_base: Callable[[], type[Any]], tmp_path: Path) -> None:
    """A model shows its primary key or state; a data class shows what data classes show."""
    app = make_app(tmp_path)
    db = SQLAlchemy(app, model_class=make_base())
    user = make_user(db)
    one = user(username="john")
    if issubclass(db.Model, MappedAsDataclass):
        assert repr(one) == "User(id=None, username='john')"
        return
    assert repr(one) == f"<User (transient {id(one)})>"
    with app.app_context():
        db.create_all()
        db.session.add(one)
        assert repr(one) == f"<User (pending {id(one)})>"
        db.session.flush()
        assert repr(one) == "<User 1>"


@all_bases
def test_base_is_not_touched(make_base: Callable[[], type[Any]]) -> None:
    """Two extensions may share a base; what derives from the base itself is as it was."""
    base = make_base()
    first, second = SQLAlchemy(model_class=base), SQLAlchemy(model_class=base)
    assert first.Model is not second.Model
    assert not hasattr(base, "__table_cls__")
    if base is not Model:
        assert first.metadata is second.metadata is base.metadata
        assert not hasattr(base, "query")


@all_bases
def test_names_by_inheritance(make_base: Callable[[], type[Any]]) -> None:
    """A class with a primary key has a table; one without shares that of its parent."""
    db = SQLAlchemy(model_class=make_base())

    class Duck(db.Model):
        id = key()

    class RubberDuck(Duck):
        id = sa.Column(sa.ForeignKey(Duck.id), primary_key=True)

    class Mallard(Duck):
        pass

    class Abstract(db.Model):
        __abstract__ = True
        id = key()

    class HTTPGoose(Abstract):
        pass

    class Mixed:
        @declared_attr
        def __tablename__(cls) -> str:  # noqa: N805
            return "mixed"

    class Swan(Mixed, db.Model):
        id = key()

    class Named:
        __tablename__ = "named"

    class Crane(Named, db.Model):
        id = key()

    known = db.Table("eider", sa.Column("id", sa.ForeignKey(Duck.id), primary_key=True))

    class Eider(Duck):
        pass

    assert RubberDuck.__table__.name == "rubber_duck"
    assert Mallard.__table__ is Duck.__table__
    assert "__tablename__" not in vars(Mallard)
    assert Mallard.__tablename__ == "duck"
    assert not hasattr(Abstract, "__tablename__")
    assert HTTPGoose.__tablename__ == "http_goose"
    assert (Swan.__table__.name, Crane.__table__.name) == ("mixed", "named")
    assert Eider.__table__ is known


@all_bases
def test_no_primary_key(make_base: Callable[[], type[Any]]) -> None:
    """A model without primary key is SQLAlchemy's error, unless its table is there."""
    db = SQLAlchemy(model_class=make_base())
    with pytest.raises(ArgumentError, match="primary key"):

        class Lost(db.Model):
            pass

    table = db.Table("seen", key_named())

    class Seen(db.Model):
        pass

    assert Seen.__table__ is table
    own = sa.Column("id", sa.ForeignKey(Seen.__table__.c.id), primary_key=True)
    table = db.Table("there", own, schema="s")

    class There(Seen):
        __table_args__ = ({"schema": "s"},)

    assert There.__table__ is table  # and not its parent's


def test_name_that_a_mixin_computes() -> None:
    """A ``__tablename__`` of ``declared_attr`` is left to say what it says, also for children."""
    db = SQLAlchemy()

    class Prefixed:
        @declared_attr
        def __tablename__(cls) -> str:  # noqa: N805
            return f"app_{cls.__name__.lower()}"  # type: ignore[attr-defined]

    class Parent(Prefixed, db.Model):
        id = key()

    class Child(Parent):
        id = sa.Column(sa.ForeignKey(Parent.id), primary_key=True)

    class Own(db.Model):
        id = key()

        @declared_attr
        def __tablename__(cls) -> str:  # noqa: N805
            return f"own_{cls.__name__.lower()}"

    class OfOwn(Own):
        id = sa.Column(sa.ForeignKey(Own.id), primary_key=True)

    names = [model.__table__.name for model in (Parent, Child, Own, OfOwn)]
    assert names == ["app_parent", "app_child", "own_own", "own_ofown"]


def test_model_of_a_table(tmp_path: Path) -> None:
    """A model may be mapped to a ``db.Table``: the table's bind key counts, whatever it says."""
    app = make_app(tmp_path, SQLALCHEMY_BINDS={"users": "sqlite://"})
    db = SQLAlchemy(app)

    class User(db.Model):
        __bind_key__ = "ignored"
        __table__ = db.Table("people", key_named(), bind_key="users")

    assert "ignored" not in db.metadatas
    with app.app_context():
        db.create_all()
        db.session.add(User())
        db.session.commit()
        assert db.session.scalars(db.select(User)).one().id == 1
        assert sa.inspect(db.engines["users"]).get_table_names() == ["people"]


def key_named() -> Any:
    """Make the column of a primary key, named."""
    return sa.Column("id", sa.Integer, primary_key=True)


@all_bases
def test_autonaming_can_be_disabled(make_base: Callable[[], type[Any]]) -> None:
    """Then a model names its table itself; bind keys work all the same."""
    db = SQLAlchemy(model_class=make_base(), disable_autonaming=True)
    with pytest.raises(InvalidRequestError, match="__tablename__"):

        class Lost(db.Model):
            id = key()

    class Named(db.Model):
        __bind_key__ = "users"
        __tablename__ = "given"
        id = key()

    assert db.metadatas["users"].tables == {"given": Named.__table__}


@all_bases
def test_bind_keys_by_inheritance(make_base: Callable[[], type[Any]]) -> None:
    """A bind key is inherited and may be overridden; explicit metadata and tables win."""
    db = SQLAlchemy(model_class=make_base())
    other = sa.MetaData()

    class Abstract(db.Model):
        __abstract__ = True
        __bind_key__ = "users"

    class Inherits(Abstract):
        id = key()

    class Overrides(Abstract):
        __bind_key__ = None
        id = key()

    class Explicit(db.Model):
        __abstract__ = True
        metadata = other
        __bind_key__ = "ignored"

    class OfExplicit(Explicit):
        id = key()

    assert Inherits.metadata is db.metadatas["users"]
    assert "metadata" not in vars(Inherits)
    assert Overrides.metadata is db.metadata
    assert OfExplicit.__table__.metadata is other
    assert "ignored" not in db.metadatas


class Shared:
    """What an application wants all of its models to have."""

    def __repr__(self) -> str:
        return "mine"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.seen = [cls.__name__]

    @declared_attr.cascading
    def id(cls):  # noqa: ANN201, N805
        for base in cls.__mro__[1:-1]:  # type: ignore[attr-defined]
            if getattr(base, "__table__", None) is not None:
                return sa.Column(sa.ForeignKey(base.id), primary_key=True)
        return sa.Column(sa.Integer, primary_key=True)


@pytest.mark.parametrize("bases", [(Model,), (DeclarativeBase,), (DeclarativeBaseNoMeta,)])
def test_attributes_of_the_base_are_kept(bases: tuple[type[Any], ...], tmp_path: Path) -> None:
    """What a base has, its repr, its columns, its hook for subclasses, models have."""
    base = type(bases[0])("Base", (Shared, *bases), {})
    app = make_app(tmp_path)
    db = SQLAlchemy(app, model_class=base)

    class User(db.Model):
        name = sa.Column(sa.String(20))

    class Employee(User):
        title = sa.Column(sa.String(20))

    assert (Employee.seen, Employee.__tablename__) == (["Employee"], "employee")
    with app.app_context():
        db.create_all()
        db.session.add(Employee(name="Em", title="Boss"))
        db.session.commit()
        assert repr(db.session.scalars(db.select(Employee)).one()) == "mine"


def test_two_kinds_of_base_at_once() -> None:
    """A base is of one kind."""

    class Base(DeclarativeBase, DeclarativeBaseNoMeta):  # type: ignore[misc]
        pass

    with pytest.raises(FlaskModelError, match="DeclarativeBase and of DeclarativeBaseNoMeta"):
        SQLAlchemy(model_class=Base)
    with pytest.raises(FlaskModelError, match="must be a class, not str"):
        SQLAlchemy(model_class="Base")  # type: ignore[arg-type]


# -- bases of declarative_base()


class Pages(Query[Any]):
    """A class of queries of an application's own."""


@pytest.mark.parametrize("own", [Model, object])
def test_declarative_base_is_taken_as_it_is(own: type[Any]) -> None:
    """A base that ``declarative_base`` has made is ``db.Model``, and gets what it lacks."""

    class Meta(DefaultMeta):
        pass

    base = declarative_base(cls=own, name="Base", metaclass=Meta)
    db = SQLAlchemy(model_class=base)
    assert db.Model is base
    assert db.metadata is base.metadata
    assert db.Model.query_class is db.Query

    class HTTPLog(db.Model):
        id = key()

    assert HTTPLog.__tablename__ == "http_log"


def test_declarative_base_keeps_its_queries_and_takes_metadata() -> None:
    """What such a base says of queries stays; the metadata argument is for it too."""
    base = declarative_base(cls=type("Mine", (), {"query_class": Pages}), metaclass=DefaultMeta)
    metadata = sa.MetaData()
    db = SQLAlchemy(model_class=base, metadata=metadata)

    class User(db.Model):
        id = key()

    assert User.query_class is Pages
    assert User.__table__.metadata is db.metadata is metadata


# -- metadata and tables


def test_naming_convention_is_carried_over() -> None:
    """Constraints are named alike under each bind key."""
    metadata = sa.MetaData(naming_convention={"pk": "key_%(table_name)s"})
    db = SQLAlchemy(metadata=metadata)
    assert db.metadata is metadata
    table = db.Table("log", key_named(), bind_key="logs")
    assert table.primary_key.name == "key_log"
    assert table.metadata.info == {"bind_key": "logs"}
    assert metadata.info == {"bind_key": None}


def test_metadata_argument_beside_a_base_with_its_own() -> None:
    """The base's own metadata is used, and a warning says so."""

    class Base(DeclarativeBase):
        pass

    with pytest.warns(DeprecationWarning, match="metadata argument is ignored") as warned:
        db = SQLAlchemy(model_class=Base, metadata=sa.MetaData())
    assert db.metadata is Base.metadata
    assert warned[0].filename == __file__


def test_tables() -> None:
    """``db.Table`` is SQLAlchemy's class, finds its metadata by bind key, or is given it."""
    db, other = SQLAlchemy(), sa.MetaData()
    assert issubclass(db.Table, sa.Table)
    assert db.Table("a", key_named()).metadata is db.metadata
    assert db.Table("a").c.keys() == ["id"]  # that which is there
    assert db.Table("b", other, key_named(), bind_key="users").metadata is other
    assert db.Table("c", key_named(), metadata=other).metadata is other
    assert "users" not in db.metadatas
    copy = db.Table("d", key_named(), bind_key="users", schema="s").to_metadata(other)
    assert (copy.metadata, copy.schema) == (other, "s")


def test_names_of_sqlalchemy() -> None:
    """``db`` has the names of sqlalchemy and sqlalchemy.orm, and no others."""
    db = SQLAlchemy()
    assert (db.Column, db.select, db.Mapped, db.func) == (sa.Column, sa.select, Mapped, sa.func)
    assert db.joinedload.__module__.startswith("sqlalchemy.orm")
    for name in ("nonsense", "__path__", "_underscored"):
        assert not hasattr(db, name)
    with pytest.raises(AttributeError, match=r"sqlalchemy\.orm has 'nonsense'"):
        _ = db.nonsense


@all_bases
def test_relationships(make_base: Callable[[], type[Any]]) -> None:
    """Queries of dynamic relationships and their backrefs are of the extension's class."""
    db = SQLAlchemy(model_class=make_base())

    class Parent(db.Model):
        id = key()
        children = db.relationship("Child", backref="parent", lazy="dynamic")

    class Child(db.Model):
        id = key()
        parent_id = sa.Column(sa.ForeignKey(Parent.id))
        other = db.relationship(
            Parent, backref=db.backref("others", lazy="dynamic", viewonly=True), viewonly=True
        )

    sa.orm.configure_mappers()
    assert Parent.children.property.query_class is db.Query
    assert Parent.others.property.query_class is db.Query
    assert isinstance(Parent().children, db.Query)
    assert relationship is not db.relationship


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("CamelCase", "camel_case"),
        ("HTTP2Request", "http2_request"),
        ("PreABCPost", "pre_abc_post"),
        ("get2HTTPResponse123Code", "get2_http_response123_code"),
        ("Foo_Bar", "foo__bar"),
        ("_Private", "private"),
        ("AstV2Node", "ast_v2_node"),
    ],
)
def test_camel_to_snake_case(name: str, table: str) -> None:
    """Names are those that existing databases have."""
    assert camel_to_snake_case(name) == table

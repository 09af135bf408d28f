"""``db.Model``: the base of an application's models, made of the class that it is given."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import DeclarativeBase, DeclarativeBaseNoMeta, DeclarativeMeta

from sessionmgr.errors import FlaskModelError

from .naming import camel_to_snake_case, drop_empty_table, set_table_name, table_of

if TYPE_CHECKING:
    from .extension import SQLAlchemy
    from .query import Query

__all__ = (
    "BindMetaMixin",
    "DefaultMeta",
    "DefaultMetaNoName",
    "Model",
    "NameMetaMixin",
    "camel_to_snake_case",
    "is_declarative",
    "make_model",
)

#: SQLAlchemy's bases for models with annotations.
_BASES = (DeclarativeBase, DeclarativeBaseNoMeta)


class _QueryProperty:
    """Gives a query of the model on the current session: ``User.query``."""

    def __get__(self, instance: object, model: Any) -> Query[Any]:
        query: Query[Any] = model.query_class(model, session=model.__extension__.session())
        return query


def _describe(model: Any) -> str:
    """Show a model by its primary key, or by what it is before it has one."""
    state = sa.inspect(model)
    if state.identity is not None:
        shown = ", ".join(map(str, state.identity))
    else:
        shown = f"({'transient' if state.transient else 'pending'} {id(model)})"
    return f"<{type(model).__name__} {shown}>"


class Model:
    """The base that ``db.Model`` is made of where no ``model_class`` is given.

    A subclass may be the ``model_class``: what it has, all models have.
    """

    __extension__: ClassVar[SQLAlchemy]
    #: The class of the model's ``query``, and of those in ``lazy="dynamic"`` relationships.
    query_class: ClassVar[type[Query[Any]]]
    #: A query of the model on the current session; ``db.session.execute(db.select(...))`` is
    #: SQLAlchemy's way of today.
    query: ClassVar[Query[Any]] = _QueryProperty()  # type: ignore[assignment]  # a descriptor

    def __repr__(self) -> str:
        return _describe(self)


# -- what classes go through before and after they are mapped


def _set_metadata(model: Any) -> None:
    """Give a model the metadata of its bind key, unless it says or inherits which it has."""
    if "__table__" in vars(model):
        return
    db = model.__extension__
    for base in model.__mro__:
        if vars(base).get("metadata", db.metadata) is not db.metadata:
            return
        if "__bind_key__" in vars(base):
            metadata = db._metadata_of(model.__bind_key__)
            if metadata is not model.metadata:
                model.metadata = metadata
            return


class BindMetaMixin(type):
    """A part of a metaclass: models are in the metadata of their ``__bind_key__``."""

    def __init__(
        cls, name: str, bases: tuple[type, ...], names: dict[str, Any], **options: Any
    ) -> None:
        if hasattr(cls, "__extension__"):
            _set_metadata(cls)
        super().__init__(name, bases, names, **options)


class NameMetaMixin(type):
    """A part of a metaclass: tables are named after their models."""

    def __init__(
        cls, name: str, bases: tuple[type, ...], names: dict[str, Any], **options: Any
    ) -> None:
        named = any(isinstance(base, DeclarativeMeta) for base in cls.__mro__[1:])
        if named:
            set_table_name(cls)
        super().__init__(name, bases, names, **options)
        if named:
            drop_empty_table(cls)

    def __table_cls__(cls, *arguments: Any, **options: Any) -> Any:
        return table_of(cls, *arguments, **options)


class DefaultMeta(BindMetaMixin, NameMetaMixin, DeclarativeMeta):
    """The metaclass of ``db.Model`` where it is made of :class:`Model`."""


class DefaultMetaNoName(BindMetaMixin, DeclarativeMeta):
    """The same with ``disable_autonaming=True``."""


class _BindMixin:
    def __init_subclass__(cls, **options: Any) -> None:
        _set_metadata(cls)
        super().__init_subclass__(**options)


class _NameMixin:
    def __init_subclass__(cls, **options: Any) -> None:
        set_table_name(cls)
        super().__init_subclass__(**options)
        drop_empty_table(cls)

    @classmethod
    def __table_cls__(cls, *arguments: Any, **options: Any) -> Any:
        return table_of(cls, *arguments, **options)


# -- making the base


def is_declarative(model_class: type[Any]) -> bool:
    """Tell whether a class is one of SQLAlchemy's bases for models with annotations.

    :raises FlaskModelError: when it is both of them.
    """
    found = [base.__name__ for base in _BASES if issubclass(model_class, base)]
    if len(found) > 1:
        raise FlaskModelError(
            f"model_class {model_class.__name__} is a subclass of {' and of '.join(found)}, which"
            " are two ways to do the same thing: keep one of them"
        )
    return bool(found)


def make_model(
    db: SQLAlchemy,
    model_class: type[Any],
    metadata: sa.MetaData | None,
    *,
    named: bool,
) -> Any:
    """Make ``db.Model``.

    :param db: the extension.
    :param model_class: a subclass of ``DeclarativeBase`` or ``DeclarativeBaseNoMeta``, a base that
        ``declarative_base()`` has made, or a class to make one of.
    :param metadata: the tables without a bind key; ``None``: those of ``model_class``, or new.
    :param named: whether models without a ``__tablename__`` get one.
    :raises FlaskModelError: when ``model_class`` is no class, or two kinds of base at once.
    """
    if not isinstance(model_class, type):
        raise FlaskModelError(f"model_class must be a class, not {type(model_class).__name__}")
    if is_declarative(model_class):
        return _subclass(db, model_class, named=named)
    if isinstance(model_class, DeclarativeMeta):
        model: Any = model_class
        if metadata is not None:
            model.metadata = metadata
    else:
        model = orm.declarative_base(
            cls=model_class,
            name="Model",
            metadata=metadata,
            metaclass=DefaultMeta if named else DefaultMetaNoName,
        )
    for name, value in _added(db, model, given=model_class).items():
        setattr(model, name, value)
    return model


def _subclass(db: SQLAlchemy, model_class: type[Any], *, named: bool) -> Any:
    """Make an abstract subclass: what others derive from ``model_class`` is not touched."""
    mixins = (_BindMixin, _NameMixin) if named else (_BindMixin,)
    names = {
        "__abstract__": True,
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
        **_added(db, model_class, given=model_class),
    }
    return types.new_class("Model", (*mixins, model_class), {}, lambda body: body.update(names))


def _added(db: SQLAlchemy, model: type[Any], *, given: type[Any]) -> dict[str, Any]:
    """List what a base lacks of what models have."""
    added: dict[str, Any] = {"__extension__": db, "query": _QueryProperty()}
    if not hasattr(given, "query_class"):
        added["query_class"] = db.Query
    if "__repr__" not in {name for base in model.__mro__[:-1] for name in vars(base)}:
        added["__repr__"] = _describe
    return added

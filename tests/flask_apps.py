"""Flask applications for tests, and every kind of base that models may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import DeclarativeBase, DeclarativeBaseNoMeta, Mapped, MappedAsDataclass
from sqlalchemy.orm import mapped_column as column

from sessionmgr.ext.flask import Model, SQLAlchemy

if TYPE_CHECKING:
    from pathlib import Path


MADE: list[Flask] = []
"""The applications of a test, which the fixture ``flask_apps_closed`` closes."""


def make_app(folder: Path, uri: str | sa.URL | None = "sqlite://", **settings: Any) -> Flask:
    """Make an application whose instance folder is in ``folder``."""
    app = Flask("tests.flask_apps", instance_path=str(folder / "instance"))
    if uri is not None:
        app.config["SQLALCHEMY_DATABASE_URI"] = uri
    app.config.update(settings)
    MADE.append(app)
    return app


def plain() -> type[Any]:
    """Give the base of models with ``db.Column``."""
    return Model


def annotated() -> type[Any]:
    """Make a ``DeclarativeBase``."""

    class Base(DeclarativeBase):
        pass

    return Base


def no_meta() -> type[Any]:
    """Make a base without a metaclass."""

    class Base(DeclarativeBaseNoMeta):
        pass

    return Base


def dataclass() -> type[Any]:
    """Make a ``DeclarativeBase`` of data classes."""

    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    return Base


def dataclass_no_meta() -> type[Any]:
    """Make a base of data classes without SQLAlchemy's metaclass of declarative bases."""

    class Base(MappedAsDataclass, DeclarativeBaseNoMeta):
        pass

    return Base


def dataclass_last() -> type[Any]:
    """Make a base of data classes, the other way round."""

    class Base(DeclarativeBase, MappedAsDataclass):
        pass

    return Base


all_bases = pytest.mark.parametrize(
    "make_base",
    [plain, annotated, no_meta, dataclass, dataclass_no_meta, dataclass_last],
    ids=lambda make: make.__name__,
)
"""Runs a test with each kind of base: ``make_base()``."""


def make_user(db: SQLAlchemy, bind_key: str | None = None) -> Any:
    """Make a model ``User`` with ``id`` and ``username``, of whichever base ``db`` has."""
    names: dict[str, Any] = {"__bind_key__": bind_key} if bind_key else {}
    names["__module__"] = __name__
    if issubclass(db.Model, (DeclarativeBase, DeclarativeBaseNoMeta)):
        data = {"init": False} if issubclass(db.Model, MappedAsDataclass) else {}
        names["__annotations__"] = {"id": Mapped[int], "username": Mapped[str]}
        names["id"] = column(primary_key=True, **data)
        names["username"] = column(sa.String(50), unique=True)
    else:
        names["id"] = db.Column(db.Integer, primary_key=True)
        names["username"] = db.Column(db.String(50), unique=True)
    return type(db.Model)("User", (db.Model,), names)

"""The extension: every other module takes its models and sessions from here."""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase

from sessionmgr.ext.flask import SQLAlchemy


class Base(DeclarativeBase):
    """Base of the models."""


db = SQLAlchemy(model_class=Base)

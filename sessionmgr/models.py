"""The declarative base whose tables a SessionManager prepares by default."""

from __future__ import annotations

from sqlalchemy.orm import DeclarativeBase

__all__ = ("Base",)


class Base(DeclarativeBase):
    """Base for mapped classes; ``SessionManager()`` creates the tables of its metadata."""

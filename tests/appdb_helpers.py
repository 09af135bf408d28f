"""An application's models, its templates, and what files lie in a folder."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.concurrency import in_child

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sessionmgr import ApplicationDatabase

T = TypeVar("T")

NOBODY = 65534
"""A user who owns nothing."""


class AppBase(DeclarativeBase):
    """Base of an application's models."""


class Client(AppBase):
    """The model of the reference documents."""

    __tablename__ = "client"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    phone: Mapped[str | None] = mapped_column(String(20))
    email: Mapped[str | None] = mapped_column(String(100))


def add_client(db: ApplicationDatabase, name: str) -> None:
    """Add a client, in a session and a transaction of its own."""
    with db.SessionLocal() as session:
        session.add(Client(name=name))
        session.commit()


def client_names(db: ApplicationDatabase) -> list[str]:
    """Return the names of all clients, in alphabetical order."""
    with db.SessionLocal() as session:
        return sorted(session.scalars(select(Client.name)))


def make_template(path: Path, *names: str, journal_mode: str = "delete") -> Path:
    """Make a SQLite database with clients, and a table that no model knows."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={journal_mode}")
        connection.execute(
            "CREATE TABLE client (id INTEGER PRIMARY KEY, name TEXT NOT NULL, phone TEXT, email"
            " TEXT)"
        )
        connection.execute("CREATE TABLE legacy (x)")
        connection.executemany("INSERT INTO client (name) VALUES (?)", [(n,) for n in names])
        connection.commit()
    return path


def names_in(folder: Path) -> set[str]:
    """Return the names of a folder's files, but for those that SQLite keeps beside an open one."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if not name.endswith((".db-wal", ".db-shm", ".db-journal"))}


def as_nobody(function: Callable[[], T]) -> T:
    """Call a function in a child that may not do what root may, and return what it returns."""

    def call() -> T:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return function()

    return in_child(call)

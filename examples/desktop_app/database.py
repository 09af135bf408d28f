"""The application's own database: where it is, its engines and its sessions."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.orm import DeclarativeBase

from sessionmgr import ApplicationDatabase


class Base(DeclarativeBase):
    """Base of the application's models."""


# root: this folder lies in a repository that is another project's.
root = Path(__file__).parent
db = ApplicationDatabase("ClientBook", template="template.db", base=Base, root=root)

engine, SessionLocal, AsyncSessionLocal = db.engine, db.SessionLocal, db.AsyncSessionLocal
DB_PATH, DATA_DIR = str(db.path), db.data_root
init_db, ensure_database_schema = db.init_db, db.ensure_schema


def get_db_path() -> str:
    """Tell where the database is."""
    return DB_PATH


def get_data_root() -> Path:
    """Tell in which folder it is."""
    return DATA_DIR

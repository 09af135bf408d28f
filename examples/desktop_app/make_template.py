"""Makes template.db, which every user's database begins as a copy of."""

from __future__ import annotations

from pathlib import Path

from database import Base
from models import Client

from sessionmgr import ApplicationDatabase

TEMPLATE = Path(__file__).with_name("template.db")


def main() -> None:
    """Make it anew."""
    TEMPLATE.unlink(missing_ok=True)
    url = f"sqlite:///{TEMPLATE}"
    with ApplicationDatabase("template", url=url, base=Base) as db, db.SessionLocal() as session:
        session.add(Client(name="Ada Example", phone="555-0100", email="ada@example.com"))
        session.commit()


if __name__ == "__main__":
    main()

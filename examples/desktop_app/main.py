"""A book of clients: add some, list them, count them."""

from __future__ import annotations

import argparse
import asyncio

from database import AsyncSessionLocal, SessionLocal, get_db_path
from models import Client
from sqlalchemy import func, select


def add(name: str, phone: str | None, email: str | None) -> None:
    """Add a client."""
    with SessionLocal() as session:
        session.add(Client(name=name, phone=phone, email=email))
        session.commit()


def show() -> None:
    """List the clients."""
    with SessionLocal() as session:
        for client in session.scalars(select(Client).order_by(Client.name)):
            print(f"{client.name}, {client.phone or '-'}, {client.email or '-'}")


async def count() -> int:
    """Count the clients, as a window's event loop or a web server would."""
    async with AsyncSessionLocal() as session:
        return await session.scalar(select(func.count()).select_from(Client)) or 0


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="clientbook", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add a client")
    adding.add_argument("name")
    adding.add_argument("--phone")
    adding.add_argument("--email")
    commands.add_parser("list", help="list the clients")
    commands.add_parser("count", help="count the clients")
    commands.add_parser("where", help="tell where the database is")
    told = parser.parse_args()
    if told.command == "add":
        add(told.name, told.phone, told.email)
    elif told.command == "list":
        show()
    elif told.command == "count":
        print(asyncio.run(count()))
    else:
        print(get_db_path())


if __name__ == "__main__":
    main()

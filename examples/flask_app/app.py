"""A shop's products, and who changed what: a Flask application with two databases."""

from __future__ import annotations

import os

import click
from database import db
from flask import Flask
from models import AuditEntry, Product
from views import shop

HERE = "sqlite:///products.db", "sqlite:///audit.db"
"""Without other databases: files in the folder ``instance``."""


def create_app() -> Flask:
    """Make the application, and the tables that are missing in its databases."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ.get("SQLALCHEMY_DATABASE_URI", HERE[0])
    app.config["SQLALCHEMY_BINDS"] = {"audit": os.environ.get("SQLALCHEMY_AUDIT_URI", HERE[1])}
    db.init_app(app)
    app.register_blueprint(shop)
    app.cli.add_command(fill)
    app.context_processor(lambda: {"process": os.getpid()})
    with app.app_context():
        db.create_all()
    return app


@click.command("fill")
@click.argument("count", type=click.IntRange(1, 10_000))
def fill(count: int) -> None:
    """Add COUNT products to look at."""
    products = [Product(name=f"Lamp no. {n:04d}", price=n) for n in range(1, count + 1)]
    db.session.add_all(products)
    db.session.flush()
    db.session.add_all(
        AuditEntry(product_id=product.id, text=f"{product.name} was added") for product in products
    )
    db.session.commit()
    click.echo(f"{count} products were added")

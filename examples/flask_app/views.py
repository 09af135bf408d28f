"""The pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from database import db
from flask import Blueprint, redirect, render_template, request, url_for
from forms import ProductForm
from models import AuditEntry, Product
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue
    from werkzeug.exceptions import NotFound

shop = Blueprint("shop", __name__)


@shop.get("/")
def products() -> ResponseReturnValue:
    """List the products, page by page (``?page=2&per_page=50``)."""
    pages = db.paginate(select(Product).order_by(Product.name), max_per_page=100)
    return render_template("products.html", pages=pages)


@shop.get("/products/<int(max=2147483647):product_id>")
def product(product_id: int) -> ResponseReturnValue:
    """Show a product, and what the other database knows of it."""
    found = db.get_or_404(Product, product_id, description=f"There is no product {product_id}.")
    entries = select(AuditEntry).where(AuditEntry.product_id == product_id)
    history = db.session.scalars(entries.order_by(AuditEntry.id.desc()).limit(20)).all()
    return render_template("product.html", product=found, history=history)


@shop.get("/products/new")
def new_product() -> ResponseReturnValue:
    """Show the form."""
    return render_template("new.html", form=ProductForm())


@shop.post("/products/new")
def add_product() -> ResponseReturnValue:
    """Add a product and its history: one commit, two databases."""
    form = ProductForm.sent(request.form)
    added = form.product()
    if added is not None:
        try:
            save(added)
        except IntegrityError:
            db.session.rollback()
            form.errors["name"] = "There is a product of this name."
        else:
            return redirect(url_for("shop.product", product_id=added.id), 303)
    return render_template("new.html", form=form), 422


def save(added: Product) -> None:
    """Write to both databases.

    A name that is taken is found by the first statement, before either database has committed.
    """
    db.session.add(added)
    db.session.flush()  # the database gives the id
    db.session.add(AuditEntry(product_id=added.id, text=f"{added.name} was added"))
    db.session.commit()


@shop.app_errorhandler(404)
def not_found(error: NotFound) -> ResponseReturnValue:
    """Say what is not there."""
    return render_template("404.html", error=error), 404

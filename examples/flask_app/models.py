"""What the shop keeps: products in the default database, and in another who changed what."""

from datetime import datetime, timezone
from decimal import Decimal

from database import db
from sqlalchemy import DateTime, Numeric, String
from sqlalchemy.orm import Mapped, mapped_column


class Product(db.Model):
    """Something to be sold."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(60), unique=True)
    price: Mapped[Decimal] = mapped_column(Numeric(7, 2))


class AuditEntry(db.Model):
    """What happened to a product; in the database with the key audit."""

    __bind_key__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    # no foreign key: the product is in another database
    product_id: Mapped[int] = mapped_column(index=True)
    at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), default=lambda: datetime.now(timezone.utc)
    )
    text: Mapped[str] = mapped_column(String(200))

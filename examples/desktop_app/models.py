"""What the application keeps."""

from __future__ import annotations

from database import Base
from sqlalchemy.orm import Mapped, mapped_column


class Client(Base):
    """Somebody to call or to write to."""

    __tablename__ = "client"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    phone: Mapped[str | None]
    email: Mapped[str | None]

"""Tables of two databases: orders under no bind key, people and their addresses under ``users``."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class MainBase(DeclarativeBase):
    """Base of what is in the default database."""


class UsersBase(DeclarativeBase):
    """Base of what is in the database ``users``."""

    metadata = MetaData(info={"bind_key": "users"})


class Person(UsersBase):
    """Somebody who orders."""

    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    kind: Mapped[str] = mapped_column(String(50), default="person")
    addresses: Mapped[list[Address]] = relationship(back_populates="person")

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012


class Employee(Person):
    """Somebody of ours: in a table that is joined to the other."""

    __tablename__ = "employee"

    id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
    desk: Mapped[int]

    __mapper_args__ = {"polymorphic_identity": "employee"}  # noqa: RUF012


class Address(UsersBase):
    """Where somebody lives."""

    __tablename__ = "address"

    id: Mapped[int] = mapped_column(primary_key=True)
    street: Mapped[str] = mapped_column(String(50))
    person_id: Mapped[int] = mapped_column(ForeignKey("person.id"))
    person: Mapped[Person] = relationship(back_populates="addresses")


class Order(MainBase):
    """What somebody ordered, who is in another database."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    person_id: Mapped[int]
    person: Mapped[Person] = relationship(
        Person,
        primaryjoin=lambda: Order.person_id == Person.id,
        foreign_keys=lambda: Order.person_id,
    )


person = Person.__table__
orders = Order.__table__

#: A second metadata of the default database.
more = MetaData()
notes = Table("notes", more, Column("id", Integer, primary_key=True))

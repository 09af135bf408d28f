"""What a visitor may send."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from models import Product

if TYPE_CHECKING:
    from collections.abc import Mapping

LONGEST_NAME = 60
HIGHEST_PRICE = Decimal("99999.99")


@dataclass
class ProductForm:
    """The form for a new product: what was typed, and what is wrong with it.

    :param name: as it was typed.
    :param price: as it was typed.
    """

    name: str = ""
    price: str = ""
    errors: dict[str, str] = field(default_factory=dict)
    """Field -> what the visitor is told."""

    @classmethod
    def sent(cls, values: Mapping[str, str]) -> ProductForm:
        """Take what a request brought."""
        return cls(name=values.get("name", "").strip(), price=values.get("price", "").strip())

    def product(self) -> Product | None:
        """Make the product, or fill in :attr:`errors`."""
        if not self.name:
            self.errors["name"] = "Give the product a name."
        elif len(self.name) > LONGEST_NAME or not self.name.isprintable():
            self.errors["name"] = f"Use at most {LONGEST_NAME} characters, all of them printable."
        price = self._price()
        return None if self.errors else Product(name=self.name, price=price)

    def _price(self) -> Decimal | None:
        try:
            price = Decimal(self.price).quantize(Decimal("0.01"))
            if 0 <= price <= HIGHEST_PRICE:
                return price
        except InvalidOperation:
            pass
        self.errors["price"] = f"Give a price from 0 to {HIGHEST_PRICE}, such as 12.50."
        return None

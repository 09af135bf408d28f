"""The Flask example, served by gunicorn, in a browser, on PostgreSQL and MariaDB."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.flask_shop import PRODUCTS, WORKERS, Shop
from tests.helpers import wait_until
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import psutil

    from tests.browser import Visitor
    from tests.servers import Servers

LOST = ("unexpected EOF", "could not receive data", "could not send data", "Aborted connection")
"""How the servers' logs tell of a client that went without a goodbye."""


@dataclass(frozen=True)
class Served:
    """The example, and the databases that it has."""

    shop: Shop
    products: Database
    audit: Database

    def connections(self) -> set[int]:
        """Return the servers' ids of all its connections."""
        return self.products.connections() | self.audit.connections()

    def count(self) -> tuple[int, int]:
        """Count the products, and what is known of them."""
        [products] = rows(self.products, "SELECT count(*) FROM product")
        [entries] = rows(self.audit, "SELECT count(*) FROM audit_entry")
        return products[0], entries[0]


@pytest.fixture(scope="module", params=["psycopg", "pymysql"])
def served(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Serve the example; when it has ended, no server may have lost a connection."""
    server = servers.shared("postgresql" if request.param == "psycopg" else "mariadb")
    mark = server.log_mark()
    with contextlib.ExitStack() as drops:
        databases = [Database(server, server.create_database(), request.param) for _ in range(2)]
        for database in databases:
            drops.callback(server.drop_database, database.name)
        urls = [database.url.render_as_string(hide_password=False) for database in databases]
        environment = {"SQLALCHEMY_DATABASE_URI": urls[0], "SQLALCHEMY_AUDIT_URI": urls[1]}
        with Shop(tmp_path_factory.mktemp("shop"), environment).open() as shop:
            yield Served(shop, *databases)
        for database in databases:
            wait_until(lambda database=database: not database.connections())
            lines = [line for line in server.log_text(mark).splitlines() if database.name in line]
            assert not [line for line in lines if any(sign in line for sign in LOST)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Visitor]:
    """Run a browser."""
    from tests.browser import visitor

    with visitor() as somebody:
        yield somebody


@pytest.fixture
def visitor(browser: Visitor, served: Served) -> Visitor:
    """Have somebody visit the first page of the shop."""
    browser.open(served.shop.url)
    return browser


def rows(database: Database, statement: str, **parameters: object) -> list[tuple[object, ...]]:
    """Return what a statement finds in a database, on a connection of the test's own."""
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(statement), parameters)]


def lamps(numbers: range) -> list[str]:
    """Return the names of products of the README's."""
    return [f"Lamp no. {number:04d}" for number in numbers]


def test_next_page(visitor: Visitor) -> None:
    """From the first page a click leads to the second, and back."""
    assert visitor.texts("tbody th") == lamps(range(1, 21))
    assert "Previous" not in visitor.texts(".pages li")
    visitor.follow("Next")
    assert visitor.texts("tbody th") == lamps(range(21, 41))
    assert visitor.find("[aria-current=page]").text == "2"
    visitor.follow("Previous")
    assert visitor.texts("tbody th") == lamps(range(1, 21))


def test_last_page(visitor: Visitor, served: Served) -> None:
    """The last page has what is left, and no link to a next one."""
    visitor.open(f"{served.shop.url}/?per_page=10")
    assert visitor.texts(".pages li") == [*"12345", "…", "9", "10", "Next", "Last"]
    visitor.follow("Last")
    left = visitor.texts("tbody th")
    assert left[:5] == lamps(range(91, PRODUCTS + 1))
    assert visitor.texts(".pages li") == ["Previous", "1", "2", "…", "8", "9", "10"]
    assert visitor.find("[aria-current=page]").text == "10"


@pytest.mark.parametrize("page", ["6", "0", "-1", "x", "9" * 30])
def test_page_out_of_range(visitor: Visitor, served: Served, page: str) -> None:
    """A page that does not exist is not found, and the answer leads back to those that do."""
    visitor.open(f"{served.shop.url}/?page={page}")
    assert visitor.title == "Not found · Lamp shop"
    visitor.follow("All products")
    assert visitor.find("[aria-current=page]").text == "1"


@pytest.mark.parametrize("number", ["2000000000", "9" * 30])
def test_product_that_is_not_there(visitor: Visitor, served: Served, number: str) -> None:
    """A product without a row is not found, in the words of the view."""
    visitor.open(f"{served.shop.url}/products/{number}")
    assert visitor.find("h1").text == "Not found"
    if number == "2000000000":
        assert visitor.find("main p:first-of-type").text == "There is no product 2000000000."


@pytest.mark.parametrize(
    ("name", "price", "field", "told"),
    [
        ("", "1", "name", "Give the product a name."),
        ("x" * 61, "1", "name", "Use at most 60 characters, all of them printable."),
        ("Lamp no. 0001", "1", "name", "There is a product of this name."),
        ("<b>Bold</b>", "cheap", "price", "Give a price from 0 to 99999.99, such as 12.50."),
    ],
    ids=["empty", "long", "taken", "no price"],
)
def test_bad_input(
    visitor: Visitor, served: Served, name: str, price: str, field: str, told: str
) -> None:
    """The form says what is wrong, keeps what was typed, and writes to neither database."""
    before = served.count()
    visitor.follow("Add a product")
    visitor.send(name=name, price=price)
    assert visitor.texts("strong.error") == [told]
    assert visitor.find("[aria-invalid]").get_attribute("id") == field
    assert visitor.find("#name").get_attribute("value") == name
    assert visitor.find("#price").get_attribute("value") == price
    assert served.count() == before


def test_write_reaches_both_databases(visitor: Visitor, served: Served) -> None:
    """One commit writes to both databases, and the visitor sees both, as text."""
    name = "Zirkon <b>& Söhne</b>"  # is the last in the list, where it is in no test's way
    visitor.follow("Add a product")
    visitor.send(name=name, price="12.5")
    assert visitor.find("h1").text == name
    [told] = visitor.texts("#history li")
    assert told.endswith(f"UTC {name} was added")
    [(key, price)] = rows(
        served.products, "SELECT id, price FROM product WHERE name = :name", name=name
    )
    assert visitor.address == f"{served.shop.url}/products/{key}"
    assert str(price) == "12.50"
    entries = rows(served.audit, "SELECT text FROM audit_entry WHERE product_id = :key", key=key)
    assert entries == [(f"{name} was added",)]
    visitor.reload()  # a GET: what was sent is not sent again
    assert visitor.find("h1").text == name


def test_each_process_has_connections_of_its_own(served: Served) -> None:
    """Both workers serve, on connections that none shares with the other, or with their parent."""
    [(product,)] = rows(served.products, "SELECT min(id) FROM product")
    seen: set[int] = set()

    def all_serve() -> bool:
        seen.update(served.shop.serving(f"/products/{product}"))
        return len(seen) == WORKERS

    wait_until(all_serve)
    assert seen == {worker.pid for worker in served.shop.workers}
    port = served.products.url.port
    parent = ports(served.shop.process, port)
    first, second = (ports(worker, port) for worker in served.shop.workers)
    assert len(first) >= 2  # one for each database
    assert len(second) >= 2
    assert len(parent | first | second) == len(parent) + len(first) + len(second)
    wait_until(lambda: len(served.connections()) == len(parent | first | second))


def ports(process: psutil.Process, server: int | None) -> set[int]:
    """Return the ports from which a process is connected to a server on this machine."""
    return {
        connection.laddr.port
        for connection in process.net_connections("tcp")
        if connection.raddr and connection.raddr.port == server
    }


def test_example_as_its_readme_says(tmp_path: Path) -> None:
    """Without any server, the example does what its README shows."""
    with Shop(tmp_path, {}).open() as shop:
        assert f"1 to 20 of {PRODUCTS}" in shop.get("/")
        assert "Lamp no. 0001 was added" in shop.get("/products/1")

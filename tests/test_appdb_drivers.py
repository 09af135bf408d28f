"""One URL for both kinds of drivers: which stands in for which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url

from sessionmgr import DatabaseURLError, MissingExtraError
from sessionmgr.drivers import url_for

if TYPE_CHECKING:
    from collections.abc import Iterable

REST = "://me:sesame@host:1/db"


def hide(monkeypatch: pytest.MonkeyPatch, modules: Iterable[str]) -> None:
    """Have packages not be installed."""
    monkeypatch.setattr("sessionmgr.drivers.find_spec", lambda name: name not in modules or None)


@pytest.mark.parametrize(
    ("given", "is_async", "found"),
    [
        ("sqlite", False, "sqlite"),
        ("sqlite", True, "sqlite+aiosqlite"),
        ("sqlite+aiosqlite", True, "sqlite+aiosqlite"),
        ("sqlite+aiosqlite", False, "sqlite+pysqlite"),
        ("postgresql+psycopg", False, "postgresql+psycopg"),
        ("postgresql+psycopg", True, "postgresql+psycopg"),
        ("postgresql+psycopg2", False, "postgresql+psycopg2"),
        ("postgresql+psycopg2", True, "postgresql+psycopg"),
        ("postgresql+asyncpg", True, "postgresql+asyncpg"),
        ("postgresql+asyncpg", False, "postgresql+psycopg"),
        ("mysql+mysqldb", True, "mysql+asyncmy"),
        ("mariadb+pymysql", True, "mariadb+asyncmy"),
        ("mysql+asyncmy", False, "mysql+mysqldb"),
        ("mariadb+aiomysql", False, "mariadb+mysqldb"),
        # of both kinds, and none of which is in the table
        ("oracle+oracledb", True, "oracle+oracledb"),
        ("mssql+aioodbc", True, "mssql+aioodbc"),
    ],
)
def test_drivers_stand_in_for_each_other(
    given: str, is_async: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each URL gives one for either kind; one that serves is left as it is."""
    hide(monkeypatch, ())
    url = url_for(make_url(given + REST), is_async=is_async)
    assert url.render_as_string(hide_password=False) == found + REST


@pytest.mark.parametrize(
    ("given", "is_async", "missing", "found"),
    [
        ("postgresql+psycopg2", True, {"psycopg"}, "postgresql+asyncpg"),
        ("postgresql+asyncpg", False, {"psycopg"}, "postgresql+psycopg2"),
        ("mysql+pymysql", True, {"asyncmy"}, "mysql+aiomysql"),
        ("mysql+aiomysql", False, {"MySQLdb"}, "mysql+pymysql"),
    ],
)
def test_driver_that_is_installed_is_taken(
    given: str, is_async: bool, missing: set[str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the preferred one is not installed, the next one serves."""
    hide(monkeypatch, missing)
    assert url_for(make_url(given + REST), is_async=is_async).drivername == found


@pytest.mark.parametrize(
    ("given", "is_async", "missing", "match"),
    [
        ("sqlite", True, {"aiosqlite"}, r"no asynchronous .*install sessionmgr\[aiosqlite\]$"),
        (
            "mysql+mysqldb",
            True,
            {"asyncmy", "aiomysql"},
            r"no asynchronous driver for mysql.*sessionmgr\[asyncmy\] or sessionmgr\[aiomysql\]",
        ),
        (
            "postgresql+asyncpg",
            False,
            {"psycopg", "psycopg2"},
            r"no synchronous driver for postgresql.*\[psycopg\] or sessionmgr\[psycopg2\]",
        ),
    ],
)
def test_missing_drivers_raise(
    given: str, is_async: bool, missing: set[str], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none is installed, the error names the extras that bring one."""
    hide(monkeypatch, missing)
    with pytest.raises(MissingExtraError, match=match) as caught:
        url_for(make_url(given + REST), is_async=is_async)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "is_async", "match"),
    [
        ("postgresql+pg8000", True, "stands in for pg8000. Name one of.*'postgresql+asyncpg'"),
        ("mssql+aioodbc", False, "no synchronous driver is known that stands in for aioodbc"),
        ("sqlite+pysqlcipher", True, "stands in for pysqlcipher"),
    ],
)
def test_unknown_drivers_raise(given: str, is_async: bool, match: str) -> None:
    """What nothing is known to stand in for is told, with the drivers that are known."""
    with pytest.raises(DatabaseURLError, match=match.replace("+", r"\+")) as caught:
        url_for(make_url(given + REST), is_async=is_async)
    assert "sesame" not in str(caught.value)


def test_parameters_of_another_driver_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asyncpg's parameters are not libpq's: none is dropped, and none passed on in vain."""
    hide(monkeypatch, {"psycopg"})
    url = make_url(f"postgresql+psycopg2{REST}?sslmode=require")
    with pytest.raises(DatabaseURLError, match=r"parameters 'sslmode' are those of psycopg2"):
        url_for(url, is_async=True)
    hide(monkeypatch, ())
    assert url_for(url, is_async=True).query == {"sslmode": "require"}
    mysql = make_url(f"mysql+pymysql{REST}?charset=utf8mb4")
    assert url_for(mysql, is_async=True).query == {"charset": "utf8mb4"}

"""Which URL names the same database with a synchronous driver, or with one for event loops."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from .errors import DatabaseURLError, MissingExtraError
from .urls import list_names, masked

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ("url_for",)


class _Driver(NamedTuple):
    name: str
    module: str
    extra: str | None
    #: Whose names the parameters in its URLs have.
    parameters: str


_PSYCOPG = _Driver("psycopg", "psycopg", "psycopg", "libpq")
_MYSQL_SYNC = (
    _Driver("mysqldb", "MySQLdb", "mysqlclient", "mysql"),
    _Driver("pymysql", "pymysql", "pymysql", "mysql"),
)
_MYSQL_ASYNC = (
    _Driver("asyncmy", "asyncmy", "asyncmy", "mysql"),
    _Driver("aiomysql", "aiomysql", "aiomysql", "mysql"),
)

#: Dialect -> the drivers for threads and for event loops, in order of preference.
_DRIVERS: dict[str, tuple[tuple[_Driver, ...], tuple[_Driver, ...]]] = {
    "sqlite": (
        (_Driver("pysqlite", "sqlite3", None, "sqlite"),),
        (_Driver("aiosqlite", "aiosqlite", "aiosqlite", "sqlite"),),
    ),
    "postgresql": (
        (_PSYCOPG, _Driver("psycopg2", "psycopg2", "psycopg2", "libpq")),
        (_PSYCOPG, _Driver("asyncpg", "asyncpg", "asyncpg", "asyncpg")),
    ),
    "mysql": (_MYSQL_SYNC, _MYSQL_ASYNC),
    "mariadb": (_MYSQL_SYNC, _MYSQL_ASYNC),
}


def url_for(url: URL, *, is_async: bool) -> URL:
    """Give the URL of the same database with a driver of one kind.

    A URL whose driver serves is given as it is. Otherwise the first driver that is installed:
    psycopg before psycopg2 or asyncpg; mysqlclient before PyMySQL, asyncmy before aiomysql.

    :param url: the database.
    :param is_async: whether the driver is to be one for event loops.
    :raises DatabaseURLError: when none is known, or it does not know the URL's parameters.
    :raises MissingExtraError: when none of them is installed.
    """
    dialect = url.get_dialect()
    if (dialect.get_async_dialect_cls(url) if is_async else dialect).is_async is is_async:
        return url
    kind = "asynchronous" if is_async else "synchronous"
    backend = url.get_backend_name()
    drivers = _DRIVERS.get(backend, ((), ()))
    own = next((d for kinds in drivers for d in kinds if d.name == dialect.driver), None)
    if own is None:
        raise DatabaseURLError(
            f"database {masked(url)}: no {kind} driver is known that stands in for"
            f" {dialect.driver}. Name one of {_known(is_async)}"
        )
    found = next((driver for driver in drivers[is_async] if find_spec(driver.module)), None)
    if found is None:
        extras = " or ".join(f"sessionmgr[{driver.extra}]" for driver in drivers[is_async])
        raise MissingExtraError(
            f"database {masked(url)}: no {kind} driver for {backend} is installed: pip install"
            f" {extras}"
        )
    if url.query and own.parameters != found.parameters:
        raise DatabaseURLError(
            f"database {masked(url)}: its parameters {list_names(url.query)} are those of"
            f" {own.name}, and {found.name}, the {kind} driver for it, has others. Leave them out,"
            " or name postgresql+psycopg, which is of both kinds"
        )
    return url.set(drivername=f"{url.drivername.partition('+')[0]}+{found.name}")


def _known(is_async: bool) -> str:
    names = (f"{name}+{d.name}" for name, kinds in _DRIVERS.items() for d in kinds[is_async])
    return list_names(names)

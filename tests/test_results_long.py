"""Results that are longer than statements: sent in portions, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sessionmgr import ResultStore, ResultTooLongError, TaskResult
from tests.results_helpers import counted_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Database
    from tests.servers.mariadb import MariaDB

MYSQL_DRIVERS = ("pymysql", "mysqlclient")


@pytest.mark.parametrize("driver", MYSQL_DRIVERS)
def test_long_results_are_portioned(make_database: Callable[..., Database], driver: str) -> None:
    """Many long results are sent in statements that a server with a small limit takes too."""
    database = make_database(driver)
    results = [bytes([i]) * 100_000 for i in range(30)]
    with ResultStore(database.url) as store:
        store.prepare()
        with counted_statements(store) as statements:
            store.store_many(TaskResult(f"{i}", "SUCCESS", r) for i, r in enumerate(results))
            store.store_many([TaskResult("long", "SUCCESS", b"\0" * 2_000_000)])
        assert sum(each.startswith("INSERT") for each in statements) == 15 + 1
        found = store.get_many(str(i) for i in range(30))
        assert [found[f"{i}"].result for i in range(30)] == results


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_large_results_are_portioned_on_postgresql(
    make_database: Callable[..., Database], driver: str
) -> None:
    """What does not fit into 16 MiB is sent in more than one statement, in one transaction."""
    results = [bytes([i]) * 10 * 2**20 for i in range(3)]
    with ResultStore(make_database(driver).url) as store:
        store.prepare()
        with counted_statements(store) as statements:
            store.store_many(TaskResult(f"{i}", "SUCCESS", r) for i, r in enumerate(results))
        assert [each.split()[0] for each in statements] == ["BEGIN", *["INSERT"] * 3, "COMMIT"]
        assert [store.get(f"{i}").result for i in range(3)] == results  # type: ignore[union-attr]


def test_twenty_megabytes_fit_where_the_server_takes_them(
    mariadb: MariaDB, make_database: Callable[..., Database]
) -> None:
    """With max_allowed_packet of 64 MiB, MariaDB keeps a result of 20 MB in a new table."""
    result = b"result" * 3_400_000
    [(before,)] = mariadb.query("SELECT @@GLOBAL.max_allowed_packet")
    mariadb.query("SET GLOBAL max_allowed_packet = 67108864")  # for new connections
    try:
        with ResultStore(make_database("mysqlclient").url) as store:
            store.store("1", "SUCCESS", result)
            assert store.get("1").result == result  # type: ignore[union-attr]
    finally:
        mariadb.query(f"SET GLOBAL max_allowed_packet = {before}")


@pytest.mark.parametrize("driver", MYSQL_DRIVERS)
def test_result_too_long_for_a_statement_is_an_error(
    mariadb: MariaDB, make_database: Callable[..., Database], driver: str
) -> None:
    """It says what the server takes, at once; the server itself would end the connection."""
    [(limit,)] = mariadb.query("SELECT @@GLOBAL.max_allowed_packet")
    refused = pytest.raises(ResultTooLongError, match=f"{limit:,}.*max_allowed_packet")
    with ResultStore(make_database(driver).url) as store:
        for long in (b"x" * limit, b"\0" * (limit // 2), b"\xff" * limit):
            with refused:
                store.store("1", "SUCCESS", long)
            with refused:
                store.store_many([TaskResult("1", "SUCCESS", long)])
            with refused:
                store.save_group("1", long)
        assert store.get("1") is None
        fits = b"x" * (limit // 2 - 5000)  # PyMySQL sends bytes in hexadecimal
        store.store("1", "SUCCESS", fits)
        assert store.get("1").result == fits  # type: ignore[union-attr]
        [stats] = store.manager.stats().databases
        assert (stats.connects, stats.invalidated) == (1, 0)

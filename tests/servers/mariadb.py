"""MariaDB: the programs of the Debian package, on data of our own."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any

import pymysql
from sqlalchemy import URL
from typing_extensions import Self

from tests.servers.process import (
    ServerProcess,
    find_program,
    give_to_system_user,
    run_as_system_user,
)
from tests.servers.server import APP_PASSWORD, APP_USER, Server, new_database_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INNODB = ("--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0")

# The server loads no grants while it makes its system tables: FLUSH makes it. The other accounts
# have no password and are for the socket, which is in a directory of mode 0700.
ROOT_OVER_TCP = """\
FLUSH PRIVILEGES;
CREATE OR REPLACE USER root@127.0.0.1 IDENTIFIED BY '{password}';
GRANT ALL ON *.* TO root@127.0.0.1 WITH GRANT OPTION;
"""

NO_SUCH_THREAD = 1094
"""ER_NO_SUCH_THREAD: the connection to kill is gone."""


class MariaDB(Server):
    """A MariaDB server."""

    environment = "SESSIONMGR_TEST_MYSQL_URL"

    @classmethod
    def launch(cls, directory: Path, port: int) -> Self:
        password = secrets.token_urlsafe()
        admin = URL.create("mysql", "root", password, "127.0.0.1", port, "mysql")
        mariadbd = find_program("mariadbd", "mariadb-server")
        data = initialise(directory, password)
        log = directory / "log"
        server = cls(admin, log)
        server._process = ServerProcess(
            [
                mariadbd,
                "--no-defaults",
                f"--datadir={data}",
                f"--tmpdir={directory}",
                f"--socket={data / 'socket'}",
                f"--pid-file={data / 'pid'}",
                f"--port={port}",
                "--bind-address=127.0.0.1",
                "--skip-name-resolve",
                "--max-connections=600",
                "--log-warnings=2",  # a line for each connection that ends without a goodbye
                *INNODB,
            ],
            log,
            server.answers,
        )
        server.process.start()
        return server

    def query(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        connection = pymysql.connect(
            host=self.admin.host,
            port=self.admin.port or 3306,
            user=self.admin.username,
            password=self.admin.password or "",
            autocommit=True,
        )
        with connection, connection.cursor() as cursor:
            cursor.execute(statement, params or None)
            return list(cursor.fetchall())

    def status(self, variable: str) -> int:
        """Return a counter of the server's, such as `Aborted_clients`."""
        [(_, value)] = self.query("SHOW GLOBAL STATUS WHERE Variable_name = %s", variable)
        return int(value)

    def ensure_app_user(self) -> None:
        self.query(f"CREATE USER IF NOT EXISTS {APP_USER}@'%%' IDENTIFIED BY %s", APP_PASSWORD)

    def connections(self, database: str) -> set[int]:
        rows = self.query("SELECT id FROM information_schema.processlist WHERE db = %s", database)
        return {connection_id for (connection_id,) in rows}

    def kill(self, *ids: int) -> None:
        for connection_id in ids:
            with tolerating(NO_SUCH_THREAD):
                self.query(f"KILL {connection_id}")

    def create_database(self) -> str:
        name = new_database_name()
        self.query(f"CREATE DATABASE {name}")
        self.query(f"GRANT ALL ON {name}.* TO {APP_USER}")
        return name

    def drop_database(self, name: str) -> None:
        # DROP would wait for the locks that open transactions have on the tables.
        self.kill(*self.connections(name))
        self.query(f"DROP DATABASE IF EXISTS {name}")
        self.query(f"REVOKE ALL ON {name}.* FROM {APP_USER}")


def initialise(directory: Path, password: str) -> Path:
    """Make a data directory, with the superuser `root`, and return it."""
    data, statements = directory / "data", directory / "root.sql"
    data.mkdir()
    statements.write_text(ROOT_OVER_TCP.format(password=password))
    for path in (data, statements):
        give_to_system_user(path)
    run_as_system_user(
        [
            find_program("mariadb-install-db", "mariadb-server"),
            "--no-defaults",
            f"--datadir={data}",
            f"--tmpdir={directory}",
            f"--extra-file={statements}",
            "--auth-root-authentication-method=normal",
            "--skip-name-resolve",
            "--skip-test-db",
            *INNODB,
        ]
    )
    return data


@contextlib.contextmanager
def tolerating(number: int) -> Iterator[None]:
    """Let the server's error of one number pass."""
    try:
        yield
    except pymysql.err.Error as error:
        if error.args[0] != number:
            raise

"""PgBouncer: the program of the Debian package, in front of a PostgreSQL server."""

from __future__ import annotations

import signal
from contextlib import closing
from typing import TYPE_CHECKING

import psycopg
from typing_extensions import Self

from tests.servers.process import ServerProcess, find_program, give_to_system_user
from tests.servers.server import APP_PASSWORD, APP_USER

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers.postgresql import PostgreSQL

CONFIGURATION = """
[databases]
* = host={server.host} port={server.port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
pool_mode = transaction
default_pool_size = 3
"""
"""Three connections to each database, which the transactions of all clients take turns on."""


class PgBouncer:
    """A PgBouncer of our own that pools transactions, on 127.0.0.1.

    :param directory: an empty directory for everything it writes.
    :param port: of :func:`~tests.servers.process.reserved_port`.
    :param server: the server behind it; clients are :data:`~tests.servers.server.APP_USER`.
    """

    def __init__(self, directory: Path, port: int, server: PostgreSQL) -> None:
        self.port = port
        self._server = server
        program = find_program("pgbouncer", "pgbouncer")
        configuration, users = directory / "pgbouncer.ini", directory / "users"
        configuration.write_text(CONFIGURATION.format(server=server.admin, port=port, users=users))
        users.write_text(f'"{APP_USER}" "{APP_PASSWORD}"\n')
        for path in (configuration, users):
            give_to_system_user(path)
        self.process = ServerProcess(
            [program, str(configuration)],
            directory / "log",
            self.answers,
            stop_signal=signal.SIGINT,  # SIGTERM would, since 1.23, wait for the clients to go
        )

    @classmethod
    def launch(cls, directory: Path, port: int, server: PostgreSQL) -> Self:
        """Start a PgBouncer; the arguments are those of the class.

        :raises MissingServerError: when its program is not there.
        """
        bouncer = cls(directory, port, server)
        bouncer.process.start()
        return bouncer

    def url(self, driver: str, database: str) -> URL:
        """Return the URL of a database of the server's, through PgBouncer.

        :param driver: one of :data:`~tests.servers.server.DRIVERS`.
        """
        return self._server.url(driver, database).set(host="127.0.0.1", port=self.port)

    def answers(self) -> bool:
        """Return whether a query gets through."""
        url = self.url("psycopg", "postgres").set(drivername="postgresql")
        try:
            connection = psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)
            with closing(connection):  # "with connection" does not close it where the end fails
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False

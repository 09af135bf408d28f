"""What tests do with a running database server, whoever started it."""

from __future__ import annotations

import abc
import dataclasses
import functools
import uuid
from typing import TYPE_CHECKING, Any, ClassVar

from tests.servers.process import MissingServerError

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import URL
    from typing_extensions import Self

    from tests.servers.process import ServerProcess

DRIVERS = {
    "psycopg": "postgresql+psycopg",
    "psycopg2": "postgresql+psycopg2",
    "pymysql": "mysql+pymysql",
    "mysqlclient": "mysql+mysqldb",
}
"""Driver -> SQLAlchemy's name for its dialect."""

ASYNC_DRIVERS = {
    "asyncpg": "postgresql+asyncpg",
    "psycopg-async": "postgresql+psycopg",
    "asyncmy": "mysql+asyncmy",
    "aiomysql": "mysql+aiomysql",
}
"""The same of asynchronous drivers."""

TWINS = dict(zip(DRIVERS, ASYNC_DRIVERS, strict=True))
"""Driver -> the one that has its place in a test that is run for AsyncSessionManager."""

APP_USER = "sessionmgr_app"
APP_PASSWORD = "sessionmgr_app_password"
"""The role that tests connect as: it owns its databases and has no other right."""


class Server(abc.ABC):
    """A database server, seen through the connection of its superuser.

    Each call of :meth:`query` opens and closes a connection of its own, so that a handle works
    across forks and restarts.

    :param admin: URL of the superuser.
    :param log: the server's log file; None when the server is not ours.
    :param process: the server's process; None when another process started it.
    """

    environment: ClassVar[str]
    """The environment variable with the superuser's URL of a server to use instead of ours."""

    def __init__(
        self, admin: URL, log: Path | None = None, process: ServerProcess | None = None
    ) -> None:
        self.admin = admin
        self.log = log
        self._process = process

    @classmethod
    @abc.abstractmethod
    def launch(cls, directory: Path, port: int) -> Self:
        """Start a server of our own.

        :param directory: an empty directory for everything it writes.
        :param port: of :func:`~tests.servers.process.reserved_port`.
        :raises MissingServerError: when its programs are not there.
        """

    @abc.abstractmethod
    def query(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, in autocommit, and return its rows, if any.

        :param params: values for the ``%s`` in the statement. Without any, a ``%`` is a ``%``.
        """

    @abc.abstractmethod
    def ensure_app_user(self) -> None:
        """Make the role that tests connect as, unless it is there."""

    @abc.abstractmethod
    def connections(self, database: str) -> set[int]:
        """Return the server's ids of the connections that clients have to a database."""

    @abc.abstractmethod
    def kill(self, *ids: int) -> None:
        """End connections by the server's ids for them; those that are gone do not matter."""

    @abc.abstractmethod
    def create_database(self) -> str:
        """Create a database that :data:`APP_USER` owns, and return its name."""

    @abc.abstractmethod
    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, together with the connections to it."""

    @property
    def process(self) -> ServerProcess:
        """The server's process, to stop and restart: of private servers only."""
        assert self._process is not None, "a shared server is not stopped by a test"
        return self._process

    def answers(self) -> bool:
        """Return whether the server runs a query."""
        try:
            self.query("SELECT 1")
        except Exception:  # noqa: BLE001 - each driver has an error tree of its own
            return False
        return True

    def url(
        self, driver: str, database: str, *, user: str = APP_USER, password: str = APP_PASSWORD
    ) -> URL:
        """Return the TCP URL of a database on this server.

        :param driver: one of :data:`DRIVERS` or :data:`ASYNC_DRIVERS`.
        """
        dialect = (DRIVERS | ASYNC_DRIVERS)[driver]
        return self.admin.set(
            drivername=dialect, username=user, password=password, database=database
        )

    def log_mark(self) -> int:
        """Return a mark for the present end of the log."""
        return self._log_file().stat().st_size

    def log_text(self, since: int = 0) -> str:
        """Return the server's log, or what came after a mark."""
        with self._log_file().open("rb") as log:
            log.seek(since)
            return log.read().decode(errors="replace")

    def _log_file(self) -> Path:
        if self.log is None:
            raise MissingServerError(f"the log of the server in {self.environment}")
        return self.log


@dataclasses.dataclass(frozen=True)
class Database:
    """One test's own database on a server, as one driver sees it."""

    server: Server
    name: str
    driver: str

    @functools.cached_property
    def url(self) -> URL:
        """URL of the database for the test's role."""
        return self.server.url(self.driver, self.name)

    @property
    def is_postgresql(self) -> bool:
        """Whether it is on PostgreSQL, else on MariaDB."""
        return self.url.get_backend_name() == "postgresql"

    def connections(self) -> set[int]:
        """Return the server's ids of the connections that clients have to the database."""
        return self.server.connections(self.name)


def new_database_name() -> str:
    """Return a name that no database has."""
    return f"sessionmgr_{uuid.uuid4().hex[:16]}"

"""What the benchmarks of one run share: the servers, and how much to measure."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL

from tests.servers import MissingServerError, Servers

from .cores import servers_cores
from .report import Report

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from typing_extensions import Self

    from tests.servers import Server

__all__ = ("ROOT", "SERVERS", "Context")

ROOT = Path(__file__).parents[1]
"""The folder that holds this package: child processes start there."""

SERVERS = {
    "PostgreSQL": ("postgresql", {}),
    "PostgreSQL over TLS": ("postgresql", {"tls": True}),
    "PostgreSQL on disk": ("postgresql", {}),
    "MariaDB": ("mariadb", {}),
}
"""Name -> kind of server and options to start it with."""

DURABLE = {
    "postgresql": (
        "ALTER SYSTEM SET fsync = on",
        "ALTER SYSTEM SET full_page_writes = on",
        "ALTER SYSTEM SET synchronous_commit = on",
        "SELECT pg_reload_conf()",
    ),
    "mariadb": ("SET GLOBAL innodb_flush_log_at_trx_commit = 1",),
}
"""Kind of server -> what has it write each commit through."""

MODULES = {"mysqlclient": "MySQLdb"}
"""Driver -> its module, where the name differs."""


@dataclass
class Context:
    """One run of benchmarks. As a context manager it stops the servers at its end.

    :param quick: whether a few rounds will do, to see that everything works.
    :param disk: the folder for the files of servers that are "on disk".
    """

    quick: bool = False
    disk: Path | None = None
    _servers: Servers = field(default_factory=Servers)
    _on_disk: Servers = field(init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _started: dict[str, Server] = field(default_factory=dict)
    _redis: str | None = None

    def __post_init__(self) -> None:
        self._on_disk = Servers(folder=self.disk)

    def __enter__(self) -> Self:
        self._stack.callback(self._servers.close)
        self._stack.callback(self._on_disk.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def url(self, server_name: str, driver: str) -> URL:
        """Make a fresh database on a private server, which is started when first asked for.

        :param server_name: one of :data:`SERVERS`.
        :param driver: one of ``tests.servers.DRIVERS``.
        :raises MissingServerError: when the server or the driver is not installed.
        """
        if importlib.util.find_spec(MODULES.get(driver, driver)) is None:
            raise MissingServerError(f"driver {driver}")
        server = self._server(server_name)
        return server.url(driver, server.create_database())

    def _server(self, name: str) -> Server:
        if name not in self._started:
            kind, options = SERVERS[name]
            servers = self._on_disk if name.endswith("on disk") else self._servers
            with servers_cores():
                server = self._stack.enter_context(servers.private(kind, **options))
            self._started[name] = server
        return self._started[name]

    def durable(self, server_name: str, driver: str) -> URL:
        """Make a fresh database whose server writes each commit through, as installed servers do.

        The tests' servers do not. What raises is as for :meth:`url`.
        """
        url = self.url(server_name, driver)
        for statement in DURABLE[SERVERS[server_name][0]]:
            self._started[server_name].query(statement)
        return url

    def sqlite(self) -> URL:
        """Name a file for a fresh SQLite database."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        return URL.create("sqlite", database=f"{folder}/results.db")

    def redis(self) -> str:
        """Give the URL of a private Redis server, which is started when first asked for.

        :raises MissingServerError: when it is not installed.
        """
        if self._redis is None:
            with servers_cores():
                self._redis = self._stack.enter_context(self._servers.redis()).url
        return self._redis

    def report(self, name: str, description: str | None) -> Report:
        """Begin a report.

        :param name: the benchmark's name.
        :param description: its module's docstring.
        """
        command = f"python -m benchmarks {name}{' --quick' if self.quick else ''}"
        return Report(name, (description or "").strip(), command, _versions())

    def add_versions(self, report: Report, places: Iterable[tuple[str, str]]) -> None:
        """Add to a report the versions of what it was measured on.

        :param places: names of servers and drivers; those that are missing here are left out.
        """
        for name, driver in places:
            if name in self._started:
                [(answer,)] = self._started[name].query("SELECT version()")
                report.versions[name] = answer.removeprefix("PostgreSQL ").split()[0]
                report.versions[driver] = version(driver)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("SQLAlchemy", "celery")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"Python": platform.python_version(), **packages, platform.system(): machine}

"""The servers of one test run."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import make_url

from tests.servers.mariadb import MariaDB
from tests.servers.pgbouncer import PgBouncer
from tests.servers.postgresql import PostgreSQL
from tests.servers.process import MissingServerError, give_to_system_user, reserved_port
from tests.servers.redis import Redis

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.servers.server import Server

KINDS: dict[str, type[Server]] = {"postgresql": PostgreSQL, "mariadb": MariaDB}


class Servers:
    """Starts servers when they are first asked for, and stops them all at the end.

    Under xdist the controller starts one of each kind for all (:meth:`addresses`) and the workers
    use those.

    :param addresses: kind -> (URL of the superuser, path of the log or None) of servers that run.
    :param folder: where the servers' files are; by default, where temporary files are.
    """

    def __init__(
        self,
        addresses: Mapping[str, tuple[str, str | None]] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._addresses = addresses or {}
        self._folder = folder
        self._shared: dict[str, Server] = {}
        self._stack = contextlib.ExitStack()
        self._owner = os.getpid()

    def shared(self, kind: str) -> Server:
        """Return the server that all tests of the run share.

        :param kind: one of :data:`KINDS`.
        :raises MissingServerError: when it cannot be started here.
        """
        if kind not in self._shared:
            self._shared[kind] = self._find_shared(KINDS[kind], kind)
        return self._shared[kind]

    @contextlib.contextmanager
    def private(self, kind: str, **options: Any) -> Iterator[Server]:
        """Run a server for the caller alone, who may stop it and change its settings.

        :param kind: one of :data:`KINDS`.
        :param options: what the kind's ``launch`` takes besides the directory.
        :raises MissingServerError: when it cannot be started here.
        """
        with self._directory() as directory, reserved_port() as port:
            server = KINDS[kind].launch(directory, port, **options)
            try:
                server.ensure_app_user()
                yield server
            finally:
                server.process.stop()

    @contextlib.contextmanager
    def redis(self) -> Iterator[Redis]:
        """Run a Redis server for the caller alone.

        :raises MissingServerError: when it cannot be started here.
        """
        with self._directory() as directory, reserved_port() as port:
            server = Redis.launch(directory, port)
            try:
                yield server
            finally:
                server.process.stop()

    @contextlib.contextmanager
    def pgbouncer(self, server: PostgreSQL) -> Iterator[PgBouncer]:
        """Run a PgBouncer for the caller alone.

        :param server: the server that it is in front of.
        :raises MissingServerError: when it cannot be started here.
        """
        with self._directory() as directory, reserved_port() as port:
            bouncer = PgBouncer.launch(directory, port, server)
            try:
                yield bouncer
            finally:
                bouncer.process.stop()

    def addresses(self) -> dict[str, tuple[str, str | None]]:
        """Start the shared server of each kind, but those that are missing here.

        :return: what another process gives to its :class:`Servers`, in types that xdist can send.
        """
        found = {}
        for kind in KINDS:
            with contextlib.suppress(MissingServerError):
                server = self.shared(kind)
                url = server.admin.render_as_string(hide_password=False)
                found[kind] = (url, str(server.log) if server.log else None)
        return found

    def close(self) -> None:
        """Stop the servers that this process started; in a forked child, do nothing."""
        if os.getpid() == self._owner:
            self._stack.close()

    def _find_shared(self, server_class: type[Server], kind: str) -> Server:
        if kind in self._addresses:
            url, log = self._addresses[kind]
            return server_class(make_url(url), Path(log) if log else None)
        if override := os.environ.get(server_class.environment):
            server = server_class(make_url(override))
            server.ensure_app_user()
            return server
        return self._stack.enter_context(self.private(kind))

    @functools.cached_property
    def _root(self) -> Path:
        root = Path(tempfile.mkdtemp(prefix="sessionmgr-", dir=self._folder))
        root.chmod(0o711)  # for the servers' user to pass through
        self._stack.callback(shutil.rmtree, root)
        return root

    @contextlib.contextmanager
    def _directory(self) -> Iterator[Path]:
        directory = Path(tempfile.mkdtemp(dir=self._root))
        give_to_system_user(directory)
        try:
            yield directory
        finally:
            shutil.rmtree(directory)

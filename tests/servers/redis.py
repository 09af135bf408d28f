"""Redis: the program of the Debian package, without persistence."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from typing_extensions import Self

from tests.servers.process import ServerProcess, find_program

if TYPE_CHECKING:
    from pathlib import Path


class Redis:
    """A Redis server of our own, on 127.0.0.1."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{self.port}/0"
        program = find_program("redis-server", "redis-server")
        options = f"--bind 127.0.0.1 --port {self.port} --dir {directory} --appendonly no"
        self.process = ServerProcess(
            [program, *options.split(), "--save", ""], directory / "log", self.answers
        )

    @classmethod
    def launch(cls, directory: Path, port: int) -> Self:
        """Start a server.

        :param directory: an empty directory for everything it writes.
        :param port: of :func:`~tests.servers.process.reserved_port`.
        :raises MissingServerError: when its program is not there.
        """
        server = cls(directory, port)
        server.process.start()
        return server

    def answers(self) -> bool:
        """Return whether the server answers a PING."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(5) == b"+PONG"
        except OSError:
            return False

"""A server process: started, watched and stopped by its process id, never by a name."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
from typing import TYPE_CHECKING, ClassVar

import pytest

from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

START_TIMEOUT = 60.0
"""Seconds for a server to answer its first query, on a machine busy with other tests."""

STOP_TIMEOUT = 30.0
"""Seconds for a server to end by itself before it gets SIGKILL."""

SYSTEM_USER, SYSTEM_GROUP = "nobody", "nogroup"
"""Whom servers run as when the tests run as root, which PostgreSQL refuses to run as."""


MISSING = "missing here: "
"""How the reason begins when a test cannot run for want of a server or driver."""

# With CI=true a missing server is a failure, never a skip.
Outcome = pytest.fail.Exception if os.environ.get("CI") == "true" else pytest.skip.Exception


class MissingServerError(Outcome):
    """Skip the test: what it needs is not here.

    :param what: what is missing and how to get it.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{MISSING}{what}")


class ServerProcess:
    """One server process, with its log.

    The kernel ends the process when the thread that started it ends, however it ends
    (PR_SET_PDEATHSIG in prctl(2), set by setpriv(1)): nothing outlives a test run, not even one
    that gets SIGKILL. Hence only the main thread may start one.

    :param command: the program in the foreground, with its arguments.
    :param log: file that its standard output and error are appended to.
    :param answers: tells whether the server can be used.
    :param stop_signal: the signal that ends it in order without waiting for its clients.
    :param death_signal: the signal that the kernel sends when the tests are gone.
    """

    pids: ClassVar[set[int]] = set()
    """Process ids of the servers that this process runs."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        answers: Callable[[], bool],
        *,
        stop_signal: signal.Signals = signal.SIGTERM,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.command = command
        self._log = log
        self._answers = answers
        self._stop_signal = stop_signal
        self._death_signal = death_signal
        self._owner = os.getpid()
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._popen is not None, "the server is not running"
        return self._popen.pid

    def start(self) -> None:
        """Start the server and wait until it answers.

        :raises RuntimeError: when it ends instead, with its log, or when called in a thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("only the main thread may start a server: it ends with its starter")
        with self._log.open("ab") as log:
            self._popen = subprocess.Popen(
                as_system_user(self.command, death_signal=self._death_signal),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the tests, which then stop the server
            )
        self.pids.add(self.pid)
        wait_until(self._is_up, START_TIMEOUT, f"start of {self.command[0]}")

    def stop(self) -> None:
        """Stop the server if it runs, by force if it does not end by itself.

        In a forked child this does nothing: the server is the parent's.
        """
        if self._popen is None or os.getpid() != self._owner:
            return
        self._popen.send_signal(self._stop_signal)
        try:
            self._popen.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self.pids.discard(self.pid)
        self._popen = None

    def restart(self) -> None:
        """Stop the server and start it again on the same port and data."""
        self.stop()
        self.start()

    def _is_up(self) -> bool:
        assert self._popen is not None
        status = self._popen.poll()
        if status is not None:
            self.pids.discard(self.pid)
            self._popen = None
            raise RuntimeError(
                f"{self.command[0]} ended with status {status}:\n{self._log.read_text()}"
            )
        return self._answers()


def as_system_user(command: list[str], death_signal: signal.Signals | None = None) -> list[str]:
    """Return a command that runs as :data:`SYSTEM_USER` when we are root, else as ourselves.

    :param death_signal: the signal that the process gets when the starting thread ends.
    :raises MissingServerError: when there is no setpriv (util-linux).
    """
    options = []
    if os.geteuid() == 0:
        options += [f"--reuid={SYSTEM_USER}", f"--regid={SYSTEM_GROUP}", "--clear-groups"]
    if death_signal is not None:
        options += [f"--pdeathsig={death_signal.name.removeprefix('SIG')}"]
    return [find_program("setpriv", "util-linux"), *options, "--", *command]


def give_to_system_user(path: Path) -> None:
    """Make a file or directory readable for the server, and for nobody else."""
    path.chmod(0o700 if path.is_dir() else 0o600)
    if os.geteuid() == 0:
        shutil.chown(path, SYSTEM_USER, SYSTEM_GROUP)


def run_as_system_user(command: list[str]) -> None:
    """Run a command to its end.

    :raises RuntimeError: when it fails, with its output.
    """
    done = subprocess.run(as_system_user(command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def find_program(name: str, package: str) -> str:
    """Return the path of a program.

    :param package: the Debian package it is in, for the error.
    :raises MissingServerError: when it is not there.
    """
    # Debian puts daemons in /usr/sbin, which is not on a user's PATH.
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
    if path is None:
        raise MissingServerError(f"{name} (Debian package {package})")
    return path


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a port on 127.0.0.1 for a server of ours during the block, also while it restarts.

    It is below the range that the kernel takes the ports of outgoing connections from (32768 and
    up, ip(7)). What reserves it is a socket that is bound and does not listen: other calls, in
    this process or another, cannot bind theirs, which are without SO_REUSEADDR, and the server
    can, which has it (socket(7)).
    """
    with socket.socket() as reservation:
        while True:
            port = random.randrange(20000, 32000)
            with contextlib.suppress(OSError):
                reservation.bind(("127.0.0.1", port))
                break
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield port

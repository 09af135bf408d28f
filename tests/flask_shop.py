"""The Flask example under gunicorn: two processes that are forked from one application."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil

from tests.helpers import wait_until
from tests.servers.process import ServerProcess, find_program
from tests.test_examples import Example

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

__all__ = ("PRODUCTS", "WORKERS", "Shop")

PRODUCTS = 95
"""So many the README's command adds."""

WORKERS = 2
"""So many processes the README's command starts."""

TIMEOUT = 60.0
"""Seconds for the application to start, to answer, and to end, on a busy machine."""


class Shop:
    """The example, run by the commands of its README, on a port of its own.

    :param folder: where the example is copied to.
    :param environment: variables more.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._example = Example("flask_app", folder)
        self._example.environment |= environment
        self._log = self._example.folder / "log"
        self._process: psutil.Popen | None = None
        self.url = ""
        self.workers: list[psutil.Process] = []

    @property
    def process(self) -> psutil.Popen:
        """The process that forks the others."""
        assert self._process is not None, "the shop is closed"
        return self._process

    @contextlib.contextmanager
    def open(self) -> Iterator[Self]:
        """Fill the shop and serve it until the end of the block; it has to end well."""
        fill, serve = self._commands()
        assert self._example.run(fill) == f"{PRODUCTS} products were added\n"
        self._start(serve)
        try:
            wait_until(self._is_open, TIMEOUT, "start of gunicorn")
            yield self
            self.process.terminate()
            assert self.process.wait(TIMEOUT) == 0, self.text()
        finally:
            ServerProcess.pids.discard(self.process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # what is left of its session
            self.process.wait()
        assert not re.search(r"Traceback|ERROR|CRITICAL|WARNING", self.text()), self.text()

    def text(self) -> str:
        """Return the log."""
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> str:
        """Ask for a page, which has to be there."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=TIMEOUT) as answer:  # on a connection of its own
            return answer.read().decode()

    def serving(self, path: str) -> set[int]:
        """Ask for a page eight times at once; return the ids of the processes that answer."""
        with ThreadPoolExecutor(8) as threads:
            pages = list(threads.map(self.get, [path] * 8))
        return {int(re.findall(r'id="process">(\d+)<', page)[0]) for page in pages}

    def _commands(self) -> list[list[str]]:
        readme = (self._example.folder / "README.md").read_text()
        lines = re.findall(r"^    ((?:flask|gunicorn) .*)$", readme, re.MULTILINE)
        return [shlex.split(line) for line in lines]

    def _start(self, command: list[str]) -> None:
        until_tests_end = [find_program("setpriv", "util-linux"), "--pdeathsig=KILL", "--"]
        # a control socket would be the user's, and one for all
        options = ["--bind", "127.0.0.1:0", "--no-control-socket"]
        with self._log.open("wb") as log:
            self._process = psutil.Popen(
                [*until_tests_end, *command, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._example.folder,
                env=self._example.environment,
                start_new_session=True,
            )
        ServerProcess.pids.add(self._process.pid)

    def _is_open(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"gunicorn ended:\n{self.text()}")
        listening = re.search(r"Listening at: (http://\S+)", self.text())
        booted = re.findall(r"Booting worker with pid: (\d+)", self.text())
        if listening is None or len(booted) < WORKERS:
            return False
        self.url = listening[1]
        self.workers = [psutil.Process(int(pid)) for pid in booted]
        return True

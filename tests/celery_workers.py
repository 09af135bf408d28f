"""Celery workers as subprocesses, each with a database for its results, and their clients."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.celery_backend_app import KEY, SETTINGS, Counters, make_app
from tests.helpers import wait_until
from tests.servers.process import ServerProcess, find_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from celery import Celery

    from tests.servers import Database
    from tests.servers.redis import Redis

__all__ = ("POOLS", "CeleryWorker", "Service", "serving")

ROOT = Path(__file__).parents[1]

POOLS: Mapping[str, str] = {
    "fork": "--pool prefork --concurrency 2",
    "spawn": "--pool prefork --concurrency 2 --pool-start-method spawn",
    "threads": "--pool threads --concurrency 4",
    "gevent": "--pool gevent --concurrency 20",
    "eventlet": "--pool eventlet --concurrency 20",
    "solo": "--pool solo",
}
"""The kinds of pools that workers run tasks in -> the options for them."""

START_TIMEOUT = 60.0
"""Seconds for a worker to be ready, on a machine busy with other tests."""


class CeleryWorker:
    """A worker of :mod:`tests.celery_backend_app`, in processes of its own.

    Like servers it ends with the tests, however they end.

    :param settings: of its application.
    :param key: of its application.
    :param folder: where its log is.
    :param options: of ``celery worker``.
    :param environment: variables more.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        key: str,
        folder: Path,
        options: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = folder / "worker.log"
        self._command = [
            *(find_program("setpriv", "util-linux"), "--pdeathsig=KILL", "--"),
            *(sys.executable, "-m", "celery", "-A", "tests.celery_backend_app", "worker"),
            *("--loglevel", "INFO", "--hostname", f"{key}@%h", *options.split()),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        ]
        self._environment = {
            **os.environ,
            SETTINGS: json.dumps(settings),
            KEY: key,
            **(environment or {}),
        }
        self._popen: subprocess.Popen[bytes] | None = None
        self._stopping = False

    @property
    def process(self) -> psutil.Process:
        """The main process."""
        assert self._popen is not None, "the worker is not running"
        return psutil.Process(self._popen.pid)

    def children(self) -> list[psutil.Process]:
        """Return the processes that run tasks."""
        return [child for child in self.process.children() if _runs_tasks(child)]

    def start(self) -> None:
        """Start the worker, and wait until it is ready."""
        mark = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self._environment,
                start_new_session=True,
            )
        ServerProcess.pids.add(self._popen.pid)  # is not left behind: see leftover_processes
        wait_until(lambda: self._is_ready(mark), START_TIMEOUT, "start of the Celery worker")

    def tell_to_stop(self) -> None:
        """Have the worker finish its tasks and leave."""
        if self._popen is not None and not self._stopping:
            self._stopping = True  # told twice, it would not finish them
            self._popen.terminate()

    def stop(self) -> None:
        """Have the worker finish its tasks and leave; it has to end well, and to end."""
        self.tell_to_stop()
        if self._popen is None:
            return
        try:
            status = self._popen.wait(60.0)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the worker does not end:\n{self.text()}") from None
        self._forget()
        assert status == 0, self.text()

    def kill(self) -> None:
        """Kill the worker; the kernel kills its children."""
        assert self._popen is not None
        children = self.process.children(recursive=True)
        self._popen.send_signal(signal.SIGKILL)
        self._popen.wait()
        psutil.wait_procs(children, timeout=30.0)
        self._forget()

    def text(self) -> str:
        """Return the log."""
        return self.log.read_text(errors="replace")

    def _is_ready(self, mark: int) -> bool:
        assert self._popen is not None
        if self._popen.poll() is not None:
            self._forget()
            raise RuntimeError(f"the worker ended:\n{self.text()}")
        return " ready." in self.text()[mark:]

    def _forget(self) -> None:
        assert self._popen is not None
        ServerProcess.pids.discard(self._popen.pid)
        self._popen = None
        self._stopping = False


def _runs_tasks(child: psutil.Process) -> bool:
    try:
        return "tracker import" not in " ".join(child.cmdline())
    except psutil.Error:  # gone, or a zombie
        return False


@dataclass
class Service:
    """A worker, where its results are, and a client.

    :param pool: one of :data:`POOLS`.
    :param driver: that of its database.
    :param settings: of its application.
    :param key: of its application.
    :param database: its database; ``None`` for SQLite.
    :param worker: the worker.
    """

    pool: str
    driver: str
    settings: dict[str, Any]
    key: str
    database: Database | None
    worker: CeleryWorker
    clients: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @cached_property
    def app(self) -> Celery:
        """The application of the client."""
        return self.client()

    @property
    def counters(self) -> Counters:
        """What the tasks count."""
        return Counters(self.settings["broker_url"], f"{self.key}count-")

    def client(self, **settings: Any) -> Celery:
        """Make an application that sends to the worker, with other settings if wanted."""
        app = make_app({**self.settings, **settings}, self.key)
        self.clients.callback(close_app, app)
        return app

    def unique_name(self) -> str:
        """Return a name that nothing else has."""
        return uuid.uuid4().hex

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Have a task run and return its result."""
        return self.app.send_task(name, args, **options).get(timeout=60.0)


def close_app(app: Celery) -> None:
    """Close what an application has open: the broker's connections, and the database's."""
    store = getattr(app._backend, "store", None)  # app.backend would make one
    if store is not None:
        store.close()
    app.close()


@contextlib.contextmanager
def serving(
    redis_server: Redis,
    pool: str,
    database: Database | None,
    *,
    options: str = "",
    environment: Mapping[str, str] | None = None,
    **settings: Any,
) -> Iterator[Service]:
    """Run a worker; at the end it has to leave by itself, and well.

    :param redis_server: the broker.
    :param pool: one of :data:`POOLS`.
    :param database: for its results; ``None`` for a SQLite file.
    :param options: of ``celery worker``, beside those of the pool.
    :param environment: variables more for the worker.
    :param settings: of the application, beside ``broker_url`` and ``result_backend``.
    """
    folder = Path(tempfile.mkdtemp(prefix="sessionmgr-celery-"))
    key = f"celery-{uuid.uuid4().hex[:12]}-"
    if database is None:
        url = f"sqlite:///{folder}/results.db"
    else:
        url = database.url.render_as_string(hide_password=False)
    settings = {
        "broker_url": redis_server.url,
        "result_backend": f"sessionmgr+{url}",
        **settings,
    }
    worker = CeleryWorker(settings, key, folder, f"{POOLS[pool]} {options}", environment)
    driver = database.driver if database else "sqlite"
    service = Service(pool, driver, settings, key, database, worker)
    with contextlib.ExitStack() as ends:
        ends.callback(shutil.rmtree, folder)
        ends.callback(worker.stop)
        ends.enter_context(service.clients)
        worker.start()
        yield service

"""The FastAPI example under a real uvicorn, with two processes, under load and SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import ssl
import subprocess
from collections import Counter
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.helpers import wait_until
from tests.servers.process import ServerProcess, find_program
from tests.test_examples import Example

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from sqlalchemy import URL

    from tests.servers import Database

CLIENTS = 200
"""Requests that are under way at the same time."""

TIMEOUT = 120.0
"""Seconds for the application to start, to answer, and to end, on a busy machine."""


class Server:
    """The example under uvicorn, by the command of its README, on a port of its own.

    :param folder: where the example is copied to.
    :param environment: variables more.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._example = Example("fastapi_app", folder)
        self._environment = {**self._example.environment, **environment}
        readme = (self._example.folder / "README.md").read_text()
        [command] = re.findall(r"^    (uvicorn .*)$", readme, re.MULTILINE)
        self._command = [
            *(find_program("setpriv", "util-linux"), "--pdeathsig=KILL", "--"),
            *shlex.split(command),
            *("--port", "0", "--no-access-log", "--timeout-worker-healthcheck", "60"),
            # a client must not find that the server has just closed a connection that was idle
            *("--timeout-keep-alive", "120"),
        ]
        self.log = self._example.folder / "log"
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[psutil.Popen]:
        """Run it; give its process, when two others answer. The block has to end them."""
        with self.log.open("wb") as log:
            process = psutil.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._example.folder,
                env=self._environment,
                start_new_session=True,
            )
        ServerProcess.pids.add(process.pid)
        try:
            wait_until(lambda: self._is_ready(process), TIMEOUT, "start of uvicorn")
            yield process
            assert process.wait(TIMEOUT) == 0, self.text()
        finally:
            ServerProcess.pids.discard(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of its session
            process.wait()

    def text(self) -> str:
        """Return the log."""
        return self.log.read_text(errors="replace")

    def _is_ready(self, process: psutil.Popen) -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"uvicorn ended:\n{self.text()}")
        found = re.search(r"running on (http://\S+)", self.text())
        if found is None or self.text().count("Application startup complete.") < 2:
            return False
        self.url = found[1]
        return True


class Visitors:
    """Clients that add users and their visits, each one request after the other.

    :param url: of the application.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._tls = ssl.create_default_context()  # not used, and slow to make for each client
        self.users: set[str] = set()
        """Names that were answered to be added, by path operations in threads."""
        self.visits: set[str] = set()
        """Names whose visit was answered to be added, by coroutines."""
        self.statuses: set[int] = set()
        self.unanswered: list[httpx.TransportError] = []
        self.enough = asyncio.Event()
        self.parting = False
        """Whether they ask that each connection be closed with its next answer."""

    async def send(self, rounds: int | None) -> None:
        """Have :data:`CLIENTS` clients send at the same time.

        :param rounds: how often each; ``None`` until the application does not answer.
        """
        await asyncio.gather(*(self._visit(f"u{rounds}-{i}", rounds) for i in range(CLIENTS)))

    def describe(self) -> str:
        """Tell how far they have come."""
        errors = Counter(map(repr, self.unanswered))
        return f"{len(self.users)} users, {len(self.visits)} visits, {self.statuses}, {errors}"

    async def _visit(self, name: str, rounds: int | None) -> None:
        # A pool of its own. One of 200 connections looks through them all at each request, which
        # takes longer than the answer; and it closes connections that it has just given to a
        # request: https://github.com/encode/httpcore/issues/1110
        client = httpx.AsyncClient(
            base_url=self._url, timeout=TIMEOUT, trust_env=False, verify=self._tls
        )
        done = 0
        async with client:
            try:
                while rounds is None or done < rounds:
                    done += 1
                    await self._add(client, f"{name}-{done}")
            except httpx.TransportError as error:
                self.unanswered.append(error)

    async def _add(self, client: httpx.AsyncClient, user: str) -> None:
        """Add a user and a visit."""
        if await self._post(client, "/users", json={"name": user}):
            self.users.add(user)
            if await self._post(client, f"/users/{user}/visits"):
                self.visits.add(user)
        if len(self.visits) >= CLIENTS // 4:
            self.enough.set()

    async def _post(self, client: httpx.AsyncClient, path: str, **arguments: object) -> bool:
        headers = {"Connection": "close"} if self.parting else {}
        response = await client.post(path, headers=headers, **arguments)  # type: ignore[arg-type]
        self.statuses.add(response.status_code)
        return response.is_success


def rows(url: URL, statement: str) -> set[str]:
    """Return what a statement finds in a database."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return set(connection.scalars(text(statement)))


def check_rows(visitors: Visitors, users: URL, logs: URL) -> None:
    """Check that every row which was answered for is in its database."""
    found = rows(logs, "SELECT text FROM log")
    assert visitors.users <= rows(users, "SELECT name FROM user_account")
    assert {f"{name} was added" for name in visitors.users} <= found
    assert {f"{name} was here" for name in visitors.visits} <= found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("driver", ["psycopg", pytest.param("pymysql", marks=pytest.mark.soak)])
def test_load_and_sigterm(
    make_database: Callable[..., Database], tmp_path: Path, driver: str
) -> None:
    """200 requests at once all succeed, and through SIGTERM none fails that is answered.

    Afterwards each row that was answered for is there, and neither a connection nor a process.
    """
    users, logs = make_database(driver), make_database(driver)
    environment = {
        "USERS_URL": users.url.render_as_string(hide_password=False),
        "LOGS_URL": logs.url.render_as_string(hide_password=False),
    }
    server = Server(tmp_path, environment)
    with server.running() as process:
        workers = process.children(recursive=True)
        assert len(workers) >= 2
        visitors = Visitors(server.url)
        asyncio.run(visitors.send(rounds=1))
        assert visitors.statuses == {201}, server.text()
        assert visitors.unanswered == []
        assert len(visitors.visits) == CLIENTS
        check_rows(visitors, users.url, logs.url)
        health = httpx.get(f"{server.url}/health/databases", trust_env=False)
        assert health.status_code == 200, health.text

        later = Visitors(server.url)

        async def send_and_kill() -> None:
            sending = asyncio.create_task(later.send(rounds=None))
            try:
                await asyncio.wait_for(later.enough.wait(), TIMEOUT)
                # A worker of uvicorn (0.54) that shuts down overlooks a connection that it accepted
                # in the same turn of its event loop, and goes on to answer on it, with keep-alive:
                # a client that always has one more request would keep it from ending.
                later.parting = True
                process.terminate()
                await asyncio.wait_for(sending, TIMEOUT)
            except asyncio.TimeoutError:
                raise AssertionError(f"{later.describe()}\n{server.text()}") from None

        asyncio.run(send_and_kill())
        assert later.statuses == {201}, server.text()
        assert len(later.unanswered) == CLIENTS
        _, alive = psutil.wait_procs(workers, TIMEOUT)
        assert not alive
    assert "Traceback" not in server.text(), server.text()
    for database in (users, logs):
        wait_until(lambda database=database: not database.connections())
    check_rows(later, users.url, logs.url)


def test_example_as_its_readme_says(tmp_path: Path) -> None:
    """Without any server, the example does what its README shows."""
    server = Server(tmp_path, {})
    with server.running() as process, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.post("/users", json={"name": "ada"}).json() == {"name": "ada", "id": 1}
        assert client.post("/users", json={"name": "ada"}).status_code == 409
        assert client.post("/users/ada/visits").status_code == 201
        assert client.post("/users/eve/visits").status_code == 404
        assert client.get("/users").json() == [{"name": "ada", "id": 1}]
        assert client.get("/logs").json() == ["ada was here", "ada was added"]
        health = client.get("/health/databases").json()
        names = [database["database"] for database in health["databases"]]
        assert names == ["users", "logs", "users", "logs"]
        assert health["reachable"]
        process.terminate()

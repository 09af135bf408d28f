"""A Celery application with one SessionManager, as a project would have it.

Its broker is a folder, named by the environment: it needs no server.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from celery import Celery
from celery.signals import worker_init

from sessionmgr import AsyncSessionManager, SessionManager
from tests.async_helpers import scalar
from tests.processes import backend_ids

FOLDER = "SESSIONMGR_TEST_CELERY_FOLDER"
"""The environment variable with the folder for messages and results."""

MARK_WORKER = "SESSIONMGR_TEST_MARK_WORKER"
"""The environment variable that has the worker call ``mark_worker()`` when it starts."""


def make_app(folder: Path) -> Celery:
    """Make an application that sends its messages through a folder.

    :param folder: the same for the worker and for who sends it tasks.
    """
    for name in ("messages", "processed", "control", "results"):
        (folder / name).mkdir(exist_ok=True)
    return Celery(
        "sessionmgr-tests",
        broker="filesystem://",
        backend=f"file://{folder}/results",
        broker_transport_options={
            "data_folder_in": folder / "messages",
            "data_folder_out": folder / "messages",
            "processed_folder": folder / "processed",
            "control_folder": folder / "control",
            "polling_interval": 0.05,
        },
        worker_hijack_root_logger=False,
    )


app = make_app(Path(os.environ[FOLDER])) if FOLDER in os.environ else None
manager = SessionManager()
async_manager = AsyncSessionManager()

if os.environ.get(MARK_WORKER):

    @worker_init.connect(weak=False)
    def mark(**_: object) -> None:
        """Say what no fork will say: threads and solo workers are workers too."""
        manager.mark_worker()


if app is not None:

    @app.task(name="backends")
    def backends(url: str) -> list[int]:
        """Return the server's ids of the connections of three sessions."""
        return backend_ids(manager, url)

    @app.task(name="in_loops")
    def in_loops(url: str, times: int) -> list[int]:
        """Run some event loops one after the other, and return what they asked a database for."""
        return [number for _ in range(times) for number in asyncio.run(ask(url))]


async def ask(url: str) -> list[int]:
    """Open more sessions at once than a pool keeps."""

    async def one(number: int) -> int:
        async with await async_manager.session_factory(url) as session:
            return int(await scalar(session, f"SELECT {number}"))

    return list(await asyncio.gather(*map(one, range(8))))

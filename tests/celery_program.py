"""Workers of :mod:`tests.celery_app`, or of another application, as programs."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests import celery_app

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[1]


@contextmanager
def celery_worker(
    folder: Path,
    pool: str,
    application: str = "tests.celery_app",
    variables: Mapping[str, str] | None = None,
    *,
    marks: bool = False,
) -> Iterator[Path]:
    """Run a worker, and give its log; at the end it is told to stop, and has to end well.

    :param folder: where its messages are.
    :param application: the module of the application.
    :param variables: environment variables more.
    :param marks: whether it calls ``mark_worker()``.
    """
    environment = os.environ | {
        celery_app.FOLDER: str(folder),
        "PYTHONWARNINGS": "default::ResourceWarning",
        **(variables or {}),
    }
    if marks:
        environment[celery_app.MARK_WORKER] = "1"
    log = folder / "log"
    command = (
        f"celery -A {application} worker --pool {pool} --concurrency 2"
        " --without-gossip --without-mingle --without-heartbeat"
    )
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", *command.split()],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )
    try:
        yield log
    finally:
        worker.terminate()
        status = worker.wait(60.0)
    assert status == 0, log.read_text()

"""The examples, run by the commands in their READMEs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.servers.process import find_program

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT = 60.0


class Example:
    """A copy of an example.

    :param name: its folder.
    :param folder: where the copy is to be.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder / name
        shutil.copytree(
            EXAMPLES / name,
            self.folder,
            ignore=shutil.ignore_patterns("data", "instance", ".venv", "__py*"),
        )
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self.environment = os.environ | {"PATH": path}

    def commands(self) -> list[list[str]]:
        """Return the README's commands, but for those that install."""
        text = (self.folder / "README.md").read_text()
        lines = re.findall(r"^    ((?:celery|python) .*)$", text, re.MULTILINE)
        return [shlex.split(line) for line in lines]

    def run(self, command: list[str]) -> str:
        """Run a command to its end, which has to be a good one, and return what it says."""
        outcome = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert (outcome.returncode, outcome.stderr) == (0, "")
        return outcome.stdout

    @contextmanager
    def running(self, command: list[str]) -> Iterator[Path]:
        """Run a command until it is told to stop; give its log."""
        log = self.folder / "log"
        until_tests_end = [find_program("setpriv", "util-linux"), "--pdeathsig=KILL", "--"]
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [*until_tests_end, *command],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            ) as process,
        ):
            try:
                yield log
                process.terminate()
                assert process.wait(TIMEOUT) == 0, log.read_text()
            finally:
                process.kill()


def test_celery_app(tmp_path: Path) -> None:
    """The Celery application does as its README says: tasks, a chord, a failure, connections."""
    example = Example("celery_app", tmp_path)
    worker, client, count = example.commands()
    with example.running(worker) as log:
        told = example.run(client)
    assert "a task: 2 + 3 = 5\n" in told
    assert "a chord: the squares of 0 to 19 add up to 2470\n" in told
    assert "a failing task: ZeroDivisionError('division by zero')\n" in told
    assert "tasks.divide: FAILURE, b'" in told
    # one process may have done all of it
    assert set(re.findall(r"; (\d+) connects, ", told)) == {"1"}
    assert "Traceback" in log.read_text()  # of the task that fails
    counts = example.run(count)
    assert re.search(r"SUCCESS\W+23\b", counts)
    assert re.search(r"FAILURE\W+1\b", counts)

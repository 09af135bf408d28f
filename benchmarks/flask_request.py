"""A request with one ``get_or_404`` on SQLite, beside Flask-SQLAlchemy 3.1.

Two processes run the same application, one with each extension, on the same versions of all
packages, and are asked in turns. They have an environment of their own, for Flask-SQLAlchemy is
not for SQLAlchemy 2.1: it is made at the first run, in the cache directory. ``in a worker`` is a
process forked from one that made the application and its tables, as by gunicorn with
``--preload``; ``in one process`` is the one that made them, as in ``flask run`` and in tests.
Requests come as a WSGI server calls an application, or by Flask's test client. ``without a
database`` is a view that has none, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .context import ROOT
from .cores import clients_core
from .report import Panel, Report, Target
from .timing import rotated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .context import Context

    Ask = Callable[[str, int], float]

PACKAGES = ("SQLAlchemy", "Flask", "Flask-SQLAlchemy", "Werkzeug")

# Flask-SQLAlchemy's own requirement allows 2.1; sessionmgr itself comes from this repository.
REQUIREMENTS = ("flask-sqlalchemy==3.1.*", "SQLAlchemy<2.1", "flask>=3", "tenacity>=9")

ASK_VERSIONS = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"

CONTENDERS = {
    "sessionmgr": ("sessionmgr.ext.flask", "/items/1"),
    "Flask-SQLAlchemy 3.1": ("flask_sqlalchemy", "/items/1"),
    "without a database": ("flask_sqlalchemy", "/nothing"),
}
"""Name -> the module of its extension, and what is asked for."""

PLACES = {"worker": "in a worker", "process": "in one process"}

WAYS = ("WSGI", "test client")

PROCESSES = 8
"""How often all of them are started anew: what CPython's caches hold depends on where a process
has its objects, and is worth up to 4 % either way."""

TARGETS = (Target("sessionmgr", "Flask-SQLAlchemy 3.1", 1.0),)


def run(context: Context) -> Report:
    """Measure in both places, and in both ways."""
    report = context.report("flask_request", __doc__)
    starts, rounds, turn = (1, 3, 20) if context.quick else (PROCESSES, 19, 100)
    try:
        python = environment()
    except subprocess.CalledProcessError as error:
        report.missing.append(f"Flask-SQLAlchemy 3.1: cannot be installed: {error.stderr}")
        return report
    report.versions |= installed(python)
    for place, title in PLACES.items():
        samples: dict[str, dict[str, list[float]]] = {
            way: {name: [] for name in CONTENDERS} for way in WAYS
        }
        for _ in range(starts):
            with clients_core(), ExitStack() as stack:
                asks = {
                    name: stack.enter_context(application(python, module, place, path))
                    for name, (module, path) in CONTENDERS.items()
                }
                for way in WAYS:
                    measure(asks, way, rounds, turn, samples[way])
        for way in WAYS:
            report.panels.append(Panel(f"{way}, {title}", "us", samples[way], TARGETS))
    return report


def measure(
    asks: dict[str, Ask], way: str, rounds: int, turn: int, samples: dict[str, list[float]]
) -> None:
    """Ask in turns, so many requests in each, and add the microseconds of one to the samples."""
    for number in range(rounds):
        for name in rotated(list(asks), number):
            samples[name].append(1e6 * asks[name](way, turn))


@contextmanager
def application(python: Path, module: str, place: str, path: str) -> Iterator[Ask]:
    """Run the application; give a function that has it answer, and tell the seconds of a request.

    :param module: of the extension.
    :param place: one of :data:`PLACES`.
    :param path: what is asked for.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [module, f"sqlite:///{folder}/items.db", place, path]
        with subprocess.Popen(
            [python, "-m", "benchmarks.flask_process", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            requests, answers = process.stdin, process.stdout

            def ask(way: str, count: int) -> float:
                print(json.dumps([way, count]), file=requests, flush=True)
                return float(answers.readline())

            yield ask
            requests.close()


def environment() -> Path:
    """Make the environment with Flask-SQLAlchemy, once, and give its Python.

    :raises CalledProcessError: when it cannot be installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sessionmgr"
    folder = cache / f"flask-sqlalchemy-3.1-{sys.implementation.cache_tag}"
    python = folder / "bin" / "python"
    complete = folder / "complete"
    if not complete.exists():
        call([sys.executable, "-m", "venv", "--clear", str(folder)])
        call(
            [
                str(python),
                *("-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *REQUIREMENTS,
            ]
        )
        complete.touch()
    return python


def installed(python: Path) -> dict[str, str]:
    """Give the versions in an environment."""
    found = call([str(python), "-c", ASK_VERSIONS, *PACKAGES])
    return dict(zip(PACKAGES, found.split(), strict=True))


def call(command: list[str]) -> str:
    """Run a command to its end, which has to be a good one, and return what it says."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

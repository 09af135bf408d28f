"""The desktop application: run by its README's commands, and built by PyInstaller and run again."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sysconfig
from contextlib import closing
from pathlib import Path

import pytest

from tests.servers import MissingServerError
from tests.test_examples import Example

BUILD_TIMEOUT = 280.0
"""Seconds: 15 alone on a machine, of which PyInstaller's own analysis takes most."""

NOT_THE_EXAMPLES = (
    *("psycopg", "psycopg2", "MySQLdb", "pymysql", "aiomysql", "asyncmy", "asyncpg"),
    *("cryptography", "numpy", "matplotlib", "PIL", "setuptools", "mypy", "pytest", "celery"),
    *("gevent", "eventlet", "rich", "click", "psutil", "pydantic", "fastapi", "IPython"),
)
"""Packages of the tests' environment, which an environment for the example would not have."""


class DesktopApp(Example):
    """A copy of the example, with files of its own wherever it looks for some."""

    def __init__(self, folder: Path) -> None:
        super().__init__("desktop_app", folder)
        for name in [name for name in self.environment if name.startswith(("DB_PATH", "XDG_"))]:
            del self.environment[name]
        self.environment |= {
            "HOME": str(folder / "home"),
            # PyInstaller does not follow an editable install
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYINSTALLER_CONFIG_DIR": str(folder / "cache"),
        }
        self.readme = (self.folder / "README.md").read_text()

    def commands_of(self, program: str) -> list[list[str]]:
        """Return the README's commands of a program, in their order."""
        lines = re.findall(rf"^    ({re.escape(program)} .*)$", self.readme, re.MULTILINE)
        return [shlex.split(line) for line in lines]

    def build(self) -> None:
        """Build it by the README's command, without what only the tests have brought."""
        [command] = self.commands_of("pyinstaller")
        excluded = [f"--exclude-module={name}" for name in NOT_THE_EXAMPLES]
        done = subprocess.run(
            [*command, *excluded, "--log-level=WARN"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def app(tmp_path: Path) -> DesktopApp:
    """Return a copy of the example."""
    return DesktopApp(tmp_path)


def test_desktop_app(app: DesktopApp) -> None:
    """The commands of the README make the template, add a client, and print what it says."""
    told = [app.run(command) for command in app.commands_of("python")]
    printed = re.search(r"It prints\n\n(.*?)\n\n\S", app.readme, re.DOTALL)
    assert printed is not None
    assert told == ["", "", re.sub(r"^    ", "", printed[1], flags=re.MULTILINE) + "\n"]
    assert app.run(["python", "main.py", "where"]) == f"{app.folder / 'dev.db'}\n"
    assert app.run(["python", "main.py", "count"]) == "2\n"


def test_desktop_app_without_its_template(app: DesktopApp) -> None:
    """Where the template was not made, the error says which is missing."""
    done = subprocess.run(
        ["python", "main.py", "list"],
        cwd=app.folder,
        env=app.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"there is no template {app.folder / 'template.db'}" in done.stderr
    assert not (app.folder / "dev.db").exists()


@pytest.mark.timeout(300)
def test_frozen_desktop_app(app: DesktopApp, tmp_path: Path) -> None:
    """The program that PyInstaller makes has its database where its user's data is.

    It is one test, for it is one build.
    """
    if importlib.util.find_spec("PyInstaller") is None:
        raise MissingServerError("PyPI package pyinstaller")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        raise MissingServerError("a Python with a shared library, which PyInstaller takes")
    app.run(["python", "make_template.py"])
    app.build()
    (app.folder / "template.db").unlink()  # the one that lies in the program is left
    del app.environment["PYTHONPATH"]
    shown, told = (app.run(command) for command in app.commands_of("dist/clientbook/clientbook"))
    path = tmp_path / "home" / ".local" / "share" / "ClientBook" / "clientbook.db"
    assert (shown, told) == ("Ada Example, 555-0100, ada@example.com\n", f"{path}\n")

    [program, *_] = app.commands_of("dist/clientbook/clientbook")[0]
    app.environment["XDG_DATA_HOME"] = str(tmp_path / "data")
    app.run([program, "add", "Grace Example"])
    assert app.run([program, "count"]) == "2\n"  # asynchronously
    path = tmp_path / "data" / "ClientBook" / "clientbook.db"
    with closing(sqlite3.connect(path)) as connection:
        names = connection.execute("SELECT name FROM client ORDER BY id").fetchall()
    assert names == [("Ada Example",), ("Grace Example",)]

    shutil.rmtree(tmp_path / "data")
    app.environment["DB_PATH"] = str(tmp_path / "told" / "my.db")
    assert app.run([program, "where"]) == f"{tmp_path / 'told' / 'my.db'}\n"
    assert app.run([program, "list"]) == "Ada Example, 555-0100, ada@example.com\n"
    assert (tmp_path / "told" / "my.db").is_file()
    assert not (tmp_path / "data").exists()
    assert not os.path.lexists(app.folder / "dev.db")

"""An application that was written for Flask-SQLAlchemy, with another line of import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Database

ROOT = Path(__file__).parents[1]
APPLICATION = Path(__file__).parent / "data" / "moved_app"
VARIABLES = ("BLOG_TEST_URI", "BLOG_TEST_STATS_URI")
"""What tells the application's tests where to run."""

TIMEOUT = 60.0


@pytest.mark.parametrize("driver", ["sqlite", "psycopg", "pymysql"])
def test_application_moves_by_its_import_line(
    make_database: Callable[..., Database], tmp_path: Path, driver: str
) -> None:
    """With one line changed, and nothing else, all tests of the application pass."""
    moved = tmp_path / "moved_app"
    shutil.copytree(APPLICATION, moved, ignore=shutil.ignore_patterns("__py*"))
    written = {path: path.read_text() for path in moved.rglob("*.py")}
    [extensions] = [path for path, text in written.items() if "flask_sqlalchemy" in text]
    text, changes = re.subn("flask_sqlalchemy", "sessionmgr.ext.flask", written[extensions])
    assert changes == 1
    extensions.write_text(text)
    urls = (
        ["sqlite://"] * 2 if driver == "sqlite" else [address(make_database(driver)) for _ in "ab"]
    )
    outcome = run_tests(moved, dict(zip(VARIABLES, urls, strict=True)))
    assert outcome.returncode == 0, outcome.stdout
    count = len(re.findall(r"^def test_", (moved / "tests/test_blog.py").read_text(), re.MULTILINE))
    assert re.search(rf"^{count} passed in ", outcome.stdout, re.MULTILINE), outcome.stdout


def address(database: Database) -> str:
    """Write the URL of a database as users do."""
    return database.url.render_as_string(hide_password=False)


def run_tests(application: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run an application's own tests, where Flask-SQLAlchemy cannot be imported."""
    (application / "flask_sqlalchemy.py").write_text('raise ImportError("is not to be used")\n')
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=application,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTEST_ADDOPTS": "",
            "NO_COLOR": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )

"""Runs Flask-SQLAlchemy's own tests on sessionmgr's extension."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sessionmgr.ext import flask

if TYPE_CHECKING:
    from collections.abc import Mapping

LIST = Path(__file__).parents[2] / "docs" / "flask-conformance.md"
"""What is to differ: the rows of its table that begin with the name of a test."""


class Differences:
    """Plugin of pytest that has the listed tests fail, and lets no other one.

    :param reasons: ``file::test``, for all of its cases, or ``file::test[case]`` -> why it differs.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = reasons

    @pytest.hookimpl(tryfirst=True)  # before -k takes tests away
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark the listed tests: one that passes all the same fails."""
        found = set()
        for item in items:
            case = item.nodeid.removeprefix("tests/")
            name = next((n for n in (case, case.partition("[")[0]) if n in self.reasons), None)
            if name is not None:
                found.add(name)
                item.add_marker(pytest.mark.xfail(reason=self.reasons[name], strict=True))
        unknown = self.reasons.keys() - found
        if unknown:
            raise pytest.UsageError(f"{LIST} lists what is no test: {sorted(unknown)}")


def stand_in() -> None:
    """Have ``import flask_sqlalchemy`` give sessionmgr's extension, and its modules."""
    sys.modules["flask_sqlalchemy"] = flask
    for info in pkgutil.iter_modules(flask.__path__):
        module = importlib.import_module(f"{flask.__name__}.{info.name}")
        sys.modules[f"flask_sqlalchemy.{info.name}"] = module


def main() -> int:
    """Run the tests; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.flask_conformance", description=__doc__)
    parser.add_argument("source", type=Path, help="the unpacked source distribution")
    parser.add_argument("options", nargs="*", help="options for pytest, after --")
    arguments = parser.parse_args()
    source = arguments.source.resolve()
    if not (source / "tests" / "test_engine.py").is_file():
        parser.error(f"there is no tests/test_engine.py in {source}")
    stand_in()
    options = ["-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
    options += ["-c", str(source / "pyproject.toml"), "--rootdir", str(source)]
    # sessionmgr is imported before pytest finds that it has a plugin
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    # its module "tests" is not ours
    options += ["--import-mode", "importlib"]
    rows = re.findall(r"^\| `(test_[^`]+)` \| (.+) \|$", LIST.read_text(), re.MULTILINE)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        command = [*options, *arguments.options, str(source / "tests")]
        status = pytest.main(command, plugins=[Differences(dict(rows))])
        os.chdir(here)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Runs Celery's own unit tests of its database backend on sessionmgr's backend."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

TESTS = "t/unit/backends/test_database.py"
"""The tests, in Celery's source distribution."""

LIST = Path(__file__).parents[2] / "docs" / "celery-conformance.md"
"""What is to differ: the rows of its tables that begin with the name of a test."""


class Differences:
    """Plugin of pytest that has the listed tests fail, and lets no other one.

    :param reasons: name of a test -> why it differs.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = reasons

    @pytest.hookimpl(tryfirst=True)  # before -k takes tests away
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark the listed tests: one that passes all the same fails."""
        named = {item.nodeid.partition("::")[2]: item for item in items}
        unknown = self.reasons.keys() - named.keys()
        if unknown:
            raise pytest.UsageError(f"{LIST} lists what is no test: {sorted(unknown)}")
        for name, reason in self.reasons.items():
            named[name].add_marker(pytest.mark.xfail(reason=reason, strict=True))


def main() -> int:
    """Run the tests on sessionmgr's classes; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.celery_conformance", description=__doc__)
    parser.add_argument("source", type=Path, help="Celery's unpacked source distribution")
    parser.add_argument("options", nargs="*", help="options for pytest, after --")
    arguments = parser.parse_args()
    source = arguments.source.resolve()
    if not (source / TESTS).is_file():
        parser.error(f"there is no {TESTS} in {source}")
    # Celery's code is that of the distribution, whatever version is installed.
    sys.path.insert(0, str(source))
    from .standins import replace

    print(replace())
    options = ["-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
    options += ["-c", str(source / "pyproject.toml"), "--rootdir", str(source)]
    rows = re.findall(r"^\| `(test_[^`]+)` \| (.+) \|$", LIST.read_text(), re.MULTILINE)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the tests leave databases in the working directory
        command = [*options, *arguments.options, str(source / TESTS)]
        status = pytest.main(command, plugins=[Differences(dict(rows))])
        os.chdir(here)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks run and write what they found. How fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from tests.servers import MissingServerError

if TYPE_CHECKING:
    from typing import Any

ROOT = Path(__file__).parents[1]

NAMES = (
    "session_in_worker",
    "unit_of_work_worker",
    pytest.param("unit_of_work_unforked", marks=pytest.mark.soak),  # ten seconds and more
    "async_session",
    "fork_with_engines",
    pytest.param("memory_of_engines", marks=pytest.mark.soak),  # ten seconds and more
    "routing",
    pytest.param("store_result", marks=pytest.mark.soak),  # ten seconds and more
    "fetch_result",
    "store_many",
    "sqlite_counter",
    "deep_pages",
    pytest.param("flask_request", marks=pytest.mark.soak),  # it installs packages
    pytest.param("end_to_end", marks=pytest.mark.soak),  # it starts three workers
)


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_writes_its_results(name: str, tmp_path: Path) -> None:
    """A quick run prints a summary and writes valid JSON and SVG, with a ratio per target."""
    summary = run_benchmark(name, "--quick", "--output", str(tmp_path))
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["name"] == name
    assert found["versions"].keys() >= {"Python", "SQLAlchemy", "celery"}
    assert found["command"] == f"python -m benchmarks {name} --quick"
    assert all_ratios(found)
    assert len(summary) == len(all_ratios(found))
    for panel in found["panels"]:
        assert all(figure > 0 for figures in panel["samples"].values() for figure in figures)
    picture = ET.parse(tmp_path / f"{name}.svg")  # noqa: S314 - the benchmark's own file
    assert picture.getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_unknown_benchmark_is_refused() -> None:
    """A name that is no benchmark's ends with the list of those there are."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_benchmark("speed_of_light")
    assert failed.value.returncode == 2
    assert "unit_of_work_worker" in failed.value.stderr


def run_benchmark(*arguments: str) -> list[str]:
    """Run benchmarks as a user does.

    :return: the lines of the summary.
    :raises MissingServerError: when the plots cannot be drawn here.
    """
    try:
        import matplotlib  # noqa: F401 - only to see whether it is there
    except ImportError:
        raise MissingServerError("matplotlib (extra test)") from None
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True)
    return done.stdout.split("== summary ==\n")[1].splitlines()


def all_ratios(found: dict[str, Any]) -> list[dict[str, Any]]:
    """List the ratios of every panel."""
    return [ratio for panel in found["panels"] for ratio in panel["ratios"]]

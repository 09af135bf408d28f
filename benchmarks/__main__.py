"""Runs benchmarks, and writes what they found: ``python -m benchmarks [NAME ...]``."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from . import (
    async_session,
    deep_pages,
    end_to_end,
    fetch_result,
    flask_request,
    fork_with_engines,
    memory_of_engines,
    routing,
    session_in_worker,
    sqlite_counter,
    store_many,
    store_result,
    unit_of_work_unforked,
    unit_of_work_worker,
)
from .context import Context
from .plot import draw

if TYPE_CHECKING:
    from collections.abc import Callable

    from .report import Report

MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has files in memory
"""Where files are, but a server's whose name says that it is on the disk."""

RESULTS = Path(__file__).parent / "results"

BENCHMARKS: dict[str, Callable[[Context], Report]] = {
    "session_in_worker": session_in_worker.run,
    "unit_of_work_worker": unit_of_work_worker.run,
    "unit_of_work_unforked": unit_of_work_unforked.run,
    "async_session": async_session.run,
    "fork_with_engines": fork_with_engines.run,
    "memory_of_engines": memory_of_engines.run,
    "routing": routing.run,
    "store_result": store_result.run,
    "fetch_result": fetch_result.run,
    "store_many": store_many.run,
    "sqlite_counter": sqlite_counter.run,
    "deep_pages": deep_pages.run,
    "flask_request": flask_request.run,
    "end_to_end": end_to_end.run,
}


def main() -> None:
    """Run the benchmarks named on the command line, or all, and sum up at the end."""
    arguments = _parser().parse_args()
    disk = Path(tempfile.gettempdir())
    if MEMORY.is_dir():
        tempfile.tempdir = str(MEMORY)
    reports = []
    with Context(quick=arguments.quick, disk=disk) as context:
        for name in arguments.names or BENCHMARKS:
            report = BENCHMARKS[name](context)
            print(report, end="\n\n", flush=True)
            _write(report, arguments.output)
            reports.append(report)
    print("== summary ==")
    for report in reports:
        print("\n".join(report.summary()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ", ".join(BENCHMARKS)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", type=_name, help=f"one of {names}; default: all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few rounds, to see that everything works"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for JSON and SVG (%(default)s)"
    )
    return parser


def _name(text: str) -> str:
    if text not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(BENCHMARKS)}")
    return text


def _write(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.as_dict(), indent=1)
    (folder / f"{report.name}.json").write_text(f"{text}\n")
    draw(report, folder / f"{report.name}.svg")


if __name__ == "__main__":
    main()

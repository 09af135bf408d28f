"""A process that has engines cached and forks on demand; ``fork_with_engines`` starts it.

Reads a JSON list of database URLs from its standard input, opens a session on each, writes a line
when done, and then for each further line forks a child that uses the first of them, and writes a
line with three times in seconds.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter

_first_statement = 0.0


def _note_time() -> None:
    global _first_statement
    _first_statement = perf_counter()


# Before sessionmgr is imported: hooks run in the order of their registration in a child, so what
# sessionmgr's own takes is part of the measurement.
os.register_at_fork(after_in_child=_note_time)

from sqlalchemy import text  # noqa: E402 - see above

from sessionmgr import SessionManager  # noqa: E402 - see above

SELECT_ONE = text("SELECT 1")


def main() -> None:
    """Serve until the input ends."""
    urls = json.loads(sys.stdin.readline())
    manager = SessionManager()
    for url in urls:
        _use(manager, url)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(_fork(manager, urls[0])), flush=True)


def _use(manager: SessionManager, url: str) -> None:
    with manager.session_factory(url) as session:
        session.scalar(SELECT_ONE)


def _fork(manager: SessionManager, url: str) -> dict[str, float]:
    """Fork a child and time its first session.

    :return: ``child``: from the child's first statement to its SELECT done; ``whole``: from the
        call of fork in the parent to the same; ``fork``: the parent's call of fork.
    """
    reader, writer = os.pipe()
    start = perf_counter()
    pid = os.fork()
    if pid == 0:
        _use(manager, url)
        done = perf_counter()
        times = {"child": done - _first_statement, "whole": done - start}
        os.write(writer, json.dumps(times).encode())
        os._exit(0)
    times = {"fork": perf_counter() - start}
    os.close(writer)
    with os.fdopen(reader) as answer:
        times |= json.load(answer)
    os.waitpid(pid, 0)
    return times


if __name__ == "__main__":
    main()

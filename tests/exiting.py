"""A program whose children use databases and end: one with a manager at its top, as many have.

As a program it forks children by ``os.fork`` that end in different ways, and ends itself::

    python -m tests.exiting CHILDREN URL...
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from sqlalchemy import select

from sessionmgr import SessionManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

MANAGER = SessionManager()

ENDINGS = ("return", "sys.exit", "exception")
"""The ways in which children end, in turn; the program itself ends by the first."""

FAILURE = "a program that fails at its end"

AT_ONCE = 10
"""Children that run at the same time."""

open_sessions: list[Session] = []


def warm_up(urls: Sequence[str]) -> None:
    """Import here, once for all children, what the databases need. Nothing connects."""
    for url in urls:
        MANAGER.get_engine(url)
    MANAGER.dispose()


def use(urls: Sequence[str]) -> None:
    """Use each database, and leave a connection in its pool and another one in a transaction."""
    for url in urls:
        session = MANAGER.session_factory(url)
        session.execute(select(7))
        open_sessions.append(session)
        with MANAGER.begin(url) as session:
            assert session.scalar(select(7)) == 7


def fork_children(count: int) -> int | None:
    """Fork children, and wait for all; return in each child its number, in the parent None."""
    running = 0
    for number in range(count):
        if running == AT_ONCE:
            os.wait()
            running -= 1
        if os.fork() == 0:
            return number
        running += 1
    for _ in range(running):
        os.wait()
    return None


def end(ending: str) -> None:
    """End the program, unless it ends after this anyway."""
    if ending == "sys.exit":
        sys.exit(0)
    if ending == "exception":
        raise RuntimeError(FAILURE)


def main(children: str, *urls: str) -> None:
    """Use the databases in every child, then in this process, and end."""
    warm_up(urls)
    number = fork_children(int(children))
    if number is None:
        MANAGER.mark_worker()
        number = 0
    use(urls)
    end(ENDINGS[number % len(ENDINGS)])


if __name__ == "__main__":
    main(*sys.argv[1:])

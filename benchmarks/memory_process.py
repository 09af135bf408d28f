"""A process whose memory grows with engines, which it measures; ``memory_of_engines`` starts it.

``python -m benchmarks.memory_process CONTENDER FOLDER 100,500 [traced]`` opens one session on each
of so many SQLite files in the folder, one after the other, and writes a JSON list: by how many
bytes its memory has grown at each of the steps. Memory is what is resident, or with ``traced`` what
Python itself has allocated (tracemalloc).
"""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import psutil
from sqlalchemy import Engine, NullPool, create_engine, event, text
from sqlalchemy.orm import Session, sessionmaker

from sessionmgr import SessionManager

from .contenders import set_pragmas

if TYPE_CHECKING:
    from collections.abc import Callable

#: It reads a page: the first one that a connection reads brings it a page cache of 87 KB.
LOOK = text("SELECT count(*) FROM sqlite_master")


def engines(**options: Any) -> Callable[[str], Session]:
    """Keep an engine for each URL, and no more."""
    kept: dict[str, Engine] = {}

    def open_session(url: str) -> Session:
        if url not in kept:
            kept[url] = create_engine(url, **options)
        return Session(kept[url])

    return open_session


def sessionmakers(**options: Any) -> Callable[[str], Session]:
    """Keep a sessionmaker with its engine for each URL."""
    factories: dict[str, sessionmaker[Session]] = {}

    def open_session(url: str) -> Session:
        if url not in factories:
            factories[url] = sessionmaker(create_engine(url, **options))
        return factories[url]()

    return open_session


CONTENDERS: dict[str, Callable[[], Callable[[str], Session]]] = {
    "sessionmgr": lambda: SessionManager().session_factory,
    "sessionmgr, max_engines=100": lambda: SessionManager(max_engines=100).session_factory,
    "SQLAlchemy NullPool": lambda: engines(poolclass=NullPool),
    "SQLAlchemy NullPool, sessionmakers": lambda: sessionmakers(poolclass=NullPool),
    "sessionmgr always": lambda: SessionManager(pooling="always").session_factory,
    "sessionmgr always, max_engines=100": lambda: (
        SessionManager(pooling="always", max_engines=100).session_factory
    ),
    "SQLAlchemy default pool": engines,
    "SQLAlchemy default pool, sessionmakers": sessionmakers,
}


def main() -> None:
    """Use the databases, and measure at each step."""
    contender, folder, steps, *traced = sys.argv[1:]
    if contender.startswith("SQLAlchemy"):
        event.listen(Engine, "connect", set_pragmas)
    open_session = CONTENDERS[contender]()
    _use(open_session, f"sqlite:///{folder}/first.db")  # imports what it takes
    if traced:
        tracemalloc.start()
    grown, done, before = [], 0, _memory()
    for step in map(int, steps.split(",")):
        for number in range(done, step):
            _use(open_session, f"sqlite:///{folder}/{number}.db")
        done = step
        grown.append(_memory() - before)
    print(json.dumps(grown))


def _use(open_session: Callable[[str], Session], url: str) -> None:
    with open_session(url) as session:
        session.scalar(LOOK)


def _memory() -> int:
    gc.collect()
    if tracemalloc.is_tracing():
        return tracemalloc.get_traced_memory()[0]
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()

"""Child processes, started in each of the ways in which workers start, and what they return."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from typing import TYPE_CHECKING, Any

import billiard

from tests.concurrency import in_child
from tests.items import connection_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL

    from sessionmgr import SessionManager

LIBRARIES: dict[str, Any] = {"multiprocessing": multiprocessing, "billiard": billiard}

STARTS = (
    "os.fork",
    "multiprocessing-fork",
    "multiprocessing-spawn",
    "multiprocessing-forkserver",
    "billiard-fork",
    "billiard-spawn",
    "billiard-forkserver",
)
"""The ways in which :func:`call_in_child` starts a process."""

FORKS = ("os.fork", "multiprocessing-fork", "billiard-fork")
"""Those of them in which the child inherits what its parent has in memory."""

CHILD_TIMEOUT = 60.0
"""Seconds for a child to answer, on a machine busy with other tests."""


def call_in_child(start: str, function: Callable[..., Any], *args: object) -> Any:
    """Call a function in a child process and return what it returns.

    :param start: one of :data:`STARTS`. The child of a plain fork leaves by ``os._exit``, the
        others as their Processes do.
    :param function: importable by name, with arguments that pickle, unless the child is forked.
    :raises AssertionError: when it raises; the text is the child's traceback.
    """
    if start == "os.fork":
        return in_child(lambda: function(*args))
    library, method = start.split("-")
    context = LIBRARIES[library].get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return _outcome(receiver)
    except BaseException:
        process.terminate()
        raise
    finally:
        receiver.close()
        process.join()


def _send(sender: Any, function: Callable[..., Any], args: tuple[object, ...]) -> None:
    try:
        outcome = True, function(*args)
    except BaseException:  # noqa: BLE001 - the parent is told
        outcome = False, traceback.format_exc()
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()


def _outcome(receiver: Any) -> Any:
    assert receiver.poll(CHILD_TIMEOUT), f"the child did not answer for {CHILD_TIMEOUT:g} s"
    try:
        done, result = pickle.loads(receiver.recv_bytes())  # noqa: S301 - sent by our child
    except EOFError:
        raise AssertionError("the child ended without an answer") from None
    assert done, f"in the child process:\n{result}"
    return result


def backend_ids(manager: SessionManager, url: URL | str, sessions: int = 3) -> list[int]:
    """Open sessions, one after the other, and return the server's id of each one's connection."""
    ids = []
    for _ in range(sessions):
        with manager.session_factory(url) as session:
            ids.append(connection_id(session))
    return ids

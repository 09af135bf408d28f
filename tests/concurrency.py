"""Forked children, and threads or tasks, that start together, and whose failures are the test's."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest

from sessionmgr.greenlets import in_greenlet
from tests.async_facade import in_new_loop, in_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.connection import Connection

T = TypeVar("T")


def in_children(functions: Iterable[Callable[[], T]], timeout: float = 100.0) -> list[T]:
    """Call each function in a forked child of its own, all at once, and return their results.

    A child leaves by ``os._exit`` as soon as its function has returned.

    :param functions: what they return is pickled.
    :param timeout: seconds until all must have returned; what has not is killed.
    :raises AssertionError: when one raises or ends otherwise, with its traceback.
    """
    started, start = os.pipe()
    children = [_fork(function, started, start) for function in functions]
    os.close(started)
    os.close(start)
    deadline = time.monotonic() + timeout
    outcomes = [_outcome(*child, deadline) for child in children]
    failures = [text for text, _ in outcomes if text]
    assert not failures, "\n".join(failures)
    return [result for _, result in outcomes]


def in_child(function: Callable[[], T]) -> T:
    """Call a function in a forked child and return its result; see :func:`in_children`."""
    [result] = in_children([function])
    return result


def here(function: Callable[[], T]) -> T:
    """Call a function in this process, as :func:`in_child` does in a child."""
    return function()


in_both_phases = pytest.mark.parametrize("call", [here, in_child], ids=["unforked", "forked"])
"""Gives a test ``call(function)``, which calls it in this process or in a forked child."""


def in_threads(functions: Iterable[Callable[[], T]], timeout: float = 60.0) -> list[T]:
    """Call each function in a thread of its own, all at once, and return their results.

    In a test that is run for AsyncSessionManager it is a task of the test's loop.

    :param timeout: seconds until all must have returned.
    :raises BaseException: the first that one of them raised.
    """
    calls = list(functions)
    if in_greenlet():
        return in_tasks(calls, timeout)
    barrier = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(position: int) -> None:
        barrier.wait()
        try:
            results[position] = calls[position]()
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), f"threads hang after {timeout:g} s"
    return results


def _fork(function: Callable[[], Any], started: int, start: int) -> tuple[int, Connection]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        os.close(start)
        _run_child(function, started, sender)
    sender.close()
    return pid, receiver


def _run_child(function: Callable[[], Any], started: int, sender: Connection) -> NoReturn:
    if in_greenlet():  # the loop is the parent's
        function = functools.partial(in_new_loop, function)
    try:
        os.read(started, 1)  # ends when the parent, who has forked them all, closes the other end
        try:
            outcome = pickle.dumps(("", function()))
        except BaseException:  # noqa: BLE001 - told to the parent
            outcome = pickle.dumps((f"in child {os.getpid()}: {traceback.format_exc()}", None))
        sender.send_bytes(outcome)
    finally:
        os._exit(0)


def _outcome(pid: int, receiver: Connection, deadline: float) -> tuple[str, Any]:
    try:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            os.kill(pid, signal.SIGKILL)
        outcome = pickle.loads(receiver.recv_bytes())  # noqa: S301 - our own child's
    except EOFError:
        outcome = (f"child {pid} was killed or hung", None)
    finally:
        receiver.close()
        os.waitpid(pid, 0)
    return outcome

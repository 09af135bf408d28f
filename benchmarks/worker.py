"""Runs a part of a benchmark in a worker process, forked as Celery's prefork pool does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from billiard.context import ForkContext

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("in_worker",)

Result = TypeVar("Result")


def in_worker(work: Callable[[], Result]) -> Result:
    """Call ``work`` in a forked child and return what it returned.

    :raises RuntimeError: when the child ends without a result; its traceback is on stderr.
    """
    fork = ForkContext()
    receiver, sender = fork.Pipe(duplex=False)

    def child() -> None:
        receiver.close()
        sender.send(work())

    process = fork.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the worker ended without a result") from None
    finally:
        process.join()
        receiver.close()

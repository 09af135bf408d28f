"""The demo's workers: a billiard pool that is fed, listened to and sent home."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from .work import Answer, start_worker, write_and_read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from sessionmgr.manager import SessionManager
    from sessionmgr.results import ResultStore

__all__ = ("INTERRUPTS", "START_METHODS", "Failure", "UnusablePoolError", "WorkerPool")

START_METHODS = ("fork", "spawn", "forkserver")

#: The signals that end the demo early.
INTERRUPTS = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

#: Tasks on their way, for each worker; more would only wait in memory.
BACKLOG = 16

#: Seconds without any answer after which, if a worker was killed, no more are expected: it may
#: have held the lock of the queue that all workers share.
PATIENCE = 10.0

#: Seconds in which workers are to leave.
LEAVE = 5.0


class UnusablePoolError(Exception):
    """There can be no pool; the text says why, and what to do."""


@dataclass(frozen=True)
class Failure:
    """A task that ended in an error, or with the death of its worker.

    :param database: bind key of the task's database.
    :param reason: the error in one line. Secrets may be in it.
    """

    database: str
    reason: str


Task = tuple[str, str, int]


class WorkerPool:
    """A billiard pool of workers that share one manager, and the stores made from it.

    Its context ends the workers: politely after what was sent to them, by signals when one of
    them was killed, or they have not left in time.
    """

    def __init__(
        self,
        processes: int,
        start_method: str,
        manager: SessionManager,
        stores: Mapping[str, ResultStore],
    ) -> None:
        """Start the workers.

        :param processes: how many.
        :param start_method: one of :data:`START_METHODS`.
        :param manager: the manager that they share.
        :param stores: bind key -> the store for task results.
        :raises UnusablePoolError: when billiard is missing, or the system refuses.
        """
        self._answers: SimpleQueue[Answer | Failure] = SimpleQueue()
        self._backlog = BACKLOG * processes
        self._workers: list[Any] = []
        self._killed = 0
        # An interrupted Pool() would leave workers of which nobody knows. They inherit the mask:
        # Ctrl-C, which reaches them too, is left to this process.
        with _interrupts_held():
            self._pool = self._start(processes, start_method, (manager, stores))

    def _start(self, processes: int, start_method: str, shared: tuple[Any, ...]) -> Any:
        pool_class, context, on_process_exit = _billiard(start_method)
        try:
            return pool_class(
                processes,
                initializer=start_worker,
                initargs=shared,
                on_process_up=self._workers.append,
                on_process_down=self._on_process_down,
                on_process_exit=on_process_exit,
                lost_worker_timeout=1.0,
                context=context,
            )
        except OSError as error:  # no more processes, or a path too long for forkserver's socket
            raise UnusablePoolError(
                f"{processes} workers cannot be started by {start_method}: {error}"
            ) from None

    def _on_process_down(self, worker: Any) -> None:
        if worker.exitcode:
            self._killed += 1

    def answers(self, tasks: Iterable[Task]) -> Iterator[Answer | Failure]:
        """Have tasks done, and give the answers as they come; one for each.

        When a worker was killed and the others are heard of no more, they are failures.
        """
        tasks = iter(tasks)
        waiting: Counter[str] = Counter()
        for task in islice(tasks, self._backlog):
            waiting[self._send(*task)] += 1
        while waiting.total():
            answer = self._next_answer()
            if answer is None:
                break
            waiting[answer.database] -= 1
            yield answer
            for task in islice(tasks, 1):
                waiting[self._send(*task)] += 1
        waiting.update(database for database, _, _ in tasks)
        for database in waiting.elements():
            yield Failure(database, "not done: the queue of the workers broke when one was killed")

    def _send(self, database: str, run: str, number: int) -> str:
        def fail(info: Any) -> None:
            self._answers.put(Failure(database, _describe(info)))

        self._pool.apply_async(
            write_and_read,
            (database, run, number),
            callback=self._answers.put,
            error_callback=fail,
        )
        return database

    def _next_answer(self) -> Answer | Failure | None:
        began = monotonic()
        while not self._killed or monotonic() - began < PATIENCE:
            try:
                return self._answers.get(timeout=0.5)
            except Empty:
                continue
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _interrupts_held():
            self._pool.close()  # ends the thread that would replace workers
            # Billiard's handler of SIGTERM raises wherever a worker is, in the midst of a commit
            # too, so it is for those that do not leave by themselves.
            if not self._killed and self._left():
                self._pool.join()
            else:
                self._end_workers()

    def _left(self) -> bool:
        """Wait until all workers have left, and tell whether they have."""
        deadline = monotonic() + LEAVE
        while any(map(_is_alive, self._workers)):
            if monotonic() > deadline:
                return False
            sleep(0.02)
        return True

    def _end_workers(self) -> None:
        """End the workers by signals.

        Pool.terminate() would wait for the lock of the queue, which a killed worker may hold,
        and so would the pool's finalizer when the interpreter ends.
        """
        self._pool._terminate.cancel()
        for worker in filter(_is_alive, self._workers):
            worker.terminate()
        if not self._left():
            for worker in filter(_is_alive, self._workers):
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            self._left()


def _is_alive(worker: Any) -> bool:
    """Tell whether a worker is running. Worker.join() would not bear being joined elsewhere."""
    try:
        return bool(worker.is_alive())
    except (OSError, TypeError):  # a thread of the pool has joined it at this moment
        return False


def _describe(info: Any) -> str:
    """Tell an error in one line, from the ExceptionInfo in which billiard gives it."""
    error = getattr(info.exception, "exc", info.exception)
    text = str(error).partition("\n")[0].partition(" Job: ")[0]  # a number of billiard's own
    return f"{info.type.__name__}: {text}"


def _billiard(start_method: str) -> tuple[Any, Any, Any]:
    """Import billiard.

    :return: its Pool, its context for the start method, and what Pool's ``on_process_exit`` is
        to be.
    :raises UnusablePoolError: when it is missing.
    """
    try:
        import billiard
        from billiard.pool import Pool
    except ModuleNotFoundError:
        raise UnusablePoolError(
            "the demo needs billiard, which is not installed: pip install 'sessionmgr[billiard]'"
        ) from None
    from sessionmgr.ext.billiard import on_process_exit

    # It would write of every killed worker into the progress bar. The report tells of them.
    billiard.get_logger().addHandler(logging.NullHandler())
    return Pool, billiard.get_context(start_method), on_process_exit


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back interrupts, which arrive at the end of the block instead."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

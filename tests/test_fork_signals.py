"""Signals that come while a process forks: none is lost, told twice, or cuts the fork in two."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from sessionmgr import SessionManager, forking
from tests.concurrency import in_child, in_threads
from tests.fork_helpers import CHILD_TIMEOUT, held_elsewhere, run_program
from tests.helpers import wait_until
from tests.test_gate import is_closing, thread_that

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOLD = 7
"""Exit status of a child in which a handler raised what it is to raise."""


class Told(BaseException):
    """What the handler raises, as that of Celery's soft time limit does."""


def tell(number: int, frame: object) -> None:
    """Be a signal's handler."""
    raise Told(number)


def send() -> None:
    """Send this process the signal, which the kernel gives to any thread that does not block it."""
    os.kill(os.getpid(), signal.SIGTERM)


class Witness:
    """Is told of forks as a manager is, and calls a function then."""

    def __init__(
        self, before: Callable[[], object] = int, in_child: Callable[[], object] = int
    ) -> None:
        self.before, self.in_child = before, in_child
        forking.inherit(self)  # type: ignore[arg-type]  # it is told of nothing else

    def _before_fork(self, *_: object) -> None:
        self.before()

    def _after_fork(self) -> None:
        self.in_child()


@contextmanager
def told_before(folder: Path, function: Callable[[], object]) -> Iterator[None]:
    """Call a function in the hook before a fork; managers are told of it if a file is open."""
    witness = Witness(before=function)
    manager = SessionManager(pooling="always")
    with manager, manager.get_engine(f"sqlite:///{folder}/a.db").connect():
        yield
    del witness


def sent_in_hook(folder: Path) -> Any:
    """Have the signal sent inside the hook, by the thread that forks."""
    return told_before(folder, send)


@contextmanager
def sent_in_wait(folder: Path) -> Iterator[None]:
    """Have the signal sent by another thread while the fork waits for a third."""
    with held_elsewhere(forking.gate.section) as leave:

        def send_and_leave() -> None:
            wait_until(lambda: is_closing(forking.gate))
            send()
            leave.set()

        with thread_that(send_and_leave):
            yield


def fork_until_told(where: str) -> tuple[bool, bool]:
    """Fork, and wait there in the ``parent`` or the ``child`` for what the handler raises.

    :return: whether this is the parent, and whether the handler raised.
    """
    me = os.getpid()
    try:
        os.fork()
        wait_until(lambda: (os.getpid() == me) != (where == "parent"))
    except Told:
        return os.getpid() == me, True
    return os.getpid() == me, False


def end_of_child() -> int:
    """Wait for the child to end and return its exit status."""
    return os.waitstatus_to_exitcode(os.wait()[1])


def is_told() -> bool:
    """Return whether the handler is there and the signal not blocked."""
    with pytest.raises(Told):
        send()
    return True


def fork_while_signal_comes(folder: Path, when: Callable[[Path], Any]) -> Any:
    """Fork while the signal comes; return who was told of it, and whether all is in order."""
    signal.signal(signal.SIGTERM, tell)
    with when(folder):
        parent, told = fork_until_told("parent")
        if not parent:
            os._exit(TOLD if told else 0)
    status = end_of_child()
    # the gate is open, or this would warn
    [again] = in_threads([lambda: in_child(lambda: forking.process.forked)])
    return told, status, is_told(), again


@pytest.mark.parametrize("when", [sent_in_hook, sent_in_wait])
def test_signal_during_fork_is_raised_after_it(when: Any, tmp_path: Path) -> None:
    """What its handler raises is raised in the parent alone, where ``os.fork`` returns."""
    assert run_program(fork_while_signal_comes, tmp_path, when) == (True, 0, True, True)


class Interrupting:
    """A handler that, when it is put back in the parent, has the main thread told of a signal."""

    def __init__(self, thread: int) -> None:
        self.pid, self.thread = os.getpid(), thread
        self.sent = True
        signal.signal(signal.SIGXCPU, self)
        self.sent = False

    def __call__(self, *_: object) -> None:
        """Be a signal's handler."""

    def __int__(self) -> int:  # signal.signal asks for it
        if not self.sent and os.getpid() == self.pid:
            self.sent = True
            signal.pthread_kill(self.thread, signal.SIGTERM)
            wait_until(lambda: False)
        raise TypeError


def fork_and_be_told_in_hook() -> Any:
    """Fork, and be told of a signal inside the hook that puts the handlers back."""
    signal.signal(signal.SIGTERM, tell)
    waiting = threading.Event()
    with thread_that(waiting.wait) as returned:
        [other] = (each for each in threading.enumerate() if each is not threading.main_thread())
        assert other.ident
        handler = Interrupting(other.ident)
        parent, told = fork_until_told("parent")
        if not parent:
            os._exit(TOLD if told else 0)
        waiting.set()
        assert returned.wait(CHILD_TIMEOUT)
    return told, end_of_child(), is_told(), signal.getsignal(signal.SIGXCPU) is handler


def test_signal_between_two_handlers_that_are_put_back() -> None:
    """A handler that raises when others are not there again yet raises after the fork as well."""
    assert run_program(fork_and_be_told_in_hook) == (True, 0, True, True)


def fork_and_signal_child() -> int:
    """Fork a child to which the signal comes inside its hook, and return its exit status."""
    called: list[int] = []

    def come() -> None:
        called.append(1)
        send()

    witnesses = [Witness(in_child=come) for _ in range(2)]
    parent, told = fork_until_told("child")
    if not parent:
        os._exit(TOLD if told and len(called) == len(witnesses) else 1)
    assert not told
    return end_of_child()


def signal_children() -> list[int]:
    """Signal a child of the main thread's, and one of another thread's."""
    signal.signal(signal.SIGTERM, tell)
    return [fork_and_signal_child(), *in_threads([fork_and_signal_child])]


def test_signal_to_child_is_raised_after_its_hook() -> None:
    """A child that is signalled at once does what is done in each child, and is told then."""
    assert run_program(signal_children) == [TOLD, TOLD]


def settings() -> list[Any]:
    """Return what a process has set up for signals: handlers, and what is blocked."""
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    return [handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ())]


def stay_in_child(before: list[Any]) -> bool:
    """Return whether a child has the settings from before."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if settings() == before else 1)
    return os.waitpid(pid, 0)[1] == 0


def fork_beside_main(folder: Path, before: list[Any]) -> list[bool]:
    """Fork in another thread, in whose hook the main thread is about to fork, too."""
    stay: list[bool] = []
    inside = threading.Event()

    def wait_for_main() -> None:
        inside.set()
        wait_until(lambda: signal.getsignal(signal.SIGTERM) is not tell)

    with (
        told_before(folder, wait_for_main),
        thread_that(lambda: stay.append(stay_in_child(before))),
    ):
        assert inside.wait(CHILD_TIMEOUT)
        stay.append(stay_in_child(before))
    return stay


def compare_settings(folder: Path) -> list[bool]:
    """Compare the settings after forks, in parents and children, with those before."""
    signal.signal(signal.SIGTERM, tell)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2,))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.fileno())
        before = settings()
        outcomes = [stay_in_child(before), *in_threads([lambda: stay_in_child(before)])]
        outcomes += [*fork_beside_main(folder, before), settings() == before]
        return [*outcomes, signal.set_wakeup_fd(-1) == ours.fileno()]


def test_what_is_set_up_for_signals_stays(tmp_path: Path) -> None:
    """Parent and child have the handlers and blocked signals, and the parent its wakeup."""
    assert run_program(compare_settings, tmp_path) == [True] * 6


def fork_in_event_loop(folder: Path, when: Callable[[Path], Any]) -> int:
    """Fork in an event loop that counts how often the signal comes, and one that comes later."""
    calls: list[int] = []

    async def work() -> None:
        later = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, calls.append, 1)
        loop.add_signal_handler(signal.SIGUSR1, later.set)
        with when(folder):
            assert in_child(lambda: True)
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(later.wait(), CHILD_TIMEOUT)

    asyncio.run(work())
    return len(calls)


@pytest.mark.parametrize("when", [sent_in_hook, sent_in_wait])
def test_event_loop_is_told_once(when: Any, tmp_path: Path) -> None:
    """A loop that listens to the signal is not told of it twice."""
    assert run_program(fork_in_event_loop, tmp_path, when) == 1

"""Programs that fork, and their children: started in each way, leaving in each way.

A forked child that leaves by ``sys.exit`` or by an exception takes its whole stack down with it,
which must not be pytest's. So a test gives its scenario, a function importable by name, to
:func:`run_program` or :func:`program`, which call it at the bottom of an interpreter of its own,
and the scenario forks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import billiard
from typing_extensions import Self

from tests.helpers import wait_until
from tests.servers import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

T = TypeVar("T")

WAYS = ("os.fork", "multiprocessing", "billiard", "nested")
"""The ways in which :func:`fork` forks; ``nested`` is a worker that forks again."""

LEAVES = ("os._exit", "sys.exit", "exception")
"""The ways in which a child of :func:`fork` leaves."""

CHILD_TIMEOUT = 30.0
"""Seconds for a child to do its work and end, on a machine busy with other tests."""

PROGRAM_TIMEOUT = 100.0
"""Seconds for a program to end, well before pytest-timeout would end the test."""

FAILED = 70
"""Exit status of a child whose function raised."""

# What a child that leaves by an exception prints, and nothing else: the exception's traceback.
_LAST_WORDS = re.compile(
    r"(Process \S+:\n)?Traceback \(most recent call last\):\n( .*\n)+"
    r"\S*DeliberateError: on purpose\n"
)

# One line of Python for the program; -W error does not reach it by other ways than this.
_MAIN = "from tests.fork_helpers import main; main()"


class DeliberateError(Exception):
    """Ends a child that is to leave by an exception."""


@dataclass(frozen=True)
class Ended:
    """What is known of a child that has ended.

    :param result: what its function returned.
    :param status: its exit status.
    :param noise: what it wrote to standard error, but for the traceback of the exception by which
        it was to leave.
    """

    result: Any
    status: int
    noise: str


class Child:
    """A child of :func:`fork` that may still run."""

    def __init__(
        self, pid: int, join: Callable[[float], int | None], receiver: Connection, stderr: Path
    ) -> None:
        self.pid = pid
        self._join = join
        self._receiver = receiver
        self._stderr = stderr

    def end(self) -> Ended:
        """Wait for the child to end.

        :raises AssertionError: when its function raises, with its traceback, or when it hangs,
            with the stacks of its threads.
        """
        status = self._join(CHILD_TIMEOUT)
        hangs = status is None
        if status is None:
            os.kill(self.pid, signal.SIGABRT)  # faulthandler writes the stacks
            status = self._join(CHILD_TIMEOUT)
        error, result = "it ended without a result", None
        with contextlib.suppress(EOFError), self._receiver:
            if self._receiver.poll(0):
                error, result = self._receiver.recv()
        noise = self._stderr.read_text()
        self._stderr.unlink()
        assert not hangs, f"child {self.pid} did not end in {CHILD_TIMEOUT} s:\n{noise}"
        assert not error, f"child {self.pid}, exit status {status}: {error}\n{noise}"
        return Ended(result, status or 0, _LAST_WORDS.sub("", noise, count=1))


def fork(
    way: str, function: Callable[[], Any], leave: str = "os._exit", *, collect: bool = True
) -> Child:
    """Fork a child that calls a function.

    :param way: one of :data:`WAYS`. In a nested child the function is called, then again in a
        child of the child's, and then once more in itself; its result is a list of the three.
    :param function: what it returns is pickled.
    :param leave: one of :data:`LEAVES`. A plain fork's child leaves through the caller's frames.
    :param collect: whether the child collects garbage, once before the call and twice after.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    descriptor, stderr = tempfile.mkstemp(prefix="sessionmgr-child-")
    if way == "nested":
        inner, way = function, "os.fork"

        def function() -> list[Any]:
            return [inner(), _end_quietly(fork("os.fork", inner, leave), leave), inner()]

    def work() -> None:
        receiver.close()
        _live(function, sender, descriptor, gc.collect if collect else int)
        _leave(leave)

    try:
        if way == "os.fork":
            pid, join = _fork_plainly(work)
        else:
            library: Any = {"multiprocessing": multiprocessing, "billiard": billiard}[way]
            process = library.get_context("fork").Process(target=work)
            process.start()
            pid, join = process.pid, lambda timeout: _join_process(process, timeout)
    finally:
        sender.close()
        os.close(descriptor)
    return Child(pid, join, receiver, Path(stderr))


def _end_quietly(child: Child, leave: str) -> Any:
    ended = child.end()
    assert ended.noise == "", ended.noise
    assert ended.status == status_of(leave)
    return ended.result


def status_of(leave: str) -> int:
    """Return the exit status of a child that leaves in a way."""
    return 1 if leave == "exception" else 0


def _fork_plainly(work: Callable[[], None]) -> tuple[int, Callable[[float], int | None]]:
    pid = os.fork()
    if pid == 0:
        work()

    def join(timeout: float) -> int | None:
        with contextlib.suppress(AssertionError):
            _, status = wait_until(lambda: _reap(pid), timeout)
            return os.waitstatus_to_exitcode(status)
        return None

    return pid, join


def _reap(pid: int) -> tuple[int, int] | None:
    reaped, status = os.waitpid(pid, os.WNOHANG)
    return (reaped, status) if reaped else None


def _join_process(process: Any, timeout: float) -> int | None:
    process.join(timeout)
    return process.exitcode  # type: ignore[no-any-return]


def _live(
    function: Callable[[], Any], sender: Connection, stderr: int, collect: Callable[[], int]
) -> None:
    os.dup2(stderr, 2)
    faulthandler.enable(2)  # SIGABRT makes it write the stacks of all threads
    pid = os.getpid()
    try:
        collect()
        result = function()
        collect()
        collect()
        sender.send(("", result))
    except BaseException:
        if os.getpid() != pid:  # a child of the child's leaves
            raise
        sender.send((traceback.format_exc(), None))
        os._exit(FAILED)
    sender.close()


def _leave(leave: str) -> NoReturn:
    if leave == "os._exit":
        os._exit(0)
    if leave == "sys.exit":
        sys.exit(0)
    raise DeliberateError("on purpose")


class Program:
    """A scenario that runs in an interpreter of its own, in which every warning is an error.

    :param process: the interpreter.
    :param channel: to what the scenario got as its channel.
    """

    def __init__(self, scenario: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> None:
        self.channel, theirs = multiprocessing.Pipe()
        self._stderr = folder / "stderr"
        with theirs, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-X", "faulthandler", "-W", "error"),
                    # Python 3.12: of every fork under threads, which is what is tested
                    *("-W", "ignore:This process:DeprecationWarning", "-c", _MAIN),
                    str(theirs.fileno()),
                ],
                cwd=Path(__file__).parents[1],
                env=os.environ | {"TMPDIR": str(folder)},  # what a killed program leaves goes too
                pass_fds=[theirs.fileno()],
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,  # for _kill()
            )
        self.channel.send_bytes(pickle.dumps((scenario, args)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self.process, self.channel:
            self._kill(signal.SIGKILL)

    def receive(self, timeout: float = PROGRAM_TIMEOUT) -> Any:
        """Return what the scenario sends next.

        :raises AssertionError: when nothing comes, with what the program wrote.
        """
        try:
            if self.channel.poll(timeout):
                return self.channel.recv()
            self._kill(signal.SIGABRT)  # faulthandler writes the stacks
        except (EOFError, ConnectionError):
            pass
        status = self.process.wait(PROGRAM_TIMEOUT)
        raise AssertionError(f"the program ended, status {status}:\n{self._stderr.read_text()}")

    def end(self, timeout: float = PROGRAM_TIMEOUT) -> Any:
        """Wait for the scenario to send its result and return, and return the result.

        :param timeout: seconds until it must have been sent.
        :raises AssertionError: when it does not, or the program wrote anything.
        """
        result = self.receive(timeout)
        assert self.process.wait(PROGRAM_TIMEOUT) == 0
        written = self._stderr.read_text()
        assert not written, f"the program wrote:\n{written}"
        return result

    def _kill(self, number: signal.Signals) -> None:
        """Send a signal to the program and all that it forked: they are one process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@contextlib.contextmanager
def program(scenario: Callable[..., Any], *args: Any) -> Iterator[Program]:
    """Run a scenario in an interpreter of its own while the block runs, and no longer.

    :param scenario: called with the :class:`~multiprocessing.connection.Connection` to
        :attr:`Program.channel` and with ``args``, which are pickled.
    """
    with tempfile.TemporaryDirectory() as folder, Program(scenario, args, Path(folder)) as running:
        yield running


def run_program(scenario: Callable[..., Any], *args: Any, timeout: float = PROGRAM_TIMEOUT) -> Any:
    """Run a scenario in an interpreter of its own to its end, and return what it returns.

    :param scenario: called with ``args``, which are pickled, as is its result.
    :param timeout: seconds until it must have returned.
    :raises AssertionError: when it raises, hangs, or writes anything.
    """
    with program(_report, scenario, args) as running:
        return running.end(timeout)


def run_program_for_each(
    cases: Iterable[T], scenario: Callable[..., Any], *args: Any
) -> dict[T, Any]:
    """Run a scenario for each case, in one interpreter, which costs less than one for each.

    :param cases: what ``scenario`` is called with after ``args``.
    :return: case -> what the scenario returned.
    """
    return run_program(_call_for_each, list(cases), scenario, args)  # type: ignore[no-any-return]


def _call_for_each(
    cases: list[T], scenario: Callable[..., Any], args: tuple[Any, ...]
) -> dict[T, Any]:
    return {case: scenario(*args, case) for case in cases}


def _report(channel: Connection, scenario: Callable[..., Any], args: tuple[Any, ...]) -> None:
    channel.send(scenario(*args))


def main() -> None:
    """Run the scenario that the program is for, which comes through the channel."""
    with Connection(int(sys.argv[1])) as channel:
        scenario, args = pickle.loads(channel.recv_bytes())  # noqa: S301 - from the test
        # Modules are no garbage: children collect what the scenario makes, and do not spend most
        # of their time on copying the pages that its imports are in.
        gc.freeze()
        scenario(channel, *args)


def portable(database: Database) -> Database:
    """Return a handle of a database that pickles: without the server's process, if it is ours."""
    server = database.server
    return Database(type(server)(server.admin, server.log), database.name, database.driver)


def seconds_since(start: float) -> float:
    """Return the seconds since a :func:`time.monotonic`, which all processes share."""
    return time.monotonic() - start


@contextlib.contextmanager
def held_elsewhere(
    context: Callable[[], AbstractContextManager[Any]],
) -> Iterator[threading.Event]:
    """Have another thread in a context during the block, or until the event given is set.

    :param context: called in that thread.
    """
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with context():
            inside.set()
            assert leave.wait(PROGRAM_TIMEOUT)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(PROGRAM_TIMEOUT)
        yield leave
    finally:
        leave.set()
        thread.join()


def age() -> float:
    """Return the seconds for which this process has existed, to a hundredth.

    Those in which it could have run and had no CPU, which others used, do not count.
    """
    # field 22 of /proc/self/stat (proc(5)), counted after the name, which may contain blanks
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    existed = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return existed - waited_for_cpu()


def waited_for_cpu() -> float:
    """Return the seconds for which our main thread could have run and had no CPU."""
    # sched-stats.rst of the kernel's documentation; there is none in some sandboxes
    with contextlib.suppress(FileNotFoundError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0

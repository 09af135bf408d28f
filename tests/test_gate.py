"""The gate that keeps forks and critical sections apart."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from sessionmgr.gate import ForkGate
from tests.concurrency import in_child, in_threads
from tests.fork_helpers import held_elsewhere
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 30.0
"""Seconds that are never waited for when things are right."""


@pytest.fixture
def gate() -> ForkGate:
    """Return a gate, open."""
    return ForkGate()


@contextmanager
def sections(gate: ForkGate, depth: int) -> Iterator[None]:
    """Hold sections within each other."""
    with ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(gate.section())
        yield


@contextmanager
def thread_that(function: object, *args: object) -> Iterator[threading.Event]:
    """Run a function in another thread; the event given is set once it has returned."""
    returned = threading.Event()

    def run() -> None:
        function(*args)  # type: ignore[operator]
        returned.set()

    thread = threading.Thread(target=run)
    thread.start()
    yield returned
    thread.join(LONG)
    assert returned.is_set()


def is_closing(gate: ForkGate) -> bool:
    """Return whether another thread has begun to close the gate, and has not opened it."""
    free = gate._registry.acquire(blocking=False)
    if free:
        gate._registry.release()
    return not free


def pass_through(gate: ForkGate) -> None:
    """Hold a section for a moment."""
    with gate.section():
        pass


def test_gate_without_sections_closes_at_once(gate: ForkGate) -> None:
    """A fork waits for nothing when no thread is in a section."""
    assert gate.close(0)
    gate.open()


def test_sections_of_many_threads_overlap(gate: ForkGate) -> None:
    """Sections do not exclude each other: each thread waits inside for all the others."""
    meet = threading.Barrier(8, timeout=LONG)

    def meet_inside() -> int:
        with gate.section():
            return meet.wait()

    assert sorted(in_threads([meet_inside] * 8)) == list(range(8))


def test_fork_waits_for_section(gate: ForkGate) -> None:
    """The gate closes when the last thread has left its section, however deep it was in it."""
    with held_elsewhere(partial(sections, gate, depth=3)) as leave:
        assert not gate.close(0.01)
        gate.open()
        with thread_that(leave.wait, LONG):
            threading.Timer(0.05, leave.set).start()
            assert gate.close(LONG)
            assert leave.is_set()
            gate.open()


def test_gate_is_closed_also_when_the_wait_was_in_vain(gate: ForkGate) -> None:
    """After the timeout the fork goes on, and sections that begin wait for it all the same."""
    with held_elsewhere(gate.section):
        assert not gate.close(0.01)
        with thread_that(pass_through, gate) as passed:
            assert not passed.wait(0.1)
            gate.open()
            assert passed.wait(LONG)


def test_section_waits_until_fork_is_done(gate: ForkGate) -> None:
    """A section that would begin during a fork begins after it."""
    assert gate.close(0)
    with thread_that(pass_through, gate) as passed:
        assert not passed.wait(0.1)
        gate.open()


def test_nested_section_does_not_wait_for_the_fork_that_waits_for_it(gate: ForkGate) -> None:
    """A thread inside a section may enter another while a fork waits for its first to end."""
    inside, closing = threading.Event(), threading.Event()

    def nest() -> None:
        with gate.section():
            inside.set()
            assert closing.wait(LONG)
            wait_until(lambda: is_closing(gate))
            pass_through(gate)

    with thread_that(nest):
        assert inside.wait(LONG)
        closing.set()
        assert gate.close(LONG)
        gate.open()


def test_forking_thread_may_enter_sections(gate: ForkGate) -> None:
    """Hooks of the thread that forks may connect: neither waits for the other."""
    with gate.section():
        assert gate.close(0)
        pass_through(gate)
        gate.open()
    assert gate.close(0)
    pass_through(gate)
    gate.open()


def test_two_forking_threads_take_turns(gate: ForkGate) -> None:
    """The second thread to fork waits for the first."""
    assert gate.close(0)
    turns: list[str] = []

    def fork_too() -> None:
        assert gate.close(LONG)
        turns.append("second")
        gate.open()

    with thread_that(fork_too) as forked:
        assert not forked.wait(0.1)
        turns.append("first")
        gate.open()
    assert turns == ["first", "second"]


def test_fork_that_waited_for_another_in_vain_leaves_the_gate_to_it(gate: ForkGate) -> None:
    """A fork that goes on beside another one does not open the gate before that is done."""
    assert gate.close(0)

    def fork_beside() -> bool:
        closed = gate.close(0.01)
        gate.open()
        return closed

    assert in_threads([fork_beside]) == [False]
    with thread_that(pass_through, gate) as passed:
        assert not passed.wait(0.1)
        gate.open()


def test_section_ends_when_its_block_raises(gate: ForkGate) -> None:
    """An error in a section does not hold forks back."""
    with pytest.raises(LookupError), gate.section():
        raise LookupError
    assert in_threads([lambda: gate.close(0)]) == [True]


def test_renewed_gate_knows_no_other_thread(gate: ForkGate) -> None:
    """In a child, sections of the parent's other threads are forgotten."""

    def renew() -> list[bool]:
        gate.renew()
        alone = gate.close(0)
        gate.open()
        pass_through(gate)
        return [alone, *in_threads([lambda: gate.close(0)])]

    with held_elsewhere(gate.section):
        assert not gate.close(0.01)  # and it is closed at the fork
        assert in_child(renew) == [True, True]
        gate.open()


def test_section_of_a_thread_that_has_ended_holds_up_no_fork(gate: ForkGate) -> None:
    """It may be left open for good, by a greenlet that nobody will ever resume."""
    section = None

    def enter() -> None:
        nonlocal section
        section = gate.section()
        section.__enter__()

    with thread_that(enter):
        pass
    assert section is not None
    assert gate.close(0.0)
    gate.open()

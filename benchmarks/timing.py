"""Times contenders side by side, so that what slows the machine down slows all of them."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from .cores import clients_core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ("Plan", "alternate", "rotated")

WARM_UP = 5
"""Calls before anything is timed: they connect, and fill the caches."""


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    :param rounds: in each round every contender has one turn.
    :param turn: seconds that a turn takes, about.
    """

    rounds: int
    turn: float


def alternate(contenders: Mapping[str, Callable[[], object]], plan: Plan) -> dict[str, list[float]]:
    """Time contenders in turns.

    The order changes from round to round. Garbage is collected before each turn and not during
    it, for whose turn it comes up in is a matter of chance.

    :param contenders: name -> what to time.
    :return: name -> seconds per call, one figure for each round.
    """
    with clients_core():
        return _alternate(contenders, plan)


def _alternate(
    contenders: Mapping[str, Callable[[], object]], plan: Plan
) -> dict[str, list[float]]:
    calls = {name: _calls_per_turn(work, plan.turn) for name, work in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with _no_garbage_collection():
        for number in range(plan.rounds):
            for name in rotated(list(contenders), number):
                times[name].append(_time_turn(contenders[name], calls[name]))
    return times


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Give the order of a round: each name is first in its turn, every second round backwards."""
    start = number // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if number % 2 else order


def _calls_per_turn(work: Callable[[], object], seconds: float) -> int:
    for _ in range(WARM_UP):
        work()
    calls, elapsed = 1, 0.0
    while elapsed < seconds / 2:
        calls *= 2
        elapsed = _time_turn(work, calls) * calls
    return max(1, round(calls * seconds / elapsed))


def _time_turn(work: Callable[[], object], calls: int) -> float:
    gc.collect()
    start = perf_counter()
    for _ in range(calls):
        work()
    return (perf_counter() - start) / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is there now need not be looked through before each turn
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()

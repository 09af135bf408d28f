"""Units of work: a transaction around a block, and one that is done again when it has to be."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from .transient import is_transient, note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.orm import Session
    from tenacity import RetryCallState

__all__ = ("run_transaction", "transaction", "transient_retries")

Result = TypeVar("Result")


@contextmanager
def transaction(session: Session) -> Iterator[Session]:
    """Run a block in a transaction: committed at its end, rolled back when it raises, closed."""
    with session, session.begin():
        yield session


def transient_retries(
    attempts: int, before_sleep: Callable[[RetryCallState], None] | None = None
) -> Retrying:
    """Give what calls a function again after passing errors, waiting 10 ms to 1 s, at random.

    :param attempts: how often to try at most.
    :param before_sleep: is told of each wait.
    """
    return Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_random_exponential(multiplier=0.01, min=0.01, max=1.0),
        retry=retry_if_exception(is_transient),
        before_sleep=before_sleep,
        reraise=True,
    )


def run_transaction(
    open_session: Callable[[], Session],
    work: Callable[[Session], Result],
    attempts: int,
    describe: Callable[[], str],
) -> Result:
    """Do ``work`` in a transaction, and do it again when it failed for a passing reason.

    :param open_session: makes the session of each attempt.
    :param work: is called with it; its result is returned once the commit has succeeded.
    :param attempts: how often to try at most.
    :param describe: names the database, for the note on the error.
    """
    waits: list[float] = []

    def remember_wait(state: RetryCallState) -> None:
        if state.next_action is not None:
            waits.append(state.next_action.sleep)

    def attempt() -> Result:
        with transaction(open_session()) as session:
            return work(session)

    try:
        return transient_retries(attempts, remember_wait)(attempt)
    except Exception as error:
        if waits or is_transient(error):
            waited = ", ".join(f"{wait:.3f}" for wait in waits) or "none"
            note(
                error,
                f"database {describe()}: gave up after {len(waits) + 1} of {attempts} attempts;"
                f" waits between them, in seconds: {waited}",
            )
        raise

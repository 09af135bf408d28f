"""Units of work: a transaction around a block, and one that is done again when it has to be."""

from __future__ import annotations

from contextlib import contextmanager
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.exc import InvalidRequestError
from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from .errors import EngineOptionsError
from .sqlite_transactions import begin_writing
from .transient import is_transient, note
from .urls import hide_secrets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session
    from tenacity import RetryCallState

__all__ = (
    "AsyncTransaction",
    "run_async_transaction",
    "run_transaction",
    "transaction",
    "transient_retries",
)

Result = TypeVar("Result")


@contextmanager
def transaction(session: Session, *, write: bool = True) -> Iterator[Session]:
    """Run a block in a transaction: committed at its end, rolled back when it raises, closed.

    :param write: take SQLite's lock for writing at once. A transaction that reads before it
        writes would not wait for it then: others' commits would have made what it read old.
    """
    with session, session.begin():
        if write:
            begin_writing(session)
        yield session


class AsyncTransaction:
    """The same for ``async with``.

    It is no asynchronous generator: at the end of an event loop those are all closed at once, this
    one beside the caller's that still uses the session.
    """

    def __init__(
        self, open_session: Callable[[], Awaitable[AsyncSession]], *, write: bool = True
    ) -> None:
        """Open nothing yet.

        :param open_session: makes the session.
        :param write: as for :func:`transaction`.
        """
        self._open = open_session
        self._write = write
        self._session: AsyncSession | None = None

    async def __aenter__(self) -> AsyncSession:
        if self._session is not None:
            raise InvalidRequestError("begin() is for one block; call it again for another")
        session = self._session = await self._open()
        self._transaction = session.begin()
        await self._transaction.__aenter__()  # start() would let a block go on after its commit
        if self._write and session.get_bind().dialect.name == "sqlite":
            try:
                await session.run_sync(begin_writing)
            except BaseException as error:
                await self.__aexit__(type(error), error, error.__traceback__)
                raise
        return session

    async def __aexit__(self, *exception: object) -> None:
        assert self._session is not None
        async with self._session:  # which closes it, whatever is cancelled
            await self._transaction.__aexit__(*exception)


def transient_retries(
    attempts: int, before_sleep: Callable[[RetryCallState], None] | None = None
) -> Retrying:
    """Give what calls a function again after passing errors, waiting 10 ms to 1 s, at random.

    :param attempts: how often to try at most.
    :param before_sleep: is told of each wait.
    """
    return Retrying(**_retries(attempts, before_sleep))


def _retries(
    attempts: int, before_sleep: Callable[[RetryCallState], None] | None
) -> dict[str, Any]:
    return {
        "stop": stop_after_attempt(attempts),
        "wait": wait_random_exponential(multiplier=0.01, min=0.01, max=1.0),
        "retry": retry_if_exception(is_transient),
        "before_sleep": before_sleep,
        "reraise": True,
    }


class _Waits:
    """The waits between the attempts of one unit of work, for the note on its last error."""

    def __init__(self, attempts: int, describe: Callable[[], str]) -> None:
        self._attempts = attempts
        self._describe = describe
        self._waits: list[float] = []

    def remember(self, state: RetryCallState) -> None:
        """Take note of a wait that begins."""
        if state.next_action is not None:
            self._waits.append(state.next_action.sleep)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Say on the error that leaves the block how often the work was tried."""
        try:
            yield
        except Exception as error:
            if self._waits or is_transient(error):
                waited = ", ".join(f"{wait:.3f}" for wait in self._waits) or "none"
                note(
                    error,
                    f"database {self._describe()}: gave up after {len(self._waits) + 1} of"
                    f" {self._attempts} attempts; waits between them, in seconds: {waited}",
                )
            raise


def run_transaction(
    open_session: Callable[[], Session],
    work: Callable[[Session], Result],
    attempts: int,
    describe: Callable[[], str],
    *,
    write: bool = True,
) -> Result:
    """Do ``work`` in a transaction, and do it again when it failed for a passing reason.

    :param open_session: makes the session of each attempt.
    :param work: is called with it; its result is returned once the commit has succeeded.
    :param attempts: how often to try at most.
    :param describe: names the database, for the note on the error.
    :param write: as for :func:`transaction`.
    """

    def attempt() -> Result:
        with transaction(open_session(), write=write) as session:
            return work(session)

    waits = _Waits(attempts, describe)
    with waits.noted():
        return _retried(attempt, attempts, waits.remember)


def _retried(
    attempt: Callable[[], Result], attempts: int, before_sleep: Callable[[RetryCallState], None]
) -> Result:
    """Call what may have to be called again.

    What comes of the first call is handed on to tenacity when it failed only: to set that up takes
    as long as a short transaction.
    """
    try:
        return attempt()
    except Exception as error:
        if not is_transient(error):
            raise
        failed = [error]

    def first_or_next() -> Result:
        if failed:
            raise failed.pop()
        return attempt()

    return transient_retries(attempts, before_sleep)(first_or_next)


async def run_async_transaction(
    begin: Callable[[], AbstractAsyncContextManager[AsyncSession]],
    work: Callable[[AsyncSession], Awaitable[Result]],
    attempts: int,
    describe: Callable[[], str],
) -> Result:
    """Do the same with ``work`` that is awaited.

    :param begin: opens the session of each attempt, in a transaction.
    """

    async def attempt() -> Result:
        async with begin() as session:
            result = work(session)
            if not isawaitable(result):
                raise EngineOptionsError(
                    f"work must be a coroutine function, or another that returns what can be"
                    f" awaited; {hide_secrets(work)} returned {type(result).__name__}, and was"
                    " rolled back"
                )
            return await result

    waits = _Waits(attempts, describe)
    with waits.noted():
        try:
            return await attempt()
        except Exception as error:
            if not is_transient(error):
                raise
            failed = [error]

        async def first_or_next() -> Result:
            if failed:
                raise failed.pop()
            return await attempt()

        return await AsyncRetrying(**_retries(attempts, waits.remember))(first_or_next)

"""Prepares the databases of an application when it starts, all at once, in a given time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sessionmgr.errors import DatabasesNotReadyError

from .asking import reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sessionmgr.urls import DatabaseKey

__all__ = ("prepare_all",)


async def prepare_all(
    under_way: Mapping[DatabaseKey, asyncio.Future[None]], timeout: float
) -> None:
    """Wait until databases are prepared.

    :param under_way: database -> the future end of its preparation.
    :param timeout: seconds to wait at most for all of them.
    :raises DatabasesNotReadyError: when one cannot be prepared, or not in time.
    """
    if under_way:
        await asyncio.wait(under_way.values(), timeout=timeout)
    failed: dict[DatabaseKey, str] = {}
    causes = []
    for key, future in under_way.items():
        if not future.done():
            future.cancel()
            failed[key] = f"no answer in {timeout:g} s (start_timeout)"
        elif (error := future.exception()) is not None:
            failed[key] = reason(error)
            causes.append(error)
    if failed:
        raise DatabasesNotReadyError(_text(failed, len(under_way))) from next(iter(causes), None)


def _text(failed: Mapping[DatabaseKey, str], count: int) -> str:
    each = "; ".join(f"database {key.describe()}: {why}" for key, why in failed.items())
    return (
        f"the application does not start, for the tables of {len(failed)} of its {count} databases"
        f" could not be prepared. {each}. See that each runs and that its bind is right, and start"
        " again"
    )

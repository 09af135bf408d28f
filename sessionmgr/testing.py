"""A pytest plugin: databases that are as they were after each test.

It is loaded wherever sessionmgr is installed beside pytest; ``-p no:sessionmgr`` leaves it out.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from .isolation import isolated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .base import BaseManager

__all__ = ("isolate", "isolated", "isolated_session_manager")


@pytest.fixture
def isolate() -> Iterator[Callable[..., None]]:
    """Return a function that isolates managers until the end of the test.

    ``isolate(manager, ...)``: everything that is done on their databases from there on is undone.
    """
    with ExitStack() as undone:

        def begin(*managers: BaseManager[Any, Any]) -> None:
            isolation = isolated(*managers)
            isolation.begin()
            undone.callback(isolation.end)

        yield begin


@pytest.fixture
def isolated_session_manager(
    session_manager: BaseManager[Any, Any], isolate: Callable[..., None]
) -> BaseManager[Any, Any]:
    """Isolate the manager of a fixture of yours, ``session_manager``, and return it."""
    isolate(session_manager)
    return session_manager

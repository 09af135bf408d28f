"""Checks what a manager is configured with, when it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Engine, MetaData

from .errors import EngineOptionsError
from .urls import hide_secrets

__all__ = ("EngineCallback", "check_callbacks", "check_metadata")

EngineCallback = Callable[[Engine], Any]


def check_callbacks(callback: Any) -> tuple[EngineCallback, ...]:
    """Give engine callbacks as a tuple.

    :param callback: a callable, several of them, or ``None``.
    :raises EngineOptionsError: when one cannot be called.
    """
    if callback is None:
        return ()
    if callable(callback) or not isinstance(callback, Iterable):
        callback = (callback,)
    callbacks = tuple(callback)
    for one in callbacks:
        if not callable(one):
            raise EngineOptionsError(
                f"engine_callback must be a callable or several of them, not {hide_secrets(one)}"
            )
    return callbacks


def check_metadata(metadata: object) -> None:
    """Check that tables are given as a MetaData.

    :raises EngineOptionsError: when they are not; a declarative base is a likely slip.
    """
    if metadata is not None and not isinstance(metadata, MetaData):
        raise EngineOptionsError(
            "metadata must be a MetaData (of a declarative base: Base.metadata), not"
            f" {hide_secrets(metadata)}"
        )

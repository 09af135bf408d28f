"""Signals that tell which models a commit has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from blinker import Namespace
from flask import current_app, has_app_context
from sqlalchemy import event

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ("before_models_committed", "models_committed", "track")

_signals = Namespace()

#: Sent after a commit, by the application, with ``changes``: a list of the models and what was done
#: to each, ``"insert"``, ``"update"`` or ``"delete"``.
models_committed = _signals.signal("models-committed")

#: Sent before a commit, with the same.
before_models_committed = _signals.signal("before-models-committed")

_CHANGES = "sessionmgr_changes"


def track(sessions: Any) -> None:
    """Have sessions send the signals, for applications that set ``SQLALCHEMY_TRACK_MODIFICATIONS``.

    :param sessions: their sessionmaker.
    """
    for name, listener in _LISTENERS.items():
        if not event.contains(sessions, name, listener):
            event.listen(sessions, name, listener)


def _note(session: Session, *_: Any) -> None:
    if not (has_app_context() and current_app.config.get("SQLALCHEMY_TRACK_MODIFICATIONS")):
        return
    changes = session.info.setdefault(_CHANGES, {})
    changed = [each for each in session.dirty if session.is_modified(each)]
    for models, done in (
        (session.new, "insert"),
        (changed, "update"),
        (session.deleted, "delete"),
    ):
        for model in models:
            state: Any = sa.inspect(model)
            key = state.identity_key if state.has_identity else id(model)
            changes[key] = (model, done)


def _before_commit(session: Session) -> None:
    _note(session)
    changes = session.info.get(_CHANGES)
    if changes:
        _send(before_models_committed, changes)


def _after_commit(session: Session) -> None:
    changes = session.info.pop(_CHANGES, None)
    if changes:
        _send(models_committed, changes)


def _send(signal: Any, changes: dict[Any, tuple[Any, str]]) -> None:
    signal.send(current_app._get_current_object(), changes=list(changes.values()))  # type: ignore[attr-defined]  # it is a LocalProxy


def _after_rollback(session: Session) -> None:
    session.info.pop(_CHANGES, None)


_LISTENERS = {
    "before_flush": _note,
    "before_commit": _before_commit,
    "after_commit": _after_commit,
    "after_rollback": _after_rollback,
}

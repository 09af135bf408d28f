"""Pickles of results that carry no backend: what Celery calls results is kept by its id alone."""

from __future__ import annotations

import pickle
from functools import partial
from io import BytesIO
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from celery.result import AsyncResult, EagerResult, result_from_tuple
from kombu.exceptions import DecodeError, EncodeError
from kombu.serialization import pickle_protocol

if TYPE_CHECKING:
    from celery.backends.base import Backend

__all__ = ("dumps", "loads")


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        # as Celery does it, the backend comes along: its URL, with the password
        if isinstance(obj, AsyncResult) and not isinstance(obj, EagerResult):
            return result_from_tuple, (obj.as_tuple(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Makes the results of one app, with its backend.

    Celery makes those of the current app, each with the backend that was pickled along: an engine
    of its own, and a connection at once.
    """

    def __init__(self, payload: bytes, backend: Backend) -> None:
        super().__init__(BytesIO(payload))
        app = backend.app
        self._ours = {
            ("celery.app.base", "_unpickle_appattr"): lambda name, args: attrgetter(name)(app)(
                *args
            ),
            ("celery.backends.base", "unpickle_backend"): lambda *_: backend,
            ("celery.result", "AsyncResult"): app.AsyncResult,
            ("celery.result", "GroupResult"): app.GroupResult,
            ("celery.result", "result_from_tuple"): partial(result_from_tuple, app=app),
        }

    def find_class(self, module: str, name: str) -> Any:
        ours = self._ours.get((module, name))
        return super().find_class(module, name) if ours is None else ours


def dumps(value: Any) -> bytes:
    """Pickle a value, with the ids of the results in it.

    Any Celery can read it.

    :raises kombu.exceptions.EncodeError: when it cannot be pickled.
    """
    buffer = BytesIO()
    try:
        _Pickler(buffer, pickle_protocol).dump(value)
    except Exception as error:
        raise EncodeError(error) from error
    return buffer.getvalue()


def loads(payload: bytes, backend: Backend) -> Any:
    """Unpickle a row, of this backend or of any version of Celery's.

    :param backend: that of the results in it, whichever one wrote them.
    :raises kombu.exceptions.DecodeError: when it cannot be unpickled.
    """
    try:
        return _Unpickler(payload, backend).load()
    except Exception as error:
        raise DecodeError(error) from error

"""Chords that are counted in the database: the last part sends the callback, and nothing polls."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.base import Backend
from celery.canvas import maybe_signature
from celery.exceptions import BackendStoreError, ChordError, SoftTimeLimitExceeded
from celery.result import GroupResult
from sqlalchemy.exc import SQLAlchemyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sessionmgr.results import ResultStore
    from sessionmgr.results.chords import ChordPart

__all__ = ("ChordCounting",)

log = logging.getLogger("sessionmgr")


class ChordCounting(Backend):  # type: ignore[misc]  # Celery has no type hints
    """What a backend does with chords.

    :ivar store: where they are counted.
    """

    store: ResultStore

    def mark_as_done(
        self,
        task_id: str,
        result: Any,
        request: Any = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> None:
        """Store the result; that of a chord's part in the transaction in which it is counted.

        So whoever asks for the results of the parts when the callback runs finds them. The last
        one is stored with the sending of the callback: a task whose SUCCESS is stored Celery does
        not deliver again, and a process may be killed before it has sent it.
        """
        stores = store_result and not (request and request.ignore_result)
        if request and request.chord and self._is_counted(request):
            self._count(request, state, result, stores=stores)
        elif stores:
            self.store_result(task_id, result, state, request=request)

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> None:
        """Begin to count the parts of a chord.

        Without the tables for that, Celery's polling task does it.
        """
        if not self._counts_chords():
            super().apply_chord(header_result_args, body, **kwargs)
            return
        self.ensure_chords_allowed()
        group_id, results = header_result_args[0], header_result_args[1]
        self._ensure_retryable(
            self.store.chords.begin, group_id, lambda: self._go_on(group_id, body)
        )
        # A group among the parts: its shape is needed when the results are put together. A
        # generator's parts are not known yet.
        if isinstance(results, (list, tuple)):
            header = self.app.GroupResult(*header_result_args)
            if any(isinstance(result, GroupResult) for result in header.results):
                self.save_group(group_id, header)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Tell how many parts a chord has; Celery does, before it sends the last one."""
        if self._counts_chords():
            self._ensure_retryable(self.store.chords.set_size, group_id, chord_size)

    def add_to_chord(self, group_id: str, result: Any) -> None:
        """Tell of one part more."""
        self._ensure_retryable(self.store.chords.add, group_id)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        """Count a part that has returned; the last one sends the callback."""
        if self._is_counted(request):
            self._count(request, state, result, stores=False)

    def _count(self, request: Any, state: str, result: Any, *, stores: bool) -> None:
        encoded = self.encode_result(result, state)
        store = partial(self._store_result, request.id, encoded, state, request=request)
        stored = store if stores else None
        complete = self._ensure_retryable(
            self.store.chords.part_returned,
            request.group,
            request.id,
            request.group_index,
            state,
            self._encoded(encoded),
            stored,
            fallback_exc=partial(BackendStoreError, task_id=request.id, state=state),
            fallback_msg="failed to count a chord's part, and to store its result",
        )
        if complete:
            callback = maybe_signature(request.chord, app=self.app)
            if not self._go_on(request.group, callback, stored) and stores:
                self._ensure_retryable(store)

    def _is_counted(self, request: Any) -> bool:
        return bool(request.group and request.id) and self._counts_chords()

    def _counts_chords(self) -> bool:
        return bool(self._ensure_retryable(self.store.chords.supported))

    def _go_on(
        self, group_id: str, callback: Any, store: Callable[[], object] | None = None
    ) -> bool:
        """Send the callback of a chord whose parts have all returned, unless that was done.

        :param store: stores the result of the last part.
        :return: whether this call did, and stored that result.
        """
        sent = False
        try:
            header = GroupResult.restore(group_id, backend=self, app=self.app)

            def publish(parts: list[ChordPart]) -> None:
                nonlocal sent
                values = [self._value(part) for part in parts]
                if header is not None:
                    named = {part.task_id: value for part, value in zip(parts, values, strict=True)}
                    values = [*_in_shape(header, named), *named.values()]
                callback.delay(values)
                sent = True

            return self.store.chords.fire(group_id, publish, store)
        except Exception as error:
            # Nothing is decided, or all is. The part has another try: Celery, as it marks it as
            # failed, has it return again, and so does who delivers it again.
            if sent or isinstance(error, SQLAlchemyError) or _is_time_limit(error):
                raise
            if self._ensure_retryable(self.store.chords.give_up, group_id):
                log.exception("chord %s cannot go on", group_id)
                if not isinstance(error, ChordError):
                    error = ChordError(f"Callback error: {error!r}")
                self.chord_error_from_stack(callback, error)
            return False

    def _value(self, part: ChordPart) -> Any:
        """Give the result of a part.

        :raises ChordError: when it failed.
        """
        value = self._decode_stored(part.result)
        if part.status in self.EXCEPTION_STATES:
            value = self.exception_to_python(value)
        if part.status in states.PROPAGATE_STATES:
            cause = value if isinstance(value, BaseException) else None
            raise ChordError(f"Dependency {part.task_id} raised {value!r}") from cause
        return value


def _is_time_limit(error: BaseException | None) -> bool:
    """Tell whether an error is the soft time limit, or was raised for it; serializers wrap it."""
    while error is not None and not isinstance(error, SoftTimeLimitExceeded):
        error = error.__cause__ or error.__context__
    return error is not None


def _in_shape(header: GroupResult, values: dict[str, Any]) -> list[Any]:
    """Take the results of a header with groups in it out of all, in its shape."""
    return [
        _in_shape(each, values) if isinstance(each, GroupResult) else values.pop(each.id)
        for each in header.results
    ]

"""Holds signals back while the hooks around a fork run, and delivers them after the last of them.

The interpreter swallows what a signal's handler raises inside a hook, and goes on with half of the
hook done. To block signals is not enough: the kernel gives them to another thread then, and the
interpreter calls their handlers in the main thread all the same. So while the main thread forks,
each handler is replaced by one that takes note.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from contextlib import suppress
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    Handler = Callable[[int, FrameType | None], Any]

__all__ = ("deliver", "hold", "let_go", "let_go_in_child")

# The C library's function, for signal.pthread_sigmask() calls the handlers of what it unblocks,
# which would be inside the hook.
_mask = ctypes.PyDLL(None).pthread_sigmask
_mask.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

# Room for a sigset_t; the largest known has 128 bytes.
_MASK_SIZE = 128

_ALL = ctypes.create_string_buffer(_MASK_SIZE)
ctypes.PyDLL(None).sigfillset(_ALL)

_NUMBERS = sorted(signal.valid_signals())


class _Thread(threading.local):
    """The signals that a thread has blocked itself, and what blocks these alone again."""

    def __init__(self) -> None:
        self.blocked = ctypes.create_string_buffer(_MASK_SIZE)
        _mask(signal.SIG_BLOCK, None, self.blocked)
        self.unblock = partial(_mask, int(signal.SIG_SETMASK), self.blocked, None)


class _Held:
    """What was taken from the main thread until it has forked."""

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}
        self.wakeup = -1
        #: the signals that came meanwhile
        self.late: dict[int, FrameType | None] = {}
        self.note = self.late.setdefault
        #: what a handler raised that was called just before it was taken, or when it was put back
        self.error: BaseException | None = None


_own = _Thread()
_held: _Held | None = None


def hold() -> None:
    """Hold signals back from this thread, and from the child that it forks."""
    try:
        _mask(signal.SIG_BLOCK, _ALL, _own.blocked)
        _take()
    except BaseException as error:  # of a handler: other threads are given signals meanwhile
        _take()
        if _held is None:
            raise
        _held.error = error


def let_go() -> None:
    """Put back in the parent what was taken, and have what came meanwhile delivered."""
    held = _held
    if held is not None and _is_main():
        try:
            _put_back(held)
        except BaseException as error:  # noqa: BLE001 - raised where os.fork returns
            held.error = error
            _put_back(held)


def let_go_in_child() -> None:
    """Put back in the child what was taken, maybe by a fork of another thread of the parent."""
    if _held is not None:
        # That was the parent's. So is an event loop that would be woken from here, which is why
        # asyncio takes its wakeup descriptor from children itself, since Python 3.12.
        _held.late.clear()
        _held.error = None
        _held.wakeup = -1
        _put_back(_held)


def _is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _take() -> None:
    global _held
    if not _is_main():  # handlers are called in the main thread alone
        return
    held = _held = _held or _Held()
    for number in _NUMBERS:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not held.note:
            held.handlers[number] = handler
            signal.signal(number, held.note)
    # Event loops listen there, and would be told twice.
    held.wakeup = signal.set_wakeup_fd(-1)


def _put_back(held: _Held) -> None:
    global _held
    with suppress(ValueError, OSError):  # it was closed meanwhile
        signal.set_wakeup_fd(held.wakeup)
    for number, handler in held.handlers.items():
        signal.signal(number, handler)
    for number in list(held.late):
        del held.late[number]
        signal.raise_signal(number)  # it waits until it is unblocked
    if held.error is not None and held.handlers:
        _raise_later(held.error, *next(iter(held.handlers.items())))
    _held = None


def _raise_later(error: BaseException, number: int, handler: Handler) -> None:
    """Raise an error where ``os.fork`` has returned, by a signal that has a handler anyway."""

    def raise_it(*_: object) -> None:
        signal.signal(number, handler)
        raise error

    signal.signal(number, raise_it)
    signal.raise_signal(number)


#: Unblocks signals, as the last hook. No bytecode runs in it and none after it, so handlers are
#: called where ``os.fork`` has returned, and what they raise is raised there.
deliver = partial(methodcaller("unblock"), _own)

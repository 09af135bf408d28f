"""Makes a database's file as a copy of a template: whole or not at all, and by one process."""

from __future__ import annotations

import errno
import os
import re
import secrets
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from . import forking
from .datafile import MAGIC
from .errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("copy_template",)

# The header's version for reading, at byte 19: https://www.sqlite.org/fileformat2.html
_WAL = 2

#: SQLITE_BUSY and SQLITE_LOCKED, which the module names since Python 3.11.
_LOCKED = (5, 6)
#: Seconds to wait for a template that another program writes to.
_LOCK_WAIT = 5.0

#: How file systems without hard links say so.
_NO_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))

# The names of copies, after that of their file.
_COPY = re.compile(r"\.[0-9a-f]{16}\.new(-\w+)?")


def copy_template(template: Path, path: Path) -> None:
    """Have a database's file there: as it is, or as a copy of a template.

    Any number of processes may do this at once. What a process that was killed has left of its
    copy is removed by the next.

    :param template: a SQLite database, in whatever journal mode, also one that is open elsewhere.
    :param path: where the file is to be, in a folder that is there.
    :raises TemplateError: when the template is missing, no SQLite database, or cannot be copied;
        and where changes lie that SQLite would apply to the new file, and were another's.
    """
    while not path.exists():
        copy = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
        try:
            # The child of a fork in the midst of it would inherit both connections.
            with forking.gate.section():
                _copy(template, copy)
            _refuse_remains(path)
            _publish(copy, path)
        except FileNotFoundError:
            # The file was made meanwhile, and this copy removed. Or all are gone: copy again.
            _check(template)
        except (OSError, sqlite3.Error) as error:
            if not path.exists():
                raise TemplateError(
                    f"cannot copy the template {template} to {path}: {error}. Nothing was left"
                    " there"
                ) from error
        finally:
            _remove(copy)
    with suppress(OSError):  # the folder must not be listed, or nothing removed from it
        for left in list(_left_overs(path)):
            _remove(left)


def _copy(template: Path, copy: Path) -> None:
    """Copy what is committed: again, if it was changed while nobody was kept from that."""
    deadline = monotonic() + _LOCK_WAIT
    while True:
        before = _state(template)
        is_alone = _is_alone(template)
        fault = None
        try:
            _copy_once(template, copy, is_alone=is_alone)
        except sqlite3.DatabaseError as error:  # or it was read while it was half changed
            fault = error
        if not is_alone or (_state(template) == before and _is_alone(template)):
            if fault is not None:
                raise fault
            break
        _remove(copy)
        if monotonic() > deadline:
            raise sqlite3.OperationalError("another program changes it all the time")
    _sync(copy)


def _copy_once(template: Path, copy: Path, *, is_alone: bool) -> None:
    with (
        closing(_open(template, is_alone=is_alone)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        # The file is nobody's yet: what makes a crash harmless would only cost time.
        target.execute("PRAGMA journal_mode=OFF")
        target.execute("PRAGMA synchronous=OFF")
        source.backup(target, progress=_patience())
        # The template's mode came with it; an engine sets its own.
        target.execute("PRAGMA journal_mode=DELETE")


def _patience() -> Callable[[int, int, int], None]:
    """Give what ends the wait for a template that is locked, which backup() repeats for ever."""
    deadline = monotonic() + _LOCK_WAIT

    def watch(status: int, remaining: int, total: int) -> None:
        if status in _LOCKED and monotonic() > deadline:
            raise sqlite3.OperationalError("another program has locked it")

    return watch


def _open(template: Path, *, is_alone: bool) -> sqlite3.Connection:
    """Open a template for reading, so that neither it nor its folder changes.

    One in WAL mode that nobody has open has no ``-wal`` file. SQLite would make one, which fails
    in a folder that is read-only, and would stay in others; so it is read without its locks.
    """
    parameter = "immutable=1" if is_alone else "mode=ro"
    return sqlite3.connect(f"{template.as_uri()}?{parameter}", uri=True)


def _is_alone(template: Path) -> bool:
    """Tell whether a template is in WAL mode, and nobody has it open."""
    _check(template)
    with template.open("rb") as file:
        is_wal = file.read(20)[19:] == bytes((_WAL,))
    return is_wal and not Path(f"{template}-wal").exists()


def _state(template: Path) -> tuple[int, int, int]:
    """Give what changes when a file is written to, or replaced."""
    _check(template)
    status = template.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check(template: Path) -> None:
    try:
        with template.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise TemplateError(
            f"there is no template {template} that can be read: {error.strerror}. A relative path"
            " is looked for in the project's root, and in a frozen program among its data files"
        ) from error
    if magic != MAGIC:
        raise TemplateError(f"the template {template} is no SQLite database")


def _refuse_remains(path: Path) -> None:
    """Raise where a file is gone, but not the changes to it that were still beside it."""
    remains = [name for name in (f"{path}-wal", f"{path}-journal") if Path(name).exists()]
    if remains and not path.exists():  # another process may have made and opened it meanwhile
        raise TemplateError(
            f"{path} is not there, but {remains[0]} is, whose changes SQLite would take for those"
            " of the new file. Put the database back, or remove that too"
        )


def _publish(copy: Path, path: Path) -> None:
    """Give the copy its name, unless there is a file of that name.

    :raises FileNotFoundError: when the copy is gone.
    """
    try:
        if os.name == "nt":
            copy.rename(path)  # which replaces nothing there
        else:
            _link(copy, path)
    except FileExistsError:
        return
    _sync(path.parent)


def _link(copy: Path, path: Path) -> None:
    try:
        os.link(copy, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename(copy, path)


def _rename(copy: Path, path: Path) -> None:
    """Rename a file unless that would replace another, where there are no hard links.

    The folder's lock keeps two processes apart, and goes with a process that is killed.
    """
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if path.exists():
            raise FileExistsError(path)
        copy.rename(path)
    finally:
        os.close(folder)


def _left_overs(path: Path) -> Iterator[Path]:
    """Find the copies that are of no use any more, now that the file is there.

    That of a process which still writes it may be among them: it finds the file.
    """
    for found in path.parent.iterdir():
        if _COPY.fullmatch(found.name.removeprefix(f".{path.name}")):
            yield found


def _remove(copy: Path) -> None:
    for name in (copy, f"{copy}-wal", f"{copy}-shm"):
        with suppress(FileNotFoundError, PermissionError):  # Windows keeps what is open
            Path(name).unlink()


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    if os.name == "nt" and path.is_dir():
        return  # which cannot be opened there
    file = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

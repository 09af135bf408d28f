"""Where an application's own database file is: as told, for the user, or in the project."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import DatabasePathError, MissingExtraError
from .urls import hide_secrets

__all__ = ("DataFile", "absolute", "check_file_name", "check_path", "check_path_like")

#: What lies in the root of a project.
_MARKERS = ("pyproject.toml", "setup.cfg", "setup.py", ".git")

#: How the files of SQLite begin: https://www.sqlite.org/fileformat2.html
MAGIC = b"SQLite format 3\0"

_NEXT_STEP = "name a file in a folder that can be written to"


@dataclass(frozen=True)
class DataFile:
    """How an application's file is found.

    :param name: the application's name; its folder has it in a frozen program.
    :param env_var: the environment variable that names the file, if one does.
    :param development: the file in the project, relative to its root.
    :param filename: the name of the file in a frozen program.
    :param root: the project's root, where it was given.
    :param module: the folder of the module that has the database; ``None`` where there is none.
    """

    name: str
    env_var: str | None
    development: Path
    filename: str
    root: Path | None
    module: Path | None

    def find(self) -> Path:
        """Find the file, which need not be there. Nothing is created.

        :raises DatabasePathError: when it cannot be there.
        :raises MissingExtraError: in a frozen program without platformdirs.
        """
        told = os.environ.get(self.env_var) if self.env_var else None
        if told is not None and told.strip():
            return self._from_environment(told)
        if is_frozen():
            path, origin = _user_folder(self.name) / self.filename, "the user's data file"
        else:
            path, origin = self.project() / self.development, f"development={self.development}"
        step = _NEXT_STEP if self.env_var is None else f"set {self.env_var} to {_NEXT_STEP[5:]}"
        return check_path(path, origin, step, is_sqlite=True)

    def _from_environment(self, told: str) -> Path:
        origin = f"the environment variable {self.env_var}={told!r}"
        if "://" in told or told.startswith((":memory:", "file:")):
            raise DatabasePathError(
                f"the environment variable {self.env_var}={hide_secrets(told)} is no path of a"
                " file. It takes a path; a URL is given as ApplicationDatabase(..., url=)"
            )
        if told != told.strip():
            raise DatabasePathError(
                f"{origin} begins or ends with white space: {_NEXT_STEP}, or unset it"
            )
        if told.endswith(_SEPARATORS):
            raise DatabasePathError(f"{origin} names a folder: {_NEXT_STEP}, or unset it")
        return check_path(told, origin, f"{_NEXT_STEP}, or unset it", is_sqlite=True)

    def bundled(self, path: Path) -> Path:
        """Find a file that comes with the application.

        :param path: relative to the project's root, or in a frozen program to its data files.
        """
        return absolute((_bundle() if is_frozen() else self.project()) / path)

    def project(self) -> Path:
        """Find the root of the project: the nearest folder with what lies in one."""
        if self.root is not None:
            return self.root
        if self.module is None:
            return Path.cwd()
        for folder in (self.module, *self.module.parents):
            if any((folder / marker).exists() for marker in _MARKERS):
                return folder
        return self.module


_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


def is_frozen() -> bool:
    """Tell whether this is a program made by PyInstaller, or another of its kind."""
    return bool(getattr(sys, "frozen", False))


def _bundle() -> Path:
    """Give the folder of the files that were put into the program, or lie beside it."""
    return Path(getattr(sys, "_MEIPASS", Path(sys.executable).parent))


def _user_folder(name: str) -> Path:
    """Give the folder for data that a program keeps for its user; on Windows %APPDATA%."""
    try:
        import platformdirs
    except ImportError as error:
        raise MissingExtraError(
            f"the user's data folder of {name!r} is found by platformdirs, which is not in this"
            " program: install sessionmgr[appdb] before it is built"
        ) from error
    return platformdirs.user_data_path(name, appauthor=False, roaming=True)


def absolute(path: str | Path) -> Path:
    """Give a path in full, with symbolic links followed, so that a later chdir changes nothing.

    :raises RuntimeError: when ``~`` is nobody's.
    :raises OSError: when it cannot be followed.
    """
    return Path(path).expanduser().resolve()


def check_path(path: str | Path, origin: str, step: str, *, is_sqlite: bool = False) -> Path:
    """Give a path in full where a database's file is, or can be made.

    :param origin: who named it, for the error's text.
    :param step: what can be done about it.
    :param is_sqlite: whether a file that is there has to be SQLite's, or empty; a driver may have
        files of another kind, as SQLCipher's.
    :raises DatabasePathError: when no file can be there.
    """
    try:
        full = absolute(path)
        str(full).encode()  # which SQLite takes it in
        fault = _find_fault(full) or (_find_foreign(full) if is_sqlite else None)
    except RuntimeError as error:  # of expanduser; and of resolve, before Python 3.13
        full, fault = Path(path), str(error).rstrip(".")
    except (OSError, ValueError) as error:
        full, fault = Path(path), getattr(error, "strerror", None) or str(error)
    if fault is not None:
        raise DatabasePathError(f"{origin}: the database cannot be at {full}: {fault}; {step}")
    return full


def _find_fault(path: Path) -> str | None:
    """Say why a path cannot be that of a database's file, if it cannot."""
    if path.is_dir():
        return "that is a folder"
    if path.exists():
        if not path.is_file():
            return "that is no regular file"
        return None if os.access(path, os.R_OK) else "it cannot be read"
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        return f"{parent} is no folder"
    return None if os.access(parent, os.W_OK | os.X_OK) else f"{parent} cannot be written to"


def _find_foreign(path: Path) -> str | None:
    """Say that a file is of another program, if it is."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        begins = file.read(len(MAGIC))
    return None if begins in (b"", MAGIC) else "that is no SQLite database"


def check_path_like(option: str, value: object) -> Path:
    """Check what is to be a path.

    :raises DatabasePathError: when it cannot be one.
    """
    if isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str) and value:
        return Path(value)
    raise DatabasePathError(f"{option} is to be a path, as text or Path, not {hide_secrets(value)}")


def check_file_name(option: str, value: object) -> str:
    """Check what is to be a name in a folder.

    :raises DatabasePathError: when it cannot be one.
    """
    if (
        not isinstance(value, str)
        or value.strip() in ("", ".", "..")
        or any(character in value for character in '/\\:\0<>"|?*')
    ):
        raise DatabasePathError(
            f"{option} is to be a name for a file or a folder on any system, not"
            f" {hide_secrets(value)}"
        )
    return value

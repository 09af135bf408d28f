"""Where an application's database is: the environment, a frozen program, the project, or a URL."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from platformdirs import windows
from sqlalchemy import text

from sessionmgr import (
    ApplicationDatabase,
    DatabasePathError,
    DatabaseURLError,
    EngineOptionsError,
    MissingExtraError,
    SessionManager,
)
from tests.appdb_helpers import AppBase, add_client, as_nobody, client_names

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without the environment variable."""
    monkeypatch.delenv("DB_PATH", raising=False)


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take this program for a frozen one; return the folder for its user's data.

    A real one is built in test_appdb_frozen.py.
    """
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Make a folder that every user may look into; pytest's own are for one user."""
    folder = Path(tempfile.mkdtemp(prefix="sessionmgr-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def database(**options: Any) -> ApplicationDatabase:
    """Make a database with the spelling of DESIGN.md."""
    return ApplicationDatabase("InkLinkOS", **{"base": AppBase, **options})


@pytest.mark.parametrize("told", ["here.db", "~/here.db", "sub/../here.db", "no/such/folder/x.db"])
def test_environment_variable_wins(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: Path
) -> None:
    """The variable names the file, frozen or not; ``~`` and relative paths are resolved."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DB_PATH", told)
    expected = {
        "here.db": "here.db",
        "~/here.db": "home/here.db",
        "sub/../here.db": "here.db",
        "no/such/folder/x.db": "no/such/folder/x.db",
    }[told]
    with database() as db:
        assert db.path == tmp_path / expected
        assert db.data_root == db.path.parent
        add_client(db, "one")  # which makes the folder
        assert client_names(db) == ["one"]
    assert not frozen.exists()


def test_environment_variable_may_have_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``env_var`` names the variable, and ``None`` says that there is none."""
    monkeypatch.setenv("DB_PATH", str(tmp_path / "usual.db"))
    monkeypatch.setenv("INK_DB", str(tmp_path / "ink.db"))
    assert database(env_var="INK_DB").path == tmp_path / "ink.db"
    assert database(env_var=None, root=tmp_path).path == tmp_path / "dev.db"


@pytest.mark.parametrize("told", ["", "  "], ids=["empty", "blank"])
def test_empty_variable_is_unset(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable without a value, as a shell's ``DB_PATH= program`` leaves it, names no file."""
    monkeypatch.setenv("DB_PATH", told)
    assert database(root=tmp_path).path == tmp_path / "dev.db"


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ("{folder}", "that is a folder; name a file"),
        ("{folder}/", "names a folder: name a file"),
        ("{file}/x.db", "file is no folder"),
        ("{file}/sub/x.db", "file is no folder"),
        ("/dev/null", "that is no regular file"),
        ("{folder}/\udcff.db", "surrogates not allowed; name a file"),
        ("{text}", "that is no SQLite database; name a file"),
        (" {folder}/x.db", "begins or ends with white space: name a file"),
        ("{folder}/x.db ", "begins or ends with white space: name a file"),
        ("~nobody-of-that-name/x.db", "home directory"),
        (f"{{folder}}/{'x' * 300}.db", "File name too long"),
        (":memory:", r"is no path of a file.*ApplicationDatabase\(..., url=\)"),
        ("file:x.db?mode=ro", "is no path of a file"),
    ],
)
def test_unusable_variable_raises(
    told: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path where no file can be is an error with the variable, its value and the next step.

    It is raised where the application's module takes the engine, not at its first query.
    """
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "text").write_text("These are my notes, which nobody may write to.")
    places = {name: tmp_path / name for name in ("folder", "file", "text")}
    value = told.format(**places)
    monkeypatch.setenv("DB_PATH", value)
    db = database()
    with pytest.raises(DatabasePathError, match=rf"(?s)DB_PATH=.*{fault}") as caught:
        _ = db.engine
    assert value in str(caught.value)
    assert list((tmp_path / "folder").iterdir()) == []
    monkeypatch.setenv("DB_PATH", str(tmp_path / "good.db"))
    assert db.path == tmp_path / "good.db"  # nothing was kept


def test_names_that_look_like_uris_are_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path with what would be a parameter of a URI's is a path all the same."""
    monkeypatch.setenv("DB_PATH", str(tmp_path / "x.db?mode=memory"))
    with database() as db, db.SessionLocal() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
    assert (tmp_path / "x.db?mode=memory").is_file()


def test_url_in_the_variable_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL is no path; its password stays where it is."""
    monkeypatch.setenv("DB_PATH", "postgresql://me:sesame@host/db")
    with pytest.raises(DatabasePathError, match=r"DB_PATH=\*\*\* is no path.*url=") as caught:
        _ = database().path
    assert "sesame" not in str(caught.value)


def test_unwritable_folders_raise(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without the right to write is told before anything is opened."""
    monkeypatch.setenv("DB_PATH", str(open_folder / "sub" / "x.db"))
    open_folder.chmod(0o555)

    def fault() -> str:
        with pytest.raises(DatabasePathError) as caught:
            _ = database().path
        return str(caught.value)

    assert as_nobody(fault).endswith(
        f"{open_folder} cannot be written to; name a file in a folder that can be written to,"
        " or unset it"
    )


def test_unreadable_files_raise(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a file that this user may not read."""
    path = open_folder / "x.db"
    path.touch(mode=0o000)
    monkeypatch.setenv("DB_PATH", str(path))

    def fault() -> str:
        with pytest.raises(DatabasePathError) as caught:
            _ = database().path
        return str(caught.value)

    assert "it cannot be read" in as_nobody(fault)


def test_folder_that_cannot_be_made_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes in between before the first use is an error of its own."""
    monkeypatch.setenv("DB_PATH", str(tmp_path / "sub" / "x.db"))
    with database() as db:
        engine = db.engine
        (tmp_path / "sub").touch()
        with pytest.raises(DatabasePathError, match="cannot be made: File exists"):
            engine.connect()
        (tmp_path / "sub").unlink()
        assert client_names(db) == []  # tried again


def test_frozen_program_has_the_users_data_folder(frozen: Path) -> None:
    """A frozen program's file is in the user's data folder, by the application's name."""
    assert database().path == frozen / "InkLinkOS" / "inklinkos.db"
    with database(filename="inklink.db") as db:
        assert db.path == frozen / "InkLinkOS" / "inklink.db"
        assert not frozen.exists()
        add_client(db, "one")
        assert db.path.is_file()


def test_frozen_program_on_windows(
    tmp_path: Path, frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r"""There it is %APPDATA%\InkLinkOS\inklink.db, which roams.

    platformdirs' own code for Windows is run here, with the variable. On Windows it would ask the
    shell, which says the same.
    """
    monkeypatch.setenv("APPDATA", str(tmp_path / "Roaming"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    monkeypatch.setattr("platformdirs.PlatformDirs", windows.Windows)
    monkeypatch.setattr(windows, "get_win_folder", windows.get_win_folder_from_env_vars)
    expected = tmp_path / "Roaming" / "InkLinkOS" / "inklink.db"
    assert database(filename="inklink.db").path == expected


def test_frozen_program_without_platformdirs(frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing package is named by the extra that brings it."""
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(MissingExtraError, match=r"install sessionmgr\[appdb\] before"):
        _ = database().path
    assert not frozen.exists()


MODULE = "from sessionmgr import ApplicationDatabase\ndb = ApplicationDatabase('App')\n"


@pytest.mark.parametrize("marker", ["pyproject.toml", "setup.cfg", "setup.py", ".git", None])
def test_development_file_is_in_the_project(marker: str | None, tmp_path: Path) -> None:
    """Its root is the nearest folder with what projects have, else that of the module."""
    package = tmp_path / "project" / "app" / "data"
    package.mkdir(parents=True)
    (package / "session.py").write_text(MODULE)
    if marker is not None:
        (tmp_path / "project" / marker).touch()
    db = runpy.run_path(str(package / "session.py"))["db"]
    folder = package if marker is None else tmp_path / "project"
    assert db.path == folder / "dev.db"


def test_development_file_without_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file has the code, as in an interactive session, it is the current folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(MODULE, names)  # noqa: S102 - as an interactive session does
    assert names["db"].path == tmp_path / "dev.db"


def test_place_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found at its first use, and stays, whatever the program does later."""
    monkeypatch.chdir(tmp_path)
    db = database(root="project")
    assert repr(db) == "<ApplicationDatabase 'InkLinkOS': not used yet>"
    expected = tmp_path / "project" / "dev.db"
    assert db.path == expected
    monkeypatch.setenv("DB_PATH", str(tmp_path / "other.db"))
    monkeypatch.chdir("/")
    assert db.path == expected
    assert db.url.database == str(expected)
    assert repr(db) == f"<ApplicationDatabase 'InkLinkOS': sqlite:///{expected}>"


def test_nothing_is_made_before_the_first_connection(tmp_path: Path) -> None:
    """All that a module takes at its import leaves the disk as it is."""
    db = database(root=tmp_path / "project", template="no-such.db")
    taken = (db.engine, db.SessionLocal, db.path, db.data_root, db.url, db.Base, db.SessionLocal())
    assert taken[5] is AppBase
    assert list(tmp_path.iterdir()) == []


def test_reserved_characters_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may have what means something in a URL."""
    path = tmp_path / "50% of Zoë's #1?mode=memory&x=y" / "a b+c@d.db"
    monkeypatch.setenv("DB_PATH", str(path))
    with database() as db:
        add_client(db, "one")
        assert db.path == path
    assert path.is_file()


def test_url_instead_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL is taken as it is, whatever the variable says; that of a file has a path."""
    monkeypatch.setenv("DB_PATH", str(tmp_path / "other.db"))
    monkeypatch.chdir(tmp_path)
    with database(url="sqlite:///sub/here.db") as db:
        assert (db.path, db.data_root) == (tmp_path / "sub" / "here.db", tmp_path / "sub")
        monkeypatch.chdir("/")
        add_client(db, "one")
    assert (tmp_path / "sub" / "here.db").is_file()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x.db?uri=true",
        "postgresql+psycopg://me:sesame@host/db",
    ],
)
def test_databases_that_are_no_file_have_no_path(url: str) -> None:
    """Their path and folder are errors that name the database, without its password."""
    db = database(url=url)
    for name in ("path", "data_root"):
        with pytest.raises(DatabasePathError, match="'InkLinkOS' has no path") as caught:
            getattr(db, name)
        assert "sesame" not in str(caught.value)
    assert "sesame" not in repr(db)
    with pytest.raises(EngineOptionsError, match="template= is what a SQLite file begins as"):
        database(url=url, template="x.db")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"url": ""}, DatabaseURLError),
        ({"url": "dev.db"}, DatabaseURLError),
        ({"url": 7}, DatabaseURLError),
        ({"env_var": ""}, EngineOptionsError),
        ({"env_var": "A=B"}, EngineOptionsError),
        ({"env_var": 7}, EngineOptionsError),
        ({"filename": "sub/x.db"}, DatabasePathError),
        ({"filename": ""}, DatabasePathError),
        ({"filename": "con?.db"}, DatabasePathError),
        ({"development": None}, DatabasePathError),
        ({"development": ""}, DatabasePathError),
        ({"template": 7}, DatabasePathError),
        ({"template": b"x.db"}, DatabasePathError),
        ({"root": ["x"]}, DatabasePathError),
        ({"base": SessionManager}, EngineOptionsError),
        ({"base": AppBase.metadata}, EngineOptionsError),
        ({"engine_options": 7}, EngineOptionsError),
        ({"engine_options": {"pool_size": -1}}, EngineOptionsError),
        ({"session_options": {"autoflash": True}}, EngineOptionsError),
        ({"session_options": 7}, EngineOptionsError),
        ({"session_options": {"class_": int}}, EngineOptionsError),
    ],
    ids=str,
)
def test_wrong_options_raise_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    """What cannot be is told where it is written."""
    with pytest.raises(error):
        database(**options)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a\\b", "C:", 7, None])
def test_names_that_are_none_of_a_folder_raise(name: Any) -> None:
    """The application's name is a folder's, on any system."""
    with pytest.raises(DatabasePathError, match=r"^name is to be a name"):
        ApplicationDatabase(name)


def test_url_of_a_folder_raises(tmp_path: Path) -> None:
    """A SQLite URL's file is looked at like any other."""
    with pytest.raises(DatabasePathError, match="url=: the database cannot be at"):
        _ = database(url=f"sqlite:///{tmp_path}").engine


WITHOUT_FORKS = """
import asyncio, ctypes, os, sys

del os.fork, os.register_at_fork
load = ctypes.PyDLL


def load_by_name(name, *args):
    assert name is not None, "there is no C library to be had without a name"
    return load(name, *args)


ctypes.PyDLL = load_by_name
sys.modules["fcntl"] = None

from sqlalchemy import text
from sessionmgr import ApplicationDatabase


async def answer():
    async with db, db.AsyncSessionLocal() as session:
        return await session.scalar(text("SELECT 42"))


db = ApplicationDatabase("App", url="sqlite:///app.db")
with db.SessionLocal() as session:
    print(session.scalar(text("SELECT 41")), asyncio.run(answer()))
"""


def test_system_without_forks(tmp_path: Path) -> None:
    """The package works where there is nothing to fork with, as on Windows."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_FORKS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("41 42\n", "")
    assert (tmp_path / "app.db").is_file()

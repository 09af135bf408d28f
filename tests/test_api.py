"""The public API: what may be imported, what types it has, and how the modules depend."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sessionmgr
from sessionmgr import ext
from tests.servers import MissingServerError

if TYPE_CHECKING:
    from types import ModuleType

PACKAGE = Path(sessionmgr.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    info.name
    for info in pkgutil.walk_packages(sessionmgr.__path__, "sessionmgr.")
    if not info.name.endswith("__main__")
]
OPTIONAL = {"billiard", "celery", "click", "flask", "rich", "fastapi"}
"""Packages of which one may be missing, and the modules that need it with it."""


def load(name: str) -> ModuleType:
    """Import a module of the package; the test is skipped where an extra is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL:
            raise MissingServerError(f"PyPI package {error.name}") from error
        raise


def imports(source: Path) -> set[str]:
    """Return the modules that a source file imports, by their full names."""
    found = set()
    folder = [PACKAGE.name, *source.parent.relative_to(PACKAGE).parts]
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(folder[: len(folder) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


def calls(source: Path) -> set[str]:
    """Return the names of the functions and methods that a source file calls.

    Those of ``db``, the Flask extension, are its own.
    """
    nodes = ast.walk(ast.parse(source.read_text()))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    return {
        name.attr if isinstance(name, ast.Attribute) else name.id
        for name in called
        if isinstance(name, ast.Attribute | ast.Name)
        and not (isinstance(name, ast.Attribute) and ast.unparse(name.value) == "db")
    }


@pytest.mark.parametrize("name", sessionmgr.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    """Each name of ``__all__`` can be imported, and says what it is."""
    value = getattr(sessionmgr, name)
    assert value.__doc__
    assert value.__module__.startswith("sessionmgr.")


@pytest.mark.parametrize("name", MODULES)
def test_modules_keep_their_promises(name: str) -> None:
    """Every module has a sentence, and all that its ``__all__`` lists."""
    module = load(name)
    assert module.__doc__
    exported = getattr(module, "__all__", ())
    assert [missing for missing in exported if not hasattr(module, missing)] == []
    assert len(set(exported)) == len(exported)


def test_star_import_gives_the_public_names() -> None:
    """``from sessionmgr import *`` gives what ``__all__`` lists, in alphabetical order."""
    names: dict[str, object] = {}
    exec("from sessionmgr import *", names)  # noqa: S102 - only modules may write it plainly
    assert set(names) - {"__builtins__"} == set(sessionmgr.__all__)
    assert list(sessionmgr.__all__) == sorted(sessionmgr.__all__)


def test_errors_are_public() -> None:
    """Every error that a caller may want to catch is importable from the package."""
    assert set(importlib.import_module("sessionmgr.errors").__all__) <= set(sessionmgr.__all__)


def test_importing_the_package_imports_no_extra() -> None:
    """The core needs SQLAlchemy and tenacity; drivers and integrations are imported when used."""
    unwanted = [
        *OPTIONAL,
        "platformdirs",
        "psycopg",
        "psycopg2",
        "pymysql",
        "MySQLdb",
        "sessionmgr.ext",
    ]
    code = f"import sys, sessionmgr; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout.strip() == "[]"


def test_core_does_not_import_integrations() -> None:
    """Imports go down: nothing in the core imports ``sessionmgr.ext``, no integration another."""
    integrations = {info.name for info in pkgutil.iter_modules(ext.__path__, "sessionmgr.ext.")}
    above = ("sessionmgr.ext", "sessionmgr.cli", "sessionmgr.demo", "sessionmgr.__main__")
    for source in SOURCES:
        found = imports(source)
        if source.parent.name == "demo" or source.stem.startswith(("cli", "__main__")):
            continue
        if source.parent in (PACKAGE, PACKAGE / "results"):
            assert not [name for name in found if name.startswith(above)], source.name
        else:
            own, *_ = source.relative_to(PACKAGE / "ext").with_suffix("").parts
            assert not found & (integrations - {f"sessionmgr.ext.{own}"}), source.name


@pytest.mark.parametrize(
    ("owner", "called"),
    [
        ("engines", {"create_engine", "create_async_engine"}),
        ("forking", {"register_at_fork"}),
        ("schema", {"create_all", "drop_all"}),
    ],
)
def test_dangerous_calls_have_one_owner(owner: str, called: set[str]) -> None:
    """Engines, fork hooks and tables are made in one module each."""
    owners = {source.stem for source in SOURCES if calls(source) & called}
    assert owners <= {owner}


def test_calls_of_the_owners_are_seen() -> None:
    """The check above sees the calls that are there."""
    seen = {source.stem: calls(source) for source in SOURCES}
    assert {"create_engine", "create_async_engine"} <= seen["engines"]
    assert "register_at_fork" in seen["forking"]
    assert "create_all" in seen["schema"]


def test_types_of_the_api() -> None:
    """``mypy --strict`` accepts what users write, with the types they get."""
    if importlib.util.find_spec("mypy") is None:
        raise MissingServerError("PyPI package mypy")
    assert (PACKAGE / "py.typed").exists()
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "tests/typing_api.py"],
        check=False,
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr

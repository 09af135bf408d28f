"""Errors: one tree, each also its SQLAlchemy or builtin kin, all of which pickle."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import ArgumentError, InvalidRequestError, SQLAlchemyError

from sessionmgr import SessionManager, errors
from sessionmgr.errors import (
    DatabasePathError,
    DatabaseURLError,
    EngineOptionsError,
    FlaskModelError,
    FlaskSetupError,
    ForkedSQLiteError,
    IsolationError,
    ManagerClosedError,
    ManagerPickleError,
    MissingExtraError,
    NoSuchBindError,
    PageNotFoundError,
    PaginationError,
    SchemaLockError,
    SessionManagerError,
    TemplateError,
)
from tests.concurrency import in_child

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Database

ALL = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("error", ALL)
def test_errors_are_of_one_tree(error: type[BaseException]) -> None:
    """Every error is caught by the base, and by SQLAlchemy's, and says in a sentence what it is."""
    assert issubclass(error, SessionManagerError)
    assert issubclass(error, SQLAlchemyError)
    assert error.__name__.endswith("Error")
    assert error.__doc__


@pytest.mark.parametrize(
    ("error", "kin"),
    [
        (DatabaseURLError, ArgumentError),
        (EngineOptionsError, ArgumentError),
        (NoSuchBindError, InvalidRequestError),
        (NoSuchBindError, KeyError),
        (ManagerClosedError, InvalidRequestError),
        (ManagerPickleError, pickle.PicklingError),
        (ForkedSQLiteError, InvalidRequestError),
        (IsolationError, InvalidRequestError),
        (SchemaLockError, SQLAlchemyError),
        (DatabasePathError, ArgumentError),
        (MissingExtraError, ImportError),
        (TemplateError, SQLAlchemyError),
        (FlaskSetupError, RuntimeError),
        (FlaskModelError, ValueError),
        (PaginationError, ArgumentError),
        (PageNotFoundError, LookupError),
    ],
)
def test_errors_are_of_their_kin(error: type[BaseException], kin: type[BaseException]) -> None:
    """Code that catches what SQLAlchemy or Python would raise catches ours."""
    assert issubclass(error, kin)


@pytest.mark.parametrize("error", ALL)
def test_errors_pickle_with_their_notes(error: type[Exception]) -> None:
    """An error arrives in another process with its type, text and notes."""
    original = error("what, which and the next step")
    if hasattr(original, "add_note"):
        original.add_note("a note")
    copy = pickle.loads(pickle.dumps(original))  # noqa: S301 - our own
    assert type(copy) is error
    assert str(copy) == str(original) == "what, which and the next step"
    assert copy.args == original.args
    assert getattr(copy, "__notes__", None) == getattr(original, "__notes__", None)


def test_missing_bind_key_reads_as_a_sentence() -> None:
    """``KeyError`` would quote its text; this error does not."""
    with SessionManager() as manager, pytest.raises(KeyError) as caught:
        manager.get_engine("users")
    assert str(caught.value).startswith("there is no bind key 'users'")


def test_raised_errors_pickle(make_database: Callable[..., Database]) -> None:
    """Errors as they are raised, with what is attached to them, come out of a child whole."""
    url = make_database("psycopg").url

    def fail_in_turn() -> list[SessionManagerError]:
        caught: list[SessionManagerError] = []
        manager = SessionManager(binds={"users": url})
        manager.get_engine("users")
        for call in (
            lambda: manager.get_engine("nobody"),
            lambda: manager.get_engine("no://thing:at all"),
            lambda: manager.get_engine("users", pool_size=7),
            lambda: manager.get_engine(url, no_such_option=7),
            lambda: manager.run("users", lambda _: None, attempts=0),
            lambda: pickle.dumps(SessionManager(lambda _: None)),
            lambda: (manager.close(), manager.get_engine(url)),
        ):
            with pytest.raises(SessionManagerError) as error:
                call()
            caught.append(error.value)
        return caught

    assert [type(error) for error in in_child(fail_in_turn)] == [
        NoSuchBindError,
        DatabaseURLError,
        EngineOptionsError,
        EngineOptionsError,
        EngineOptionsError,
        ManagerPickleError,
        ManagerClosedError,
    ]

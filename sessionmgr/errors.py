"""The errors that sessionmgr raises, in one tree.

::

    sqlalchemy.exc.SQLAlchemyError
      SessionManagerError
        DatabaseURLError       (ArgumentError)         a URL that cannot be read
        EngineOptionsError     (ArgumentError)         an unknown or conflicting option
        NoSuchBindError        (UnboundExecutionError, KeyError)
        SpannedBindsError      (InvalidRequestError)   one statement, several databases
        ManagerClosedError     (InvalidRequestError)   the manager was closed
        ManagerPickleError     (PicklingError)         a part of it cannot be pickled
        ForkedSQLiteError      (InvalidRequestError)   a file that the parent holds open
        EventLoopError         (InvalidRequestError)   no event loop, or not the engine's
        IsolationError         (InvalidRequestError)   what a test does cannot be undone
        SchemaLockError                                the schema lock was not to be had
        DatabasePathError      (ArgumentError)         an application's database cannot be there
        TemplateError                                  its first content cannot be copied
        MissingExtraError      (ImportError)           a package of an extra is not installed
        DatabasesNotReadyError                         an application cannot start with them
        FlaskSetupError        (RuntimeError)          a Flask application is not set up for it
        FlaskModelError        (ValueError)            what models are to derive from cannot be
        PaginationError        (ArgumentError)         a select cannot be shown in pages
        PageNotFoundError      (LookupError)           there is no such page
        ResultStoreError                               a result store cannot do what it was asked
          ResultArgumentError  (ArgumentError)         an argument that cannot be
          ResultTooLongError   (ValueError)            more bytes than the column holds
          ResultTimeoutError   (TimeoutError)          waited for in vain

Errors of the database drivers are not wrapped: they reach the caller as SQLAlchemy raises them.
Every error pickles, so that it can travel from a worker to its parent.
"""

from __future__ import annotations

from pickle import PicklingError

from sqlalchemy.exc import (
    ArgumentError,
    InvalidRequestError,
    SQLAlchemyError,
    UnboundExecutionError,
)

__all__ = (
    "DatabasePathError",
    "DatabaseURLError",
    "DatabasesNotReadyError",
    "EngineOptionsError",
    "EventLoopError",
    "FlaskModelError",
    "FlaskSetupError",
    "ForkedSQLiteError",
    "IsolationError",
    "ManagerClosedError",
    "ManagerPickleError",
    "MissingExtraError",
    "NoSuchBindError",
    "PageNotFoundError",
    "PaginationError",
    "ResultArgumentError",
    "ResultStoreError",
    "ResultTimeoutError",
    "ResultTooLongError",
    "SchemaLockError",
    "SessionManagerError",
    "SpannedBindsError",
    "TemplateError",
)


class SessionManagerError(SQLAlchemyError):
    """Base of every error that sessionmgr itself raises."""


class DatabaseURLError(SessionManagerError, ArgumentError):
    """A database URL cannot be read, or is none."""


class EngineOptionsError(SessionManagerError, ArgumentError):
    """An option of engines or sessions is unknown, or contradicts another one."""


class NoSuchBindError(SessionManagerError, UnboundExecutionError, KeyError):
    """A bind key has no entry in ``binds``."""

    # KeyError shows the repr of its argument; this text is a sentence.
    __str__ = SQLAlchemyError.__str__


class SpannedBindsError(SessionManagerError, InvalidRequestError):
    """One statement, or one mapped class, has tables in the databases of several bind keys."""


class ManagerClosedError(SessionManagerError, InvalidRequestError):
    """The manager was closed; ``close()`` is final."""


class ManagerPickleError(SessionManagerError, PicklingError):
    """A part of the manager's configuration cannot be pickled."""


class ForkedSQLiteError(SessionManagerError, InvalidRequestError):
    """A SQLite file was in use by the parent process when this one was forked."""


class EventLoopError(SessionManagerError, InvalidRequestError):
    """An asynchronous engine was asked for without an event loop, or used in another one."""


class IsolationError(SessionManagerError, InvalidRequestError):
    """An isolated database was asked for what could not be undone, or was undone already."""


class SchemaLockError(SessionManagerError):
    """The lock under which tables are created was not granted in time."""


class DatabasePathError(SessionManagerError, ArgumentError):
    """An application's database cannot be where it is said to be."""


class TemplateError(SessionManagerError):
    """The template of an application's database is none, or cannot be copied."""


class MissingExtraError(SessionManagerError, ImportError):
    """A package that one of the extras brings is not installed."""


class DatabasesNotReadyError(SessionManagerError):
    """Databases could not be prepared in time when an application started."""


class PaginationError(SessionManagerError, ArgumentError):
    """A select cannot be shown in pages as it is, or a limit of pages is none."""


class PageNotFoundError(SessionManagerError, LookupError):
    """There is no such page: its number, its size or its cursor is out of range, or nonsense."""


class FlaskSetupError(SessionManagerError, RuntimeError):
    """A Flask application has no databases, or was not given to the extension, or was twice."""


class FlaskModelError(SessionManagerError, ValueError):
    """What the models of a Flask application are to derive from is no base for them."""


class ResultStoreError(SessionManagerError):
    """A result store cannot do what it was asked for."""


class ResultArgumentError(ResultStoreError, ArgumentError):
    """An argument of a result store is of the wrong kind, or names what is not there."""


class ResultTooLongError(ResultStoreError, ValueError):
    """A value is longer than its column in the database holds."""


class ResultTimeoutError(ResultStoreError, TimeoutError):
    """Tasks did not end in the time that was given to wait for them."""

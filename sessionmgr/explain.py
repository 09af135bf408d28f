"""Says in one line why a database cannot be used, and what to do about it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sqlalchemy.exc import NoSuchModuleError

from sessionmgr.urls import is_secret

if TYPE_CHECKING:
    from sqlalchemy import URL

__all__ = ("UnusableDatabaseError", "explain", "hide", "reason")


class UnusableDatabaseError(Exception):
    """A database cannot be used; the text says which, why, and what to do."""


#: Module of a driver -> what pip calls it.
_PACKAGES = {
    "psycopg": "'sessionmgr[psycopg]'",
    "psycopg2": "'sessionmgr[psycopg2]'",
    "pymysql": "'sessionmgr[pymysql]'",
    "MySQLdb": "'sessionmgr[mysqlclient]'",
    "mysql": "mysql-connector-python",
}

_HINT = re.compile(r"\s*Is the server running.*?\?", re.DOTALL)

# In the words of libpq, of MySQL's and MariaDB's servers and clients, and of SQLite; the first
# that is found counts.
_ADVICE = (
    (r"denied .* to database", "Create that database, or give the user the right to use it"),
    (r"password|Access denied|authentication|role .* does not exist", "Check user and password"),
    (r"database .* does not exist|Unknown database", "Create that database, or correct its name"),
    (r"resolve|Name or service|translate host|Unknown .*host", "Check the name of the host"),
    (r"refused|Can't connect|timed? ?out|unreachable|No such file", "Check that the server runs"),
    (r"unable to open database file", "Check that the folder exists and may be written to"),
    (r"permission|denied|readonly", "Use a role that may create and write a table"),
)  # fmt: skip


def explain(error: Exception, url: URL) -> str:
    """Give the reason for an error, and the next step.

    :param error: what SQLAlchemy or an import raised.
    :param url: the database that was tried.
    """
    if isinstance(error, NoSuchModuleError):
        return f"SQLAlchemy knows no {url.drivername!r}. Begin the URL with dialect+driver://"
    if isinstance(error, ImportError):
        module = (error.name or str(error)).partition(".")[0]
        return f"its driver is not installed: pip install {_PACKAGES.get(module, module)}"
    why = reason(error, url)
    advice = (advice for words, advice in _ADVICE if re.search(words, why, re.IGNORECASE))
    return f"{why.rstrip('.')}. {next(advice, 'Correct that, or use another database')}"


def reason(error: Exception, url: URL) -> str:
    """Give an error's own text in one line without secrets.

    :param error: any error; of SQLAlchemy's, the driver's own is shown.
    :param url: the database whose secrets must not be shown.
    """
    origin = getattr(error, "orig", None) or error
    text = str(origin)
    if len(origin.args) == 2 and isinstance(origin.args[0], int):  # MySQL's drivers
        text = f"{origin.args[1]} ({origin.args[0]})"
    text = _HINT.sub("", text)  # the advice says that better
    return hide(" ".join(text.split()), url)


def hide(text: str, url: URL) -> str:
    """Mask in a text every secret of a URL."""
    secrets = [url.password or ""]
    for name, value in url.normalized_query.items():
        secrets += value if is_secret(name) else ()
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text

"""What a statement does to a transaction that is to be rolled back in the end."""

from __future__ import annotations

import re
from enum import Enum, auto

from .sqlite_transactions import first_keyword

__all__ = ("Kind", "kind_of")


class Kind(Enum):
    """What there is to do about a statement."""

    READ = auto()
    WRITE = auto()
    BEGIN = auto()
    COMMIT = auto()
    ROLLBACK = auto()
    SAVEPOINT = auto()
    RELEASE = auto()
    ROLLBACK_TO = auto()
    LEVEL = auto()
    TWO_PHASE = auto()
    SEVERAL = auto()  #: of which one ends or begins a transaction
    COMMITS = auto()  #: as MySQL does at DDL


_READS = frozenset(
    "SELECT VALUES WITH EXPLAIN SHOW DESCRIBE DESC TABLE FETCH PRAGMA".split()  # noqa: SIM905 - shorter
)
#: What makes one that begins with such a word write after all.
_WRITES = re.compile(r"\b(?:INSERT|REPLACE|UPDATE|DELETE|MERGE|INTO)\b(?!\s*\()", re.IGNORECASE)
#: ``SELECT ... FOR UPDATE`` takes locks, and they stay until the end of all.
_LOCKS = re.compile(r"\bFOR\s+(?:NO\s+KEY\s+)?UPDATE\b", re.IGNORECASE)

#: https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/ and
#: https://dev.mysql.com/doc/refman/en/implicit-commit.html
_COMMITTING = frozenset(
    "ALTER CREATE DROP RENAME TRUNCATE GRANT REVOKE ANALYZE OPTIMIZE REPAIR CHECK CACHE FLUSH"  # noqa: SIM905 - shorter
    " RESET INSTALL UNINSTALL LOCK UNLOCK CHANGE START STOP".split()
)
_MYSQL = ("mysql", "mariadb")

_SKIPPED = r"(?:[\s;]|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*"
_WORDS = r"(?:\s+(?:WORK|TRANSACTION))?"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(_SKIPPED + text, re.IGNORECASE)


# In this order: the first that fits says it.
_CONTROLS = (
    (Kind.TWO_PHASE, _pattern(r"(?:XA\b|PREPARE\s+TRANSACTION|(?:COMMIT|ROLLBACK)\s+PREPARED)")),
    (Kind.ROLLBACK_TO, _pattern(rf"ROLLBACK{_WORDS}\s+TO(?:\s+SAVEPOINT)?\s+(.+?)[\s;]*$")),
    (Kind.RELEASE, _pattern(r"RELEASE(?:\s+SAVEPOINT)?\s+(.+?)[\s;]*$")),
    (Kind.SAVEPOINT, _pattern(r"SAVEPOINT\s+(.+?)[\s;]*$")),
    (Kind.BEGIN, _pattern(r"(?:BEGIN\b|START\s+TRANSACTION)")),
    (Kind.COMMIT, _pattern(r"(?:COMMIT|END)\b")),
    (Kind.ROLLBACK, _pattern(r"(?:ROLLBACK|ABORT)\b")),
    (Kind.LEVEL, _pattern(r"SET\s+TRANSACTION\b")),
)
_CONTROL_WORDS = frozenset(
    "XA PREPARE COMMIT ROLLBACK RELEASE SAVEPOINT BEGIN START END ABORT SET".split()  # noqa: SIM905 - shorter
)
#: The end of several statements; texts in quotes, and bodies of functions, end otherwise.
_ENDS = re.compile(r";\s*(?:COMMIT|ROLLBACK)(?:\s+(?:WORK|TRANSACTION))?[\s;]*\Z", re.IGNORECASE)
_GOES_ON = re.compile(rf"[^;]*;(?!{_SKIPPED}(?:--[^\n]*)?\Z)")
_TEMPORARY = _pattern(r"(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)\s+TEMPORARY\b")
_AUTOCOMMIT = _pattern(r"SET\b(?:[^'\"]*[\s,.@])?autocommit\s*:?=")


def kind_of(statement: str, dialect: str) -> tuple[Kind, str]:
    """Tell what a statement does, and the name of the savepoint where it does something to one.

    :param statement: as it is sent.
    :param dialect: the name of SQLAlchemy's dialect.
    """
    if _ENDS.search(statement) is not None:
        return Kind.SEVERAL, ""
    word = first_keyword(statement)
    if word in _CONTROL_WORDS:
        for kind, pattern in _CONTROLS:
            found = pattern.match(statement)
            if found is not None:
                if _GOES_ON.match(statement, found.end()) is not None:
                    kind = Kind.SEVERAL
                return kind, found[1] if pattern.groups else ""
    if dialect in _MYSQL and _commits(word, statement):
        return Kind.COMMITS, ""
    writes = word not in _READS or _WRITES.search(_LOCKS.sub("", statement)) is not None
    return (Kind.WRITE if writes else Kind.READ), ""


def _commits(word: str, statement: str) -> bool:
    if word == "SET":
        return _AUTOCOMMIT.match(statement) is not None
    return word in _COMMITTING and _TEMPORARY.match(statement) is None

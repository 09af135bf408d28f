"""What isolation takes a statement for."""

from __future__ import annotations

import pytest

from sessionmgr.isolation_statements import Kind, kind_of


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("SELECT 1", Kind.READ),
        ("  -- why\n/* and */ select * from a where b = 1", Kind.READ),
        ("SELECT replace(a, 'x', 'y') FROM b FOR NO KEY UPDATE", Kind.READ),
        ("WITH a AS (SELECT 1) SELECT * FROM a", Kind.READ),
        ("WITH a AS (DELETE FROM b RETURNING *) SELECT * FROM a", Kind.WRITE),
        ("SELECT * INTO b FROM a", Kind.WRITE),
        ("EXPLAIN ANALYZE DELETE FROM a", Kind.WRITE),
        ("SHOW search_path", Kind.READ),
        ("PRAGMA foreign_keys", Kind.READ),
        ("INSERT INTO a VALUES (1)", Kind.WRITE),
        ("CALL procedure()", Kind.WRITE),
        ("CREATE TABLE a (b INT)", Kind.WRITE),
        ("PREPARE a AS SELECT 1", Kind.WRITE),
        ("SET search_path TO a", Kind.WRITE),
        ("begin immediate", Kind.BEGIN),
        ("START TRANSACTION READ ONLY", Kind.BEGIN),
        ("COMMIT WORK;", Kind.COMMIT),
        ("END", Kind.COMMIT),
        ("rollback", Kind.ROLLBACK),
        ("ABORT TRANSACTION", Kind.ROLLBACK),
        ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", Kind.LEVEL),
        ("PREPARE TRANSACTION 'a'", Kind.TWO_PHASE),
        ("ROLLBACK PREPARED 'a'", Kind.TWO_PHASE),
        ("XA START 'a'", Kind.TWO_PHASE),
        ("INSERT INTO a VALUES (1); COMMIT", Kind.SEVERAL),
        ("DELETE FROM a;\nrollback transaction ;", Kind.SEVERAL),
        ("BEGIN; INSERT INTO a VALUES (1); COMMIT", Kind.SEVERAL),
        ("COMMIT; SELECT 1", Kind.SEVERAL),
        ("-- this; that\nCOMMIT; -- done", Kind.COMMIT),
        ("INSERT INTO a VALUES ('b; COMMIT')", Kind.WRITE),
        ("DO $$ BEGIN PERFORM 1; COMMIT; END $$", Kind.WRITE),
        ("CREATE TRIGGER a BEFORE DELETE ON b BEGIN SELECT 1; END", Kind.WRITE),
        ("", Kind.WRITE),
    ],
)
def test_statements_are_told_apart(statement: str, kind: Kind) -> None:
    """By their first words, and by words that write in one that begins by reading."""
    assert kind_of(statement, "postgresql") == (kind, "")


@pytest.mark.parametrize(
    ("statement", "kind", "name"),
    [
        ("SAVEPOINT sa_savepoint_1", Kind.SAVEPOINT, "sa_savepoint_1"),
        ('savepoint "a b";', Kind.SAVEPOINT, '"a b"'),
        ("RELEASE SAVEPOINT a", Kind.RELEASE, "a"),
        ("RELEASE a", Kind.RELEASE, "a"),
        ("ROLLBACK TO SAVEPOINT a", Kind.ROLLBACK_TO, "a"),
        ("ROLLBACK TRANSACTION TO a ;", Kind.ROLLBACK_TO, "a"),
    ],
)
def test_savepoints_are_named(statement: str, kind: Kind, name: str) -> None:
    """The name is found, quoted or not."""
    assert kind_of(statement, "sqlite") == (kind, name)


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("ALTER TABLE a ADD b INT", Kind.COMMITS),
        ("TRUNCATE a", Kind.COMMITS),
        ("LOCK TABLES a WRITE", Kind.COMMITS),
        ("SET autocommit = 1", Kind.COMMITS),
        ("SET @@session.autocommit=1", Kind.COMMITS),
        ("START SLAVE", Kind.COMMITS),
        ("SET @a = 1, autocommit = 1", Kind.COMMITS),
        ("SET LOCAL autocommit=ON", Kind.COMMITS),
        ("SET @a = 'autocommit = 1'", Kind.WRITE),
        ("SET NAMES utf8mb4", Kind.WRITE),
        ("CREATE OR REPLACE TEMPORARY TABLE a (b INT)", Kind.WRITE),
        ("DESCRIBE a", Kind.READ),
        ("SELECT * FROM a FOR UPDATE SKIP LOCKED", Kind.READ),
    ],
)
def test_what_commits_on_mysql(statement: str, kind: Kind) -> None:
    """DDL and the like end a transaction there, but for temporary tables."""
    assert kind_of(statement, "mysql") == (kind, "")
    assert kind_of(statement, "mariadb") == (kind, "")

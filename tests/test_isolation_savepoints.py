"""Isolation: transactions of one connection that overlap, as savepoints within each other."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError

from sessionmgr import IsolationError, SessionManager
from sessionmgr.isolation import isolated
from tests.isolation_helpers import BEFORE, add, names, write
from tests.items import Item, item_names

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.orm import Session


pytest_plugins = ["tests.isolation_fixtures"]

ONE_OF_EACH = ["psycopg", "pymysql", "file"]


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_overlapping_sessions_nest(filled: SessionManager, blank_url: str | URL) -> None:
    """A session that begins to write later, and ends first, is independent of the other."""
    with isolated(filled):
        with filled.session_factory(blank_url) as outer:
            write(outer, "outer")
            add(filled, blank_url, "kept")
            with filled.session_factory(blank_url) as inner:
                write(inner, "undone")
            outer.commit()
        assert names(filled, blank_url) == [*BEFORE, "kept", "outer"]


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_what_overlaps_otherwise_is_told(filled: SessionManager, blank_url: str | URL) -> None:
    """Where one connection cannot do what two would have done, who asks for it is told."""
    with (
        isolated(filled),
        filled.session_factory(blank_url) as one,
        filled.session_factory(blank_url) as two,
    ):
        write(one, "one")
        write(two, "two")
        one.rollback()
        with pytest.raises(IsolationError, match="was undone by the rollback of another"):
            two.execute(text("SELECT 1"))
        two.rollback()

        write(one, "one")
        write(two, "two")
        one.commit()
        with pytest.raises(IsolationError, match="cannot be rolled back any more"):
            two.rollback()

        write(one, "first")
        add(filled, blank_url, "audit")
        with pytest.raises(IsolationError, match="has also undone what another session"):
            one.rollback()

        write(one, "third")
        write(two, "fourth")
        one.commit()
        two.commit()
        assert names(filled, blank_url) == [*BEFORE, "fourth", "one", "third", "two"]


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_nested_savepoints_of_two_sessions(filled: SessionManager, blank_url: str | URL) -> None:
    """Savepoints of the same name, in sessions that overlap, are each session's own."""
    with (
        isolated(filled),
        filled.session_factory(blank_url) as one,
        filled.session_factory(blank_url) as two,
    ):
        write(one, "one")
        with one.begin_nested() as first:
            write(one, "undone")
            with two.begin_nested():
                write(two, "two")
            two.commit()
            with pytest.raises(IsolationError, match="has also undone"):
                first.rollback()
        one.commit()
        assert names(filled, blank_url) == [*BEFORE, "one"]


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_released_savepoints_are_rolled_back(filled: SessionManager, blank_url: str | URL) -> None:
    """What was done in savepoints that were released is the transaction's own to undo."""
    with isolated(filled), filled.session_factory(blank_url) as session:
        for _ in range(2):
            write(session, "undone")
            with session.begin_nested(), session.begin_nested():
                write(session, "nested")
            session.rollback()
            assert item_names(session) == BEFORE


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_collected_sessions_that_overlap(filled: SessionManager, blank_url: str | URL) -> None:
    """What nobody has ended is undone before another commits, and nobody is told of it."""
    with isolated(filled), filled.session_factory(blank_url) as one:
        write(one, "one")
        two = filled.session_factory(blank_url)
        write(two, "two")
        del two
        gc.collect()
        one.commit()
        assert names(filled, blank_url) == [*BEFORE, "one"]

        three = filled.session_factory(blank_url)
        write(three, "three")
        add(filled, blank_url, "audit")
        del three
        gc.collect()
        assert names(filled, blank_url) == [*BEFORE, "one"]


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_savepoints_by_text(filled: SessionManager, blank_url: str | URL) -> None:
    """A name is that of the last savepoint that has it; others' work is told of once."""
    with isolated(filled), filled.get_engine(blank_url).connect() as connection:
        connection.exec_driver_sql("SAVEPOINT a")
        connection.execute(insert(Item).values(name="kept", count=0))
        connection.exec_driver_sql("SAVEPOINT a")
        connection.execute(insert(Item).values(name="undone", count=0))
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT a")
        connection.commit()
        assert names(filled, blank_url) == [*BEFORE, "kept"]

        connection.exec_driver_sql("SAVEPOINT a")
        add(filled, blank_url, "audit")
        with pytest.raises(IsolationError, match="has also undone what another session"):
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT a")
        connection.rollback()
        assert names(filled, blank_url) == [*BEFORE, "kept"]


@pytest.mark.parametrize("driver", ONE_OF_EACH)
def test_who_was_undone_in_part_cannot_go_on(filled: SessionManager, blank_url: str | URL) -> None:
    """Its savepoints from before are refused, as is its commit; after that it begins anew."""
    engine = filled.get_engine(blank_url)
    with isolated(filled), engine.connect() as one, engine.connect() as two:
        one.exec_driver_sql("SAVEPOINT a")
        two.execute(insert(Item).values(name="two", count=0))
        one.execute(insert(Item).values(name="one", count=0))
        two.rollback()
        for statement in ("RELEASE SAVEPOINT a", "ROLLBACK TO SAVEPOINT a"):
            with pytest.raises(IsolationError, match="was undone by the rollback of another"):
                one.exec_driver_sql(statement)
        with pytest.raises(IsolationError, match="was undone by the rollback of another"):
            one.exec_driver_sql("COMMIT")
        assert one.scalars(text("SELECT name FROM item")).all() == BEFORE


@pytest.mark.parametrize("driver", ["psycopg"])
def test_a_failure_that_undid_others_is_told(filled: SessionManager, blank_url: str | URL) -> None:
    """What others have committed goes with the failed statement; the rollback says so."""
    with isolated(filled), filled.session_factory(blank_url) as session:
        write(session, "undone")
        add(filled, blank_url, "audit")
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT no_such"))
        with pytest.raises(IsolationError, match="has also undone what another session"):
            session.rollback()
        assert names(filled, blank_url) == BEFORE


@pytest.mark.parametrize("driver", ["pymysql"])
def test_savepoints_do_not_pile_up(filled: SessionManager, blank_url: str | URL) -> None:
    """The server has forgotten the savepoint of a transaction that has ended."""
    counters = text(
        "SELECT SUM(IF(variable_name = 'COM_SAVEPOINT', 1, -1) * variable_value)"
        " FROM information_schema.session_status"
        " WHERE variable_name IN ('COM_SAVEPOINT', 'COM_RELEASE_SAVEPOINT')"
    )
    with isolated(filled):
        add(filled, blank_url, "committed")
        with filled.session_factory(blank_url) as session:
            write(session, "undone")
            session.rollback()
            assert session.scalar(counters) == 0
            write(session, "open")
            assert session.scalar(counters) == 1


@pytest.mark.parametrize("driver", ["psycopg"])
def test_a_failure_spares_what_is_committed_before_its_rollback(
    filled: SessionManager, blank_url: str | URL
) -> None:
    """An error that is written down by another session, before the first is rolled back, stays."""

    def fail(session: Session) -> None:
        write(session, "undone")
        try:
            session.execute(text("SELECT no_such"))
        except DBAPIError:
            add(filled, blank_url, "audit")
            raise

    with isolated(filled):
        with pytest.raises(DBAPIError):
            filled.run(blank_url, fail)
        assert names(filled, blank_url) == ["audit", *BEFORE]

"""How a store sends its upsert: listeners and logs miss nothing, and errors are SQLAlchemy's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, OperationalError

from sessionmgr import ResultStore
from tests.results_helpers import rows_of
from tests.servers import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL

    from tests.servers import Database

pytest_plugins = ["tests.results_fixtures"]

UPSERT = "INSERT INTO celery_taskmeta"


@pytest.fixture(params=[False, True], ids=["unwatched", "watched"])
def sending(request: pytest.FixtureRequest, url: URL | str) -> Iterator[ResultStore]:
    """Open a store that tries once; with and without somebody who listens to its statements."""
    options = {"hide_parameters": True}
    with ResultStore(url, attempts=1, engine_options=options) as store:
        if request.param:
            engine = store.manager.get_engine(store.dburi)
            event.listen(engine, "before_cursor_execute", lambda *_: None)
        yield store


@pytest.mark.parametrize("name", ["before_cursor_execute", "after_cursor_execute"])
def test_listeners_are_told_of_every_upsert(store: ResultStore, name: str) -> None:
    """Tracing that begins after the first results misses none of the later ones."""
    store.store("1", "SUCCESS")
    seen: list[str] = []
    engine = store.manager.get_engine(store.dburi)
    event.listen(engine, name, lambda *args: seen.append(args[2]))
    assert store.store("2", "SUCCESS") is True
    assert store.store("2", "FAILURE") is False
    assert [statement[: len(UPSERT)] for statement in seen] == [UPSERT, UPSERT]


def test_who_sends_himself_sends_every_upsert(store: ResultStore) -> None:
    """A listener that replaces ``cursor.execute`` is asked."""
    seen: list[str] = []

    def send(cursor: Any, statement: str, parameters: Any, _: object) -> bool:
        seen.append(statement)
        cursor.execute(statement, parameters)
        return True

    store.prepare()
    event.listen(store.manager.get_engine(store.dburi), "do_execute", send)
    assert store.store("1", "SUCCESS") is True
    assert [statement[: len(UPSERT)] for statement in seen] == [UPSERT]


def test_upserts_are_logged(
    url: URL | str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switched on before the engine is made, SQLAlchemy's log shows the statements."""
    monkeypatch.setattr(logging.getLogger("sqlalchemy.engine"), "propagate", True)
    with caplog.at_level(logging.INFO, "sqlalchemy.engine"), ResultStore(url) as store:
        store.store("1", "SUCCESS")
    assert any(record.getMessage().startswith(UPSERT) for record in caplog.records)


def test_answers_and_errors_are_the_same(sending: ResultStore, url: URL | str) -> None:
    """An error names the statement, hides the values, and leaves a connection of use."""
    assert sending.store("1", "SUCCESS", b"first") is True
    assert sending.store("1", "SUCCESS", b"second") is False
    rows_of(url, "ALTER TABLE celery_taskmeta RENAME TO elsewhere")
    with pytest.raises(DBAPIError) as caught:
        sending.store("2", "SUCCESS", b"secret")
    rows_of(url, "ALTER TABLE elsewhere RENAME TO celery_taskmeta")
    error = caught.value
    assert type(error).__module__ == "sqlalchemy.exc"
    assert error.statement is not None
    assert error.statement.startswith(UPSERT)
    assert "secret" not in str(error)
    assert not error.connection_invalidated
    assert error.orig is error.__cause__
    assert sending.store("2", "SUCCESS", b"second") is True
    [stats] = sending.manager.stats().databases
    assert stats.connects == 1


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("watched", [False, True])
def test_lost_connection_is_found_out(
    make_database: Callable[..., Database], driver: str, watched: bool
) -> None:
    """The error says so, and the next store has a new connection."""
    database = make_database(driver)
    with ResultStore(database.url, attempts=1) as store:
        store.store("1", "SUCCESS")
        if watched:
            engine = store.manager.get_engine(store.dburi)
            event.listen(engine, "before_cursor_execute", lambda *_: None)
        database.server.kill(*database.connections())
        with pytest.raises(OperationalError) as caught:
            store.store("2", "SUCCESS")
        assert caught.value.connection_invalidated
        assert store.store("2", "SUCCESS") is True

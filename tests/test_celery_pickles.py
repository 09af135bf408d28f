"""What Celery calls results, stored by a backend: the app's own when read, and without secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from celery import group
from celery.app.task import Context
from celery.backends.database import DatabaseBackend as CelerysBackend
from celery.result import AsyncResult, EagerResult, GroupResult
from kombu.exceptions import EncodeError

from tests.results_helpers import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery import Celery
    from sqlalchemy import URL

    from tests.servers import Database

pytest_plugins = ["tests.celery_fixtures"]

SERIALIZER = pytest.mark.parametrize("serializer", ["json", "pickle"])


@pytest.fixture
def url(make_database: Callable[..., Database]) -> URL:
    """Return the URL, with a password, of an empty database."""
    return make_database("psycopg").url


def stored_bytes(url: URL) -> bytes:
    """Return all that the tables hold of results, children and groups."""
    tasks = rows_of(url, "SELECT result, children FROM celery_taskmeta")
    groups = rows_of(url, "SELECT result FROM celery_tasksetmeta")
    return b" ".join(bytes(value) for row in (*tasks, *groups) for value in row if value)


def store_parts(app: Celery) -> GroupResult:
    """Store two results, and return the group of them."""
    for task_id in ("1", "2"):
        app.backend.store_result(task_id, int(task_id), "SUCCESS")
    return app.GroupResult("g", [app.AsyncResult("1"), app.AsyncResult("2")])


@SERIALIZER
def test_group_is_stored_without_a_backend(
    url: URL, serializer: str, make_reader: Callable[..., Celery]
) -> None:
    """A group's row holds ids, and gives results of whichever app restores it."""
    store_parts(make_reader(serializer)).save()
    assert url.password is not None
    assert url.password.encode() not in stored_bytes(url)
    assert b"ackend" not in stored_bytes(url)
    app = make_reader(serializer)
    restored = GroupResult.restore("g", backend=app.backend, app=app)
    parts = restored.results
    assert all(each.app is app and each.backend is app.backend for each in (restored, *parts))
    assert restored.get(timeout=10.0) == [1, 2]


@SERIALIZER
def test_celerys_backend_restores_the_group(
    url: URL, serializer: str, make_reader: Callable[..., Celery]
) -> None:
    """Celery's own backend makes results of its app of what is stored."""
    app = make_reader(serializer)
    store_parts(app).save()
    text = url.render_as_string(hide_password=False)
    celery = make_reader(serializer, database_short_lived_sessions=True)
    theirs = CelerysBackend(dburi=text, app=celery)
    restored = theirs.restore_group("g")
    assert [part.id for part in restored.results] == ["1", "2"]
    assert all(each.app is celery for each in (restored, *restored.results))
    assert [theirs.get_result(part.id) for part in restored.results] == [1, 2]
    theirs.store_result("3", celery.AsyncResult("1"), "SUCCESS")
    theirs.save_group("h", celery.GroupResult("h", [AsyncResult("1", theirs, app=celery)]))
    ours = app.backend.restore_group("h")
    assert [(part.app is app, part.backend is app.backend) for part in ours] == [(True, True)]
    found = app.backend.get_result("3")
    assert found == [["1", None], None] if serializer == "json" else found.backend is app.backend


def test_results_in_a_pickled_result(url: URL, make_reader: Callable[..., Celery]) -> None:
    """A result that holds others holds their ids, and gives them as results of the reading app."""
    app = make_reader("pickle", result_compression="gzip")
    parts = store_parts(app)
    child = app.AsyncResult("2", parent=app.AsyncResult("1"))
    eager = EagerResult("3", 42, "SUCCESS")
    app.backend.store_result("4", {"one": [child], "all": parts, "eager": eager}, "SUCCESS")
    app.conf.result_compression = None
    app = make_reader("pickle")
    app.backend.store_result("5", child, "SUCCESS")
    assert url.password is not None
    assert url.password.encode() not in stored_bytes(url)
    found = app.backend.get_result("4")
    assert found["eager"].get() == 42
    assert found["one"][0].parent.get(timeout=10.0) == 1
    assert found["all"].get(timeout=10.0) == [1, 2]
    assert app.backend.get_result("5").get(timeout=10.0) == 2
    results = [*found["one"], found["one"][0].parent, found["all"], *found["all"].results]
    assert all(each.app is app and each.backend is app.backend for each in results)


@SERIALIZER
def test_children_are_stored_without_a_backend(
    url: URL, serializer: str, make_reader: Callable[..., Celery]
) -> None:
    """The children of a result are ids in its row, and results of the app that reads it."""
    app = make_reader(serializer)
    parts = store_parts(app)
    request = Context()
    request.children.extend([app.AsyncResult("1"), parts])
    app.backend.store_result("4", 1, "SUCCESS", request=request)
    assert url.password is not None
    assert url.password.encode() not in stored_bytes(url)
    app = make_reader(serializer)
    child, among = app.AsyncResult("4").children
    assert (child.get(timeout=10.0), among.get(timeout=10.0)) == (1, [1, 2])
    assert all(
        each.app is app and each.backend is app.backend for each in (child, among, *among.results)
    )


def test_group_that_was_sent(url: URL, make_reader: Callable[..., Celery]) -> None:
    """What ``apply_async`` gives is saved and restored like any other group."""
    app = make_reader("pickle")
    sent = group([app.signature("add", (1, 1)), app.signature("add", (2, 2))], app=app)()
    sent.save()
    assert app.backend.restore_group(sent.id) == sent
    assert url.password is not None
    assert url.password.encode() not in stored_bytes(url)


def test_what_cannot_be_pickled(make_reader: Callable[..., Celery]) -> None:
    """It is the error of which Celery makes a failure of the task."""
    with pytest.raises(EncodeError, match="lambda"):
        make_reader("pickle").backend.store_result("1", lambda: 1, "SUCCESS")


def test_pickles_that_are_not_accepted(make_reader: Callable[..., Celery]) -> None:
    """What a request holds is not unpickled where ``result_accept_content`` has no pickle."""
    writer = make_reader("pickle", result_extended=True)
    request = Context(task="add", args=[1], kwargs={}, delivery_info={})
    writer.backend.store_result("1", 1, "SUCCESS", request=request)
    reader = make_reader("pickle", result_extended=True)
    reader.conf.result_accept_content = ["json"]
    with pytest.raises(Exception, match="untrusted content"):
        reader.backend.get_task_meta("1")

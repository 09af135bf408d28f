"""Celery workers whose tasks use a Flask application's session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests import celery_app, flask_celery_app
from tests.celery_program import celery_worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.servers import Database


@pytest.mark.parametrize("driver", ["psycopg", pytest.param("mysqlclient", marks=pytest.mark.soak)])
def test_tasks_of_a_flask_application(
    driver: str, tmp_path: Path, make_database: Callable[..., Database]
) -> None:
    """Forked workers have a connection each, which stays; what a task does not commit is undone."""
    database = make_database(driver)
    uri = database.url.render_as_string(hide_password=False)
    app = celery_app.make_app(tmp_path)
    variables = {flask_celery_app.URI: uri}
    with celery_worker(tmp_path, "prefork", "tests.flask_celery_app", variables) as log:
        results = [app.send_task("write", [number]) for number in range(12)]
        used = {tuple(result.get(timeout=60.0)) for result in results}
    assert "Traceback" not in log.read_text()
    processes, connections = ({pair[each] for pair in used} for each in (0, 1))
    assert len(used) == len(processes) == len(connections)
    with create_engine(database.url, poolclass=NullPool).connect() as connection:
        found = connection.scalars(text("SELECT number FROM entry ORDER BY number")).all()
    assert found == [number for number in range(12) if number % 3]

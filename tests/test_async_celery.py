"""Celery tasks that call ``asyncio.run``, in workers as programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import celery_app
from tests.async_helpers import make_async_database
from tests.celery_program import celery_worker
from tests.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.servers import Database


@pytest.mark.parametrize(("pool", "driver"), [("prefork", "asyncpg"), ("solo", "psycopg-async")])
def test_tasks_that_run_event_loops(
    pool: str, driver: str, tmp_path: Path, make_database: Callable[..., Database]
) -> None:
    """Each task has loops of its own: no error, no warning, no connection stays."""
    there = make_async_database(driver, make_database, tmp_path)
    url = there.url.render_as_string(hide_password=False)
    app = celery_app.make_app(tmp_path)
    with celery_worker(tmp_path, pool) as log:
        results = [app.send_task("in_loops", [url, 5]) for _ in range(4)]
        assert [result.get(timeout=60.0) for result in results] == [[*range(8)] * 5] * 4
        wait_until(lambda: not there.connections())
    written = log.read_text()
    assert "event loop" not in written
    assert "ResourceWarning" not in written
    assert "Traceback" not in written

"""Fixtures for the tests of Flask applications."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.flask_apps import MADE

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def flask_apps_closed() -> Iterator[None]:
    """Close the pools of the applications that a test has made; nothing may be in use."""
    yield
    apps, MADE[:] = list(MADE), []
    managers = [
        app.extensions["sessionmgr"].manager for app in apps if "sessionmgr" in app.extensions
    ]
    used = [str(pool) for each in managers for pool in each.stats().databases if pool.checked_out]
    for manager in managers:
        manager.close()
    assert used == []

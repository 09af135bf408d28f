"""Tables and rows that versions of Celery have made, recorded in ``tests/data``."""

from __future__ import annotations

import json
from base64 import b64decode
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData, make_url, text

from tests.results_helpers import plain_engine

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import URL

__all__ = ("VERSIONS", "make_recorded_tables", "recorded_parts")

VERSIONS = ("4.4", "5.2", "5.6", "5.7")
"""The versions of which there are records."""

FOLDER = Path(__file__).parent / "data"

KINDS = {"postgresql": "postgresql", "mysql": "mariadb", "mariadb": "mariadb", "sqlite": "sqlite"}

NEXT_ID = 1000
"""Where the sequences of ids go on, after those of the rows."""


def make_recorded_tables(url: URL | str, version: str, *, rows: bool = True) -> None:
    """Make the tables that a version of Celery has made, with its rows.

    :param version: one of :data:`VERSIONS`.
    :param rows: whether to insert the rows.
    """
    record = _record(url, version)
    with plain_engine(url) as engine, engine.begin() as connection:
        for statement in record["ddl"]:
            connection.exec_driver_sql(statement)
        if not rows:
            return
        (metadata := MetaData()).reflect(connection)
        for name, recorded in record["rows"].items():
            for row in recorded:
                values = {column: _value(value) for column, value in row.items()}
                connection.execute(metadata.tables[name].insert(), values)
        for name in _sequences(record["ddl"]):
            quoted = f"'{name}'" if engine.dialect.name == "postgresql" else name
            connection.execute(text(f"SELECT setval({quoted}, {NEXT_ID})"))


def recorded_parts(url: URL | str, version: str, serializer: str) -> list[str]:
    """Return the ids of the parts of the group that was recorded with a serializer."""
    ids = [row["task_id"] for row in _record(url, version)["rows"]["celery_taskmeta"]]
    first = ids.index(f"{serializer}-failure") + 1
    return ids[first : first + 3]


def _record(url: URL | str, version: str) -> dict[str, Any]:
    kind = KINDS[make_url(url).get_backend_name()]
    record: dict[str, Any] = json.loads((FOLDER / f"celery-{version}-{kind}.json").read_text())
    return record


def _sequences(statements: Iterable[str]) -> list[str]:
    return [each.split()[2] for each in statements if each.startswith("CREATE SEQUENCE")]


def _value(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, shown)] = value.items()
    return b64decode(shown) if kind == "base64" else datetime.fromisoformat(shown)

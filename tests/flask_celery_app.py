"""A Celery application whose tasks run in the context of a Flask application, as Flask has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery, Task
from flask import Flask
from sqlalchemy.orm import Mapped, mapped_column

from sessionmgr.ext.flask import SQLAlchemy
from tests.celery_app import FOLDER, make_app
from tests.items import connection_id

URI = "SESSIONMGR_TEST_FLASK_URI"
"""The environment variable with the URL of the Flask application's database."""

db = SQLAlchemy()


class Entry(db.Model):
    """What a task writes."""

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


def make_flask() -> Flask:
    """Make the Flask application, and its table: its engine connects before the worker forks."""
    flask = Flask(__name__)
    flask.config["SQLALCHEMY_DATABASE_URI"] = os.environ[URI]
    db.init_app(flask)
    with flask.app_context():
        db.create_all()
    return flask


def make_celery(flask: Flask) -> Celery:
    """Make the Celery application; each of its tasks is run in a context of its own."""

    class ContextTask(Task):
        def __call__(self, *args: object, **kwargs: object) -> Any:
            with flask.app_context():
                return self.run(*args, **kwargs)

    celery = make_app(Path(os.environ[FOLDER]))
    celery.Task = ContextTask
    return celery


app = make_celery(make_flask()) if FOLDER in os.environ else None

if app is not None:

    @app.task(name="write")
    def write(number: int) -> tuple[int, int]:
        """Write a row; return the process, and the server's id of its connection."""
        db.session.add(Entry(number=number))
        db.session.flush()
        used = connection_id(db.session())
        if number % 3:
            db.session.commit()
        return os.getpid(), used

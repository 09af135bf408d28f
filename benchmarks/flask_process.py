"""A Flask application in a process of its own, which ``flask_request`` starts and times.

    python -m benchmarks.flask_process MODULE URL PLACE PATH

MODULE is the extension's: ``sessionmgr.ext.flask`` or ``flask_sqlalchemy``. In the PLACE "worker"
the application is made before a fork, as by gunicorn with ``--preload``, and its tables too. For
each line of the standard input, with a way of asking and a number of requests, PATH is asked for
that often, and a line is written with the seconds that a request took.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

from flask import Flask

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP = 10
"""Requests before those that are timed: another process had the core."""


def main() -> None:
    """Serve until the input ends."""
    module, url, place, path = sys.argv[1:]
    app = make_app(module, url)
    asks = {way: make(app, path) for way, make in WAYS.items()}
    if place == "worker":
        pid = os.fork()
        if pid:
            _, status = os.waitpid(pid, 0)
            sys.exit(os.waitstatus_to_exitcode(status))
    gc.freeze()
    gc.disable()
    for line in sys.stdin:
        way, count = json.loads(line)
        print(timed(asks[way], count), flush=True)


def timed(ask: Callable[[], object], count: int) -> float:
    """Give the seconds that one of so many calls took."""
    for _ in range(WARM_UP):
        ask()
    gc.collect()
    start = perf_counter()
    for _ in range(count):
        ask()
    return (perf_counter() - start) / count


def make_app(module: str, url: str) -> Flask:
    """Make the application, and its one row."""
    db = importlib.import_module(module).SQLAlchemy()

    class Item(db.Model):  # type: ignore[name-defined]
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String(50))

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)

    @app.get("/items/<int:key>")
    def item(key: int) -> str:
        name: str = db.get_or_404(Item, key).name
        return name

    @app.get("/nothing")
    def nothing() -> str:
        return "one"

    with app.app_context():
        db.create_all()
        db.session.add(Item(id=1, name="one"))
        db.session.commit()
    return app


def by_wsgi(app: Flask, path: str) -> Callable[[], object]:
    """Ask as a server does."""
    environment = app.test_request_context(path).request.environ
    kept = {key: value for key, value in environment.items() if not key.startswith("werkzeug.")}

    def ask() -> None:
        said: list[str] = []
        answer: Any = app.wsgi_app(dict(kept), lambda status, headers: said.append(status))
        assert b"".join(answer) == b"one"
        answer.close()
        assert said == ["200 OK"]

    return ask


def by_client(app: Flask, path: str) -> Callable[[], object]:
    """Ask by Flask's test client."""
    client = app.test_client()

    def ask() -> None:
        assert client.get(path).data == b"one"

    return ask


WAYS: dict[str, Callable[[Flask, str], Callable[[], object]]] = {
    "WSGI": by_wsgi,
    "test client": by_client,
}
"""How requests are made."""


if __name__ == "__main__":
    main()

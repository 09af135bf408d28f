"""Celery: a result backend on a ResultStore, with chords that need no polling.

::

    app = Celery(broker=..., backend="sessionmgr+postgresql+psycopg://app@db/results")

It reads and writes the tables of Celery's own database backend, takes all of its settings, and
one more: ``result_backend_transport_options = {"notify": True}`` has PostgreSQL tell results to
those who wait for them.
"""

from .backend import DatabaseBackend
from .workers import listen

__all__ = ("DatabaseBackend",)

listen()

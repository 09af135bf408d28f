"""A Celery application that keeps the results of its tasks in a database."""

from __future__ import annotations

from pathlib import Path

from celery import Celery

DATA = Path(__file__).with_name("data")
"""The folder for messages and results. An application of yours has a broker instead."""

for name in ("messages", "control"):
    (DATA / name).mkdir(parents=True, exist_ok=True)

app = Celery("tasks", broker="filesystem://")
app.conf.update(
    # The line that makes results go through sessionmgr. On PostgreSQL the text in it would be
    # "sessionmgr+postgresql+psycopg://user:password@host/database".
    result_backend=f"sessionmgr+sqlite:///{DATA / 'results.db'}",
    result_extended=True,  # keep the names and arguments of tasks as well
    broker_transport_options={
        "data_folder_in": str(DATA / "messages"),
        "data_folder_out": str(DATA / "messages"),
        "control_folder": str(DATA / "control"),
        "polling_interval": 0.05,  # seconds between looks into the folder
    },
)


@app.task
def add(x: int, y: int) -> int:
    """Add two numbers."""
    return x + y


@app.task
def square(number: int) -> int:
    """Multiply a number by itself."""
    return number * number


@app.task
def total(numbers: list[int]) -> int:
    """Add numbers up; the end of a chord."""
    return sum(numbers)


@app.task
def divide(x: float, y: float) -> float:
    """Divide; this may fail."""
    return x / y


@app.task
def worker_stats() -> str:
    """Tell what the worker's process has done with its connections so far."""
    return str(app.backend.session_manager.stats())

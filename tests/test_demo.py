"""The main job, run as a user runs it: ``python -m sessionmgr demo``."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from sqlalchemy import NullPool, create_engine, inspect, text

from sessionmgr import ResultStore
from sessionmgr.demo import pool as demo_pool
from sessionmgr.demo.databases import database_urls, make_manager
from sessionmgr.demo.results import NAMES
from sessionmgr.demo.work import Base
from tests.helpers import wait_until
from tests.servers import DRIVERS
from tests.servers.server import APP_PASSWORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Engine

    from tests.servers import Database

START_METHODS = ("fork", "spawn", "forkserver")
SECRET = "geheim-42"
TIMEOUT = 60.0

HALTED = "import sys; sys.modules[{!r}] = None; from sessionmgr.__main__ import main; main()"


class Demo:
    """Starts the command, with a folder of its own for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(
        self, *arguments: object, command: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the demo to its end.

        :param command: Python code to run in place of the module.
        """
        with self.start(*arguments, command=command) as process:
            out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(
        self, *arguments: object, command: str | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start the demo in a process group of its own."""
        environment = os.environ | {"TMPDIR": str(self.folder), "TERM": "xterm-256color"}
        for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
            environment.pop(name, None)
        head = ["-m", "sessionmgr"] if command is None else ["-c", command]
        return subprocess.Popen(
            [sys.executable, *head, "demo", *map(str, arguments)],
            env=environment,
            text=True,
            start_new_session=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def left(self) -> list[Path]:
        """List the temporary files that are there."""
        return list(self.folder.iterdir())


@pytest.fixture
def demo() -> Iterator[Demo]:
    """Return what starts the command."""
    # The path of forkserver's socket may have 107 characters, and tmp_path has most of them.
    with tempfile.TemporaryDirectory() as folder:
        yield Demo(Path(folder))


def shown(url: URL) -> str:
    """Return a URL as an argument of the command."""
    return url.render_as_string(hide_password=False)


def contents(url: URL) -> set[str]:
    """Return the names of the tables and sequences of a database."""
    inspector = inspect(create_engine(url, poolclass=NullPool))
    return {*inspector.get_table_names(), *inspector.get_sequence_names()}


def make_table(url: URL) -> Engine:
    """Make the demo's tables before the demo does, and return an engine."""
    engine = create_engine(url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    with ResultStore(url, table_names=NAMES) as store:
        store.prepare()
    return engine


def waiting_for_lock(database: Database) -> int:
    """Return how many connections to a PostgreSQL database wait for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
    return int(database.server.query(query, database.name)[0][0])


@pytest.mark.parametrize("start_method", START_METHODS)
def test_default_run(demo: Demo, start_method: str) -> None:
    """Without URLs it runs on three SQLite files, says that all is there, and leaves nothing."""
    outcome = demo.run("--tasks", 60, "--processes", 2, "--start-method", start_method)
    assert outcome.stderr == ""
    assert outcome.returncode == 0
    assert "Nothing was lost: all 60 rows and 60 results are there." in outcome.stdout
    assert len(re.findall(r"^sqlite:///\S+$", outcome.stdout, re.MULTILINE)) == 3
    assert len(re.findall(r"^ together +20 +20 +20 ", outcome.stdout, re.MULTILINE)) == 3
    assert "\x1b" not in outcome.stdout
    assert demo.left() == []


@pytest.mark.parametrize("start_method", START_METHODS)
def test_servers(demo: Demo, make_database: Callable[..., Database], start_method: str) -> None:
    """On real servers each worker makes one engine and one connection, and nothing is left."""
    databases = [make_database(driver) for driver in DRIVERS]
    postgresql = databases[0]
    mark = postgresql.server.log_mark()
    urls = [argument for d in databases for argument in ("--url", shown(d.url))]
    outcome = demo.run("--tasks", 80, "--start-method", start_method, "--json", *urls)
    assert outcome.stderr == ""
    assert outcome.returncode == 0
    assert APP_PASSWORD not in outcome.stdout
    report = json.loads(outcome.stdout)
    assert report["lost"] == 0
    assert report["rows_written"] == report["rows_expected"] == report["results_stored"] == 80
    for database, part in zip(databases, report["databases"], strict=True):
        assert part["database"] == database.url.render_as_string(hide_password=True)
        assert part["rows_written"] == part["rows_expected"] == part["results_stored"] == 20
        for process in part["processes"]:
            assert process["rows_written"] == process["rows_expected"] > 0
            assert process["results_stored"] == process["rows_expected"]
            assert process["engines_made"] == process["connections_opened"] == 1
            assert process["sessions_per_second"] > 0
        assert part["problems"] == {}
        assert contents(database.url) == set()
    log = postgresql.server.log_text(mark)
    assert not [line for line in log.splitlines() if postgresql.name in line and "EOF" in line]


def test_tables_that_were_there_stay(demo: Demo, make_database: Callable[..., Database]) -> None:
    """Tables with somebody else's rows and results keep them, and only them."""
    database = make_database("psycopg")
    engine = make_table(database.url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO sessionmgr_demo VALUES ('another', 1, 1)"))
        connection.execute(text("INSERT INTO sessionmgr_demo_task (id, task_id) VALUES (0, 'b')"))
    before = contents(database.url)
    outcome = demo.run("--tasks", 8, "--processes", 2, "--url", shown(database.url))
    assert outcome.returncode == 0
    assert "rows are removed, but not its table sessionmgr_demo, found there" in outcome.stdout
    assert "results are removed, but not its tables sessionmgr_demo_*, found" in outcome.stdout
    assert contents(database.url) == before
    with engine.connect() as connection:
        assert connection.execute(text("SELECT run FROM sessionmgr_demo")).all() == [("another",)]
        assert connection.execute(text("SELECT task_id FROM sessionmgr_demo_task")).all() == [
            ("b",)
        ]


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_results_of_celery_stay(
    demo: Demo, make_database: Callable[..., Database], driver: str
) -> None:
    """Celery's tables and the sequences of their ids are left alone: results go on into them."""
    database = make_database(driver)
    with ResultStore(database.url) as store:
        store.store("before", "SUCCESS", b"1")
        before = contents(database.url)
        assert {"celery_taskmeta", "task_id_sequence"} <= before
        assert demo.run("--tasks", 8, "--url", shown(database.url)).returncode == 0
        assert contents(database.url) == before
        store.store("after", "SUCCESS", b"2")
        assert set(store.get_many(["before", "after"])) == {"before", "after"}


def test_terminal_gets_bar_and_colour(demo: Demo) -> None:
    """On a terminal a bar moves while the workers work, and the outcome has colours."""
    main, terminal = pty.openpty()
    with demo.start("--tasks", 60, "--processes", 2, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        output = read_terminal(main)
    assert process.returncode == 0
    assert "━" in output
    assert "/60" in output
    assert "\x1b[1;32mNothing was lost" in output


def test_json_is_alone_on_standard_output(demo: Demo) -> None:
    """With --json the bar is on standard error only, and only where that is a terminal."""
    main, terminal = pty.openpty()
    with demo.start("--tasks", 9, "--processes", 2, "--json", stderr=terminal) as process:
        os.close(terminal)
        assert process.stdout is not None
        report = json.loads(process.stdout.read())
        output = read_terminal(main)
    assert process.returncode == 0
    assert report["rows_written"] == report["results_stored"] == 9
    assert "━" in output


def read_terminal(main: int) -> str:
    """Read all that is written to a terminal, until nobody has it open."""
    parts = []
    with os.fdopen(main, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # EIO: the end
        while part := stream.read(65536):
            parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"postgresql+psycopg://a:{SECRET}@127.0.0.1:1/x", ["refused", "Check that the server"]),
        (f"postgresql+psycopg2://a:{SECRET}@127.0.0.1:1/x", ["refused", "Check that the server"]),
        (f"mysql+pymysql://a:{SECRET}@127.0.0.1:1/x", ["refused", "Check that the server runs"]),
        (f"mysql+pymysql://a@127.0.0.1:1/x?password={SECRET}", ["password=***", "refused"]),
        (f"postgresql+psycopg://a:{SECRET}@host.invalid/x", ["Check the name of the host"]),
        (f"nosql://a:{SECRET}@host/x", ["nosql://a:***@host/x", "knows no 'nosql'"]),
        (f"postgresql+pg8000://a:{SECRET}@host/x", ["pip install pg8000"]),
        (f"postgresql+asyncpg://a:{SECRET}@host/x", ["asynchronous"]),
        (f"postgresql://a:{SECRET}@host:port/x", ["its port is not a number"]),
        (SECRET, ["no URL", "dialect+driver://"]),
        ("sqlite://", ["in memory", "sqlite:///demo.db"]),
        ("sqlite:////no/such/folder/demo.db", ["Check that the folder exists"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.replace(SECRET, "_"),
)
def test_unusable_url(demo: Demo, url: str, words: list[str]) -> None:
    """What cannot be used is one line that names the database and the next step, and status 2."""
    assert_unusable(demo.run("--url", url), words)


def assert_unusable(outcome: subprocess.CompletedProcess[str], words: list[str]) -> None:
    """Assert that the demo ended with one line about a database that cannot be used."""
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert re.fullmatch(r"Error: .*\n", outcome.stderr)
    assert SECRET not in outcome.stderr
    for word in words:
        assert word in outcome.stderr


def test_wrong_password(demo: Demo, database: Database) -> None:
    """A wrong password is told in one line, without it; the databases before are cleaned up."""
    wrong = database.url.set(password=SECRET)
    words = [wrong.render_as_string(hide_password=True), "Check user and password"]
    outcome = demo.run("--url", shown(database.url), "--url", shown(wrong))
    assert_unusable(outcome, words)
    assert contents(database.url) == set()


def test_missing_database(demo: Demo, database: Database) -> None:
    """A database that does not exist is told in one line."""
    missing = database.url.set(database="sessionmgr_missing")
    assert_unusable(
        demo.run("--url", shown(missing)), ["sessionmgr_missing", "Create that database"]
    )


def test_same_database_twice(demo: Demo) -> None:
    """A URL given twice is refused, in whatever spelling."""
    urls = ["--url", f"postgres://a:{SECRET}@host/x", "--url", f"postgresql://a:{SECRET}@host/x"]
    assert_unusable(demo.run(*urls), ["is given twice"])


def test_workers_that_cannot_be_started(demo: Demo) -> None:
    """What the system says to the start of the workers is told in one line."""
    demo.folder = demo.folder / ("deep" * 30)
    demo.folder.mkdir()
    outcome = demo.run("--start-method", "forkserver")
    assert_unusable(outcome, ["4 workers cannot be started by forkserver: AF_UNIX path too long"])


@pytest.mark.parametrize("arguments", [["--tasks", "0"], ["--start-method", "x"], ["--uri", "x"]])
def test_wrong_usage(demo: Demo, arguments: list[str]) -> None:
    """Wrong usage is status 2."""
    outcome = demo.run(*arguments)
    assert outcome.returncode == 2
    assert "Usage: sessionmgr demo" in outcome.stderr


@pytest.mark.parametrize(
    ("module", "extra"), [("click", "cli"), ("rich", "cli"), ("billiard", "billiard")]
)
def test_missing_package(demo: Demo, module: str, extra: str) -> None:
    """A package that is not installed is one line that says what to install."""
    outcome = demo.run(command=HALTED.format(module))
    assert_unusable(outcome, [module, f"pip install 'sessionmgr[{extra}]'"])
    assert demo.left() == []


def test_lost_row(demo: Demo, make_database: Callable[..., Database]) -> None:
    """A row that the database dropped is told as lost, and the status is 1."""
    database = make_database("psycopg")
    with make_table(database.url).begin() as connection:
        connection.execute(
            text(
                "CREATE RULE forget AS ON INSERT TO sessionmgr_demo WHERE new.number = 7"
                " DO INSTEAD NOTHING"
            )
        )
    outcome = demo.run("--tasks", 20, "--processes", 2, "--url", shown(database.url))
    assert outcome.returncode == 1
    assert "1 x RowMissingError: row 7 was written but could not be read back" in outcome.stdout
    assert "LOST: 1 of 20 rows and 1 of 20 results are not there." in outcome.stdout


def test_lost_result(demo: Demo, make_database: Callable[..., Database]) -> None:
    """A result that the database dropped is told as lost, and the status is 1."""
    database = make_database("psycopg")
    with make_table(database.url).begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS"
                " 'BEGIN RETURN NULL; END'"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER forget BEFORE INSERT ON sessionmgr_demo_task FOR EACH ROW"
                " WHEN (new.task_id LIKE '%-7') EXECUTE FUNCTION forget()"
            )
        )
    outcome = demo.run("--tasks", 20, "--processes", 2, "--json", "--url", shown(database.url))
    assert outcome.returncode == 1
    report = json.loads(outcome.stdout)
    assert (report["lost"], report["rows_written"], report["results_stored"]) == (1, 20, 19)


GATE = (
    """CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN new; END'""",
    """CREATE TRIGGER gate BEFORE INSERT ON sessionmgr_demo FOR EACH ROW
    WHEN (new.number >= 0) EXECUTE FUNCTION wait_at_gate()""",
)
"""Has workers' rows wait in PostgreSQL while another session has advisory lock 7."""


def test_killed_worker(demo: Demo, make_database: Callable[..., Database]) -> None:
    """A worker killed while it writes is told with its task, and the others do the rest."""
    database = make_database("psycopg")
    engine = make_table(database.url)
    with engine.begin() as connection:
        for statement in GATE:
            connection.execute(text(statement))
    holder = engine.connect()
    holder.execute(text("SELECT pg_advisory_xact_lock(7)"))
    arguments = ("--tasks", 400, "--processes", 2, "--json", "--url", shown(database.url))
    with demo.start(*arguments) as process:
        with holder:
            wait_until(lambda: waiting_for_lock(database) == 2, timeout=TIMEOUT)
            psutil.Process(process.pid).children()[0].kill()
        out, err = process.communicate(timeout=TIMEOUT)
    assert err == ""
    assert process.returncode == 1
    report = json.loads(out)
    assert report["lost"] == 2  # the row, and the result
    (part,) = report["databases"]
    assert part["rows_written"] == sum(p["rows_written"] for p in part["processes"]) == 399
    assert list(part["problems"].values()) == [1]
    assert "SIGKILL" in next(iter(part["problems"]))


def test_broken_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker killed with the lock of the queue in its hands ends the work, without a hang."""
    monkeypatch.setattr(demo_pool, "PATIENCE", 0.5)
    with (
        database_urls([f"sqlite:///{tmp_path}/demo.db"]) as urls,
        make_manager(urls) as manager,
        demo_pool.WorkerPool(1, "fork", manager, {}) as pool,
    ):
        (key,) = urls
        wait_until(lambda: pool._pool._inqueue._rlock._semlock._is_zero())
        os.kill(pool._workers[0].pid, signal.SIGKILL)
        answers = list(pool.answers((key, "run", number) for number in range(100)))
    assert len(answers) == 100
    assert {type(answer) for answer in answers} == {demo_pool.Failure}


@pytest.mark.parametrize("start_method", START_METHODS)
def test_interrupt(demo: Demo, start_method: str) -> None:
    """Ctrl-C ends every process, removes the files, and is told in one line."""
    with demo.start("--tasks", 100_000, "--start-method", start_method) as process:
        wait_until(lambda: count_rows(demo.folder) > 3, timeout=TIMEOUT)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, err) == (
        130,
        "",
        "Error: interrupted; the workers have ended\n",
    )
    wait_until(lambda: not any(child.is_running() for child in family))
    assert demo.left() == []


def count_rows(folder: Path) -> int:
    """Count the rows in the demo's first SQLite file."""
    with contextlib.suppress(sqlite3.OperationalError):  # not there yet, or locked
        for path in folder.glob("*/first.db"):
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as file:
                return int(file.execute("SELECT count(*) FROM sessionmgr_demo").fetchone()[0])
    return 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_cleans_up_servers(
    demo: Demo, make_database: Callable[..., Database], number: signal.Signals
) -> None:
    """An interrupt removes all that the demo made in a server's database, and says so."""
    database = make_database("psycopg")
    with demo.start("--tasks", 100_000, "--url", shown(database.url)) as process:
        wait_until(lambda: psutil.Process(process.pid).children(), timeout=TIMEOUT)
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert out == ""
    assert "the demo's rows and its table sessionmgr_demo are removed" in err
    assert "the demo's results and its tables sessionmgr_demo_* are removed" in err
    assert contents(database.url) == set()
    wait_until(lambda: not database.connections())


def test_tables_in_use_stay(demo: Demo, make_database: Callable[..., Database]) -> None:
    """Tables that the demo made stay when another run has begun to use them."""
    database = make_database("psycopg")
    with demo.start("--tasks", 100_000, "--url", shown(database.url)) as process:
        wait_until(lambda: psutil.Process(process.pid).children(), timeout=TIMEOUT)
        with make_table(database.url).begin() as connection:
            connection.execute(text("INSERT INTO sessionmgr_demo VALUES ('another', -1, 1)"))
            connection.execute(
                text("INSERT INTO sessionmgr_demo_task (id, task_id) VALUES (0, 'b')")
            )
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT)
    assert err.count("in use by another run") == 2
    assert contents(database.url) >= {"sessionmgr_demo", *NAMES.values()}


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]], ids=" ".join)
def test_help(arguments: list[str]) -> None:
    """The command tells what it is."""
    outcome = subprocess.run(
        [sys.executable, "-m", "sessionmgr", *arguments], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.startswith(("sessionmgr ", "Usage: sessionmgr "))
    assert outcome.stderr == ""

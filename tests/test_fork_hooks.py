"""What the hooks around a fork do: the wait and its warning, and severing one connection."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm.mapper import _CONFIGURE_MUTEX

from sessionmgr import SessionManager, forking, monitor, severing
from tests.concurrency import in_child
from tests.fork_helpers import fork, held_elsewhere, portable, program
from tests.items import ItemBase, connection_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

    from tests.servers import Database


@pytest.mark.parametrize(
    ("what", "context"),
    [
        ("make engines or connect", forking.gate.section),
        ("configure mappers", lambda: _CONFIGURE_MUTEX),
    ],
    ids=["connecting", "mapping"],
)
def test_fork_goes_on_with_a_warning_after_the_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, context: Any
) -> None:
    """A fork that waited for other threads in vain says what they do, and happens."""
    monkeypatch.setattr(forking, "FORK_WAIT", 0.05)
    with held_elsewhere(context):
        assert in_child(lambda: forking.process.forked)
    [record] = caplog.records
    assert (record.name, record.levelno) == ("sessionmgr.forking", logging.WARNING)
    message = record.getMessage()
    assert f"process {os.getpid()} forks while other threads still {what}, " in message
    assert "Fork before starting threads" in message
    caplog.clear()
    assert in_child(lambda: forking.process.forked)  # the hooks are in order again
    assert not caplog.records


def test_clean_fork_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A fork without other threads' work in the way is silent, also when it is nested."""
    assert in_child(lambda: in_child(lambda: forking.process.forked))
    with forking.gate.section(), _CONFIGURE_MUTEX:  # this thread's own are not in the way
        assert in_child(lambda: forking.process.forked)
    assert not caplog.records


def test_process_lock_is_free_in_child() -> None:
    """A lock that another thread held at the fork is another one in the child."""
    lock = forking.ProcessLock()

    def take() -> bool:
        return lock().acquire(blocking=False)

    with held_elsewhere(lock):
        assert not take()
        assert in_child(take)
    assert take()
    lock().release()


def test_dead_managers_are_not_told_of_forks() -> None:
    """A manager that nobody has any more is forgotten."""
    manager = SessionManager()
    assert manager in forking.heirs()
    [reference] = [known for known in forking._heirs.copy() if known() is manager]
    del manager
    assert reference() is None
    assert reference not in forking._heirs


class Counter:
    """Calls a function, and keeps with what arguments."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.calls: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        self.calls.append(args)
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("engines", [0, 1000])
def test_hook_works_on_open_connections_alone(
    make_database: Callable[..., Database],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engines: int,
) -> None:
    """With a thousand engines that have no connection, a child severs what is open, no more."""
    database = make_database("psycopg")
    counter = Counter(os.dup2)
    with SessionManager(pooling="always", metadata=ItemBase.metadata) as manager:
        with manager.session_factory(database.url) as session:
            connection_id(session)
        for number in range(engines):
            manager.get_engine(f"sqlite:///{tmp_path}/{number}.db")
        assert len(manager._engines) == engines + 1
        live = sorted(
            connection._descriptor
            for connection in severing.open_connections
            if connection.dbapi_connection is not None and connection._socket is not None
        )
        monkeypatch.setattr(severing.os, "dup2", counter)
        severed, settled = in_child(lambda: (counter.calls, len(manager._engines)))
    assert live
    assert sorted(target for _, target in severed) == live
    assert settled == 0
    assert not counter.calls  # not in the parent


def test_connection_that_the_pool_does_not_have_yet_is_severed(
    make_database: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork between the driver's connect and the pool's taking the connection severs it."""
    database = make_database("psycopg")
    before = severing.open_connections.copy()
    dead: list[bool] = []

    def fork_now() -> None:
        [connection] = severing.open_connections - before
        assert connection.owner().dbapi_connection is None
        dead.append(in_child(lambda: is_dead(connection._descriptor)))

    monkeypatch.setattr(monitor.exits, "register", fork_now)
    manager = SessionManager(metadata=ItemBase.metadata)
    with manager, manager.get_engine(database.url).connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    assert dead == [True]


def is_dead(descriptor: int) -> bool:
    """Return whether a descriptor is the dead socket's."""
    assert severing._dead is not None
    return severing._socket_identity(descriptor) == severing._dead[1]


def test_reused_descriptor_is_not_harmed(database: Database, tmp_path: Path) -> None:
    """A file or socket that got the number of a closed connection stays what it is in the child."""
    with ExitStack() as stack:
        manager = stack.enter_context(SessionManager(metadata=ItemBase.metadata))
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        file = stack.enter_context((tmp_path / "innocent").open("w+"))
        for innocent in (file, theirs):
            session = stack.enter_context(manager.session_factory(database.url))
            driver_connection = session.connection().connection.driver_connection
            [connection] = (
                c
                for c in severing.open_connections
                if c.dbapi_connection is not None
                and c._dialect.get_driver_connection(c.dbapi_connection) is driver_connection
            )
            number = connection._descriptor
            driver_connection.close()
            assert severing._socket_identity(number) is None
            os.dup2(innocent.fileno(), number)
            stack.callback(os.close, number)

            def write(number: int = number) -> int:
                return os.write(number, b"unharmed")

            assert in_child(write) == 8
            session.invalidate()
        assert (tmp_path / "innocent").read_text() == "unharmed"
        assert ours.recv(8) == b"unharmed"


def close_all_but(descriptor: int) -> None:
    """Close every descriptor, as daemons do."""
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 1024)


def become_daemon(channel: Connection, database: Database) -> None:
    """Fork, close every descriptor and reuse their numbers, connect, and fork."""
    with SessionManager(pooling="always", metadata=ItemBase.metadata) as manager:
        with manager.session_factory(database.url) as session:
            connection_id(session)
        manager.dispose()
        close_all_but(channel.fileno())
        innocents = [os.open(os.devnull, os.O_RDONLY) for _ in range(32)]
        with manager.session_factory(database.url) as session:
            before = connection_id(session)
            [connection] = severing.open_connections
            severed = connection._descriptor
            child = fork("os.fork", lambda: refuse(session, severed, innocents), "sys.exit").end()
            after = connection_id(session)
            session.commit()
        channel.send((child, before, after, [os.read(innocent, 1) for innocent in innocents]))


def refuse(session: Any, descriptor: int, innocents: list[int]) -> str:
    """In a child, use the parent's session, whose descriptor is to be a dead socket's."""
    assert severing._socket_identity(descriptor) is not None
    assert not any(os.path.sameopenfile(descriptor, innocent) for innocent in innocents)
    with pytest.raises(Exception, match="belongs to the process") as caught:
        session.execute(text("SELECT 1"))
    return type(caught.value).__name__


def test_daemon_that_closed_every_descriptor(database: Database) -> None:
    """The dead socket is made anew when its number is another file's, which is not harmed."""
    with program(become_daemon, portable(database)) as daemon:
        ended, before, after, read = daemon.end()
    assert (ended.noise, ended.status) == ("", 0)
    assert ended.result == "OperationalError"
    assert after == before
    assert read == [b""] * 32

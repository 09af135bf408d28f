"""An application's engines and sessions, used as the reference documents use them."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, event, func, inspect, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session

from sessionmgr import ApplicationDatabase, ManagerClosedError
from tests.appdb_helpers import AppBase, Client, add_client, client_names, make_template
from tests.concurrency import in_child, in_threads
from tests.helpers import wait_until
from tests.servers import DRIVERS
from tests.sqlite_helpers import another
from tests.test_examples import EXAMPLES

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator

    from tests.servers import Database

ALIASES = {
    "database": ("app.database", "data.db.session"),
    "models": ("app.models", "data.models.client"),
}
"""The example's modules, and what the documents call them."""


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """Return a function that has the documents' modules be those of the example.

    It imports them, and returns the example's folder.
    """
    monkeypatch.delenv("DB_PATH", raising=False)
    folder = tmp_path / "desktop_app"
    shutil.copytree(EXAMPLES / "desktop_app", folder, ignore=shutil.ignore_patterns("*.db*"))
    make_template(folder / "template.db", "Ada Example")
    monkeypatch.syspath_prepend(folder)
    for package in ("app", "data", "data.db", "data.models"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))

    def install() -> Path:
        for module, aliases in ALIASES.items():
            for alias in aliases:
                monkeypatch.setitem(sys.modules, alias, importlib.import_module(module))
        return folder

    yield install
    sys.modules["database"].db.close()
    for module in ALIASES:
        del sys.modules[module]


def test_session_document(documented: Callable[[], Path]) -> None:
    """Each line of application-database-session.md does as it says."""
    folder = documented()
    # ruff: noqa: ERA001
    from data.db.session import DATA_DIR, DB_PATH, engine

    # "nothing is opened or created at import", where the document has it made there
    assert not (folder / "dev.db").exists()
    assert isinstance(engine, Engine)
    assert str(folder / "dev.db") == DB_PATH
    assert folder == DATA_DIR
    from data.db.session import SessionLocal

    assert isinstance(SessionLocal, scoped_session)
    assert SessionLocal.session_factory.kw["autoflush"] is False
    assert SessionLocal.session_factory.kw["expire_on_commit"] is False

    # Basic session usage
    from data.models.client import Client

    with SessionLocal() as db:
        clients = db.query(Client).all()
    # "if the database file doesn't exist: attempts to copy from template"
    assert [client.name for client in clients] == ["Ada Example"]
    assert (folder / "dev.db").is_file()

    # Transaction management
    with SessionLocal() as db:
        db.begin()
        try:
            client = Client(name="John Doe", phone="555-1234", email="john@example.com")
            db.add(client)
            db.commit()
        except Exception:
            db.rollback()
            raise
    assert (client.name, client.phone) == ("John Doe", "555-1234")

    # Initialize database schema
    from data.db.session import init_db

    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE other (x)"))
        connection.execute(text("DROP TABLE client"))
    init_db()
    assert inspect(engine).get_columns("client")
    assert inspect(engine).has_table("other")

    # Get database path, and data root directory
    from data.db.session import get_data_root, get_db_path

    db_path = get_db_path()
    assert f"Database location: {db_path}" == f"Database location: {folder / 'dev.db'}"
    data_dir = get_data_root()
    assert f"Data directory: {data_dir}" == f"Data directory: {folder}"
    assert data_dir == Path(db_path).parent

    # Best practices
    session = Client(name="a session is a row there")
    with SessionLocal() as db:
        db.begin()
        try:
            db.add(client_again := Client(name="Jane Doe"))
            db.add(session)
            db.commit()
        except Exception:
            db.rollback()
            raise
    with SessionLocal() as db:
        client = db.query(Client).first()
        db.commit()
        # client object is still accessible
        assert client.name == client_again.name == "Jane Doe"
    db = SessionLocal()
    results = db.query(Client).all()
    db.close()
    assert len(results) == 2


def test_session_document_with_the_variable(
    documented: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``DB_PATH`` takes precedence, set from inside the program too."""
    monkeypatch.setenv("DB_PATH", "")  # to be restored afterwards
    os.environ["DB_PATH"] = str(tmp_path / "custom" / "database.db")
    documented()
    from data.db.session import DATA_DIR, DB_PATH, SessionLocal
    from data.models.client import Client

    assert str(tmp_path / "custom" / "database.db") == DB_PATH
    assert tmp_path / "custom" == DATA_DIR
    with SessionLocal() as db:
        assert len(db.query(Client).all()) == 1
    assert Path(DB_PATH).is_file()


def test_sync_async_document(documented: Callable[[], Path]) -> None:
    """Each line of app-database-sync-async.md does as it says."""
    documented()
    # Ensure schema exists (tables are created if missing)
    from app.database import ensure_database_schema

    ensure_database_schema()
    ensure_database_schema()  # "idempotent"

    # Sync usage
    from app.database import Base, SessionLocal

    assert issubclass(Base, DeclarativeBase)
    with SessionLocal() as session:
        assert isinstance(session, Session)

    # Async usage
    from app.database import AsyncSessionLocal

    async def get_count() -> int:
        async with AsyncSessionLocal() as session:
            assert isinstance(session, AsyncSession)
            return 0

    assert asyncio.run(get_count()) == 0

    # "declarative ORM models (bound to app.database.Base)"
    from app.database import db
    from app.models import Client

    async def count() -> int:
        async with AsyncSessionLocal() as session:
            session.add(Client(name="Grace"))
            await session.commit()
        async with AsyncSessionLocal() as session:
            found = await session.scalar(select(func.count()).select_from(Client))
        await db.async_dispose()
        return found or 0

    assert [asyncio.run(count()) for _ in range(3)] == [2, 3, 4]
    with SessionLocal() as session:
        assert len(session.query(Client).all()) == 4


# -- sessions


@pytest.fixture
def db(tmp_path: Path) -> Iterator[ApplicationDatabase]:
    """Make a database in a file of its own."""
    with ApplicationDatabase("App", url=f"sqlite:///{tmp_path / 'app.db'}", base=AppBase) as db:
        yield db


def test_session_ends_with_its_block(db: ApplicationDatabase) -> None:
    """The end of the block closes the session, and an exception rolls it back."""

    def fail() -> None:
        with db.SessionLocal() as session:
            session.add(Client(name="lost"))
            session.flush()
            assert db.engine.pool.checkedout() == 1  # type: ignore[attr-defined]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert client_names(db) == []


def test_threads_have_sessions_of_their_own(db: ApplicationDatabase) -> None:
    """One thread has one session, as long as it does not remove it."""
    mine = db.SessionLocal()
    assert db.SessionLocal() is mine
    others = in_threads([db.SessionLocal] * 4)
    assert len({id(session) for session in (mine, *others)}) == 5
    db.SessionLocal.remove()
    assert db.SessionLocal() is not mine


class OwnSession(Session):
    """A class of the caller's."""


def change_names(db: ApplicationDatabase) -> list[str]:
    """Change a client of one's own fifty times, each time after having read it."""
    with db.SessionLocal() as session:
        session.add(client := Client(name="0"))
        session.commit()
        for number in range(1, 51):
            client = session.get_one(Client, client.id, populate_existing=True)
            client.name = str(number)
            session.commit()
        return [client.name]


async def change_names_in_loop(db: ApplicationDatabase) -> list[str]:
    """Do the same in an event loop, with another session for each change."""
    async with db.AsyncSessionLocal.begin() as session:
        session.add(client := Client(name="0"))
    for number in range(1, 51):
        async with db.AsyncSessionLocal() as session:
            client = await session.get_one(Client, client.id)
            client.name = str(number)
            await session.commit()
    return [client.name]


def test_who_has_read_can_write_beside_others(db: ApplicationDatabase) -> None:
    """Threads and tasks that read, change and commit wait for each other, and none is refused."""

    async def tasks() -> list[list[str]]:
        return await asyncio.gather(*(change_names_in_loop(db) for _ in range(4)))

    with ThreadPoolExecutor(5) as pool:
        threads = [pool.submit(change_names, db) for _ in range(4)]
        assert asyncio.run(tasks()) == [["50"]] * 4
        assert [thread.result() for thread in threads] == [["50"]] * 4
    assert client_names(db) == ["50"] * 8


def test_sessions_on_another_engine(db: ApplicationDatabase, tmp_path: Path) -> None:
    """``configure`` and the call itself put sessions elsewhere; the application's file stays."""
    with ApplicationDatabase("Other", url=f"sqlite:///{tmp_path}/other.db", base=AppBase) as other:
        with db.SessionLocal(bind=other.engine) as session:
            session.add(Client(name="by the call"))
            session.commit()
        db.SessionLocal.remove()
        db.SessionLocal.configure(bind=other.engine)
        add_client(db, "by configure")
        assert client_names(other) == ["by configure", "by the call"]

        async def in_loop() -> list[str]:
            db.AsyncSessionLocal.configure(bind=other.async_engine)
            async with db.AsyncSessionLocal() as session:
                names = list(await session.scalars(select(Client.name)))
            await other.async_dispose()
            return names

        assert sorted(asyncio.run(in_loop())) == ["by configure", "by the call"]
    assert not db.path.exists()


def test_session_options_are_the_callers(tmp_path: Path) -> None:
    """``session_options`` are over those that the class sets."""
    url = f"sqlite:///{tmp_path / 'app.db'}"
    options = {"autoflush": True, "info": {"a": 1}, "class_": OwnSession}

    async def async_session(db: ApplicationDatabase) -> Session:
        return db.AsyncSessionLocal().sync_session

    with ApplicationDatabase("App", url=url, base=AppBase, session_options=options) as db:
        for session in (db.SessionLocal(), asyncio.run(async_session(db))):
            assert (session.autoflush, session.expire_on_commit) == (True, False)
            assert session.info == {"a": 1}
            assert isinstance(session, OwnSession)


def test_one_connection_is_enough(tmp_path: Path) -> None:
    """The first use takes no second connection: a pool of one serves many threads at once."""
    template = make_template(tmp_path / "template.db", "Ada")
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 30}
    looks: list[str] = []
    with ApplicationDatabase(
        "App",
        url=f"sqlite:///{tmp_path / 'app.db'}",
        template=template,
        base=AppBase,
        engine_options=options,
    ) as db:
        event.listen(db.engine, "before_cursor_execute", lambda *args: looks.append(args[2]))
        seen = in_threads([lambda: client_names(db)] * 16)
        assert seen == [["Ada"]] * 16
    assert sum("sqlite_master" in look for look in looks) == 1


def test_first_use_by_any_door(tmp_path: Path) -> None:
    """A connection, a raw one, a transaction and a session all find the tables."""
    doors = {
        "connect": lambda db: db.engine.connect().close(),
        "raw_connection": lambda db: db.engine.raw_connection().close(),
        "begin": lambda db: db.engine.begin().__enter__().close(),
        "session": client_names,
        "ensure_schema": lambda db: db.ensure_schema(),
    }
    for name, open_door in doors.items():
        url = f"sqlite:///{tmp_path / name / 'app.db'}"
        with ApplicationDatabase("App", url=url, base=AppBase) as db:
            open_door(db)
            assert inspect(db.engine).has_table("client")


def test_first_use_is_tried_again(tmp_path: Path) -> None:
    """What fails is the error of who came first, and done by the next."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)

    failures = iter([ZeroDivisionError("the first time")])

    def fail(*_: object, **__: object) -> None:
        for failure in failures:
            raise failure

    event.listen(Base.metadata, "before_create", fail)
    with ApplicationDatabase("App", url=f"sqlite:///{tmp_path / 'app.db'}", base=Base) as db:
        with pytest.raises(ZeroDivisionError, match="the first time"):
            db.engine.connect()
        with db.SessionLocal() as session:
            assert session.query(Item).all() == []
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_models_that_come_later(tmp_path: Path) -> None:
    """The schema is looked at again where it is asked for: models may be imported since."""

    class Base(DeclarativeBase):
        pass

    with ApplicationDatabase("App", url=f"sqlite:///{tmp_path / 'app.db'}", base=Base) as db:
        db.engine.connect().close()

        class Late(Base):
            __tablename__ = "late"
            id: Mapped[int] = mapped_column(primary_key=True)

        db.ensure_schema()
        with db.SessionLocal() as session:
            assert session.query(Late).all() == []


def test_models_that_come_later_in_a_loop(db: ApplicationDatabase) -> None:
    """``async_ensure_schema`` looks again, with the loop's own engine."""
    add_client(db, "one")
    with db.engine.begin() as connection:
        connection.execute(text("DROP TABLE client"))

    async def look_again() -> int | None:
        await db.async_ensure_schema()
        async with db.AsyncSessionLocal() as session:
            return await session.scalar(select(func.count()).select_from(Client))

    assert asyncio.run(look_again()) == 0


def test_children_use_what_was_imported_before_the_fork(db: ApplicationDatabase) -> None:
    """A child works with the engine and sessions of its parent's module, and so does the parent."""
    engine, session_local = db.engine, db.SessionLocal
    add_client(db, "parent's")

    def child() -> int:
        add_client(db, "child's")
        with engine.connect(), session_local() as session:
            return session.query(Client).count()

    assert in_child(child) == 2
    assert client_names(db) == ["child's", "parent's"]


def test_dispose_and_close(db: ApplicationDatabase) -> None:
    """After ``dispose`` all goes on with a new pool; after ``close`` nothing does."""
    session_local = db.SessionLocal
    before = db.engine
    add_client(db, "one")
    db.dispose()
    assert db.engine is not before
    with session_local() as session:
        assert session.get_bind() is db.engine
        assert session.query(Client).count() == 1
    db.close()
    for use in (lambda: db.engine, session_local, lambda: db.AsyncSessionLocal()):
        with pytest.raises(ManagerClosedError, match="database of 'App' is closed"):
            use()


# -- sessions for event loops


def test_sync_and_async_see_the_same_data_at_the_same_time(db: ApplicationDatabase) -> None:
    """Threads and tasks write to one file at once; each sees what the other has committed."""
    rows = 40

    def write() -> None:
        for number in range(rows):
            add_client(db, f"thread {number:02}")

    async def write_async() -> list[str]:
        for number in range(rows):
            async with db.AsyncSessionLocal() as session:
                session.add(Client(name=f"task {number:02}"))
                await session.commit()
            if number == rows // 2:
                # what a task has committed, a thread sees, and the other way round
                seen = await asyncio.to_thread(client_names, db)
                assert f"task {number:02}" in seen
                await asyncio.to_thread(add_client, db, "between")
                async with db.AsyncSessionLocal() as session:
                    found = await session.scalars(select(Client.name).filter_by(name="between"))
                    assert found.all() == ["between"]
        async with db.AsyncSessionLocal() as session:
            names = (await session.scalars(select(Client.name))).all()
        await db.async_dispose()
        return sorted(names)

    with ThreadPoolExecutor(1) as threads:
        written = threads.submit(write)
        asyncio.run(write_async())
        written.result(60)
    expected = [f"{kind} {number:02}" for kind in ("task", "thread") for number in range(rows)]
    assert client_names(db) == ["between", *expected]


def test_first_use_by_many_tasks(tmp_path: Path) -> None:
    """Tasks that come at once wait for the first of them, on one connection; the loop goes on.

    The copy waits for a lock on the template that is let go in the loop: did the loop wait for
    the copy, it would give up.
    """
    template = make_template(tmp_path / "template.db", "Ada")
    folder = tmp_path / "new"
    looks: list[str] = []

    async def let_go(other: sqlite3.Connection) -> None:
        while not any(folder.glob(".*.new")):  # noqa: ASYNC110 - another thread's doing
            await asyncio.sleep(0.001)
        other.execute("ROLLBACK")

    async def names(db: ApplicationDatabase) -> list[str]:
        async with db.AsyncSessionLocal() as session:
            return list((await session.scalars(select(Client.name))).all())

    async def main() -> list[list[str]]:
        async with ApplicationDatabase(
            "App",
            url=f"sqlite:///{folder / 'app.db'}",
            template=template,
            base=AppBase,
            engine_options={"pool_size": 1, "max_overflow": 0},
        ) as db:
            engine = db.async_engine.sync_engine
            event.listen(engine, "before_cursor_execute", lambda *args: looks.append(args[2]))
            with another(template) as other:
                other.execute("BEGIN EXCLUSIVE")
                tasks = [let_go(other), *(names(db) for _ in range(20))]
                _, *found = await asyncio.gather(*tasks)
            return found

    assert asyncio.run(main()) == [["Ada"]] * 20
    assert sum("sqlite_master" in look for look in looks) == 1


def test_async_engine_belongs_to_its_loop(db: ApplicationDatabase) -> None:
    """Each loop has an engine; without one there is none, and the error says so."""
    with pytest.raises(Exception, match="event loop"):
        _ = db.async_engine
    make_session = db.AsyncSessionLocal  # of no loop

    async def engine_and_count() -> tuple[Any, int]:
        async with make_session() as session:
            assert session.bind is db.async_engine
            count = await session.scalar(select(func.count()).select_from(Client))
        await db.async_dispose()
        return db.async_engine, count or 0

    add_client(db, "one")
    (first, one), (second, two) = asyncio.run(engine_and_count()), asyncio.run(engine_and_count())
    assert first is not second
    assert one == two == 1


# -- any database


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database in memory has tables and one connection; that of a loop is another database."""
    monkeypatch.chdir(tmp_path)
    with ApplicationDatabase("App", url="sqlite://", base=AppBase) as db:
        in_threads([lambda: db.engine.connect().close()] * 4)
        for name in "0123":  # one after the other: there is one connection, hence one transaction
            in_threads([lambda name=name: add_client(db, name)])
        assert client_names(db) == ["0", "1", "2", "3"]

        async def names() -> int:
            async with db.AsyncSessionLocal() as session:
                found = await session.scalar(select(func.count()).select_from(Client))
            await db.async_dispose()
            return -1 if found is None else found

        assert asyncio.run(names()) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("driver", "drivername"),
    [
        *((driver, None) for driver in DRIVERS),
        ("psycopg", "postgresql+asyncpg"),
        ("pymysql", "mysql+aiomysql"),
    ],
)
def test_servers(
    driver: str, drivername: str | None, make_database: Callable[..., Database]
) -> None:
    """A server's database, by whichever driver: both kinds of sessions, tables, and no rest."""
    database = make_database(driver)
    url = database.url if drivername is None else database.url.set(drivername=drivername)

    async def names(db: ApplicationDatabase) -> list[str]:
        async with db:
            async with db.AsyncSessionLocal() as session:
                session.add(Client(name="async"))
                await session.commit()
            async with db.AsyncSessionLocal() as session:
                return sorted(await session.scalars(select(Client.name)))

    db = ApplicationDatabase("App", url=url, base=AppBase)
    add_client(db, "sync")
    assert client_names(db) == ["sync"]
    assert asyncio.run(names(db)) == ["async", "sync"]
    wait_until(lambda: not database.connections())

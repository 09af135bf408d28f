"""Engine options: every one of SQLAlchemy's, against each pool class, in both phases."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any

import aiosqlite
import pytest
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.engine import CreateEnginePlugin
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import (
    AssertionPool,
    AsyncAdaptedQueuePool,
    NullPool,
    Pool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)

from sessionmgr import EngineOptionsError, SessionManager
from tests.concurrency import here, in_both_phases, in_child

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.async_facade import ManagerClass

POOL_CLASSES: list[type[Pool]] = [NullPool, QueuePool, StaticPool, SingletonThreadPool]

NEVER = float("inf")
"""The window of a liveness test that is off."""

HEALTH: dict[str, Any] = {"pool_recycle": 3600}
"""Default options that every pool class takes."""


class Plugin(CreateEnginePlugin):
    """Marks the engines made with it."""

    def update_url(self, url: URL) -> URL:
        return url

    def engine_created(self, engine: Engine) -> None:
        engine.dialect.label_length = 44


def connect() -> sqlite3.Connection:
    """Open a database in memory, as a ``creator``."""
    return sqlite3.connect(":memory:", check_same_thread=False)


async def connect_async() -> aiosqlite.Connection:
    """Do the same as an ``async_creator``."""
    return await aiosqlite.connect(":memory:")


OPTIONS: dict[str, Any] = {
    "connect_args": {"timeout": 7.0},
    "creator": connect,
    "echo": False,
    "echo_pool": False,
    "empty_in_strategy": "static",
    "enable_from_linting": False,
    "execution_options": {"stream_results": True, "logging_token": "token"},
    "future": True,
    "hide_parameters": True,
    "implicit_returning": True,
    "insertmanyvalues_page_size": 77,
    "isolation_level": "READ UNCOMMITTED",
    "json_deserializer": json.loads,
    "json_serializer": json.dumps,
    "label_length": 33,
    "logging_name": "engine",
    "max_identifier_length": 55,
    "max_overflow": 4,
    "module": sqlite3,
    "native_datetime": True,  # one of the dialect's own
    "paramstyle": "named",
    "plugins": ["sessionmgr_test"],
    "pool_events": [(lambda *_: None, "connect")],
    "pool_logging_name": "pool",
    "pool_recycle": 100,
    "pool_reset_on_return": "commit",
    "pool_size": 3,
    "pool_timeout": 5.5,
    "pool_use_lifo": False,
    "query_cache_size": 11,
    "skip_autocommit_rollback": True,
    "use_insertmanyvalues": False,
}
"""Options of :func:`sqlalchemy.create_engine`, each with a value that is not its default, where it
has others. ``poolclass`` and ``pool_pre_ping`` have tests of their own."""

ADAPTED: dict[Any, Any] = {QueuePool: AsyncAdaptedQueuePool}
"""Pool classes that asynchronous engines have in the place of others."""

ASYNC_POOLS = [None, NullPool, QueuePool, StaticPool]
"""Those that they have at all, as they are or adapted."""

DEPRECATED = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def plugin() -> None:
    """Make the plugin known to SQLAlchemy."""
    from sqlalchemy.dialects import plugins

    plugins.register("sessionmgr_test", __name__, "Plugin")


@pytest.fixture
def url(tmp_path: Path, sqlite: str) -> str:
    """Return the URL of a SQLite file."""
    return f"{sqlite}:///{tmp_path / 'one.db'}"


OURS = ("monitor", "_invoke_creator", "_has_events")
"""What no option changes: the pool's monitor, and that interrupted statements are listened for."""


@pytest.fixture
def options(manager_class: ManagerClass) -> dict[str, Any]:
    """Return :data:`OPTIONS`, as the kind of engine takes them."""
    if manager_class is SessionManager:
        return OPTIONS
    own = {"async_creator": connect_async}
    return {name: OPTIONS[name] for name in OPTIONS.keys() - {"creator", "module"}} | own


@pytest.fixture
def adapt(manager_class: ManagerClass) -> Callable[[Any], Any]:
    """Return what gives a pool class as the kind of engine takes it."""
    adapted = {} if manager_class is SessionManager else ADAPTED
    return lambda pool_class: adapted.get(pool_class, pool_class)


def traits(engine: Engine) -> dict[str, Any]:
    """Return all that distinguishes an engine from others by plain values."""
    plain = (str, int, float, bool, type(None), dict)
    found: dict[str, Any] = {
        "echo": engine.echo,
        "hide_parameters": engine.hide_parameters,
        "logging_name": engine.logging_name,
        "execution_options": dict(engine.get_execution_options()),
        "cache": getattr(engine._compiled_cache, "capacity", None),
        "pool class": type(engine.pool).__name__,
        "isolation_level": engine.dialect._on_connect_isolation_level,
        "reset_on_return": engine.pool._reset_on_return,
        "json": (
            getattr(engine.dialect, "_json_serializer", None),
            getattr(engine.dialect, "_json_deserializer", None),
        ),
        "module": getattr(engine.dialect.dbapi, "sqlite", engine.dialect.dbapi),  # if adapted
    }
    for part in (engine.pool, engine.dialect):
        found |= {
            f"{type(part).__name__}.{name}": value
            for name, value in vars(part).items()
            if isinstance(value, plain) and name not in OURS
        }
    if isinstance(engine.pool, QueuePool):
        queue = engine.pool._pool
        found["queue"] = (queue.maxsize, queue.use_lifo)
    return found


def chosen_engine(url: str, pool_class: type[Pool], options: dict[str, Any]) -> Engine:
    """Make SQLAlchemy's own engine with the pool class that a manager chooses itself."""
    if pool_class is NullPool:  # a connection that is closed needs no reset
        options = {"pool_reset_on_return": None} | options
    without = {name: value for name, value in options.items() if name == "pool_reset_on_return"}
    engine = plain_engine(url, pool_class, options) or plain_engine(url, pool_class, without)
    assert engine is not None
    return engine


def plain_engine(url: str, pool_class: type[Pool], options: dict[str, Any]) -> Engine | None:
    """Make SQLAlchemy's own engine with the health defaults; ``None`` when it refuses an option."""
    health = HEALTH | ({"pool_use_lifo": True} if issubclass(pool_class, QueuePool) else {})
    arguments = {"poolclass": pool_class} | health | options
    try:
        if url.startswith("sqlite+aiosqlite:"):
            return create_async_engine(url, **arguments).sync_engine
        return create_engine(url, **arguments)
    except TypeError as error:
        if not str(error).startswith("Invalid argument(s)"):
            raise
        return None


def managed(manager: SessionManager, url: str, **options: Any) -> dict[str, Any] | str:
    """Return the traits of a manager's engine, or the text of the error that refuses it."""
    try:
        return traits(manager.get_engine(url, **options))
    except EngineOptionsError as error:
        return str(error)


@DEPRECATED
@in_both_phases
@pytest.mark.twin_cases(call=[here], pool_class=ASYNC_POOLS)
@pytest.mark.parametrize("pool_class", POOL_CLASSES)
def test_every_option_is_taken_or_refused_as_the_pool_class_says(
    url: str,
    call: Callable,
    pool_class: type[Pool],
    manager_class: ManagerClass,
    options: dict[str, Any],
    adapt: Callable,
) -> None:
    """With an explicit pool class, an option does what it does in ``create_engine``, or raises."""
    adapted = adapt(pool_class)

    def compare() -> set[str]:
        refused = set()
        for name, value in options.items():
            plain = plain_engine(url, adapted, {name: value})
            with manager_class() as manager:
                found = managed(manager, url, poolclass=adapted, **{name: value})
            if plain is None:
                assert isinstance(found, str), f"{name} was not refused"
                assert f"'{name}': {value!r}" in found
                assert adapted.__name__ in found
                refused.add(name)
            else:
                assert found == traits(plain), name
        return refused

    only_queue = {"max_overflow", "pool_timeout", "pool_use_lifo"}
    expected = {
        QueuePool: set(),
        SingletonThreadPool: only_queue,
        NullPool: only_queue | {"pool_size"},
        StaticPool: only_queue | {"pool_size"},
    }
    assert call(compare) == expected[pool_class]


@pytest.mark.parametrize("pool_class", POOL_CLASSES)
def test_the_comparison_sees_every_option(url: str, pool_class: type[Pool]) -> None:
    """The traits of engines differ by each option that has more than one value."""
    unseen = {
        "connect_args": "in the connection",
        "creator": "in the connection",
        "echo": "its default",
        "echo_pool": "its default",
        "empty_in_strategy": "deprecated, without effect",
        "future": "only True is allowed",
        "implicit_returning": "only True is allowed",
        "module": "its default",
        "pool_events": "in the connection",
    }
    default = plain_engine(url, pool_class, {})
    assert default is not None
    for name in OPTIONS.keys() - unseen.keys():
        engine = plain_engine(url, pool_class, {name: OPTIONS[name]})
        assert engine is None or traits(engine) != traits(default), name


@DEPRECATED
@in_both_phases
def test_every_option_is_taken_where_the_manager_chooses_the_pool(
    url: str,
    call: Callable,
    manager_class: ManagerClass,
    options: dict[str, Any],
    adapt: Callable,
) -> None:
    """Without an explicit pool class no option is refused: those of other pools are set aside."""

    def compare() -> None:
        for name, value in options.items():
            with manager_class(engine_options={name: value}) as manager:
                chosen = adapt(QueuePool) if manager.forked else NullPool
                plain = chosen_engine(url, chosen, {name: value})
                assert managed(manager, url) == traits(plain), name
                assert managed(manager, url, **{name: value}) == traits(plain), name

    call(compare)


@in_both_phases
@pytest.mark.twin_cases(pool_class=ASYNC_POOLS)
@pytest.mark.parametrize("pool_class", [None, *POOL_CLASSES])
def test_options_of_the_connection_reach_it(
    tmp_path: Path,
    call: Callable,
    pool_class: type[Pool] | None,
    manager_class: ManagerClass,
    sqlite: str,
    adapt: Callable,
) -> None:
    """``connect_args``, ``creator``, ``pool_events`` and ``echo`` work in both phases."""
    asynchronous = manager_class is not SessionManager
    creator = {"async_creator": connect_async} if asynchronous else {"creator": connect}
    seen: list[str] = []
    options: dict[str, Any] = {
        "pool_events": [(lambda *_: seen.append("event"), "connect")],
        "connect_args": {"factory": Connection},
    }
    if pool_class is not None:
        options["poolclass"] = adapt(pool_class)

    def use() -> None:
        with manager_class(engine_options=options) as manager:
            with manager.get_engine(f"{sqlite}:///{tmp_path / 'one.db'}").connect() as connection:
                driver = connection.connection.driver_connection
                assert isinstance(driver._conn if asynchronous else driver, Connection)
            assert seen == ["event"]
            made = manager.get_engine(f"{sqlite}:///{tmp_path / 'two.db'}", **creator)
            with made.connect() as connection:
                assert connection.exec_driver_sql("PRAGMA database_list").all() == [(0, "main", "")]
            assert not (tmp_path / "two.db").exists()

    call(use)


class Connection(sqlite3.Connection):
    """A connection that is told from others."""


LAYERS = ["manager", "bind", "call"]


def layered(
    manager_class: ManagerClass, layer: str, url: str, options: dict[str, Any]
) -> tuple[SessionManager, dict[str, Any]]:
    """Make a manager with the database ``"one"``, and the options for its next call.

    :param layer: where the options stand: one of :data:`LAYERS`.
    """
    bind = {"url": url} | (options if layer == "bind" else {})
    given = options if layer == "manager" else {}
    manager = manager_class(binds={"one": bind}, engine_options=given)
    return manager, options if layer == "call" else {}


@in_both_phases
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("pool_class", [*POOL_CLASSES, AssertionPool])
@pytest.mark.parametrize("memory", [False, True], ids=["file", "memory"])
@pytest.mark.twin_cases(call=[in_child], pool_class=ASYNC_POOLS)
def test_explicit_pool_class_wins(
    url: str,
    call: Callable,
    layer: str,
    pool_class: type[Pool],
    memory: bool,
    manager_class: ManagerClass,
    sqlite: str,
    adapt: Callable,
) -> None:
    """A pool class that a user names is used, whatever the phase, the layer and the database."""
    adapted, dburi = adapt(pool_class), f"{sqlite}://" if memory else url

    def make() -> bool:
        manager, options = layered(manager_class, layer, dburi, {"poolclass": adapted})
        with manager:
            return isinstance(manager.get_engine("one", **options).pool, adapted)

    assert call(make)


@pytest.mark.parametrize("pooling", ["always", "never"])
def test_pooling_chooses_where_no_pool_class_is_named(
    url: str, pooling: Any, manager_class: ManagerClass, adapt: Callable
) -> None:
    """``pooling`` overrides the phase, and an explicit pool class overrides ``pooling``."""
    with manager_class(pooling=pooling, engine_options={"pool_size": 3}) as manager:
        chosen = adapt(QueuePool) if pooling == "always" else NullPool
        assert isinstance(manager.get_engine(url).pool, chosen)
        [stats] = manager.stats().databases
        assert stats.size == (3 if pooling == "always" else None)
        other = manager.get_engine(f"{url}.2", poolclass=StaticPool)
        assert isinstance(other.pool, StaticPool)


@DEPRECATED
@in_both_phases
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.twin_cases(call=[in_child])
def test_options_do_not_switch_the_health_defaults_off(
    url: str,
    call: Callable,
    layer: str,
    manager_class: ManagerClass,
    options: dict[str, Any],
    adapt: Callable,
) -> None:
    """Naming one option keeps recycling, LIFO and the liveness test as they are by default."""

    def make(given: dict[str, Any]) -> tuple[int, bool, float]:
        manager, kwargs = layered(manager_class, layer, url, given)
        with manager:
            pool = manager.get_engine("one", **kwargs).pool
            [entry] = manager._registry.entries()
            assert isinstance(pool, adapt(QueuePool) if manager.forked else NullPool)
            lifo = pool._pool.use_lifo if isinstance(pool, QueuePool) else True
            return pool._recycle, lifo, entry.monitor._ping_if_idle

    def make_each() -> dict[str, tuple[int, bool, float]]:
        names = options.keys() - HEALTH.keys() - {"pool_use_lifo"}
        return {name: make({name: options[name]}) for name in names} | {"none": make({})}

    assert set(call(make_each).values()) == {(3600, True, 1.0)}


def window(manager_class: ManagerClass, url: str, *layers: dict[str, Any]) -> Any:
    """Return ``ping_if_idle`` as it results from options of the manager, a bind and a call."""
    manager_options, bind_options, call_options = layers
    binds = {"one": {"url": url} | bind_options}
    with manager_class(binds=binds, engine_options=manager_options) as manager:
        manager.get_engine("one", **call_options)
        [entry] = manager._registry.entries()
        assert entry.engine.pool._pre_ping is False  # a ping at each checkout is never paid for
        return entry.monitor._ping_if_idle


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (({}, {}, {}), 1.0),
        (({"pool_pre_ping": True}, {}, {}), 1.0),
        (({"pool_pre_ping": False}, {}, {}), NEVER),
        (({"ping_if_idle": 5}, {"pool_pre_ping": True}, {}), 5),
        (({"pool_pre_ping": False}, {}, {"pool_pre_ping": True}), 1.0),
        (({"pool_pre_ping": True}, {"pool_pre_ping": False}, {}), NEVER),
        (({"ping_if_idle": 5}, {"ping_if_idle": 0}, {}), 0),
        (({"ping_if_idle": None}, {}, {"ping_if_idle": 2.5}), 2.5),
        (({"pool_pre_ping": True, "ping_if_idle": 3}, {}, {}), 3),
        (({"pool_pre_ping": False, "ping_if_idle": None}, {}, {}), NEVER),
    ],
)
def test_pool_pre_ping_means_the_liveness_test(
    layers: tuple[dict[str, Any], ...], expected: float, manager_class: ManagerClass, url: str
) -> None:
    """``pool_pre_ping`` and ``ping_if_idle`` speak of one test; the nearest layer has its say."""
    assert window(manager_class, url, *layers) == expected

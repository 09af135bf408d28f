"""Engine options that contradict each other, or that cannot be, raise and change nothing."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from sessionmgr import DatabaseURLError, EngineOptionsError, NoSuchBindError
from tests.concurrency import here, in_both_phases
from tests.items import ItemBase

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.async_facade import ManagerClass

pytestmark = pytest.mark.twin_cases(call=[here])

URL = "postgresql+psycopg://u@h/d"

A_POOL = QueuePool(lambda: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": -1},
        {"pool_size": 2.5},
        {"pool_size": "5"},
        {"pool_size": True},
        {"max_overflow": -2},
        {"pool_timeout": -1},
        {"pool_timeout": "soon"},
        {"pool_recycle": -2},
        {"ping_if_idle": -0.1},
        {"ping_if_idle": "1"},
        {"poolclass": "QueuePool"},
        {"poolclass": A_POOL},
        {"pool": A_POOL},
    ],
    ids=lambda options: str(options).replace(repr(A_POOL), "a pool"),
)
@pytest.mark.parametrize("layer", ["engine_options", "binds", "call"])
def test_values_that_cannot_be_raise_where_they_are_given(
    options: dict[str, Any],
    layer: str,
    manager_class: ManagerClass,
) -> None:
    """A wrong value raises with its name and where it stands, before anything is made."""
    [name] = options
    origins = {
        "engine_options": "engine_options",
        "binds": "binds\\['one'\\]",
        "call": "this call",
    }

    def give() -> None:
        if layer == "engine_options":
            manager_class(engine_options=options)
        elif layer == "binds":
            manager_class(binds={"one": {"url": URL} | options})
        else:
            with manager_class() as manager:
                manager.get_engine(URL, **options)

    with pytest.raises(EngineOptionsError, match=f"{origins[layer]}.*{name}"):
        give()


@pytest.mark.parametrize(
    ("pre_ping", "window"), [(True, None), (False, 1.0), (False, 0)], ids=["on", "off", "always"]
)
def test_two_names_for_the_liveness_test_must_agree(
    pre_ping: bool, window: float | None, manager_class: ManagerClass
) -> None:
    """``pool_pre_ping`` and ``ping_if_idle`` of one layer raise when they contradict."""
    options = {"pool_pre_ping": pre_ping, "ping_if_idle": window}
    with pytest.raises(
        EngineOptionsError, match=f"'pool_pre_ping': {pre_ping}, 'ping_if_idle': {window}"
    ):
        manager_class(engine_options=options)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pooling": "sometimes"},
        {"pooling": True},
        {"max_engines": 0},
        {"max_engines": -1},
        {"max_engines": 2.0},
        {"max_engines": True},
    ],
    ids=str,
)
def test_arguments_of_the_manager_are_checked(
    arguments: dict[str, Any], manager_class: ManagerClass
) -> None:
    """What a manager cannot do raises at once, with the argument's name and value."""
    [(name, value)] = arguments.items()
    with pytest.raises(EngineOptionsError, match=f"{name} must be .*{value!r}"):
        manager_class(**arguments)


@pytest.mark.parametrize(
    ("binds", "match"),
    [
        ({"one": {"pool_size": 3}}, r"binds\['one'\] has no 'url'; it has 'pool_size'"),
        ({"one": "nonsense"}, "cannot read the database URL"),
        ({"one": 7}, "not by int"),
        ({"sqlite://": "sqlite://"}, "a bind key is a string without '://'"),
        ({7: "sqlite://"}, "a bind key is a string"),
    ],
    ids=["no url", "no URL", "number", "key", "key of another type"],
)
def test_binds_are_checked(binds: Any, match: str, manager_class: ManagerClass) -> None:
    """A bind without a URL that can be read, or with a key that is one, raises at once."""
    with pytest.raises(DatabaseURLError, match=match):
        manager_class(binds=binds)


def test_unknown_bind_key_names_those_there_are(manager_class: ManagerClass, sqlite: str) -> None:
    """A bind key that is not there raises with the list of those that are."""
    with manager_class(binds={"users": f"{sqlite}://", "logs": f"{sqlite}://"}) as manager:
        for method in (manager.get_engine, manager.session_factory, manager.invalidate):
            with pytest.raises(NoSuchBindError, match=r"no bind key 'user'.*'logs', 'users'"):
                method("user")


@in_both_phases
@pytest.mark.parametrize("layer", ["engine_options", "binds", "call"])
def test_unknown_options_raise(call: Callable, layer: str, manager_class: ManagerClass) -> None:
    """An option that SQLAlchemy does not know raises with its name; no engine is kept."""

    def give() -> tuple[str, int]:
        wrong = {"pol_size": 3}
        bind = {"url": URL} | (wrong if layer == "binds" else {})
        general = wrong if layer == "engine_options" else {}
        with manager_class(binds={"one": bind}, engine_options=general) as manager:
            with pytest.raises(EngineOptionsError) as caught:
                manager.get_engine("one", **(wrong if layer == "call" else {}))
            return str(caught.value), len(manager._engines)

    told, engines = call(give)
    assert "'pol_size'" in told
    assert "'one' (postgresql+psycopg://u@h/d)" in told
    assert engines == 0


@in_both_phases
@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"pool_size": 3}, {"pool_size": 4}, ["{'pool_size': 3}", "{'pool_size': 4}"]),
        ({}, {"pool_size": 4}, ["none of these options", "{'pool_size': 4}"]),
        ({}, {"echo": False}, ["none of these options", "{'echo': False}"]),
        ({}, {"pool_recycle": 9}, ["{'pool_recycle': 3600}", "{'pool_recycle': 9}"]),
        ({}, {"pool_pre_ping": False}, ["{'ping_if_idle': 1.0}", "{'ping_if_idle': None}"]),
        ({"poolclass": NullPool}, {"poolclass": StaticPool}, ["NullPool", "StaticPool"]),
        ({}, {"unknown": 1}, ["none of these options", "{'unknown': 1}"]),
        (
            {"connect_args": {"user": "a", "password": "b"}},
            {"connect_args": {"user": "c", "password": "d"}},
            ["{'user': 'a', 'password': ***}", "{'user': 'c', 'password': ***}"],
        ),
    ],
    ids=["other", "new", "default", "recycle", "ping", "poolclass", "unknown", "nested"],
)
def test_calls_that_differ_from_the_engine_raise_with_both_sides(
    call: Callable,
    first: dict[str, Any],
    second: dict[str, Any],
    told: list[str],
    manager_class: ManagerClass,
) -> None:
    """Other options than those of the cached engine raise with both; the engine stays."""

    def ask() -> str:
        with manager_class() as manager:
            engine = manager.get_engine(URL, **first)
            messages = set()
            for method in (manager.get_engine, manager.create_session, manager.session_factory):
                with pytest.raises(EngineOptionsError) as caught:
                    method(URL, **second)
                messages.add(str(caught.value))
            assert manager.get_engine(URL) is engine
            [message] = messages
            return message

    there, _, asked = call(ask).partition("but this call asks for")
    assert "postgresql+psycopg://u@h/d" in there
    assert told[0] in there
    assert told[1] in asked


@in_both_phases
def test_calls_that_agree_with_the_engine_get_it(
    call: Callable, manager_class: ManagerClass
) -> None:
    """Naming the engine's options again, its defaults, or none, gives the cached engine."""

    def ask() -> int:
        with manager_class(engine_options={"pool_size": 3}) as manager:
            options = {"max_overflow": 2, "connect_args": {"user": "a"}}
            engine = manager.get_engine(URL, **options)
            agreeing = [
                {},
                options,
                {"pool_size": 3},
                {"pool_recycle": 3600, "pool_use_lifo": True},
                {"pool_pre_ping": True},
                {"ping_if_idle": 1},
                {"connect_args": {"user": "a"}},
            ]
            return sum(manager.get_engine(URL, **again) is engine for again in agreeing)

    assert call(ask) == 7


def test_other_options_after_invalidate_are_taken(manager_class: ManagerClass) -> None:
    """Once a database was invalidated, a call may name other options."""
    with manager_class(pooling="always") as manager:
        manager.get_engine(URL, pool_size=3)
        manager.invalidate(URL)
        manager.get_engine(URL, pool_size=4)
        assert [stats.size for stats in manager.stats().databases] == [4]


@in_both_phases
def test_pool_class_named_later_sets_earlier_options_aside(
    call: Callable, manager_class: ManagerClass
) -> None:
    """A call's pool class drops what general options say for others, and the rest stays."""

    def make() -> str:
        general = {"pool_size": 3, "max_overflow": 1, "pool_timeout": 5, "pool_recycle": 77}
        with manager_class(engine_options=general) as manager:
            engine = manager.get_engine(URL, poolclass=NullPool)
            assert engine.pool._recycle == 77
            return type(engine.pool).__name__

    assert call(make) == "NullPool"


@in_both_phases
@pytest.mark.parametrize("pool_layer", ["engine_options", "binds", "call"])
@pytest.mark.parametrize("option_layer", ["engine_options", "binds", "call"])
def test_option_beside_or_after_a_pool_class_that_lacks_it_raises(
    call: Callable,
    pool_layer: str,
    option_layer: str,
    manager_class: ManagerClass,
) -> None:
    """Both sides are named, with their layers, where a pool class does not take an option."""
    names = ["engine_options", "binds", "call"]
    layers: dict[str, dict[str, Any]] = {name: {} for name in names}
    layers[pool_layer]["poolclass"] = NullPool
    layers[option_layer]["pool_size"] = 3

    def make() -> str:
        binds = {"one": {"url": URL} | layers["binds"]}
        with manager_class(binds=binds, engine_options=layers["engine_options"]) as manager:
            try:
                return type(manager.get_engine("one", **layers["call"]).pool).__name__
            except EngineOptionsError as error:
                return str(error)

    found = call(make)
    if names.index(option_layer) < names.index(pool_layer):
        assert found == "NullPool"
    else:
        origins = {"engine_options": "engine_options", "binds": "binds['one']", "call": "this call"}
        assert f"{origins[option_layer]} asks for {{'pool_size': 3}}" in found
        assert f"NullPool, the poolclass of {origins[pool_layer]}" in found or (
            "NullPool" in found and origins[pool_layer] in found
        )


@in_both_phases
def test_dictionaries_of_the_caller_are_never_changed(
    tmp_path: Path, call: Callable, manager_class: ManagerClass, sqlite: str
) -> None:
    """What a caller gives is as it was after engines were made and sessions used, in depth."""
    url = f"{sqlite}:///{tmp_path / 'one.db'}"
    engine_options: dict[str, Any] = {
        "pool_pre_ping": True,
        "ping_if_idle": 2.0,
        "pool_size": 3,
        "connect_args": {"timeout": 5.0},
        "execution_options": {"stream_results": True},
        "plugins": [],
        "pool_events": [],
    }
    given: dict[str, Any] = {
        "engine_options": engine_options,
        "session_options": {"expire_on_commit": False, "info": {"a": 1}},
        "binds": {
            "files": {"url": url, "connect_args": {"timeout": 6.0}, "pool_pre_ping": False},
            "memory": {"url": f"{sqlite}://", "connect_args": {"timeout": 1.0}},
        },
    }
    kwargs = {"connect_args": {"timeout": 9.0}, "pool_pre_ping": True}
    before = copy.deepcopy((given, kwargs))

    def use() -> Any:
        with manager_class(metadata=ItemBase.metadata, **given) as manager:
            for dburi, options in (("files", {}), ("memory", {}), (url, kwargs)):
                with manager.begin(dburi, **options) as session:
                    session.info["b"] = 2
                manager.invalidate(dburi)
        return given, kwargs

    assert call(use) == before


def test_later_changes_by_the_caller_change_nothing(manager_class: ManagerClass) -> None:
    """A manager copies its configuration: what the caller does to the dictionaries is not seen."""
    options: dict[str, Any] = {"pool_size": 3, "connect_args": {"application_name": "before"}}
    session_options = {"autoflush": False}
    binds: dict[str, Any] = {"one": {"url": URL, "pool_timeout": 5}}
    with manager_class(
        binds=binds, engine_options=options, session_options=session_options, pooling="always"
    ) as manager:
        options["pool_size"] = 9
        options["connect_args"]["application_name"] = "after"
        session_options["autoflush"] = True
        binds["one"]["pool_timeout"] = 9
        binds["two"] = URL

        engine, factory = manager.create_session("one")
        assert (engine.pool.size(), engine.pool._timeout) == (3, 5)
        assert factory().autoflush is False
        assert manager.get_engine("one", connect_args={"application_name": "before"}) is engine
        with pytest.raises(NoSuchBindError):
            manager.get_engine("two")


@pytest.mark.parametrize(
    "value", [int, None, "Session", Session()], ids=["int", "None", "text", "object"]
)
def test_session_class_has_to_be_one(value: Any, manager_class: ManagerClass) -> None:
    """What sessions are to be made of raises when it is given, not when one is made."""
    with pytest.raises(EngineOptionsError, match=r"class_ must be a subclass of \w*Session, not"):
        manager_class(session_options={"class_": value})

"""A manager pickles as its configuration, and says what of it cannot."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, event, make_url
from sqlalchemy.pool import StaticPool

from sessionmgr import ManagerPickleError, SessionManager
from tests.items import Item, ItemBase, item_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.async_facade import ManagerClass


def name_engine(engine: Engine) -> None:
    """Mark an engine, as a callback that can be imported by name."""
    event.listen(engine, "connect", lambda *_: None)
    engine.update_execution_options(marked=True)


def copy(manager: SessionManager) -> SessionManager:
    """Return what arrives in another process."""
    arrived = pickle.loads(pickle.dumps(manager))  # noqa: S301 - our own
    assert type(arrived) is type(manager)
    return arrived


def test_configuration_arrives(tmp_path: Path, manager_class: ManagerClass, sqlite: str) -> None:
    """Callback, metadata, binds, pooling, options and limit are those of the original."""
    url = make_url(f"{sqlite}:///{tmp_path / 'one.db'}")
    original = manager_class(
        name_engine,
        metadata=ItemBase.metadata,
        binds={"files": {"url": url, "pool_size": 2}, "memory": f"{sqlite}://"},
        pooling="always",
        engine_options={"pool_size": 7, "pool_pre_ping": False},
        session_options={"expire_on_commit": False},
        max_engines=3,
    )
    with original, copy(original) as arrived:
        for name, size in (("files", 2), (url, 7)):
            engine, factory = arrived.create_session(name)
            assert engine is not original.get_engine(name)
            assert (engine.url, engine.pool.size()) == (url, size)
            assert engine.get_execution_options()["marked"] is True
            assert factory().expire_on_commit is False
        assert isinstance(arrived.get_engine("memory").pool, StaticPool)
        entries = arrived._registry.entries()
        assert [entry.requested["ping_if_idle"] for entry in entries] == [None] * 3
        assert arrived.metadata.tables.keys() == ItemBase.metadata.tables.keys()
        assert (arrived.pooling, arrived._max_engines) == ("always", 3)


def test_state_stays_behind(tmp_path: Path, manager_class: ManagerClass, sqlite: str) -> None:
    """Engines, sessions and what is known of tables are not part of the pickle."""
    url = f"{sqlite}:///{tmp_path / 'one.db'}"
    with manager_class(metadata=ItemBase.metadata, pooling="always") as original:
        with original.begin(url) as session:
            session.add(Item(name="row"))
        before = original.stats()
        with copy(original) as arrived:
            assert arrived._engines == {}
            assert arrived.prepared == frozenset()
            with arrived.session_factory(url) as session:
                assert item_names(session) == ["row"]
        assert original.stats() == before


def test_pickle_of_a_copy_is_the_same(manager_class: ManagerClass, sqlite: str) -> None:
    """A pickle can be passed on, and again."""
    with (
        manager_class(binds={"one": f"{sqlite}://"}, engine_options={"echo": False}) as original,
        copy(original) as first,
        copy(first) as second,
    ):
        assert first.__reduce__()[1] == second.__reduce__()[1] == original.__reduce__()[1]


def test_default_metadata_is_the_other_processs_base(manager_class: ManagerClass) -> None:
    """Without ``metadata`` the tables are not in the pickle: the copy asks its own ``Base``."""
    with manager_class() as original, copy(original) as arrived:
        assert arrived.metadata is original.metadata


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"engine_callback": lambda _: None}, "engine_callback"),
        ({"engine_callback": [name_engine, lambda _: None]}, "engine_callback"),
        ({"engine_options": {"creator": lambda: None}}, "engine_options"),
        ({"session_options": {"query_cls": lambda: None}}, "session_options"),
        ({"binds": {"one": {"url": "sqlite://", "creator": lambda: None}}}, "binds"),
    ],
    ids=["callback", "callbacks", "engine_options", "session_options", "binds"],
)
def test_what_cannot_be_pickled_is_named(
    arguments: dict[str, Any], name: str, manager_class: ManagerClass
) -> None:
    """A lambda somewhere in the configuration raises with the argument it stands in."""
    with (
        manager_class(**arguments) as manager,
        pytest.raises(ManagerPickleError, match=f"^{name} of this (Async)?SessionManager"),
    ):
        pickle.dumps(manager)


def test_password_survives_the_pickle(manager_class: ManagerClass, as_twin: Callable) -> None:
    """The copy can connect: a pickle is a secret, as its parts are."""
    url = as_twin(make_url("mysql+pymysql://u@host/db").set(password="pw"))
    with manager_class(binds={"one": url}) as original, copy(original) as arrived:
        assert arrived.get_engine("one").url.password == "pw"

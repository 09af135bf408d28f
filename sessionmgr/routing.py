"""Sessions over several databases: each statement goes to that of its tables' bind key."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import (
    CompoundSelect,
    Join,
    MetaData,
    Select,
    Sequence,
    StatementLambdaElement,
    Table,
    event,
    inspect,
)
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import InvalidRequestError, NoInspectionAvailable
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.exc import UnmappedClassError
from sqlalchemy.schema import ExecutableDDLElement, SchemaItem
from sqlalchemy.sql import visitors
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.functions import next_value
from sqlalchemy.sql.selectable import AliasedReturnsRows

from .binds import DEFAULT
from .errors import SpannedBindsError
from .greenlets import in_greenlet
from .primary_keys import DEFAULTS, PARAMETER, select_by_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import SessionTransaction

__all__ = ("RoutedSession", "bind_key_of", "check_spans", "find_metadata", "find_table", "routed")

_mapped: WeakKeyDictionary[Mapper[Any], MetaData | None] = WeakKeyDictionary()


def find_metadata(mapper: Any, clause: Any) -> MetaData | None:
    """Find the metadata of what a statement is about.

    :param mapper: a mapper, a mapped class or an alias of one; or ``None``.
    :param clause: a table or a statement, looked at where the mapper has no table; or ``None``.
    :return: ``None`` where there is neither a table nor a sequence, as with ``text()``.
    :raises SpannedBindsError: when the class is mapped to tables of several bind keys.
    """
    if mapper is not None:
        try:
            metadata = _mapped[mapper]
        except (KeyError, TypeError):
            metadata = _metadata_of_mapper(_mapper_of(mapper))
        if metadata is not None:
            return metadata
    if clause is None:
        return None
    table = find_table(clause)
    return _metadata_of_sequence(clause) if table is None else table.metadata


def _metadata_of_sequence(clause: Any) -> MetaData | None:
    """Find the metadata of the first sequence of a statement, or of a part of one."""
    if isinstance(clause, ExecutableDDLElement):
        clause = getattr(clause, "element", clause)
    for part in [clause] if isinstance(clause, SchemaItem) else visitors.iterate(clause):
        sequence = part.sequence if isinstance(part, next_value) else part
        if isinstance(sequence, Sequence) and sequence.metadata is not None:
            return sequence.metadata
    return None


def _mapper_of(mapped: Any) -> Mapper[Any]:
    try:
        mapper: Mapper[Any] = inspect(mapped).mapper
    except NoInspectionAvailable:
        if isinstance(mapped, type):
            raise UnmappedClassError(mapped) from None
        raise
    return mapper


def _metadata_of_mapper(mapper: Mapper[Any]) -> MetaData | None:
    try:
        return _mapped[mapper]
    except KeyError:  # not looked for first: another thread may empty it in between
        pass
    _check_family(mapper)
    own, tables = mapper.local_table, _tables_of(mapper)
    table = own if isinstance(own, Table) else next(iter(tables), None)
    metadata = _mapped[mapper] = None if table is None else table.metadata
    return metadata


def _check_family(mapper: Mapper[Any]) -> None:
    """See that a class and its kin are of one bind key: a flush asks for the base of all of them.

    :raises SpannedBindsError: when they are not.
    """
    family = list(mapper.base_mapper.self_and_descendants)
    for each in family:
        _check_one_key(_tables_of(each), f"class {each.class_.__name__} is mapped to")
    tables = [table for each in family for table in _tables_of(each)]  # of concrete ones: one each
    _check_one_key(tables, f"class {mapper.class_.__name__} and its kin are mapped to")
    for relation in mapper.relationships:
        if isinstance(relation.secondary, Table):  # its rows go where the target's do
            tables = [relation.secondary, *_tables_of(relation.mapper)]
            _check_one_key(tables, f"{relation} goes through and to")


def _tables_of(mapper: Mapper[Any]) -> list[Table]:
    """List the tables of a class, and of those that it is joined to by inheritance."""
    return [table for table in mapper.tables if isinstance(table, Table)]


@event.listens_for(Mapper, "after_configured")
def _look_again() -> None:
    """Forget what was found out: classes may have got descendants."""
    _mapped.clear()


def find_table(clause: Any) -> Table | None:
    """Find the first table of a statement: what DML writes to, or what a query reads from.

    :param clause: a statement, or a part of one: a table, an alias, a join, a subquery, a CTE.
    """
    if isinstance(clause, Select):
        # what takes a tenth of the time of a walk through the statement
        source = getattr(next(iter(clause.inner_columns), None), "table", None)
        if isinstance(source, Table):
            return source
        source = _go_down(source)
        found = find_table(source) if isinstance(source, (Table, Select, UpdateBase)) else None
        if found is not None:
            return found
    if isinstance(clause, UpdateBase):
        return find_table(clause.table)
    if isinstance(clause, ExecutableDDLElement):
        clause = getattr(clause, "element", clause)
    if isinstance(clause, SchemaItem):
        return clause if isinstance(clause, Table) else getattr(clause, "table", None)
    elements = visitors.iterate(clause)
    return next((element for element in elements if isinstance(element, Table)), None)


def _go_down(source: Any) -> Any:
    """Go to what is first in joins, and under aliases, subqueries and CTEs."""
    while isinstance(source, (AliasedReturnsRows, Join)):
        source = source.left if isinstance(source, Join) else source.element
    return source


def bind_key_of(table: Table) -> str | None:
    """Give the bind key of a table: ``info["bind_key"]`` of its metadata."""
    key: str | None = table.metadata.info.get("bind_key")
    return key


_Engines = dict["MetaData | str | None", "Engine"]


#: Statements of which SQLAlchemy tells ``get_bind`` nothing, where they are of mapped classes.
_UNTOLD = (CompoundSelect, StatementLambdaElement)


def _tell(statement: Any, options: dict[str, Any]) -> None:
    """Have ``get_bind`` told of a statement."""
    options["bind_arguments"] = {"clause": statement, **(options.get("bind_arguments") or {})}


class RoutedSession(Session):
    """A session that picks the engine of each statement by the bind key of its tables.

    The key is ``metadata.info["bind_key"]`` of the mapped class or the table that the statement is
    about, or of a sequence where there is no table; without one it is ``"default"``.
    ``bind_arguments`` come first: ``{"bind": engine}``, or ``{"bind_key": "logs"}``, which also
    serves text. So does an Engine or a Connection that the session is bound to.

    A commit commits on every database that the transaction used, one after another. When one of
    them fails, those before it are committed for good: with ``twophase=True`` each database first
    promises to commit, where it can.
    """

    #: A transaction, None where it has not begun, and the engines that it uses, whatever the
    #: manager does with them meanwhile: by the metadata of tables, and by bind key.
    _pins: tuple[SessionTransaction | None, _Engines] | None = None

    @abstractmethod
    def _find_engine(
        self,
        bind_key: str | None,
        metadata: MetaData | None,
        connection: Callable[[], Connection] | None,
    ) -> Engine:
        """Give the engine of a bind key.

        :param metadata: the tables that are asked for, where there are any.
        :param connection: gives the transaction's connection, if it uses this database already.
        :raises NoSuchBindError: when there is none.
        """

    if not TYPE_CHECKING:  # for callers they have SQLAlchemy's types

        def get(self, entity: Any, ident: Any, **options: Any) -> Any:
            """Give the object with a primary key, as SQLAlchemy's :meth:`get` does; sooner.

            :param entity: the class.
            :param ident: the primary key.
            :param options: those of SQLAlchemy's.
            """
            plain = options.items() <= DEFAULTS.items()  # scoped_session names them all
            statement = select_by_key(self, entity, ident) if plain else None
            if statement is None:
                return super().get(entity, ident, **options)
            return self.execute(statement, {PARAMETER: ident}).unique().scalars().one_or_none()

        def execute(self, statement: Any, *args: Any, **options: Any) -> Any:
            """Execute a statement, as SQLAlchemy does."""
            if isinstance(statement, _UNTOLD):
                _tell(statement, options)
            return super().execute(statement, *args, **options)

        def scalar(self, statement: Any, *args: Any, **options: Any) -> Any:
            """Execute a statement and give one value, as SQLAlchemy does."""
            if isinstance(statement, _UNTOLD):
                _tell(statement, options)
            return super().scalar(statement, *args, **options)

        def scalars(self, statement: Any, *args: Any, **options: Any) -> Any:
            """Execute a statement and give values, as SQLAlchemy does."""
            if isinstance(statement, _UNTOLD):
                _tell(statement, options)
            return super().scalars(statement, *args, **options)

    def get_bind(
        self,
        mapper: Any = None,
        clause: Any = None,
        bind: Engine | Connection | None = None,
        *,
        bind_key: str | None = None,
        **kwargs: Any,
    ) -> Engine | Connection:
        """Give the engine for a statement.

        :param mapper: the mapper, or mapped class, that it is about.
        :param clause: the statement itself.
        :param bind: wins over everything else.
        :param bind_key: wins over the tables.
        :raises NoSuchBindError: when there is no database of the tables' bind key.
        :raises SpannedBindsError: when a class is mapped to tables of several bind keys.
        """
        if bind is not None or self.bind is not None:
            return super().get_bind(mapper, clause=clause, bind=bind, **kwargs)
        metadata = find_metadata(mapper, clause) if bind_key is None else None
        engines = self._pinned()
        slot = bind_key if metadata is None else metadata
        engine = engines.get(slot)
        return self._pin(engines, bind_key, metadata) if engine is None else engine

    def _pin(self, engines: _Engines, bind_key: str | None, metadata: MetaData | None) -> Engine:
        if metadata is not None:
            bind_key = metadata.info.get("bind_key")
        key = DEFAULT if bind_key is None else bind_key
        used = engines.get(key)
        connection = None if used is None else functools.partial(_connection, self, used)
        engine = engines.setdefault(key, self._find_engine(bind_key, metadata, connection))
        if self.twophase:
            _check_twophase(engine, key)
        if metadata is None:
            engines[bind_key] = engine
        elif not engine.dialect.is_async or in_greenlet():
            engines[metadata] = engine  # else its tables were not looked at
        return engine

    def _pinned(self) -> _Engines:
        """Give the engines of the transaction, or of the one that is about to begin.

        What was asked for before it and was not used may not be the key's engine any more.
        """
        transaction = self.get_transaction()
        before, engines = self._pins or (None, {})
        if transaction is not None and before is transaction:
            return engines
        if transaction is None or before is not None or not _uses(transaction, engines):
            engines = {}
        self._pins = transaction, engines
        return engines


def _uses(transaction: SessionTransaction, engines: _Engines) -> bool:
    return any(engine in transaction._connections for engine in engines.values())


def _connection(session: Session, engine: Engine) -> Connection:
    return session.connection(bind_arguments={"bind": engine})


def _check_twophase(engine: Engine, key: str) -> None:
    if type(engine.dialect).do_begin_twophase is DefaultDialect.do_begin_twophase:
        raise InvalidRequestError(
            f"database {key!r}: {engine.dialect.name} has no two-phase commit, which this session"
            " was asked for: open it without twophase=True, and see that its last commit may fail"
            " after the others"
        )


def routed(session_class: type[Session], find_engine: Callable[..., Engine]) -> type[RoutedSession]:
    """Make the routed form of a class of sessions: a subclass of the same name.

    Its own methods come first, with ``super()`` they reach the router's.

    :param find_engine: what :meth:`RoutedSession._find_engine` is to be.
    """
    plain = issubclass(RoutedSession, session_class)
    bases = (RoutedSession,) if plain else (session_class, RoutedSession)
    names = {
        "__module__": session_class.__module__,
        "__doc__": session_class.__doc__,
        "_find_engine": staticmethod(find_engine),
    }
    return type(session_class.__name__, bases, names)


# -- statements over several databases


class _Checking(SQLCompiler):
    """What a dialect's compiler gains by :func:`check_spans`."""

    #: the tables that the statement has so far
    _tables: tuple[Table, ...] = ()

    def visit_table(self, table: Any, *args: Any, **kwargs: Any) -> str:
        self._see(table)
        text: str = super().visit_table(table, *args, **kwargs)  # type: ignore[no-untyped-call]
        return text

    def visit_insert(self, insert_stmt: Any, *args: Any, **kwargs: Any) -> str:
        self._see(insert_stmt.table)
        text: str = super().visit_insert(insert_stmt, *args, **kwargs)  # type: ignore[no-untyped-call]
        return text

    def _see(self, table: Any) -> None:
        # a name with a schema may well be of another database on the same server
        if isinstance(table, Table) and table.schema is None and table not in self._tables:
            self._tables = (*self._tables, table)
            dialect: Any = self.dialect
            _check_one_key(self._tables, "a statement is over", dialect.bind_urls)


@functools.cache
def _checking(compiler: Any) -> Any:
    return type(compiler.__name__, (_Checking, compiler), {"__module__": compiler.__module__})


def check_spans(engine: Engine, urls: Callable[[str], object]) -> None:
    """Have an engine refuse statements over tables of several databases.

    They are looked at when they are compiled, which SQLAlchemy does once for a kind of statement.

    :param urls: gives what tells one database from another, for a bind key.
    """
    dialect: Any = engine.dialect
    dialect.bind_urls = urls
    dialect.statement_compiler = _checking(dialect.statement_compiler)


def _check_one_key(
    tables: Iterable[Table], what: str, urls: Callable[[str], object] = lambda key: key
) -> None:
    by_key: dict[str, str] = {}
    for table in tables:
        key = bind_key_of(table)
        by_key.setdefault(DEFAULT if key is None else key, table.name)
    if len(by_key) > 1 and len({urls(key) for key in by_key}) > 1:
        listed = ", ".join(f"{name!r} of bind key {key!r}" for key, name in by_key.items())
        raise SpannedBindsError(
            f"{what} tables of several databases: {listed}. No server can join them: load the"
            " objects of each by a statement of its own (of a relationship, by lazy='select' or"
            " selectinload), or keep these tables under one bind key"
        )

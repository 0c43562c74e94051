"""Statements of the path that every turn takes, whose SQL Django makes once.

Building and compiling a query takes Django five to ten times as long as SQLite needs to execute it, and a turn is some
thirty of them. What they are is said with querysets as everywhere else; what changes from one execution to the next
stands in them as a `Slot`. All else, as a query's time limit and who may be asked, is as in Django: they go through its
cursors and its fields.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter, methodcaller
from typing import Any, Generic, TypeVar

import orjson
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import AutoField, BooleanField, CharField, Field, IntegerField, Model, QuerySet, TextField, Value
from django.db.models.constants import OnConflict
from django.db.models.query import ModelIterable, get_related_populators
from django.db.models.sql import UpdateQuery
from django.db.models.sql.compiler import SQLCompiler

T = TypeVar("T")


def _db() -> Any:
    """This thread's connection itself: `django.db.connection` looks it up anew for each of its attributes."""
    return connections[DEFAULT_DB_ALIAS]


class _Kept(threading.local):
    """The cursor that a thread uses for all its statements: to make one costs as much as to execute most of them."""

    def __init__(self) -> None:
        self.cursor: Any = None
        self.connection: Any = None


_kept = _Kept()


def _cursor(db: Any) -> Any:
    """For a statement whose rows are all read before the next one."""
    if db.force_debug_cursor:
        return db.cursor()  # a test counts
    if _kept.cursor is None or db.connection is None or _kept.connection is not db.connection:
        _kept.cursor, _kept.connection = db.cursor(), db.connection
    return _kept.cursor


class Slot(Value):
    """A place for a value of this field, which is given when the statement is executed. Never for None."""

    def __init__(self, name: str, field: "Field[Any, Any]") -> None:
        super().__init__(None, output_field=field)
        self.name = name

    def as_sql(self, compiler: SQLCompiler, connection: Any) -> Any:
        return "%s", [self]

    def prepared(self, value: Any, db: Any) -> Any:
        return self.output_field.get_db_prep_value(value, db)

    def plain_on(self, vendor: str) -> type | None:
        return _plain(self.output_field, vendor)


class Slots(Slot):
    """A place for any number of values, for `__in`."""

    def as_sqlite(self, compiler: SQLCompiler, connection: Any, **_: Any) -> Any:
        return "(SELECT value FROM json_each(%s))", [self]

    def as_postgresql(self, compiler: SQLCompiler, connection: Any, **_: Any) -> Any:
        return f"(SELECT unnest(%s::{self.output_field.db_type(connection)}[]))", [self]

    def prepared(self, value: Any, db: Any) -> Any:
        values = [super(Slots, self).prepared(each, db) for each in value]
        return orjson.dumps(values).decode() if db.vendor == "sqlite" else values


class _Statement:
    """SQL with its parameters: some are known, the others come by name."""

    def __init__(self, sql: str, parameters: Sequence[Any], db: Any) -> None:
        self.sql = sql
        self._db = db
        self._known = [None if isinstance(each, Slot) else each for each in parameters]
        self._slots = [
            (index, each.name, each.plain_on(db.vendor), each.prepared)
            for index, each in enumerate(parameters)
            if isinstance(each, Slot)
        ]

    def parameters(self, values: dict[str, Any]) -> list[Any]:
        parameters = self._known.copy()
        for index, name, plain, prepared in self._slots:
            value = values[name]
            parameters[index] = value if type(value) is plain else prepared(value, self._db)
        return parameters


class _PerThread(threading.local):
    """What was compiled belongs to the connection of its thread."""

    def __init__(self) -> None:
        self.statement: Any = None


class Rows(Generic[T]):
    """A query for rows of a model, with those that it selects along; or for lists of values, with `values_list`.

        held = Rows(Turn, lambda slot: Turn.objects.filter(pk=slot("id"), owner=slot("owner")))
        turns = held(id=turn_id, owner="me")

    `slot` names a field of the model; with a second argument, the place for its value has another name; `many` is for
    `__in`. A query that locks has to be executed in a transaction, like any other.
    """

    def __init__(self, model: type[Model], build: Callable[[Callable[..., Slot]], "QuerySet[Any, T]"]) -> None:
        self._model = model
        self._build = build
        self._compiled = _PerThread()

    def __call__(self, **values: Any) -> list[T]:
        compiled = self._compiled.statement or self._compile()
        rows = _executed(_db(), compiled.sql, [compiled.parameters(values)], _fetched)
        return [compiled.instance(row) for row in rows]

    def each(self, **values: Any) -> Iterator[T]:
        """The rows one after the other: those that nobody asks for are not read."""
        compiled = self._compiled.statement or self._compile()
        with _db().cursor() as cursor:
            cursor.execute(compiled.sql, compiled.parameters(values))
            for row in cursor:
                yield compiled.instance(row)

    def first(self, **values: Any) -> T | None:
        found = self(**values)
        return found[0] if found else None

    def _compile(self) -> "_Selection":
        compiled = self._compiled.statement = _Selection(self._build(_slots(self._model)))
        return compiled


class _Selection(_Statement):
    def __init__(self, queryset: "QuerySet[Any]") -> None:
        db = _db()
        compiler = queryset.query.get_compiler(connection=db)
        sql, parameters = compiler.as_sql()
        super().__init__(sql, parameters, db)
        select, information = compiler.select, compiler.klass_info
        # Any other class yields values.
        self._is_of_models = queryset._iterable_class is ModelIterable
        if self._is_of_models:
            columns = information["select_fields"]
            self._first, self._end = columns[0], columns[-1] + 1
            self._model = information["model"]
            self._names = [each[0].target.attname for each in select[self._first : self._end]]
            self._populators = get_related_populators(information, select, db.alias)  # type: ignore[call-arg]
            self._annotations = list((compiler.annotation_col_map or {}).items())
        expressions = [each[0] for each in select[: compiler.col_count]]
        self._converters = [
            (position, converter, expression)
            for position, (converters, expression) in compiler.get_converters(expressions).items()
            for converter in converters
        ]

    def instance(self, row: Sequence[Any]) -> Any:
        row = list(row)
        for position, converter, expression in self._converters:
            row[position] = converter(row[position], expression, self._db)
        if not self._is_of_models:
            return row
        instance = self._model.from_db(self._db.alias, self._names, row[self._first : self._end])
        for populator in self._populators:
            populator.populate(row, instance)
        for name, position in self._annotations:
            setattr(instance, name, row[position])
        return instance


class Update:
    """An UPDATE; returns how many rows it changed.

    named = Update(Session, lambda slot: Session.objects.filter(pk=slot("id")), lambda slot: {"title": slot("title")})
    named(id="s", title="New")
    """

    def __init__(
        self,
        model: type[Model],
        rows: Callable[[Callable[..., Slot]], "QuerySet[Any]"],
        changes: Callable[[Callable[..., Slot]], dict[str, Any]],
    ) -> None:
        self._model = model
        self._rows = rows
        self._changes = changes
        self._compiled = _PerThread()

    def __call__(self, **values: Any) -> int:
        return self.many([values])

    def many(self, executions: Sequence[dict[str, Any]]) -> int:
        """Once for each of these values, at the cost of about one statement; how many rows all of them changed."""
        compiled = self._compiled.statement or self._compile()
        changed: int = _executed(_db(), compiled.sql, [compiled.parameters(values) for values in executions], _counted)
        return changed

    def _compile(self) -> _Statement:
        slot = _slots(self._model)
        query = self._rows(slot).query.chain(UpdateQuery)
        query.clear_ordering(force=True)
        query.add_update_values(self._changes(slot))  # type: ignore[attr-defined]
        db = _db()
        sql, parameters = query.get_compiler(connection=db).as_sql()
        compiled = self._compiled.statement = _Statement(sql, parameters, db)
        return compiled


def _slots(model: type[Model]) -> Callable[..., Slot]:
    def slot(field: str, name: str = "", *, many: bool = False) -> Slot:
        found: Any = model._meta.get_field(field)
        return (Slots if many else Slot)(name or field, getattr(found, "target_field", found))

    return slot


class Insert:
    """An INSERT of rows that give these columns; without names, all that the database does not fill in itself. What it
    fills in is not read back, and there are no signals.

    logged = Insert(StreamBatch, "session_id", "frames", "created_at")
    logged([("s", [], now), ("t", [], now)])
    """

    def __init__(self, model: type[Model], *names: str, on_conflict: OnConflict | None = None) -> None:
        fields = {field.attname: field for field in model._meta.local_concrete_fields}
        filled = [name for name, field in fields.items() if field.has_db_default() or isinstance(field, AutoField)]
        self._model = model
        self._names = names or tuple(name for name in fields if name not in filled)
        self._fields = [fields[name] for name in self._names]
        self._values_of = attrgetter(*self._names)
        self._on_conflict = on_conflict
        # By the vendor of the database.
        self._compiled: dict[str, tuple[str, list[tuple[type | None, Prepare]]]] = {}

    def __call__(self, rows: Sequence[Sequence[Any]]) -> None:
        if not rows:
            return
        db = _db()
        sql, columns = self._compiled.get(db.vendor) or self._compile(db)
        prepared = [
            _column(*column, values, db) for column, values in zip(columns, zip(*rows, strict=True), strict=True)
        ]
        _executed(db, sql, list(zip(*prepared, strict=True)), _counted)

    def instance(self, instance: Model) -> None:
        """The row of this one, which counts as stored from now on."""
        self([self._values_of(instance)])
        instance._state.adding, instance._state.db = False, DEFAULT_DB_ALIAS

    def _compile(self, db: Any) -> "tuple[str, list[tuple[type | None, Prepare]]]":
        quoted = db.ops.quote_name
        names = ", ".join(quoted(str(field.column)) for field in self._fields)
        places = ", ".join(["%s"] * len(self._fields))
        begin = db.ops.insert_statement(on_conflict=self._on_conflict)
        end = db.ops.on_conflict_suffix_sql(self._fields, self._on_conflict, (), ())
        sql = f"{begin} {quoted(self._model._meta.db_table)} ({names}) VALUES ({places}) {end}".rstrip()
        columns: list[tuple[type | None, Prepare]]
        columns = [(_plain(field, db.vendor), field.get_db_prep_save) for field in self._fields]
        compiled = self._compiled[db.vendor] = sql, columns
        return compiled


Prepare = Callable[[Any, Any], Any]


def _column(plain: type | None, prepare: Prepare, values: Sequence[Any], db: Any) -> list[Any]:
    """A column's values, as its field prepares them."""
    column = []
    last = ready = None
    for value in values:
        if type(value) is plain:
            column.append(value)
            continue
        # What is the same in all rows, as the time, is prepared once.
        if ready is None or value is not last:
            last, ready = value, prepare(value, db)
        column.append(ready)
    return column


def _plain(field: Any, vendor: str) -> type | None:
    """The type whose values the field passes on as they are. To PostgreSQL numbers are given with the column's type."""
    field = getattr(field, "target_field", field)
    if isinstance(field, CharField | TextField):
        return str
    if isinstance(field, IntegerField):
        return int if vendor == "sqlite" else None
    return bool if isinstance(field, BooleanField) else None


_fetched, _counted = methodcaller("fetchall"), attrgetter("rowcount")


def _executed(db: Any, sql: str, rows: Sequence[Sequence[Any]], outcome: Callable[[Any], Any]) -> Any:
    """What came of a statement that was executed with each of these parameters."""
    cursor = _cursor(db)
    try:
        if len(rows) == 1:
            cursor.execute(sql, rows[0])
        else:
            cursor.executemany(sql, rows)
        return outcome(cursor)
    except BaseException:
        # With a row that it could not read, SQLite keeps the statement open, and with it what the database was then.
        _kept.cursor = None
        with suppress(Exception):
            cursor.close()
        raise

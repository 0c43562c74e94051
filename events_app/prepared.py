"""Statements of the path that every turn takes, whose SQL Django makes once.

Building and compiling a query takes Django five to ten times as long as SQLite needs to execute it, and a turn is some
thirty of them. What they are is said with querysets as everywhere else; what changes from one execution to the next
stands in them as a `Slot`. All else, as a query's time limit and who may be asked, is as in Django: they go through its
cursors and its fields.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter
from typing import Any, Generic, TypeVar

from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import BooleanField, CharField, Field, Model, QuerySet, TextField, Value
from django.db.models.constants import OnConflict
from django.db.models.expressions import DatabaseDefault
from django.db.models.query import ModelIterable, get_related_populators
from django.db.models.sql import UpdateQuery
from django.db.models.sql.compiler import SQLCompiler

T = TypeVar("T")


def _db() -> Any:
    """This thread's connection itself: `django.db.connection` looks it up anew for each of its attributes."""
    return connections[DEFAULT_DB_ALIAS]


class Slot(Value):
    """A place for a value of this field, which is given when the statement is executed. Never for None."""

    def __init__(self, name: str, field: "Field[Any, Any]") -> None:
        super().__init__(None, output_field=field)
        self.name = name

    def as_sql(self, compiler: SQLCompiler, connection: Any) -> Any:
        return "%s", [self]


class _Statement:
    """SQL with its parameters: some are known, the others come by name."""

    def __init__(self, sql: str, parameters: Sequence[Any]) -> None:
        self.sql = sql
        self._parameters = [self._prepared(each) for each in parameters]

    @staticmethod
    def _prepared(parameter: Any) -> tuple[str, Any]:
        if isinstance(parameter, Slot):
            return parameter.name, parameter.output_field.get_db_prep_value
        return "", parameter

    def parameters(self, values: dict[str, Any]) -> list[Any]:
        db = _db()
        return [known(values[name], db) if name else known for name, known in self._parameters]


class _PerThread(threading.local):
    """What was compiled belongs to the connection of its thread."""

    def __init__(self) -> None:
        self.statement: Any = None


class Rows(Generic[T]):
    """A query for rows of a model, with those that it selects along; or for lists of values, with `values_list`.

        held = Rows(Turn, lambda slot: Turn.objects.filter(pk=slot("id"), owner=slot("owner")))
        turns = held(id=turn_id, owner="me")

    `slot` names a field of the model; with a second argument, the place for its value has another name. A query that
    locks has to be executed in a transaction, like any other.
    """

    def __init__(self, model: type[Model], build: Callable[[Callable[..., Slot]], "QuerySet[Any, T]"]) -> None:
        self._model = model
        self._build = build
        self._compiled = _PerThread()

    def __call__(self, **values: Any) -> list[T]:
        return list(self.each(**values))

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
        self._db = db = _db()
        compiler = queryset.query.get_compiler(connection=db)
        super().__init__(*compiler.as_sql())
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
        with _db().cursor() as cursor:
            _execute(cursor, compiled.sql, [compiled.parameters(values) for values in executions])
            changed: int = cursor.rowcount
        return changed

    def _compile(self) -> _Statement:
        slot = _slots(self._model)
        query = self._rows(slot).query.chain(UpdateQuery)
        query.clear_ordering(force=True)
        query.add_update_values(self._changes(slot))  # type: ignore[attr-defined]
        compiled = self._compiled.statement = _Statement(*query.get_compiler(connection=_db()).as_sql())
        return compiled


def _slots(model: type[Model]) -> Callable[..., Slot]:
    def slot(field: str, name: str = "") -> Slot:
        found: Any = model._meta.get_field(field)
        return Slot(name or field, getattr(found, "target_field", found))

    return slot


_inserts: dict[tuple[type[Model], str, tuple[str, ...], OnConflict | None], str] = {}


def insert(*instances: Model, on_conflict: OnConflict | None = None) -> None:
    """Insert new rows. Numbers that the database gives them are not read back, nor what it fills in; no signals."""
    db = _db()
    with db.cursor() as cursor:
        for (model, names), alike in groupby((_row(instance, db) for instance in instances), key=itemgetter(0)):
            key = (model, db.vendor, names, on_conflict)
            sql = _inserts.get(key) or _inserts.setdefault(key, _insert(model, names, on_conflict))
            _execute(cursor, sql, [row for _, row in alike])
    for instance in instances:
        instance._state.adding, instance._state.db = False, db.alias


def _row(instance: Model, db: Any) -> tuple[tuple[type[Model], tuple[str, ...]], list[Any]]:
    """The columns of its model for which the instance has values, and these."""
    names, row = [], []
    for name, is_key, plain, prepare in _columns(type(instance)):
        value = getattr(instance, name)
        kind = type(value)
        if kind is DatabaseDefault or (is_key and value is None):
            continue
        names.append(name)
        row.append(value if kind is plain else prepare(value, db))
    return (type(instance), tuple(names)), row


@cache
def _columns(model: type[Model]) -> list[tuple[str, bool, type | None, Callable[[Any, Any], Any]]]:
    return [
        (field.attname, field.primary_key, _plain(field), field.get_db_prep_save)
        for field in model._meta.local_concrete_fields
    ]


def _plain(field: Any) -> type | None:
    """The type whose values the field passes on as they are. Numbers it gives the column's own type."""
    field = getattr(field, "target_field", field)
    if isinstance(field, CharField | TextField):
        return str
    return bool if isinstance(field, BooleanField) else None


def _insert(model: type[Model], names: Sequence[str], on_conflict: OnConflict | None) -> str:
    operations = _db().ops
    fields = [field for field in model._meta.local_concrete_fields if field.attname in names]
    columns = ", ".join(operations.quote_name(str(field.column)) for field in fields)
    places = ", ".join(["%s"] * len(fields))
    begin = operations.insert_statement(on_conflict=on_conflict)
    end = operations.on_conflict_suffix_sql(fields, (), on_conflict, ())
    return f"{begin} {operations.quote_name(model._meta.db_table)} ({columns}) VALUES ({places}) {end}".rstrip()


def _execute(cursor: Any, sql: str, rows: Sequence[Sequence[Any]]) -> None:
    if len(rows) == 1:
        cursor.execute(sql, rows[0])
    else:
        cursor.executemany(sql, rows)

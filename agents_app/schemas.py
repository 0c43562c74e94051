"""JSON schemas of tools: which may be stored, and checking arguments in bounded time.

Schemas are written by admins, arguments by models: neither may hold up everybody else. What one step of an evaluation
may cost is bounded when a schema is stored, what all of them may cost while they run.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import islice
from typing import TYPE_CHECKING, Any

from agents_app.llm import MAX_ARGUMENT_BYTES
from agents_app.patterns import PatternRefused, ensure_bounded

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_BRANCHES = 500
# Of processor time, for all calls of one answer together; 256 KiB of small integers take half of it.
BUDGET_SECONDS = 2.0
MAX_ERRORS = 100
SHOWN_CHARS = 300
DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Where schemas stand within a schema. Those of the first line are for the same value as the schema they stand in.
SAME_VALUE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
SCHEMAS = (*SAME_VALUE, "prefixItems", "items", "contains", "additionalProperties", "propertyNames", "properties")
DEFINITIONS = ("$defs", "definitions")
# References to other places than this schema; searches whose time nothing bounds.
REFUSED = {
    "$anchor": "refer with # and the place instead, as in #/$defs/name",
    "$dynamicAnchor": "refer with # and the place instead, as in #/$defs/name",
    "$dynamicRef": "refer with # and the place instead, as in #/$defs/name",
    "$id": "a tool's schema is no other document's",
    "patternProperties": "use propertyNames with a pattern and additionalProperties",
    "unevaluatedItems": "use items: false",
    "unevaluatedProperties": "use additionalProperties: false",
}

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


# What the library raises for a reference that leads into something else than a schema, such as a word in a list.
MISREAD = (ValueError, LookupError, TypeError, AttributeError)


class SchemaRefused(ValueError):
    """A schema that may not be stored; the text is for people and names the place."""


class SchemaBroken(Exception):
    """A stored schema that cannot be used: it is none, or it takes too long."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """Why arguments do not fit, and where in them."""

    text: str
    path: tuple[str | int, ...] = ()


@contextmanager
def limited_time() -> Iterator[None]:
    """What is checked within shares BUDGET_SECONDS."""
    # Of this thread's own time: on a busy machine nothing fails that would not fail on an idle one.
    token = _deadline.set(time.thread_time() + BUDGET_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


def complaint(schema: Any, arguments: Any) -> Complaint | None:
    """What does not fit the schema, if anything. Raises SchemaBroken."""
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    if _deadline.get() is None:
        with limited_time():
            return complaint(schema, arguments)
    try:
        errors = _validator(json.dumps(schema)).iter_errors(arguments)
        error = best_match(islice(errors, MAX_ERRORS))
    except (SchemaRefused, Unresolvable, RecursionError, ArithmeticError, re.error, *MISREAD) as broken:
        raise SchemaBroken(str(broken)) from broken
    return None if error is None else Complaint(_words(error), tuple(error.absolute_path))


def ensure_usable(schema: Any) -> None:
    """Raise SchemaRefused unless this is a Draft 2020-12 schema of an object whose evaluation is bounded."""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise SchemaRefused('Has to be an object with "type": "object" at the top: arguments are one.')
    if len(json.dumps(schema, ensure_ascii=False).encode()) > MAX_SCHEMA_BYTES:
        raise SchemaRefused(f"A schema may have {MAX_SCHEMA_BYTES // 1024} KiB.")
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise SchemaRefused(f"A schema may be nested {MAX_SCHEMA_DEPTH} levels deep.")
    try:
        with limited_time():
            _ensure_valid(schema)
            _Survey(schema).run()
            complaint(schema, {})
    except SchemaBroken as broken:
        raise SchemaRefused(f"Cannot be used: {broken}.") from None


class _Survey:
    """A look at every schema within a valid one, those included that a reference leads to."""

    def __init__(self, root: dict[str, Any]) -> None:
        from referencing import Registry
        from referencing.jsonschema import DRAFT202012

        self.root = root
        self.resolver = Registry().resolver_with_root(DRAFT202012.create_resource(root))
        self.seen: dict[int, int | None] = {}

    def run(self) -> None:
        self._branches(self.root, "")

    def _branches(self, schema: Any, place: str) -> int:
        """How many schemas are looked at for one value."""
        if not isinstance(schema, dict):
            return 1
        if id(schema) in self.seen:
            found = self.seen[id(schema)]
            if found is None:
                raise SchemaRefused(f"At {_place(place)}: a reference leads back to where it stands.")
            return found
        self._ensure_allowed(schema, place)
        self.seen[id(schema)] = None
        branches = 1 + sum(self._branches(each, at) for each, at in self._for_the_same_value(schema, place))
        self.seen[id(schema)] = branches
        if branches > MAX_BRANCHES:
            raise SchemaRefused(f"At {_place(place)}: more than {MAX_BRANCHES} alternatives for one value.")
        self._within(schema, place)
        return branches

    def _within(self, schema: dict[str, Any], place: str) -> None:
        """The schemas for parts of the value, which may lead back here: values have an end."""
        for keyword in (*SCHEMAS, *DEFINITIONS):
            if keyword not in SAME_VALUE:
                for each, at in _under(schema, keyword, place):
                    self._branches(each, at)

    def _for_the_same_value(self, schema: dict[str, Any], place: str) -> Iterator[tuple[Any, str]]:
        for keyword in SAME_VALUE:
            yield from _under(schema, keyword, place)
        if "$ref" in schema:
            yield self._target(schema["$ref"], place), schema["$ref"]

    def _target(self, reference: str, place: str) -> Any:
        from referencing.exceptions import Unresolvable

        if not reference.startswith("#"):
            raise SchemaRefused(f"At {_place(place)}: $ref may only refer to places in this schema, beginning with #.")
        try:
            target = self.resolver.lookup(reference).contents
        except (Unresolvable, *MISREAD):
            target = None
        if not isinstance(target, dict | bool):
            raise SchemaRefused(f"At {_place(place)}: $ref {reference} leads to no schema.")
        return target

    def _ensure_allowed(self, schema: dict[str, Any], place: str) -> None:
        for keyword in REFUSED.keys() & schema.keys():
            raise SchemaRefused(f"At {_place(place)}: {keyword} cannot be used here; {REFUSED[keyword]}.")
        if schema.get("$schema", DIALECT).rstrip("#") != DIALECT:
            raise SchemaRefused(f"At {_place(place)}: $schema has to be {DIALECT}, or left out.")
        if "pattern" in schema:
            longest = min(int(schema.get("maxLength", MAX_ARGUMENT_BYTES)), MAX_ARGUMENT_BYTES)
            try:
                ensure_bounded(schema["pattern"], longest=longest, is_searched=True)
            except PatternRefused as refused:
                raise SchemaRefused(
                    f"At {_place(place, 'pattern')}: {refused} maxLength beside it bounds the text."
                ) from None


def _under(schema: dict[str, Any], keyword: str, place: str) -> list[tuple[Any, str]]:
    """The schemas that stand under a keyword, each with its place."""
    value, at = schema.get(keyword), _place(place, keyword)
    if keyword in ("properties", "dependentSchemas", *DEFINITIONS) and isinstance(value, dict):
        return [(each, f"{at}.{name}") for name, each in value.items()]
    if isinstance(value, list):
        return [(each, f"{at}.{index}") for index, each in enumerate(value)]
    return [(value, at)]


def _place(*names: str) -> str:
    return ".".join(filter(None, names)) or "the top"


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def _words(error: "ValidationError") -> str:
    """What is wrong, in JSON: the library's own texts show values as Python writes them."""
    if error.validator == "required":
        return str(error.message)
    value, wanted = (json.dumps(each, ensure_ascii=False) for each in (error.instance, error.validator_value))
    if error.validator == "type":
        return f"{value[:SHOWN_CHARS]} is not of type '{error.validator_value}'"
    return f"{value[:SHOWN_CHARS]} does not fit {error.validator} {wanted[:SHOWN_CHARS]}"


def _ensure_valid(schema: Any) -> None:
    """Raise SchemaRefused for what is no Draft 2020-12 schema."""
    from jsonschema.exceptions import best_match

    checker = _checker()
    error = best_match(islice(checker(checker.META_SCHEMA).iter_errors(schema), MAX_ERRORS))
    if error is not None:
        place = _place(*map(str, error.absolute_path))
        raise SchemaRefused(f"This is no JSON schema (Draft 2020-12). At {place}: {_words(error)}.")


@lru_cache(maxsize=256)
def _validator(text: str) -> "Validator":
    # Imported late: commands that check no arguments should not wait for it.
    from referencing import Registry

    schema = json.loads(text)
    _ensure_valid(schema)
    # A registry of its own, because the default one fetches what a `$ref` names from anywhere.
    return _checker()(schema, registry=Registry())


@lru_cache(maxsize=1)
def _checker() -> Any:
    """Draft 2020-12, stopped when its time is up, and without what takes longer than its length in one step."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    checks = {**Draft202012Validator.VALIDATORS, "uniqueItems": _unique_items}
    checks["pattern"] = _for_short_texts(checks["pattern"])
    return extend(Draft202012Validator, {name: _in_time(check) for name, check in checks.items()})


def _in_time(check: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(check)
    def checked(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        deadline = _deadline.get()
        if deadline is not None and time.thread_time() > deadline:
            raise SchemaBroken("to check arguments by it takes too long")
        return check(validator, value, instance, schema)

    return checked


def _for_short_texts(check: Callable[..., Any]) -> Callable[..., Any]:
    def checked(validator: Any, pattern: Any, instance: Any, schema: Any) -> Any:
        # Longer ones are refused by maxLength; a pattern is known to be quick only up to there.
        if not isinstance(instance, str) or len(instance) <= schema.get("maxLength", MAX_ARGUMENT_BYTES):
            yield from check(validator, pattern, instance, schema)

    return checked


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator["ValidationError"]:
    """The library compares each item with every other: 2,000 objects took it twelve seconds."""
    from jsonschema.exceptions import ValidationError

    if wanted and isinstance(instance, list) and len(set(map(_comparable, instance))) < len(instance):
        yield ValidationError("has items twice")


def _comparable(value: Any) -> str:
    """The same text for values that JSON schema calls equal. A text, because numbers can be chosen to hash alike."""
    return json.dumps(_with_whole_numbers(value), sort_keys=True)


def _with_whole_numbers(value: Any) -> Any:
    """1.0 is 1; true is not."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return list(map(_with_whole_numbers, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value

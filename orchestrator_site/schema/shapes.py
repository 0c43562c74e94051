"""The words that the schemas are written in: JSON Schema 2020-12, as OpenAPI 3.1 takes it."""

import re
from typing import Any

from orchestrator_site import http
from sessions_app import idempotency

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
NULL: Schema = {"type": "null"}
OBJECT: Schema = {"type": "object"}
ANYTHING: Schema = {}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 200}
AGENT: Schema = {"type": "string", "minLength": 1, "maxLength": 32}
SESSION_ID: Schema = {"type": "string", "pattern": f"^{http.SESSION_ID}$"}
CALL_ID: Schema = {"type": "string", "pattern": f"^{http.CallIdConverter.regex}$"}
KEY: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": f"^{idempotency.KEY}$"}
HASH: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
UUID: Schema = {"type": "string", "format": "uuid", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}
TIME: Schema = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00$",
}


def text(most: int, *, least: int = 0, **more: Any) -> Schema:
    return {"type": "string", **({"minLength": least} if least else {}), "maxLength": most, **more}


def one_of(*words: str) -> Schema:
    return {"type": "string", "enum": [str(word) for word in words]}


def only(value: bool | int | str) -> Schema:
    return {"type": {bool: "boolean", int: "integer", str: "string"}[type(value)], "const": value}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def listed(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def mapping(values: Schema) -> Schema:
    """An object whose keys are names of something."""
    return {"type": "object", "additionalProperties": values}


def nullable(schema: Schema) -> Schema:
    if "enum" in schema:
        return {**schema, "type": [schema["type"], "null"], "enum": [*schema["enum"], None]}
    if "type" in schema and "const" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, NULL]} if schema else schema


def record(properties: dict[str, Schema], *, optional: tuple[str, ...] = (), **more: Any) -> Schema:
    """An object of the server's: these keys and no others, and none missing but the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


def body(properties: dict[str, Schema], *, optional: tuple[str, ...] = (), **more: Any) -> Schema:
    """An object of a client's: keys that nobody knows are passed over, and null counts as absent."""
    known = {name: nullable(schema) if name in optional else schema for name, schema in properties.items()}
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": known, **({"required": required} if required else {}), **more}


def told_apart(by: str, **names: str) -> Schema:
    """One of several components, told by a word that each of them has."""
    return {
        "oneOf": [ref(name) for name in names.values()],
        "discriminator": {
            "propertyName": by,
            "mapping": {word: f"#/components/schemas/{name}" for word, name in names.items()},
        },
    }


def prose(markdown: str) -> str:
    """Markdown as it was written here, without the breaks of its lines: readers would show them."""
    return re.sub(r"(?<=\S)\n {0,2}(?=[^\s-])", " ", markdown.strip())

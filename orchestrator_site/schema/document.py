"""The OpenAPI document: the routes as drf-spectacular finds them, each with what is written of it in this package.

Imported when somebody asks for it, and made once in a process.
"""

from functools import cache
from typing import Any

from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.renderers import OpenApiJsonRenderer, OpenApiYamlRenderer

from orchestrator_site.schema import answers, bodies, frames, refusals
from orchestrator_site.schema.examples import EXAMPLES
from orchestrator_site.schema.operations import OPERATIONS, PARAMETERS, TAGS
from orchestrator_site.schema.shapes import Schema, prose
from orchestrator_site.urls import contract

DESCRIPTION = """
Countersign runs a team of AI agents for many clients at once, and holds every dangerous tool call until a person has
signed it off.

- Every path but `/healthz` and `/readyz` exists as it is written here and under `/api/v1`. Where `GET` is answered with
  JSON, `HEAD` is too.
- All but these two and `/health` needs the key: `X-Internal-Auth: <key>` or `Authorization: Bearer <key>`.
- Bodies are JSON in UTF-8 (`application/json`): at most 2 MiB, 64 levels, 10,000 keys; an object that names a key twice
  is refused. Unknown keys are passed over.
- Times are ISO 8601 in UTC.
- A method that a path does not have is answered with 405 (`#/components/responses/MethodNotAllowed`), a path that does
  not exist with 404 `not_found`; without the key both with 401.
- What is not quite HTTP is answered by the HTTP server itself, with 400 and a plain text, or by the end of the
  connection.
"""


class Described(AutoSchema):
    """Views build their answers by hand; so what is told of them is written by hand, and not guessed from them."""

    def get_operation(self, path: str, path_regex: str, path_prefix: str, method: str, registry: Any) -> Schema:
        return OPERATIONS[path][method.lower()]


class Generator(SchemaGenerator):
    """The routes of DRF's views, and beside them the streams and the socket, which are none."""

    def parse(self, input_request: Any, public: bool) -> Schema:
        found = super().parse(input_request, public)
        return {path: found.get(path, methods) for path, methods in OPERATIONS.items()}


@cache
def as_json() -> bytes:
    return bytes(OpenApiJsonRenderer().render(document()))


@cache
def as_yaml() -> bytes:
    return bytes(OpenApiYamlRenderer().render(document()))


def document() -> Schema:
    return Generator(patterns=contract).get_schema(public=True)


def complete(result: Schema, **_: Any) -> Schema:
    """A postprocessing hook of drf-spectacular: everything but the paths."""
    result["info"]["description"] = prose(DESCRIPTION)
    result["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
    result["security"] = [{"InternalAuth": []}, {"Bearer": []}]
    schemas = {**bodies.SCHEMAS, **frames.SCHEMAS, **answers.SCHEMAS, **refusals.SCHEMAS}
    result["components"] = {
        "schemas": {name: _named(name, schema) for name, schema in sorted(schemas.items())},
        "parameters": PARAMETERS,
        "headers": refusals.HEADERS,
        "responses": refusals.RESPONSES,
        "securitySchemes": {
            "InternalAuth": {"type": "apiKey", "in": "header", "name": "X-Internal-Auth"},
            "Bearer": {"type": "http", "scheme": "bearer"},
        },
    }
    return result


def _named(name: str, schema: Schema) -> Schema:
    """Readers show a title where they would otherwise show nothing but "object"."""
    shown = {"examples": [EXAMPLES[name]]} if name in EXAMPLES else {}
    return {"title": name, **schema, **shown}

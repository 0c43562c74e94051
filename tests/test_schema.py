"""The OpenAPI document is true: every route stands in it, every example is taken, and every answer, refusal and frame
of a real server is what it says."""

import json
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from django.urls import URLPattern, URLResolver
from drf_spectacular.validation import validate_schema
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from agents_app import handoffs, tools
from agents_app.llm import ModelError, openai
from messages_app import transcript
from orchestrator_site.errors import APIError
from orchestrator_site.schema import bodies, document, shapes
from orchestrator_site.schema.examples import ARGUMENTS, CALL, EXAMPLES, HASH, SESSION
from orchestrator_site.schema.frames import DOUBTS_A_CALL, ENDS_A_CALL, ENDS_THE_TURN, REFUSES_A_CALL, REFUSES_A_MESSAGE
from orchestrator_site.schema.refusals import DETAILS
from orchestrator_site.urls import contract
from tests import databases
from tests.scripted_llm import Gate, ScriptedLLM, call, calls, drop, empty, hold, say, status
from tests.server import AUTH, ROOT, Frame, Server, eventually, parse_frames, running, until
from tests.test_bad_input import MIB, answered, exchange, request_of

DOCUMENT: dict[str, Any] = json.loads(document.as_json())
OPERATIONS = [(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods]
SOCKET = "/ws/{session_id}"
PROBES = ("/healthz", "/readyz")
STREAM = "/agent/message/stream"
FOLLOW = "/sessions/{session_id}/stream"
DECIDE = "/approvals/{call_id}/decision"
KEY_PARAMETER = "#/components/parameters/IdempotencyKey"
PLACES = 6
_numbers = count(1)

# --- Holding what is said against the document -----------------------------------------------------------------------

REGISTRY: Any = Registry().with_resource("urn:schema", DRAFT202012.create_resource(DOCUMENT)).crawl()


def validator(schema: Any) -> Draft202012Validator:
    wanted = json.loads(json.dumps(schema).replace('"#/', '"urn:schema#/'))
    return Draft202012Validator(wanted, registry=REGISTRY, format_checker=Draft202012Validator.FORMAT_CHECKER)


COMPONENTS = {name: validator(shapes.ref(name)) for name in DOCUMENT["components"]["schemas"]}


def assert_fits(value: Any, schema: Any) -> None:
    error = best_match(validator(schema).iter_errors(value))
    assert error is None, f"{error.message} at {error.json_path} of {json.dumps(value)[:1000]}"


def assert_is(component: str, value: Any) -> None:
    assert_fits(value, shapes.ref(component))


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        found: Any = DOCUMENT
        for step in node["$ref"].removeprefix("#/").split("/"):
            found = found[step.replace("~1", "/").replace("~0", "~")]
        return dict(found)
    return node


def operation(method: str, path: str) -> dict[str, Any]:
    return dict(DOCUMENT["paths"][path][method.lower()])


def assert_true(method: str, path: str, answer: httpx.Response) -> None:
    """The answer's status is documented, and its headers and body are what is documented of it."""
    documented = operation(method, path)["responses"]
    assert str(answer.status_code) in documented, (method, path, answer.status_code, answer.text)
    assert_answers(resolved(documented[str(answer.status_code)]), answer)


def assert_answers(response: dict[str, Any], answer: httpx.Response) -> None:
    for name, header in response.get("headers", {}).items():
        assert_fits(answer.headers[name], resolved(header)["schema"])
    if "content" not in response:
        assert answer.content == b""
        return
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = response["content"][media_type]["schema"]
    if media_type == "text/event-stream":
        for frame in parse_frames(iter(answer.text.split("\n"))):
            assert_framed(frame)
            assert_fits(frame.data, schema)
    else:
        assert_fits(answer.json(), schema)
        if answer.is_error and "code" in answer.json():
            assert answer.json()["request_id"] == answer.headers["x-request-id"]


FORWARDED = ("AssistantMessage", "ToolCallChunk", "AgentSwitchedChunk", "ErrorChunk")


def assert_framed(frame: Frame) -> None:
    """As the description says that frames are written."""
    if frame.event == "done":
        assert_is("StreamEnd", frame.data)
        assert (frame.id, frame.spaced) == (None, True)
        return
    assert_is("Chunk", frame.data)
    whole = any(COMPONENTS[name].is_valid(frame.data) for name in FORWARDED)
    assert (frame.event, frame.spaced) == (("message", True) if whole else (None, False))
    assert frame.id is not None or frame.type == "error"


# --- The document itself ---------------------------------------------------------------------------------------------


def every(node: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every object in the document, with the way to it."""
    if isinstance(node, dict):
        yield at, node
        for key, value in node.items():
            yield from every(value, (*at, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from every(value, (*at, str(index)))


def test_it_is_openapi_3_1_and_its_schemas_are_json_schema() -> None:
    validate_schema(DOCUMENT)
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    named = [operation(*each)["operationId"] for each in OPERATIONS]
    assert len(set(named)) == len(named)
    assert {tag for each in OPERATIONS for tag in operation(*each)["tags"]} == {t["name"] for t in DOCUMENT["tags"]}


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    references = {node["$ref"] for _, node in every(DOCUMENT) if isinstance(node.get("$ref"), str)}

    for reference in references:
        resolved({"$ref": reference})
    components = {f"#/components/{kind}/{name}" for kind, named in DOCUMENT["components"].items() for name in named}
    unused = {each for each in components - references if "/securitySchemes/" not in each}
    assert unused == {"#/components/responses/MethodNotAllowed"}, "that of the methods that there are not"


def test_every_word_that_tells_components_apart_is_theirs_alone() -> None:
    for _, node in every(DOCUMENT["components"]["schemas"]):
        if "discriminator" in node:
            mapping = node["discriminator"]["mapping"]
            assert [each["$ref"] for each in node["oneOf"]] == list(mapping.values())
            for word, target in mapping.items():
                parts = resolved({"$ref": target})
                for part in map(resolved, parts.get("oneOf", []) if "properties" not in parts else [parts]):
                    assert part["properties"][node["discriminator"]["propertyName"]]["const"] == word


def test_what_the_server_makes_has_no_other_keys_and_misses_none() -> None:
    sent = {name for name in bodies.SCHEMAS if name != "Nothing"}
    free = {"arguments", "modified_arguments", "original_args", "modified_args"}
    for at, node in every({k: v for k, v in DOCUMENT["components"]["schemas"].items() if k not in sent}):
        kind = node.get("type")
        if (kind == "object" or kind == ["object", "null"]) and not free & set(at) and at != ("Nothing",):
            assert "additionalProperties" in node, at
            if "properties" in node:
                optional = set(node["properties"]) - set(node["required"])
                assert optional <= {"confidence", "tool_calls"}, at


EXAMPLES_SHOWN = [
    *((name, shapes.ref(name), value) for name, value in EXAMPLES.items()),
    *(
        ("/".join(at[1:4]) + f" {name}", node["schema"], example["value"])
        for at, node in every(DOCUMENT)
        if "schema" in node and "examples" in node
        for name, example in node["examples"].items()
    ),
    *(
        (node["name"], node["schema"], node["example"])
        for _, node in every(DOCUMENT)
        if "example" in node and "in" in node
    ),
    *(
        (f"socket {name}", shapes.ref("SocketMessage"), example["value"])
        for name, example in operation("GET", SOCKET)["x-websocket"]["examples"].items()
    ),
]


def test_every_example_fits_its_schema() -> None:
    assert len(EXAMPLES_SHOWN) > 150
    for name, schema, value in EXAMPLES_SHOWN:
        error = best_match(validator(schema).iter_errors(value))
        assert error is None, f"{name}: {error.message}"


def test_every_code_is_in_the_document_and_in_the_readme() -> None:
    def below(kind: type[Any]) -> set[type[Any]]:
        return {kind}.union(*(below(each) for each in kind.__subclasses__()))

    raised = {each.code for each in below(APIError)} - {"forbidden", "conflict", "too_many_requests"}
    told = {refusal.code for refusal in DETAILS}
    assert raised | {"internal_error"} == told, "the three are bases that nobody raises"
    ends = set(openai.TEXTS) | {handoffs.TooManyHandoffs().code, transcript.ContextTooLong().code}
    assert ends | {"model_circuit_open", "too_many_rounds", "turn_timeout"} <= set(ENDS_THE_TURN)
    shown = re.findall(r'CallRefused\(\s*"(\w+)"[^)]*is_shown=True', Path(tools.__file__).read_text(), re.DOTALL)
    assert set(shown) <= set(REFUSES_A_CALL)
    assert issubclass(handoffs.TooManyHandoffs, ModelError)
    readme = (ROOT / "README.md").read_text()
    documented = {*told, *ENDS_THE_TURN, *REFUSES_A_CALL, *ENDS_A_CALL, *DOUBTS_A_CALL, *REFUSES_A_MESSAGE}
    assert {code for code in documented if f"`{code}`" not in readme} == set()


# --- The server ------------------------------------------------------------------------------------------------------


class PlannedLLM(ScriptedLLM):
    """A model that answers by what the user said last, because turns of other sessions may go on meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[str, deque[Any]] = {}
        self.default = self.planned

    def plan(self, *replies: Any) -> str:
        """What a user has to say to get these replies, and plain ones after them."""
        said = f"Message {next(_numbers)}"
        self.plans[said] = deque(replies)
        return said

    def planned(self, request: dict[str, Any]) -> Any:
        said = [message["content"] for message in request["messages"] if message["role"] == "user"][-1]
        replies = self.plans.get(said)
        return replies.popleft() if replies else say("ok")


@pytest.fixture(scope="module")
def llm() -> Iterator[PlannedLLM]:
    with PlannedLLM() as planned:
        yield planned
        assert planned.refused == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, llm: PlannedLLM, migrated: Path) -> Iterator[Server]:
    """One server for all of this, with few places and little patience."""
    limits = {"MAX_BODY_SECONDS": "1", "STREAMS_AT_ONCE": str(PLACES), "TURN_QUEUE_LENGTH": "1"}
    with running(tmp_path_factory.mktemp("schema"), migrated, LLM_BASE_URL=llm.url, **limits) as started:
        yield started


@dataclass
class World:
    """A session of its own in which the coder's call waits for a person, and what the examples say in its terms."""

    server: Server
    session_id: str
    call_id: str
    args_hash: str

    def said(self, value: Any) -> Any:
        text = json.dumps(value)
        for shown, real in ((SESSION, self.session_id), (CALL, self.call_id), (HASH, self.args_hash)):
            text = text.replace(f'"{shown}"', f'"{real}"')
        return json.loads(text)

    def target(self, path: str) -> str:
        return path.replace("{session_id}", self.session_id).replace("{call_id}", self.call_id)

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request, its answer held against the document."""
        if path == FOLLOW:
            return self.follow(**options)
        answer = self.server.http.request(method, self.target(path), **options)
        assert_true(method, path, answer)
        return answer

    def follow(self, **options: Any) -> httpx.Response:
        """As much of the session's stream as there is, until nothing more is to come."""
        with self.server.http.stream("GET", self.target(FOLLOW), **options) as stream:
            lines = []
            if stream.status_code == 200:
                last = stored(self.server, "max(last_seq)", "events_app_streambatch", self.session_id)
                for line in stream.iter_lines():
                    lines.append(line)
                    if line == "" and any(each == f"id: {last}" for each in lines):
                        break
            else:
                lines = [stream.read().decode()]
        answer = httpx.Response(stream.status_code, headers=stream.headers, text="\n".join([*lines, ""]))
        assert_true("GET", FOLLOW, answer)
        return answer


def stored(server: Server, column: str, table: str, session_id: str) -> Any:
    sql = f"SELECT {column} FROM {table} WHERE session_id = ?"  # noqa: S608
    return databases.rows(server.database, sql, session_id)[0][0]


def change(server: Server, *statements: str) -> None:
    with databases.changing(server.database) as database:
        for statement in statements:
            database.execute(statement)


def new_world(server: Server, llm: PlannedLLM) -> World:
    session_id = f"world-{next(_numbers)}"
    asked = server.say(session_id, llm.plan(call("write_file", ARGUMENTS)), agent_type="coder")[1]
    return World(server, session_id, asked.data["call_id"], asked.data["metadata"]["args_hash"])


@pytest.fixture
def world(server: Server, llm: PlannedLLM) -> World:
    return new_world(server, llm)


# --- What is served, and what is routed ------------------------------------------------------------------------------


def test_the_document_is_open_and_the_same_as_json_and_yaml(server: Server) -> None:
    as_json, as_yaml = httpx.get(f"{server.url}/schema"), httpx.get(f"{server.url}/schema?format=yaml")

    assert as_json.json() == yaml.safe_load(as_yaml.text) == DOCUMENT
    assert as_json.headers["content-type"] == "application/json"
    assert as_yaml.headers["content-type"] == "application/yaml"
    assert DOCUMENT["servers"] == [{"url": "/"}, {"url": "/api/v1"}]
    for path in ("/schema", "/docs"):
        assert_answers(DOCUMENT["components"]["responses"]["MethodNotAllowed"], httpx.post(server.url + path))


def routed(patterns: list[Any], prefix: str = "/") -> Iterator[str]:
    for each in patterns:
        path = prefix + re.sub(r"<\w+:(\w+)>", r"{\1}", str(each.pattern))
        if isinstance(each, URLResolver):
            yield from routed(each.url_patterns, path)
        else:
            assert isinstance(each, URLPattern)
            yield path


def test_every_route_is_documented_and_nothing_else() -> None:
    assert set(DOCUMENT["paths"]) == {*routed(contract), SOCKET, *PROBES}


def test_every_other_method_is_405_under_both_prefixes(world: World) -> None:
    for path, methods in DOCUMENT["paths"].items():
        others = {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS"} - {each.upper() for each in methods}
        for prefix in {SOCKET: (), **dict.fromkeys(PROBES, ("",))}.get(path, ("", "/api/v1")):
            for method in others:
                answer = world.server.http.request(method, prefix + world.target(path))
                assert answer.status_code == 405, (method, path)
                assert_answers(DOCUMENT["components"]["responses"]["MethodNotAllowed"], answer)
                allowed = set(answer.headers["allow"].split(", ")) - {"HEAD"}
                assert allowed == {each.upper() for each in methods}


def test_where_get_is_answered_with_json_head_is_too(world: World) -> None:
    for method, path in OPERATIONS:
        if method == "GET" and "application/json" in operation(method, path)["responses"].get("200", {}).get(
            "content", {}
        ):
            assert world.server.http.head(world.target(path)).status_code in (200, 404)


# --- Every example ---------------------------------------------------------------------------------------------------

WRITES = [
    (method, path, name)
    for method, path in OPERATIONS
    if "requestBody" in operation(method, path)
    for name in operation(method, path)["requestBody"]["content"]["application/json"]["examples"]
]
READS = [(method, path) for method, path in OPERATIONS if method in ("GET", "DELETE") and path != SOCKET]


@pytest.mark.parametrize(("method", "path", "name"), WRITES)
def test_every_example_is_taken(world: World, method: str, path: str, name: str) -> None:
    examples = operation(method, path)["requestBody"]["content"]["application/json"]["examples"]
    body = world.said(examples[name]["value"])
    if path == "/sessions" and body:
        body["session_id"] = f"new-{next(_numbers)}"

    assert world.send(method, path, json=body).is_success


@pytest.mark.parametrize(("method", "path"), READS)
def test_everything_is_read_with_and_without_its_parameters(world: World, method: str, path: str) -> None:
    asked = [resolved(each) for each in operation(method, path)["parameters"]]
    shown = {each["name"]: world.said(each["example"]) for each in asked if each["in"] == "query" and "example" in each}
    world.server.post({"type": "switch_agent", "agent_type": "debug"}, world.session_id)

    if shown:
        assert world.send(method, path, params=shown).is_success
    assert world.send(method, path).is_success


def test_an_optional_body_may_be_missing(world: World) -> None:
    for method, path, _ in WRITES:
        is_optional = not operation(method, path)["requestBody"]["required"]
        assert world.send(method, path).is_success == is_optional


# --- What the schema refuses is what the server refuses --------------------------------------------------------------

# Refused for what is known of the state, not for the shape.
BY_STATE = {"unknown_agent", "agent_already_active", "session_id_taken", "arguments_changed"}
SHAPES: list[Any] = [None, 7, True, "", " ", "x", [], {}]
MUTATED = [
    ("POST", "/sessions", "an id of one's own", ()),
    ("PATCH", "/sessions/{session_id}", "a title", ()),
    ("POST", "/agents/{session_id}/switch", "with confidence", ()),
    ("POST", DECIDE, "approval of what was seen", ()),
    ("POST", DECIDE, "edit", ()),
    ("POST", STREAM, "user message without token deltas", ()),
    ("POST", STREAM, "user message to an agent", ("message",)),
    ("POST", STREAM, "switch of the agent", ("message",)),
    ("POST", STREAM, "tool result that is an error", ("message",)),
    ("POST", STREAM, "approval", ("message",)),
    ("POST", STREAM, "edit", ("message",)),
]


def mutations(body: dict[str, Any], component: str, within: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The body with one field missing, of another type, too long or just not."""
    schema = resolved({"$ref": f"#/components/schemas/{component}"})
    for step in within:
        schema, inner = resolved(schema["properties"][step]), body[step]
        if "discriminator" in schema:
            schema = resolved({"$ref": schema["discriminator"]["mapping"][inner["type"]]})
    inner = body[within[0]] if within else body
    for name, of_field in schema["properties"].items():
        edges = ["x" * (of_field["maxLength"] + beyond) for beyond in (0, 1)] if "maxLength" in of_field else []
        dropped = {key: value for key, value in inner.items() if key != name}
        for other in [dropped, *({**inner, name: value} for value in [*SHAPES, *edges])]:
            # The arguments themselves are judged by the tool's own schema.
            if other.get("modified_arguments") != {}:
                yield {**body, within[0]: other} if within else other


@pytest.mark.parametrize(("method", "path", "name", "within"), MUTATED)
def test_a_body_is_taken_if_and_only_if_it_fits_its_schema(
    server: Server, llm: PlannedLLM, method: str, path: str, name: str, within: tuple[str, ...]
) -> None:
    media = operation(method, path)["requestBody"]["content"]["application/json"]
    component = media["schema"]["$ref"].rpartition("/")[2]
    fits = validator(media["schema"])
    world, tried = new_world(server, llm), 0
    for body in mutations(media["examples"][name]["value"], component, within):
        body = world.said(body)
        answer = world.send(method, path, json=body)
        if answer.is_error and answer.json()["code"] in BY_STATE:
            continue
        assert (answer.is_success and "invalid_decision" not in answer.text) == fits.is_valid(body), body
        if answer.is_success:
            world = new_world(server, llm)
        tried += 1
    assert tried > 5


def values_of(schema: dict[str, Any]) -> list[str]:
    """Some that fit and some that do not, as a query spells them."""
    if schema["type"] == "integer":
        least, most = schema["minimum"], schema["maximum"]
        return [str(least), str(most), str(least - 1), str(most + 1), "x", "1.5", ""]
    if schema["type"] == "boolean":
        return ["true", "false", "maybe", "2"]
    edges = ["x" * (schema["maxLength"] + beyond) for beyond in (0, 1)] if "maxLength" in schema else []
    return [*schema.get("enum", []), *edges, "1", "x"]


def test_a_parameter_is_taken_if_and_only_if_it_fits_its_schema(world: World) -> None:
    for method, path in OPERATIONS:
        for each in map(resolved, operation(method, path)["parameters"]):
            if path == SOCKET or each["in"] == "path" or each["name"] in ("X-Request-ID", "Idempotency-Key"):
                continue
            for value in values_of(each["schema"]):
                where = "params" if each["in"] == "query" else "headers"
                answer = world.send(method, path, **{where: {each["name"]: value}})
                read = json.loads(value) if re.fullmatch("-?[0-9]+|true|false", value) else value
                fits = validator(each["schema"]).is_valid(value if each["schema"]["type"] == "string" else read)
                assert answer.is_success == fits, (path, each["name"], value)
            if each["in"] == "query" and path != FOLLOW:
                assert world.send(method, path, params=[(each["name"], "1"), (each["name"], "1")]).status_code == 422


@pytest.mark.parametrize("key", ["", "x", "a,b", "a b", "\u00fc", "x" * 255, "x" * 256])
def test_a_key_is_taken_if_and_only_if_it_fits_its_schema(world: World, key: str) -> None:
    described = DOCUMENT["components"]["parameters"]["IdempotencyKey"]
    keyed = [each for each in OPERATIONS if "requestBody" in operation(*each) and each[0] == "POST"]
    headers = [(described["name"].encode(), key.encode())]

    assert [each for each in OPERATIONS if {"$ref": KEY_PARAMETER} in operation(*each)["parameters"]] == keyed
    fits = validator(described["schema"]).is_valid(key)
    assert world.send("POST", "/sessions", headers=headers).is_success == fits
    if fits:
        refused(world.send("POST", "/sessions/{session_id}/cancel", headers=headers), 422, "idempotency_key_reused")
    for method, path in keyed:
        name = next(iter(operation(method, path)["requestBody"]["content"]["application/json"]["examples"]))
        example = operation(method, path)["requestBody"]["content"]["application/json"]["examples"][name]["value"]
        answer = world.send(method, path, json=world.said(example), headers=headers)
        if path != "/sessions":
            refused(answer, *((422, "idempotency_key_reused") if fits else (400, "invalid_idempotency_key")))


# --- Every refusal ---------------------------------------------------------------------------------------------------

MALFORMED: dict[str, tuple[bytes, int]] = {
    "a foreign host": (b"Host: evil.example", 400),
    "two hosts": (b"Host: localhost\r\nHost: localhost", 400),
    "a compressed body": (b"Host: localhost\r\nContent-Encoding: gzip", 415),
    "too large a body": (b"Host: localhost\r\nContent-Length: %d" % (3 * MIB), 413),
    "too large a head": (b"Host: localhost\r\nX-Long: " + b"a" * 40_000, 431),
    "half a body": (b"Host: localhost\r\nContent-Length: 50", 408),
}
UNREADABLE: dict[str, tuple[bytes, str, int]] = {
    "no JSON": (b"{", "application/json", 400),
    "too deep": (b"[" * 65 + b"]" * 65, "application/json", 400),
    "another type": (b"{}", "text/plain", 415),
    "a list": (b"[]", "application/json", 422),
    "a key twice": (b'{"a":1,"a":1}', "application/json", 422),
    "too many keys": (b"{%s}" % b",".join(b'"%d":1' % number for number in range(10_001)), "application/json", 413),
}
RULE = "INSERT INTO agents_app_approvalrule (position, tool, agent, outcome, reason, self_approval, is_active)"
APPROVE = {"decision": "approve"}


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused_everywhere(world: World, name: str) -> None:
    head, status = MALFORMED[name]

    def sent(each: tuple[str, str]) -> tuple[int, str, str]:
        line = request_of(each[0], world.target(each[1]), host=None).partition(b"\r\n\r\n")[0]
        answer = answered(exchange(world.server, line + b"\r\n" + head + b"\r\n\r\n"))
        assert_true(*each, answer)
        return (answer.status_code, *each)

    # Together, because half a body is waited for.
    with ThreadPoolExecutor(len(OPERATIONS)) as pool:
        assert set(pool.map(sent, OPERATIONS)) == {(status, *each) for each in OPERATIONS}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_body_that_cannot_be_read_is_refused(world: World, name: str) -> None:
    content, media_type, status = UNREADABLE[name]
    for method, path in {write[:2] for write in WRITES}:
        answer = world.send(method, path, content=content, headers={"Content-Type": media_type})
        # Where nothing is asked for, it does not matter what an object says.
        harmless = name == "too many keys" and path.endswith("/cancel")
        assert answer.status_code == (413 if harmless else status), path


OPEN = ("/health", *PROBES)


def test_without_the_key_everything_but_health_is_refused(world: World) -> None:
    keys: list[dict[str, str]] = [{}, {"X-Internal-Auth": "wrong"}, {"Authorization": "Basic x"}]
    with httpx.Client(base_url=world.server.url) as stranger:
        for (method, path), headers in product(OPERATIONS, keys):
            answer = stranger.request(method, world.target(path), headers=headers)
            assert_true(method, path, answer)
            assert answer.status_code == (200 if path in OPEN else 401)


def test_an_id_of_nothing_is_404(world: World) -> None:
    for method, path in OPERATIONS:
        if "{" in path and path != SOCKET:
            body = {"title": "x", "target_agent": "ask", "reason": "", "decision": "approve"}
            kinds = {"{session_id}": ("nobody", "n%20body"), "{call_id}": ("call_" + "A" * 22, "call_1")}
            unknown, impossible = kinds[re.findall(r"\{\w+\}", path)[0]]
            for target in (unknown, impossible):
                url = re.sub(r"\{\w+\}", target, path)
                answer = world.server.http.request(method, url, json=body if method in ("POST", "PATCH") else None)
                assert_true(method, path, answer)
                assert answer.status_code == 404
                assert (answer.json()["code"] == "not_found") == (target == impossible)
    assert_true("GET", SOCKET, world.server.http.get(world.target(SOCKET)))
    world.send("DELETE", "/sessions/{session_id}")
    talk = {"session_id": world.session_id, "message": {"type": "user_message", "content": "hi"}}
    refused(world.send("POST", STREAM, json=talk), 404, "session_not_found")


def test_conflicts_and_what_is_known_of_the_state(server: Server, llm: PlannedLLM, world: World) -> None:
    switch = "/agents/{session_id}/switch"
    refused(world.send("POST", "/sessions", json={"session_id": world.session_id}), 409, "session_id_taken")
    refused(world.send("POST", switch, json={"target_agent": "coder", "reason": ""}), 400, "agent_already_active")
    refused(world.send("POST", switch, json={"target_agent": "nobody", "reason": ""}), 400, "unknown_agent")
    change(server, f"UPDATE sessions_app_session SET switch_count = 50 WHERE id = '{world.session_id}'")  # noqa: S608
    refused(world.send("POST", switch, json={"target_agent": "ask", "reason": ""}), 400, "too_many_switches")
    stranger = {"type": "user_message", "content": "hi", "agent_type": "nobody"}
    talk = {"session_id": world.session_id, "message": stranger}
    refused(world.send("POST", STREAM, json=talk), 400, "unknown_agent")

    refused(world.send("POST", DECIDE, json={**APPROVE, "args_hash": "x"}), 409, "arguments_changed")
    edit = {"decision": "edit", "modified_arguments": {"path": 7}}
    refused(world.send("POST", DECIDE, json=edit), 422, "invalid")
    with denied(server):
        refused(world.send("POST", DECIDE, json=APPROVE), 409, "policy_changed")
    with others_decide(server):
        refused(world.send("POST", DECIDE, json=APPROVE), 403, "self_approval_forbidden")
    assert world.send("POST", DECIDE, json=APPROVE).is_success
    refused(world.send("POST", DECIDE, json=APPROVE), 409, "already_decided")

    server.http.post("/sessions", json={"session_id": "silent"})
    silent = World(server, "silent", "", "")
    refused(silent.send("GET", "/events/metrics/session/{session_id}"), 404, "no_metrics")


@contextmanager
def denied(server: Server) -> Iterator[None]:
    change(server, f"{RULE} VALUES (0, 'write_file', '', 'deny', 'Not today.', false, true)")
    yield
    change(server, "DELETE FROM agents_app_approvalrule WHERE position = 0")


@contextmanager
def asked(server: Server) -> Iterator[None]:
    change(server, f"{RULE} VALUES (0, 'switch_mode', '', 'ask', 'Who is next.', true, true)")
    yield
    change(server, "UPDATE agents_app_approvalrequest SET rule_id = NULL WHERE tool_name = 'switch_mode'")
    change(server, "DELETE FROM agents_app_approvalrule WHERE position = 0")


@contextmanager
def others_decide(server: Server) -> Iterator[None]:
    change(server, f"{RULE} VALUES (0, '*', '', 'ask', '', false, true)")
    change(server, "UPDATE agents_app_approvalrule SET self_approval = false")
    yield
    change(server, "UPDATE agents_app_approvalrule SET self_approval = true")
    change(server, "DELETE FROM agents_app_approvalrule WHERE position = 0")


def test_one_message_too_many_is_429(server: Server, llm: PlannedLLM, world: World) -> None:
    gate = Gate()
    said = llm.plan(hold("One ", "moment.", gate=gate))
    talk = {"session_id": world.session_id, "message": {"type": "user_message", "content": said}}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.http.post, STREAM, json=talk)
        gate.reached.wait()
        second = pool.submit(server.http.post, STREAM, json=talk)
        count_turns = "count(*)", "sessions_app_turn", world.session_id
        eventually(lambda: stored(server, *count_turns) == 3)
        refused(world.send("POST", STREAM, json=talk), 429, "queue_full")
        refused(world.send("POST", STREAM, json={**talk, "busy": "reject"}), 409, "turn_running")
        gate.open()
        for answer in (first.result(), second.result()):
            assert_true("POST", STREAM, answer)


def test_one_stream_too_many_is_503(world: World) -> None:
    with ExitStack() as held:
        streams = [held.enter_context(world.server.following(world.session_id)) for _ in range(PLACES)]
        assert [next(frames).type for frames in streams] == ["turn_started"] * PLACES
        for method, path in (("GET", FOLLOW), ("POST", STREAM)):
            refused(world.send(method, path), 503, "too_many_streams")
        assert_true("GET", SOCKET, handshake(world, 503))
    eventually(lambda: world.send("GET", FOLLOW).is_success)


TABLES = ("sessions_app_session", "agents_app_agent", "events_app_event", "events_app_modelcall")


def test_without_the_database_everything_but_health_is_503(world: World) -> None:
    bodies = {(method, path): (path, name) for method, path, name in WRITES}
    with databases.without(world.server.database, *TABLES):
        for method, path in OPERATIONS:
            if path in (SOCKET, "/readyz"):
                continue
            options: dict[str, Any] = {}
            if (method, path) in bodies:
                media = operation(method, path)["requestBody"]["content"]["application/json"]
                options = {"json": world.said(media["examples"][bodies[method, path][1]]["value"])}
            answer = world.send(method, path, **options)
            if path in OPEN:
                assert answer.is_success
            else:
                refused(answer, 503, "unavailable")
        eventually(lambda: world.send("GET", "/readyz").status_code == 503)
    eventually(lambda: world.send("GET", "/readyz").is_success)


def test_what_cannot_be_written_down_is_not_done(world: World) -> None:
    talk = {"session_id": world.session_id, "message": {"type": "user_message", "content": "hi"}}
    with databases.without(world.server.database, "events_app_auditentry"):
        refused(world.send("POST", DECIDE, json=APPROVE), 503, "audit_unavailable")
        refused(world.send("POST", "/sessions/{session_id}/cancel"), 503, "audit_unavailable")
        refused(world.send("DELETE", "/sessions/{session_id}"), 503, "audit_unavailable")
        refused(world.send("POST", STREAM, json=talk), 503, "audit_unavailable")


def test_a_fault_of_ours_is_500(world: World) -> None:
    talk = {"session_id": "of-nobody", "message": {"type": "user_message", "content": "hi"}}
    with databases.refusing(world.server.database, "events_app_event", "1 = 1", as_fault=True):
        refused(world.send("POST", STREAM, json=talk), 500, "internal_error")


# --- Every frame of a stream -----------------------------------------------------------------------------------------

Recording = dict[str, list[Frame]]
SWITCH = {"type": "switch_agent", "agent_type": "coder"}


def let_time_run_out(server: Server, call_id: str) -> None:
    change(server, f"UPDATE sessions_app_toolcall SET deadline_at = released_at WHERE call_id = '{call_id}'")  # noqa: S608


def give_up(server: Server, call_id: str) -> None:
    program = "from tests.factories import OPERATOR; from sessions_app import models, unanswered;"
    act = f"unanswered.give_up(OPERATOR, models.ToolCall.objects.get(pk='{call_id}'), 'Gone.')"
    outcome = server.manage("shell", "-c", program + act)
    assert outcome.returncode == 0, outcome.stderr


class Recorder:
    """Plays conversations and keeps every frame, of the answers and of the sessions' own streams."""

    def __init__(self, server: Server, llm: PlannedLLM) -> None:
        self.server = server
        self.llm = llm
        self.recording: Recording = {}

    def world(self) -> World:
        return new_world(self.server, self.llm)

    def answer(self, name: str, session_id: str, message: dict[str, Any], **envelope: Any) -> list[Frame]:
        answer = self.server.post(message, session_id, **envelope)
        self.recording.setdefault(name, []).extend(answer)
        return answer

    def talk(self, name: str, *replies: Any, agent: str | None = None, **envelope: Any) -> list[Frame]:
        """A session of its own, one message, these replies of the model."""
        said = self.llm.plan(*replies)
        message = {"type": "user_message", "content": said, **({"agent_type": agent} if agent else {})}
        return self.answer(name, f"talk-{next(_numbers)}", message, **envelope)

    def decide(self, name: str, world: World, **decision: Any) -> list[Frame]:
        message = {"type": "hitl_decision", "call_id": world.call_id, **decision}
        return self.answer(name, world.session_id, message)

    def follow(self, name: str, world: World, **options: Any) -> None:
        lines = world.follow(**options).text.split("\n")
        self.recording.setdefault(name, []).extend(parse_frames(iter(lines)))


@pytest.fixture(scope="module")
def recording(server: Server, llm: PlannedLLM) -> Recording:
    on = Recorder(server, llm)
    llm.route("ask")
    on.talk("tokens and routing", say("Hello there."))
    on.talk("without tokens", say("Hello there."), agent="ask", stream_tokens=False)
    on.talk("a handoff by the model", call("switch_mode", {"mode": "debug"}), say("Found it."), agent="ask")
    on.talk("a tool that needs nobody", call("read_file", {"path": "a.md"}, text="Let me see."), agent="coder")
    both = calls(call("read_file", {"path": "a.md"}), call("write_file", ARGUMENTS), text="Two things.")
    on.talk("several calls", both, agent="coder")
    on.talk("a tool that the agent may not use", call("write_file", ARGUMENTS), say("No."), agent="ask")
    on.talk(
        "a file that it may not write",
        call("write_file", {"path": "a.py", "content": ""}),
        say("No."),
        agent="architect",
    )
    with denied(server):
        on.talk("a rule that denies", call("write_file", ARGUMENTS), say("No."), agent="coder")
    with asked(server):
        waits = on.talk("a call that the server executes", call("switch_mode", {"mode": "debug"}), agent="ask")
    [moved] = [frame.data for frame in waits if frame.type == "server_call"]
    session_id = f"talk-{next(_numbers) - 1}"
    on.answer("its result", session_id, {"type": "tool_result", "call_id": moved["call_id"], "result": "mine"})
    on.talk("a model that refuses", status(400), agent="ask")
    on.talk("a model that breaks off", drop("Half a "), agent="ask")
    on.talk("a model that says nothing", empty(), empty(), agent="ask")

    world = on.world()
    on.answer("switches", world.session_id, {**SWITCH, "agent_type": "ask", "reason": "A question"})
    on.answer("switches", world.session_id, {**SWITCH, "agent_type": "ask"})
    on.answer("switches", world.session_id, {**SWITCH, "agent_type": "coder", "reason": None})

    world = on.world()
    on.decide("approved and executed", world, decision="approve")
    result = {"type": "tool_result", "call_id": world.call_id, "result": {"success": True}}
    on.answer("approved and executed", world.session_id, result)
    on.answer("a second result", world.session_id, result)
    on.decide("a second decision", world, decision="reject")
    on.follow("approved, from the beginning", world)
    on.follow("approved, from the middle", world, headers={"Last-Event-ID": "2"})
    on.follow("from a position that never was", world, params={"after": "900000"})

    world = on.world()
    on.decide("edited", world, decision="edit", modified_arguments={"path": "b.md", "content": "y"}, feedback="Shorter")
    world = on.world()
    on.decide("rejected", world, decision="reject", feedback="Not this file.")
    world = on.world()
    world.send("POST", "/sessions/{session_id}/cancel")
    on.follow("cancelled", world)
    world = on.world()
    on.answer("superseded", world.session_id, {"type": "user_message", "content": "Something else"})
    on.follow("superseded", world)

    for name, end in (("timed out", let_time_run_out), ("given up", give_up)):
        world = on.world()
        on.decide(name, world, decision="approve")
        end(server, world.call_id)
        eventually(lambda ended=world: stored(server, "status", "sessions_app_turn", ended.session_id) == "completed")
        on.follow(name, world)

    world = on.world()
    on.decide("refused", world, decision="maybe")
    on.decide("refused", world, decision="approve", args_hash="x")
    with denied(server):
        on.decide("refused", world, decision="approve")
    with others_decide(server):
        on.decide("refused", world, decision="approve")
    on.answer("refused", world.session_id, {"type": "tool_result", "call_id": "call_x"})
    on.answer("refused", world.session_id, {"type": "hitl_decision", "call_id": "call_x", "decision": "approve"})
    return on.recording


KINDS = {
    each["$ref"].rpartition("/")[2]
    for chunk in DOCUMENT["components"]["schemas"]["Chunk"]["oneOf"]
    for each in ([chunk] if "properties" in resolved(chunk) else resolved(chunk)["oneOf"])
}


def kinds_of(frame: Frame) -> set[str]:
    if frame.event == "done":
        return {"StreamEnd"}
    return {kind for kind in KINDS if COMPONENTS[kind].is_valid(frame.data)}


def test_every_frame_of_every_recorded_stream_is_what_is_documented(recording: Recording) -> None:
    assert len(recording) > 20
    for name, frames in recording.items():
        assert frames, name
        for frame in frames:
            assert_framed(frame)
            assert len(kinds_of(frame)) == 1, (name, frame)


def test_each_kind_of_frame_was_recorded(recording: Recording) -> None:
    recorded = {kind for frames in recording.values() for frame in frames for kind in kinds_of(frame)}
    codes = {
        frame.data["metadata"]["code"] for frames in recording.values() for frame in frames if frame.type == "error"
    }
    ends = {
        (frame.data["status"], frame.data["code"])
        for frames in recording.values()
        for frame in frames
        if frame.type == "turn_finished"
    }

    # That one needs a server that dies.
    assert recorded == (KINDS | {"StreamEnd"}) - {"RestartedChunk"}
    assert codes >= {*REFUSES_A_CALL, *ENDS_A_CALL, *REFUSES_A_MESSAGE, "already_decided"}
    assert codes >= {"model_rejected", "model_interrupted", "model_empty_answer"}
    assert ends >= {("completed", None), ("cancelled", "superseded"), ("cancelled", "cancelled")}
    assert {status for status, _ in ends} == {"completed", "failed", "cancelled"}


def test_a_stream_over_the_death_of_its_server_is_what_is_documented(
    tmp_path: Path, llm: PlannedLLM, migrated: Path
) -> None:
    gate = Gate()
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="1") as mortal:
        said = llm.plan(hold("Half a ", "lost sentence.", gate=gate), say("A whole sentence."))
        message = {"type": "user_message", "content": said, "agent_type": "coder"}
        with mortal.streaming(message, "mortal") as answer:
            seen = until(answer, "assistant_message")
            gate.reached.wait()
            mortal.kill()
        gate.open()
        mortal.start()
        with mortal.following("mortal", after=seen[-1].seq) as rest:
            seen += until(rest, "turn_finished")

    assert "RestartedChunk" in {kind for frame in seen for kind in kinds_of(frame)}
    for frame in seen:
        assert_framed(frame)


# --- The socket ------------------------------------------------------------------------------------------------------


def socket_to(world: World, prefix: str = "", query: str = "", **headers: str) -> ClientConnection:
    address = f"ws://127.0.0.1:{world.server.port}{prefix}{world.target(SOCKET)}{query}"
    return connect(address, additional_headers={**AUTH, **headers}, proxy=None, open_timeout=15)


def handshake(world: World, status: int, **headers: str) -> httpx.Response:
    """How it is refused."""
    with pytest.raises(InvalidStatus) as caught:
        socket_to(world, **headers)
    response = caught.value.response
    assert response.status_code == status
    return httpx.Response(status, headers=list(response.headers.raw_items()), content=bytes(response.body))


def heard(connection: ClientConnection, message: Any) -> list[Any]:
    """Everything that comes for one message, held against the document."""
    connection.send(message if isinstance(message, str) else json.dumps(message))
    connection.send(json.dumps({"type": "the end"}))
    received = []
    while (chunk := json.loads(connection.recv(timeout=15))).get("content") != "Unknown message type: the end":
        received.append(chunk)
        assert_is("SocketChunk", chunk)
    assert_is("SocketError", chunk)
    return received


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
@pytest.mark.parametrize("name", operation("GET", SOCKET)["x-websocket"]["examples"])
def test_every_example_is_taken_by_the_socket(world: World, llm: PlannedLLM, name: str, prefix: str) -> None:
    message = world.said(operation("GET", SOCKET)["x-websocket"]["examples"][name]["value"])
    with socket_to(world, prefix) as connection:
        assert connection.response is not None
        assert_answers(operation("GET", SOCKET)["responses"]["101"], opened_as(connection))
        received = heard(connection, message)

    assert not [chunk for chunk in received if chunk["type"] == "error"]


def opened_as(connection: ClientConnection) -> httpx.Response:
    assert connection.response is not None
    response = connection.response
    return httpx.Response(response.status_code, headers=list(response.headers.raw_items()))


def test_a_socket_says_nothing_that_is_not_documented(world: World, llm: PlannedLLM) -> None:
    llm.route("coder")
    text = llm.plan(call("write_file", {"path": "b.md", "content": "x"}, text="Let me."), status(400))
    unknown = {"type": "hitl_decision", "call_id": "call_x", "decision": "approve"}
    fresh = World(world.server, f"{world.session_id}-socket", "", "")
    with socket_to(fresh) as connection:
        said = {"type": "user_message", "content": text, "role": "user"}
        kinds = [chunk["type"] for chunk in heard(connection, said)]
        failed = heard(connection, said)
        refusals = [heard(connection, each) for each in ("{", "[]", {"type": "x"}, {"type": "tool_result"}, unknown)]
        agent_error = heard(connection, {**said, "agent_type": "nobody"})

    assert kinds == ["agent_switched", "assistant_message", "tool_call"]
    assert [chunk["metadata"]["code"] for chunk in failed] == ["model_rejected"]
    assert [chunk["type"] for each in refusals for chunk in each] == ["error"] * 5
    assert agent_error == [{"type": "error", "content": "Agent error: 400"}]


def test_a_live_socket_says_nothing_that_is_not_documented(world: World, llm: PlannedLLM) -> None:
    received: list[Any] = []
    with socket_to(world, query="?live=1&tokens=1&after=999") as connection:
        connection.send(json.dumps({"type": "hitl_decision", "call_id": world.call_id, "decision": "reject"}))
        while not received or received[-1]["type"] != "turn_finished":
            received.append(json.loads(connection.recv(timeout=15)))
        connection.send(json.dumps({"type": "user_message", "content": llm.plan(status(400)), "role": "user"}))
        while received[-1].get("status") != "failed":
            received.append(json.loads(connection.recv(timeout=15)))
        connection.send("{")
        received.append(json.loads(connection.recv(timeout=15)))
    with socket_to(world, query="?live=1") as connection:
        received.append(json.loads(connection.recv(timeout=15)))

    for message in received:
        assert_is("NumberedChunk", message)
    assert {message["type"] for message in received} == {
        *("stream_position", "stream_reset", "turn_started", "turn_finished"),
        *("assistant_message", "tool_call", "approval_resolved", "error"),
    }
    assert [message for message in received if "id" not in message] == received[-2:-1]


SOCKET_SHAPES: list[Any] = [None, 7, "", [], {}]


def test_a_socket_refuses_what_does_not_fit_the_schema(world: World) -> None:
    for example in operation("GET", SOCKET)["x-websocket"]["examples"].values():
        message = example["value"]
        mapping = DOCUMENT["components"]["schemas"]["SocketMessage"]["discriminator"]["mapping"]
        schema = resolved({"$ref": mapping[message["type"]]})
        bad = []
        for name in schema["properties"]:
            dropped = {key: value for key, value in message.items() if key != name}
            bad += [dropped, *({**message, name: value} for value in SOCKET_SHAPES)]
        with socket_to(world) as connection:
            for each in map(world.said, bad):
                if not COMPONENTS["SocketMessage"].is_valid(each):
                    (received,) = heard(connection, each)
                    assert_is("SocketError", received)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"X-Internal-Auth": "wrong"}, 401, "unauthorized"),
        ({"Origin": "http://evil.example"}, 403, "foreign_origin"),
        ({"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        (
            {"X-Long": "a" * 8000, "X-Long-2": "a" * 8000, "X-3": "a" * 8000, "X-4": "a" * 8000, "X-5": "a" * 8000},
            431,
            "headers_too_large",
        ),
    ],
)
def test_a_handshake_is_refused_as_documented(world: World, headers: dict[str, str], status: int, code: str) -> None:
    answer = handshake(world, status, **headers)

    assert_true("GET", SOCKET, answer)
    assert answer.json()["code"] == code

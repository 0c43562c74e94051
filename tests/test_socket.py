"""The WebSocket: who may open one, and that it answers message for message as the old gateway did (protocol 9.1)."""

import asyncio
import json
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response
from websockets.sync.client import ClientConnection, connect

from orchestrator_site.errors import APIError
from orchestrator_site.sockets import sockets
from tests import databases
from tests.scripted_llm import Gate, Say, ScriptedLLM, call, hold, say
from tests.server import AUTH, KEY, Server, eventually, running, until

PATIENCE = 15
MIB = 1024 * 1024
NO_KEY: dict[str, str] = {}
PLACES = 50


class Chat:
    """One open socket. Messages are answered in their order: the answer to a last one marks the end of the others'."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def send(self, message: Any) -> None:
        self.connection.send(message if isinstance(message, str) else json.dumps(message))

    def receive(self) -> dict[str, Any]:
        frame = self.connection.recv(timeout=PATIENCE)
        assert isinstance(frame, str)
        message: dict[str, Any] = json.loads(frame)
        return message

    def answer_to(self, message: Any) -> list[dict[str, Any]]:
        """Everything that comes for one message."""
        self.send(message)
        self.send({"type": "the end"})
        answer = []
        while (received := self.receive()) != error("Unknown message type: the end"):
            answer.append(received)
        return answer


def user(content: str, **others: Any) -> dict[str, Any]:
    return {"type": "user_message", "content": content, "role": "user", **others}


def frame(opcode: int, data: bytes) -> bytes:
    """A WebSocket frame of a client, masked with zeros."""
    size = len(data)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 127]) + struct.pack("!Q", size)
    return bytes([0x80 | opcode]) + length + bytes(4) + data


@contextmanager
def opened(server: Server, path: str, headers: Any = AUTH, **options: Any) -> Iterator[Chat]:
    address = f"ws://127.0.0.1:{server.port}{path}"
    with connect(address, additional_headers=headers, proxy=None, open_timeout=PATIENCE, **options) as connection:
        yield Chat(connection)


def refusal(server: Server, path: str = "/ws/refused", headers: Any = AUTH, *, host: str = "localhost") -> Response:
    """How the server answers a handshake that it refuses."""
    address = f"ws://{host}:{server.port}{path}"
    plain = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    with closing(plain), pytest.raises(InvalidStatus) as caught:
        connect(address, additional_headers=headers, sock=plain, open_timeout=PATIENCE)
    return caught.value.response


def assert_refused(response: Response, status: int, code: str) -> None:
    body = json.loads(bytes(response.body))
    assert (response.status_code, body["code"]) == (status, code)
    assert set(body) == {"detail", "code", "request_id"}
    assert response.headers["X-Request-ID"] == body["request_id"]


def error(text: str) -> dict[str, Any]:
    return {"type": "error", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"type": "assistant_message", "content": text, "is_final": True}


def parrot(request: dict[str, Any]) -> Say:
    """A model that says what it was told, in one piece."""
    return say("", pieces=[request["messages"][-1]["content"]])


def on_coder(server: Server, session_id: str) -> str:
    """A session that needs no routing."""
    server.post({"type": "switch_agent", "agent_type": "coder"}, session_id)
    return session_id


@pytest.fixture(scope="module")
def server(shared_server: Server, shared_llm: ScriptedLLM) -> Iterator[Server]:
    """The server of most tests, which none of them may surprise."""
    shared_llm.default = parrot
    yield shared_server
    log = shared_server.log.read_text()
    assert "Traceback" not in log, log
    assert '"ERROR"' not in log, log
    assert KEY not in log


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory, migrated: Path, shared_llm: ScriptedLLM) -> Iterator[Server]:
    """One that lets everybody in, with a single place, and cuts a reader that takes nothing after a second."""
    limits = {"STREAMS_AT_ONCE": "1", "STREAM_STALL_SECONDS": "1"}
    folder = tmp_path_factory.mktemp("open")
    with running(folder, migrated, LLM_BASE_URL=shared_llm.url, WS_WITHOUT_KEY="always", **limits) as started:
        shared_llm.default = parrot
        on_coder(started, "open")
        yield started


@pytest.fixture(scope="module")
def local_server(tmp_path_factory: pytest.TempPathFactory, migrated: Path, shared_llm: ScriptedLLM) -> Iterator[Server]:
    """One that lets in without a key who is on the same machine."""
    folder, places = tmp_path_factory.mktemp("local"), {"STREAMS_AT_ONCE": str(PLACES)}
    with running(folder, migrated, LLM_BASE_URL=shared_llm.url, WS_WITHOUT_KEY="loopback", **places) as started:
        yield started


@contextmanager
def last_place(server: Server, path: str = "/ws/open", headers: Any = NO_KEY) -> Iterator[Chat]:
    """A socket on a server with a single place, as soon as that is free."""

    def attempt() -> ClientConnection | None:
        address = f"ws://127.0.0.1:{server.port}{path}"
        with suppress(InvalidStatus):
            return connect(address, additional_headers=headers, proxy=None, open_timeout=PATIENCE)
        return None

    with eventually(attempt) as connection:
        yield Chat(connection)


# --- The handshake --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/ws/a", "/api/v1/ws/a", "/ws/" + "x" * 128, "/ws/A.b_c-9", "/ws/%61", "/ws/a?x=1"])
def test_a_socket_opens_under_both_prefixes_for_any_session_id(server: Server, path: str) -> None:
    with opened(server, path) as chat:
        assert chat.answer_to({"type": "?"}) == [error("Unknown message type: ?")]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/ws",
        "/ws/",
        "/ws/a/",
        "/ws/a/b",
        "/ws/a%2Fb",
        "/ws/" + "x" * 129,
        "/ws/a%20b",
        "/ws/a%00",
        "/ws/a%0A",
        "/ws/%D1%8F",
        "/ws/%FF%FE",
        "/ws/a;b",
        "/ws/a:b",
        "/ws/../ws/a",
        "//ws/a",
        "/WS/a",
        "/api/v1",
        "/api/v1/ws",
        "/api/v2/ws/a",
        "/api/v1/api/v1/ws/a",
        "/agents",
        "/sessions/a/stream",
        "/agent/message/stream",
        "/admin/",
    ],
)
def test_every_other_path_takes_no_socket(server: Server, path: str) -> None:
    if path.removeprefix("/api/v1").startswith("/ws/"):
        assert_refused(refusal(server, path), 404, "not_found")
    else:
        assert_refused(refusal(server, path), 400, "bad_request")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.2"])
def test_a_foreign_host_is_refused(server: Server, host: str) -> None:
    assert_refused(refusal(server, host=host), 400, "invalid_host")


@pytest.mark.parametrize(
    "origin",
    ["http://localhost", "http://localhost:3000", "https://127.0.0.1", "http://[::1]:8000", "HTTP://LocalHost"],
)
def test_a_page_of_an_allowed_host_may_connect(server: Server, origin: str) -> None:
    with opened(server, "/ws/page", origin=origin) as chat:
        assert chat.answer_to("[]") == [error("Invalid JSON message: it has to be an object")]


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "garbage",
        "localhost",
        "//localhost",
        "http://",
        "http://evil.example",
        "http://evil.example:8000",
        "http://localhost.evil.example",
        "http://evil.example/localhost",
        "http://localhost@evil.example",
        "http://evil.example#localhost",
        "http://localhost/",
        "http://localhost:port",
        "http://localhost http://localhost",
        "http://localhost,http://localhost",
        "file://localhost",
        "chrome-extension://localhost",
        "javascript:localhost",
        "http://localhost\u00e4",
        "*",
    ],
)
@pytest.mark.parametrize("key", [AUTH, NO_KEY], ids=["with the key", "without"])
def test_any_other_origin_is_foreign_with_the_right_key_too(server: Server, origin: str, key: dict[str, str]) -> None:
    assert_refused(refusal(server, headers={**key, "Origin": origin}), 403, "foreign_origin")


def test_two_origins_are_foreign(server: Server) -> None:
    twice = [*AUTH.items(), ("Origin", "http://localhost"), ("Origin", "http://localhost")]

    assert_refused(refusal(server, headers=twice), 403, "foreign_origin")


@pytest.mark.parametrize(
    "headers", [{"x-internal-auth": KEY}, {"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY} "}]
)
def test_the_key_opens_a_socket_in_either_header(server: Server, headers: dict[str, str]) -> None:
    with opened(server, "/ws/key", headers) as chat:
        assert chat.answer_to({"type": "?"})


WRONG_KEYS: dict[str, Any] = {
    "wrong": {"X-Internal-Auth": "wrong-key-wrong-key-wrong-key-wrong-key!"},
    "empty": {"X-Internal-Auth": ""},
    "one character more": {"X-Internal-Auth": KEY + "x"},
    "one character less": {"X-Internal-Auth": KEY[:-1]},
    "beyond ASCII": {"X-Internal-Auth": "\xff" + KEY},
    "wrong bearer": {"Authorization": "Bearer wrong"},
    "empty bearer": {"Authorization": "Bearer "},
    "another scheme": {"Authorization": f"Basic {KEY}"},
    "no scheme": {"Authorization": KEY},
    "an empty key beside a right bearer": {"X-Internal-Auth": "", "Authorization": f"Bearer {KEY}"},
    "wrong, then right": [("X-Internal-Auth", "wrong"), ("X-Internal-Auth", KEY)],
}


@pytest.mark.parametrize("setting", ["server", "open_server", "local_server"])
@pytest.mark.parametrize("headers", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_wrong_key_is_refused_whoever_may_come_without(
    request: pytest.FixtureRequest, setting: str, headers: Any
) -> None:
    assert_refused(refusal(request.getfixturevalue(setting), headers=headers), 401, "unauthorized")


@pytest.mark.parametrize(
    "path", ["/ws/keyless", "/api/v1/ws/keyless", "/nothing", f"/ws/keyless?X-Internal-Auth={KEY}"]
)
def test_without_a_key_nobody_comes_in_and_one_in_the_query_is_none(server: Server, path: str) -> None:
    assert_refused(refusal(server, path, NO_KEY), 401, "unauthorized")


def test_always_lets_everybody_in_and_writes_down_that_there_was_no_key(open_server: Server) -> None:
    with last_place(open_server, headers={"X-Forwarded-For": "192.0.2.1"}) as chat:
        assert chat.answer_to(user("no key")) == [said("no key")]

    facts = databases.rows(open_server.database, "SELECT CAST(data AS text) FROM events_app_event")
    assert any("socket-without-key" in fact for (fact,) in facts)


@pytest.mark.parametrize("path", ["/ws/local", "/api/v1/ws/local"])
def test_loopback_lets_in_who_is_on_the_same_machine(local_server: Server, path: str) -> None:
    with opened(local_server, path, NO_KEY) as chat:
        assert chat.answer_to({"type": "?"})


@pytest.mark.parametrize("header", ["X-Forwarded-For", "x-forwarded-proto", "Forwarded", "X-Real-IP", "Via"])
def test_loopback_does_not_let_in_who_came_through_a_proxy(local_server: Server, header: str) -> None:
    assert_refused(refusal(local_server, headers={header: "127.0.0.1"}), 401, "unauthorized")


async def handshake(client: Any, headers: dict[str, str]) -> list[str]:
    """What a server is told to send to a client that connects from an address and leaves again."""
    events = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])
    sent: list[str] = []

    async def receive() -> Any:
        return next(events)

    async def send(event: Any) -> None:
        sent.append(event["type"])

    shown = [(name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()]
    await sockets({"type": "websocket", "path": "/ws/a", "client": client, "headers": shown}, receive, send)
    return sent


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_these_addresses_are_on_the_same_machine(settings: Any, address: str) -> None:
    settings.WS_WITHOUT_KEY = "loopback"

    assert asyncio.run(handshake((address, 5), {})) == ["websocket.accept"]


@pytest.mark.parametrize(
    "client",
    [("192.0.2.7", 5), ("10.0.0.1", 5), ("::ffff:192.0.2.7", 5), ("fe80::1%eth0", 5), ("", 5), None],
)
def test_these_are_not(settings: Any, client: Any) -> None:
    settings.WS_WITHOUT_KEY = "loopback"

    with pytest.raises(APIError) as refused:
        asyncio.run(handshake(client, {}))

    assert refused.value.status == 401


def test_a_head_that_is_too_large_is_refused(server: Server) -> None:
    assert_refused(
        refusal(server, headers={**AUTH, **{f"X-{n}": "a" * 7000 for n in range(5)}}), 431, "headers_too_large"
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"X-Long": "a" * 9000}, 431), ({f"X-{n}": "a" for n in range(200)}, 431), ({"Content-Length": "2"}, 400)],
    ids=["a line of 9 KiB", "200 headers", "a body"],
)
def test_a_head_that_is_none_of_a_handshake_is_answered_too(
    server: Server, headers: dict[str, str], status: int
) -> None:
    assert refusal(server, headers={**AUTH, **headers}).status_code == status


def test_there_are_no_more_sockets_than_places(open_server: Server) -> None:
    with last_place(open_server) as chat:
        refused = refusal(open_server, headers=NO_KEY)

        assert_refused(refused, 503, "too_many_streams")
        assert int(refused.headers["Retry-After"]) > 0
        assert open_server.http.get("/sessions/open/stream").status_code == 503
        assert chat.answer_to({"type": "?"})


# --- What a message is answered with --------------------------------------------------------------------------------


def test_what_comes_is_what_the_gateway_would_have_forwarded(server: Server, played: ScriptedLLM) -> None:
    played.script(say("One two three."))

    with opened(server, "/ws/forwarded") as chat:
        answer = chat.answer_to(user("Count."))

    assert [message["type"] for message in answer] == ["agent_switched", "assistant_message"]
    assert answer[1] == said("One two three."), "one message with the whole text, no token"
    with server.following("forwarded") as stream:
        frames = until(stream, "turn_finished")
    assert answer == [frame.data for frame in frames if frame.spaced]
    assert len(frames) > len(answer) + 2, "the stream has tokens and the turn's own frames"


def test_a_switch_is_answered_by_one_chunk(server: Server) -> None:
    with opened(server, "/ws/switch") as chat:
        (switched,) = chat.answer_to({"type": "switch_agent", "agent_type": "debug", "content": "Switched to Debug"})

    assert (switched["type"], switched["to_agent"], switched["is_final"]) == ("agent_switched", "debug", True)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"type": "tool_result", "call_id": "nobody-asked", "result": {}}, "No pending tool call nobody-asked"),
        ({"type": "tool_result", "call_id": "nobody-asked", "error": "x"}, "No pending tool call nobody-asked"),
        (
            {"type": "hitl_decision", "call_id": "nobody-asked", "decision": "approve", "feedback": None},
            "No pending approval found for request_id=nobody-asked",
        ),
    ],
)
def test_a_refusal_that_the_contract_puts_into_the_stream_comes_as_a_chunk(
    server: Server, message: dict[str, Any], text: str
) -> None:
    with opened(server, f"/ws/{on_coder(server, 'unknown-calls')}") as chat:
        (refused,) = chat.answer_to(message)

    assert (refused["type"], refused["content"], refused["error"]) == ("error", text, text)
    assert refused["metadata"]["code"] == "unknown_call"


def test_a_tool_call_is_decided_and_answered_over_the_socket(server: Server, played: ScriptedLLM) -> None:
    arguments = {"path": "a.md", "content": "x"}
    played.script(call("write_file", arguments, text="I write it."), say("Written."))

    with opened(server, f"/ws/{on_coder(server, 'tools')}") as chat:
        text, asked = chat.answer_to(user("Write it."))
        decided = chat.answer_to({"type": "hitl_decision", "call_id": asked["call_id"], "decision": "approve"})
        done = chat.answer_to({"type": "tool_result", "call_id": asked["call_id"], "result": {"success": True}})

    assert text == {**said("I write it."), "is_final": False}
    assert (asked["type"], asked["tool_name"], asked["arguments"]) == ("tool_call", "write_file", arguments)
    assert asked["requires_approval"] is asked["is_final"] is True
    assert decided == [], "the gateway forwards no approval_resolved"
    assert done == [said("Written.")]


def test_the_ides_own_form_with_every_key_and_nulls_is_taken(server: Server) -> None:
    keys = "call_id tool_name arguments requires_approval result error agent_type from_agent to_agent reason metadata"
    with opened(server, f"/api/v1/ws/{on_coder(server, 'ide')}") as chat:
        assert chat.answer_to(user("hello", is_final=None, **dict.fromkeys(keys.split()))) == [said("hello")]


@pytest.mark.parametrize(
    "text", ["one\u2028two\u2029three\x85four", "a\r\n\r\ndata: {}\n", "\u202eabc \U0001f600 \x1b[31m", "ü" * 50_000]
)
def test_a_text_arrives_as_it_was_sent(server: Server, text: str) -> None:
    with opened(server, f"/ws/{on_coder(server, 'texts')}") as chat:
        chat.connection.send(json.dumps(user(text), ensure_ascii=False))

        assert chat.receive() == said(text)


def test_messages_sent_at_once_are_answered_one_after_the_other(server: Server) -> None:
    with opened(server, f"/ws/{on_coder(server, 'order')}") as chat:
        for number in range(5):
            chat.send(user(f"message {number}"))
            chat.send(f"no JSON {number}")

        answers = [chat.receive() for _ in range(10)]

    no_json = error("Invalid JSON message: The body is not valid JSON.")
    assert answers == [answer for number in range(5) for answer in (said(f"message {number}"), no_json)]


def test_more_than_can_wait_is_dropped_and_said_so(server: Server, played: ScriptedLLM) -> None:
    gate = Gate()
    played.script(hold("Slow ", "answer.", gate=gate))
    with opened(server, f"/ws/{on_coder(server, 'impatient')}") as chat:
        chat.send(user("Take your time."))
        gate.reached.wait()
        for number in range(19):
            chat.send({"type": f"waiting {number}"})
        dropped = [chat.receive() for _ in range(3)]
        gate.open()
        answers = [chat.receive() for _ in range(17)]

    assert dropped == [error("Streaming error: too many messages at once")] * 3
    assert answers == [said("Slow answer."), *(error(f"Unknown message type: waiting {n}") for n in range(16))]


def test_a_session_deleted_meanwhile_is_not_found(server: Server) -> None:
    with opened(server, f"/ws/{on_coder(server, 'deleted')}") as chat:
        assert server.http.delete("/sessions/deleted").status_code == 204

        assert chat.answer_to(user("Anybody there?")) == [error("Agent error: 404")]
        assert chat.answer_to({"type": "tool_result", "call_id": "c"}) == [error("Agent error: 404")]


def test_two_sockets_of_one_session_do_not_hear_each_other(server: Server) -> None:
    on_coder(server, "shared")
    with opened(server, "/ws/shared") as one, opened(server, "/ws/shared") as other:
        assert one.answer_to(user("first")) == [said("first")]
        assert other.answer_to(user("second")) == [said("second")]


# --- What no client should send -------------------------------------------------------------------------------------

NOT_JSON = "Invalid JSON message: The body is not valid JSON."
NO_OBJECT = "Invalid JSON message: it has to be an object"
DEEP = "Invalid JSON message: The body is nested deeper than 64 levels."
NO_TEXT = "Invalid JSON message: A text has a NUL or half a surrogate pair."
BLANK = '{"type":"user_message","role":"user","content":%s}'


def message(kind: str, **fields: Any) -> str:
    """A message that is in order but for these fields; `...` takes one away."""
    sound: dict[str, dict[str, Any]] = {
        "user_message": {"content": "hi", "role": "user"},
        "tool_result": {"call_id": "c", "result": None},
        "switch_agent": {"agent_type": "coder", "content": "x"},
        "hitl_decision": {"call_id": "c", "decision": "approve"},
    }
    whole = {"type": kind, **sound[kind], **fields}
    return json.dumps({name: value for name, value in whole.items() if value is not ...})


def invalid(detail: str) -> str:
    return f"Invalid JSON message: {detail}"


ROLES = invalid("role has to be one of user, assistant, system, tool")
DECISIONS = invalid("decision has to be one of approve, edit, reject")
HOSTILE: dict[str, tuple[str, str]] = {
    # no JSON
    "empty": ("", NOT_JSON),
    "blank": (" \n", NOT_JSON),
    "words": ("hello", NOT_JSON),
    "cut": ('{"type":"user_message"', NOT_JSON),
    "trailing text": ("{} {}", NOT_JSON),
    "trailing comma": ('{"type":"x",}', NOT_JSON),
    "single quotes": ("{'type':'x'}", NOT_JSON),
    "comment": ('{"type":"x"/**/}', NOT_JSON),
    "byte order mark": ('\ufeff{"type":"x"}', NOT_JSON),
    "raw NUL": ('{"type":"\0"}', NOT_JSON),
    "raw line break in a text": ('{"type":"\n"}', NOT_JSON),
    "NaN": (BLANK % "NaN", NOT_JSON),
    "Infinity": (BLANK % "-Infinity", NOT_JSON),
    "1e999": (BLANK % "1e999", NOT_JSON),
    "5,000 digits": (BLANK % ("9" * 5000), NOT_JSON),
    "100,000 arrays deep": ("[" * 100_000, DEEP),
    "20,000 objects deep": ('{"a":' * 20_000, DEEP),
    "65 levels deep": ('{"type":' + "[" * 64 + "]" * 64 + "}", DEEP),
    "a key twice": ('{"type":"x","type":"y"}', invalid("An object names a key twice.")),
    "10,001 keys": (json.dumps({str(n): n for n in range(10_001)}), invalid("A body may have 10000 keys.")),
    "escaped NUL": (BLANK % '"\\u0000"', NO_TEXT),
    "half a surrogate pair": (BLANK % '"\\ud800"', NO_TEXT),
    "half a surrogate pair as a key": ('{"type":"x","\\udc00":1}', NO_TEXT),
    # no object
    "array": ("[]", NO_OBJECT),
    "array of a message": ('[{"type":"user_message","role":"user","content":"hi"}]', NO_OBJECT),
    "text": ('"user_message"', NO_OBJECT),
    "number": ("1", NO_OBJECT),
    "true": ("true", NO_OBJECT),
    "null": ("null", NO_OBJECT),
    # no known type
    "no type": ("{}", "Unknown message type: null"),
    "type null": ('{"type":null}', "Unknown message type: null"),
    "type number": ('{"type":1e3}', "Unknown message type: 1000.0"),
    "type true": ('{"type":true}', "Unknown message type: true"),
    "type array": ('{"type":["user_message"]}', 'Unknown message type: ["user_message"]'),
    "type object": ('{"type":{}}', "Unknown message type: {}"),
    "type empty": ('{"type":""}', "Unknown message type: "),
    "type in capitals": ('{"type":"USER_MESSAGE"}', "Unknown message type: USER_MESSAGE"),
    "type with a space": ('{"type":"user_message "}', "Unknown message type: user_message "),
    "type of 1,000 characters": (json.dumps({"type": "x" * 1000}), "Unknown message type: " + "x" * 50),
    "type of 1,000 entries": (json.dumps({"type": [0] * 1000}), "Unknown message type: " + "[0, 0" + ", 0" * 15),
    "type with control characters": ('{"type":"\\u001b\\u2028\\r\\n"}', "Unknown message type: \x1b\u2028\r\n"),
    "type of an answer": ('{"type":"assistant_message"}', "Unknown message type: assistant_message"),
    "type before schema": ('{"type":"done","content":1}', "Unknown message type: done"),
    # not what the gateway's schema asks for
    "content missing": (message("user_message", content=...), invalid("content is required")),
    "content null": (message("user_message", content=None), invalid("content is required")),
    "content number": (message("user_message", content=1), invalid("content has to be a text")),
    "content array": (message("user_message", content=["hi"]), invalid("content has to be a text")),
    "content object": (message("user_message", content={}), invalid("content has to be a text")),
    "content true": (message("user_message", content=True), invalid("content has to be a text")),
    "role missing": (message("user_message", role=...), invalid("role is required")),
    "role null": (message("user_message", role=None), invalid("role is required")),
    "role unknown": (message("user_message", role="admin"), ROLES),
    "role in capitals": (message("user_message", role="User"), ROLES),
    "role number": (message("user_message", role=0), invalid("role has to be a text")),
    "result: call_id missing": (message("tool_result", call_id=...), invalid("call_id is required")),
    "result: call_id null": (message("tool_result", call_id=None), invalid("call_id is required")),
    "result: call_id number": (message("tool_result", call_id=10**400), invalid("call_id has to be a text")),
    "result: call_id object": (message("tool_result", call_id={"$gt": ""}), invalid("call_id has to be a text")),
    "result: error number": (message("tool_result", error=7), invalid("error has to be a text")),
    "result: error array": (message("tool_result", error=[]), invalid("error has to be a text")),
    "switch: agent_type missing": (message("switch_agent", agent_type=...), invalid("agent_type is required")),
    "switch: agent_type number": (message("switch_agent", agent_type=1), invalid("agent_type has to be a text")),
    "switch: content missing": (message("switch_agent", content=...), invalid("content is required")),
    "switch: content null": (message("switch_agent", content=None), invalid("content is required")),
    "switch: reason array": (message("switch_agent", reason=["x"]), invalid("reason has to be a text")),
    "decision: call_id missing": (message("hitl_decision", call_id=...), invalid("call_id is required")),
    "decision missing": (message("hitl_decision", decision=...), invalid("decision is required")),
    "decision unknown": (message("hitl_decision", decision="maybe"), DECISIONS),
    "decision in capitals": (message("hitl_decision", decision="APPROVE"), DECISIONS),
    "decision in Cyrillic": (message("hitl_decision", decision="\u0430pprove"), DECISIONS),
    "decision true": (message("hitl_decision", decision=True), invalid("decision has to be a text")),
    "decision array": (message("hitl_decision", decision=["approve"]), invalid("decision has to be a text")),
    "arguments array": (
        message("hitl_decision", decision="edit", modified_arguments=[]),
        invalid("modified_arguments has to be an object"),
    ),
    "arguments text": (
        message("hitl_decision", decision="edit", modified_arguments="{}"),
        invalid("modified_arguments has to be an object"),
    ),
    "feedback number": (message("hitl_decision", feedback=1), invalid("feedback has to be a text")),
    # what the endpoint refuses
    "content empty": (message("user_message", content=""), "Agent error: 422"),
    "content blank": (message("user_message", content=" \u2028"), "Agent error: 422"),
    "content of 200,001 characters": (message("user_message", content="x" * 200_001), "Agent error: 413"),
    "agent unknown": (message("user_message", agent_type="nobody"), "Agent error: 400"),
    "agent number": (message("user_message", agent_type=7), "Agent error: 422"),
    "result: call_id empty": (message("tool_result", call_id=""), "Agent error: 400"),
    "result: call_id long": (message("tool_result", call_id="c" * 10_000), "Agent error: 422"),
    "result and error": (message("tool_result", result=1, error="x"), "Agent error: 422"),
    "result of more than 1 MiB": (message("tool_result", result="x" * (MIB + 1)), "Agent error: 413"),
    "switch: agent unknown": (message("switch_agent", agent_type="../coder"), "Agent error: 400"),
    "switch: agent empty": (message("switch_agent", agent_type=""), "Agent error: 400"),
    "switch: reason long": (message("switch_agent", reason="x" * 10_000), "Agent error: 422"),
    "edit without arguments": (message("hitl_decision", decision="edit"), "Agent error: 422"),
    "approval with arguments": (message("hitl_decision", modified_arguments={}), "Agent error: 422"),
    "feedback long": (message("hitl_decision", feedback="x" * 10_001), "Agent error: 413"),
    "more than 2 MiB": (" " * 2 * MIB + "x", "Agent error: 413"),
}


@pytest.fixture(scope="module")
def hostile_chat(server: Server) -> Iterator[Chat]:
    """One socket for all hostile messages; none of them leaves a session behind."""
    with opened(server, "/ws/hostile") as chat:
        yield chat
        assert server.http.get("/sessions/hostile").status_code == 404
        chat.send({"type": "switch_agent", "agent_type": "coder", "content": ""})
        assert chat.receive()["to_agent"] == "coder"
        assert chat.answer_to(user("Still well?")) == [said("Still well?")]


@pytest.mark.parametrize(("text", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_a_bad_message_is_told_so_and_the_socket_stays_open(hostile_chat: Chat, text: str, problem: str) -> None:
    assert hostile_chat.answer_to(text) == [error(problem)]


def test_a_message_of_exactly_2_MiB_is_read(hostile_chat: Chat) -> None:
    text = json.dumps({"type": "large", "padding": ""})

    assert hostile_chat.answer_to(text[:-2] + "x" * (2 * MIB - len(text)) + text[-2:]) == [
        error("Unknown message type: large")
    ]


# One frame that begins a text, and more that never end it.
PIECES = b"\x01\x80" + bytes(4) + (b"\x00\x80" + bytes(4)) * 3000


@pytest.mark.parametrize(
    ("send", "codes"),
    [
        (lambda connection: connection.send(b"{}"), {1003}),
        (lambda connection: connection.send([b"{", b"}"]), {1003}),
        # The code gets lost where the connection is reset because more was sent than is read.
        (lambda connection: connection.send(" " * (4 * MIB + 1)), {1009, 1006}),
        (lambda connection: connection.socket.sendall(PIECES), {1009, 1006}),
        (lambda connection: connection.send(b"\xff\xfe", text=True), {1007}),
    ],
    ids=["binary", "binary in pieces", "more than 4 MiB", "3,000 empty pieces", "no UTF-8"],
)
def test_what_is_no_message_at_all_ends_the_connection(
    server: Server, send: Callable[[ClientConnection], None], codes: set[int]
) -> None:
    with opened(server, "/ws/no-message") as chat:
        with suppress(ConnectionClosed):
            send(chat.connection)
        with pytest.raises(ConnectionClosed):
            chat.receive()

        assert chat.connection.close_code in codes
    assert "Traceback" not in server.log.read_text()


def test_what_comes_behind_bytes_is_not_heard(server: Server) -> None:
    closing_frame = b"\x88\x02\x03\xeb"  # 1003
    heard = b""
    with closing(raw_socket(server, "/ws/bytes")) as stubborn:
        stubborn.sendall(frame(2, b"{}") * 3 + frame(1, b"{}"))
        while not heard.endswith(closing_frame):
            heard += stubborn.recv(1000)
        stubborn.sendall(frame(1, b"\xff") + frame(1, b"{}"))
        rest = b"".join(iter(lambda: stubborn.recv(1000), b""))

    assert heard.endswith(b"\r\n\r\n" + closing_frame)
    assert rest == b""
    assert "Traceback" not in server.log.read_text()


def test_a_message_may_come_in_pieces(server: Server) -> None:
    with opened(server, "/ws/pieces") as chat:
        chat.connection.send(iter('{"type":"\u00fc"}'))

        assert chat.receive() == error("Unknown message type: \u00fc")


# --- Readers that leave, or do not read ------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["close", "vanish", "send bytes"])
def test_who_leaves_in_the_middle_of_a_turn_stops_nothing_and_gives_back_the_place(
    open_server: Server, played: ScriptedLLM, leave: str
) -> None:
    gate = Gate()
    played.script(hold("Half ", "an answer.", gate=gate))
    session_id = f"left-by-{leave.replace(' ', '-')}"
    with last_place(open_server, f"/ws/{session_id}") as chat:
        chat.send(user("Go on without me.", agent_type="coder"))
        gate.reached.wait()
        match leave:
            case "close":
                chat.connection.close()
            case "vanish":
                vanish(chat.connection)
            case "send bytes":
                chat.connection.send(b"bye")

        # The place is free while the turn still runs.
        with last_place(open_server) as next_one:
            assert next_one.answer_to({"type": "?"})
    gate.open()

    expected = [("user", "Go on without me."), ("assistant", "Half an answer.")]
    eventually(lambda: open_server.history(session_id) == expected)


def vanish(connection: ClientConnection) -> None:
    """Break a connection without a word: the last close of a socket that lingers for no time resets it."""
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.socket.shutdown(socket.SHUT_RD)
    connection.close_socket()


def test_who_says_something_and_leaves_at_once_has_said_it(server: Server) -> None:
    # More messages than can wait on a thread for the database.
    with databases.locked(server.database, "sessions_app_session"):
        for number in range(10):
            with opened(server, f"/ws/hasty-{number}") as chat:
                chat.send(user(f"hasty {number}", agent_type="coder"))

    for number in range(10):
        eventually(lambda n=number: server.http.get(f"/sessions/hasty-{n}").json().get("message_count") == 2)
        assert server.history(f"hasty-{number}") == [("user", f"hasty {number}"), ("assistant", f"hasty {number}")]


def test_a_reader_that_takes_nothing_is_cut_and_gives_back_the_place(
    open_server: Server, shared_llm: ScriptedLLM
) -> None:
    on_coder(open_server, "deaf")
    with closing(raw_socket(open_server, "/ws/deaf")) as deaf:
        with answering(shared_llm, say("", pieces=["\u00fc" * 190_000])):  # as JSON in ASCII more than a megabyte
            deaf.sendall(frame(1, json.dumps(user("Talk to me.")).encode()) * 12)

            eventually(lambda: "reader_stalled" in open_server.log.read_text())
        assert is_held(open_server, deaf)
        with last_place(open_server) as next_one:
            assert next_one.answer_to({"type": "?"})
        # Nor is the connection kept for what it did not take.
        eventually(lambda: not is_held(open_server, deaf))


@contextmanager
def answering(llm: ScriptedLLM, reply: Say) -> Iterator[None]:
    llm.default = reply
    try:
        yield
    finally:
        llm.default = parrot


def is_held(server: Server, connection: socket.socket) -> bool:
    """Whether the server still has its end of a connection: what only the kernel keeps has no inode."""
    ends = f":{server.port:04X}", f":{connection.getsockname()[1]:04X}"
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(ends[0]) and row[2].endswith(ends[1]) and row[9] != "0" for row in table)


def test_pings_of_a_client_that_does_not_read_are_not_answered(server: Server) -> None:
    pings = frame(9, b"x" * 125) * 1000
    with closing(raw_socket(server, "/ws/pings")) as chatty:
        for _ in range(120):
            chatty.sendall(pings)
        chatty.sendall(frame(1, b'{"type":"now I listen"}'))
        assert server.http.get("/health").status_code == 200

        heard = 0
        last = b""
        while b"now I listen" not in last:
            last = last[-100:] + chatty.recv(1_000_000)
            heard += len(last)

    assert heard < 120 * len(pings) / 2


def raw_socket(server: Server, path: str) -> socket.socket:
    """An open WebSocket as bytes, with little room for what is not read."""
    upgrade = "Host: localhost|Connection: Upgrade|Upgrade: websocket|Sec-WebSocket-Version: 13"
    key = f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==|X-Internal-Auth: {KEY}"
    head = f"GET {path} HTTP/1.1|{upgrade}|{key}||".replace("|", "\r\n").encode()

    def attempt() -> socket.socket | None:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head)
        if connection.recv(12) == b"HTTP/1.1 101":
            return connection
        connection.close()
        return None

    found: socket.socket = eventually(attempt)
    return found


def is_let_in(stack: ExitStack, server: Server, address: str) -> bool:
    try:
        stack.enter_context(opened(server, address))
    except InvalidStatus as refused:
        assert refused.response.status_code == 503
        return False  # a moment after the socket its place is free
    return True


def test_50_sockets_that_are_dropped_leave_nothing_behind(local_server: Server, played: ScriptedLLM) -> None:
    gate = Gate()
    played.script(*(hold("", f"{number}", gate=gate) for number in range(25)))
    with ExitStack() as stack:
        chats = [stack.enter_context(opened(local_server, f"/ws/drop-{number}")) for number in range(PLACES)]
        for chat in chats[:25]:
            chat.send(user("Wait for me.", agent_type="coder"))
        played.wait_for(lambda llm: llm.unplayed == 0)
        assert_refused(refusal(local_server), 503, "too_many_streams")
        before = descriptors(local_server)
        for chat in chats:
            vanish(chat.connection)

        # Within a moment, while the turns still run.
        eventually(lambda: descriptors(local_server) <= before - PLACES, seconds=5)
        for number in range(PLACES):
            eventually(lambda address=f"/ws/again-{number}": is_let_in(stack, local_server, address))
    gate.open()

    eventually(lambda: all(len(local_server.history(f"drop-{number}")) == 2 for number in range(25)))


def descriptors(server: Server) -> int:
    assert server.process is not None
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


# --- What goes wrong on this side ------------------------------------------------------------------------------------


def test_a_database_that_does_not_answer_is_503_and_a_fault_of_ours_500(open_server: Server) -> None:
    with last_place(open_server, "/ws/faults") as chat:
        with databases.without(open_server.database, "events_app_event"):
            unavailable = chat.answer_to(user("first"))
        with databases.refusing(open_server.database, "events_app_event", "1 = 1", as_fault=True):
            fault = chat.answer_to(user("second"))
        well = chat.answer_to(user("third", agent_type="coder"))

    assert (unavailable, fault) == ([error("Agent error: 503")], [error("Agent error: 500")])
    assert well == [said("third")]
    assert open_server.history("faults") == [("user", "third"), ("assistant", "third")]


def test_an_answer_that_breaks_off_is_told_so_and_the_socket_stays_open(open_server: Server) -> None:
    with last_place(open_server, "/ws/broken") as chat:
        first = user("first", agent_type="coder", message_id="m1")
        whole = chat.answer_to(first)
        with databases.without(open_server.database, "events_app_streambatch"):
            broken = chat.answer_to(first)

        assert whole == [said("first")] == chat.answer_to(first)
        assert broken == [error("Streaming error: the answer was interrupted")]
        assert chat.answer_to({"type": "?"}) == [error("Unknown message type: ?")]


def test_a_stop_closes_open_sockets_and_is_clean(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:
    gate = Gate()
    llm.script(hold("Half an ", "answer.", gate=gate), say("A whole answer."))
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url) as server, ThreadPoolExecutor(1) as pool:
        with opened(server, f"/ws/{on_coder(server, 'stopped')}") as busy, opened(server, "/ws/idle") as idle:
            for content in ("first", "second", "third"):
                busy.send(user(content))
            gate.reached.wait()
            stopping = pool.submit(server.stop)
            for chat in (busy, idle):
                with pytest.raises(ConnectionClosed):
                    chat.receive()
                assert chat.connection.close_code == 1012  # "service restart": come again
            assert stopping.result(5) == 0
        assert "Traceback" not in server.log.read_text()
        gate.open()
        server.start()

        eventually(lambda: ("assistant", "A whole answer.") in server.history("stopped"))


def test_daphne_serves_sockets_too(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:
    gate = Gate()
    llm.script(say("Hello."), hold("Half an ", "answer.", gate=gate))
    limits = {"STREAMS_AT_ONCE": "1", "LLM_BASE_URL": llm.url}
    with running(tmp_path, migrated, server="daphne", **limits) as daphne:
        on_coder(daphne, "daphne")
        # All it can answer to a handshake is a bare 403.
        for path, headers in (
            ("/agents", AUTH),
            ("/ws/a%20b", AUTH),
            ("/ws/daphne", NO_KEY),
            ("/ws/daphne", {"X-Internal-Auth": "wrong"}),
            ("/ws/daphne", {**AUTH, "Origin": "http://evil.example"}),
            ("/ws/daphne", {**AUTH, "Origin": "null"}),
            ("/ws/daphne", [*AUTH.items(), ("Origin", "http://localhost"), ("Origin", "http://localhost")]),
        ):
            assert refusal(daphne, path, headers).status_code == 403
        assert refusal(daphne, host="evil.example").status_code == 403
        with opened(daphne, "/api/v1/ws/daphne", origin="http://localhost:3000") as chat:
            assert chat.answer_to(user("Hello?")) == [said("Hello.")]
            for text, problem in list(HOSTILE.values())[:-1]:  # beyond 1 MiB it closes the connection
                if len(text) < MIB:
                    assert chat.answer_to(text) == [error(problem)]
            assert refusal(daphne).status_code == 403  # no place left
            chat.connection.send(b"{}")
            with pytest.raises(ConnectionClosed):
                chat.receive()
            assert chat.connection.close_code == 1000
        with last_place(daphne, "/ws/daphne", AUTH) as chat:
            chat.send(user("Go on without me."))
            gate.reached.wait()
            vanish(chat.connection)
        with last_place(daphne, "/ws/daphne", AUTH) as chat:
            gate.open()
            eventually(lambda: daphne.history("daphne")[-1] == ("assistant", "Half an answer."))
            assert chat.answer_to({"type": "?"}) == [error("Unknown message type: ?")]
            assert "Traceback" not in daphne.log.read_text()
            assert daphne.stop() == 0

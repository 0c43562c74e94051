"""The old gateway and the IDE, played from the text of the wire contract alone (protocol sections 3.3, 9 and 10).

    ide = Ide(Gateway(http, session_id), session_id)      # or with a NativeSocket
    answer = ide.say("Write it")                          # the bubbles that a person would see, strictly parsed
    ide.execute(answer[-1].call, {"success": True})

A message that the real IDE could not parse is an AssertionError.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.server import AUTH

Object = dict[str, Any]
PATIENCE = 30.0  # seconds without a byte; the gateway's own 60 would only make a failing test slower


@dataclass(frozen=True, slots=True)
class Answer:
    """What a REST call came back with."""

    status: int
    body: Any


class Connection(Protocol):
    """What the IDE talks through, for one session: its socket and the REST paths beside it."""

    def send(self, message: Any) -> list[Any]:
        """Send one text frame (an object, or the text itself); every message that comes back for it."""

    def request(self, method: str, path: str, body: Any = None) -> Answer: ...


# --- the gateway ---------------------------------------------------------------------------------------------------

PROXIED = re.compile(
    r"/agents|/agents/[^/]+/current|/sessions|/sessions/[^/]+/(history|pending-approvals)"
    r"|/events/(metrics|stats|audit-log|metrics/sessions|metrics/session/[^/]+)"
)


class Gateway:
    """One socket of the old gateway, and its REST proxies, before a server reached through `http`."""

    def __init__(self, http: httpx.Client, session_id: str) -> None:
        self.http = http
        self.session_id = session_id

    def send(self, message: Any) -> list[Any]:
        problem, message = _read_incoming(message)
        if problem:
            return [_gateway_error(problem)]
        answer: list[Any] = []
        body = {"session_id": self.session_id, "message": message}
        try:
            with self.http.stream("POST", "/agent/message/stream", json=body, timeout=PATIENCE) as response:
                if response.status_code >= 400:
                    return [_gateway_error(f"Agent error: {response.status_code}")]
                answer.extend(forwarded(response.iter_lines()))
        except httpx.TransportError as failure:
            answer.append(_gateway_error(f"Streaming error: {failure}"))
        return answer

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        """A REST call under `/api/v1`: what is proxied, everything else is unknown."""
        if (method, path) == ("GET", "/health"):
            return Answer(200, {"status": "healthy", "service": "gateway", "version": "0.1.0"})
        plain, _, query = path.partition("?")
        if not PROXIED.fullmatch(plain) or (method != "GET" and (method, plain) != ("POST", "/sessions")):
            return Answer(404, {"detail": "Not Found"})
        target = path if query and plain == "/events/audit-log" else plain
        try:
            # No body and no Content-Type, whatever the IDE sent.
            response = self.http.request(method, target, timeout=PATIENCE)
        except httpx.TransportError as failure:
            return Answer(500, {"error": f"Gateway error: {failure}"})
        if response.is_success:
            return Answer(200, response.json())
        return Answer(response.status_code, {"error": _proxy_error(plain, response.status_code)})


def forwarded(lines: Iterable[str]) -> Iterator[Any]:
    """What the gateway hands on to the IDE: its line rules (protocol 3.3). Raises TypeError where it does."""
    event = None
    for line in lines:
        if not line:
            event = None
        elif line.startswith("event: "):
            event = line.removeprefix("event: ")
            if event == "done":
                return
        elif line == "data: [DONE]":
            return
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            if event != "message":
                yield data
            elif isinstance(data, dict):
                yield {name: value for name, value in data.items() if value is not None}
            else:
                raise TypeError(f"the gateway breaks on {line!r}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


Check = Callable[[Any], bool]
# Per type the fields that have to be there, and those that may be (protocol 9.1).
INCOMING: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "user_message": ({"content": _is_text, "role": lambda value: value in ("user", "assistant", "system", "tool")}, {}),
    "tool_result": ({"call_id": _is_text}, {"error": _is_text_or_null}),
    "switch_agent": ({"agent_type": _is_text, "content": _is_text}, {"reason": _is_text_or_null}),
    "hitl_decision": (
        {"call_id": _is_text, "decision": lambda value: value in ("approve", "edit", "reject")},
        {"modified_arguments": lambda value: value is None or isinstance(value, dict), "feedback": _is_text_or_null},
    ),
}


def _read_incoming(message: Any) -> tuple[str | None, Any]:
    """Why the gateway refuses a text frame, or None; and the object in it, which is forwarded raw."""
    try:
        message = json.loads(message) if isinstance(message, str) else json.loads(json.dumps(message))
    except ValueError as failure:
        return f"Invalid JSON message: {failure}", None
    if not isinstance(message, dict):
        return "Invalid JSON message: not an object", None
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in INCOMING:
        return f"Unknown message type: {kind}", None
    required, optional = INCOMING[kind]
    for name, check in {**required, **optional}.items():
        if name not in message and name in required:
            return f"Invalid JSON message: {name} is missing", None
        if name in message and not check(message[name]):
            return f"Invalid JSON message: {name} is of the wrong kind", None
    return None, message


def _gateway_error(text: str) -> Object:
    return {"type": "error", "content": text}


def _proxy_error(path: str, status: int) -> str:
    *_, parent, last = path.split("/")
    if status == 404 and last == "pending-approvals":
        return f"Session {parent} not found"
    if status == 404 and path.startswith("/events/metrics/session/"):
        return f"No metrics found for session {last}"
    return f"Agent Runtime error: {status}"


# --- the server's own socket ---------------------------------------------------------------------------------------


class NativeSocket:
    """The server's own `/api/v1/ws/{session_id}` and the REST paths beside it, without a gateway."""

    def __init__(self, socket: ClientConnection, http: httpx.Client) -> None:
        self.socket = socket
        self.http = http

    @classmethod
    @contextmanager
    def connected(cls, http: httpx.Client, session_id: str) -> Iterator["NativeSocket"]:
        """A socket on the server that `http` reaches."""
        address = str(http.base_url.copy_with(scheme="ws")).rstrip("/")
        with connect(
            f"{address}/api/v1/ws/{session_id}", additional_headers=AUTH, open_timeout=5, proxy=None
        ) as socket:
            yield cls(socket, http)

    def send(self, message: Any) -> list[Any]:
        """The messages up to the end of the turn.

        A socket has no end-of-turn message, but it handles one message at a time: the answer to a second one, whose
        type nobody knows, comes when the first has had all of its answer.
        """
        self.socket.send(message if isinstance(message, str) else json.dumps(message))
        self.socket.send('{"type": "what comes after the answer"}')
        after = _gateway_error("Unknown message type: what comes after the answer")
        answer: list[Any] = []
        while (received := self._receive()) != after:
            answer.append(received)
        return answer

    def _receive(self) -> Any:
        frame = self.socket.recv(timeout=PATIENCE)
        assert isinstance(frame, str), "the IDE reads text frames"
        return json.loads(frame)

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        content = {} if body is None else {"json": body}
        response = self.http.request(method, f"/api/v1{path}", timeout=PATIENCE, **content)
        return Answer(response.status_code, response.json() if response.content else None)


# --- the IDE -------------------------------------------------------------------------------------------------------

# A field of another type makes the whole message fail (protocol 10.1).
SOCKET_FIELDS: dict[str, type] = {
    "type": str,
    "content": str,
    "role": str,
    "is_final": bool,
    "call_id": str,
    "tool_name": str,
    "arguments": dict,
    "requires_approval": bool,
    "result": dict,
    "error": str,
    "agent_type": str,
    "from_agent": str,
    "to_agent": str,
    "reason": str,
    "metadata": dict,
}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call as the IDE knows it, from a `tool_call` message, a pending approval or the history."""

    call_id: str
    tool_name: str
    arguments: Object


@dataclass(frozen=True, slots=True)
class Bubble:
    """One incoming message: the IDE appends each of them to the chat."""

    type: str
    fields: Object  # of those that the IDE reads, the ones that are not null

    def __getitem__(self, name: str) -> Any:
        return self.fields.get(name)

    @property
    def text(self) -> str:
        """What a person reads in it."""
        text = self["content"] if self["content"] is not None or self.type != "error" else self["error"]
        return text or ""

    @property
    def metadata(self) -> Object:
        return self["metadata"] or {}

    @property
    def call(self) -> ToolCall:
        assert self.type == "tool_call", self
        return ToolCall(self["call_id"], self["tool_name"], self["arguments"])


@dataclass(frozen=True, slots=True)
class Past:
    """A message of the history."""

    role: str
    content: str
    tool_call_id: str | None
    tool_calls: tuple[ToolCall, ...]

    @property
    def result(self) -> str | Object:
        """A tool result as the IDE draws it: an object when it can be read as one."""
        try:
            result = json.loads(self.content)
        except ValueError:
            return self.content
        return result if isinstance(result, dict) else self.content


@dataclass(frozen=True, slots=True)
class History:
    messages: tuple[Past, ...] = ()
    current_agent: str | None = None
    handoffs: tuple[tuple[str | None, str | None], ...] = ()

    @property
    def calls(self) -> list[ToolCall]:
        """Every tool call that was made, the oldest first."""
        return [call for message in self.messages for call in message.tool_calls]


@dataclass(frozen=True, slots=True)
class ListedSession:
    id: str
    message_count: int
    current_agent: str
    title: str | None


class Ide:
    """A person's chat with one session, executing tools when it is told to."""

    def __init__(self, connection: Connection, session_id: str) -> None:
        self.connection = connection
        self.session_id = session_id
        self.bubbles: list[Bubble] = []
        self.received: list[Any] = []  # the same, raw

    # What it sends.

    def send(self, message: Any) -> list[Bubble]:
        """Send any message, or any text, and append what comes back."""
        received = self.connection.send(message)
        self.received += received
        answer = [parse_message(one) for one in received]
        self.bubbles += answer
        return answer

    def say(self, content: str, **more: Any) -> list[Bubble]:
        return self.send(ide_message("user_message", content=content, role="user", **more))

    def switch(self, agent: str) -> list[Bubble]:
        return self.send(ide_message("switch_agent", agent_type=agent, content=f"Switched to {agent.capitalize()}"))

    def execute(self, call: ToolCall, result: Object) -> list[Bubble]:
        """Report what the tool did. Approving in the IDE's own dialog is nothing but this."""
        return self.send(ide_message("tool_result", call_id=call.call_id, tool_name=call.tool_name, result=result))

    def fail(self, call: ToolCall, error: str) -> list[Bubble]:
        return self.send(ide_message("tool_result", call_id=call.call_id, tool_name=call.tool_name, error=error))

    def reject(self, call: ToolCall) -> list[Bubble]:
        """Reject in the live chat."""
        return self.fail(call, f"Операция отклонена: {call.tool_name}")

    def reject_restored(self, call: ToolCall, reason: str = "User cancelled") -> list[Bubble]:
        """Reject a call that was found among the pending approvals after a restart."""
        return self.fail(call, f"User rejected: {reason}")

    def decide(self, call: ToolCall, decision: str, **details: Any) -> list[Bubble]:
        """What an IDE of 2025 said of a call; today's never does."""
        nulls = {"modified_arguments": None, "feedback": None}
        message = {"type": "hitl_decision", "call_id": call.call_id, "decision": decision, **nulls, **details}
        return self.send(message)

    # What it reads.

    def create_session(self) -> ListedSession:
        """Another session than its own."""
        answer = self.connection.request("POST", "/sessions")
        assert 200 <= answer.status < 300, answer
        return parse_session(answer.body)

    def sessions(self) -> list[ListedSession]:
        return [parse_session(item) for item in self._get("/sessions")["sessions"]]

    def session(self) -> ListedSession | None:
        """By its id; where that path is unknown, from the list."""
        answer = self.connection.request("GET", f"/sessions/{self.session_id}")
        if answer.status == 404:
            return next((one for one in self.sessions() if one.id == self.session_id), None)
        assert answer.status == 200, answer
        return parse_session(answer.body)

    def history(self) -> History:
        """An unknown session has an empty one."""
        answer = self.connection.request("GET", f"/sessions/{self.session_id}/history")
        if answer.status == 404:
            return History()
        assert answer.status == 200, answer
        return parse_history(answer.body)

    def pending_approvals(self) -> list[ToolCall]:
        """What it shows its dialog for when it connects."""
        answer = self.connection.request("GET", f"/sessions/{self.session_id}/pending-approvals")
        if answer.status == 404:
            return []
        assert answer.status == 200, answer
        return parse_pending(answer.body)

    def current(self) -> tuple[str, int]:
        """The agent of the session, and how often it changed (protocol 10.5: the flat form)."""
        body = self._get(f"/agents/{self.session_id}/current")
        _typed(body, {"session_id": str, "current_agent": str, "agent_history": list, "switch_count": int})
        return body["current_agent"], body["switch_count"]

    def rename(self, title: str) -> bool:
        answer = self.connection.request("PATCH", f"/sessions/{self.session_id}", {"title": title})
        return answer.status == 200 and parse_session(answer.body).title == title

    def delete(self) -> bool:
        return 200 <= self.connection.request("DELETE", f"/sessions/{self.session_id}").status < 300

    def _get(self, path: str) -> Any:
        answer = self.connection.request("GET", path)
        assert answer.status == 200, answer
        return answer.body


def ide_message(kind: str, **fields: Any) -> Object:
    """One class for everything: each message carries every field, most of them null (protocol 3.1)."""
    return {**dict.fromkeys(SOCKET_FIELDS), "type": kind, **fields}


def parse_message(message: Any) -> Bubble:
    """Protocol 10.1."""
    assert isinstance(message, dict), f"no object: {message!r}"
    kind = message.get("type")
    required = ("type", "call_id", "tool_name", "arguments") if kind == "tool_call" else ("type",)
    _typed(message, {name: SOCKET_FIELDS[name] for name in required}, SOCKET_FIELDS)
    known = {name: message[name] for name in SOCKET_FIELDS if name != "type" and message.get(name) is not None}
    if kind == "agent_switched":
        assert isinstance(known.get("to_agent") or known.get("metadata", {}).get("to_agent"), str), message
    return Bubble(message["type"], known)


def parse_session(body: Any) -> ListedSession:
    """Protocol 10.2."""
    times = {"created_at": str, "updated_at": str, "last_activity": str}
    texts = {"current_agent": str, "title": str, "description": str}
    _typed(body, {"id": str, "message_count": int}, {**times, **texts, "is_active": bool})
    for name in times:
        if body.get(name) is not None:
            datetime.fromisoformat(body[name])
    return ListedSession(
        body["id"], body["message_count"], body.get("current_agent") or "orchestrator", body.get("title")
    )


def parse_history(body: Any) -> History:
    """Protocol 10.3."""
    required = {"session_id": str, "messages": list, "message_count": int}
    _typed(body, required, {"last_activity": str, "current_agent": str, "agent_history": list})
    handoffs = []
    for item in body.get("agent_history") or []:
        _typed(item, {}, {"from": str, "to": str, "reason": str, "timestamp": str})
        handoffs.append((item.get("from"), item.get("to")))
    return History(tuple(_past(item) for item in body["messages"]), body.get("current_agent"), tuple(handoffs))


def _past(item: Any) -> Past:
    _typed(item, {"role": str}, {"content": str, "name": str, "tool_call_id": str, "tool_calls": list})
    assert item["role"] != "system", "a system message would be drawn as what an assistant said"
    calls = tuple(_past_call(call) for call in item.get("tool_calls") or [])
    return Past(item["role"], item.get("content") or "", item.get("tool_call_id"), calls)


def _past_call(item: Any) -> ToolCall:
    _typed(item, {"id": str, "function": dict})
    function = item["function"]
    _typed(function, {"name": str})
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return ToolCall(item["id"], function["name"], arguments)


def parse_pending(body: Any) -> list[ToolCall]:
    """Protocol 10.4 and 2.9."""
    _typed(body, {"session_id": str, "pending_approvals": list, "count": int})
    for item in body["pending_approvals"]:
        needed = {"call_id": str, "tool_name": str, "arguments": dict, "created_at": str}
        _typed(item, needed, {"reason": str})
        datetime.fromisoformat(item["created_at"])
    assert body["count"] == len(body["pending_approvals"])
    return [ToolCall(item["call_id"], item["tool_name"], item["arguments"]) for item in body["pending_approvals"]]


def _typed(body: Any, required: Mapping[str, type], nullable: Mapping[str, type] | None = None) -> None:
    """Dart's types are strict: AssertionError for another type, and for null where it is not allowed."""
    assert isinstance(body, dict), f"no object: {body!r}"
    for name in required:
        assert body.get(name) is not None, f"{name} is missing: {body!r}"
    for name, kind in {**(nullable or {}), **required}.items():
        value = body.get(name)
        of_kind = isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
        assert value is None or of_kind, f"{name} is no {kind.__name__}: {body!r}"

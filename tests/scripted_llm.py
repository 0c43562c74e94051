"""A model that plays a script: a real HTTP server that speaks the chat-completions protocol, in a thread of its own.

    with ScriptedLLM() as llm:
        llm.script(call("read_file", '{"path": "a.md"}'), say("It is about cats."))
        ...
    assert llm.refused == []

Replies are played to answer requests in the order they were queued, then `llm.default`. A request whose system message
starts with "Classify" asks for routing: it gets `llm.route_to`, or what `llm.route()` queued.
"""

import asyncio
import json
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count
from types import TracebackType
from typing import Any, Self

from aiohttp import web

PATIENCE = 10.0  # seconds until a test that waits in vain fails

EVENT_STREAM = "text/event-stream"
_call_numbers = count(1)


class Signal:
    """Something that happens once, and that other threads and event loops can wait for."""

    def __init__(self) -> None:
        self._future: Future[None] = Future()
        self._lock = threading.Lock()

    def set(self) -> None:
        with self._lock:
            if not self._future.done():
                self._future.set_result(None)

    def is_set(self) -> bool:
        return self._future.done()

    def wait(self, patience: float = PATIENCE) -> None:
        """Block until it happens. Raises `TimeoutError`."""
        self._future.result(patience)

    async def await_(self, patience: float = PATIENCE) -> None:
        """As `wait`, without blocking the event loop."""
        # Shielded, because a waiter that gives up must not cancel the future the others wait for.
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._future)), patience)


class Gate:
    """Holds a reply in its middle until the test opens it. One gate may hold several replies."""

    def __init__(self) -> None:
        self.reached = Signal()
        self._opened = Signal()

    def open(self) -> None:
        self._opened.set()

    async def pass_through(self) -> None:
        self.reached.set()
        await self._opened.await_(patience=60)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call within a reply."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True, slots=True)
class Say:
    """A streamed answer: text, then tool calls. With a gate, `text` comes before it and `text_after` behind it."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    pause: float = 0.0
    pieces: tuple[str, ...] | None = None
    usage: tuple[int, int] | None = (10, 5)
    gate: Gate | None = None
    text_after: str = ""
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Body:
    """An answer given byte by byte as written here, each part in a packet of its own, `pause` seconds apart."""

    parts: tuple[bytes, ...]
    content_type: str = EVENT_STREAM
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Drop:
    """A connection that breaks: at once without a head, else after some text and perhaps half a tool call."""

    text: str = ""
    call: Call | None = None


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing for so many seconds, after some text or before the first byte."""

    seconds: float
    text: str = ""


@dataclass(frozen=True, slots=True)
class Endless:
    """An answer that never ends: the same delta again and again."""

    delta: dict[str, Any]


Reply = Say | Body | Drop | Silence | Endless


def say(
    text: str,
    *,
    pause: float = 0.0,
    pieces: list[str] | None = None,
    usage: tuple[int, int] | None = (10, 5),
    gate: Gate | None = None,
) -> Say:
    """Stream the text word by word (or in these pieces). A gate holds it after the first piece."""
    if gate is None:
        return Say(text, pause=pause, pieces=tuple(pieces) if pieces else None, usage=usage)
    first, *others = pieces or _words(text) or [""]
    return Say(first, pause=pause, usage=usage, gate=gate, text_after="".join(others))


def hold(text_before: str, text_after: str, *, gate: Gate) -> Say:
    """Stream `text_before`, wait until the test opens the gate, stream `text_after`."""
    return Say(text_before, gate=gate, text_after=text_after)


def call(tool: str, arguments: str | dict[str, Any] = "{}", *, id: str | None = None, text: str = "") -> Say:
    """Ask for one tool call, after some text if given. Arguments given as text are sent as they are."""
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments)
    return Say(text, calls=(Call(tool, arguments, f"call_{next(_call_numbers)}" if id is None else id),))


def calls(*replies: Say, text: str = "") -> Say:
    """Several `call(...)`s in one answer."""
    return Say(text, calls=tuple(one for reply in replies for one in reply.calls))


def gated(reply: Say, gate: Gate) -> Say:
    """The same reply, held by the gate after its text and before its tool calls."""
    return replace(reply, gate=gate)


def empty() -> Say:
    """An answer with neither text nor a tool call."""
    return Say()


def status(code: int, *, retry_after: float | str | None = None, text: str = "upstream says no") -> Body:
    """An HTTP error, with a Retry-After header if given (seconds or a date)."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    body = json.dumps({"error": {"message": text, "type": "scripted", "code": code}}).encode()
    return Body((body,), content_type="application/json", status=code, headers=headers)


def drop(after: str = "", *, call: Say | None = None) -> Drop:
    """Break the connection after this text and, if given, half of this tool call; without either, before the head."""
    return Drop(after, call.calls[0] if call else None)


def html() -> Body:
    """A proxy's idea of a good answer."""
    return Body((b"<!doctype html><html><body>It works!</body></html>",), content_type="text/html")


def bad_json(*, after: str = "") -> Body:
    """An event that is no JSON, after this text."""
    return Body((_text_event(after) if after else b"", b'data: {"choices": [{"delta"\n\n'))


def raw(
    *parts: bytes,
    content_type: str = EVENT_STREAM,
    status: int = 200,
    headers: dict[str, str] | None = None,
    pause: float = 0.0,
) -> Body:
    """These very bytes, each part in a packet of its own, then the end of the body."""
    return Body(parts, content_type=content_type, status=status, headers=headers or {}, pause=pause)


def slow_bytes(data: bytes, seconds_per_byte: float) -> Body:
    """These bytes, one at a time."""
    return Body(tuple(data[i : i + 1] for i in range(len(data))), pause=seconds_per_byte)


def silence(seconds: float, *, after: str = "") -> Silence:
    """Nothing for so long, after this text; without text not even a head. Then the connection closes."""
    return Silence(seconds, after)


def endless(text_piece: str) -> Endless:
    """The same piece of text again and again, until the client has enough."""
    return Endless({"content": text_piece})


def endless_calls(*pieces: dict[str, Any]) -> Endless:
    """The same pieces of tool calls, written as in a delta, again and again."""
    return Endless({"tool_calls": pieces})


def whole(text: str, *, asks: Say = Say(), usage: tuple[int, int] = (10, 5)) -> Body:
    """One JSON completion, from a server that does not stream, with the tool calls of `asks`."""
    tool_calls = [
        {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
        for one in asks.calls
    ]
    message = {"role": "assistant", "content": text, "tool_calls": tool_calls or None}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if tool_calls else "stop"}
    body = json.dumps({"object": "chat.completion", "choices": [choice], "usage": _usage(usage)}).encode()
    return Body((body,), content_type="application/json")


class ScriptedLLM:
    """The server. `url` is what LLM_BASE_URL takes. With a given port it can be stopped and started again there."""

    def __init__(self, *, port: int = 0, strict_script: bool = False) -> None:
        self.port = port
        self.route_to = "coder"
        self.default: Reply | Callable[[dict[str, Any]], Reply] = say("ok")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections: set[int] = set()
        self.refused: list[str] = []
        self.aborted = 0
        self._strict_script = strict_script
        self._script: deque[Reply] = deque()
        self._routes: deque[Reply | str] = deque()
        self._changed = threading.Condition()
        self._stopping = False

    # What a test does.

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; on the same port as before, if it was started before."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-llm", daemon=True)
        self._thread.start()
        self._stopping = False
        self._in_thread(self._listen())

    def stop(self) -> None:
        """Close every connection and stop listening."""
        self._stopping = True
        self._in_thread(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The requests that asked for an answer."""
        return [request for request in list(self.requests) if not _is_routing(request)]

    @property
    def routings(self) -> list[dict[str, Any]]:
        """The requests that asked which agent is to answer."""
        return [request for request in list(self.requests) if _is_routing(request)]

    @property
    def unplayed(self) -> int:
        """How many queued replies no request has asked for yet."""
        return len(self._script)

    def script(self, *replies: Reply) -> None:
        """Queue replies to answer requests."""
        with self._changed:
            self._script.extend(replies)

    def forget(self) -> None:
        """Drop what is queued and has not been played."""
        with self._changed:
            self._script.clear()
            self._routes.clear()

    def route(self, *replies: Reply | str) -> None:
        """Queue replies to routing requests: names of agents, or any reply."""
        with self._changed:
            self._routes.extend(replies)

    def wait_for(self, condition: Callable[["ScriptedLLM"], Any], patience: float = PATIENCE) -> None:
        """Block until the condition holds, for example `lambda llm: len(llm.answers) == 2`. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), patience):
                raise TimeoutError(f"{len(self.requests)} requests, {self.aborted} aborted, refused: {self.refused}")

    async def await_for(self, condition: Callable[["ScriptedLLM"], Any], patience: float = PATIENCE) -> None:
        """As `wait_for`, without blocking the event loop."""
        await asyncio.to_thread(self.wait_for, condition, patience)

    # What happens in the server's own thread.

    def _in_thread(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    async def _listen(self) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._respond)
        # A client that leaves cancels the handler: that is how it is noticed during a silence.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        problem = history_problem(body.get("messages"))
        with self._changed:
            self.requests.append(body)
            self.headers.append(dict(request.headers))
            if request.transport is not None:
                self.connections.add(request.transport.get_extra_info("peername")[1])
            if problem:
                self.refused.append(problem)
            reply = status(400, text=problem) if problem else self._next_reply(body)
            self._changed.notify_all()
        try:
            return await self._play(reply, request)
        except (asyncio.CancelledError, ConnectionError):
            if not self._stopping:
                with self._changed:
                    self.aborted += 1
                    self._changed.notify_all()
            raise

    def _next_reply(self, body: dict[str, Any]) -> Reply:
        if _is_routing(body):
            route = self._routes.popleft() if self._routes else self.route_to
            return say(_routing_answer(route)) if isinstance(route, str) else route
        if self._script:
            return self._script.popleft()
        if self._strict_script:
            self.refused.append("a request that the script does not foresee")
            return status(500, text=self.refused[-1])
        return self.default(body) if callable(self.default) else self.default

    async def _play(self, reply: Reply, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = EVENT_STREAM
        match reply:
            case Say():
                await response.prepare(request)
                async for event in _events(reply):
                    await response.write(event)
            case Body():
                response.set_status(reply.status)
                response.content_type = reply.content_type
                response.headers.update(reply.headers)
                await response.prepare(request)
                for part in filter(None, reply.parts):
                    await response.write(part)
                    await asyncio.sleep(reply.pause)
            case Drop():
                await self._play_text(reply.text, response, request)
                if reply.call:
                    await response.prepare(request)
                    await response.write(next(_call_events(0, reply.call)))
                self._break(request)
            case Silence():
                await self._play_text(reply.text, response, request)
                await asyncio.sleep(reply.seconds)
                self._break(request)
            case Endless():
                await response.prepare(request)
                while True:
                    await response.write(_event(reply.delta))
                    await asyncio.sleep(0)
        return response

    async def _play_text(self, text: str, response: web.StreamResponse, request: web.Request) -> None:
        if text:
            await response.prepare(request)
            for word in _words(text):
                await response.write(_text_event(word))

    def _break(self, request: web.Request) -> None:
        if request.transport is not None:
            request.transport.close()


def history_problem(messages: Any) -> str | None:
    """Why a strict provider would refuse these messages, or None."""
    if not isinstance(messages, list) or not messages:
        return "no messages"
    if messages[0].get("role") != "system":
        return "the first message is not the system prompt"
    unanswered: set[str] = set()
    previous = ""
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        tool_calls = message.get("tool_calls") or []
        where = f"message {number} ({role})"
        if not isinstance(content, str) and not (role == "assistant" and content is None and tool_calls):
            return f"{where}: its content is no text"
        if unanswered and role != "tool":
            return f"{where}: tool calls without an answer: {sorted(unanswered)}"
        match role:
            case "system" if number:
                return f"{where}: not at the start"
            case "user" if previous == "user":
                return f"{where}: two user messages in a row"
            case "assistant" if previous in {"assistant", "system"}:
                return f"{where}: nothing to answer"
            case "assistant" if not content and not tool_calls:
                return f"{where}: neither text nor tool calls"
            case "tool" if message.get("tool_call_id") not in unanswered:
                return f"{where}: answers no open tool call: {message.get('tool_call_id')}"
            case "system" | "user":
                pass
            case "assistant":
                ids = [one.get("id") for one in tool_calls]
                if len(set(ids)) < len(ids) or not all(ids):
                    return f"{where}: tool calls without ids of their own: {ids}"
                if not all(_is_call(one) for one in tool_calls):
                    return f"{where}: malformed tool calls"
                unanswered = set(ids)
            case "tool":
                unanswered.remove(message["tool_call_id"])
            case _:
                return f"{where}: unknown role"
        previous = role
    if unanswered:
        return f"tool calls without an answer: {sorted(unanswered)}"
    return None if previous in {"user", "tool"} else f"the last message is of role {previous}"


def _is_call(one: dict[str, Any]) -> bool:
    function = one.get("function") or {}
    return one.get("type") == "function" and all(isinstance(function.get(key), str) for key in ("name", "arguments"))


def _is_routing(body: dict[str, Any]) -> bool:
    messages = body.get("messages") or [{}]
    return str(messages[0].get("content")).startswith("Classify")


def _routing_answer(agent: str) -> str:
    return json.dumps({"agent": agent, "confidence": "high", "reasoning": "scripted"})


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*$|\s*\S+|\s+$", text)


def _usage(usage: tuple[int, int]) -> dict[str, int]:
    return {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}


def _event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], "usage": None}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def _text_event(text: str) -> bytes:
    return _event({"content": text})


def _call_events(index: int, one: Call) -> Iterator[bytes]:
    """A call as providers send it: first its id and name, then the arguments in pieces."""
    head = {"index": index, "id": one.id, "type": "function", "function": {"name": one.name, "arguments": ""}}
    yield _event({"tool_calls": [head]})
    size = max(1, len(one.arguments) // 3)
    for start in range(0, len(one.arguments), size):
        piece = {"index": index, "function": {"arguments": one.arguments[start : start + size]}}
        yield _event({"tool_calls": [piece]})


async def _events(reply: Say) -> AsyncIterator[bytes]:
    yield _event({"role": "assistant", "content": ""})
    for piece in reply.pieces or _words(reply.text):
        yield _text_event(piece)
        await asyncio.sleep(reply.pause)
    if reply.gate:
        await reply.gate.pass_through()
        for piece in _words(reply.text_after):
            yield _text_event(piece)
            await asyncio.sleep(reply.pause)
    for index, one in enumerate(reply.calls):
        for event in _call_events(index, one):
            yield event
    yield _event({}, reply.finish_reason or ("tool_calls" if reply.calls else "stop"))
    if reply.usage:
        chunk = {"id": "chatcmpl-1", "choices": [], "usage": _usage(reply.usage)}
        yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"

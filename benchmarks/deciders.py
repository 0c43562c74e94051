"""Who decides and who follows in decisions.py: one connection for each request, and when what came back on it.

Every check of an answer is here: what is neither the answer that is due nor a refusal that is due has a `problem`.
"""

import asyncio
import json
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from load import dechunked
from mock_model import WRITE

VERDICTS = ("approve", "edit", "reject")
# How long an answer may take before it counts as lost.
PATIENCE = 10.0
PREPARED_AT_ONCE = 10

FRAME = re.compile(rb"^data: ?(\{.*\})$", re.MULTILINE)
CALLED = re.compile(rb'"type":"tool_call",.*\n\n')
RESOLVED = re.compile(rb'"type":"approval_resolved",.*\n\n')


class Exchange(asyncio.Protocol):
    """A request on a connection of its own, sent when it is told to, and what came back."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.received = b""
        self.shown_at = self.ended_at = 0
        self.shown, self.ended = asyncio.Event(), asyncio.Event()
        self._pattern: re.Pattern[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.received += data
        if self._pattern is not None and self._pattern.search(self.received):
            self._pattern, self.shown_at = None, now
            self.shown.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended_at = time.monotonic_ns()
        self.shown.set()
        self.ended.set()

    def watch_for(self, pattern: re.Pattern[bytes]) -> None:
        """Note when the next arrival makes what was received match: `shown`, `shown_at`."""
        self._pattern, self.shown_at = pattern, 0
        self.shown.clear()

    def send(self) -> int:
        """Returns the moment just before."""
        now = time.monotonic_ns()
        self.transport.write(self.request)
        return now

    @property
    def status(self) -> int:
        line = self.received.partition(b"\r\n")[0].split()
        return int(line[1]) if len(line) > 1 else 0

    @property
    def body(self) -> bytes:
        head, _, rest = self.received.partition(b"\r\n\r\n")
        return dechunked(self.received)[0] if b"chunked" in head.lower() else rest

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON that came; empty when there is none."""
        try:
            return dict(json.loads(self.body))
        except ValueError:
            return {}

    def frames(self, kind: str) -> list[dict[str, Any]]:
        found = (json.loads(payload) for payload in FRAME.findall(self.body))
        return [frame for frame in found if frame.get("type") == kind]


@dataclass(frozen=True)
class WaitingCall:
    """A tool call that waits for a person, and somebody who follows its session."""

    session_id: str
    call_id: str
    arguments: dict[str, Any]
    follower: Exchange

    def choice(self, verdict: str) -> dict[str, Any]:
        if verdict == "edit":
            return {"decision": verdict, "modified_arguments": {**self.arguments, "content": "Shorter.\n"}}
        return {"decision": verdict, **({"feedback": "Not in this file."} if verdict == "reject" else {})}

    def problem_after(self, verdict: str) -> str | None:
        """Unless the follower was told of this decision, once, and of what was decided on."""
        told = [
            (frame["call_id"], frame["metadata"]["decision"], frame["metadata"]["arguments"])
            for frame in self.follower.frames("approval_resolved")
        ]
        arguments = self.choice(verdict).get("modified_arguments", self.arguments)
        return None if told == [(self.call_id, verdict, arguments)] else f"after {verdict} its follower read {told!r}"


@dataclass(frozen=True)
class Decided:
    """One decision: how long until the follower had read of it, and until the request was answered; None: never."""

    in_stream: bool
    read_ms: float | None
    answered_ms: float | None
    problem: str | None


@dataclass(frozen=True)
class Race:
    """Many decisions on one approval in the same moment. `informed`: losers that were told who decided and when."""

    seconds: float
    winners: list[str]
    informed: int
    problem: str | None


class Clients:
    """Everybody who talks to the server from this process."""

    def __init__(self, port: int, key: str) -> None:
        self.port = port
        self.key = key

    async def open(self, method: str, path: str, body: object = None) -> Exchange:
        """A connection, with nothing sent on it yet."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Internal-Auth: {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
        ).encode()
        loop = asyncio.get_running_loop()
        _, exchange = await loop.create_connection(lambda: Exchange(head + payload), "127.0.0.1", self.port)
        return exchange

    async def say(self, session_id: str, message: dict[str, Any]) -> Exchange:
        return await self.open("POST", "/agent/message/stream", {"session_id": session_id, "message": message})

    async def decision(self, call: WaitingCall, verdict: str, *, in_stream: bool = False) -> Exchange:
        choice = call.choice(verdict)
        if in_stream:
            return await self.say(call.session_id, {"type": "hitl_decision", "call_id": call.call_id, **choice})
        return await self.open("POST", f"/approvals/{call.call_id}/decision", choice)

    async def read(self, path: str) -> dict[str, Any]:
        exchange = await self.open("GET", path)
        exchange.send()
        await all_in_time([exchange.ended])
        return due(exchange, exchange.answer)

    # --- calls that wait ---

    async def waiting_calls(self, count: int) -> list[WaitingCall]:
        calls: list[WaitingCall] = []
        while len(calls) < count:
            together = min(PREPARED_AT_ONCE, count - len(calls))
            calls += await asyncio.gather(*[self._waiting_call() for _ in range(together)])
        return calls

    async def _waiting_call(self) -> WaitingCall:
        session_id, content = f"bench-{uuid.uuid4().hex}", f"Please use {WRITE} for the notes."
        asked = await self.say(session_id, {"type": "user_message", "content": content, "agent_type": "coder"})
        asked.send()
        await all_in_time([asked.ended])
        (call,) = due(asked, asked.frames("tool_call"))
        follower = await self.open("GET", f"/sessions/{session_id}/stream")
        follower.watch_for(CALLED)
        follower.send()
        await all_in_time([follower.shown])
        due(follower, follower.shown_at)
        return WaitingCall(session_id, call["call_id"], call["arguments"], follower)

    # --- decisions ---

    async def decide(self, call: WaitingCall, verdict: str, *, in_stream: bool) -> Decided:
        request = await self.decision(call, verdict, in_stream=in_stream)
        call.follower.watch_for(RESOLVED)
        if in_stream:
            request.watch_for(RESOLVED)
        sent_at = request.send()
        await all_in_time([call.follower.shown, request.ended])
        # The answer to a rejection in a stream carries the turn on: it is answered once it says what was decided.
        moments = call.follower.shown_at, request.shown_at if in_stream else request.ended_at
        read_ms, answered_ms = [(at - sent_at) / 1e6 if at else None for at in moments]
        problem = _problem(request, verdict, in_stream=in_stream)
        if read_ms is None:
            problem = problem or f"the follower read nothing of {verdict}"
        return Decided(in_stream, read_ms, answered_ms, problem)

    async def race(self, call: WaitingCall, verdicts: list[str]) -> Race:
        requests = [await self.decision(call, verdict) for verdict in verdicts]
        call.follower.watch_for(RESOLVED)
        began = time.monotonic_ns()
        for request in requests:
            request.send()
        await all_in_time([*[request.ended for request in requests], call.follower.shown])
        ends = [request.ended_at for request in requests]
        won = [(verdict, request) for verdict, request in zip(verdicts, requests, strict=True) if request.status == 200]
        made = _made(won[0][1]) if won else {}
        lost = [request for request in requests if request.status != 200]
        uninformed = [request for request in lost if not _is_informed(request, made)]
        return Race(
            (max(ends) - began) / 1e9 if all(ends) else float("nan"),
            [verdict for verdict, _ in won],
            len(lost) - len(uninformed),
            f"{len(uninformed)} losers were told {uninformed[0].received[-300:]!r}" if uninformed else None,
        )


def due(exchange: Exchange, what: Any) -> Any:
    """What a preparing request was made for. Raises RuntimeError without it."""
    if exchange.status != 200 or not what:
        raise RuntimeError(f"{exchange.request[:80]!r} was answered with {exchange.received[-500:]!r}")
    return what


async def all_in_time(events: Iterable[asyncio.Event]) -> None:
    """Wait for all of them, but not for ever: what is missing then is lost."""
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            for event in events:
                await event.wait()


def _problem(request: Exchange, verdict: str, *, in_stream: bool) -> str | None:
    """Why this is not the answer to an accepted decision, or None."""
    if in_stream:
        told = [frame["metadata"]["decision"] for frame in request.frames("approval_resolved")]
        complete = b"event: done" in request.body
    else:
        told, complete = [request.answer.get("decision")], bool(request.ended_at)
    if request.status == 200 and told == [verdict] and complete:
        return None
    return f"{verdict} was answered with {request.received[-300:]!r}"


def _made(request: Exchange) -> dict[str, Any]:
    """What an answer says of the decision that counts."""
    return {name: request.answer.get(name) for name in ("decision", "decided_by", "decided_at")}


def _is_informed(request: Exchange, made: dict[str, Any]) -> bool:
    """Whether it was refused because of this decision, and with who made it and when."""
    refused = request.status == 409 and request.answer.get("code") == "already_decided"
    return refused and all(made.values()) and _made(request) == made

"""The benchmark's load: many turns at once against a running server, and what their clients saw.

    INTERNAL_API_KEY=... python benchmarks/load.py --port 8000 --turns 100 --tokens 200

Prints `ready` when its sessions exist and starts the turns at the first line on its standard input. Prints `streaming`
when every stream has its first token, `over` when all have ended, and one line of JSON. While the turns run it does
nothing with what it receives but note when it came; everything is read afterwards. With `--follow`, every session has a
follower besides, at another server's port.

With `--streams` that many are open all the time instead, each with one turn after the other, every turn in a session
of its own. `streaming` is printed when that has settled, `over` after `--seconds` more or when the sessions are used
up; the JSON says how many tokens were read between the two.

`--dialect` is for other servers than ours: they are asked and they answer otherwise.
"""

import argparse
import asyncio
import http.client
import json
import os
import re
import resource
import sys
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast
from urllib.parse import urlencode

import uvloop

TOKEN = re.compile(rb'"token":"([^"]*)"')
WHOLE = re.compile(rb'"type":"assistant_message","content":"([^"]*)"')
COMPLETED = re.compile(rb'"type":"turn_finished","turn_id":"[^"]*","status":"completed"')
FINISHED = b'"type":"turn_finished"'
PATIENCE = 180.0
SETTLING_SECONDS = 0.5
# So many sessions are made at a time.
MAKERS = 8


class Request(NamedTuple):
    """A POST, and the status of its answer."""

    path: str
    body: dict[str, Any]
    status: int


class Dialect:
    """How a server is asked for a turn, and how its answer reads."""

    path = "/agent/message/stream"
    content_type = "application/json"
    token = TOKEN
    end = b"event: done"
    # The answer comes once more as a whole, and the turn says how it ended.
    repeats = False

    def body(self, session_id: str, message: str) -> bytes:
        text = {"type": "user_message", "content": message}
        return json.dumps({"session_id": session_id, "message": text}).encode()

    def before(self, session_id: str, *, routed: bool) -> list[Request]:
        """What has to be asked before the turn."""
        return []


class Ours(Dialect):
    repeats = True

    def before(self, session_id: str, *, routed: bool) -> list[Request]:
        made = Request("/sessions", {"session_id": session_id}, 201)
        switch = {"target_agent": "coder", "reason": "benchmark"}
        return [made] if routed else [made, Request(f"/agents/{session_id}/switch", switch, 200)]


class Agno(Dialect):
    path = "/agents/bench/runs"
    content_type = "application/x-www-form-urlencoded"
    token = re.compile(rb'"event":"RunContent",[^\n]*?"content":"([^"]*)"')
    end = b"event: RunCompleted"

    def body(self, session_id: str, message: str) -> bytes:
        return urlencode({"message": message, "session_id": session_id, "stream": "true"}).encode()


class Aegra(Dialect):
    path = "/threads/{session_id}/runs/stream"
    token = re.compile(rb'data: \[{"content":"([^"]*)"')
    end = b'{"status":"success"}'

    def body(self, session_id: str, message: str) -> bytes:
        messages = [{"role": "user", "content": message}]
        asked = {"assistant_id": "bench", "input": {"messages": messages}, "stream_mode": ["messages-tuple"]}
        return json.dumps(asked).encode()

    def before(self, session_id: str, *, routed: bool) -> list[Request]:
        return [Request("/threads", {"thread_id": session_id}, 200)]


OURS = Ours()
DIALECTS = {"ours": OURS, "bare": Dialect(), "agno": Agno(), "aegra": Aegra()}


@dataclass
class Turn:
    """One turn as its client saw it: what came, and when."""

    session_id: str
    dialect: Dialect = OURS
    asked_at: int = 0
    pieces: list[tuple[int, bytes]] = field(default_factory=list)

    def tokens(self) -> list[tuple[int, int, int]]:
        """Each token that arrived: its number, when the model sent it, when the client had read it."""
        read_to = list(accumulate(len(piece) for _, piece in self.pieces))
        body, starts, positions = dechunked(self.raw)
        arrived = []
        for match in self.dialect.token.finditer(body):
            chunk = bisect_left(starts, match.end()) - 1
            position = positions[chunk] + match.end() - starts[chunk]
            read_at = self.pieces[bisect_left(read_to, position)][0]
            # A delta holds several tokens when they came while a step was being stored.
            for token in match[1].split():
                number, _, sent_at = token.partition(b":")
                arrived.append((int(number), int(sent_at), read_at))
        return arrived

    @property
    def raw(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def problem(self, expected: int, *, is_whole_session: bool) -> str | None:
        """Why this turn failed, or None. A stream of the whole session has no end of its own."""
        status = self.raw.partition(b"\r\n")[0].decode(errors="replace")
        if not status.startswith("HTTP/1.1 200 "):
            return status or "no answer"
        body, _, _ = dechunked(self.raw)
        if not is_whole_session and self.dialect.end not in body:
            return "the stream broke off"
        if not self.dialect.repeats:
            return None
        if b"".join(WHOLE.findall(body)) != b"".join(self.dialect.token.findall(body)):
            return "the whole answer is not its tokens"
        whole = [len(text.split()) for text in WHOLE.findall(body)]
        if whole != [expected]:
            return f"{len(whole)} whole answers with {whole} tokens"
        if not COMPLETED.search(body):
            return "the turn did not complete"
        return None


def dechunked(raw: bytes) -> tuple[bytes, list[int], list[int]]:
    """The body of a chunked answer, and for each of its chunks where it starts in the body and in what was received."""
    position = raw.find(b"\r\n\r\n") + 4
    parts, starts, positions, length = [], [], [], 0
    while (end := raw.find(b"\r\n", position)) > position:
        size = int(raw[position:end], 16)
        parts.append(raw[end + 2 : end + 2 + size])
        starts.append(length)
        positions.append(end + 2)
        length += size
        position = end + 2 + size + 2
    return b"".join(parts), starts, positions


class Client(asyncio.Protocol):
    """One client: sends its message, notes what comes."""

    def __init__(self, turn: Turn, request: bytes) -> None:
        self.turn = turn
        self.request = request
        self.streams = asyncio.Event()
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.turn.asked_at = time.monotonic_ns()
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.turn.pieces.append((time.monotonic_ns(), data))
        if not self.streams.is_set() and b'"token":' in data:
            self.streams.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.streams.set()
        self.ended.set()


class Follower(Client):
    """A reader of the whole session's stream, which does not end with the turn: it is left then."""

    def __init__(self, turn: Turn, request: bytes) -> None:
        super().__init__(turn, request)
        self.follows = asyncio.Event()
        self.before = b""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.follows.set()
        # The mark may lie across pieces.
        data = self.before + data
        if FINISHED in data:
            self.ended.set()
        self.before = data[-len(FINISHED) :]


class Load:
    def __init__(
        self,
        port: int,
        key: str,
        *,
        routed: bool = False,
        other: int | None = None,
        dialect: Dialect = OURS,
        order: str = "",
    ) -> None:
        self.port = port
        self.key = key
        self.routed = routed
        self.other = other
        self.dialect = dialect
        self.order = order

    def sessions(self, count: int) -> list[str]:
        """New sessions; on the coder from the start, unless their messages are to be routed."""
        ids = [str(uuid.uuid4()) for _ in range(count)]
        with ThreadPoolExecutor(MAKERS) as makers:
            list(makers.map(self._make, [ids[start::MAKERS] for start in range(MAKERS)]))
        return ids

    def _make(self, session_ids: list[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"X-Internal-Auth": self.key, "Content-Type": "application/json"}
        for session_id in session_ids:
            for asked in self.dialect.before(session_id, routed=self.routed):
                connection.request("POST", asked.path, json.dumps(asked.body), headers)
                response = connection.getresponse()
                text = response.read()
                if response.status != asked.status:
                    raise RuntimeError(f"POST {asked.path}: {response.status} {text[:200]!r}")
        connection.close()

    async def follow(self, session_ids: list[str]) -> list[Follower]:
        """Readers of these sessions' streams, at the other server; each has its answer by now."""
        if self.other is None:
            return []
        followers = [Follower(Turn(session_id), self._following(session_id)) for session_id in session_ids]
        for follower in followers:
            await self._open(follower, self.other)
        await together(follower.follows for follower in followers)
        return followers

    async def run(
        self,
        session_ids: list[str],
        followers: Sequence[Follower] = (),
        *,
        apart: float = 0,
        on_streaming: Callable[[], None] = lambda: None,
    ) -> tuple[list[Turn], int]:
        """One turn in each session, so many seconds apart, to the end of every stream; when all of them streamed."""
        turns = [Turn(session_id, self.dialect) for session_id in session_ids]
        clients = [Client(turn, self._message(turn.session_id)) for turn in turns]
        if apart:
            for number, client in enumerate(clients):
                await asyncio.sleep(0 if number == 0 else apart)
                await self._open(client, self.port)
        else:
            await asyncio.gather(*[self._open(client, self.port) for client in clients])
        await together(client.streams for client in clients)
        streaming_at = time.monotonic_ns()
        on_streaming()
        await together(client.ended for client in [*clients, *followers])
        for client in [*clients, *followers]:
            client.transport.close()
        return turns, streaming_at

    async def keep_on(
        self,
        session_ids: list[str],
        streams: int,
        seconds: float,
        *,
        on_settled: Callable[[], None],
        on_over: Callable[[], None],
    ) -> tuple[list[Turn], int, int]:
        """So many streams, each with one turn after the other; and from when to when it counts."""
        turns: list[Turn] = []
        waiting, over = iter(session_ids), asyncio.Event()

        async def one_after_the_other() -> None:
            while not over.is_set() and (session_id := next(waiting, None)):
                turns.append(Turn(session_id, self.dialect))
                client = Client(turns[-1], self._message(session_id))
                await self._open(client, self.port)
                await client.ended.wait()
            over.set()

        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(one_after_the_other())
            await asyncio.sleep(SETTLING_SECONDS)
            if over.is_set():
                raise RuntimeError("the sessions were used up before it had settled")
            began = time.monotonic_ns()
            on_settled()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await over.wait()
            ended = time.monotonic_ns()
            on_over()
            over.set()
        return turns, began, ended

    async def _open(self, client: Client, port: int) -> None:
        await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", port)

    def _following(self, session_id: str) -> bytes:
        return (
            f"GET /sessions/{session_id}/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Internal-Auth: {self.key}\r\n\r\n"
        ).encode()

    def _message(self, session_id: str) -> bytes:
        message = f"Please write the function that we spoke of. {self.order}"
        body = self.dialect.body(session_id, message)
        path = self.dialect.path.format(session_id=session_id)
        return (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Internal-Auth: {self.key}\r\n"
            f"Content-Type: {self.dialect.content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode() + body


async def together(events: Iterable[asyncio.Event]) -> None:
    """Wait for all of them, but not for ever: what is missing then is a failed turn."""
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            for event in events:
                await event.wait()


def percentile(values: list[float], share: float) -> float:
    """By nearest rank; not a number when there is nothing to rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))] if ranked else float("nan")


def report(
    turns: list[Turn],
    expected: int,
    streaming_at: int,
    until: int | None = None,
    *,
    is_whole_session: bool = False,
) -> dict[str, object]:
    ages, steady, firsts, lasts, problems = [], [], [], [], []
    due = set(range(expected))
    lost = repeated = disordered = between = 0
    for turn in turns:
        tokens = turn.tokens()
        numbers = [number for number, _, _ in tokens]
        read = len(due.intersection(numbers))
        lost += len(due) - read
        repeated += len(numbers) - read
        disordered += numbers != sorted(numbers)
        ages += [(read_at - sent_at) / 1e6 for _, sent_at, read_at in tokens]
        steady += [(read_at - sent_at) / 1e6 for _, sent_at, read_at in tokens if sent_at > streaming_at]
        between += sum(streaming_at < read_at and (until is None or read_at <= until) for _, _, read_at in tokens)
        firsts += [(read_at - turn.asked_at) / 1e6 for _, _, read_at in tokens[:1]]
        # By the monotonic clock, which all processes share: until the first of these moments all streamed.
        lasts += [read_at for _, _, read_at in tokens[-1:]]
        if problem := turn.problem(expected, is_whole_session=is_whole_session):
            problems.append(problem)
    return {
        "turns": len(turns),
        "failed": len(problems),
        "problems": sorted(set(problems))[:5],
        "tokens": len(ages),
        "lost": lost,
        "repeated": repeated,
        "disordered": disordered,
        "age_ms": {name: percentile(ages, share) for name, share in SHARES.items()},
        "tokens_between": between,
        "steady_tokens": len(steady),
        "steady_age_ms": {name: percentile(steady, share) for name, share in SHARES.items()},
        "first_token_ms": {name: percentile(firsts, share) for name, share in SHARES.items()},
        "all_until": min(lasts, default=0),
        "all_at_once": streaming_at < min(lasts, default=0),
        "megabytes": sum(len(piece) for turn in turns for _, piece in turn.pieces) / 1e6,
    }


SHARES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=200, help="how many each answer has to have")
    parser.add_argument(
        "--rate", help="tokens a second that the model is asked for, or `no delay`; else it does as it does"
    )
    parser.add_argument("--streams", type=int, help="open all the time, with one turn after the other")
    parser.add_argument("--seconds", type=float, default=3, help="how long that counts")
    parser.add_argument("--dialect", choices=DIALECTS, default="ours")
    parser.add_argument("--routed", action="store_true", help="let the orchestrator route every message")
    parser.add_argument("--apart", type=float, default=0, help="seconds between the starts of turns; else all at once")
    parser.add_argument("--follow", type=int, help="port of the server at which every session has a follower")
    arguments = parser.parse_args()

    uvloop.run(measure(arguments))


async def measure(arguments: argparse.Namespace) -> None:
    key = os.environ["INTERNAL_API_KEY"]
    order = f"{arguments.tokens} tokens at {arguments.rate}." if arguments.rate else ""
    load = Load(
        arguments.port,
        key,
        routed=arguments.routed,
        other=arguments.follow,
        dialect=DIALECTS[arguments.dialect],
        order=order,
    )
    session_ids = load.sessions(arguments.turns)
    followers = await load.follow(session_ids)
    print("ready", flush=True)
    # Nothing comes before the turns begin.
    sys.stdin.readline()

    cpu, began, until = cpu_seconds(), time.monotonic(), None
    on_streaming, on_over = partial(print, "streaming", flush=True), partial(print, "over", flush=True)
    if arguments.streams:
        turns, since, until = await load.keep_on(
            session_ids, arguments.streams, arguments.seconds, on_settled=on_streaming, on_over=on_over
        )
    else:
        turns, since = await load.run(session_ids, followers, apart=arguments.apart, on_streaming=on_streaming)
        on_over()
    costs = {"seconds": time.monotonic() - began, "load_cpu_seconds": cpu_seconds() - cpu}
    if until is not None:
        costs["seconds_between"] = (until - since) / 1e9
    followed = [follower.turn for follower in followers]
    seen = report(turns, arguments.tokens, since, until)
    seen["followers"] = report(followed, arguments.tokens, since, is_whole_session=True)
    print(json.dumps({**seen, **costs}), flush=True)


if __name__ == "__main__":
    main()

"""What an open stream costs the server, how it is kept alive, and how it ends."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from itertools import pairwise
from pathlib import Path

import pytest

from events_app import log
from events_app.chunks import encode_delta
from events_app.database import THREADS, hop
from events_app.feed import QUEUE_FRAMES, feed
from events_app.frames import Frame
from events_app.stream import follow
from tests.scripted_llm import Gate, ScriptedLLM, gated, say, silence
from tests.server import AUTH, KEY, Server, eventually, running, until
from tests.server import Frame as SentFrame

STREAMS = 200
# What comes and goes without any stream: a request in flight, a database thread that had not been needed before.
SLACK = 5


@dataclass(frozen=True)
class Held:
    """What the server's process holds."""

    threads: int
    connections: int
    files: int


def held(server: Server) -> Held:
    assert server.process is not None
    process = Path(f"/proc/{server.process.pid}")
    threads = re.search(r"^Threads:\s+(\d+)", (process / "status").read_text(), re.MULTILINE)
    assert threads is not None
    files = list(_targets(process / "fd"))
    return Held(int(threads[1]), files.count(str(server.database)), len(files))


def _targets(folder: Path) -> Iterator[str]:
    for link in folder.iterdir():
        try:
            yield str(link.readlink())
        except FileNotFoundError:
            continue  # closed since it was listed


class RawStream:
    """A session stream on a socket of its own, so that a test decides when it is read and what the kernel may hold."""

    def __init__(self, server: Server, session_id: str, *, receive_buffer: int | None = None) -> None:
        self.received = bytearray()
        self.socket = socket.socket()
        self.socket.settimeout(15)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))
        headers = "".join(f"{name}: {value}\r\n" for name, value in AUTH.items())
        request = f"GET /sessions/{session_id}/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n"
        self.socket.sendall(request.encode())
        self._response = HTTPResponse(self.socket)

    def read_until(self, expected: bytes) -> None:
        """Read until it has received `expected`."""
        if not self.received:
            self._response.begin()
            assert self._response.status == 200
        looked_at = 0
        while self.received.find(expected, looked_at) < 0:
            looked_at = max(0, len(self.received) - len(expected))
            data = self._response.read1(1 << 16)
            assert data, f"the stream ended before {expected!r}: {self.received[-500:]!r}"
            self.received += data

    def close(self) -> None:
        self._response.close()
        self.socket.close()


@contextmanager
def many_streams(
    server: Server, session_ids: list[str], *, receive_buffer: int | None = None
) -> Iterator[list[RawStream]]:
    """A stream for each of these sessions, asked for at once; every one has replayed the session's first turn."""
    with ExitStack() as stack:
        streams = []
        for session_id in session_ids:
            streams.append(RawStream(server, session_id, receive_buffer=receive_buffer))
            stack.callback(streams[-1].close)
        for stream in streams:
            stream.read_until(b"turn_finished")
        yield streams


def steady(server: Server, fits: Callable[[Held], bool]) -> Held:
    """The first count that fits; what an ordinary request uses for a moment goes away, what a stream holds does not."""
    seen: list[Held] = []

    def look() -> bool:
        seen.append(held(server))
        return fits(seen[-1])

    try:
        eventually(look)
    except AssertionError:
        raise AssertionError(f"still holds {seen[-1]}, first {seen[0]}") from None
    return seen[-1]


def test_open_streams_hold_no_threads_and_no_database_connections(
    tmp_path: Path, llm: ScriptedLLM, migrated: Path
) -> None:
    # Room for these streams and one answer: a place that a stream does not give back is missed in the next round.
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, STREAMS_AT_ONCE=str(STREAMS + 1)) as server:
        for session_id in ("quiet", "busy"):
            server.say(session_id, "Hello", agent_type="coder")
        fresh = held(server)
        with many_streams(server, ["quiet"] * STREAMS):
            pass  # starts every database thread that the process may have; each opens the database file and its log
        before = steady(server, lambda now: now.files <= fresh.files + 2 * THREADS + SLACK)

        def costs_nothing() -> Held:
            return steady(
                server,
                lambda now: now.threads <= before.threads + SLACK and now.connections <= before.connections + SLACK,
            )

        with many_streams(server, ["busy", *["quiet"] * (STREAMS - 1)]) as streams:
            # But for files of database connections that have been closed meanwhile.
            assert costs_nothing().files >= before.files + STREAMS - SLACK

            gate = Gate()
            llm.script(gated(say("one two"), gate))
            with server.streaming({"type": "user_message", "content": "Go on"}, "busy") as frames:
                gate.reached.wait()
                streams[0].read_until(b'"token":" two"')
                costs_nothing()
                gate.open()
                assert list(frames)[-1].event == "done"
            streams[0].read_until(b'"content":"one two"')

        steady(server, lambda now: abs(now.files - before.files) <= SLACK and now.threads <= before.threads + SLACK)
        with many_streams(server, ["quiet"] * STREAMS):
            costs_nothing()


@pytest.mark.asyncio
@pytest.mark.django_db(transaction=True)
async def test_a_follower_that_reads_nothing_costs_a_bounded_queue_and_misses_nothing() -> None:
    count = 3 * QUEUE_FRAMES + 500
    blocks = [_deltas(first, min(100, count + 1 - first)) for first in range(2, count + 1, 100)]
    await hop(log.append, "slow", _deltas(1, 1))

    with feed.subscribe("slow", ends_with_session=True) as never_reads:
        async with aclosing(follow("slow", after=0)) as batches:
            read = list(await anext(batches))
            for block in blocks:
                await hop(log.append, "slow", block)
                feed.publish("slow", block, prev=block[0].seq - 1, logged=block[-1].seq)
                assert never_reads.waiting <= QUEUE_FRAMES
            assert never_reads.reread

            while read[-1].seq < count:
                read += await anext(batches)

    assert [frame.seq for frame in read] == list(range(1, count + 1))
    assert read[1:] == [frame for block in blocks for frame in block]


def _deltas(first: int, count: int) -> list[Frame]:
    return [Frame.of(seq, "turn", encode_delta(f"word {seq} ")) for seq in range(first, first + count)]


def test_a_client_that_stops_reading_gets_every_frame_in_order_in_the_end(
    tmp_path: Path, llm: ScriptedLLM, migrated: Path
) -> None:
    # Frames so large that the kernel's buffers hold a fraction of them.
    pieces = [f"{number} {'x' * 3_000} " for number in range(3 * QUEUE_FRAMES + 200)]
    llm.script(say("Hello"), say("".join(pieces), pieces=pieces))
    length = str(2 * sum(map(len, pieces)))
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_MAX_OUTPUT_CHARS=length) as server:
        server.say("s", "Hello", agent_type="coder")
        with many_streams(server, ["s"], receive_buffer=4_096) as [slow]:
            # Another client reads the same turn to its end, while this one reads nothing.
            everything = [frame.id for frame in server.say("s", "Say a lot") if frame.id is not None]
            assert len(everything) > 3 * QUEUE_FRAMES
            slow.read_until(f"id: {everything[-1]}\n".encode())

    ids = [int(number) for number in re.findall(rb"^id: (\d+)$", slow.received, re.MULTILINE)]
    assert ids[-len(everything) :] == everything
    assert all(earlier < later for earlier, later in pairwise(ids))


def test_a_silent_stream_carries_a_comment_every_second(tmp_path: Path, llm: ScriptedLLM, migrated: Path) -> None:
    llm.script(silence(30))
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, STREAM_HEARTBEAT_SECONDS="1") as server:
        server.http.post("/sessions", json={"session_id": "quiet"})
        with server.http.stream("GET", "/sessions/quiet/stream") as response:
            assert max(_gaps(response.iter_lines(), pings=4)) < 1.5

        message = {"type": "user_message", "content": "Hello", "agent_type": "coder"}
        body = {"session_id": "thinking", "message": message}
        with server.http.stream("POST", "/agent/message/stream", json=body) as response:
            assert max(_gaps(response.iter_lines(), pings=4)) < 1.5


def _gaps(lines: Iterator[str], *, pings: int) -> list[float]:
    """Seconds of silence before each of the first comments."""
    gaps, heard = [], time.monotonic()
    for line in lines:
        if line == ": ping":
            gaps.append(time.monotonic() - heard)
        if line:
            heard = time.monotonic()
        if len(gaps) == pings:
            return gaps
    raise AssertionError("the stream ended")


def test_a_session_stream_ends_at_its_maximum_age_and_resumes_without_a_gap(
    tmp_path: Path, llm: ScriptedLLM, migrated: Path
) -> None:
    text = " ".join(f"w{number}" for number in range(60))
    llm.script(say(text, pause=0.05))
    ages = {"STREAM_MAX_AGE_SECONDS": "2", "STREAM_HEARTBEAT_SECONDS": "1"}
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, **ages) as server:
        server.http.post("/sessions", json={"session_id": "s"})
        began = time.monotonic()
        with server.following("s") as frames:
            assert list(frames) == []  # a silent one ends too, by its heartbeats
        assert 2 <= time.monotonic() - began < 4

        with server.streaming({"type": "user_message", "content": "Count", "agent_type": "coder"}, "s") as answer:
            parts: list[list[SentFrame]] = []
            while not parts or parts[-1][-1].type != "turn_finished":
                with server.following("s", after=parts[-1][-1].id or 0 if parts else 0) as frames:
                    parts.append(list(frames))
            assert list(answer)[-1].event == "done"  # a turn's own answer has no such end

        seen = [frame for part in parts for frame in part]
        assert len(parts) > 1
        assert "".join(frame.data.get("token", "") for frame in seen) == text
        with server.following("s") as frames:
            assert until(frames, "turn_finished") == seen


def test_one_stream_too_many_is_refused_with_nothing_stored(tmp_path: Path, llm: ScriptedLLM, migrated: Path) -> None:
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, STREAMS_AT_ONCE="3") as server:
        server.say("s", "Hello", agent_type="coder")
        message = {"type": "user_message", "content": "One more"}
        with many_streams(server, ["s"] * 3) as streams:
            refusals = [
                server.http.get("/sessions/s/stream"),
                server.http.post("/agent/message/stream", json={"session_id": "s", "message": message}),
                server.http.post("/agent/message/stream", json={"session_id": "new", "message": message}),
            ]
            for refusal in refusals:
                assert (refusal.status_code, refusal.json()["code"]) == (503, "too_many_streams")
                assert int(refusal.headers["Retry-After"]) > 0
            assert server.history("s") == [("user", "Hello"), ("assistant", "ok")]
            assert server.http.get("/sessions/new").status_code == 404
            assert len(llm.answers) == 1

            streams[0].close()
            eventually(lambda: _admitted(server, "s"))


def _admitted(server: Server, session_id: str) -> bool:
    with server.http.stream("GET", f"/sessions/{session_id}/stream") as response:
        return response.status_code == 200


def test_a_reader_that_takes_nothing_is_cut_and_the_turn_goes_on(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    text = "x" * 900
    llm.script(say(text * 6_000, pieces=[text] * 6_000))
    limits = {"STREAM_STALL_SECONDS": "1", "TURN_MAX_OUTPUT_CHARS": "9000000"}
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, **limits) as server:
        server.post({"type": "switch_agent", "agent_type": "coder"}, "stalled")
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", server.port))
            head = f"GET /sessions/stalled/stream HTTP/1.1\r\nHost: localhost\r\nX-Internal-Auth: {KEY}\r\n\r\n"
            reader.sendall(head.encode())
            reader.recv(64)

            server.say("stalled", "talk a lot")

            eventually(lambda: "reader_stalled" in server.log.read_text())
        assert "Traceback" not in server.log.read_text()
        assert server.history("stalled")[-1] == ("assistant", text * 6_000)


def test_a_stream_that_sends_nothing_of_what_happens_still_beats(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    llm.script(say("word " * 60, pause=0.05))
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, STREAM_HEARTBEAT_SECONDS="0.6") as server:
        server.post({"type": "switch_agent", "agent_type": "coder"}, "quiet")
        message = {"type": "user_message", "content": "talk for three seconds"}
        body = {"session_id": "quiet", "message": message, "stream_tokens": False}
        with server.http.stream("POST", "/agent/message/stream", json=body) as response:
            received = b"".join(response.iter_raw())

    assert received.count(b": ping\n\n") >= 4
    assert b'"token"' not in received

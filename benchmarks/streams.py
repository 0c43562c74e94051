"""What many open streams cost while nothing happens, and what they do to the turns beside them.

    .venv/bin/python benchmarks/streams.py

Opens as many streams as one process has places for, ten to a session (GET /sessions/{id}/stream), and has some turns
stream before and beside them, in sessions that they follow. The server has a core to itself; the model (mock_model.py)
and this process, with the clients of the turns (load.py) and all who follow, share another. Linux only: it reads /proc.
Ends with status 1 when a stream was refused or broke, a turn failed, or a follower did not read all of a turn.
"""

import argparse
import asyncio
import os
import resource
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop
from load import COMPLETED, TOKEN, Load, dechunked, percentile, report
from machine import KEY, LOAD_CORE, Held, cpu_seconds
from systems import POOL, Bench, ours_running
from tables import Row, at_most, ms, percent, print_table, worst
from tables import verdict as met

OPENING_AT_ONCE = 100
PATIENCE = 120.0
TARGET_KIB = 100
TARGET_SLOWER = 1.2


class Follower(asyncio.Protocol):
    """One open stream: counts its heartbeats, keeps what came and when."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.opened = asyncio.Event()
        self.is_lost = False
        self.pings = 0
        self.pieces: list[tuple[int, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        head = f"GET /sessions/{self.session_id}/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Internal-Auth: {KEY}\r\n\r\n"
        self.transport.write(head.encode())

    def data_received(self, data: bytes) -> None:
        if data.endswith(b": ping\n\n\r\n") and len(data) < 20:
            self.pings += 1
            return
        self.pieces.append((time.monotonic_ns(), data))
        if not self.opened.is_set() and b"agent_switched" in data:
            self.opened.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.opened.set()

    @property
    def is_open(self) -> bool:
        return not self.is_lost and self.pieces[0][1].startswith(b"HTTP/1.1 200 ")

    def ages(self) -> list[float]:
        """How old each token was when it was read, in ms."""
        ages = []
        for read_at, piece in self.pieces:
            for token in TOKEN.findall(piece):
                ages += [(read_at - int(each.partition(b":")[2])) / 1e6 for each in token.split()]
        return ages

    def turns(self) -> int:
        """How many turns it has read to their end."""
        body, _, _ = dechunked(b"\r\n\r\n" + b"".join(piece for _, piece in self.pieces))
        return len(COMPLETED.findall(body))


async def follow_all(port: int, session_ids: Sequence[str]) -> list[Follower]:
    """One stream for each of these, opened some at a time; each has shown what it replays."""
    loop, places = asyncio.get_running_loop(), asyncio.Semaphore(OPENING_AT_ONCE)

    async def open_one(session_id: str) -> Follower:
        async with places:
            _, follower = await loop.create_connection(lambda: Follower(session_id), "127.0.0.1", port)
            await follower.opened.wait()
            return follower

    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*(open_one(session_id) for session_id in session_ids))


def slowest_answer(port: int, seconds: float) -> float:
    """The longest that /healthz took, asked again and again: for so long the event loop had no time."""
    longest, ends = 0.0, time.monotonic() + seconds
    while (began := time.monotonic()) < ends:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE) as answer:
            answer.read()
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.02)
    return longest


@dataclass(frozen=True)
class Beside:
    """What turns and their followers met."""

    seen: dict[str, Any]
    follower_ages: list[float]
    unread: int


async def turns_in(bench: Bench, session_ids: Sequence[str], followers: Sequence[Follower], tokens: int) -> Beside:
    """One turn in each of these sessions at once, read by its client and by all who follow."""
    for follower in followers:
        follower.pieces.clear()  # what was replayed, after the head
    turns, streaming_at = await Load(bench.port, KEY).run(list(session_ids))
    reading = [follower for follower in followers if follower.session_id in set(session_ids)]
    ends = time.monotonic() + 10
    while (unread := sum(follower.turns() != 1 for follower in reading)) and time.monotonic() < ends:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    ages = [age for follower in reading for age in follower.ages()]
    return Beside(report(turns, tokens, streaming_at), ages, unread)


@dataclass(frozen=True)
class Run:
    streams: int
    opening_seconds: float
    opening_cpu: float
    before: Held
    opened: Held
    closed: Held
    idle_seconds: float
    idle_cpu: float
    silent_cpu: float
    slowest: float
    pings: tuple[int, int]
    alone: Beside
    beside: Beside
    refused: int
    broken: int

    @property
    def is_whole(self) -> bool:
        faults = [beside.seen[name] for beside in (self.alone, self.beside) for name in FAULTS]
        return not any([*faults, self.refused, self.broken, self.beside.unread])


FAULTS = ("failed", "lost", "repeated", "disordered")


async def measure(bench: Bench, streams: int, sessions: int, turns: int, tokens: int, idle: float) -> Run:
    load = Load(bench.port, KEY)
    session_ids = await asyncio.to_thread(load.sessions, sessions)
    busy = session_ids[:turns]
    await turns_in(bench, session_ids[-turns:], [], tokens)  # what the first turns cost once is not the question
    silent = await used(bench, 5)
    alone = await turns_in(bench, await asyncio.to_thread(load.sessions, turns), [], tokens)
    streams -= turns  # the answers to the messages are streams too
    before, cpu, began = bench.held(), cpu_seconds(bench.server.pid), time.monotonic()

    followers = await follow_all(bench.port, [session_ids[number % sessions] for number in range(streams)])

    opening = time.monotonic() - began, cpu_seconds(bench.server.pid) - cpu
    refused = sum(not follower.is_open for follower in followers)
    opened = bench.held()
    cpu = cpu_seconds(bench.server.pid)
    slowest = await asyncio.to_thread(slowest_answer, bench.port, idle)
    idle_cpu = cpu_seconds(bench.server.pid) - cpu
    pings = [follower.pings for follower in followers]
    beside = await turns_in(bench, busy, followers, tokens)
    broken = sum(follower.is_lost for follower in followers) - refused
    for follower in followers:
        follower.transport.abort()
    closed = await settled(bench, before)
    return Run(
        streams, *opening, before, opened, closed, idle, idle_cpu, silent, slowest, (min(pings), max(pings)),
        alone, beside, refused, broken,
    )  # fmt: skip


async def used(bench: Bench, seconds: float) -> float:
    """The share of its core that the server uses meanwhile."""
    cpu = cpu_seconds(bench.server.pid)
    await asyncio.sleep(seconds)
    return (cpu_seconds(bench.server.pid) - cpu) / seconds


def _as_before(now: Held, before: Held) -> bool:
    return now.files <= before.files + POOL and now.threads <= before.threads + POOL


async def settled(bench: Bench, before: Held) -> Held:
    """What it holds when what was closed is let go of."""
    ends = time.monotonic() + 10
    while not _as_before(now := bench.held(), before) and time.monotonic() < ends:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return now


def rows(run: Run) -> Iterator[Row]:
    kib = (run.opened.megabytes - run.before.megabytes) * 1024 / run.streams
    alone, beside = run.alone.seen, run.beside.seen
    yield "streams refused, broken", f"{run.refused}, {run.broken}", met("0, 0", not run.refused and not run.broken)
    yield "to open them all", f"{run.opening_seconds:.1f} s, {run.streams / run.opening_seconds:.0f}/s", ""
    yield "  server CPU, each", f"{run.opening_cpu / run.streams * 1e6:.0f} µs", ""
    memory = f"{run.before.megabytes:.0f} MB, {run.opened.megabytes:.0f} MB, {run.closed.megabytes:.0f} MB"
    yield "server memory: before, open, after", memory, ""
    yield "  each stream", f"{kib:.1f} KiB", at_most(kib, TARGET_KIB, "KiB")
    for name in ("threads", "connections", "files"):
        counts = [getattr(moment, name) for moment in (run.before, run.opened, run.closed)]
        target = at_most(counts[1] - counts[0], POOL if name != "files" else POOL + run.streams, "more")
        yield f"{name}: before, open, after", "{}, {}, {}".format(*counts), target
    yield f"server CPU while idle for {run.idle_seconds:.0f} s", percent(run.idle_cpu / run.idle_seconds), ""
    yield "  without streams", percent(run.silent_cpu), ""
    yield "  slowest answer of /healthz", ms(run.slowest * 1000), ""
    yield "  heartbeats of a stream, least, most", "{}, {}".format(*run.pings), met("at least 1", run.pings[0] > 0)
    for title, seen in (("without", alone), ("beside them", beside)):
        yield f"turns {title}: failed", f"{seen['failed']} of {seen['turns']}", met("0", not seen["failed"])
        tokens = "{}, {}, {}".format(*(seen[name] for name in FAULTS[1:]))
        yield "  tokens lost, repeated, out of order", tokens, met("0, 0, 0", tokens == "0, 0, 0")
        yield "  age of a token: median", ms(seen["age_ms"]["median"]), ""
        yield "    p95, p99, max", worst(seen["age_ms"]), ""
        yield "  time to first token, median", ms(seen["first_token_ms"]["median"]), ""
    ratio = beside["first_token_ms"]["median"] / alone["first_token_ms"]["median"]
    yield "  time to first token, against without", f"{ratio:.2f}", at_most(ratio, TARGET_SLOWER, "times")
    ages = run.beside.follower_ages
    yield "followers that did not read a whole turn", str(run.beside.unread), met("0", not run.beside.unread)
    yield "  age of a token at a follower: median", ms(percentile(ages, 0.5)), ""
    yield "    p95, p99, max", ", ".join(ms(percentile(ages, share)) for share in (0.95, 0.99, 1.0)), ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=5_000, help="how many are open at once")
    parser.add_argument("--sessions", type=int, default=500, help="how many sessions they follow")
    parser.add_argument("--turns", type=int, default=10, help="turns beside them")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per turn, at 50 a second")
    parser.add_argument("--idle", type=float, default=32, help="seconds to look at them while nothing happens")
    arguments = parser.parse_args(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # of this process, and of those that it starts
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    try:
        with ours_running(folder, 50, arguments.tokens) as bench:
            run = uvloop.run(
                measure(bench, arguments.streams, arguments.sessions, arguments.turns, arguments.tokens, arguments.idle)
            )
    finally:
        shutil.rmtree(folder)
    print_table(f"{arguments.streams} streams of {arguments.sessions} sessions", rows(run))
    return 0 if run.is_whole else 1


if __name__ == "__main__":
    sys.exit(main())

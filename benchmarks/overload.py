"""What becomes of three times as many messages as one server process can answer.

    .venv/bin/python benchmarks/overload.py

First as many clients as keep the process busy, each asking again when it was answered: how many turns a second it
sustains. Then messages come by a timetable, whatever becomes of those before them: half as many, as many, three times
as many, and half as many again. Every message is for a session of its own. One web process has a core to itself; the
model and this process, with the clients, share another. SQLite. Linux only: it reads /proc. Ends with status 1 when a
turn that was accepted failed, or a message got neither an answer nor a refusal; a missed target of speed is only shown.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop
from load import percentile
from machine import (
    HERE,
    KEY,
    LOAD_CORE,
    PATIENCE,
    ROOT,
    SERVER_CORE,
    cpu_seconds,
    ended_after,
    environment,
    free_port,
    line_of,
    python,
    wait_healthy,
)
from rest import own_cpu
from stored import empty_sessions_sqlite
from tables import at_most, ms, percent, print_table, verdict

TIMES = 3
TARGET_SLOWER = 2.0
TARGET_REFUSAL_MS = 100
TARGET_BACK_SECONDS = 10
SESSIONS = 20_000
Row = tuple[str, str, str]


class Client(asyncio.Protocol):
    """One message: when it was sent, refused or accepted, had its first token, and ended. In seconds."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.asked_at = self.answered_at = self.first_at = self.ended_at = 0.0
        self.received = bytearray()
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(message(self.session_id))

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.received += data
        self.answered_at = self.answered_at or now
        if not self.first_at and b'"token":' in data:
            self.first_at = now

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended_at = time.monotonic()
        self.ended.set()

    @property
    def status(self) -> int:
        return int(self.received[9:12] or b"0")

    @property
    def is_refused(self) -> bool:
        return self.status in (429, 503) and b"\r\nretry-after: " in bytes(self.received[:2_000]).lower()

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and b'"status":"completed"' in self.received and b"event: done" in self.received

    @property
    def first_ms(self) -> float:
        return (self.first_at - self.asked_at) * 1000


def message(session_id: str) -> bytes:
    said = {"type": "user_message", "content": "Please write the function that we spoke of."}
    body = json.dumps({"session_id": session_id, "message": said}).encode()
    return (
        f"POST /agent/message/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Internal-Auth: {KEY}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


@dataclass
class Round:
    """What was offered, and what came of it."""

    offered: float = 0.0
    seconds: float = 0.0
    server_cpu: float = 0.0
    load_cpu: float = 0.0
    clients: list[Client] = field(default_factory=list)

    @property
    def accepted(self) -> list[Client]:
        return [client for client in self.clients if client.is_whole]

    @property
    def refused(self) -> list[Client]:
        return [client for client in self.clients if client.is_refused]

    @property
    def faults(self) -> list[str]:
        return [
            bytes(client.received[-200:]).decode(errors="replace") or "no answer"
            for client in self.clients
            if not client.is_whole and not client.is_refused
        ]

    def first(self, share: float) -> float:
        return percentile([client.first_ms for client in self.accepted], share)


class Bench:
    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid
        self.numbers = itertools.count(1)

    async def send(self) -> Client:
        client = Client(f"idle-{next(self.numbers)}")
        client.asked_at = time.monotonic()
        await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", self.port)
        return client

    async def closed(self, clients: int, seconds: float) -> Round:
        """So many clients, each with a next message when the last was answered."""
        ends = time.monotonic() + seconds

        async def go_on() -> list[Client]:
            sent = []
            while time.monotonic() < ends:
                sent.append(await self.send())
                await sent[-1].ended.wait()
                if sent[-1].is_refused:
                    await asyncio.sleep(1)  # as Retry-After says
            return sent

        began, cpu, load = time.monotonic(), cpu_seconds(self.pid), own_cpu()
        sent = await asyncio.gather(*[go_on() for _ in range(clients)])
        lasted = time.monotonic() - began
        every = [client for one in sent for client in one]
        return Round(0.0, lasted, cpu_seconds(self.pid) - cpu, own_cpu() - load, every)

    async def open(self, rate: float, seconds: float) -> Round:
        """Messages by a timetable."""
        began, cpu, load = time.monotonic(), cpu_seconds(self.pid), own_cpu()
        sending = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(began + number / rate - time.monotonic(), 0))
            sending.append(asyncio.create_task(self.send()))
        round_ = Round(rate, time.monotonic() - began, cpu_seconds(self.pid) - cpu, own_cpu() - load)
        round_.clients = await asyncio.gather(*sending)
        return round_

    async def until_all_ended(self, *rounds: Round) -> None:
        async with asyncio.timeout(PATIENCE):
            for round_ in rounds:
                for client in round_.clients:
                    await client.ended.wait()


@dataclass(frozen=True)
class Run:
    capacity: Round
    half: Round
    once: Round
    thrice: Round
    after: Round
    ended_at: float

    @property
    def rounds(self) -> dict[str, Round]:
        return {
            "closed loop": self.capacity, "half": self.half, "1x": self.once, f"{TIMES}x": self.thrice,
            "half again": self.after,
        }  # fmt: skip

    @property
    def back_after(self) -> float:
        """From the last message too many until messages are answered as they were before it began, none refused."""
        bound = self.half.first(0.99)
        late = [client.asked_at for client in self.after.clients if client.is_refused or client.first_ms > bound]
        # One in a hundred is slower than the p99 in any case.
        spare = len(self.after.clients) // 50
        return max(sorted(late)[: len(late) - spare], default=self.ended_at) - self.ended_at


async def measure(bench: Bench, arguments: argparse.Namespace) -> Run:
    await bench.closed(8, 2)  # what the first turns cost once is not the question
    capacity = await bench.closed(arguments.clients, arguments.seconds)
    rate = len(capacity.accepted) / capacity.seconds
    half = await bench.open(rate / 2, arguments.seconds)
    await bench.until_all_ended(half)
    once = await bench.open(rate, arguments.seconds)
    await bench.until_all_ended(once)
    thrice = await bench.open(rate * TIMES, 2 * arguments.seconds)
    ended_at = time.monotonic()
    after = await bench.open(rate / 2, arguments.seconds)
    await bench.until_all_ended(thrice, after)
    return Run(capacity, half, once, thrice, after, ended_at)


@contextmanager
def serving(folder: Path, tokens: int, rate: float, **settings: str) -> Iterator[Bench]:
    with ExitStack() as stack:
        command = [str(HERE / "mock_model.py"), "--rate", str(rate), "--tokens", str(tokens)]
        mock_env = {"PATH": os.environ["PATH"]}
        mock = stack.enter_context(ended_after(python(*command, env=mock_env, core=LOAD_CORE, stdout=subprocess.PIPE)))
        port = free_port()
        env = environment(folder, PORT=str(port), LLM_BASE_URL=f"http://127.0.0.1:{line_of(mock)}/v1", **settings)
        log = stack.enter_context((folder / "server.log").open("w"))
        server = stack.enter_context(
            ended_after(python("-m", "orchestrator_site.web", env=env, core=SERVER_CORE, stdout=log, stderr=log))
        )
        wait_healthy(server, port)
        yield Bench(port, server.pid)


def rows(run: Run) -> Iterator[Row]:
    for name, round_ in run.rounds.items():
        offered = f"{round_.offered:.0f}/s" if round_.offered else "as many as there are clients"
        yield f"{name}: offered", offered, ""
        rate = len(round_.accepted) / round_.seconds
        yield "  turns answered", f"{len(round_.accepted)}, {rate:.1f}/s", ""
        firsts = ", ".join(ms(round_.first(share)) for share in (0.5, 0.95, 0.99, 1.0))
        yield "  first token: median, p95, p99, max", firsts, ""
        refusals = [(client.answered_at - client.asked_at) * 1000 for client in round_.refused]
        if refusals:
            times = ", ".join(ms(percentile(refusals, share)) for share in (0.5, 0.95, 0.99, 1.0))
            late = sum(value > TARGET_REFUSAL_MS for value in refusals)
            yield (
                f"  refused: {len(refusals)}; median, p95, p99, max",
                times,
                verdict(f"within {TARGET_REFUSAL_MS} ms, {late} were not", not late),
            )
        yield "  neither answered nor refused", str(len(round_.faults)), verdict("0", not round_.faults)
        shares = round_.server_cpu / round_.seconds, round_.load_cpu / round_.seconds
        yield "  server, clients: share of their core", ", ".join(map(percent, shares)), ""
    ratio = run.thrice.first(0.99) / run.once.first(0.99)
    yield f"p99 of the first token, {TIMES}x against 1x", f"{ratio:.2f}", at_most(ratio, TARGET_SLOWER, "times")
    back = run.back_after
    yield "back to normal after", f"{back:.1f} s", at_most(back, TARGET_BACK_SECONDS, "s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32, help="of the closed loop")
    parser.add_argument("--seconds", type=float, default=12, help="of a round; three times as many come for twice that")
    parser.add_argument("--tokens", type=int, default=20, help="per turn")
    parser.add_argument("--rate", type=float, default=100, help="tokens per second and turn")
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    try:
        migrate = [sys.executable, "manage.py", "migrate", "-v0"]
        subprocess.run(migrate, cwd=ROOT, env=environment(folder), check=True, timeout=PATIENCE)
        empty_sessions_sqlite(folder / "bench.sqlite3", SESSIONS, name="idle")
        with serving(folder, arguments.tokens, arguments.rate) as bench:
            run = uvloop.run(measure(bench, arguments))
        log = (folder / "server.log").read_text()
    finally:
        shutil.rmtree(folder)
    print_table(f"Turns of {arguments.tokens} tokens at {arguments.rate:g} tokens/s; SQLite", rows(run))
    faults = [fault for round_ in run.rounds.values() for fault in round_.faults]
    for fault in faults[:5]:
        print(repr(fault))
    if "Traceback" in log:
        print(log[:3_000])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

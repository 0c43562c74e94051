"""How many REST requests one server process answers in a second: sessions made, histories of 1,000 messages read.

    .venv/bin/python benchmarks/rest.py
    .venv/bin/python benchmarks/rest.py --database postgresql

One web process (`python -m orchestrator_site.web`) has a core to itself; this process, with the clients, another, which
PostgreSQL shares. Every client keeps its connection and sends its next request when it has read an answer. Linux only:
it reads /proc. Ends with status 1 when a request was refused or answered with something else; a missed target of speed
is only shown.
"""

import argparse
import asyncio
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvloop
from load import percentile
from machine import (
    CORES,
    KEY,
    LOAD_CORE,
    PATIENCE,
    ROOT,
    SERVER_CORE,
    cpu_seconds,
    ended_after,
    environment,
    free_port,
    python,
    wait_healthy,
)
from stored import fill_postgresql, fill_sqlite
from tables import print_table, verdict

sys.path.insert(0, str(ROOT))
from orchestrator_site.local_services import PostgreSQL  # not installed: it lies beside

MESSAGES = 1_000
# So many turns have so many messages: every tenth says a thing more, and has the result of a call.
TURNS = MESSAGES * 10 // 22
NEAR_LIMIT = 0.8
CREATE, HISTORY, DETAIL, READ = "POST /sessions", "GET .../history", "GET ...?include_messages", "GET /sessions/{id}"
TARGETS = {CREATE: (400, 800), HISTORY: (100, 300)}
Row = tuple[str, str, str]


class Client(asyncio.Protocol):
    """One connection, which asks for the same again and again until it is told to stop."""

    def __init__(self, request: bytes, expected: bytes) -> None:
        self.request = request
        self.expected = expected
        self.asked_at = 0.0
        self.left = -1
        self.seconds: list[float] = []
        self.size = 0
        self.problems: list[str] = []
        self.is_stopping = False
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.ask()

    def ask(self) -> None:
        self.left = -1
        self.asked_at = time.monotonic()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.left < 0:
            # A head is small and comes in one piece here.
            head, _, data = data.partition(b"\r\n\r\n")
            if not head.startswith(self.expected):
                self.problems.append(head[:100].decode(errors="replace"))
            self.left = self.size = content_length(head)
        self.left -= len(data)
        if self.left <= 0:
            self.seconds.append(time.monotonic() - self.asked_at)
            if self.is_stopping:
                self.transport.close()
            else:
                self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_stopping:
            self.problems.append("the connection was closed")
        self.ended.set()


def content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    raise ValueError(f"no Content-Length: {head!r}")


@dataclass(frozen=True)
class Run:
    """One kind of request, from all clients at once."""

    seconds: float
    answered: int
    times: list[float]
    size: int
    server_cpu: float
    load_cpu: float
    problems: list[str]

    @property
    def rate(self) -> float:
        return self.answered / self.seconds


async def ask(port: int, pid: int, request: bytes, expected: bytes, clients: int, seconds: float) -> Run:
    loop = asyncio.get_running_loop()
    began, cpu, load = time.monotonic(), cpu_seconds(pid), own_cpu()
    asking = [
        (await loop.create_connection(lambda: Client(request, expected), "127.0.0.1", port))[1] for _ in range(clients)
    ]
    await asyncio.sleep(seconds)
    answered, times = sum(len(client.seconds) for client in asking), [s for client in asking for s in client.seconds]
    lasted, cpu, load = time.monotonic() - began, cpu_seconds(pid) - cpu, own_cpu() - load
    for client in asking:
        client.is_stopping = True
    async with asyncio.timeout(PATIENCE):
        for client in asking:
            await client.ended.wait()
    problems = [problem for client in asking for problem in client.problems]
    return Run(lasted, answered, times, asking[0].size, cpu, load, problems)


def own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Internal-Auth: {KEY}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    elif method == "POST":
        head += "Content-Length: 0\r\n"
    return head.encode() + b"\r\n" + body


@contextmanager
def serving(folder: Path, database: str, **settings: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A web process on a new database that holds one session of so many messages, and its port."""
    with ExitStack() as stack:
        port = free_port()
        env = environment(folder, PORT=str(port), **settings)
        if database == "postgresql":
            postgresql = PostgreSQL(folder / "postgresql")
            postgresql.start()
            stack.callback(postgresql.stop)
            assert postgresql.process is not None
            os.sched_setaffinity(postgresql.process.pid, LOAD_CORE)
            env["DATABASE_URL"] = postgresql.url("postgres")
        migrate = [sys.executable, "manage.py", "migrate", "-v0"]
        subprocess.run(migrate, cwd=ROOT, env=env, check=True, timeout=PATIENCE)
        if database == "postgresql":
            fill_postgresql(env["DATABASE_URL"], TURNS, TURNS)
        else:
            fill_sqlite(folder / "bench.sqlite3", TURNS, TURNS)
        log = stack.enter_context((folder / "server.log").open("w"))
        command = ["-m", "orchestrator_site.web"]
        server = stack.enter_context(ended_after(python(*command, env=env, core=SERVER_CORE, stdout=log, stderr=log)))
        wait_healthy(server, port)
        yield server, port


def rows(runs: dict[str, Run]) -> Iterator[Row]:
    for name, run in runs.items():
        target = ""
        if name in TARGETS:
            least, stretch = TARGETS[name]
            target = verdict(f"at least {least}, stretch {stretch}", run.rate >= least)
        yield f"{name}: requests/s", f"{run.rate:.0f}", target
        times = ", ".join(f"{percentile(run.times, share) * 1000:.1f}" for share in (0.5, 0.95, 0.99))
        yield "  time of one: median, p95, p99", f"{times} ms", ""
        yield "  server CPU of one", f"{run.server_cpu / run.answered * 1e6:.0f} µs", ""
        share = run.load_cpu / run.seconds
        yield "  clients: share of their core", f"{share:.0%}", "NEAR THEIR LIMIT" if share > NEAR_LIMIT else ""
        yield "  bytes of an answer", str(run.size), ""
        yield "  failed", str(len(run.problems)), verdict("0", not run.problems)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--clients", type=int, default=16, help="requests at once")
    parser.add_argument("--seconds", type=float, default=6, help="how long each kind is asked for")
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    folder.chmod(0o755)  # PostgreSQL has a user of its own
    try:
        with serving(folder, arguments.database) as (server, port):
            runs = {}
            for name, asked, expected in (
                (READ, request("GET", "/sessions/stored-1"), b"HTTP/1.1 200"),
                (CREATE, request("POST", "/sessions", b"{}"), b"HTTP/1.1 201"),
                (HISTORY, request("GET", "/sessions/stored-1/history"), b"HTTP/1.1 200"),
                (DETAIL, request("GET", "/sessions/stored-1?include_messages=true"), b"HTTP/1.1 200"),
            ):
                # What the first requests cost once is not the question.
                uvloop.run(ask(port, server.pid, asked, expected, arguments.clients, 0.5))
                runs[name] = uvloop.run(ask(port, server.pid, asked, expected, arguments.clients, arguments.seconds))
        log = (folder / "server.log").read_text()
    finally:
        shutil.rmtree(folder)
    title = f"{arguments.clients} clients, {arguments.database}; {len(CORES)} cores"
    print_table(title, rows(runs))
    if "Traceback" in log:
        print(log[:2_000])
    return 1 if any(run.problems for run in runs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

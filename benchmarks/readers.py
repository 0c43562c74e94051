"""What readers that take 1 KiB a second cost those beside them, and the server.

    .venv/bin/python benchmarks/readers.py

Fifty clients send their messages one after the other, by a timetable; then the same beside 200 readers of a stream that
has more to replay than they will ever take. One web process has a core to itself; the model and this process, with the
clients, share another. SQLite. Linux only: it reads /proc. Ends with status 1 when a turn failed or a reader was cut; a
missed target of speed is only shown.
"""

import argparse
import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvloop
from machine import KEY, LOAD_CORE, PATIENCE, ROOT, cpu_seconds, environment, held
from overload import Bench, Round, serving
from stored import empty_sessions_sqlite, fill_sqlite
from tables import at_most, ms, percent, print_table, verdict

A_SECOND = 1024
TURNS = 10_000
TARGET_SLOWER = 1.2
TARGET_MIB = 2.0
# Of its core; without turns and with readers whose buffers are full.
QUIET = 0.3
Row = tuple[str, str, str]


@dataclass
class Reader:
    """One slow reader: how much it has taken, and whether it still reads."""

    taken: int = 0
    is_cut: bool = False

    async def read(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", port))
            request = f"GET /sessions/long-1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Internal-Auth: {KEY}\r\n\r\n"
            await loop.sock_sendall(connection, request.encode())
            with suppress(ConnectionError):
                while data := await loop.sock_recv(connection, A_SECOND):
                    self.taken += len(data)
                    await asyncio.sleep(1)
            self.is_cut = True


@dataclass(frozen=True)
class Run:
    alone: Round
    beside: Round
    readers: list[Reader]
    megabytes: tuple[float, float]
    replayed: float

    @property
    def each_mib(self) -> float:
        return (self.megabytes[1] - self.megabytes[0]) / len(self.readers)


async def measure(bench: Bench, database: Path, arguments: argparse.Namespace) -> Run:
    await bench.until_all_ended(
        await bench.open(arguments.rate, 3)
    )  # what the first turns cost once is not the question
    alone = await bench.open(arguments.rate, arguments.seconds)
    await bench.until_all_ended(alone)
    before = held(bench.pid, database).megabytes
    readers = [Reader() for _ in range(arguments.readers)]
    reading = [asyncio.create_task(reader.read(bench.port)) for reader in readers]
    replayed = await quiet(bench)
    beside = await bench.open(arguments.rate, arguments.seconds)
    await bench.until_all_ended(beside)
    megabytes = before, held(bench.pid, database).megabytes
    for task in reading:
        task.cancel()
    return Run(alone, beside, readers, megabytes, replayed)


async def quiet(bench: Bench) -> float:
    """Until the server has given the readers all that the buffers between them hold; how long that took."""
    began, cpu = time.monotonic(), cpu_seconds(bench.pid)
    await asyncio.sleep(1)
    while (now := cpu_seconds(bench.pid)) - cpu > QUIET and time.monotonic() - began < PATIENCE:
        cpu = now
        await asyncio.sleep(1)
    return time.monotonic() - began


def rows(run: Run) -> Iterator[Row]:
    for name, round_ in (("without", run.alone), ("beside slow readers", run.beside)):
        firsts = ", ".join(ms(round_.first(share)) for share in (0.5, 0.95, 0.99))
        yield f"first token {name}: median, p95, p99", firsts, ""
        failed = len(round_.clients) - len(round_.accepted)
        yield "  turns, failed", f"{len(round_.clients)}, {failed}", verdict("0 failed", not failed)
        yield "  server: share of its core", percent(round_.server_cpu / round_.seconds), ""
    ratio = run.beside.first(0.95) / run.alone.first(0.95)
    yield "p95 beside, against without", f"{ratio:.2f}", at_most(ratio, TARGET_SLOWER, "times")
    yield "server memory before and with the readers", "{:.0f} MB, {:.0f} MB".format(*run.megabytes), ""
    yield "  each reader", f"{run.each_mib:.2f} MiB", at_most(run.each_mib, TARGET_MIB, "MiB")
    yield "until the buffers between them were full", f"{run.replayed:.0f} s", ""
    cut = sum(reader.is_cut for reader in run.readers)
    yield "readers, cut", f"{len(run.readers)}, {cut}", verdict("0 cut", not cut)
    yield "  each has taken", f"{sum(reader.taken for reader in run.readers) / len(run.readers) / 1024:.0f} KiB", ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=200, help="that take 1 KiB a second each")
    parser.add_argument("--rate", type=float, default=10, help="messages a second beside them")
    parser.add_argument("--seconds", type=float, default=12)
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    database = folder / "bench.sqlite3"
    try:
        migrate = [sys.executable, "manage.py", "migrate", "-v0"]
        subprocess.run(migrate, cwd=ROOT, env=environment(folder), check=True, timeout=PATIENCE)
        fill_sqlite(database, TURNS, TURNS, name="long")
        empty_sessions_sqlite(database, 5_000, name="idle")
        # Turns of five seconds: at ten a second, fifty are under way.
        with serving(folder, 100, 20) as bench:
            run = uvloop.run(measure(bench, database, arguments))
    finally:
        shutil.rmtree(folder)
    print_table(f"{arguments.readers} slow readers; SQLite", rows(run))
    whole = len(run.alone.accepted) == len(run.alone.clients) and len(run.beside.accepted) == len(run.beside.clients)
    return 0 if whole and not any(reader.is_cut for reader in run.readers) else 1


if __name__ == "__main__":
    sys.exit(main())

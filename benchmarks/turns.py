"""What streaming many turns at once costs, and how fast the server starts.

    .venv/bin/python benchmarks/turns.py

Starts a server process of its own on a new database, a model (mock_model.py) and clients (load.py), each in a process
of its own: the server on one core, everything else on another. Linux only: it reads /proc. Ends with status 1 when a
turn failed or a token got lost.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
KEY = "benchmark-key-benchmark-key-benchmark-key"
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = {CORES[0]}, {CORES[-1]}
TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE = 60.0
# Above this share of its core, whatever makes or reads the tokens is measured along with the server.
NEAR_LIMIT = 0.7

TARGET_AGE_MS = 50
TARGET_CHECK_SECONDS = 2.0
TARGET_START_SECONDS = 5.0
# What may be added by any number of streams: the database threads of events_app/database.py and their connections.
POOL = 4


@dataclass(frozen=True)
class Held:
    """What a process holds at a moment, or the most of it over several."""

    threads: int
    connections: int
    files: int
    megabytes: float

    def or_more(self, other: "Held") -> "Held":
        return Held(
            max(self.threads, other.threads),
            max(self.connections, other.connections),
            max(self.files, other.files),
            max(self.megabytes, other.megabytes),
        )


def held(pid: int, database: Path) -> Held:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = list(open_files(pid))
    return Held(int(status["Threads"]), files.count(str(database)), len(files), int(status["VmRSS"].split()[0]) / 1024)


def open_files(pid: int) -> Iterator[str]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield str(link.readlink())
        except FileNotFoundError:
            continue  # closed since it was listed


def cpu_seconds(pid: int) -> float:
    """Of all threads, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """All that the server would otherwise take from `.env`, or write there."""
    return {
        "PATH": os.environ["PATH"],
        "SECRET_KEY": "benchmark" * 6,
        "INTERNAL_API_KEY": KEY,
        "DJANGO_SUPERUSER_PASSWORD": "benchmark-password",
        "DATABASE_URL": f"sqlite:///{folder / 'bench.sqlite3'}",
        "LOG_LEVEL": "WARNING",
        **settings,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python(*arguments: str, env: dict[str, str], core: set[int], **options: Any) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, text=True, **options)
    # It has one thread yet: all that it starts later stay where it is.
    os.sched_setaffinity(process.pid, core)
    return process


@contextmanager
def ended_after(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def wait_healthy(process: "subprocess.Popen[str]", port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start") from None
            time.sleep(0.01)


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{process.args!r} ended early")
    return line


def begin(load: "subprocess.Popen[str]") -> None:
    assert load.stdin is not None
    load.stdin.write("\n")
    load.stdin.flush()


# --- Turns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one round of turns cost."""

    seen: dict[str, Any]
    server_cpu: float
    steady_cpu: float
    mock_cpu: float
    idle: Held
    streaming: Held
    peak: Held
    after: Held

    @property
    def exact(self) -> bool:
        return not any(self.seen[name] for name in ("failed", "lost", "repeated", "disordered"))


class Bench:
    """A running server and the model behind it."""

    def __init__(self, server: "subprocess.Popen[str]", mock: "subprocess.Popen[str]", port: int, folder: Path) -> None:
        self.server = server
        self.mock = mock
        self.port = port
        self.env = environment(folder)
        self.database = folder / "bench.sqlite3"

    def held(self) -> Held:
        return held(self.server.pid, self.database)

    def load(self, count: int, tokens: int, *, routed: bool) -> "subprocess.Popen[str]":
        """The clients of so many turns, which they ask for when they are told to `begin`."""
        arguments = ["--port", str(self.port), "--turns", str(count), "--tokens", str(tokens)]
        command = [str(HERE / "load.py"), *arguments, *(["--routed"] if routed else [])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return python(*command, env=self.env, core=LOAD_CORE, **pipes)

    def turns(self, count: int, tokens: int, *, routed: bool) -> Run:
        with ended_after(self.load(count, tokens, routed=routed)) as load:
            line_of(load)  # its sessions exist
            idle = self.held()
            server_cpu, mock_cpu = cpu_seconds(self.server.pid), cpu_seconds(self.mock.pid)
            begin(load)
            line_of(load)  # every stream has its first token
            steady_cpu = cpu_seconds(self.server.pid)
            streaming, peak = self._while_streaming(tokens)
            seen = json.loads(line_of(load))
            steady_cpu = cpu_seconds(self.server.pid) - steady_cpu
            server_cpu = cpu_seconds(self.server.pid) - server_cpu
            mock_cpu = cpu_seconds(self.mock.pid) - mock_cpu
        return Run(seen, server_cpu, steady_cpu, mock_cpu, idle, streaming, peak, self.held())

    def _while_streaming(self, tokens: int) -> tuple[Held, Held]:
        """At the first look, and the most of some looks while all streams are certainly open."""
        first = peak = self.held()
        for _ in range(min(4, tokens // 50)):
            time.sleep(0.25)
            peak = peak.or_more(self.held())
        return first, peak


@contextmanager
def running(folder: Path, rate: float, tokens: int) -> Iterator[Bench]:
    port = free_port()
    mock_command = [str(HERE / "mock_model.py"), "--rate", str(rate), "--tokens", str(tokens)]
    mock_env = {"PATH": os.environ["PATH"]}
    with ended_after(python(*mock_command, env=mock_env, core=LOAD_CORE, stdout=subprocess.PIPE)) as mock:
        env = environment(folder, LLM_BASE_URL=f"http://127.0.0.1:{line_of(mock)}/v1")
        subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], cwd=ROOT, env=env, check=True, timeout=PATIENCE)
        command = ["-m", "uvicorn", "orchestrator_site.asgi:application", "--port", str(port), "--no-access-log"]
        with (
            (folder / "server.log").open("w") as log,
            ended_after(python(*command, env=env, core=SERVER_CORE, stdout=log, stderr=log)) as server,
        ):
            wait_healthy(server, port)
            yield Bench(server, mock, port, folder)


# --- Starting ----------------------------------------------------------------------------------------------------


def check_seconds(folder: Path) -> float:
    """`manage.py check`, median of five."""
    command = [sys.executable, "manage.py", "check"]

    def check() -> float:
        began = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=environment(folder), check=True, capture_output=True, timeout=PATIENCE)
        return time.monotonic() - began

    return median(check() for _ in range(5))


def start_seconds(folder: Path) -> tuple[float, float]:
    """What `make run` runs, until it answers: on an empty folder, and for the second time."""
    port = free_port()
    env = environment(folder, PORT=str(port), DATABASE_URL=f"sqlite:///{folder / 'start.sqlite3'}")

    def start() -> float:
        command = ["-m", "orchestrator_site.serve"]
        began = time.monotonic()
        with ended_after(python(*command, env=env, core=set(CORES), stdout=subprocess.DEVNULL)) as server:
            wait_healthy(server, port)
            return time.monotonic() - began

    return start(), start()


# --- Report ------------------------------------------------------------------------------------------------------

Row = tuple[str, str, str]


def turn_rows(run: Run) -> Iterator[Row]:
    seen, age, steady, first = run.seen, run.seen["age_ms"], run.seen["steady_age_ms"], run.seen["first_token_ms"]
    yield "turns, failed", f"{seen['turns']}, {seen['failed']}", verdict("0 failed", not seen["failed"])
    yield (
        "tokens, lost, repeated, out of order",
        f"{seen['tokens']}, {seen['lost']}, {seen['repeated']}, {seen['disordered']}",
        verdict("none", not (seen["lost"] or seen["repeated"] or seen["disordered"])),
    )
    yield "age of a token at the client, median", ms(age["median"]), at_most(age["median"], TARGET_AGE_MS, "ms")
    yield "  p95, p99, max", worst(age), ""
    yield "  while all stream: median", ms(steady["median"]), ""
    yield "  p95, p99, max", worst(steady), ""
    yield "time to first token, median, p95, max", ", ".join(ms(first[name]) for name in ("median", "p95", "max")), ""
    yield "from the first request to the last byte", f"{seen['seconds']:.2f} s", ""
    yield "server CPU, per token", cost(run.server_cpu, seen["tokens"]), ""
    yield "  since all streamed, per token", cost(run.steady_cpu, seen["steady_tokens"]), ""
    yield "  share of its core", percent(run.server_cpu / seen["seconds"]), ""
    yield "server memory, idle, streaming", f"{run.idle.megabytes:.0f} MB, {run.peak.megabytes:.0f} MB", ""
    for name in ("threads", "connections"):
        counts = [getattr(moment, name) for moment in (run.idle, run.streaming, run.peak, run.after)]
        shown = "{}, {}, {}, {}".format(*counts)
        yield f"{name}: idle, streaming, at most, after", shown, at_most(counts[2] - counts[0], POOL, "more")
    shares = run.mock_cpu / seen["seconds"], seen["load_cpu_seconds"] / seen["seconds"]
    note = "NEAR THEIR LIMIT" if sum(shares) > NEAR_LIMIT else "not near their limit"
    yield "model, clients: share of their core", f"{percent(shares[0])}, {percent(shares[1])}", note


def start_rows(check: float, first: float, second: float) -> Iterator[Row]:
    yield "manage.py check, median of 5", f"{check:.2f} s", at_most(check, TARGET_CHECK_SECONDS, "s")
    yield "start until /health answers, first", f"{first:.2f} s", ""
    yield "start until /health answers, second", f"{second:.2f} s", at_most(second, TARGET_START_SECONDS, "s")


def ms(value: float) -> str:
    return f"{value:.1f} ms"


def worst(values: dict[str, float]) -> str:
    return ", ".join(ms(values[name]) for name in ("p95", "p99", "max"))


def cost(seconds: float, tokens: int) -> str:
    return f"{seconds:.2f} s, {seconds / max(tokens, 1) * 1e6:.0f} µs"


def percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def at_most(value: float, target: float, unit: str) -> str:
    return verdict(f"at most {target:g} {unit}", value <= target)


def verdict(target: str, met: bool) -> str:
    return f"{target}: {'met' if met else 'MISSED'}"


def print_table(title: str, rows: Iterator[Row]) -> None:
    print(f"\n{title}")
    for name, value, target in rows:
        print(f"  {name:<40} {value:<34} {target}".rstrip())
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=100, help="turns at once")
    parser.add_argument("--rate", type=float, default=50, help="tokens per second and turn")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per turn")
    parser.add_argument("--no-starts", action="store_true", help="measure the turns only")
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    try:
        return measure(folder, arguments)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, arguments: argparse.Namespace) -> int:
    turns, rate, tokens = arguments.turns, arguments.rate, arguments.tokens
    print(f"{turns} turns at once, {tokens} tokens each at {rate:g} tokens/s; {len(CORES)} cores, SQLite")
    with running(folder, rate, tokens) as bench:
        print(f"server: process {bench.server.pid}")
        bench.turns(4, tokens, routed=True)  # what the first request costs once is not the question
        runs = {}
        for title, routed in (("On a specialist: one model step", False), ("Routed: two model steps", True)):
            runs[title] = bench.turns(turns, tokens, routed=routed)
            print_table(title, turn_rows(runs[title]))
    log = (folder / "server.log").read_text()
    print_table("Server", iter([("lines in the server's log", str(len(log.splitlines())), verdict("0", not log))]))
    if log:
        print(log[:2_000])
    if not arguments.no_starts:
        os.sched_setaffinity(0, set(CORES))
        print_table("Starting", start_rows(check_seconds(folder), *start_seconds(folder)))
    for run in runs.values():
        for problem in run.seen["problems"]:
            print(f"a turn failed: {problem}")
    return 0 if all(run.exact for run in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

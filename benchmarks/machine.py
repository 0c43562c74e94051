"""The machine: its cores, the processes that a benchmark starts on them, and what /proc says that they use.

Linux only.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
KEY = "benchmark-key-benchmark-key-benchmark-key"
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = {CORES[0]}, {CORES[-1]}
TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE = 60.0


# --- Processes ------------------------------------------------------------------------------------------------------


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
    return started([sys.executable, *arguments], env=env, core=core, **options)


def started(command: list[str], *, env: dict[str, str], core: set[int], **options: Any) -> "subprocess.Popen[str]":
    process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, **options)
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


# --- What they use --------------------------------------------------------------------------------------------------


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


def family_cpu_seconds(pid: int) -> float:
    """Of a process, of its children that live, and of those that it has seen end."""
    while True:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ended = (int(fields[13]) + int(fields[14])) / TICKS
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        with suppress(FileNotFoundError):  # one of them has ended meanwhile: look again
            return cpu_seconds(pid) + ended + sum(cpu_seconds(int(child)) for child in children)


def busy_seconds(core: int) -> float:
    """That a core was not idle, whatever it did."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _waiting, *rest = map(int, ticks)
            return (user + nice + system + sum(rest[:3])) / TICKS
    raise ValueError(f"no core {core}")


def private_kib(pid: int) -> int:
    """The memory that would be free without this process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

"""How soon a new process has taken up what a killed one left behind.

    .venv/bin/python benchmarks/recovery.py

A server dies (kill -9) with 1,000 open turns, half of them running and half queued; the next one is started when the
leases have run out, and measured is when it has claimed the last of them. It dies as well, with all of them running,
and a third one is started at once, so that it has to wait for the leases. The server has a core to itself, the model
(mock_model.py) shares another with this. Ends with status 1 when a turn was not claimed, or claimed twice.
"""

import argparse
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import (
    CORES,
    HERE,
    LOAD_CORE,
    PATIENCE,
    ROOT,
    SERVER_CORE,
    Held,
    ended_after,
    environment,
    free_port,
    held,
    line_of,
    python,
    wait_healthy,
)
from tables import Row, at_most, print_table, verdict

TARGET_SECONDS = 5.0
LEASE_SECONDS = 10.0
SEED = """
from tests.factories import make_session, make_turn
for number in range({count}):
    make_turn(make_session(f"session-{{number}}"))
"""
CLAIMS = """
    SELECT min(timestamp), max(timestamp), count(*), count(DISTINCT correlation_id) FROM events_app_event
    WHERE event_type = 'agent.processing.started' AND timestamp > ?
"""
# As Django stores a time.
STORED = "%Y-%m-%d %H:%M:%S.%f"


@dataclass(frozen=True)
class Recovery:
    """What one start took; seconds since the process was started."""

    healthy: float
    first: float
    last: float
    claims: int
    turns: int
    held: Held


class Bench:
    """A database with open turns, and one server after the other that works on them."""

    def __init__(self, folder: Path, model: str, turns: int) -> None:
        self.folder = folder
        self.database = folder / "bench.sqlite3"
        self.model = model
        self.turns = turns
        env = environment(folder)
        for command in (["migrate", "-v0"], ["shell", "-v0", "-c", SEED.format(count=turns)]):
            subprocess.run([sys.executable, "manage.py", *command], cwd=ROOT, env=env, check=True, timeout=PATIENCE * 5)

    @contextmanager
    def server(self, at_once: int) -> Iterator["tuple[subprocess.Popen[str], float, float]"]:
        """A process, when it was started, and after how many seconds it answered; killed at the end."""
        port = free_port()
        env = environment(
            self.folder,
            LLM_BASE_URL=self.model,
            PORT=str(port),
            TURNS_AT_ONCE=str(at_once),
            TURN_LEASE_SECONDS=str(LEASE_SECONDS),
            # This benchmark's kills are no turn's doing.
            TURN_MAX_LOSSES="10",
        )
        command = ["-m", "uvicorn", "orchestrator_site.asgi:application", "--port", str(port), "--no-access-log"]
        with (self.folder / "server.log").open("a") as log:
            began = time.time()
            process = python(*command, env=env, core=SERVER_CORE, stdout=log, stderr=log)
            with ended_after(process):
                wait_healthy(process, port)
                yield process, began, time.time() - began
                process.kill()

    def row(self, query: str, *values: Any) -> tuple[Any, ...]:
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=30)) as database:
            return tuple(database.execute(query, values).fetchone())

    def until(self, query: str, number: int, *values: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.row(query, *values)[0] != number:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.row(query, *values)[0]} instead of {number}: {query}")
            time.sleep(0.05)

    def until_running(self, number: int) -> None:
        self.until("SELECT count(*) FROM sessions_app_turn WHERE status = 'running'", number)

    def until_leases_ran_out(self) -> None:
        query = "SELECT count(*) FROM sessions_app_turn WHERE lease_until > strftime('%Y-%m-%d %H:%M:%f', 'now')"
        self.until(query, 0)

    def recovery(self) -> Recovery:
        """Start a server, wait until it has taken up every turn, and kill it."""
        with self.server(self.turns) as (process, began, healthy):
            since = f"{datetime.fromtimestamp(began, UTC):{STORED}}"
            self.until(CLAIMS.replace("min(timestamp), max(timestamp), ", ""), self.turns, since)
            first, last, claims, turns = self.row(CLAIMS, since)
            time.sleep(3)  # all of them stream: the most memory
            held_now = held(process.pid, self.database)

        def seconds(stored: str) -> float:
            return datetime.fromisoformat(stored).replace(tzinfo=UTC).timestamp() - began

        return Recovery(healthy, seconds(first), seconds(last), claims, turns, held_now)


def rows(recovery: Recovery, turns: int, *, leases_ran_out: bool) -> Iterator[Row]:
    exact = recovery.claims == recovery.turns == turns
    yield "claims, turns", f"{recovery.claims}, {recovery.turns}", verdict("each once", exact)
    yield "from start to /health", f"{recovery.healthy:.2f} s", ""
    yield "from start to the first claims", f"{recovery.first:.2f} s", ""
    yield "from start to the last claim", f"{recovery.last:.2f} s", ""
    # It looks for turns just before it answers; with leases to be waited for, that is too early to begin counting.
    begin, name = (recovery.healthy, "/health") if leases_ran_out else (recovery.first, "the first claims")
    took = recovery.last - begin
    yield f"from {name} to the last claim", f"{took:.2f} s", at_most(took, TARGET_SECONDS, "s")
    yield "memory with all of them running", f"{recovery.held.megabytes:.0f} MB", ""
    yield "threads, connections", f"{recovery.held.threads}, {recovery.held.connections}", ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1_000, help="open turns")
    turns = parser.parse_args(argv).turns
    print(f"{turns} open turns; {len(CORES)} cores, SQLite")
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    # So slow that no turn ends meanwhile.
    model = [str(HERE / "mock_model.py"), "--rate", "1", "--tokens", "500"]
    try:
        with ended_after(
            python(*model, env={"PATH": os.environ["PATH"]}, core=LOAD_CORE, stdout=subprocess.PIPE)
        ) as mock:
            bench = Bench(folder, f"http://127.0.0.1:{line_of(mock)}/v1", turns)
            with bench.server(turns // 2):
                bench.until_running(turns // 2)
            bench.until_leases_ran_out()
            after = bench.recovery()
            print_table("Half running, half queued; leases ran out", rows(after, turns, leases_ran_out=True))
            at_once = bench.recovery()
            print_table("All running; started at once", rows(at_once, turns, leases_ran_out=False))
        print((folder / "server.log").read_text()[:2_000], end="")
    finally:
        shutil.rmtree(folder)
    return 0 if all(each.claims == each.turns == turns for each in (after, at_once)) else 1


if __name__ == "__main__":
    sys.exit(main())

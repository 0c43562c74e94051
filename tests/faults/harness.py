"""One fault against one installation: sessions are driven, something goes wrong, it is mended, all comes to rest, and
what is then known is checked."""

import json
import math
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psycopg
import pytest

from tests import databases
from tests.faults import talker
from tests.faults.checker import Complaint, check
from tests.faults.evidence import Evidence, Outage, gather
from tests.faults.inside import KILLED
from tests.faults.record import Record, Stuck
from tests.faults.table import Row
from tests.faults.talker import CANARY, Talker
from tests.scripted_llm import ScriptedLLM
from tests.server import KEY, Server, eventually

# `make faults` runs everything in full; otherwise a few tries of each fault, beside other tests on a busy machine: what
# is promised of times is judged in full alone.
IN_FULL = os.environ.get("FAULTS") == "full"
# A module whose faults are not of the database: in short they are tried on one.
ON_ONE_DATABASE = [] if IN_FULL else [pytest.mark.sqlite]
# How long a trial in full may go on trying; what it did not come to is missing from its tries.
MOST_SECONDS = float(os.environ.get("FAULT_SECONDS", "inf"))
LLM_KEY = "key-of-the-model-which-nobody-may-read"
DATABASE_PASSWORD = "password-of-the-database"
# A turn whose owner is dead is taken over within this.
TAKEOVER_SECONDS = 30.0
# How soon a server is to be ready again, a start of its process included; and when it counts as gone for good.
BACK_WITHIN_SECONDS = 10.0 if IN_FULL else math.inf
GONE_SECONDS = 60.0
# How many messages are said in a session before the next one is begun.
MESSAGES = 3

SETTINGS = {
    "LLM_API_KEY": LLM_KEY,
    "TURN_LEASE_SECONDS": "1",
    # No turn is to blame for deaths from outside, however many meet the same one.
    "TURN_MAX_LOSSES": "1000",
    # As in production, unlike other tests.
    "OVERLOAD_SECONDS": "1",
}


def executed(server: Server) -> list[str]:
    """The calls that the server executed itself, once for each time."""
    notes = server.database.parent / "notes"
    return [line.partition(" ")[0] for line in _lines(notes)]


def seed() -> int:
    """Of a trial: a new one each time, or the one that is to be repeated."""
    return int(os.environ.get("FAULT_SEED") or random.randrange(10**6))


class Trial:
    """What one fault is tried on, and what was seen of it."""

    def __init__(
        self,
        fault: str,
        servers: Sequence[Server],
        llm: ScriptedLLM,
        *,
        seed: int = 0,
        timeout: float = 20,
        patience: float = talker.PATIENCE,
        log: Callable[[], str] | None = None,
    ) -> None:
        self.fault = fault
        self.servers = servers
        self.llm = llm
        self.seed = seed
        self._timeout = timeout
        self._patience = patience
        self.chance = random.Random(seed)
        self.record = Record()
        self.outages: list[Outage] = []
        self._log = log or (lambda: "".join(log.read_text() for log in dict.fromkeys(s.log for s in servers)))
        self._began = time.monotonic()
        self._names = count(1)
        self._talkers: list[Talker] = []
        llm.default = talker.agent
        llm.route_to = talker.AGENT
        print(f"{fault}: FAULT_SEED={seed}")  # noqa: T201 (shown with a test that fails before it is judged)

    @property
    def server(self) -> Server:
        return self.servers[0]

    @property
    def has_time(self) -> bool:
        return time.monotonic() - self._began < MOST_SECONDS

    def talker(self) -> Talker:
        """Somebody with a session of its own."""
        name = f"{self.fault.replace(' ', '-')}-{next(self._names)}"
        made = Talker(
            name,
            [server.url for server in self.servers],
            self.record,
            random.Random(self.chance.random()),
            timeout=self._timeout,
            patience=self._patience,
        )
        self._talkers.append(made)
        return made

    def back(self, since: float, server: Server | None = None) -> None:
        """The fault ended then: from now on the server has to be well again soon."""
        asked = server or self.server
        while (took := time.monotonic() - since) < GONE_SECONDS:
            try:
                if asked.http.get("/readyz").status_code == 200:
                    self.outages.append(Outage(self.fault, took))
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        self.outages.append(Outage(self.fault, None))

    def restart(self, server: Server | None = None) -> None:
        """Start a server that is dead."""
        began = time.monotonic()
        (server or self.server).start()
        self.back(began, server)

    @contextmanager
    def conversations(self, number: int) -> Iterator[None]:
        """Meanwhile so many talk, on and on; in the end each finishes what it is at."""
        enough, over = Event(), Event()
        with ThreadPoolExecutor(number + 1) as pool:
            watching = pool.submit(self._watch, over)
            talking = [pool.submit(self._talk, enough) for _ in range(number)]
            try:
                yield
            finally:
                enough.set()
                wait(talking)
                over.set()
            for each in (*talking, watching):
                each.result()

    def some_more(self, facts: int, *, patience: float = 60) -> None:
        """Until so many more things were told to clients."""
        enough = len(self.record) + facts
        eventually(lambda: len(self.record) >= enough, seconds=patience)

    def _watch(self, over: Event) -> None:
        """Record turns that run without an owner for longer than they may."""
        running = "SELECT session_id, lease_until FROM sessions_app_turn WHERE status = 'running'"
        while not over.wait(1):
            try:
                found = databases.rows(self.server.database, running)
            except (sqlite3.OperationalError, psycopg.OperationalError):
                continue  # it is the fault
            for session_id, lease_until in found:
                if time.time() - _seconds(lease_until) > TAKEOVER_SECONDS:
                    self.record.add(Stuck(session_id=session_id, what="its turn runs without an owner"))
                    return

    def _talk(self, enough: Event) -> None:
        while not enough.is_set():
            one = self.talker()
            for number in range(MESSAGES):
                one.converse(**message(number))
                if enough.is_set():
                    return

    def settle(self) -> None:
        """Wait until no turn is left that could go on by itself, at most as long as a takeover may take."""
        ends = time.monotonic() + TAKEOVER_SECONDS
        going_on = "SELECT count(*) FROM sessions_app_turn WHERE status IN ('queued', 'running')"
        while databases.rows(self.server.database, going_on)[0][0] and time.monotonic() < ends:
            time.sleep(0.1)

    def evidence(self) -> Evidence:
        self.settle()
        return gather(
            self.record,
            url=self.server.url,
            database=self.server.database,
            log=self._log(),
            refused=self.llm.refused,
            secrets=[KEY, self.server.environment["SECRET_KEY"], LLM_KEY, DATABASE_PASSWORD, CANARY],
            outages=self.outages,
            back_within=BACK_WITHIN_SECONDS,
            executed=executed(self.server),
        )

    def judged(self, tries: int) -> "Judged":
        """The end of the trial."""
        complaints = check(self.evidence())
        for each in self._talkers:
            each.close()
        row = Row.of(
            self.fault, tries, [one.invariant for one in complaints], self.seed, time.monotonic() - self._began
        )
        return Judged(row, complaints)


@dataclass
class Judged:
    row: Row
    complaints: list[Complaint]


# Ends a trial of so many tries.
Judge = Callable[[Trial, int], None]


def _seconds(moment: datetime | str) -> float:
    """A time of the database's; SQLite's are texts in UTC."""
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment).replace(tzinfo=UTC)
    return moment.timestamp()


def passed(seconds: float) -> None:
    """So long a fault lasts."""
    until = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > until, seconds=seconds + 5)


def message(number: int) -> dict[str, Any]:
    """The first one of a session is routed, those after it ask for the agent that the first one came to."""
    asked = {"agent_type": talker.AGENT} if number else {}
    return {"content": f"message {number}, {CANARY}", **asked}


class FaultyServer(Server):
    """A server that does at its n-th point what its plan says, or that has a bug (`tests.faults.inside`)."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.plan_file = folder / "plan"
        super().__init__(folder, server="faulty", FAULT_PLAN=str(self.plan_file), **settings)
        # A password that the database does not ask for.
        self.environment["DATABASE_URL"] = with_password(self.environment["DATABASE_URL"])

    def plan(self, act: str, at: int | str) -> None:
        # In one step: the server may be reading it.
        new = self.plan_file.with_suffix(".new")
        new.write_text(f"{act} {at}")
        new.replace(self.plan_file)

    def forget_plan(self) -> None:
        self.plan_file.unlink(missing_ok=True)

    @property
    def has_crashed(self) -> bool:
        """Whether it has done so by its plan."""
        assert self.process is not None
        code = self.process.poll()
        assert code in (None, KILLED), self.log.read_text()
        return code is not None

    def points(self) -> list[str]:
        """Those that were passed, since the first plan, in all the processes."""
        return _lines(self.plan_file.with_suffix(".points"))

    def acted(self) -> list[str]:
        return _lines(self.plan_file.with_suffix(".acted"))


def with_password(url: str) -> str:
    return url.replace("postgres@", f"postgres:{DATABASE_PASSWORD}@")


@contextmanager
def faulty(folder: Path, migrated: Path, llm: ScriptedLLM, **settings: str) -> Iterator[FaultyServer]:
    """A started one on a copy of the migrated database; killed at the end."""
    tools = {"SERVER_TOOLS": "tests.tools_for_the_server", "TOOLS_FOLDER": str(folder)}
    server = FaultyServer(folder, **{"LLM_BASE_URL": llm.url, **SETTINGS, **tools, **settings})
    databases.copy(migrated, server.database)
    try:
        outcome = server.manage("migrate", "-v0")
        assert outcome.returncode == 0, outcome.stderr
        allowed = json.dumps(["read_file", "write_file", "switch_mode", talker.NOTING])
        allow = "UPDATE agents_app_agent SET allowed_tools = ? WHERE name = ?"
        databases.change(server.database, allow, allowed, talker.AGENT)
        server.start()
        yield server
    finally:
        server.http.close()
        if server.process is not None and server.process.poll() is None:
            server.kill()
        databases.drop(server.database)


@contextmanager
def second(server: FaultyServer, folder: Path) -> Iterator[FaultyServer]:
    """Another process on the same database."""
    same = ("LLM_BASE_URL", "LLM_API_KEY", "TURN_LEASE_SECONDS", "SERVER_TOOLS", "TOOLS_FOLDER")
    settings = {name: server.environment[name] for name in same}
    other = FaultyServer(folder, **settings, TURN_MAX_LOSSES="1000", DATABASE_URL=server.environment["DATABASE_URL"])
    other.database = server.database
    other.log = folder / "other.log"
    try:
        yield other
    finally:
        other.http.close()
        if other.process is not None and other.process.poll() is None:
            other.kill()


def signal_to(server: FaultyServer, which: signal.Signals) -> None:
    assert server.process is not None
    os.kill(server.process.pid, which)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []

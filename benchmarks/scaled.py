"""What a scaled installation does: web processes and workers on PostgreSQL, with Redis and without.

    .venv/bin/python benchmarks/scaled.py

Starts PostgreSQL, Redis, a model (mock_model.py), two web processes, one worker or two, and clients (load.py), each a
process of its own, and for comparison one web process that runs its turns itself. Every setting is measured several
times, in turns; prints medians, lowest and highest. Linux only: it reads /proc. Ends with status 1 when a turn failed
or a token got lost.

A second worker needs cores that two do not have, with everything else on them. `--worker-share 0.25` holds each worker
to a quarter of a core while it works off a backlog, so that the workers are the limit and not the machine: it needs
root, and the `cpu` controller of control groups, version 1.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from decisions import LOST
from load import percentile
from machine import (
    CORES,
    HERE,
    KEY,
    PATIENCE,
    ROOT,
    begin,
    cpu_seconds,
    ended_after,
    environment,
    family_cpu_seconds,
    free_port,
    line_of,
    python,
    wait_healthy,
)
from mock_model import AT_ONCE
from tables import listed, print_markdown, spreads, verdict

sys.path.insert(0, str(ROOT))
from orchestrator_site.local_services import PostgreSQL, Redis  # not installed: it lies beside

EVERYWHERE = set(CORES)
CONTROL_GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000
# One worker may be held to very little.
BACKLOG_SECONDS = 300.0
# Between two messages that come alone, at random: in step with a clock of the server they would all meet it alike.
PAUSES = (0.05, 0.25)


@dataclass(frozen=True)
class Setting:
    """Which processes there are. Without workers the only web process runs the turns."""

    name: str
    workers: int
    with_redis: bool

    @property
    def is_scaled(self) -> bool:
        return self.workers > 0


EMBEDDED = Setting("one process", 0, with_redis=False)
ALONE = Setting("one worker", 1, with_redis=True)
TWO = Setting("two workers", 2, with_redis=True)
SILENT = Setting("one worker, no Redis", 1, with_redis=False)
SETTINGS = (EMBEDDED, ALONE, TWO, SILENT)
WORKED_OFF = (ALONE, TWO)
FREE, HELD = "free", "held"
IDLE, REPLY, AT_ONE_TIME, BESIDE = "idle", "reply", "at one time", "beside"
CLAIMED = {
    "idle": IDLE,
    "a second message the moment the first is answered": REPLY,
    "all in the same moment": AT_ONE_TIME,
    "one while all others stream": BESIDE,
}
FOLLOWED_MS = {"median": 5, "p99": 50}
UNAIDED_MS = 1_000
TARGET_GAIN = 1.7
PARTS = ("the process", "workers", "web processes", "PostgreSQL", "Redis", "model", "clients")


@dataclass(frozen=True)
class Streamed:
    """Turns that were followed: what their clients saw (load.py), and the CPU seconds of each part."""

    seen: dict[str, Any]
    used: dict[str, float]
    session_ids: list[str]
    meanwhile: list[str]

    def lost(self, name: str) -> int:
        return int(self.seen[name] + self.seen["followers"][name])

    @property
    def cores(self) -> float:
        """So many were in use."""
        return float(sum(self.used.values()) / self.seen["seconds"])

    @property
    def problems(self) -> list[str]:
        return [*self.seen["problems"], *self.seen["followers"]["problems"]]


@dataclass(frozen=True)
class WorkedOff:
    """How fast a backlog was worked off: turns in a second, and the CPU seconds of each part."""

    per_second: float
    used: dict[str, float]
    seconds: float

    @property
    def cores(self) -> float:
        return sum(self.used.values()) / self.seconds


@dataclass(frozen=True)
class Measured:
    """What one round in one setting gave."""

    single: Streamed
    many: Streamed
    claimed_ms: dict[str, list[float]]
    backlogs: dict[str, WorkedOff]
    problems: list[str]


# --- The installation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Services:
    """What all settings share: the servers, and the model."""

    folder: Path
    postgresql: PostgreSQL
    redis: Redis
    model: "subprocess.Popen[str]"
    model_port: int


class Installation:
    def __init__(self, setting: Setting, services: Services, folder: Path) -> None:
        self.setting = setting
        self.services = services
        self.folder = folder
        self.database = f"bench_{uuid.uuid4().hex}"
        self.ports = [free_port() for _ in range(2 if setting.is_scaled else 1)]
        self.webs: list[subprocess.Popen[str]] = []
        self.workers: list[subprocess.Popen[str]] = []
        settings = {"DATABASE_URL": services.postgresql.url(self.database)}
        if setting.is_scaled:
            settings["TURN_RUNNER"] = "procrastinate"
        if setting.with_redis:
            settings["REDIS_URL"] = services.redis.url
        self.env = environment(folder, LLM_BASE_URL=f"http://127.0.0.1:{services.model_port}/v1", **settings)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    @contextmanager
    def started(self) -> Iterator[None]:
        administer(self.services, f"CREATE DATABASE {self.database}")
        migrate = [sys.executable, "manage.py", "migrate", "-v0"]
        subprocess.run(migrate, cwd=ROOT, env=self.env, check=True, timeout=PATIENCE)
        with ExitStack() as end:
            end.callback(administer, self.services, f"DROP DATABASE {self.database} WITH (FORCE)")
            for port in self.ports:
                web = self._process(f"web{port}", "-m", "orchestrator_site.serve", PORT=str(port))
                self.webs.append(end.enter_context(ended_after(web)))
            for number in range(self.setting.workers):
                worker = self._process(f"worker{number}", "manage.py", "procrastinate", "worker")
                self.workers.append(end.enter_context(ended_after(worker)))
            for web, port in zip(self.webs, self.ports, strict=True):
                wait_healthy(web, port)
            url = self.services.postgresql.url(self.database)
            self.connection = end.enter_context(psycopg.connect(url, autocommit=True))
            if self.workers:
                count = "SELECT count(*) FROM procrastinate_workers"
                wait_until(lambda: self.value(count) == len(self.workers))
            yield

    def _process(self, name: str, *command: str, **settings: str) -> "subprocess.Popen[str]":
        with (self.folder / f"{name}.log").open("w") as log:
            output = {"stdout": subprocess.DEVNULL, "stderr": log}
            return python(*command, env={**self.env, **settings}, core=EVERYWHERE, **output)

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return self.connection.execute(query.encode(), values).fetchall()

    def value(self, query: str, *values: object) -> Any:
        return self.rows(query, *values)[0][0]

    def now(self) -> float:
        """The time of the database."""
        return float(self.value("SELECT extract(epoch FROM clock_timestamp())"))

    def cpu(self) -> dict[str, float]:
        """Seconds used so far by each part."""
        assert self.services.postgresql.process and self.services.redis.process
        runners = self.workers or self.webs
        return {
            "workers" if self.workers else "the process": sum(cpu_seconds(each.pid) for each in runners),
            **({"web processes": sum(cpu_seconds(each.pid) for each in self.webs)} if self.workers else {}),
            "PostgreSQL": family_cpu_seconds(self.services.postgresql.process.pid),
            **({"Redis": cpu_seconds(self.services.redis.process.pid)} if self.setting.with_redis else {}),
            "model": cpu_seconds(self.services.model.pid),
        }

    # --- turns ---

    def posts(self, count: int, *, messages: int = 1, to_the_end: bool = True) -> list[str]:
        """So many sessions, one after the other with pauses; a second message comes when the first is answered."""
        session_ids = []
        for _ in range(count):
            time.sleep(random.uniform(*PAUSES))
            session_ids.append(f"bench-{uuid.uuid4().hex}")
            for _ in range(messages):
                self.post(session_ids[-1], self.ports[0], to_the_end=to_the_end)
        return session_ids

    def post(self, session_id: str, port: int, *, to_the_end: bool) -> None:
        """Have a message accepted, which makes the session on first use; the answer is read, or left."""
        message = {"type": "user_message", "content": f"Please answer {AT_ONCE}.", "agent_type": "coder"}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        headers = {"X-Internal-Auth": KEY, "Content-Type": "application/json"}
        body = json.dumps({"session_id": session_id, "message": message})
        connection.request("POST", "/agent/message/stream", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"a message was answered with {response.status}")
        if to_the_end:
            response.read()
        connection.close()

    def wait_finished(self, seconds: float = PATIENCE) -> None:
        unfinished = "SELECT count(*) FROM sessions_app_turn WHERE finished_at IS NULL"
        wait_until(lambda: self.value(unfinished) == 0, seconds)

    def claimed_ms(self, session_ids: Sequence[str], position: int = 1) -> list[float]:
        """From when a turn of each session was stored until it was claimed, by the clock of the database."""
        self.wait_finished()
        query = """
            SELECT extract(epoch FROM started_at - created_at) FROM sessions_app_turn
            WHERE session_id = ANY(%s) AND position = %s
        """
        return [1_000 * float(seconds) for (seconds,) in self.rows(query, list(session_ids), position)]


def administer(services: Services, statement: str) -> None:
    with psycopg.connect(services.postgresql.url("postgres"), autocommit=True) as connection:
        connection.execute(statement.encode())


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("waited in vain")
        time.sleep(0.1)


@contextmanager
def held_to(share: float, processes: Sequence["subprocess.Popen[str]"]) -> Iterator[None]:
    """Each of these processes gets no more than this share of a core."""
    groups = [CONTROL_GROUPS / f"countersign-bench-{process.pid}" for process in processes]
    for group, process in zip(groups, processes, strict=True):
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(PERIOD_US * share)))
        (group / "cgroup.procs").write_text(str(process.pid))
    try:
        yield
    finally:
        for group, process in zip(groups, processes, strict=True):
            (CONTROL_GROUPS / "cgroup.procs").write_text(str(process.pid))
            group.rmdir()


# --- Measuring -------------------------------------------------------------------------------------------------------


def measure(setting: Setting, services: Services, arguments: argparse.Namespace) -> Measured:
    folder = services.folder / uuid.uuid4().hex
    folder.mkdir()
    installation = Installation(setting, services, folder)
    with installation.started():
        # What the first request costs once is not the question.
        installation.posts(5)
        answered = installation.posts(arguments.singles, messages=2)
        claimed = {IDLE: installation.claimed_ms(answered), REPLY: installation.claimed_ms(answered, position=2)}
        single = stream(installation, 1, arguments.tokens)
        many = stream(installation, arguments.turns, arguments.tokens)
        claimed[AT_ONE_TIME] = installation.claimed_ms(many.session_ids)
        # The turns that come while others stream are no part of what those cost.
        loaded = stream(installation, arguments.turns, arguments.tokens, meanwhile=arguments.singles)
        claimed[BESIDE] = installation.claimed_ms(loaded.meanwhile)
        # Stopped for a while, as they are now, workers say that the layer was away.
        logged = installation.log
        backlogs = {}
        if setting in WORKED_OFF:
            backlogs[FREE] = work_off(installation, arguments.backlog)
            if arguments.worker_share:
                with held_to(arguments.worker_share, installation.workers):
                    backlogs[HELD] = work_off(installation, arguments.backlog)
    problems = [*single.problems, *many.problems, *loaded.problems]
    if logged:
        problems.append(f"a process logged {logged[:1_000]}")
    return Measured(single, many, claimed, backlogs, [f"{setting.name}: {problem}" for problem in problems])


def stream(installation: Installation, count: int, tokens: int, *, meanwhile: int = 0) -> Streamed:
    """So many turns at once, each with a follower at the other web process, and others while all of them stream."""
    ports = ["--port", str(installation.ports[0]), "--follow", str(installation.ports[-1])]
    command = [str(HERE / "load.py"), *ports, "--turns", str(count), "--tokens", str(tokens)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ended_after(python(*command, env=installation.env, core=EVERYWHERE, **pipes)) as load:
        line_of(load)  # its sessions exist, and are followed
        began, before = installation.now(), installation.cpu()
        begin(load)
        line_of(load)  # every stream has its first token
        others = installation.posts(meanwhile, to_the_end=False)
        line_of(load)  # all have ended
        seen = json.loads(line_of(load))
        after = installation.cpu()
    query = "SELECT session_id FROM sessions_app_turn WHERE created_at > to_timestamp(%s)"
    session_ids = [session_id for (session_id,) in installation.rows(query, began)]
    used = {**{part: after[part] - before[part] for part in after}, "clients": seen["load_cpu_seconds"]}
    return Streamed(seen, used, session_ids, others)


def work_off(installation: Installation, backlog: int) -> WorkedOff:
    """Turns that nobody follows, whose model answers without delay, accepted while the workers are stopped."""
    for worker in installation.workers:
        worker.send_signal(signal.SIGSTOP)
    for number in range(backlog):
        installation.post(f"backlog-{uuid.uuid4().hex}", installation.ports[number % 2], to_the_end=False)
    began, before, moment = time.monotonic(), installation.cpu(), installation.now()
    for worker in installation.workers:
        worker.send_signal(signal.SIGCONT)
    installation.wait_finished(BACKLOG_SECONDS)
    ended, after = time.monotonic(), installation.cpu()
    last = installation.value("SELECT extract(epoch FROM max(finished_at)) FROM sessions_app_turn")
    used = {part: after[part] - before[part] for part in after}
    return WorkedOff(backlog / (float(last) - moment), used, ended - began)


# --- Report ----------------------------------------------------------------------------------------------------------

Rounds = dict[Setting, list[Measured]]
Row = tuple[str, ...]


def stream_rows(rounds: Rounds, turns: int) -> Iterator[Row]:
    each = rounds.values()
    lost = [[sum(one.single.lost(name) + one.many.lost(name) for one in ones) for name in LOST] for ones in each]
    yield (
        "turns failed; tokens lost, repeated, out of order",
        *map(listed, lost),
        verdict("none", not any(map(any, lost))),
    )
    for title, run in (("one stream", "single"), (f"{turns} streams", "many")):
        for share in ("median", "p99"):
            ages = [[getattr(one, run).seen["followers"]["age_ms"][share] for one in ones] for ones in each]
            name = f"age of a token, {title}, at a follower of the other web process: {share}"
            yield name, *spreads(ages, "ms", 1), targets(share, ages[1], ages[2], ages[3])
        for share in ("median", "p99"):
            ages = [[getattr(one, run).seen["age_ms"][share] for one in ones] for ones in each]
            yield f"the same at the client that asked: {share}", *spreads(ages, "ms", 1), ""
    for title, when in CLAIMED.items():
        for share, of in (("median", 0.5), ("p99", 0.99)):
            times = [[percentile(one.claimed_ms[when], of) for one in ones] for ones in each]
            yield f"from stored to claimed, {title}: {share}", *spreads(times, "ms", 0), ""
    first = [[one.many.seen["first_token_ms"]["median"] for one in ones] for ones in each]
    yield f"{turns} turns: time to first token, median", *spreads(first, "ms", 0), ""
    seconds = [[one.many.seen["seconds"] for one in ones] for ones in each]
    yield f"{turns} turns: until all are done", *spreads(seconds, "s", 2), ""
    yield f"{turns} turns: cores in use", *spreads([[one.many.cores for one in ones] for ones in each], "", 2), ""
    for part in PARTS:
        costs = [[1_000 * one.many.used[part] / turns for one in ones if part in one.many.used] for ones in each]
        yield f"{turns} turns: CPU per turn, {part}", *spreads(costs, "ms", 1), ""


def targets(share: str, *ages: Sequence[float]) -> str:
    """Of followers in another process: with Redis, with one worker and two, and without."""
    *with_redis, without = map(median, ages)
    met = max(with_redis) <= FOLLOWED_MS[share] and without <= UNAIDED_MS
    return verdict(f"at most {FOLLOWED_MS[share]} ms; {UNAIDED_MS} ms without Redis", met)


def backlog_rows(rounds: Rounds, arguments: argparse.Namespace) -> Iterator[Row]:
    titles = {FREE: "as fast as they can"}
    if arguments.worker_share:
        titles[HELD] = f"each worker held to {arguments.worker_share:g} of a core"
    for how, title in titles.items():
        each = [[one.backlogs[how] for one in rounds[setting]] for setting in WORKED_OFF]
        speeds = [[one.per_second for one in ones] for ones in each]
        gain = median(speeds[1]) / median(speeds[0])
        target = verdict(f"at least {TARGET_GAIN:g} times", gain >= TARGET_GAIN)
        yield f"{title}: turns/s", *spreads(speeds, "", 1), f"{gain:.2f}; {target}"
        yield f"{title}: cores in use", *spreads([[one.cores for one in ones] for ones in each], "", 2), ""
        for part in each[0][0].used:
            costs = [[1_000 * one.used[part] / arguments.backlog for one in ones] for ones in each]
            yield f"{title}: CPU per turn, {part}", *spreads(costs, "ms", 1), ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each setting")
    parser.add_argument("--turns", type=int, default=100, help="turns at once")
    parser.add_argument("--rate", type=float, default=50, help="tokens per second and turn")
    parser.add_argument("--tokens", type=int, default=100, help="tokens per turn")
    parser.add_argument("--singles", type=int, default=20, help="sessions that come one after the other")
    parser.add_argument("--backlog", type=int, default=300, help="turns that the workers work off")
    parser.add_argument("--worker-share", type=float, help="of a core, for each worker, while they do so once more")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    folder.chmod(0o755)  # PostgreSQL may run as another user
    try:
        return run(folder, arguments)
    finally:
        shutil.rmtree(folder)


def run(folder: Path, arguments: argparse.Namespace) -> int:
    rounds: Rounds = {setting: [] for setting in SETTINGS}
    turns, tokens, rate = arguments.turns, arguments.tokens, arguments.rate
    print(f"{turns} turns at once, {tokens} tokens each at {rate:g} tokens/s; {len(CORES)} cores")
    print(f"medians of {arguments.rounds} rounds (lowest to highest)\n")
    with ExitStack() as end:
        services = started(folder, arguments, end)
        for number in range(arguments.rounds):
            for setting in SETTINGS if number % 2 == 0 else reversed(SETTINGS):
                rounds[setting].append(measure(setting, services, arguments))
    print_markdown([("", *[setting.name for setting in SETTINGS], "target"), *stream_rows(rounds, turns)])
    print(f"\n{arguments.backlog} turns that wait, worked off; the model answers without delay\n")
    print_markdown([("", *[setting.name for setting in WORKED_OFF], "two by one"), *backlog_rows(rounds, arguments)])
    measured = [one for each in rounds.values() for one in each]
    problems = [problem for one in measured for problem in one.problems]
    for problem in problems[:10]:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


def started(folder: Path, arguments: argparse.Namespace, end: ExitStack) -> Services:
    postgresql, redis = PostgreSQL(folder / "postgresql"), Redis(folder / "redis")
    for service in (postgresql, redis):
        service.start()
        end.callback(service.stop)
    command = [str(HERE / "mock_model.py"), "--rate", str(arguments.rate), "--tokens", str(arguments.tokens)]
    model = python(*command, env={"PATH": os.environ["PATH"]}, core=EVERYWHERE, stdout=subprocess.PIPE)
    end.enter_context(ended_after(model))
    return Services(folder, postgresql, redis, model, int(line_of(model)))


if __name__ == "__main__":
    sys.exit(main())

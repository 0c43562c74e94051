"""How fast turns stream, beside a floor that does the least that a Python server can do (floor.py).

    .venv/bin/python benchmarks/speed.py

Starts the floor, ours on SQLite and ours on PostgreSQL, one after the other in every round, each on one core; the
model (mock_model.py), the clients (load.py) and PostgreSQL's processes share the other. Prints Markdown tables:
medians, lowest to highest, and what ours is to the floor of the same round. Linux only: it reads /proc. Ends with
status 1 when a turn failed or a token got lost; a missed target is only shown.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from decisions import print_markdown
from scaled import family_cpu_seconds
from turns import (
    HERE,
    KEY,
    LOAD_CORE,
    PATIENCE,
    ROOT,
    SERVER_CORE,
    TICKS,
    begin,
    check_seconds,
    ended_after,
    environment,
    free_port,
    line_of,
    open_files,
    python,
    wait_healthy,
)

sys.path.insert(0, str(ROOT))
from orchestrator_site.local_services import PostgreSQL  # not installed: it lies beside

NEAR_LIMIT = 0.95
MODEL_LIBRARIES = ("aiohttp", "openai", "pydantic_ai")
SINGLES = 20
LOOKS_SECONDS = 0.5
DATABASE = "bench"

Figures = dict[str, float]


# --- What is measured ------------------------------------------------------------------------------------------------


class System:
    """A server that answers our request. `bare`: it has no sessions, keeps nothing and sends the tokens alone."""

    def __init__(self, name: str, *, bare: bool = False) -> None:
        self.name = name
        self.bare = bare

    def prepare(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = model

    def command(self, port: int) -> list[str]:
        return [str(HERE / "floor.py"), "--port", str(port), "--model", self.model]

    def env(self, port: int) -> dict[str, str]:
        return {"PATH": os.environ["PATH"]}

    def connections(self, pid: int) -> int:
        """That it has to its database."""
        return 0

    def database_cpu(self) -> float:
        """Seconds used by a database that is not part of the server."""
        return 0.0


class Ours(System):
    """As production starts it."""

    def __init__(self, name: str, streams: int) -> None:
        super().__init__(name)
        self.streams = streams

    def prepare(self, folder: Path, model: str) -> None:
        super().prepare(folder, model)
        migrate = [sys.executable, "manage.py", "migrate", "-v0"]
        subprocess.run(migrate, cwd=ROOT, env=self.env(0), check=True, timeout=PATIENCE)

    @property
    def database(self) -> Path:
        return self.folder / "bench.sqlite3"

    def command(self, port: int) -> list[str]:
        return ["-m", "orchestrator_site.web"]

    def env(self, port: int) -> dict[str, str]:
        # By default it takes 1,000 turns at a time.
        more = (
            {"TURNS_AT_ONCE": str(self.streams), "STREAMS_AT_ONCE": str(self.streams)} if self.streams > 1_000 else {}
        )
        return environment(self.folder, PORT=str(port or 8000), LLM_BASE_URL=self.model, **more)

    def connections(self, pid: int) -> int:
        return list(open_files(pid)).count(str(self.database))


class OnPostgreSQL(Ours):
    def __init__(self, name: str, streams: int, server: PostgreSQL) -> None:
        super().__init__(name, streams)
        self.server = server

    def prepare(self, folder: Path, model: str) -> None:
        self.server.start()
        self.administer(f"CREATE DATABASE {DATABASE}")
        super().prepare(folder, model)

    def env(self, port: int) -> dict[str, str]:
        return {**super().env(port), "DATABASE_URL": self.server.url(DATABASE)}

    def connections(self, pid: int) -> int:
        rows = self.administer("SELECT datname FROM pg_stat_activity")
        return rows.count((DATABASE,))

    def database_cpu(self) -> float:
        assert self.server.process
        return family_cpu_seconds(self.server.process.pid)

    def administer(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.server.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """What was used until a moment: by the server, by its database, and how busy the cores were."""

    at: float
    server: float
    database: float
    server_core: float
    load_core: float

    def share(self, since: "Used", name: str) -> float:
        return float((getattr(self, name) - getattr(since, name)) / (self.at - since.at))


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


@dataclass
class Bench:
    """A running server of a system."""

    system: System
    process: "subprocess.Popen[str]"
    port: int
    problems: list[str] = field(default_factory=list)

    def used(self) -> Used:
        return Used(
            time.monotonic(),
            family_cpu_seconds(self.process.pid),
            self.system.database_cpu(),
            *(busy_seconds(next(iter(core))) for core in (SERVER_CORE, LOAD_CORE)),
        )

    @contextmanager
    def load(self, turns: int, tokens: int, rate: str, *more: str) -> "Iterator[subprocess.Popen[str]]":
        """Clients that wait to `begin`; their sessions exist."""
        arguments = {"--port": self.port, "--turns": turns, "--tokens": tokens, "--rate": rate}
        flags = [str(word) for pair in arguments.items() for word in pair]
        command = [str(HERE / "load.py"), *flags, *more, *(["--bare"] if self.system.bare else [])]
        env = {"PATH": os.environ["PATH"], "INTERNAL_API_KEY": KEY}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with ended_after(python(*command, env=env, core=LOAD_CORE, **pipes)) as load:
            line_of(load)
            yield load

    def seen(self, load: "subprocess.Popen[str]", what: str) -> dict[str, Any]:
        """What the clients saw; what went wrong is kept."""
        seen: dict[str, Any] = json.loads(line_of(load))
        wrong = {name: seen[name] for name in ("failed", "lost", "repeated", "disordered") if seen[name]}
        if wrong:
            self.problems.append(f"{self.system.name}, {what}: {wrong} {seen['problems']}")
        return seen

    def full_speed(self, streams: int, turns: int, tokens: int, seconds: float) -> Figures:
        """Streams with one turn after the other, and a model that sends as fast as it is read."""
        with self.load(turns, tokens, "no delay", "--streams", str(streams), "--seconds", str(seconds)) as load:
            begin(load)
            line_of(load)  # it has settled
            before = self.used()
            line_of(load)  # over
            after = self.used()
            seen = self.seen(load, f"{tokens} tokens a turn")
        return {
            "rate": seen["between"] / seen["between_seconds"],
            **costs(before, after, seen["between"]),
            "first": seen["first_token_ms"]["median"],
        }

    def single(self) -> Figures:
        with self.load(SINGLES, 5, "50", "--streams", "1") as load:
            begin(load)
            line_of(load)
            line_of(load)
            seen = self.seen(load, "one stream")
        return {"first": seen["first_token_ms"]["median"], "first_p95": seen["first_token_ms"]["p95"]}

    def crowd(self, streams: int, tokens: int, rate: str) -> Figures:
        """Streams that start together."""
        with self.load(streams, tokens, rate) as load:
            before = self.used()
            begin(load)
            line_of(load)  # all stream
            streaming = self.used()
            seen = self.seen(load, f"{streams} streams")
            after = self.used()
        first, age = seen["first_token_ms"], seen["steady_age_ms"]
        return {
            **costs(streaming, after, seen["steady_tokens"]),
            "cpu_whole": (after.server - before.server) / seen["tokens"] * 1e6,
            "first": first["median"],
            "first_p95": first["p95"],
            "age": age["median"],
            "age_p99": age["p99"],
        }

    def many(self, streams: int, tokens: int) -> Figures:
        """Streams that are open and quiet: a token a second."""
        with self.load(streams, tokens, "1") as load:
            idle = private_kib(self.process.pid)
            begin(load)
            line_of(load)  # all stream
            memory, connections, ends = 0, 0, time.monotonic() + tokens / 3
            before = self.used()
            while time.monotonic() < ends:
                memory = max(memory, private_kib(self.process.pid))
                connections = max(connections, self.system.connections(self.process.pid))
                time.sleep(LOOKS_SECONDS)
            after = self.used()
            seen = self.seen(load, f"{streams} streams")
        return {
            "errors": sum(seen[name] for name in ("failed", "lost", "repeated", "disordered")),
            "memory": (memory - idle) / streams,
            "connections": connections,
            "server_core": after.share(before, "server_core"),
            "load_core": after.share(before, "load_core"),
            "first": seen["first_token_ms"]["median"],
            "age_p99": seen["steady_age_ms"]["p99"],
        }


def costs(before: Used, after: Used, tokens: int) -> Figures:
    return {
        "cpu": (after.server - before.server) / tokens * 1e6,
        "database_cpu": (after.database - before.database) / tokens * 1e6,
        "server_core": after.share(before, "server_core"),
        "load_core": after.share(before, "load_core"),
    }


@contextmanager
def running(system: System, problems: list[str]) -> Iterator[Bench]:
    port = free_port()
    log = system.folder / "server.log"
    with (
        log.open("w") as output,
        ended_after(
            python(
                *system.command(port), env=system.env(port), core=SERVER_CORE, stdout=subprocess.DEVNULL, stderr=output
            )
        ) as process,
    ):
        wait_healthy(process, port)
        bench = Bench(system, process, port, problems)
        # What the first requests cost once is not the question.
        bench.crowd(4, 20, "50")
        yield bench
    if text := log.read_text():
        problems.append(f"{system.name} logged {text[:2_000]}")


# --- The run ---------------------------------------------------------------------------------------------------------

Results = dict[tuple[str, str], list[Figures]]


def run(systems: Sequence[System], arguments: argparse.Namespace, problems: list[str]) -> Results:
    """Every figure of every round, by system and by what was measured."""
    results: Results = defaultdict(list)
    for number in range(arguments.rounds):
        # Who comes first finds another machine than who comes last.
        for system in systems if number % 2 == 0 else systems[::-1]:
            print(f"round {number + 1} of {arguments.rounds}: {system.name}", file=sys.stderr)
            with running(system, problems) as bench:
                results[system.name, "single"].append(bench.single())
                results[system.name, "200"].append(bench.full_speed(16, arguments.turns, 200, arguments.seconds))
                turns = arguments.turns // 4
                results[system.name, "1000"].append(bench.full_speed(16, turns, 1_000, arguments.seconds))
                results[system.name, "crowd"].append(bench.crowd(200, 200, "50"))
    for system in systems:
        print(f"{arguments.streams} streams: {system.name}", file=sys.stderr)
        with running(system, problems) as bench:
            results[system.name, "many"].append(bench.many(arguments.streams, arguments.quiet))
    return results


# --- Report ----------------------------------------------------------------------------------------------------------


FLOOR, SQLITE, POSTGRESQL = "floor", "SQLite", "PostgreSQL"


def shown(values: Sequence[float]) -> str:
    middle, low, high = (number(value) for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def number(value: float) -> str:
    if abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


# number, what, measured, figure, how, at least or at most, for each of ours
TARGETS: tuple[tuple[str, str, str, str, str, str, dict[str, float]], ...] = (
    ("1", "tokens/s, 16 streams, 200 tokens a turn", "200", "rate", "ratio", ">=", {SQLITE: 0.45, POSTGRESQL: 0.40}),
    ("1", "the same, 1,000 tokens a turn", "1000", "rate", "ratio", ">=", {}),
    ("2", "CPU per token, 200 streams: steady, µs", "crowd", "cpu", "ratio", "<=", {SQLITE: 1.5, POSTGRESQL: 1.5}),
    ("2", "the same, with starts and ends, µs", "crowd", "cpu_whole", "ratio", "<=", {SQLITE: 1.5, POSTGRESQL: 1.5}),
    ("3", "first token, one stream, ms", "single", "first", "more", "<=", {SQLITE: 10, POSTGRESQL: 10}),
    ("3", "first token, 200 streams: median, ms", "crowd", "first", "ratio", "<=", {SQLITE: 3, POSTGRESQL: 3}),
    ("3", "the same, p95, ms", "crowd", "first_p95", "ratio", "<=", {}),
    ("4", "open streams: errors", "many", "errors", "alone", "<=", {SQLITE: 0, POSTGRESQL: 0}),
    ("4", "open streams: KiB each", "many", "memory", "ratio", "<=", {SQLITE: 2, POSTGRESQL: 2}),
    ("4", "open streams: database connections", "many", "connections", "alone", "<=", {SQLITE: 4, POSTGRESQL: 4}),
)


def target_rows(results: Results) -> Iterator[tuple[str, ...]]:
    yield "#", "what", "on", "ours", "floor", "compared", "target", ""
    for mark, what, measured, figure, how, sign, targets in TARGETS:
        for name in (SQLITE, POSTGRESQL):
            if not results[name, measured]:
                continue
            ours = [figures[figure] for figures in results[name, measured]]
            floor = [figures[figure] for figures in results[FLOOR, measured]]
            against = [compared(how, *pair) for pair in zip(ours, floor, strict=True)]
            middle = median(against)
            verdict = ""
            if name in targets:
                met = middle >= targets[name] if sign == ">=" else middle <= targets[name]
                verdict = "met" if met else "MISSED"
            target = f"{sign} {PREFIXES[how].format(number(targets[name]))}" if name in targets else ""
            yield (
                mark,
                what,
                name,
                shown(ours),
                shown(floor) if how != "alone" else "",
                PREFIXES[how].format(shown(against)) if how != "alone" else "",
                target,
                verdict,
            )


PREFIXES = {"ratio": "{} times", "more": "+ {}", "alone": "{}"}


def compared(how: str, ours: float, floor: float) -> float:
    if how == "ratio":
        return ours / floor if floor else float("nan")
    return ours - floor if how == "more" else ours


FIGURES = (
    ("CPU per token at full speed, 200 a turn, µs", "200", "cpu"),
    ("the same, 1,000 a turn, µs", "1000", "cpu"),
    ("PostgreSQL's own CPU per token, 200 a turn, µs", "200", "database_cpu"),
    ("first token at full speed, 200 a turn: median, ms", "200", "first"),
    ("age of a token, 200 streams at 50 tokens/s: median, ms", "crowd", "age"),
    ("the same, p99, ms", "crowd", "age_p99"),
    ("first token, one stream: p95, ms", "single", "first_p95"),
    ("open streams: first token, median, ms", "many", "first"),
    ("open streams: age of a token, p99, ms", "many", "age_p99"),
    *(
        (f"share of {whose} core, {what}", measured, f"{core}_core")
        for measured, what in (("200", "200 a turn"), ("1000", "1,000 a turn"), ("crowd", "200 streams"))
        for core, whose in (("server", "the server's"), ("load", "the load's"))
    ),
)


def figure_rows(results: Results, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    yield "", *names
    for what, measured, figure in FIGURES:
        cells = [shown([figures[figure] for figures in results[name, measured]]) for name in names]
        yield what, *cells


def limits(results: Results) -> Iterator[str]:
    for (name, measured), rounds in results.items():
        share = median(figures.get("load_core", 0) for figures in rounds)
        if share > NEAR_LIMIT:
            yield f"LIMIT: {share:.0%} of the load's core was in use ({name}, {measured}): the server may do more."


def about() -> str:
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{now}; {model.partition(':')[2].strip()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"Linux {platform.release()}; `{' '.join(['python', *sys.argv])}`"
    )


def check_rows(folder: Path) -> Iterator[tuple[str, ...]]:
    seconds = check_seconds(folder)
    yield "#", "what", "", "target", ""
    yield "10", "manage.py check, median of 5, s", number(seconds), "<= 1.5", "met" if seconds <= 1.5 else "MISSED"
    imported = model_libraries(folder)
    yield (
        "10",
        "model libraries that it imports",
        ", ".join(imported) or "none",
        "none",
        "MISSED" if imported else "met",
    )


def model_libraries(folder: Path) -> list[str]:
    command = [sys.executable, "-X", "importtime", "manage.py", "check"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(folder), check=True, capture_output=True, text=True, timeout=PATIENCE
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return [name for name in MODEL_LIBRARIES if name in modules]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="how long each run at full speed counts")
    parser.add_argument("--turns", type=int, default=480, help="of 200 tokens, at most, in each run at full speed")
    parser.add_argument("--streams", type=int, default=1_000, help="that are open at once, at one token a second")
    parser.add_argument("--quiet", type=int, default=12, help="tokens of each of those")
    parser.add_argument("--no-postgresql", action="store_true")
    arguments = parser.parse_args(argv)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    # PostgreSQL's user has to get to its data.
    folder.chmod(0o755)
    try:
        return measure(folder, arguments)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, arguments: argparse.Namespace) -> int:
    postgresql = PostgreSQL(folder / "postgresql")
    systems: list[System] = [System(FLOOR, bare=True), Ours(SQLITE, arguments.streams)]
    if not arguments.no_postgresql:
        systems.append(OnPostgreSQL(POSTGRESQL, arguments.streams, postgresql))
    problems: list[str] = []
    mock = python(str(HERE / "mock_model.py"), env={"PATH": os.environ["PATH"]}, core=LOAD_CORE, stdout=subprocess.PIPE)
    with ExitStack() as end:
        end.callback(postgresql.stop)
        model = f"http://127.0.0.1:{line_of(end.enter_context(ended_after(mock)))}/v1"
        for system in systems:
            (folder / system.name).mkdir()
            system.prepare(folder / system.name, model)
        results = run(systems, arguments, problems)
    print(about(), end="\n\n")
    print_markdown(list(target_rows(results)))
    print()
    print_markdown(list(figure_rows(results, [system.name for system in systems])))
    print()
    print_markdown(list(check_rows(folder)))
    for line in [*limits(results), *problems]:
        print(line)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

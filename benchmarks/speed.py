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
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from machine import (
    CORES,
    LOAD_CORE,
    PATIENCE,
    ROOT,
    SERVER_CORE,
    begin,
    busy_seconds,
    cpu_seconds,
    ended_after,
    environment,
    family_cpu_seconds,
    free_port,
    line_of,
    private_kib,
    python,
    wait_healthy,
)
from peers import Aegra, Agno, Peer
from systems import POOL, Bench, Floor, Ours, System, base_url, mock_model, running
from tables import Cells, print_markdown

sys.path.insert(0, str(ROOT))
from orchestrator_site.local_services import PostgreSQL  # not installed: it lies beside

# Above this share of their core, what feeds and reads the server is the limit, and not the server.
LIMIT = 0.9
# So much of a core is used by this process and the kernel. With more of it, the figures say little.
DISTURBED = 0.1
# One turn of theirs takes some seconds.
PEER_TIMES = 4
MODEL_LIBRARIES = ("aiohttp", "openai", "pydantic_ai")
FAULTS = ("failed", "lost", "repeated", "disordered")
SINGLES = 20
LOOK_SECONDS = 0.5
# Between the starts of many streams, in seconds: less than half of what the slowest can begin.
APART = 1 / 50
LOOKED_AT = 8.0
FLOOR, SQLITE, POSTGRESQL = "floor", "SQLite", "PostgreSQL"

Figures = dict[str, float]


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """Seconds that were used until a moment: by the server, by model and clients, by PostgreSQL, and of the cores."""

    at: float
    server: float
    load: float
    database: float
    server_core: float
    load_core: float

    def since(self, before: "Used", name: str) -> float:
        """The share of a core."""
        return float((getattr(self, name) - getattr(before, name)) / (self.at - before.at))


@dataclass(frozen=True)
class Meter:
    """Measures one running server. What went wrong is kept."""

    bench: Bench
    problems: list[str] = field(default_factory=list)

    def used(self, load: "subprocess.Popen[str]") -> Used:
        return Used(
            time.monotonic(),
            family_cpu_seconds(self.bench.server.pid),
            cpu_seconds(self.bench.mock.pid) + cpu_seconds(load.pid),
            self.bench.system.database_cpu(),
            *(busy_seconds(next(iter(core))) for core in (SERVER_CORE, LOAD_CORE)),
        )

    @contextmanager
    def load(self, turns: int, tokens: int, rate: str, *more: str) -> Iterator["subprocess.Popen[str]"]:
        with ended_after(self.bench.load(turns, tokens, "--rate", rate, *more)) as load:
            line_of(load)  # its sessions exist
            yield load

    def seen(self, load: "subprocess.Popen[str]", what: str) -> dict[str, Any]:
        """What the clients saw."""
        seen: dict[str, Any] = json.loads(line_of(load))
        if wrong := {name: seen[name] for name in FAULTS if seen[name]}:
            self.problems.append(f"{self.bench.system.name}, {what}: {wrong} {seen['problems']}")
        return seen

    def full_speed(self, streams: int, turns: int, tokens: int, seconds: float) -> Figures:
        """Streams with one turn after the other, and a model that sends as fast as it is read."""
        with self.load(turns, tokens, "no delay", "--streams", str(streams), "--seconds", str(seconds)) as load:
            begin(load)
            line_of(load)  # it has settled
            before = self.used(load)
            line_of(load)  # over
            after = self.used(load)
            seen = self.seen(load, f"{tokens} tokens a turn")
        return {
            "rate": seen["tokens_between"] / seen["seconds_between"],
            **costs(before, after, seen["tokens_between"]),
            "first": seen["first_token_ms"]["median"],
        }

    def single(self) -> Figures:
        with self.load(SINGLES, 5, "50", "--streams", "1") as load:
            begin(load)
            line_of(load)
            line_of(load)
            seen = self.seen(load, "one stream")
        return {"first": seen["first_token_ms"]["median"], "first_p95": seen["first_token_ms"]["p95"]}

    def crowd(self, streams: int, tokens: int, rate: str, *more: str) -> Figures:
        """Streams that start together."""
        with self.load(streams, tokens, rate, *more) as load:
            before = self.used(load)
            begin(load)
            line_of(load)  # all stream
            streaming = self.used(load)
            line_of(load)  # over
            after = self.used(load)
            seen = self.seen(load, f"{streams} streams")
        first, age = seen["first_token_ms"], seen["steady_age_ms"]
        return {
            **costs(streaming, after, seen["steady_tokens"]),
            "cpu_whole": (after.server - before.server) / seen["tokens"] * 1e6,
            "seconds": seen["seconds"],
            **{f"first_{name}": first[name] for name in ("median", "p95", "max")},
            **{f"age_{name}": age[name] for name in ("median", "p95", "p99", "max")},
        }

    def quiet(self, streams: int, tokens: int) -> Figures:
        """Streams that are all open, with a token a second each; how many can begin at once is another question."""
        with self.load(streams, tokens, "1", "--apart", str(APART)) as load:
            idle, idle_kib = self.bench.held(), private_kib(self.bench.server.pid)
            begin(load)
            line_of(load)  # all stream
            before, most, most_kib, connections = self.used(load), idle, idle_kib, 0
            ends = before.at + LOOKED_AT
            while time.monotonic() < ends:
                most, most_kib = most.or_more(self.bench.held()), max(most_kib, private_kib(self.bench.server.pid))
                connections = max(connections, self.bench.system.connections(self.bench.server.pid))
                time.sleep(LOOK_SECONDS)
            after = self.used(load)
            line_of(load)  # over
            seen = self.seen(load, f"{streams} streams")
        if not seen["all_at_once"]:
            self.problems.append(
                f"{self.bench.system.name}: not all {streams} were open at once: it takes more --quiet"
            )
        return {
            "errors": sum(seen[name] for name in FAULTS),
            "kib": (most_kib - idle_kib) / streams,
            "connections": connections,
            "threads": most.threads,
            "threads_more": most.threads - idle.threads,
            "first": seen["first_token_ms"]["median"],
            "age_p99": seen["steady_age_ms"]["p99"],
            **cores(before, after),
        }


def costs(before: Used, after: Used, tokens: int) -> Figures:
    """Not a number when no token came between: the starts took longer than the answers."""
    return {
        "cpu": (after.server - before.server) / tokens * 1e6 if tokens else nan,
        "database_cpu": (after.database - before.database) / tokens * 1e6 if tokens else nan,
        **cores(before, after),
    }


def cores(before: Used, after: Used) -> Figures:
    """The shares of their cores: of the server, of what feeds and reads it, and of anything else on either core."""
    server, load = after.since(before, "server"), after.since(before, "load") + after.since(before, "database")
    others = max(after.since(before, "server_core") - server, after.since(before, "load_core") - load)
    return {"server": server, "load": load, "others": others}


@contextmanager
def metered(system: System, mock: "subprocess.Popen[str]", problems: list[str]) -> Iterator[Meter]:
    """The system, started anew. What ours and the floor log is a problem."""
    with running(system, mock) as bench:
        meter = Meter(bench, problems)
        # What the first requests cost once is not the question.
        meter.crowd(4, 20, "50")
        yield meter
    text = system.log.read_text()
    if text and not isinstance(system, Peer):
        problems.append(f"{system.name} logged {text[:2_000]}")


# --- The run ---------------------------------------------------------------------------------------------------------

# By system and by what was measured, the figures of each round.
Results = dict[tuple[str, str], list[Figures]]


def run(
    systems: Sequence[System], mock: "subprocess.Popen[str]", arguments: argparse.Namespace, problems: list[str]
) -> Results:
    results: Results = defaultdict(list)
    for number in range(arguments.rounds):
        # Who comes first finds another machine than who comes last.
        for system in systems if number % 2 == 0 else systems[::-1]:
            print(f"round {number + 1} of {arguments.rounds}: {system.name}", file=sys.stderr)
            with metered(system, mock, problems) as meter:
                results[system.name, "single"].append(meter.single())
                if isinstance(system, Peer):
                    figures = meter.full_speed(16, arguments.turns, 200, arguments.seconds * PEER_TIMES)
                    results[system.name, "full 200"].append(figures)
                    continue
                # The floor's sessions cost nothing.
                most = arguments.turns * (10 if isinstance(system, Floor) else 1)
                for tokens, turns in ((200, most), (1_000, most // 3)):
                    figures = meter.full_speed(16, turns, tokens, arguments.seconds)
                    results[system.name, f"full {tokens}"].append(figures)
                results[system.name, "crowd"].append(meter.crowd(200, 200, "50"))
    for system in systems:
        if isinstance(system, Peer):
            continue
        print(f"{arguments.streams} streams: {system.name}", file=sys.stderr)
        with metered(system, mock, problems) as meter:
            results[system.name, "quiet"].append(meter.quiet(arguments.streams, arguments.quiet))
            if isinstance(system, Ours):
                results[system.name, "routed"].append(meter.crowd(100, 200, "50", "--routed"))
    return results


# --- Report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a figure of ours has to be: against that of the floor (`times`, `more`), or alone."""

    number: str
    what: str
    measured: str
    figure: str
    how: str
    bounds: dict[str, float] = field(default_factory=dict)
    at_least: bool = False

    def compared(self, ours: float, floor: float) -> float:
        if self.how == "times":
            return ours / floor if floor else nan
        return ours - floor if self.how == "more" else ours

    def said(self, value: str) -> str:
        return {"times": f"{value} times", "more": f"+ {value}", "alone": value}[self.how]

    def cells(self, name: str, ours: list[float], floor: list[float]) -> Cells:
        against = [self.compared(*pair) for pair in zip(ours, floor, strict=True)]
        beside = (shown(floor), self.said(shown(against))) if self.how != "alone" else ("", "")
        return self.number, self.what, name, shown(ours), *beside, *self.verdict(name, median(against))

    def verdict(self, name: str, reached: float) -> tuple[str, str]:
        if name not in self.bounds:
            return "", ""
        bound = self.bounds[name]
        met = reached >= bound if self.at_least else reached <= bound
        return f"{'>=' if self.at_least else '<='} {self.said(f'{bound:g}')}", "met" if met else "MISSED"


def both(bound: float) -> dict[str, float]:
    return {SQLITE: bound, POSTGRESQL: bound}


RATES = {SQLITE: 0.45, POSTGRESQL: 0.40}
TARGETS = (
    Target("1", "tokens/s, 16 streams, 200 tokens a turn", "full 200", "rate", "times", RATES, at_least=True),
    Target("1", "the same, 1,000 tokens a turn", "full 1000", "rate", "times"),
    Target("2", "CPU per token, 200 streams of 50 tokens/s, since all stream, µs", "crowd", "cpu", "times", both(1.5)),
    Target("2", "the same with their starts, µs", "crowd", "cpu_whole", "times", both(1.5)),
    Target("3", "first token, one stream: median, ms", "single", "first", "more", both(10)),
    Target("3", "first token, 200 streams that start together: median, ms", "crowd", "first_median", "times", both(3)),
    Target("3", "the same, p95, ms", "crowd", "first_p95", "times"),
    Target("4", "many open streams: errors", "quiet", "errors", "alone", both(0)),
    Target("4", "many open streams: KiB each", "quiet", "kib", "times", both(2)),
    Target("4", "many open streams: database connections", "quiet", "connections", "alone", both(4)),
    Target("4", "many open streams: threads that they added", "quiet", "threads_more", "alone", both(POOL)),
)
FIGURES = (
    ("CPU per token at full speed, 200 tokens a turn, µs", "full 200", "cpu"),
    ("the same, 1,000 tokens a turn, µs", "full 1000", "cpu"),
    ("PostgreSQL's CPU per token, 200 tokens a turn, µs", "full 200", "database_cpu"),
    ("first token at full speed, 200 tokens a turn: median, ms", "full 200", "first"),
    ("first token, one stream: p95, ms", "single", "first_p95"),
    ("first token, 200 streams: the last, ms", "crowd", "first_max"),
    ("age of a token, 200 streams, since all stream: median, ms", "crowd", "age_median"),
    ("the same, p99, ms", "crowd", "age_p99"),
    ("200 streams, from the first request to the last byte, s", "crowd", "seconds"),
    *((f"100 routed streams: {said}", "routed", figure) for said, figure in (
        ("first token, median, ms", "first_median"),
        ("CPU per token with their starts, µs", "cpu_whole"),
        ("age of a token, median, ms", "age_median"),
        ("the same, p99, ms", "age_p99"),
    )),
    ("many open streams: first token, median, ms", "quiet", "first"),
    ("many open streams: age of a token, p99, ms", "quiet", "age_p99"),
    ("many open streams: threads", "quiet", "threads"),
    *((f"share of its core, {measured}: {whose}", measured, figure)
      for measured in ("full 200", "full 1000", "crowd", "quiet")
      for figure, whose in (("server", "the server"), ("load", "model, clients, PostgreSQL"))),
)  # fmt: skip


def target_rows(results: Results) -> Iterator[Cells]:
    yield "#", "what", "on", "ours", "floor", "ours to the floor", "target", ""
    for target in TARGETS:
        floor = [figures[target.figure] for figures in results[FLOOR, target.measured]]
        for name in (SQLITE, POSTGRESQL):
            ours = [figures[target.figure] for figures in results[name, target.measured]]
            yield target.cells(name, ours, floor)


def figure_rows(results: Results, systems: Sequence[System], rows: Sequence[tuple[str, str, str]]) -> Iterator[Cells]:
    names = [system.name for system in systems]
    yield "", *names
    for what, measured, figure in rows:
        yield what, *(shown([figures[figure] for figures in results[name, measured]]) for name in names)


PEER_FIGURES = (
    ("tokens/s, 16 streams, 200 tokens a turn", "full 200", "rate"),
    ("CPU per token meanwhile, µs", "full 200", "cpu"),
    ("PostgreSQL's CPU per token, µs", "full 200", "database_cpu"),
    ("first token, one stream: median, ms", "single", "first"),
)


def shown(values: Sequence[float]) -> str:
    """The median, and the lowest to the highest."""
    if not values:
        return ""
    middle, low, high = (rounded(value) for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def limits(results: Results) -> Iterator[str]:
    """Where something else than the server was the limit: model, clients and PostgreSQL, or what else ran."""
    for (name, measured), rounds in results.items():
        load = max((figures.get("load", 0.0) for figures in rounds), default=0.0)
        others = max((figures.get("others", 0.0) for figures in rounds), default=0.0)
        if load > LIMIT:
            yield f"LIMIT: model, clients and PostgreSQL used {load:.0%} of their core ({name}, {measured})."
        if others > DISTURBED:
            yield f"DISTURBED: something else used {others:.0%} of a core ({name}, {measured})."


def about() -> str:
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {model.partition(':')[2].strip()}, {len(CORES)} cores; "
        f"Linux {platform.release()}, Python {platform.python_version()}; `{' '.join(['python', *sys.argv])}`"
    )


# --- Starting --------------------------------------------------------------------------------------------------------


def start_rows(folder: Path) -> Iterator[Cells]:
    yield "#", "what", "", "target", ""
    check = check_seconds(folder)
    yield "10", "manage.py check, median of 5, s", rounded(check), "<= 1.5", "met" if check <= 1.5 else "MISSED"
    imported = model_libraries(folder)
    yield (
        "10",
        "model libraries that it imports",
        ", ".join(imported) or "none",
        "none",
        "MISSED" if imported else "met",
    )
    first, second = start_seconds(folder)
    yield "", "`make run` until it answers: first, second start, s", f"{rounded(first)}, {rounded(second)}", "", ""


def check_seconds(folder: Path) -> float:
    """`manage.py check`, median of five."""

    def check() -> float:
        began = time.monotonic()
        checked(folder)
        return time.monotonic() - began

    return median(check() for _ in range(5))


def model_libraries(folder: Path) -> list[str]:
    modules = {line.rpartition("|")[2].strip() for line in checked(folder, "-X", "importtime").splitlines()}
    return [name for name in MODEL_LIBRARIES if name in modules]


def checked(folder: Path, *options: str) -> str:
    """What `manage.py check` writes on its standard error."""
    command = [sys.executable, *options, "manage.py", "check"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(folder), check=True, capture_output=True, text=True, timeout=PATIENCE
    )
    return done.stderr


def start_seconds(folder: Path) -> tuple[float, float]:
    """What `make run` runs, until it answers: on an empty folder, and for the second time."""
    port = free_port()
    env = environment(folder, PORT=str(port), DATABASE_URL=f"sqlite:///{folder / 'start.sqlite3'}")

    def start() -> float:
        began = time.monotonic()
        command = ["-m", "orchestrator_site.serve"]
        with ended_after(python(*command, env=env, core=set(CORES), stdout=subprocess.DEVNULL)) as server:
            wait_healthy(server, port)
            return time.monotonic() - began

    return start(), start()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help="how long each run at full speed counts")
    parser.add_argument("--turns", type=int, default=800, help="of 200 tokens, at most, in each of those")
    parser.add_argument("--streams", type=int, default=1_000, help="that are open at once, with a token a second")
    parser.add_argument("--quiet", type=int, default=40, help="tokens of each of those")
    parser.add_argument("--peers", action="store_true", help="Agno and Aegra too: `make bench-peers` installs them")
    arguments = parser.parse_args(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # of this process, and of those that it starts
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    folder.chmod(0o755)  # PostgreSQL may run as another user
    try:
        return measure(folder, arguments)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, arguments: argparse.Namespace) -> int:
    postgresql = PostgreSQL(folder / "postgresql")
    systems: list[System] = [
        Floor(FLOOR, folder / "floor"),
        Ours(SQLITE, folder / "sqlite", streams=arguments.streams),
        Ours(POSTGRESQL, folder / "ours", postgresql, streams=arguments.streams),
    ]
    if arguments.peers:
        systems += [Agno("Agno", folder / "agno"), Aegra("Aegra", folder / "aegra", postgresql)]
    problems: list[str] = []
    with ExitStack() as end:
        postgresql.start()
        end.callback(postgresql.stop)
        mock = end.enter_context(mock_model())
        model = base_url(mock)
        for system in systems:
            system.prepare(model)
        results = run(systems, mock, arguments, problems)
    os.sched_setaffinity(0, set(CORES))
    print(about(), end="\n\n")
    print_markdown(list(target_rows(results)))
    print()
    print_markdown(list(start_rows(folder)))
    print()
    print_markdown(list(figure_rows(results, [system for system in systems if not isinstance(system, Peer)], FIGURES)))
    if arguments.peers:
        print()
        print_markdown(list(figure_rows(results, systems, PEER_FIGURES)))
    for line in ["", *limits(results), *(f"PROBLEM: {problem}" for problem in problems)]:
        print(line)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

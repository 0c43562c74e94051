"""How long a decision takes to reach those who follow its session, and what becomes of 100 that are made at once.

    .venv/bin/python benchmarks/decisions.py

With nothing else to do for the server, and while 100 turns stream. The server has a core to itself; the model
(mock_model.py), the clients of the turns (load.py) and this process, with all who decide and follow (deciders.py),
share another. Ends with status 1 when anything failed or got lost, or one approval had not exactly one winner.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from deciders import VERDICTS, Clients, Decided, Race, WaitingCall
from load import percentile
from machine import KEY, LOAD_CORE, begin, cpu_seconds, ended_after, line_of
from systems import NEAR_LIMIT, Bench, ours_running
from tables import at_most, listed, percent, print_markdown
from tables import verdict as met

TARGET_READ_MS = 100
TARGET_RACE_SECONDS = 2.0
STATUS = {"approve": "approved", "edit": "edited", "reject": "rejected"}
# One decision in so many comes in a stream, the others over REST. No multiple of three: all verdicts come on both ways.
EVERY_IN_STREAM = 5
# Between two decisions, at random: in step with the server's clocks they would all meet them in the same moment.
PAUSES = (0.01, 0.05)
# Of the seconds that the turns stream, how many may pass until the last decision and the last round begin.
DECIDING, RACING = 0.5, 0.7
LONGEST = 52.0
MOST_CALLS = 400
# What load.py counts of the turns that did not come as they should.
LOST = ("failed", "lost", "repeated", "disordered")


@dataclass(frozen=True)
class Shares:
    """How much of their cores was used."""

    server: float
    model: float
    clients: float


class Meter:
    """From when it is made; `load`: the clients of the turns, if there are any."""

    def __init__(self, bench: Bench, load: "subprocess.Popen[str] | None") -> None:
        self.pids = [bench.server.pid, bench.mock.pid, *([load.pid] if load else [])]
        self.before = self._now()

    def _now(self) -> list[float]:
        return [time.monotonic(), time.process_time(), *map(cpu_seconds, self.pids)]

    def shares(self) -> Shares:
        seconds, own, server, model, *load = [now - then for now, then in zip(self._now(), self.before, strict=True)]
        return Shares(server / seconds, model / seconds, (own + sum(load)) / seconds)


@dataclass(frozen=True)
class Setting:
    """What was measured in one setting, and the calls with the verdicts that were accepted."""

    decided: list[Decided]
    deciding: Shares
    races: list[Race]
    racing: Shares
    outcomes: list[tuple[WaitingCall, str]]
    ended_at: int

    def read_ms(self) -> list[float]:
        return [one.read_ms for one in self.decided if one.read_ms is not None]

    def answered_ms(self, *, in_stream: bool) -> list[float]:
        own = [one.answered_ms for one in self.decided if one.in_stream == in_stream]
        return [time for time in own if time is not None]

    def problems(self) -> list[str]:
        found = [*[one.problem for one in self.decided], *[race.problem for race in self.races]]
        found += [f"a round had {len(race.winners)} winners" for race in self.races if len(race.winners) != 1]
        found += [] if self.decided and self.races else ["there was no time for a decision or a round"]
        return [problem for problem in found if problem]


@dataclass(frozen=True)
class Work:
    """The calls that wait to be decided on in one setting."""

    clients: Clients
    singles: list[WaitingCall]
    contested: list[WaitingCall]

    async def measure(
        self, bench: Bench, deciders: int, seconds: float, load: "subprocess.Popen[str] | None" = None
    ) -> Setting:
        began = time.monotonic()
        decided: list[Decided] = []
        races: list[Race] = []
        outcomes: list[tuple[WaitingCall, str]] = []
        meter = Meter(bench, load)
        for number, call in enumerate(self.singles):
            await asyncio.sleep(random.uniform(*PAUSES))
            if time.monotonic() > began + seconds * DECIDING:
                break
            verdict, in_stream = VERDICTS[number % len(VERDICTS)], number % EVERY_IN_STREAM == 0
            decided.append(await self.clients.decide(call, verdict, in_stream=in_stream))
            outcomes.append((call, verdict))
        deciding, meter = meter.shares(), Meter(bench, load)
        for number, call in enumerate(self.contested):
            if time.monotonic() > began + seconds * RACING:
                break
            verdicts = [VERDICTS[(number + decider) % len(VERDICTS)] for decider in range(deciders)]
            races.append(await self.clients.race(call, verdicts))
            outcomes += [(call, winner) for winner in races[-1].winners]
        return Setting(decided, deciding, races, meter.shares(), outcomes, time.monotonic_ns())


@dataclass(frozen=True)
class Result:
    alone: Setting
    loaded: Setting
    turns: dict[str, Any]
    problems: list[str]


async def measure(bench: Bench, arguments: argparse.Namespace) -> Result:
    clients, seconds = Clients(bench.port, KEY), arguments.tokens / arguments.rate

    async def work(decisions: int, rounds: int) -> Work:
        return Work(clients, await clients.waiting_calls(decisions), await clients.waiting_calls(rounds))

    # What the first of each kind costs once is not the question.
    await (await work(2 * EVERY_IN_STREAM, 1)).measure(bench, arguments.deciders, seconds)
    first, second = [await work(arguments.decisions, arguments.rounds) for _ in range(2)]
    alone = await first.measure(bench, arguments.deciders, seconds)
    with ended_after(bench.load(arguments.turns, arguments.tokens)) as load:
        await asyncio.to_thread(line_of, load)  # its sessions exist
        begin(load)
        await asyncio.to_thread(line_of, load)  # every stream has its first token
        loaded = await second.measure(bench, arguments.deciders, seconds, load)
        await asyncio.to_thread(line_of, load)  # all have ended
        turns = json.loads(await asyncio.to_thread(line_of, load))
    problems = [*alone.problems(), *loaded.problems(), *turns["problems"]]
    problems += [f"{turns[name]} {name} in the turns" for name in LOST if turns[name]]
    problems += await lasting_problems(clients, [*alone.outcomes, *loaded.outcomes])
    if turns["all_until"] < loaded.ended_at:
        late = (loaded.ended_at - turns["all_until"]) / 1e9
        problems.append(f"in the last {late:.1f} s not all turns were running: more --tokens are needed")
    return Result(alone, loaded, turns, problems)


async def lasting_problems(clients: Clients, outcomes: list[tuple[WaitingCall, str]]) -> list[str]:
    """Where the server's list, or what a follower has read by now, is not what was answered."""
    approvals = (await clients.read("/approvals?status=all&limit=1000"))["approvals"]
    stored = {approval["call_id"]: approval["status"] for approval in approvals}
    problems = [problem for call, verdict in outcomes if (problem := call.problem_after(verdict))]
    for call, verdict in outcomes:
        call.follower.transport.close()
        if stored.get(call.call_id) != STATUS[verdict]:
            problems.append(f"{verdict} was accepted, stored is {stored.get(call.call_id)}")
    return problems


# --- Report ------------------------------------------------------------------------------------------------------

Row = tuple[str, ...]
NOTHING = float("nan")
SPREAD = "min, median, p95, p99, max"


def rows(result: Result, deciders: int) -> Iterator[Row]:
    both = result.alone, result.loaded
    yield "**one decision after the other**: how many; failed or lost", *map(counted, both), ""
    read = [one.read_ms() for one in both]
    slower = max(middle(times) for times in read)
    target = at_most(slower, TARGET_READ_MS, "ms (median)")
    yield f"until a follower has read it: {SPREAD}", *map(spread, read), target
    for way, in_stream in (("over REST", False), ("in a stream", True)):
        answered = [one.answered_ms(in_stream=in_stream) for one in both]
        yield f"until the request {way} is answered: {SPREAD}", *map(spread, answered), ""
    yield "server's share of its core", *[percent(one.deciding.server) for one in both], ""
    yield f"**{deciders} decisions on one approval at once**; rounds", *[str(len(one.races)) for one in both], ""
    seconds = [[race.seconds for race in one.races] for one in both]
    shown = [f"{middle(times):.2f}, {max(times, default=NOTHING):.2f} s" for times in seconds]
    target = at_most(max((*seconds[0], *seconds[1]), default=NOTHING), TARGET_RACE_SECONDS, "s")
    yield "until all are answered: median, worst", *shown, target
    for name, due, counts in (
        ("winners of a round", 1, [[len(race.winners) for race in one.races] for one in both]),
        ("409 that say who and when", deciders - 1, [[race.informed for race in one.races] for one in both]),
    ):
        yield name, *map(listed, counts), met(str(due), {*counts[0], *counts[1]} == {due})
    yield "server's share of its core", *[percent(one.racing.server) for one in both], ""
    yield "model, clients: share of theirs, at most", *map(others, both), ""
    lost = [result.turns[name] for name in LOST]
    yield "turns failed; tokens lost, repeated, out of order", "", listed(lost), met("0", not any(lost))
    age = result.turns["steady_age_ms"]
    yield (
        "age of a token at its client: median, p95, p99, max",
        "",
        f"{listed(f'{ms:.1f}' for ms in age.values())} ms",
        "",
    )


def counted(setting: Setting) -> str:
    return f"{len(setting.decided)}; {sum(1 for one in setting.decided if one.problem)}"


def middle(values: Sequence[float]) -> float:
    return median(values) if values else NOTHING


def spread(times: list[float]) -> str:
    shares = [percentile(times, share) for share in (0.95, 0.99, 1.0)]
    return f"{listed(f'{time:.1f}' for time in (min(times, default=NOTHING), middle(times), *shares))} ms"


def others(setting: Setting) -> str:
    model = max(setting.deciding.model, setting.racing.model)
    clients = max(setting.deciding.clients, setting.racing.clients)
    return f"{percent(model)}, {percent(clients)}{' NEAR THEIR LIMIT' if model + clients > NEAR_LIMIT else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=60, help="one after the other, in each setting")
    parser.add_argument("--deciders", type=int, default=100, help="on one approval at once")
    parser.add_argument("--rounds", type=int, default=5, help="of them, in each setting")
    parser.add_argument("--turns", type=int, default=100, help="that stream meanwhile")
    parser.add_argument("--rate", type=float, default=50, help="tokens per second and turn")
    parser.add_argument("--tokens", type=int, default=750, help="tokens per turn: how long they stream")
    arguments = parser.parse_args(argv)
    if min(arguments.decisions, arguments.deciders, arguments.rounds, arguments.turns) < 1:
        parser.error("all of them have to be at least 1")
    if arguments.decisions + arguments.rounds > MOST_CALLS:
        parser.error(f"at most {MOST_CALLS} decisions and rounds")
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    try:
        return run(folder, arguments)
    finally:
        shutil.rmtree(folder)


def run(folder: Path, arguments: argparse.Namespace) -> int:
    with ours_running(folder, arguments.rate, arguments.tokens) as bench:
        try:
            result = uvloop.run(asyncio.wait_for(measure(bench, arguments), LONGEST))
        except TimeoutError:
            print(f"PROBLEM: not ready after {LONGEST:g} s")
            return 1
    streaming = f"{arguments.turns} turns, {arguments.rate:g} tokens/s each"
    print_markdown([("", "nothing else runs", streaming, "target"), *rows(result, arguments.deciders)])
    log = (folder / "server.log").read_text()
    problems = [*result.problems, *([f"the server logged {log}"] if log else [])]
    for problem in problems[:10]:
        print(f"PROBLEM: {problem[:1_000]}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""What stored turns cost those that come later: a session of 10,000 messages, and a database of a million turns.

    .venv/bin/python benchmarks/growth.py

Measures one web process on a database of 1,000 stored turns and one on a database of 1,000,000 (--turns; they take 5 GB
and some minutes to make), by turns, each round with processes of its own: turns, each in a new session; messages that
come alone, to an empty session and to one of 10,000 messages; and what people and clients list. Prints medians. The
server has a core to itself; the model and this process, with the clients, share another. SQLite. Linux only: it reads
/proc. Ends with status 1 when a turn failed or a page did not come; a missed target of speed is only shown.
"""

import argparse
import asyncio
import http.cookiejar
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import uvloop
from machine import KEY, LOAD_CORE, PATIENCE, ROOT, environment, held
from overload import Bench, Client, Round, serving
from stored import empty_sessions_sqlite, fill_sqlite
from tables import at_most, ms, print_table, verdict

FEW = 1_000
PER_SESSION = 20
LONG = 10_000
# So many turns have so many messages: every tenth says a thing more, and has the result of a call.
TURNS_OF_LONG = LONG * 10 // 22
TARGET_LONG_MS = 20
TARGET_SHARE = 0.1
CLIENTS = 8
SESSIONS = 10_000
Row = tuple[str, str, str]
LISTS = (
    "/sessions", "/sessions?active_only=false&limit=1000", "/sessions/stored-1/history",
    "/sessions/stored-1?include_messages=true", "/sessions/stored-1/open-calls", "/approvals?status=all", "/approvals",
    "/events/audit-log", "/events/audit-log?session_id=stored-1", "/events/metrics/session/stored-1", "/events/stats",
    "/events/metrics", "/events/metrics/sessions",
)  # fmt: skip
PAGES = (
    "/admin/", "/admin/sessions_app/session/", "/admin/sessions_app/turn/", "/admin/sessions_app/toolcall/",
    "/admin/agents_app/approvalrequest/", "/admin/agents_app/pendingapproval/", 
    "/admin/messages_app/message/", "/admin/events_app/event/", "/admin/events_app/modelcall/",
    "/admin/events_app/auditentry/",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """One look at one database."""

    file_megabytes: float
    run: Round
    megabytes: float
    alone: list[float]
    in_long: list[float]
    lists: dict[str, float]

    @property
    def cpu_per_turn(self) -> float:
        return self.run.server_cpu / len(self.run.accepted) * 1000

    @property
    def turns_per_second(self) -> float:
        return len(self.run.accepted) / self.run.seconds


async def one(bench: Bench, session_id: str) -> float:
    client = Client(session_id)
    client.asked_at = time.monotonic()
    await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", bench.port)
    async with asyncio.timeout(PATIENCE):
        await client.ended.wait()
    if not client.is_whole:
        raise RuntimeError(bytes(client.received[-300:]))
    return client.first_ms


async def alone(bench: Bench, times: int) -> tuple[list[float], list[float]]:
    """First tokens of messages that come one after the other, to an empty session and to a long one in turns."""
    empty, long = [], []
    for _ in range(times):
        empty.append(await one(bench, f"idle-{next(bench.numbers)}"))
        long.append(await one(bench, "long-1"))
    return empty[2:], long[2:]


def logged_in(port: int, password: str) -> urllib.request.OpenerDirector:
    jar = http.cookiejar.CookieJar()
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    page = f"http://127.0.0.1:{port}/admin/login/"
    form = browser.open(page, timeout=PATIENCE).read().decode()
    found = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', form)
    assert found is not None
    fields = {"csrfmiddlewaretoken": found[1], "username": "admin", "password": password, "next": "/admin/"}
    browser.open(urllib.request.Request(page, urllib.parse.urlencode(fields).encode(), {"Referer": page}))
    return browser


def lists(port: int, password: str) -> dict[str, float]:
    """The median of three times, in ms."""
    browser = logged_in(port, password)
    seconds = {}
    for path in (*LISTS, *PAGES):
        asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"X-Internal-Auth": KEY})
        times = []
        for _ in range(3):
            began = time.monotonic()
            with browser.open(asked, timeout=PATIENCE) as answer:
                if answer.url != asked.full_url:
                    raise RuntimeError(f"{path} leads to {answer.url}")
                answer.read()
            times.append((time.monotonic() - began) * 1000)
        seconds[path] = median(times)
    return seconds


def look(folder: Path, arguments: argparse.Namespace, numbers: "itertools.count[int]") -> Seen:
    database = folder / "bench.sqlite3"
    with serving(folder, arguments.tokens, 1_000, OVERLOAD_SECONDS="3600", STREAM_KEEP_HOURS="10000") as bench:
        bench.numbers = numbers
        empty, long = uvloop.run(alone(bench, arguments.times))
        uvloop.run(bench.closed(CLIENTS, 2))  # what the first turns cost once is not the question
        run = uvloop.run(bench.closed(CLIENTS, arguments.seconds))
        megabytes = held(bench.pid, database).megabytes
        listed = lists(bench.port, environment(folder)["DJANGO_SUPERUSER_PASSWORD"])
        size = database.stat().st_size / 1e6
    log = (folder / "server.log").read_text()
    if "Traceback" in log:
        print(log[:2_000])
    return Seen(size, run, megabytes, empty, long, listed)


def rows(few: list[Seen], many: list[Seen]) -> Iterator[Row]:
    yield "database file", f"{few[0].file_megabytes:.0f} MB, {many[0].file_megabytes:.0f} MB", ""
    for name, looks in (("few", few), ("many", many)):
        empty = median(each for seen in looks for each in seen.alone)
        long = median(each for seen in looks for each in seen.in_long)
        target = at_most(long - empty, TARGET_LONG_MS, "ms more")
        yield f"first token, {name}: empty, 10,000 messages", f"{ms(empty)}, {ms(long)}", target
    for name, of in (
        ("turns/s", lambda seen: seen.turns_per_second),
        ("server CPU per turn, ms", lambda seen: seen.cpu_per_turn),
        ("server memory, MB", lambda seen: seen.megabytes),
    ):
        one, other = [of(seen) for seen in few], [of(seen) for seen in many]
        change = median(other) / median(one) - 1
        shown = ", ".join(f"{median(each):.1f} ({min(each):.1f}-{max(each):.1f})" for each in (one, other))
        yield name, shown, verdict(f"{change:+.0%}, at most 10 %", abs(change) <= TARGET_SHARE)
    yield "turns that failed", str(sum(len(seen.run.faults) for seen in [*few, *many])), ""
    for path in few[0].lists:
        yield path, ", ".join(ms(median(seen.lists[path] for seen in looks)) for looks in (few, many)), ""


def prepare(folder: Path, turns: int) -> None:
    env, database = environment(folder), folder / "bench.sqlite3"
    for command in (
        ["migrate", "-v0"],
        ["createsuperuser", "-v0", "--noinput", "--username", "admin", "--email", "admin@example.com"],
    ):
        subprocess.run([sys.executable, "manage.py", *command], cwd=ROOT, env=env, check=True, timeout=PATIENCE)
    fill_sqlite(database, FEW, PER_SESSION)
    fill_sqlite(database, TURNS_OF_LONG, TURNS_OF_LONG, name="long")
    empty_sessions_sqlite(database, SESSIONS, name="idle")
    if turns > FEW:
        fill_sqlite(database, turns - FEW, PER_SESSION, name="old")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=50, help="per turn")
    parser.add_argument("--seconds", type=float, default=8, help="of turns, in each round")
    parser.add_argument("--times", type=int, default=12, help="messages that come alone, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, LOAD_CORE)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    few, many = folder / "few", folder / "many"
    seen: dict[Path, list[Seen]] = {few: [], many: []}
    try:
        for each, turns in ((few, FEW), (many, arguments.turns)):
            each.mkdir()
            prepare(each, turns)
        numbers = {few: itertools.count(1), many: itertools.count(1)}
        for _ in range(arguments.rounds):
            for each in (few, many):
                seen[each].append(look(each, arguments, numbers[each]))
    finally:
        shutil.rmtree(folder)
    title = f"{FEW} and {arguments.turns} stored turns; {CLIENTS} clients, turns of {arguments.tokens} tokens; SQLite"
    print_table(title, rows(seen[few], seen[many]))
    faults = [fault for looks in seen.values() for one in looks for fault in one.run.faults]
    for fault in faults[:5]:
        print(repr(fault))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""F22: all streams are cut at the same moment, and all of their readers come back."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable

import httpx

from tests.databases import ON_POSTGRESQL
from tests.faults.harness import IN_FULL, ON_ONE_DATABASE, FaultyServer, Judge, Trial, seed
from tests.faults.record import Said
from tests.faults.talker import AGENT
from tests.scaled import connections
from tests.scripted_llm import ScriptedLLM, say
from tests.server import AUTH, BRIEF, parse_frames

pytestmark = ON_ONE_DATABASE

READERS = 500 if IN_FULL else 40
SESSIONS = 50 if IN_FULL else 10
ALL_BACK_SECONDS = 30.0
HEALTHY_WITHIN = 1.0
# What browsers wait when nobody has told them how long.
RETRY_SECONDS = 3.0
POOL = 12


def test_all_readers_of_a_killed_server_come_back(server: FaultyServer, llm: ScriptedLLM, judge: Judge) -> None:
    trial = Trial("F22", [server], llm, seed=seed())
    llm.default = say("Here again.")
    for number in range(SESSIONS):
        said(trial, f"herd-{number}", "hello")

    slowest, took = asyncio.run(Herd(trial).cut_and_back())

    judge(trial, READERS)
    if IN_FULL:
        assert took < ALL_BACK_SECONDS
        assert slowest < HEALTHY_WITHIN


def said(trial: Trial, session_id: str, content: str) -> None:
    frames = trial.server.say(session_id, content, agent_type=AGENT)
    trial.record.add(Said(session_id=session_id, content=content))
    trial.record.saw(session_id, frames)


class Herd:
    """Readers, some of each session, who come back when they are cut."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._connected: Counter[int] = Counter()  # by reader
        self._heard: set[int] = set()
        self._changed = asyncio.Event()

    async def cut_and_back(self) -> tuple[float, float]:
        """How long the slowest health check took meanwhile, and how long it was until all had come back."""
        limits = httpx.Limits(max_connections=READERS + 10, keepalive_expiry=2)
        server = self._trial.server
        async with httpx.AsyncClient(base_url=server.url, headers=AUTH, timeout=60, limits=limits) as http:
            readers = [asyncio.create_task(self._read(http, number)) for number in range(READERS)]
            await self._until(lambda: len(self._connected) == READERS)
            server.kill()
            await asyncio.to_thread(self._trial.restart)
            began = time.monotonic()
            checking = asyncio.create_task(self._check_health())
            await self._until(lambda: all(times >= 2 for times in self._connected.values()))
            took = time.monotonic() - began
            checking.cancel()
            self._heard.clear()
            for number in range(SESSIONS):
                await asyncio.to_thread(said, self._trial, f"herd-{number}", "anybody?")
            await self._until(lambda: len(self._heard) == READERS)
            if ON_POSTGRESQL:
                assert connections(server.database) <= POOL
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        return self._slowest, took

    async def _read(self, http: httpx.AsyncClient, number: int) -> None:
        session_id, position, chance = f"herd-{number % SESSIONS}", 0, random.Random(number)
        while True:
            headers = {"Last-Event-ID": str(position)} if position else {}
            try:
                async with http.stream("GET", f"/sessions/{session_id}/stream", headers=headers) as answer:
                    assert answer.status_code == 200
                    self._connected[number] += 1
                    self._changed.set()
                    opened, lines = self._trial.record.open(session_id, position), []
                    async for line in answer.aiter_lines():
                        lines.append(line)
                        if line == "":
                            for frame in parse_frames(iter(lines)):
                                self._trial.record.see(opened, frame)
                                position = frame.seq
                                self._heard.add(number)
                                self._changed.set()
                            lines = []
            except httpx.TransportError:
                pass
            await asyncio.sleep(chance.uniform(0, RETRY_SECONDS))

    async def _check_health(self) -> None:
        self._slowest = 0.0
        async with httpx.AsyncClient(base_url=self._trial.server.url, timeout=30, limits=BRIEF) as http:
            while True:
                asked_at = time.monotonic()
                assert (await http.get("/health")).status_code == 200
                self._slowest = max(self._slowest, time.monotonic() - asked_at)
                await asyncio.sleep(0.05)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

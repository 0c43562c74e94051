"""F3, F4, F14: processes that are told to stop, that are paused, that start together."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import databases
from tests.faults.harness import IN_FULL, FaultyServer, Judge, Trial, passed, second, seed, signal_to
from tests.pausing import pause_in_a_turn
from tests.scripted_llm import ScriptedLLM
from tests.server import eventually

TALKERS = 50 if IN_FULL else 5
STOPS = 20 if IN_FULL else 1
PAUSES = 10 if IN_FULL else 1
PAUSE_SECONDS = 60.0 if IN_FULL else 3.0
INTERRUPTED = 100 if IN_FULL else 10
# What was promised of every process.
LONGEST_STOP = 30.0


@pytest.mark.parametrize("signals", [1, 2])
def test_told_to_stop_while_many_talk(server: FaultyServer, llm: ScriptedLLM, judge: Judge, signals: int) -> None:
    trial = Trial(f"F3 SIGTERM x {signals}", [server], llm, seed=seed())
    with trial.conversations(TALKERS):
        for _ in range(STOPS):
            trial.some_more(trial.chance.randrange(10 * TALKERS))
            began = time.monotonic()
            for _ in range(signals):
                server.tell()
            code = server.end()
            assert time.monotonic() - began < LONGEST_STOP
            assert code == 0 or signals == 2
            trial.restart()

    judge(trial, STOPS)


def test_one_of_two_is_paused_past_its_leases_and_wakes_up(
    server: FaultyServer, llm: ScriptedLLM, judge: Judge, tmp_path: Path
) -> None:
    with second(server, tmp_path) as other:
        other.start()
        # What was sent to the sleeper is answered when it is awake.
        patience = 2 * PAUSE_SECONDS + 30
        trial = Trial("F4", [server, other], llm, seed=seed(), timeout=patience, patience=2 * patience)
        with trial.conversations(10 if IN_FULL else 5):
            for _ in range(PAUSES):
                trial.some_more(trial.chance.randrange(50), patience=2 * patience)
                paused = trial.chance.choice((server, other))
                pause_in_a_turn(paused)
                passed(PAUSE_SECONDS)
                signal_to(paused, signal.SIGCONT)
                trial.back(time.monotonic(), paused)

        judge(trial, PAUSES)
        assert "turn_lost" in server.log.read_text() + other.log.read_text(), "nobody woke up after its lease"


def test_two_processes_start_together_on_interrupted_turns(
    server: FaultyServer, llm: ScriptedLLM, judge: Judge, tmp_path: Path
) -> None:
    with second(server, tmp_path) as other:
        trial = Trial("F14", [server, other], llm, seed=seed(), timeout=60)
        running = "SELECT count(*) FROM sessions_app_turn WHERE status IN ('running', 'waiting', 'queued')"
        with trial.conversations(INTERRUPTED):
            eventually(lambda: databases.rows(server.database, running)[0][0] >= INTERRUPTED // 2, seconds=30)
            server.kill()
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(trial.restart, (server, other)))
            trial.some_more(10 * INTERRUPTED, patience=120)

        judge(trial, INTERRUPTED)

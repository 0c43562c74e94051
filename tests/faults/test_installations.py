"""F8, F13: two web processes and two workers on one database, with Redis between them, each of which goes away."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import from_url

from orchestrator_site.local_services import Redis
from tests import databases
from tests.faults.harness import IN_FULL, LLM_KEY, Judge, Trial, passed, seed, with_password
from tests.gateway import Gateway, gateway
from tests.scaled import Installation, Worker, installed
from tests.scripted_llm import ScriptedLLM
from tests.server import Server

pytestmark = [pytest.mark.postgresql, pytest.mark.redis]

TALKERS = 24 if IN_FULL else 6
ROUNDS = 6 if IN_FULL else 1
RESTART_SECONDS = 10.0 if IN_FULL else 1.0
# Redis is silent, gone, forgetful, each for so long.
AWAY_SECONDS = 20.0 if IN_FULL else 2.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def way(redis: Redis) -> Iterator[Gateway]:
    with gateway(redis.url) as opened:
        yield opened


@pytest.fixture
def installation(tmp_path: Path, scaled_template: Path, llm: ScriptedLLM, way: Gateway) -> Iterator[Installation]:
    """Its lease is the usual one: on a busy machine a shorter one runs out under runners that live."""
    settings = {
        "REDIS_URL": way.url,
        "TURN_LEASE_SECONDS": "10",
        "LLM_API_KEY": LLM_KEY,
        "TURN_MAX_LOSSES": "1000",
        "DATABASE_URL": with_password(databases.url_of(tmp_path / "test.sqlite3")),
    }
    with installed(tmp_path, scaled_template, llm, webs=2, workers=2, **settings) as started:
        yield started


def on(installation: Installation, fault: str, llm: ScriptedLLM) -> Trial:
    return Trial(fault, installation.webs, llm, seed=seed(), timeout=30, log=lambda: installation.logs)


def test_every_process_is_stopped_or_killed_in_turn(installation: Installation, llm: ScriptedLLM, judge: Judge) -> None:
    trial = on(installation, "F13", llm)
    in_turn: list[Server | Worker] = []
    for web, worker in zip(installation.webs, installation.workers, strict=True):
        in_turn += [worker, web]
    with trial.conversations(TALKERS):
        for number, process in enumerate(in_turn * ROUNDS):
            passed(RESTART_SECONDS)
            if (number + trial.seed) % 2:
                process.kill()
            else:
                assert process.stop() == 0
            began = time.monotonic()
            process.start()
            trial.back(began)

    judge(trial, len(in_turn) * ROUNDS)


def test_redis_is_slow_silent_flushed_cut_off_and_gone(
    installation: Installation, llm: ScriptedLLM, judge: Judge, redis: Redis, way: Gateway
) -> None:
    trial = on(installation, "F8", llm)
    assert redis.process is not None
    process = redis.process
    with trial.conversations(TALKERS):
        for _ in range(ROUNDS):
            way.delay = 5.0
            passed(AWAY_SECONDS)
            way.delay = 0.0
            process.send_signal(signal.SIGSTOP)
            passed(AWAY_SECONDS)
            process.send_signal(signal.SIGCONT)
            from_url(redis.url).flushall()
            way.close()
            passed(AWAY_SECONDS)
            way.open()
            redis.stop(signal.SIGKILL)
            passed(AWAY_SECONDS)
            redis.start()
            process = redis.process
            trial.some_more(5 * TALKERS)

    judge(trial, 5 * ROUNDS)

"""F5, F9: a database that is locked, gone, back, and gone again."""

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from orchestrator_site.local_services import PostgreSQL
from tests import databases
from tests.faults.harness import IN_FULL, SETTINGS, FaultyServer, Judge, Trial, passed, seed
from tests.faults.record import Answered
from tests.scripted_llm import ScriptedLLM

TALKERS = 50 if IN_FULL else 5
RESTARTS = 60 if IN_FULL else 2
BETWEEN = (5.0, 20.0) if IN_FULL else (0.5, 1.5)
# At least, and until a request was refused.
DOWN_SECONDS = 120.0 if IN_FULL else 4.0
LOCKED_SECONDS = 30.0 if IN_FULL else 4.0
REFUSED_WITHIN = 10.0


def refusals(trial: Trial) -> list[Answered]:
    """In full they have to come in time."""
    refused = [answer for answer in trial.record.of(Answered) if answer.status == 503]
    if IN_FULL:
        assert max((answer.took for answer in refused), default=0) < REFUSED_WITHIN
    return refused


def away(trial: Trial, seconds: float) -> None:
    """So long nobody can write, and who asks for it is told to come back."""
    began = time.monotonic()
    answer = trial.server.http.post("/sessions")
    assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
    passed(max(seconds - (time.monotonic() - began), 0))


# --- SQLite: another program writes and does not end ----------------------------------------------------------------


@pytest.mark.sqlite
def test_a_lock_of_three_seconds_is_waited_for(server: FaultyServer, llm: ScriptedLLM, judge: Judge) -> None:
    trial = Trial("F9 3 s", [server], llm, seed=seed())
    locks = 10 if IN_FULL else 1
    with trial.conversations(TALKERS):
        for _ in range(locks):
            trial.some_more(trial.chance.randrange(10 * TALKERS))
            with databases.locked(server.database, "sessions_app_session"):
                passed(3)
            trial.back(time.monotonic())
            trial.some_more(1)

    judge(trial, locks)
    assert refusals(trial) == []


@pytest.mark.sqlite
def test_a_lock_of_thirty_seconds_is_refused_within_ten(server: FaultyServer, llm: ScriptedLLM, judge: Judge) -> None:
    trial = Trial("F9 30 s", [server], llm, seed=seed())
    with trial.conversations(TALKERS):
        trial.some_more(trial.chance.randrange(10 * TALKERS))
        with databases.locked(server.database, "sessions_app_session"):
            away(trial, LOCKED_SECONDS)
        trial.back(time.monotonic())
        trial.some_more(TALKERS)

    judge(trial, 1)
    refusals(trial)
    assert not any("locked" in str(seen) for seen in trial.record.facts)


# --- PostgreSQL: the server stops and starts again ------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[PostgreSQL]:
    """A PostgreSQL server of this test's own, which forgets nothing when it is killed."""
    folder = Path(tempfile.mkdtemp(prefix="countersign-cluster-"))
    folder.chmod(0o755)
    started = PostgreSQL(folder)
    started.start()
    with psycopg.connect(started.url("postgres"), autocommit=True) as administrator:
        administrator.execute("CREATE DATABASE countersign")
    yield started
    started.stop(signal.SIGQUIT)
    shutil.rmtree(folder)


@pytest.fixture
def elsewhere(tmp_path: Path, cluster: PostgreSQL, llm: ScriptedLLM) -> Iterator[FaultyServer]:
    """A server whose database is there."""
    with databases.elsewhere(tmp_path / "test.sqlite3", cluster.url("countersign")):
        server = FaultyServer(tmp_path, LLM_BASE_URL=llm.url, **SETTINGS)
        server.start()
        try:
            yield server
        finally:
            server.http.close()
            server.kill()


@pytest.mark.postgresql
def test_postgresql_is_restarted_again_and_again(
    elsewhere: FaultyServer, cluster: PostgreSQL, llm: ScriptedLLM, judge: Judge
) -> None:
    trial = Trial("F5 restarts", [elsewhere], llm, seed=seed())
    with trial.conversations(TALKERS):
        for _ in range(RESTARTS):
            passed(trial.chance.uniform(*BETWEEN))
            cluster.stop(trial.chance.choice((signal.SIGINT, signal.SIGQUIT)))
            passed(trial.chance.uniform(0, 5 if IN_FULL else 1))
            began = time.monotonic()
            cluster.start()
            trial.back(began)

    judge(trial, RESTARTS)
    refusals(trial)


@pytest.mark.postgresql
def test_postgresql_is_down_for_long(
    elsewhere: FaultyServer, cluster: PostgreSQL, llm: ScriptedLLM, judge: Judge
) -> None:
    trial = Trial("F5 down", [elsewhere], llm, seed=seed())
    with trial.conversations(TALKERS):
        trial.some_more(10 * TALKERS)
        cluster.stop(signal.SIGQUIT)
        away(trial, DOWN_SECONDS)
        began = time.monotonic()
        cluster.start()
        trial.back(began)
        trial.some_more(TALKERS)

    judge(trial, 1)
    refusals(trial)

"""How the processes of a scaled installation begin: with what they need, or with one line that says what is missing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator_site.local_services import Redis
from tests import databases
from tests.scaled import SCALED, installed
from tests.scripted_llm import ScriptedLLM
from tests.server import ROOT, Server, free_port

WEB = ["-m", "orchestrator_site.web"]
WORKER = ["manage.py", "procrastinate", "worker"]
BOTH = pytest.mark.parametrize(
    "command", [pytest.param(WEB, id="web"), pytest.param(WORKER, id="worker", marks=pytest.mark.postgresql)]
)


def line_of(command: list[str], **settings: str) -> str:
    """What a process says that does not begin."""
    environment = {
        "PATH": os.environ["PATH"],
        "SECRET_KEY": "s" * 50,
        "PORT": str(free_port()),
        **(SCALED if databases.ON_POSTGRESQL else {}),
        **settings,
    }
    outcome = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30
    )
    assert outcome.returncode == 1
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("Countersign does not start: ")
    return line


@pytest.fixture
def whole(migrated: Path, request: pytest.FixtureRequest) -> str:
    """The address of a database that has everything."""
    return databases.url_of(request.getfixturevalue("scaled_template") if databases.ON_POSTGRESQL else migrated)


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[str]:
    """The address of a database without any table."""
    place = tmp_path / "empty.sqlite3"
    databases.create(place)
    yield databases.url_of(place)
    databases.drop(place)


@BOTH
def test_a_database_that_was_not_migrated_stops_the_start(command: list[str], empty: str) -> None:
    assert "manage.py migrate" in line_of(command, DATABASE_URL=empty)


@BOTH
@pytest.mark.postgresql
def test_a_database_that_is_absent_stops_the_start(command: list[str]) -> None:
    line = line_of(command, DATABASE_URL=f"postgres://somebody:sesame@127.0.0.1:{free_port()}/none")

    assert "DATABASE_URL" in line
    assert "refused" in line
    assert "sesame" not in line


@BOTH
def test_an_address_of_redis_that_cannot_be_read_stops_the_start(command: list[str], whole: str) -> None:
    line = line_of(command, DATABASE_URL=whole, REDIS_URL="redis://:open/sesame@127.0.0.1:1/0")

    assert "REDIS_URL" in line
    assert "sesame" not in line


def test_a_port_that_is_taken_stops_the_start(server: Server) -> None:
    url = server.environment["DATABASE_URL"]

    assert f"PORT {server.port}: Address already in use" in line_of(WEB, DATABASE_URL=url, PORT=str(server.port))


@pytest.mark.postgresql
@pytest.mark.redis
@pytest.mark.parametrize("password", ["", "another"], ids=["absent", "refusing"])
def test_without_redis_both_say_so_and_work(
    tmp_path: Path, scaled_template: Path, llm: ScriptedLLM, password: str
) -> None:
    redis = Redis(tmp_path / "redis", password=password)
    if password:
        redis.start()
    address = f"redis://:sesame@127.0.0.1:{redis.port}/0"
    with installed(tmp_path, scaled_template, llm, REDIS_URL=address) as scaled:
        assert scaled.web.say("s", "Hello")[-1].event == "done"
        for log in (scaled.web.log.read_text(), scaled.workers[0].log.read_text()):
            (line,) = [line for line in log.splitlines() if line.startswith("Countersign starts without Redis")]
            assert f"REDIS_URL, redis://127.0.0.1:{redis.port}/0: " in line
            assert ("another user or password" if password else "Connection refused") in line
            assert "sesame" not in log
    redis.stop()

"""`/healthz` and `/readyz`: alive whatever is broken, and what is missing by name."""

import asyncio
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from events_app.database import THREADS
from orchestrator_site.readiness import FRESH_SECONDS, Probe, Readiness
from tests.server import AUTH, Server, eventually, running

WELL = {"status": "ready", "database": "ok", "runner": "ok", "layer": "memory"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Server]:
    """One without the key in its clients' hands."""
    with running(tmp_path_factory.mktemp("ready"), migrated) as started:
        started.http.headers.pop("X-Internal-Auth")
        yield started


def ready(server: Server) -> httpx.Response:
    answer = server.http.get("/readyz")
    is_refused = answer.json()["status"] == "unavailable"
    assert (answer.status_code, "retry-after" in answer.headers) == (503 if is_refused else 200, is_refused)
    return answer


def is_ready(server: Server) -> bool:
    return bool(ready(server).json() == WELL)


@contextmanager
def replaced(server: Server) -> Iterator[Path]:
    """The database file is not there; the test may put something in its place."""
    kept = server.database.with_suffix(".kept")
    server.database.rename(kept)
    try:
        yield server.database
    finally:
        kept.rename(server.database)
        eventually(lambda: is_ready(server))


def test_a_server_that_is_well_says_so_to_everybody(server: Server) -> None:
    assert ready(server).json() == WELL
    assert server.http.get("/healthz").json() == {"status": "alive"}
    for path in ("/healthz", "/readyz"):
        head = server.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        for method in ("POST", "PUT", "DELETE"):
            refused = server.http.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
        assert server.http.get(f"/api/v1{path}", headers=AUTH).status_code == 404
        assert server.http.get(path, headers={"Host": "evil.example"}).status_code == 400


def test_a_lock_of_another_program_makes_nothing_unready(server: Server) -> None:
    with closing(sqlite3.connect(server.database)) as other:
        other.execute("BEGIN EXCLUSIVE")

        # For longer than an answer is remembered.
        until = time.monotonic() + 2 * FRESH_SECONDS
        while time.monotonic() < until:
            assert is_ready(server)


@pytest.mark.sqlite
@pytest.mark.parametrize("instead", ["nothing", "garbage", "an empty file", "a directory"])
def test_without_its_database_it_is_alive_and_not_ready(server: Server, instead: str) -> None:
    with replaced(server) as file:
        match instead:
            case "garbage":
                file.write_bytes(b"no database " * 1000)
            case "an empty file":
                file.touch()
            case "a directory":
                file.mkdir()

        eventually(lambda: ready(server).json() == {**WELL, "status": "unavailable", "database": "unavailable"})
        assert server.http.get("/healthz").status_code == 200
        assert file.exists() == (instead != "nothing"), "to look makes nothing"
        if instead == "a directory":
            file.rmdir()


@pytest.mark.sqlite
def test_a_database_that_hangs_is_named_within_two_seconds_and_asked_once(server: Server) -> None:
    with replaced(server) as file, ThreadPoolExecutor(40) as pool:
        os.mkfifo(file)  # to open it waits for somebody who writes
        try:
            eventually(lambda: ready(server).json()["database"] == "no_answer")
            threads = threads_of(server)

            began = time.monotonic()
            asked = [pool.submit(ready, server) for _ in range(40)]
            assert server.http.get("/healthz").json() == {"status": "alive"}
            assert {answer.result().json()["database"] for answer in asked} == {"no_answer"}
            assert time.monotonic() - began < 3
            # Threads of the database that were not needed before may have been started, and no more.
            eventually(lambda: threads_of(server) <= threads + 2 * THREADS)
        finally:
            let_go(file)
            file.unlink()
    assert server.log.read_text().count("probe_failed") < 20


def let_go(fifo: Path) -> None:
    """Of those who wait for somebody who writes, if there are any."""
    with suppress(OSError):
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


def threads_of(server: Server) -> int:
    assert server.process is not None
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


@pytest.mark.sqlite
def test_who_asks_while_it_stops_is_sent_elsewhere(tmp_path: Path, migrated: Path) -> None:
    with running(tmp_path, migrated) as server, ThreadPoolExecutor(1) as pool, socket.socket() as asking:
        kept = server.database.rename(tmp_path / "kept")
        os.mkfifo(server.database)
        asking.connect(("127.0.0.1", server.port))
        asking.sendall(b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n")
        server.http.get("/healthz")  # what came earlier is taken up by now

        stopped = pool.submit(server.stop)

        answer = b"".join(iter(lambda: asking.recv(1000), b""))
        let_go(server.database)
        kept.rename(server.database)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"runner": "stopping"' in answer
        assert stopped.result() == 0


# --- What is said of the parts together ------------------------------------------------------------------------------


async def fine() -> str:
    return "ok"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ({}, "ready"),
        ({"layer": "ok"}, "ready"),
        ({"layer": "unavailable"}, "degraded"),
        ({"runner": "missing"}, "degraded"),
        ({"runner": "missing", "layer": "no_answer"}, "degraded"),
        ({"database": "unavailable"}, "unavailable"),
        ({"database": "no_answer", "layer": "unavailable"}, "unavailable"),
    ],
)
def test_only_the_database_is_indispensable(parts: dict[str, str], status: str) -> None:
    readiness = Readiness()
    words = {"database": "ok", "runner": "ok", "layer": "memory", **parts}
    for name, word in words.items():
        readiness.probes[name] = Probe(lambda word=word: asyncio.sleep(0, word))  # type: ignore[misc]

    assert asyncio.run(readiness.look()) == {"status": status, **words}


def test_where_nobody_runs_turns_that_is_said() -> None:
    readiness = Readiness()
    readiness.probes["database"] = Probe(fine)

    assert asyncio.run(readiness.look()) == {**WELL, "status": "degraded", "runner": "missing", "layer": "missing"}


def test_a_process_that_stops_is_unavailable() -> None:
    readiness = Readiness()
    readiness.probes["database"] = Probe(fine)
    readiness.is_stopping = True

    assert asyncio.run(readiness.look()) == {**WELL, "status": "unavailable", "runner": "stopping", "layer": "missing"}


# --- A probe ---------------------------------------------------------------------------------------------------------


def test_however_many_ask_a_part_is_asked_once_at_a_time_and_once_a_second() -> None:
    asked: list[float] = []

    async def ask() -> str:
        asked.append(time.monotonic())
        await asyncio.sleep(0.05)
        return "ok"

    async def scenario() -> None:
        probe = Probe(ask)
        for _ in range(20):
            assert await asyncio.gather(*(probe.word() for _ in range(50))) == ["ok"] * 50
        assert len(asked) == 1
        while len(asked) == 1:
            await probe.word()
        assert asked[1] - asked[0] > 0.9

    asyncio.run(scenario())


def test_who_asks_a_part_that_hangs_waits_two_seconds_together_and_then_not_at_all() -> None:
    hanging = 0

    async def ask() -> str:
        nonlocal hanging
        hanging += 1
        await asyncio.Event().wait()
        return "never"

    async def scenario() -> None:
        probe = Probe(ask)
        began = time.monotonic()
        assert await asyncio.gather(*(probe.word() for _ in range(50))) == ["no_answer"] * 50
        assert 1.9 < time.monotonic() - began < 3
        assert await probe.word() == "no_answer"
        assert time.monotonic() - began < 3
        assert hanging == 1

    asyncio.run(scenario())


def test_a_part_that_fails_is_unavailable_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> str:
        raise OSError("away")

    async def scenario() -> None:
        probe = Probe(fail)
        for _ in range(3):
            assert await probe.word() == "unavailable"
            probe._since = 0  # a second later

    asyncio.run(scenario())

    assert [record.message for record in caplog.records] == ["probe_failed"]

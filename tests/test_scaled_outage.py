"""Workers whose database restarts under them: they go on fetching, whatever else they are busy with."""

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest

from orchestrator_site.local_services import PostgreSQL
from orchestrator_site.scaled import Nginx, Web
from tests.scaled import SCALED, Worker, frozen
from tests.scripted_llm import Gate, ScriptedLLM, hold, say
from tests.server import AUTH, BRIEF, Server, eventually, free_port, until

pytestmark = pytest.mark.postgresql


@pytest.fixture
def cluster() -> Iterator[PostgreSQL]:
    folder = Path(tempfile.mkdtemp(prefix="countersign-cluster-"))
    folder.chmod(0o755)
    started = PostgreSQL(folder, durable=False)
    started.start()
    with psycopg.connect(started.url("postgres"), autocommit=True) as administrator:
        administrator.execute("CREATE DATABASE countersign")
    yield started
    started.stop(signal.SIGQUIT)
    shutil.rmtree(folder)


@contextmanager
def scaled(folder: Path, cluster: PostgreSQL, llm: ScriptedLLM) -> Iterator[tuple[Server, Worker]]:
    """A web process and a worker on that server."""
    # A lease that outlives a restart, or the turn would begin anew.
    settings = {**SCALED, "TURN_LEASE_SECONDS": "60", "DATABASE_URL": cluster.url("countersign")}
    web = Server(folder, server="web", LLM_BASE_URL=llm.url, **settings)
    assert web.manage("migrate", "-v0").returncode == 0
    worker = Worker(folder, web.environment, "worker")
    try:
        worker.start()
        web.start()
        yield web, worker
    finally:
        web.http.close()
        for each in (web, worker):
            if each.process is not None and each.process.poll() is None:
                each.kill()


def test_processes_that_are_told_to_end_do_although_their_database_is_frozen(
    tmp_path: Path, cluster: PostgreSQL, llm: ScriptedLLM
) -> None:
    gate = Gate()
    with scaled(tmp_path, cluster, llm) as (web, worker):
        web.say("s", "hello", agent_type="coder")
        llm.script(hold("Half a ", "sentence.", gate=gate))
        with web.streaming({"type": "user_message", "content": "go"}, "s") as answer:
            until(answer, "turn_started")
            gate.reached.wait()
            with frozen(cluster):
                web.tell()
                worker.tell()
                gate.open()
                told = time.monotonic()
                web.end()
                worker.end()
                assert time.monotonic() - told < 30


def test_a_busy_worker_whose_database_restarts_takes_up_other_turns_at_once(
    tmp_path: Path, cluster: PostgreSQL, llm: ScriptedLLM
) -> None:
    gate = Gate()
    with scaled(tmp_path, cluster, llm) as (web, worker):
        web.say("long", "hello", agent_type="coder")
        web.say("other", "hello", agent_type="coder")
        llm.script(hold("Half a ", "sentence.", gate=gate))
        llm.default = say("A whole sentence.")
        with ThreadPoolExecutor(1) as pool, web.streaming({"type": "user_message", "content": "go"}, "long") as answer:
            until(answer, "turn_started")
            gate.reached.wait()
            cluster.stop(signal.SIGQUIT)
            cluster.start()
            eventually(lambda: web.http.get("/sessions").status_code == 200)

            other = pool.submit(web.say, "other", "and you?")
            assert other.result(15)[-2].data["status"] == "completed"
            gate.open()
        eventually(lambda: web.history("long")[-1] == ("assistant", "Half a sentence."))
        assert worker.process is not None and worker.process.poll() is None
        assert worker.stop() == 0


@pytest.mark.nginx
def test_behind_nginx_a_database_that_is_away_is_told_after_one_wait_and_not_after_two(
    tmp_path: Path, cluster: PostgreSQL
) -> None:
    settings = {**SCALED, "DATABASE_URL": cluster.url("countersign")}
    servers = [Server(tmp_path, server="web", **settings) for _ in range(2)]
    assert servers[0].manage("migrate", "-v0").returncode == 0
    webs = [Web(tmp_path, "web") for _ in servers]
    for web, server in zip(webs, servers, strict=True):
        web.port = server.port
    listen = f"127.0.0.1:{free_port()}"
    nginx = Nginx(tmp_path / "nginx", listen, webs, 2**21)
    try:
        for server in servers:
            server.start()
        nginx.start()
        with httpx.Client(base_url=f"http://{listen}", headers=AUTH, timeout=30, limits=BRIEF) as client:
            assert client.get("/sessions").status_code == 200
            cluster.stop(signal.SIGQUIT)

            for _ in range(3):
                begun = time.monotonic()
                answer = client.get("/sessions")
                assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
                assert answer.headers["retry-after"]
                # Of one process about 3 s; two, one after the other, would take 6.
                assert time.monotonic() - begun < 5
    finally:
        nginx.stop(signal.SIGQUIT)
        for server in servers:
            server.http.close()
            if server.process is not None:
                server.kill()

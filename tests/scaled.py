"""A scaled installation for tests: web processes and workers on one PostgreSQL database, with Redis or without."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg

from orchestrator_site.local_services import PostgreSQL
from tests import databases, preloaded
from tests.scripted_llm import ScriptedLLM
from tests.server import TIMEOUT, Server, eventually

# On a busy machine a shorter lease runs out under runners that live.
SCALED = {"TURN_RUNNER": "procrastinate", "TURN_LEASE_SECONDS": "5"}


class Worker:
    """A worker process that can be killed, stopped and started again."""

    def __init__(self, folder: Path, environment: dict[str, str], name: str) -> None:
        self.environment = environment
        self.log = folder / f"{name}.log"
        self.process: preloaded.Process | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = preloaded.start("manage", "procrastinate", "worker", environment=self.environment, out=log)

    def kill(self) -> None:
        """kill -9"""
        assert self.process is not None
        self.process.kill()
        self.process.wait(TIMEOUT)

    def tell(self) -> None:
        """SIGTERM"""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM, and how it ended."""
        self.tell()
        return self.end()

    def end(self) -> int:
        assert self.process is not None
        return self.process.wait(TIMEOUT)


class Installation:
    """Its first web process is `web`; every process has a log of its own."""

    def __init__(self, folder: Path, webs: int, workers: int, settings: dict[str, str]) -> None:
        self.folder = folder
        self.webs = [Server(folder, server="web", **(SCALED | settings)) for _ in range(webs)]
        for number, server in enumerate(self.webs):
            server.log = folder / f"web{number}.log"
        self.web = self.webs[0]
        self.database = self.web.database
        self.workers = [Worker(folder, self.web.environment, f"worker{number}") for number in range(workers)]

    def start(self) -> None:
        for worker in self.workers:
            worker.start()
        for server in self.webs:
            server.start()
        self.wait_for_workers(len(self.workers))

    def add_worker(self, **settings: str) -> Worker:
        """One more worker, perhaps with settings of its own, which fetches jobs already."""
        newest = "SELECT coalesce(max(id), 0) FROM procrastinate_workers"
        before = self.rows(newest)
        worker = Worker(self.folder, {**self.web.environment, **settings}, f"worker{len(self.workers)}")
        self.workers.append(worker)
        worker.start()
        eventually(lambda: self.rows(newest) != before)
        return worker

    def wait_for_workers(self, number: int) -> None:
        """Until so many workers fetch jobs. Workers that were killed do not count when others were started since."""
        deadline = time.monotonic() + TIMEOUT
        alive = "SELECT count(*) FROM procrastinate_workers WHERE last_heartbeat > now() - interval '10 seconds'"
        while databases.rows(self.database, alive)[0][0] < number:
            assert time.monotonic() < deadline, [worker.log.read_text() for worker in self.workers]
            time.sleep(0.05)

    def rows(self, query: str) -> list[tuple[object, ...]]:
        return databases.rows(self.database, query)

    @property
    def processes(self) -> list[Server | Worker]:
        return [*self.webs, *self.workers]

    @property
    def logs(self) -> str:
        return "".join(each.log.read_text() for each in self.processes if each.log.exists())


def migrate(template: Path, place: Path) -> None:
    """A copy of the migrated database with the tables that a scaled installation needs beside."""
    databases.copy(template, place)
    fresh = Server(place.parent, **SCALED)
    fresh.http.close()
    outcome = fresh.manage("migrate", "-v0")
    assert outcome.returncode == 0, outcome.stderr


@contextmanager
def installed(
    folder: Path, template: Path, llm: ScriptedLLM, *, webs: int = 1, workers: int = 1, **settings: str
) -> Iterator[Installation]:
    """A started installation on a copy of a migrated database; killed at the end."""
    installation = Installation(folder, webs, workers, {"LLM_BASE_URL": llm.url, **settings})
    databases.copy(template, installation.database)
    with ExitStack() as end:
        end.callback(databases.drop, installation.database)
        end.callback(_end_all, installation)
        installation.start()
        yield installation


def _end_all(installation: Installation) -> None:
    for server in installation.webs:
        server.http.close()
    for each in installation.processes:
        if each.process is not None and each.process.poll() is None:
            each.kill()


def connections(place: Path) -> int:
    """How many connections there are to a database, without the one that asks."""
    with psycopg.connect(databases.url_of(place)) as database:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        row = database.execute(query).fetchone()
        assert row is not None
        return int(row[0])


@contextmanager
def frozen(cluster: PostgreSQL) -> Iterator[None]:
    """While none of its processes gets any time, as on a machine whose disk does not answer."""
    assert cluster.process is not None
    children = Path(f"/proc/{cluster.process.pid}/task/{cluster.process.pid}/children").read_text().split()
    each = [cluster.process.pid, *map(int, children)]
    for process_id in each:
        os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        for process_id in each:
            os.kill(process_id, signal.SIGCONT)

"""A scaled installation for tests: web processes and workers on one database and one Redis, with a database that one
can take away."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from orchestrator_site.local_services import Redis
from tests import databases
from tests.server import ROOT, TIMEOUT, Server, eventually

T = TypeVar("T")


class Gateway:
    """A way to a database that can be closed: who is connected is cut, who comes is refused."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._to = parts.hostname, parts.port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.open()
        self.url = parts._replace(netloc=f"{parts.username}@127.0.0.1:{self.port}").geturl()

    def open(self) -> None:
        self._server = self._run(asyncio.start_server(self._pass, "127.0.0.1", self.port))
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()

        self._run(close())

    def end(self) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._to)
        both = {writer, far_writer}
        self._writers |= both
        with suppress(OSError):
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        self._writers -= both


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


class Worker:
    """A worker's process."""

    def __init__(self, folder: Path, name: str, environment: dict[str, str]) -> None:
        self.log = folder / f"{name}.log"
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "procrastinate", "worker"],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(TIMEOUT)

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait()


class Installation:
    """Web processes and workers with the same settings."""

    def __init__(self, folder: Path, redis: Redis, **settings: str) -> None:
        self.folder = folder
        self.database = folder / "test.sqlite3"
        self.settings = {"TURN_RUNNER": "procrastinate", "REDIS_URL": redis.url, **settings}
        self.webs: list[Server] = []
        self.workers: list[Worker] = []

    def web(self, **settings: str) -> Server:
        """One more web process."""
        folder = self.folder / f"web-{len(self.webs)}"
        folder.mkdir()
        url = databases.url_of(self.database)
        server = Server(folder, server="web", **{"DATABASE_URL": url, **self.settings, **settings})
        server.database = self.database
        self.webs.append(server)
        server.start()
        return server

    def worker(self, **settings: str) -> Worker:
        """One more worker, which has begun to work."""
        before = self._newest_worker()
        environment = {
            "PATH": os.environ["PATH"],
            "SECRET_KEY": "s" * 50,
            "DATABASE_URL": databases.url_of(self.database),
            "DEMO_WORD_DELAY": "0",
            "LLM_RETRY_DELAY": "0.01",
            **self.settings,
            **settings,
        }
        worker = Worker(self.folder, f"worker-{len(self.workers)}", environment)
        self.workers.append(worker)
        worker.start()
        eventually(lambda: self._newest_worker() > before)
        return worker

    def _newest_worker(self) -> int:
        ((number,),) = databases.rows(self.database, "SELECT coalesce(max(id), 0) FROM procrastinate_workers")
        return int(number)


@contextmanager
def installation(folder: Path, template: Path, redis: Redis, **settings: str) -> Iterator[Installation]:
    """On a copy of a migrated database; everything is killed at the end."""
    made = Installation(folder, redis, **settings)
    databases.copy(template, made.database)
    try:
        yield made
    finally:
        for server in made.webs:
            server.http.close()
        for process in [*(web.process for web in made.webs), *(worker.process for worker in made.workers)]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(TIMEOUT)
        databases.drop(made.database)

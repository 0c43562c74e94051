"""What is measured: servers that answer the same request, and the model that they ask."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from machine import (
    HERE,
    KEY,
    LOAD_CORE,
    PATIENCE,
    ROOT,
    SERVER_CORE,
    Held,
    ended_after,
    environment,
    family_cpu_seconds,
    free_port,
    held,
    line_of,
    open_files,
    python,
    started,
    wait_healthy,
)

sys.path.insert(0, str(ROOT))
from orchestrator_site.local_services import PostgreSQL  # not installed: it lies beside

# Above this share of its core, whatever makes or reads the tokens is measured along with the server.
NEAR_LIMIT = 0.7
# What may be added by any number of streams: the database threads of events_app/database.py and their connections.
POOL = 4


@contextmanager
def mock_model(rate: float = 50, tokens: int = 200) -> Iterator["subprocess.Popen[str]"]:
    """It prints its port. What a message itself asks for goes before these."""
    command = [str(HERE / "mock_model.py"), "--rate", str(rate), "--tokens", str(tokens)]
    env = {"PATH": os.environ["PATH"]}
    with ended_after(python(*command, env=env, core=LOAD_CORE, stdout=subprocess.PIPE)) as mock:
        yield mock


class System:
    """A server. `dialect`: how clients (load.py) speak with it. `postgresql`: where its database is, if there."""

    dialect = ""

    def __init__(self, name: str, folder: Path, postgresql: PostgreSQL | None = None) -> None:
        self.name = name
        self.folder = folder
        self.postgresql = postgresql

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def database_url(self) -> str:
        """Of a database of its own."""
        assert self.postgresql
        return self.postgresql.url(self.dialect)

    def prepare(self, model: str) -> None:
        """Once, before it is started for the first time. `model`: the base URL."""
        self.folder.mkdir(exist_ok=True)
        self.model = model
        if self.postgresql:
            administer(self.postgresql, f"CREATE DATABASE {self.dialect}")

    def command(self, port: int) -> list[str]:
        raise NotImplementedError

    def env(self, port: int) -> dict[str, str]:
        return {"PATH": os.environ["PATH"]}

    def connections(self, pid: int) -> int:
        """How many it has to PostgreSQL."""
        assert self.postgresql
        return administer(self.postgresql, "SELECT datname FROM pg_stat_activity").count((self.dialect,))

    def database_cpu(self) -> float:
        """Seconds used by PostgreSQL."""
        return family_cpu_seconds(self.postgresql.process.pid) if self.postgresql and self.postgresql.process else 0.0


class Floor(System):
    dialect = "bare"

    def command(self, port: int) -> list[str]:
        return [sys.executable, str(HERE / "floor.py"), "--port", str(port), "--model", self.model]

    def connections(self, pid: int) -> int:
        return 0


class Ours(System):
    """As production starts it. For more streams than it takes by default it needs settings."""

    dialect = "ours"

    def __init__(self, name: str, folder: Path, postgresql: PostgreSQL | None = None, *, streams: int = 0) -> None:
        super().__init__(name, folder, postgresql)
        self.file = folder / "bench.sqlite3"
        self.settings = {"TURNS_AT_ONCE": str(max(1_000, streams)), "STREAMS_AT_ONCE": str(max(5_000, streams))}
        if postgresql:
            self.settings["DATABASE_URL"] = self.database_url

    def prepare(self, model: str) -> None:
        super().prepare(model)
        migrate = [sys.executable, "manage.py", "migrate", "-v0"]
        subprocess.run(migrate, cwd=ROOT, env=self.env(free_port()), check=True, timeout=PATIENCE)

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "orchestrator_site.web"]

    def env(self, port: int) -> dict[str, str]:
        return environment(self.folder, PORT=str(port), LLM_BASE_URL=self.model, **self.settings)

    def connections(self, pid: int) -> int:
        return super().connections(pid) if self.postgresql else list(open_files(pid)).count(str(self.file))


def administer(server: PostgreSQL, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


@dataclass(frozen=True)
class Bench:
    """A running server, and the model behind it."""

    system: System
    server: "subprocess.Popen[str]"
    mock: "subprocess.Popen[str]"
    port: int

    def held(self) -> Held:
        return held(self.server.pid, self.system.folder / "bench.sqlite3")

    def load(self, turns: int, tokens: int, *more: str) -> "subprocess.Popen[str]":
        """The clients of so many turns: they say when their sessions exist, and wait to `begin`."""
        arguments = ["--port", str(self.port), "--turns", str(turns), "--tokens", str(tokens)]
        command = [str(HERE / "load.py"), *arguments, "--dialect", self.system.dialect, *more]
        env = {"PATH": os.environ["PATH"], "INTERNAL_API_KEY": KEY}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return python(*command, env=env, core=LOAD_CORE, **pipes)


@contextmanager
def running(system: System, mock: "subprocess.Popen[str]") -> Iterator[Bench]:
    """The server on its core, once it answers."""
    port = free_port()
    with system.log.open("w") as log:
        output = {"stdout": subprocess.DEVNULL, "stderr": log}
        process = started(system.command(port), env=system.env(port), core=SERVER_CORE, **output)
    with ended_after(process) as server:
        wait_healthy(server, port)
        yield Bench(system, server, mock, port)


@contextmanager
def ours_running(folder: Path, rate: float, tokens: int) -> Iterator[Bench]:
    """Ours on SQLite, with a model of its own."""
    with mock_model(rate, tokens) as mock:
        system = Ours("ours", folder)
        system.prepare(base_url(mock))
        with running(system, mock) as bench:
            yield bench


def base_url(mock: "subprocess.Popen[str]") -> str:
    return f"http://127.0.0.1:{line_of(mock)}/v1"

"""PostgreSQL and Redis servers of this checkout's own: private, on free ports of this machine, in a given folder.

For trying the scaled mode and for tests. Whoever starts one stops it; what it stored stays in its folder.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
# Where Debian keeps the programs of each version, which are not in PATH.
POSTGRES_FOLDER = Path("/usr/lib/postgresql")
READY_SECONDS = 30
# PostgreSQL refuses to run as root; Debian's package brings this user.
POSTGRES_USER = "postgres"
# What is stored need not survive a power cut, and is not worth waiting for.
FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}


class ServiceMissing(Exception):
    """A server that is not installed; the text names the package."""


class ServiceFailed(Exception):
    """A server that did not start; the text says where its log is."""


class Service(ABC):
    """A server process with a folder and a port, which it keeps when it is started again."""

    name = ""

    def __init__(self, folder: Path, *, password: str = "") -> None:
        self.folder = folder
        self.password = password
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @abstractmethod
    def start(self) -> None:
        """Start it and wait until it answers. Raises ServiceMissing, ServiceFailed."""

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None and self.is_running:
            self.process.send_signal(how)
            self.process.wait(READY_SECONDS)

    def _run(self, command: list[str], answers: Callable[[], bool], *, says: str = "", **how: Any) -> None:
        """Run the command and wait until it answers; `says` is what it reads on its standard input."""
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for whoever started it, who stops it when nobody needs it any more.
            self.process = subprocess.Popen(  # noqa: S603 (our own command)
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, **how
            )
        if self.process.stdin is not None:
            self.process.stdin.write(says.encode())
            self.process.stdin.close()
        deadline = time.monotonic() + READY_SECONDS
        while not answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(signal.SIGKILL)
                raise ServiceFailed(f"{self.name} did not start; {self.log} says why.")
            time.sleep(0.02)


class PostgreSQL(Service):
    """Without a password, whoever may connect to the port is let in; only what is thrown away may be kept so.

    `durable`: as a server has to be that keeps something; without, it is fast.
    """

    name = "postgresql"

    def __init__(self, folder: Path, *, password: str = "", durable: bool = True) -> None:
        super().__init__(folder, password=password)
        self.durable = durable
        self._data = folder / "data"
        self._whose: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._whose = {"user": POSTGRES_USER, "group": POSTGRES_USER, "extra_groups": [], "cwd": "/"}

    def url(self, database: str) -> str:
        user = f"{POSTGRES_USER}:{self.password}" if self.password else POSTGRES_USER
        return f"postgres://{user}@{HOST}:{self.port}/{database}"

    def start(self) -> None:
        server = _installed("postgres", "postgresql")
        if not (self._data / "PG_VERSION").exists():
            self._make(server.with_name("initdb"))
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            **({} if self.durable else FORGETFUL),
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        self._run([str(server), "-D", str(self._data), *options], self._answers, **self._whose)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends every connection and writes what there is to write; SIGQUIT is as a crash."""
        super().stop(how)

    def _make(self, initdb: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._data.mkdir(mode=0o700, exist_ok=True)
        if self._whose:
            shutil.chown(self._data, POSTGRES_USER, POSTGRES_USER)
        # Texts in the order of their characters, everywhere the same, and letters of every script.
        command = [initdb, "-D", self._data, "-U", POSTGRES_USER, "-E", "UTF8", "--locale=C.UTF-8"]
        sync = [] if self.durable else ["--no-sync"]
        with tempfile.NamedTemporaryFile("w") as secret:
            secret.write(self.password)
            secret.flush()
            if self._whose:
                shutil.chown(secret.name, POSTGRES_USER)
            auth = ["--auth=scram-sha-256", f"--pwfile={secret.name}"] if self.password else ["--auth=trust"]
            made = subprocess.run(  # noqa: S603 (our own command)
                [*map(str, command), *auth, *sync], capture_output=True, text=True, check=False, **self._whose
            )
        if made.returncode:
            raise ServiceFailed(f"initdb: {made.stderr.strip()}")

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


class Redis(Service):
    name = "redis"

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{HOST}:{self.port}/0" if self.password else f"redis://{HOST}:{self.port}/0"

    def start(self) -> None:
        server = _installed("redis-server", "redis-server")
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"bind": HOST, "port": str(self.port), "dir": str(self.folder), "save": "", "appendonly": "no"}
        if self.password:
            settings["requirepass"] = self.password
        # Not as arguments, which everybody on the machine can read.
        lines = "".join(f'{name} "{value}"\n' for name, value in settings.items())
        self._run([str(server), "-"], self._answers, says=lines)

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=2) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


def find(program: str) -> Path | None:
    folders = sorted(POSTGRES_FOLDER.glob("*/bin"), reverse=True)
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath), "/usr/sbin"])
    found = shutil.which(program, path=path)
    return Path(found) if found else None


def _installed(program: str, package: str) -> Path:
    found = find(program)
    if found is None:
        raise ServiceMissing(f"{program} is not installed: apt-get install {package}")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

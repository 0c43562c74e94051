"""A real server process for tests: uvicorn (or daphne) on a database of its own, killed as a test wishes."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests import databases, preloaded

ROOT = Path(__file__).resolve().parent.parent
KEY = "test-key-test-key-test-key-test-key-test"
AUTH = {"X-Internal-Auth": KEY}
# The server closes what is idle for 5 s, perhaps in the moment in which it is used again.
BRIEF = httpx.Limits(keepalive_expiry=2)
TIMEOUT = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Frame:
    """One SSE frame as a client reads it; `spaced` says whether the old gateway would have forwarded it."""

    id: int | None
    event: str | None
    data: dict[str, Any]
    spaced: bool

    @property
    def seq(self) -> int:
        """The number of a frame that has one."""
        assert self.id is not None, self.data
        return self.id

    @property
    def type(self) -> str:
        return str(self.data.get("type"))


def parse_frames(lines: Iterator[str]) -> Iterator[Frame]:
    """The frames of an event stream, comments left out. The end marker has event `done`."""
    number, event, data, spaced = None, None, None, False
    for line in lines:
        if line == "":
            if data is not None:
                yield Frame(number, event, json.loads(data), spaced)
            number, event, data, spaced = None, None, None, False
        elif line.startswith("id:"):
            number = int(line[3:])
        elif line.startswith("event:"):
            event = line[6:].strip()
        elif line.startswith("data:"):
            data, spaced = line[5:], line.startswith("data: ")


class Server:
    """A server process that can be killed and started again on the same database and port."""

    def __init__(self, folder: Path, *, server: str = "uvicorn", **settings: str) -> None:
        self.port = free_port()
        self.server = server
        self.database = folder / "test.sqlite3"
        self.log = folder / "server.log"
        self.environment = {
            "PATH": os.environ["PATH"],
            "SECRET_KEY": "s" * 50,
            "INTERNAL_API_KEY": KEY,
            "DJANGO_SUPERUSER_PASSWORD": "not-asked-for-here",
            "PORT": str(self.port),
            "DATABASE_URL": databases.url_of(self.database),
            "DEMO_WORD_DELAY": "0",
            # Longer than a client's patience: a stream on which nothing happens fails its test instead of holding it.
            "STREAM_HEARTBEAT_SECONDS": str(2 * TIMEOUT),
            "LLM_RETRY_DELAY": "0.01",
            # A busy machine refuses nothing by that.
            "OVERLOAD_SECONDS": "3600",
            # Nothing here speaks TLS, and a process that reads the machine's certificates takes 0.1 s longer to start.
            "SSL_CERT_FILE": os.devnull,
            **settings,
        }
        self.process: preloaded.Process | None = None
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers=AUTH,
            timeout=TIMEOUT,
            verify=False,  # noqa: S501 (see SSL_CERT_FILE)
            limits=BRIEF,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return preloaded.run("manage", *arguments, environment=self.environment, timeout=TIMEOUT)

    def start(self) -> None:
        commands = {
            "uvicorn": ["orchestrator_site.serve"],  # what `make run` starts
            "web": ["orchestrator_site.web"],
            "faulty": ["tests.faults.inside"],
            "daphne": ["daphne", "-b", "127.0.0.1", "-p", str(self.port), "orchestrator_site.asgi:application"],
        }
        with self.log.open("ab") as log:
            self.process = preloaded.start(*commands[self.server], environment=self.environment, out=log)
        self.wait_healthy()

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert self.process is not None and self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9"""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(TIMEOUT)

    def tell(self) -> None:
        """SIGTERM"""
        assert self.process is not None
        self.process.terminate()

    def stop(self) -> int:
        """SIGTERM, and how it ended."""
        self.tell()
        return self.end()

    def end(self) -> int:
        assert self.process is not None
        return self.process.wait(TIMEOUT)

    # --- what clients do ---

    def say(self, session_id: str, content: str, **message: Any) -> list[Frame]:
        """Send a user message and read its answer to the end."""
        return self.post({"type": "user_message", "content": content, **message}, session_id)

    def post(self, message: dict[str, Any], session_id: str, **envelope: Any) -> list[Frame]:
        with self.streaming(message, session_id, **envelope) as frames:
            return list(frames)

    @contextmanager
    def streaming(self, message: dict[str, Any], session_id: str, **envelope: Any) -> Iterator[Iterator[Frame]]:
        body = {"session_id": session_id, "message": message, **envelope}
        with self.http.stream("POST", "/agent/message/stream", json=body) as response:
            assert response.status_code == 200, response.read()
            yield parse_frames(response.iter_lines())

    @contextmanager
    def following(self, session_id: str, after: int = 0) -> Iterator[Iterator[Frame]]:
        """The session's stream from a position, as a browser resumes it."""
        headers = {"Last-Event-ID": str(after)} if after else {}
        with self.http.stream("GET", f"/sessions/{session_id}/stream", headers=headers) as response:
            assert response.status_code == 200, response.read()
            yield parse_frames(response.iter_lines())

    def history(self, session_id: str) -> list[tuple[str, str]]:
        answer = self.http.get(f"/sessions/{session_id}/history").json()
        return [(message["role"], message["content"]) for message in answer["messages"]]


@contextmanager
def running(folder: Path, migrated: Path, *, server: str = "uvicorn", **settings: str) -> Iterator[Server]:
    """A started server on a copy of the migrated database; killed at the end."""
    started = Server(folder, server=server, **settings)
    databases.copy(migrated, started.database)
    try:
        started.start()
        yield started
    finally:
        started.http.close()
        if started.process is not None and started.process.poll() is None:
            started.kill()
        databases.drop(started.database)


def until(frames: Iterator[Frame], kind: str) -> list[Frame]:
    """Read up to and including the first frame of a kind."""
    seen = []
    for frame in frames:
        seen.append(frame)
        if frame.type == kind:
            return seen
    raise AssertionError(f"the stream ended before {kind}: {[frame.data for frame in seen]}")


def eventually(check: Any, *, seconds: float = 15.0) -> Any:
    """Wait until `check()` returns something true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.02)
    return found

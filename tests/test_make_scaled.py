"""`make scaled`: everything on one machine behind one port, by the nginx settings that the documentation recommends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.server import AUTH, BRIEF, KEY, ROOT, eventually, free_port, parse_frames

pytestmark = [pytest.mark.nginx, pytest.mark.redis, pytest.mark.postgresql]

PASSWORD = "not-asked-for-here"


class Scaled:
    """The process of `make scaled`, with a folder and a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.log = folder.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {
            "PATH": os.environ["PATH"],
            "SECRET_KEY": "s" * 50,
            "INTERNAL_API_KEY": KEY,
            "DJANGO_SUPERUSER_PASSWORD": PASSWORD,
            "PORT": str(self.port),
            "DEMO_WORD_DELAY": "0",
            "WS_WITHOUT_KEY": "loopback",
        }
        self.http = httpx.Client(base_url=f"http://localhost:{self.port}", headers=AUTH, timeout=30, limits=BRIEF)

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator_site.scaled", str(self.folder)],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started = self.process
        eventually(lambda: "Try it" in self.log.read_text() or started.poll() is not None, seconds=90)
        assert started.poll() is None, self.log.read_text()

    def tell(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> int:
        assert self.process is not None
        return self.process.wait(30)

    def everything(self) -> dict[int, str]:
        """This process and all that it has started, and what they have started: by number, their commands."""
        parents, commands = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        assert self.process is not None
        family = {self.process.pid}
        while more := {child for child, parent in parents.items() if parent in family} - family:
            family |= more
        return {number: commands[number] for number in family}

    def processes_of(self, words: str) -> set[int]:
        return {number for number, command in self.everything().items() if words in command}


def are_gone(family: dict[int, str]) -> bool:
    return not any(Path(f"/proc/{number}").exists() for number in family)


@pytest.fixture(scope="module")
def scaled() -> Iterator[Scaled]:
    # PostgreSQL, which does not run as root, has to be able to get there.
    outside = Path(tempfile.mkdtemp(prefix="countersign-scaled-"))
    outside.chmod(0o755)
    made = Scaled(outside / "data")
    try:
        yield made
    finally:
        made.http.close()
        if made.process is not None and made.process.poll() is None:
            made.tell()
            made.tell()
            made.end()
        shutil.rmtree(outside, ignore_errors=True)


@pytest.fixture(scope="module")
def running(scaled: Scaled) -> Scaled:
    scaled.start()
    return scaled


def say(scaled: Scaled, session_id: str, content: str) -> list[str]:
    """What the README's `curl` does; the types of the frames of the answer."""
    body = {"session_id": session_id, "message": {"type": "user_message", "content": content}}
    with scaled.http.stream("POST", "/agent/message/stream", json=body) as response:
        assert response.status_code == 200, response.read()
        return [frame.type if frame.event != "done" else "done" for frame in parse_frames(response.iter_lines())]


def test_the_curl_of_the_readme_streams_an_answer(running: Scaled) -> None:
    types = say(running, "first", "Please explain what you can do")

    assert [types[0], types[-2], types[-1]] == ["turn_started", "turn_finished", "done"]
    assert types.count("assistant_message") > 20
    with running.http.stream("GET", "/sessions/first/stream") as response:
        assert next(parse_frames(response.iter_lines())).type == "turn_started", "nothing is held back"
    assert running.http.get("/readyz").json() == {"status": "ready", "database": "ok", "runner": "ok", "layer": "ok"}


def test_a_request_keeps_its_id_and_its_client_s_address_through_the_proxy(running: Scaled) -> None:
    with httpx.Client(
        base_url=running.http.base_url, headers={"X-Forwarded-For": "203.0.113.9"}, limits=BRIEF
    ) as client:
        answer = client.get("/sessions", headers={"X-Request-ID": "of-a-client"})
        own = client.get("/health", headers={"X-Request-ID": "not one"})

    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "of-a-client"
    assert re.fullmatch("[0-9a-f]{32}", own.headers["x-request-id"])
    log = (running.folder / "nginx/access.log").read_text()
    assert '"path":"/sessions","status":401' in log
    assert '"request_id":"of-a-client"' in log


def test_people_log_in_to_the_admin_through_the_port(running: Scaled) -> None:
    address = str(running.http.base_url)
    with httpx.Client(base_url=address, headers={"Origin": address}, timeout=30, limits=BRIEF) as browser:
        browser.get("/admin/login/")
        form = {"csrfmiddlewaretoken": browser.cookies["csrftoken"], "username": "admin", "password": PASSWORD}
        answer = browser.post("/admin/login/?next=/admin/", data=form)
        assert (answer.status_code, answer.headers["location"]) == (302, "/admin/")

        forged = browser.post("/admin/login/", data=form, headers={"Origin": "http://localhost:1"})
        assert forged.status_code == 403


def test_sockets_pass_and_nobody_is_local_behind_the_proxy(running: Scaled) -> None:
    address = f"ws://localhost:{running.port}/ws/sockets"
    with connect(f"{address}?live=1", additional_headers=AUTH) as chat:
        chat.send('{"type":"user_message","content":"Hello","role":"user"}')
        while json.loads(chat.recv(30))["type"] != "turn_finished":
            pass

    with pytest.raises(InvalidStatus) as refused:
        connect(address)
    assert refused.value.response.status_code == 401


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"content": b"x" * 3_000_000, "headers": {"Content-Type": "application/json"}}, 413, "too_large"),
        ({"headers": {"X-Long": "x" * 40_000}}, 431, "headers_too_large"),
    ],
)
def test_what_nginx_refuses_has_the_shape_of_every_other_refusal(
    running: Scaled, request_: dict[str, Any], status: int, code: str
) -> None:
    answer = running.http.post("/sessions", **request_)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["request_id"]


def test_what_ends_by_itself_is_started_again(running: Scaled) -> None:
    names = {"orchestrator_site.web": "web-1", "procrastinate worker": "worker-1", "redis-server": "redis"}
    killed = {words: min(running.processes_of(words)) for words in names}
    for number in killed.values():
        os.kill(number, signal.SIGKILL)

    for words, name in names.items():
        eventually(lambda name=name: f"{name} ended with -9 and is started again" in running.log.read_text())
        eventually(lambda words=words: running.processes_of(words) - {killed[words]})
    assert say(running, "after", "Hello")[-1] == "done"


def test_a_second_start_keeps_the_data_and_nothing_is_left_after_the_first(running: Scaled) -> None:
    family = running.everything()
    assert len(family) > 10
    begun = time.monotonic()
    running.tell()
    assert running.end() == 0
    assert time.monotonic() - begun < 30
    assert are_gone(family)

    running.start()

    assert "first" in [session["id"] for session in running.http.get("/sessions").json()["sessions"]]


def test_a_second_signal_ends_everything_at_once(running: Scaled) -> None:
    family = running.everything()

    running.tell(signal.SIGINT)
    eventually(lambda: "Stopping" in running.log.read_text())
    running.tell(signal.SIGINT)
    running.end()

    eventually(lambda: are_gone(family))

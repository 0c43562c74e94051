"""Two web processes and two workers under load, each restarted again and again: nothing lost, nothing doubled."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest

from orchestrator_site.local_services import Redis
from tests.scaled import Installation, Worker, installed
from tests.scripted_llm import Reply, ScriptedLLM, call, say
from tests.server import AUTH, BRIEF, Frame, Server, parse_frames

pytestmark = [pytest.mark.postgresql, pytest.mark.redis]

SESSIONS = 200
CLIENTS = 24
PATIENCE = 120.0
RESTART_SECONDS = 10.0
RESULT = "exit code 0"


def agent(body: dict[str, Any]) -> Reply:
    """Asks for a command, and when that has run says so."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return say(f"It says: {last['content']}")
    return call("execute_command", {"command": last["content"]})


class Client:
    """Somebody who talks to whichever web process answers, and who asks what became of what was cut."""

    def __init__(self, session_id: str, addresses: list[str]) -> None:
        self.session_id = session_id
        self.task = f"task of {session_id}"
        self._addresses = addresses
        self._http = httpx.Client(headers=AUTH, timeout=20, limits=BRIEF)
        self._until = 0.0

    def play(self) -> None:
        """One turn: a message, its approval, its tool result, its answer."""
        self._until = time.monotonic() + PATIENCE
        with self._http:
            self._say({"type": "user_message", "content": self.task}, has_said=lambda: self._count("user") == 1)
            call_id = self._found("pending-approvals", "pending_approvals")
            verdict = self._request("POST", f"/approvals/{call_id}/decision", {"decision": "approve"})
            assert verdict.status_code in (200, 409), verdict.text  # the first try may have counted
            assert self._found("open-calls", "open_calls") == call_id
            result = {"type": "tool_result", "call_id": call_id, "result": RESULT}
            self._say(result, has_said=lambda: self._count("tool") == 1)
            while self._count("assistant") < 2:
                self._pause()

    def _say(self, message: dict[str, Any], *, has_said: Callable[[], bool]) -> None:
        """Send a message until it is acknowledged. One that was cut may have been stored: it is asked for first."""
        body = {"session_id": self.session_id, "message": message}
        while True:
            try:
                with self._http.stream("POST", f"{self._address()}/agent/message/stream", json=body) as response:
                    if response.status_code == 200:
                        for _ in response.iter_lines():
                            pass
                        return
                    assert response.status_code == 503, response.read()
            except httpx.TransportError:
                if has_said():
                    return
            self._pause()

    def _found(self, path: str, key: str) -> str:
        """The call that is listed there, as soon as there is one."""
        while not (found := self._request("GET", f"/sessions/{self.session_id}/{path}").json()[key]):
            self._pause()
        assert len(found) == 1
        return str(found[0]["call_id"])

    def _count(self, role: str) -> int:
        answer = self._request("GET", f"/sessions/{self.session_id}/history")
        if answer.status_code == 404:
            return 0
        return sum(message["role"] == role for message in answer.json()["messages"])

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        while True:
            try:
                answer = self._http.request(method, f"{self._address()}{path}", json=body)
                if answer.status_code != 503:
                    assert answer.status_code < 500, answer.text
                    return answer
                assert answer.headers["Retry-After"]
            except httpx.TransportError:
                pass
            self._pause()

    def _address(self) -> str:
        return random.choice(self._addresses)

    def _pause(self) -> None:
        assert time.monotonic() < self._until, f"{self.session_id} waits for something that does not come"
        time.sleep(0.2)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


def restart_in_turn(installation: Installation, redis: Redis, done: Event, restarted: list[Any]) -> None:
    """Every ten seconds one process is stopped or killed and started again; Redis with the others, and forgets all."""
    processes: list[Server | Worker | Redis] = []
    for web, worker in zip(installation.webs, installation.workers, strict=True):
        processes += [worker, web]
    processes.insert(2, redis)
    for number, process in enumerate(processes * 10):
        if done.wait(RESTART_SECONDS):
            return
        if isinstance(process, Redis):
            process.stop(signal.SIGKILL)
        elif number % 3 == 0:
            process.kill()
        else:
            assert process.stop() == 0
        process.start()
        restarted.append(process)


def test_200_sessions_over_restarts_of_every_process(
    tmp_path: Path, scaled_template: Path, llm: ScriptedLLM, redis: Redis
) -> None:
    llm.route_to = "coder"
    llm.default = agent
    sessions = [f"s{number}" for number in range(SESSIONS)]
    done, restarted = Event(), list[Any]()

    # The lease is the usual one: on a busy machine a shorter one runs out under runners that live.
    settings = {"REDIS_URL": redis.url, "TURN_LEASE_SECONDS": "10"}
    with installed(tmp_path, scaled_template, llm, webs=2, workers=2, **settings) as installation:
        addresses = [web.url for web in installation.webs]
        restarting = Thread(target=restart_in_turn, args=(installation, redis, done, restarted))
        restarting.start()
        try:
            with ThreadPoolExecutor(CLIENTS) as pool:
                for played in [pool.submit(Client(session_id, addresses).play) for session_id in sessions]:
                    played.result()
            while len(restarted) < 5 and restarting.is_alive():  # each process, and Redis
                sessions.append(f"s{len(sessions)}")
                Client(sessions[-1], addresses).play()
        finally:
            done.set()
            restarting.join()

        assert len(restarted) >= 5
        for session_id in sessions:
            assert_nothing_lost_or_doubled(installation.web, session_id)
        assert installation.rows("SELECT DISTINCT status FROM sessions_app_turn") == [("completed",)]
        assert installation.rows("SELECT count(*) FROM sessions_app_turn") == [(len(sessions),)]
        assert installation.rows("SELECT count(*) FROM agents_app_decision") == [(len(sessions),)]
        assert installation.rows("SELECT count(*), count(DISTINCT target) FROM events_app_auditentry") == [
            (len(sessions), len(sessions))
        ]
    assert llm.refused == []


def assert_nothing_lost_or_doubled(web: Server, session_id: str) -> None:
    task, answer = f"task of {session_id}", f"It says: {RESULT}"
    assert web.history(session_id) == [("user", task), ("assistant", ""), ("tool", RESULT), ("assistant", answer)]

    frames = whole_stream(web, session_id)
    numbers = [frame.seq for frame in frames]
    assert numbers == sorted(set(numbers))
    kinds = [frame.type for frame in frames]
    once = ("turn_started", "tool_call", "approval_resolved", "turn_finished")
    assert [kinds.count(kind) for kind in once] == [1] * len(once), kinds


def whole_stream(web: Server, session_id: str) -> list[Frame]:
    frames: list[Frame] = []
    with web.http.stream("GET", f"/sessions/{session_id}/stream") as response:
        for frame in parse_frames(response.iter_lines()):
            frames.append(frame)
            if frame.type == "turn_finished":
                return frames
    raise AssertionError(f"the stream of {session_id} ended early")

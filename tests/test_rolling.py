"""A new version is rolled out: every process is restarted in turn, and the schema grows in between."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import databases
from tests.scaled import Installation, installed
from tests.scripted_llm import Reply, ScriptedLLM, call, say
from tests.server import AUTH, BRIEF, TIMEOUT, Frame, eventually, parse_frames

pytestmark = pytest.mark.postgresql

CLIENTS = 6


def answer(request: dict[str, Any]) -> Reply:
    """A tool call first, and then what came of it."""
    last = request["messages"][-1]
    if last["role"] == "tool":
        return say(f"It says {last['content']}", pause=0.02)
    return call("read_file", {"path": "a.md"}, text="Let me see.")


class Client:
    """Talks to any web process, as a gateway would: asks again what was refused, and goes on reading by number."""

    def __init__(self, session_id: str, urls: list[str]) -> None:
        self.session_id = session_id
        self.asked: list[str] = []
        options = {"headers": AUTH, "timeout": TIMEOUT, "verify": False, "limits": BRIEF}
        self._webs = cycle([httpx.Client(base_url=url, **options) for url in urls])  # type: ignore[arg-type]
        self._position = 0

    def converse(self, text: str) -> None:
        """One turn: a message, its tool call, the result, the end."""
        self.asked.append(text)
        called = self._send({"type": "user_message", "content": text, "agent_type": "coder"})
        assert called.type == "tool_call", called.data
        ended = self._send({"type": "tool_result", "call_id": called.data["call_id"], "result": text})
        assert ended.data["status"] == "completed", ended.data

    def _send(self, message: dict[str, Any]) -> Frame:
        """Have a message accepted by whoever takes it; the frame that ends its answer."""
        body = {"session_id": self.session_id, "message": message}
        for web in self._webs:
            try:
                with web.stream("POST", "/agent/message/stream", json=body) as response:
                    if response.status_code == 503:
                        continue
                    assert response.status_code == 200, response.read()
                    end = self._read(response)
            except httpx.ConnectError:
                continue
            return end or self._read_on()
        raise AssertionError

    def _read_on(self) -> Frame:
        """The rest of an answer that broke off."""
        for web in self._webs:
            headers = {"Last-Event-ID": str(self._position)}
            try:
                with web.stream("GET", f"/sessions/{self.session_id}/stream", headers=headers) as response:
                    if response.status_code == 200 and (end := self._read(response)):
                        return end
            except httpx.ConnectError:
                continue
        raise AssertionError

    def _read(self, response: httpx.Response) -> Frame | None:
        for frame in parse_frames(response.iter_lines()):
            if frame.id is not None:
                assert frame.seq > self._position, "no number comes twice"
                self._position = frame.seq
            if frame.type in ("tool_call", "turn_finished"):
                return frame
        return None


@pytest.fixture
def scaled(tmp_path: Path, scaled_template: Path, llm: ScriptedLLM) -> Iterator[Installation]:
    llm.default = answer
    with installed(tmp_path, scaled_template, llm, webs=2, workers=2, TURN_LEASE_SECONDS="600") as started:
        yield started


def roll_out(scaled: Installation) -> None:
    databases.change(scaled.database, "ALTER TABLE sessions_app_turn ADD COLUMN note text")
    for worker in scaled.workers:
        begun = scaled.rows("SELECT max(id) FROM procrastinate_workers")
        assert worker.stop() == 0
        worker.start()
        eventually(lambda begun=begun: scaled.rows("SELECT max(id) FROM procrastinate_workers") > begun)
    for server in scaled.webs:
        assert server.stop() == 0
        server.start()


def test_a_rollout_drops_no_request_and_no_turn(scaled: Installation, llm: ScriptedLLM) -> None:
    clients = [Client(f"s{number}", [server.url for server in scaled.webs]) for number in range(CLIENTS)]
    is_over = threading.Event()

    def talk(client: Client) -> None:
        while not is_over.is_set() or len(client.asked) < 3:
            client.converse(f"message {len(client.asked)}")

    with ThreadPoolExecutor(CLIENTS) as pool:
        talking = [pool.submit(talk, client) for client in clients]
        try:
            eventually(lambda: all(client.asked for client in clients))
            roll_out(scaled)
        finally:
            is_over.set()
        for each in talking:
            each.result(TIMEOUT)

    turns = scaled.rows("SELECT session_id, status, lost_count FROM sessions_app_turn")
    assert {(status, lost) for _, status, lost in turns} == {("completed", 0)}
    assert len(turns) == sum(len(client.asked) for client in clients)
    for client in clients:
        said = [
            (role, text) for role, text in scaled.web.history(client.session_id) if role == "user" or "says" in text
        ]
        assert said == [pair for text in client.asked for pair in (("user", text), ("assistant", f"It says {text}"))]
    assert llm.refused == []

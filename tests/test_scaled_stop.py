"""What SIGTERM does to the processes of a scaled installation: nothing is lost, and they end."""

import asyncio
import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from orchestrator_site.local_services import Redis
from tests import databases
from tests.gateway import Gateway, gateway
from tests.scaled import Installation, Worker, installed
from tests.scripted_llm import Gate, ScriptedLLM, hold, say
from tests.server import AUTH, BRIEF, KEY, TIMEOUT, Frame, Server, eventually, parse_frames

pytestmark = pytest.mark.postgresql

Behind = tuple[Installation, Gateway]
# What was promised of every process.
LONGEST = 30


@pytest.fixture
def web(tmp_path: Path, scaled_template: Path, llm: ScriptedLLM) -> Iterator[Server]:
    """A web process without a worker."""
    with installed(tmp_path, scaled_template, llm, workers=0) as scaled:
        yield scaled.web


@pytest.fixture
def behind(tmp_path: Path, scaled_template: Path, llm: ScriptedLLM) -> Iterator[Behind]:
    """The same, and the way to their database."""
    place = tmp_path / "test.sqlite3"
    with (
        gateway(databases.url_of(place)) as way,
        installed(tmp_path, scaled_template, llm, TURN_LEASE_SECONDS="600", DATABASE_URL=way.url) as started,
    ):
        yield started, way


@pytest.fixture
def scaled(tmp_path: Path, scaled_template: Path, llm: ScriptedLLM) -> Iterator[Installation]:
    """A web process and a worker, whose leases nobody waits for."""
    with installed(
        tmp_path, scaled_template, llm, TURN_LEASE_SECONDS="600", TURN_MAX_OUTPUT_CHARS="10000000"
    ) as started:
        yield started


def user(content: str) -> dict[str, str]:
    return {"type": "user_message", "content": content}


def turns(scaled: Installation) -> list[tuple[Any, ...]]:
    """Status, attempts and losses of every turn."""
    return databases.rows(scaled.database, "SELECT status, attempt, lost_count FROM sessions_app_turn")


def ask(server: Server, sessions: list[str]) -> None:
    """Have a turn run in each session, and nobody read its answer."""
    for session_id in sessions:
        message = {**user("go"), "agent_type": "coder"}
        with server.streaming(message, session_id):
            pass


def owners(scaled: Installation) -> set[str]:
    query = "SELECT DISTINCT owner FROM sessions_app_turn WHERE status = 'running' AND lease_until > now()"
    return {owner for (owner,) in databases.rows(scaled.database, query)}


def waiting_jobs(scaled: Installation) -> set[str]:
    """The sessions that the next worker is told of."""
    query = "SELECT args->>'session_id' FROM procrastinate_jobs WHERE status = 'todo' AND task_name = 'run_turns'"
    return {session_id for (session_id,) in databases.rows(scaled.database, query)}


@contextmanager
def taking_at_most(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


def answered(scaled: Installation, sessions: list[str], text: str) -> None:
    """Every turn was answered, once."""
    eventually(lambda: {status for status, *_ in turns(scaled)} == {"completed"}, seconds=TIMEOUT)
    assert [scaled.web.history(each) for each in sessions] == [[("user", "go"), ("assistant", text)]] * len(sessions)


# --- Web processes --------------------------------------------------------------------------------------------------


async def read_stream(server: Server, session_id: str, seen: set[tuple[str, str]]) -> bytes:
    """A session's stream until it ends, as bytes; who has read the half sentence is among those that have `seen` it."""
    received = b""
    async with (
        httpx.AsyncClient(base_url=server.url, headers=AUTH, timeout=TIMEOUT, limits=BRIEF) as client,
        client.stream("GET", f"/sessions/{session_id}/stream") as response,
    ):
        assert response.status_code == 200
        async for piece in response.aiter_raw():
            received += piece
            if b'" a "' in received:
                seen.add(("stream", session_id))
    return received


async def read_socket(server: Server, session_id: str, seen: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """The same for a live socket, until it is closed to come again."""
    received = []
    url = f"{server.url.replace('http', 'ws')}/ws/{session_id}?live=1&tokens=1&after=0"
    async with connect(url, additional_headers=AUTH, ping_interval=None) as socket:
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                received.append(json.loads(await socket.recv()))
                if received[-1].get("token") == " a ":
                    seen.add(("socket", session_id))
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
    return received[1:]  # the first one names the position


@pytest.mark.redis
def test_fifty_streams_of_a_stopping_web_process_end_at_once_and_go_on_elsewhere(
    tmp_path: Path, scaled_template: Path, llm: ScriptedLLM, redis: Redis
) -> None:
    with installed(tmp_path, scaled_template, llm, webs=2, REDIS_URL=redis.url) as scaled:
        streams_go_on_elsewhere(scaled, llm)


def streams_go_on_elsewhere(scaled: Installation, llm: ScriptedLLM) -> None:
    gate = Gate()
    llm.default = hold("Half a ", "sentence.", gate=gate)
    other, stopping = scaled.webs
    sessions = [f"s{number}" for number in range(25)]
    ask(other, sessions)
    llm.wait_for(lambda llm: len(llm.answers) == 25)

    async def follow() -> tuple[list[bytes], list[list[dict[str, Any]]]]:
        seen: set[tuple[str, str]] = set()
        streams = [asyncio.create_task(read_stream(stopping, each, seen)) for each in sessions]
        sockets = [asyncio.create_task(read_socket(stopping, each, seen)) for each in sessions]
        await asyncio.to_thread(eventually, lambda: len(seen) == 50)
        stopping.tell()
        return await asyncio.gather(*streams), await asyncio.gather(*sockets)

    with taking_at_most(LONGEST):
        read, shown = asyncio.run(follow())
        assert stopping.end() == 0
    gate.open()
    answered(scaled, sessions, "Half a sentence.")

    assert "Traceback" not in stopping.log.read_text()
    for session_id, received, messages in zip(sessions, read, shown, strict=True):
        assert received.endswith(b"\n\n"), "no frame was cut"
        before = list(parse_frames(iter(received.decode().split("\n"))))
        assert "".join(frame.data.get("token", "") for frame in before) == "Half a "
        assert messages == [{"id": frame.id, **frame.data} for frame in before]
        whole = followed(other, session_id)
        assert [frame.id for frame in [*before, *followed(other, session_id, before[-1].seq)]] == [
            frame.id for frame in whole
        ]


def followed(server: Server, session_id: str, after: int = 0) -> list[Frame]:
    seen = []
    with server.following(session_id, after) as stream:
        for frame in stream:
            seen.append(frame)
            if frame.type == "turn_finished":
                break
    return seen


def test_who_keeps_a_connection_is_answered_and_told_that_it_closes(web: Server) -> None:
    kept = [http.client.HTTPConnection("127.0.0.1", web.port, timeout=TIMEOUT) for _ in range(2)]
    for connection in kept:
        connection.request("GET", "/health")
        connection.getresponse().read()
    web.tell()
    eventually(lambda: refuses(web))

    kept[0].request("POST", "/sessions", headers=AUTH)
    made = kept[0].getresponse()
    kept[1].request("GET", "/sessions/none/stream", headers=AUTH)
    stream = kept[1].getresponse()

    assert (made.status, made.headers["connection"]) == (201, "close")
    assert (stream.status, stream.headers["retry-after"], stream.headers["connection"]) == (503, "1", "close")
    assert json.loads(stream.read())["code"] == "unavailable"
    assert web.end() == 0
    for connection in kept:
        connection.close()


def test_whoever_could_connect_to_a_stopping_web_process_is_answered(web: Server) -> None:
    answers: list[int] = []

    def post() -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=TIMEOUT)
            try:
                connection.connect()
            except ConnectionRefusedError:
                return
            connection.request("POST", "/sessions", headers=AUTH)
            answers.append(connection.getresponse().status)
            connection.close()

    with ThreadPoolExecutor(16) as pool:
        posting = [pool.submit(post) for _ in range(16)]
        eventually(lambda: len(answers) > 100)
        web.tell()
        for each in posting:
            each.result(TIMEOUT)

    assert set(answers) == {201}
    assert web.end() == 0


@contextmanager
def half_a_request(server: Server) -> Iterator[socket.socket]:
    """A client that sends the beginning of a message and then nothing."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as client:
        head = f"POST /sessions HTTP/1.1\r\nHost: localhost\r\nX-Internal-Auth: {KEY}\r\nContent-Length: 9\r\n\r\n{{"
        client.sendall(head.encode())
        yield client


@contextmanager
def a_reader_of_nothing(server: Server, session_id: str) -> Iterator[None]:
    """A client that asks for a stream and takes none of it."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        path = f"/sessions/{session_id}/stream"
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Internal-Auth: {KEY}\r\n\r\n".encode())
        yield


def test_a_reader_of_nothing_and_half_a_request_hold_up_no_stop(scaled: Installation, llm: ScriptedLLM) -> None:
    llm.default = say("", pieces=["x" * 100_000] * 60)
    web = scaled.web
    with web.streaming({**user("go"), "agent_type": "coder"}, "long") as frames:
        list(frames)

    with half_a_request(web), a_reader_of_nothing(web, "long"), taking_at_most(LONGEST):
        web.http.get("/health")  # both are known to the server
        assert web.stop() == 0


def test_a_second_signal_ends_a_web_process_at_once(web: Server) -> None:
    with half_a_request(web):
        web.http.get("/health")
        web.tell()
        eventually(lambda: refuses(web))
        with taking_at_most(5):
            web.tell()
            assert web.end() == -signal.SIGTERM


def test_a_web_process_ends_without_its_database(behind: Behind) -> None:
    scaled, way = behind
    way.close()
    assert scaled.web.http.get("/sessions").status_code == 503

    with taking_at_most(LONGEST):
        assert scaled.web.stop() == 0


def refuses(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    return False


# --- Workers --------------------------------------------------------------------------------------------------------

TWENTY = [f"s{number}" for number in range(20)]


def stopping_one(scaled: Installation, llm: ScriptedLLM, gate: Gate) -> Worker:
    """A worker that runs twenty turns, whose model hangs."""
    llm.default = hold("Half a ", "sentence.", gate=gate)
    ask(scaled.web, TWENTY)
    llm.wait_for(lambda llm: len(llm.answers) == 20)
    return scaled.workers[0]


def test_twenty_turns_of_a_stopping_worker_are_left_to_others(scaled: Installation, llm: ScriptedLLM) -> None:
    gate = Gate()
    stopping = stopping_one(scaled, llm, gate)

    with taking_at_most(LONGEST):
        assert stopping.stop() == 0

    assert turns(scaled) == [("running", 1, 0)] * 20
    assert (owners(scaled), waiting_jobs(scaled)) == (set(), set(TWENTY)), "whoever comes begins at once"
    assert "Traceback" not in stopping.log.read_text()
    gate.open()
    scaled.add_worker()
    answered(scaled, TWENTY, "Half a sentence.")
    assert turns(scaled) == [("completed", 2, 0)] * 20


def test_a_message_behind_a_turn_that_is_handed_over_is_answered_after_it(
    scaled: Installation, llm: ScriptedLLM
) -> None:
    gate = Gate()
    llm.script(hold("Half a ", "sentence.", gate=gate), say("Whole."), say("And the next."))
    ask(scaled.web, ["s"])
    llm.wait_for(lambda llm: len(llm.answers) == 1)
    ask(scaled.web, ["s"])

    assert scaled.workers[0].stop() == 0
    gate.open()
    scaled.add_worker()

    eventually(lambda: [status for status, *_ in turns(scaled)] == ["completed"] * 2)
    assert [text for role, text in scaled.web.history("s") if role == "assistant"] == ["Whole.", "And the next."]


def test_turns_are_handed_over_to_a_database_that_comes_back_in_time(behind: Behind, llm: ScriptedLLM) -> None:
    gate, (scaled, way) = Gate(), behind
    stopping = stopping_one(scaled, llm, gate)
    way.close()
    stopping.tell()
    eventually(lambda: stopping.log.read_text().count('"turn_abandoned"') >= 20)

    way.open()
    assert stopping.end() == 0

    assert (turns(scaled), owners(scaled)) == ([("running", 1, 0)] * 20, set())
    gate.open()
    eventually(lambda: scaled.web.http.get("/sessions").status_code == 200)
    scaled.add_worker()
    answered(scaled, TWENTY, "Half a sentence.")


def test_a_worker_ends_without_its_database_and_its_turns_go_on_elsewhere(behind: Behind, llm: ScriptedLLM) -> None:
    gate, (scaled, way) = Gate(), behind
    stopping = stopping_one(scaled, llm, gate)
    way.close()

    with taking_at_most(LONGEST):
        assert stopping.stop() == 0

    way.open()
    gate.open()
    eventually(lambda: scaled.web.http.get("/sessions").status_code == 200)
    databases.change(scaled.database, "UPDATE sessions_app_turn SET lease_until = now()")
    scaled.add_worker()
    answered(scaled, TWENTY, "Half a sentence.")


def test_a_second_signal_ends_a_worker_at_once(behind: Behind, llm: ScriptedLLM) -> None:
    gate, (scaled, way) = Gate(), behind
    stopping = stopping_one(scaled, llm, gate)
    way.close()
    stopping.tell()
    eventually(lambda: "Stopping" in stopping.log.read_text())

    with taking_at_most(5):
        stopping.tell()
        assert stopping.end() == -signal.SIGTERM
    gate.open()

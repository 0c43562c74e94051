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
from tests.scaled import Gateway, Installation, Worker, installation
from tests.scripted_llm import Gate, ScriptedLLM, hold, say
from tests.server import AUTH, KEY, TIMEOUT, Frame, Server, eventually, parse_frames

pytestmark = [pytest.mark.postgresql, pytest.mark.redis]

# What was promised of every process.
LONGEST = 30


@pytest.fixture
def scaled(tmp_path: Path, scaled_template: Path, redis: Redis, llm: ScriptedLLM) -> Iterator[Installation]:
    with installation(tmp_path, scaled_template, redis, LLM_BASE_URL=llm.url) as made:
        yield made


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


def answered(scaled: Installation, server: Server, sessions: list[str], text: str) -> None:
    """Every turn was answered, once."""
    eventually(lambda: {status for status, *_ in turns(scaled)} == {"completed"}, seconds=TIMEOUT)
    assert [server.history(each) for each in sessions] == [[("user", "go"), ("assistant", text)]] * len(sessions)


# --- Web processes --------------------------------------------------------------------------------------------------


async def read_stream(server: Server, session_id: str, seen: set[tuple[str, str]]) -> bytes:
    """A session's stream until it ends, as bytes; who has read the half sentence is among those that have `seen` it."""
    received = b""
    async with (
        httpx.AsyncClient(base_url=server.url, headers=AUTH, timeout=TIMEOUT) as client,
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


def test_fifty_streams_of_a_stopping_web_process_end_at_once_and_go_on_elsewhere(
    scaled: Installation, llm: ScriptedLLM
) -> None:
    gate = Gate()
    llm.default = hold("Half a ", "sentence.", gate=gate)
    stopping, other = scaled.web(), scaled.web()
    scaled.worker()
    sessions = [f"s{number}" for number in range(25)]
    ask(other, sessions)
    llm.wait_for(lambda llm: len(llm.answers) == 25)

    async def follow() -> tuple[list[bytes], list[list[dict[str, Any]]]]:
        seen: set[tuple[str, str]] = set()
        streams = [asyncio.create_task(read_stream(stopping, each, seen)) for each in sessions]
        sockets = [asyncio.create_task(read_socket(stopping, each, seen)) for each in sessions]
        await asyncio.to_thread(eventually, lambda: len(seen) == 50)
        send(stopping, signal.SIGTERM)
        return await asyncio.gather(*streams), await asyncio.gather(*sockets)

    with taking_at_most(LONGEST):
        read, shown = asyncio.run(follow())
        assert wait(stopping) == 0
    gate.open()
    answered(scaled, other, sessions, "Half a sentence.")

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


def test_who_keeps_a_connection_is_answered_and_told_that_it_closes(scaled: Installation) -> None:
    server = scaled.web()
    kept = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT) for _ in range(2)]
    for connection in kept:
        connection.request("GET", "/health")
        connection.getresponse().read()
    send(server, signal.SIGTERM)
    eventually(lambda: refuses(server))

    kept[0].request("POST", "/sessions", headers=AUTH)
    made = kept[0].getresponse()
    kept[1].request("GET", "/sessions/none/stream", headers=AUTH)
    stream = kept[1].getresponse()

    assert (made.status, made.headers["connection"]) == (201, "close")
    assert (stream.status, stream.headers["retry-after"], stream.headers["connection"]) == (503, "1", "close")
    assert json.loads(stream.read())["code"] == "unavailable"
    assert wait(server) == 0


def test_whoever_could_connect_to_a_stopping_web_process_is_answered(scaled: Installation) -> None:
    server = scaled.web()
    answers: list[int] = []

    def post() -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
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
        send(server, signal.SIGTERM)
        for each in posting:
            each.result(TIMEOUT)

    assert set(answers) == {201}
    assert wait(server) == 0


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
    llm.default = say("x" * 6_000_000, pieces=["x" * 100_000] * 60)
    server = scaled.web()
    scaled.worker(TURN_MAX_OUTPUT_CHARS="10000000")
    with server.streaming({**user("go"), "agent_type": "coder"}, "long") as frames:
        list(frames)

    with half_a_request(server), a_reader_of_nothing(server, "long"), taking_at_most(LONGEST):
        server.http.get("/health")  # both are known to the server
        assert server.stop() == 0


def test_a_second_signal_ends_a_web_process_at_once(scaled: Installation) -> None:
    server = scaled.web()

    with half_a_request(server):
        server.http.get("/health")
        send(server, signal.SIGTERM)
        eventually(lambda: refuses(server))
        with taking_at_most(2):
            send(server, signal.SIGTERM)
            assert wait(server) == -signal.SIGTERM


def test_a_web_process_ends_without_its_database(scaled: Installation) -> None:
    with gateway(scaled) as way:
        server = scaled.web(DATABASE_URL=way.url)
        way.close()
        assert server.http.get("/sessions").status_code == 503

        with taking_at_most(LONGEST):
            assert server.stop() == 0


def send(server: Server, number: signal.Signals) -> None:
    assert server.process is not None
    server.process.send_signal(number)


def wait(server: Server) -> int:
    assert server.process is not None
    return server.process.wait(TIMEOUT)


def refuses(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    return False


# --- Workers --------------------------------------------------------------------------------------------------------

TWENTY = [f"s{number}" for number in range(20)]


@contextmanager
def gateway(scaled: Installation) -> Iterator[Gateway]:
    """A way to the database that a test can close."""
    way = Gateway(databases.url_of(scaled.database))
    try:
        yield way
    finally:
        way.end()


def with_twenty_turns(scaled: Installation, llm: ScriptedLLM, gate: Gate, **settings: str) -> tuple[Server, Worker]:
    """A worker that runs twenty turns whose model hangs, and the web process that was asked."""
    llm.default = hold("Half a ", "sentence.", gate=gate)
    server, worker = scaled.web(), scaled.worker(**settings)
    ask(server, TWENTY)
    llm.wait_for(lambda llm: len(llm.answers) == 20)
    return server, worker


def test_twenty_turns_of_a_stopping_worker_are_left_to_others(scaled: Installation, llm: ScriptedLLM) -> None:
    gate = Gate()
    server, stopping = with_twenty_turns(scaled, llm, gate, TURN_LEASE_SECONDS="600")

    with taking_at_most(LONGEST):
        assert stopping.stop() == 0

    assert turns(scaled) == [("running", 1, 0)] * 20
    assert (owners(scaled), waiting_jobs(scaled)) == (set(), set(TWENTY)), "whoever comes begins at once"
    assert "Traceback" not in stopping.log.read_text()
    gate.open()
    scaled.worker()
    answered(scaled, server, TWENTY, "Half a sentence.")
    assert turns(scaled) == [("completed", 2, 0)] * 20


def test_turns_are_handed_over_to_a_database_that_comes_back_in_time(scaled: Installation, llm: ScriptedLLM) -> None:
    gate = Gate()
    with gateway(scaled) as way:
        server, stopping = with_twenty_turns(scaled, llm, gate, DATABASE_URL=way.url, TURN_LEASE_SECONDS="600")
        way.close()
        stopping.send(signal.SIGTERM)
        eventually(lambda: stopping.log.read_text().count('"turn_abandoned"') == 20)

        way.open()
        assert stopping.wait() == 0

    assert turns(scaled) == [("running", 1, 0)] * 20
    assert owners(scaled) == set()
    gate.open()
    scaled.worker()
    answered(scaled, server, TWENTY, "Half a sentence.")


def test_a_worker_ends_without_its_database_and_its_turns_go_on_elsewhere(
    scaled: Installation, llm: ScriptedLLM
) -> None:
    gate = Gate()
    with gateway(scaled) as way:
        server, stopping = with_twenty_turns(scaled, llm, gate, DATABASE_URL=way.url, TURN_LEASE_SECONDS="2")
        way.close()

        with taking_at_most(LONGEST):
            assert stopping.stop() == 0

    gate.open()
    scaled.worker()
    answered(scaled, server, TWENTY, "Half a sentence.")


def test_a_second_signal_ends_a_worker_at_once(scaled: Installation, llm: ScriptedLLM) -> None:
    gate = Gate()
    with gateway(scaled) as way:
        _, stopping = with_twenty_turns(scaled, llm, gate, DATABASE_URL=way.url)
        way.close()
        stopping.send(signal.SIGTERM)
        eventually(lambda: "Stopping" in stopping.log.read_text())

        with taking_at_most(2):
            stopping.send(signal.SIGTERM)
            assert stopping.wait() == -signal.SIGTERM
    gate.open()


def test_a_message_behind_a_turn_that_is_handed_over_is_answered_after_it(
    scaled: Installation, llm: ScriptedLLM
) -> None:
    gate = Gate()
    llm.script(hold("Half a ", "sentence.", gate=gate), say("Whole."), say("And the next."))
    server, stopping = scaled.web(), scaled.worker(TURN_LEASE_SECONDS="600")
    ask(server, ["s"])
    llm.wait_for(lambda llm: len(llm.answers) == 1)
    ask(server, ["s"])

    assert stopping.stop() == 0
    gate.open()
    scaled.worker()

    eventually(lambda: [status for status, *_ in turns(scaled)] == ["completed"] * 2)
    assert [text for role, text in server.history("s") if role == "assistant"] == ["Whole.", "And the next."]

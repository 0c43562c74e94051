"""Many streams at once, readers that take nothing, peers that are gone without a word."""

import re
import socket
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.scripted_llm import ScriptedLLM, say
from tests.server import Server, eventually, running
from tests.test_socket import (
    frame,
    is_held,
    on_coder,
    raw_socket,
    refusal,
)
from tests.test_stream_cost import SLACK, RawStream, many_streams, steady

STREAMS = 300
KIB_EACH = 100
SLOW = 10
MIB_EACH = 2
TURNS = 30


def megabytes(server: Server) -> float:
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def test_300_streams_cost_no_thread_and_little_memory_and_all_read_the_end_of_a_turn(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url) as server:
        server.say(on_coder(server, "many"), "Hello")
        with many_streams(server, ["many"] * STREAMS):
            pass  # what the first ones cost once is not the question
        before, memory = steady(server, lambda now: now.files < STREAMS), megabytes(server)

        with many_streams(server, ["many"] * STREAMS) as streams:
            steady(server, lambda now: now.threads <= before.threads + SLACK)
            assert megabytes(server) - memory < STREAMS * KIB_EACH / 1024
            last = [each.id for each in server.say("many", "Once more") if each.type == "turn_finished"]
            for stream in streams:
                stream.read_until(f"id: {last[0]}\n".encode())

        steady(server, lambda now: now.files <= before.files + SLACK and now.threads <= before.threads + SLACK)


@pytest.mark.parametrize("kind", ["stream", "socket"])
def test_readers_that_take_nothing_cost_little_memory_and_nobody_else_anything(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM, kind: str
) -> None:
    text = "x" * 60_000
    llm.default = say(text, pieces=[text[start : start + 100] for start in range(0, len(text), 100)])
    with running(tmp_path, migrated, STREAM_STALL_SECONDS="3", LLM_BASE_URL=llm.url) as server, ExitStack() as stack:
        on_coder(server, "slow")
        for _ in range(TURNS):
            assert server.say("slow", "Talk a lot.")[-1].event == "done"
        with many_streams(server, ["slow"] * SLOW):
            pass  # what the first ones cost once is not the question
        memory = megabytes(server)

        readers = [stack.enter_context(closing(deaf(server, kind))) for _ in range(SLOW)]
        answer = server.say("slow", "Talk a lot.")
        assert [each.type for each in answer[-3:-1]] == ["assistant_message", "turn_finished"]
        seen = [megabytes(server)]

        def all_are_cut() -> bool:
            seen.append(megabytes(server))
            return server.log.read_text().count("reader_stalled") == SLOW

        eventually(all_are_cut, seconds=60)
        assert max(seen) - memory < SLOW * MIB_EACH
        eventually(lambda: not any(is_held(server, reader) for reader in readers))
        assert "Traceback" not in server.log.read_text()


def deaf(server: Server, kind: str) -> socket.socket:
    """A reader of all that the session ever said, which takes nothing of it."""
    if kind == "socket":
        return raw_socket(server, "/ws/slow?live=1&tokens=1&after=0")
    reader = RawStream(server, "slow", receive_buffer=4_096)
    return reader.socket


# --- Peers that are gone ---------------------------------------------------------------------------------------------

IMPATIENT = {"STREAM_HEARTBEAT_SECONDS": "0.5", "STREAM_STALL_SECONDS": "1", "STREAMS_AT_ONCE": "1"}


@pytest.mark.parametrize("path", ["/ws/gone", "/ws/gone?live=1"])
def test_a_peer_that_answers_no_ping_is_cut_and_gives_back_its_place(tmp_path: Path, migrated: Path, path: str) -> None:
    with running(tmp_path, migrated, **IMPATIENT) as server, closing(raw_socket(server, path)) as gone:
        assert refusal(server).status_code == 503
        received = b""
        while not received.endswith(b"keepalive ping timeout"):
            received += gone.recv(1000)
            assert received.count(b"\x89\x04") < 10, "it is pinged for ever"

        assert b"\x89\x04" in received, "it was pinged"
        assert received.endswith(b"\x88\x18\x03\xf3keepalive ping timeout")  # 1011
        eventually(lambda: server.http.get("/sessions/nobody/stream").status_code == 404)
        eventually(lambda: not is_held(server, gone))


def test_a_peer_that_answers_pings_and_says_nothing_stays(tmp_path: Path, migrated: Path) -> None:
    with running(tmp_path, migrated, **IMPATIENT) as server, closing(raw_socket(server, "/ws/quiet")) as quiet:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += quiet.recv(1)
        for _ in range(6):  # longer than any peer is waited for
            ping = quiet.recv(6)
            assert ping[:2] == b"\x89\x04"
            quiet.sendall(frame(10, ping[2:]))
        quiet.sendall(frame(1, b'{"type":"still here"}'))

        assert b"Unknown message type: still here" in quiet.recv(1000)


def test_more_than_one_process_may_hold_is_told_at_the_start(tmp_path: Path, migrated: Path) -> None:
    with running(tmp_path, migrated, STREAMS_AT_ONCE="10000000") as server:
        assert "too few for STREAMS_AT_ONCE streams" in server.log.read_text()

"""What survives: clients that leave, streams that are resumed, processes that are killed, stopped or paused."""

import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from events_app.database import THREADS
from tests import databases
from tests.databases import ON_POSTGRESQL
from tests.pausing import pause_in_a_turn
from tests.scripted_llm import Gate, ScriptedLLM, hold, say
from tests.server import BRIEF, KEY, Frame, Server, eventually, running, until

LONG = " ".join(f"word{number}" for number in range(60))


@pytest.fixture
def session_id() -> str:
    return str(uuid.uuid4())


def on_coder(server: Server, session_id: str) -> None:
    server.post({"type": "switch_agent", "agent_type": "coder"}, session_id)


def user(content: str) -> dict[str, str]:
    return {"type": "user_message", "content": content}


def turn_statuses(server: Server, session_id: str) -> list[str]:
    query = "SELECT status FROM sessions_app_turn WHERE session_id = ? ORDER BY position"
    return [status for (status,) in databases.rows(server.database, query, session_id)]


def whole_stream(server: Server, session_id: str, after: int = 0) -> list[Frame]:
    """The session's stream from a position to the end of its last turn."""
    turns = len(turn_statuses(server, session_id))
    finished = 0
    frames: list[Frame] = []
    with server.following(session_id, after) as stream:
        for frame in stream:
            frames.append(frame)
            finished += frame.type == "turn_finished"
            if finished == turns or frame.type == "turn_finished" and after:
                return frames
    return frames


def raw_stream(server: Server, session_id: str, after: int, end: bytes) -> bytes:
    """The bytes of a session's stream from a position up to `end`, comments left out."""
    received = b""
    headers = {"Last-Event-ID": str(after)} if after else {}
    with server.http.stream("GET", f"/sessions/{session_id}/stream", headers=headers) as response:
        for piece in response.iter_raw():
            received += piece
            if end in received.replace(b": ping\n\n", b""):
                return received.replace(b": ping\n\n", b"")
    raise AssertionError("the stream ended early")


def test_a_client_that_leaves_stops_nothing(server: Server, llm: ScriptedLLM, session_id: str) -> None:
    gate = Gate()
    on_coder(server, session_id)
    llm.script(hold("Half a ", "sentence.", gate=gate))
    with server.streaming(user("go"), session_id) as answer:
        seen = until(answer, "assistant_message")
    gate.open()

    rest = whole_stream(server, session_id, after=seen[-1].seq)

    said = [frame.data["token"] for frame in [*seen, *rest] if "token" in frame.data]
    assert "".join(said) == "Half a sentence."
    assert server.history(session_id) == [("user", "go"), ("assistant", "Half a sentence.")]


def test_a_stream_resumed_from_any_number_is_byte_identical(server: Server, llm: ScriptedLLM, session_id: str) -> None:
    llm.script(say(LONG), say("Short."))
    server.say(session_id, "first")
    server.say(session_id, "second")
    frames = whole_stream(server, session_id)
    end = f"id: {frames[-1].id}\n".encode()

    uncut = raw_stream(server, session_id, 0, end)

    for frame in frames[:-1]:
        rest = raw_stream(server, session_id, frame.seq, end)
        at = uncut.index(f"id: {frame.id}\n".encode())
        assert uncut[at:].split(b"\n\n", 1)[1] == rest


def test_a_live_stream_cut_at_random_bytes_and_resumed_is_byte_identical(
    server: Server, llm: ScriptedLLM, session_id: str
) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    llm.script(say(LONG, pause=0.005))
    with server.streaming(user("go"), session_id) as answer:
        until(answer, "turn_started")

    def lines(received: bytes) -> Iterator[bytes]:
        for frame in received.split(b"\n\n")[:-1]:  # what is behind the last empty line is half a frame
            if not frame.startswith(b":"):
                yield frame

    seen: list[bytes] = []
    while not seen or b"turn_finished" not in seen[-1]:
        position = seen[-1].split(b"\n")[0][4:].decode() if seen else "0"
        received, cut = b"", chance.randrange(1, 2_000)
        with server.http.stream(
            "GET", f"/sessions/{session_id}/stream", headers={"Last-Event-ID": position}
        ) as response:
            for piece in response.iter_raw():
                received = (received + piece)[:cut]
                if len(received) == cut or b"turn_finished" in received:
                    break
        seen += lines(received)

    uncut = raw_stream(server, session_id, 0, b'"status":"completed"')
    assert seen == [frame for frame in uncut.split(b"\n\n") if frame][: len(seen)], f"seed {seed}"
    assert b"turn_finished" in seen[-1]


def test_a_position_that_never_was_is_answered_by_a_reset(server: Server, session_id: str) -> None:
    server.say(session_id, "hello")

    with server.following(session_id, after=10**9) as stream:
        frames = until(stream, "turn_finished")

    assert frames[0].type == "stream_reset"
    assert frames[0].data["metadata"]["from"] == frames[1].id
    assert frames[0].id == frames[1].seq - 1


def test_kill_9_in_the_middle_of_an_answer_loses_and_doubles_nothing(
    server: Server, llm: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_coder(server, session_id)
    llm.script(hold("Half a ", "lost sentence.", gate=gate), say("A whole sentence."))
    with server.streaming(user("go"), session_id) as answer:
        seen = until(answer, "assistant_message")
        gate.reached.wait()
        server.kill()
        with pytest.raises(httpx.TransportError):
            list(answer)
    gate.open()
    server.start()

    rest = whole_stream(server, session_id, after=seen[-1].seq)

    restarted = next(frame for frame in rest if frame.type == "restarted")
    discard_after = restarted.data["metadata"]["discard_after"]
    valid = [frame for frame in [*seen, *rest] if frame.seq <= discard_after or frame.seq > restarted.seq]
    assert "".join(frame.data["token"] for frame in valid if "token" in frame.data) == "A whole sentence."
    numbers = [frame.seq for frame in [*seen, *rest]]
    assert numbers == sorted(set(numbers)), "no number is used twice"
    assert server.history(session_id) == [("user", "go"), ("assistant", "A whole sentence.")]
    assert turn_statuses(server, session_id) == ["completed"]


def test_kill_9_at_random_moments_under_load_loses_and_doubles_nothing(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    llm.default = say(LONG, pause=0.003)
    # No turn is to blame for these deaths, however many meet the same one.
    settings = {"LLM_BASE_URL": llm.url, "TURN_LEASE_SECONDS": "2", "TURN_MAX_LOSSES": "100"}
    with running(tmp_path, migrated, **settings) as server:
        _kill_at_random_moments_under_load(server, chance, seed)
    assert llm.refused == [], f"seed {seed}"


def _kill_at_random_moments_under_load(server: Server, chance: random.Random, seed: int) -> None:
    sessions = [f"load-{number}" for number in range(12)]
    acknowledged: dict[str, list[str]] = {session_id: [] for session_id in sessions}
    seen: dict[str, list[int]] = {session_id: [] for session_id in sessions}
    for session_id in sessions:
        on_coder(server, session_id)

    def talk(session_id: str, text: str) -> None:
        try:
            with httpx.Client(base_url=server.url, headers={"X-Internal-Auth": KEY}, timeout=30, limits=BRIEF) as http:
                body = {"session_id": session_id, "message": user(text)}
                with http.stream("POST", "/agent/message/stream", json=body) as response:
                    if response.status_code != 200:
                        return
                    acknowledged[session_id].append(text)
                    for line in response.iter_lines():
                        if line.startswith("id: "):
                            seen[session_id].append(int(line[4:]))
        except httpx.TransportError:
            return

    with ThreadPoolExecutor(12) as pool:
        for kill in range(3):
            talks = [pool.submit(talk, session_id, f"message {kill}") for session_id in sessions]
            enough = sum(map(len, seen.values())) + chance.randrange(1, 12 * 60)
            eventually(
                lambda count=enough, all_of=talks: (
                    sum(map(len, seen.values())) >= count or all(t.done() for t in all_of)
                )
            )
            server.kill()
            for each in talks:
                each.result(30)
            server.start()
    for session_id in sessions:
        eventually(lambda s=session_id: set(turn_statuses(server, s)) <= {"completed"}, seconds=30)

    for session_id in sessions:
        history = server.history(session_id)
        asked = [text for role, text in history if role == "user"]
        assert set(acknowledged[session_id]) <= set(asked), f"seed {seed}"
        assert len(asked) == len(set(asked)), f"seed {seed}"
        assert history == [pair for text in asked for pair in (("user", text), ("assistant", LONG))], f"seed {seed}"
        if asked:
            numbers = [frame.seq for frame in whole_stream(server, session_id)]
            assert numbers == sorted(set(numbers)), f"seed {seed}"


def test_a_stop_hands_the_turn_over_and_the_next_start_goes_on_at_once(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    llm.script(hold("Half a ", "lost sentence.", gate=gate), say("A whole sentence."))
    # A lease that nobody waits for.
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="600") as server:
        on_coder(server, session_id)
        with server.streaming(user("go"), session_id) as answer:
            until(answer, "assistant_message")
        assert server.stop() == 0
        wal = server.database.with_name(f"{server.database.name}-wal")
        assert ON_POSTGRESQL or not wal.exists(), "one file holds everything"
        gate.open()
        server.start()

        eventually(lambda: turn_statuses(server, session_id) == ["completed"])

        assert server.history(session_id) == [("user", "go"), ("assistant", "A whole sentence.")]


def test_a_stop_ends_open_streams_at_once_and_does_not_call_them_complete(
    server: Server, llm: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_coder(server, session_id)
    llm.script(hold("Half a ", "lost sentence.", gate=gate), say("A whole sentence."))
    with (
        server.streaming(user("go"), session_id) as answer,
        server.following(session_id) as stream,
        ThreadPoolExecutor(1) as pool,
    ):
        seen = until(answer, "assistant_message")
        gate.reached.wait()
        stopping = pool.submit(server.stop)
        seen += list(answer)
        list(stream)
        assert stopping.result(10) == 0
    gate.open()
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "turn_handed_over" in log
    assert all(frame.event != "done" for frame in seen)
    server.start()

    with server.following(session_id, after=seen[-1].seq) as stream:
        rest = until(stream, "turn_finished")

    assert [frame.data["content"] for frame in rest if "content" in frame.data] == ["A whole sentence."]


def test_a_paused_runner_that_wakes_up_after_its_lease_writes_nothing(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="2") as paused:
        on_coder(paused, session_id)
        llm.script(hold("From the ", "sleeper.", gate=gate), say("From the other one."))
        with paused.streaming(user("go"), session_id) as answer:
            seen = until(answer, "assistant_message")
            gate.reached.wait()
            pause_in_a_turn(paused)
            other = Server(tmp_path, LLM_BASE_URL=llm.url)
            other.start()
            try:
                eventually(lambda: turn_statuses(other, session_id) == ["completed"])
                gate.open()
                assert paused.process is not None
                os.kill(paused.process.pid, signal.SIGCONT)
                rest = list(answer)
                assert other.history(session_id) == [("user", "go"), ("assistant", "From the other one.")]
                frames = whole_stream(other, session_id)
            finally:
                other.http.close()
                other.kill()

    numbers = [frame.id for frame in [*seen, *rest] if frame.id is not None]
    assert numbers == sorted(set(numbers))
    assert [frame.data["content"] for frame in rest if "content" in frame.data] == ["From the other one."]
    assert [frame.data["status"] for frame in frames if frame.type == "turn_finished"] == ["completed"]


def test_a_turn_cancelled_and_killed_before_its_runner_noticed_ends_cancelled(
    server: Server, llm: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_coder(server, session_id)
    llm.script(hold("", "never heard", gate=gate))
    with server.streaming(user("go"), session_id) as answer:
        until(answer, "turn_started")
        gate.reached.wait()
        server.kill()
        with pytest.raises(httpx.TransportError):
            list(answer)
    databases.change(server.database, "UPDATE sessions_app_turn SET cancel_requested_at = '2026-01-01 00:00:00'")
    gate.open()
    server.start()

    eventually(lambda: turn_statuses(server, session_id) == ["cancelled"])

    assert server.history(session_id) == [("user", "go")]


def test_an_early_done_of_the_gateway_is_no_abort(server: Server, llm: ScriptedLLM, session_id: str) -> None:
    llm.script(say("All of it."))
    with server.http.stream(
        "POST", "/agent/message/stream", json={"session_id": session_id, "message": user("go")}
    ) as response:
        for line in response.iter_lines():
            if line == "event: done":
                break  # the gateway closes the connection here, with the frame half read

    assert server.history(session_id)[-1] == ("assistant", "All of it.")


def test_daphne_runs_turns_too(tmp_path: Path, migrated: Path, llm: ScriptedLLM, session_id: str) -> None:
    llm.script(say("Served by daphne."))
    with running(tmp_path, migrated, server="daphne", LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="2") as server:
        frames = server.say(session_id, "go")

        assert [frame.type for frame in frames if frame.event == "message"] == ["agent_switched", "assistant_message"]
        assert server.history(session_id)[-1] == ("assistant", "Served by daphne.")


def test_a_model_that_is_down_opens_the_circuit_and_a_probe_closes_it_again(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM, session_id: str
) -> None:
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, LLM_RETRIES="0", TURN_LEASE_SECONDS="2") as server:
        on_coder(server, session_id)
        llm.stop()
        codes = [server.say(session_id, f"anyone {number}?")[-2].data["code"] for number in range(6)]
        llm.start()
        answered = eventually(lambda: _answered(server.say(session_id, "and now?")))

    assert codes == ["model_unreachable"] * 5 + ["model_circuit_open"]
    assert answered


def test_a_turn_whose_write_failed_is_taken_over_while_others_run(
    server: Server, llm: ScriptedLLM, session_id: str
) -> None:
    first, second = Gate(), Gate()
    on_coder(server, session_id)
    on_coder(server, "other")
    llm.script(hold("Lo", "st.", gate=first))
    with ThreadPoolExecutor(2) as pool:
        talking = pool.submit(server.say, session_id, "go")
        first.reached.wait()
        llm.script(hold("Still ", "here.", gate=second), say("Said again."))
        other = pool.submit(server.say, "other", "go")
        second.reached.wait()
        with databases.refusing(server.database, "messages_app_message", "NEW.role = 'assistant'"):
            first.open()
            eventually(lambda: "turn_abandoned" in server.log.read_text())

        finished = talking.result(30)  # the other one is still running, and its lease is renewed
        second.open()
        assert other.result(30)[-2].data["status"] == "completed"

    assert finished[-2].data["status"] == "completed"
    assert server.history(session_id) == [("user", "go"), ("assistant", "Said again.")]


def test_a_turn_whose_write_failed_is_released_and_its_runner_is_not_taken_for_dead(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM, session_id: str
) -> None:
    first, second = Gate(), Gate()
    llm.script(hold("Lo", "st.", gate=first), hold("Said ", "again.", gate=second))
    # Long enough for a slow machine to release it before its lease runs out.
    with (
        running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="10") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        on_coder(server, session_id)
        talking = pool.submit(server.say, session_id, "go")
        first.reached.wait()
        with databases.refusing(server.database, "messages_app_message", "NEW.role = 'assistant'"):
            first.open()
            eventually(lambda: "turn_abandoned" in server.log.read_text())
        second.reached.wait(20)
        [lost] = databases.rows(server.database, "SELECT attempt, lost_count FROM sessions_app_turn")
        second.open()

        assert talking.result(30)[-2].data["status"] == "completed"
    assert lost == (2, 0)


def test_while_another_program_holds_the_lock_reads_work_and_a_write_waits_or_is_refused(
    server: Server, session_id: str
) -> None:
    on_coder(server, session_id)
    # On SQLite three times as many as there are threads that write: nobody waits for those before it and then as long
    # again. PostgreSQL's locks are mostly of rows, and who stands behind others may want another.
    writers = THREADS if ON_POSTGRESQL else 3 * THREADS
    with ThreadPoolExecutor(writers) as pool, databases.locked(server.database, "sessions_app_session"):
        began = time.monotonic()
        writes = [pool.submit(server.http.post, "/sessions") for _ in range(writers)]
        reads = [server.http.get(f"/sessions/{session_id}") for _ in range(5)]
        assert not any(write.done() for write in writes), "the reads did not wait for the writes"
        refused = [write.result(30) for write in writes]
        took = time.monotonic() - began
    accepted = server.http.post("/sessions")

    assert took < 12  # 8 s, on a machine that does nothing else
    assert [answer.status_code for answer in reads] == [200] * 5
    assert {answer.status_code for answer in refused} == {503}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert "locked" not in refused[0].text
    assert accepted.status_code == 201


def _answered(frames: list[Frame]) -> bool:
    return frames[-2].data["status"] == "completed"

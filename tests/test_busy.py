"""A message that finds a turn queued or running: it queues, is refused, or takes its place; over HTTP and sockets."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_llm import Gate, ScriptedLLM, call, hold, say
from tests.server import Frame, Server, eventually, running, until
from tests.test_repeating import STREAM, at_once, new_key, refused
from tests.test_socket import error, on_coder, opened, user


@pytest.fixture
def server(shared_server: Server, played: ScriptedLLM) -> Server:
    return shared_server


@pytest.fixture
def session_id(server: Server) -> str:
    return on_coder(server, str(uuid.uuid4()))


def message(content: str) -> dict[str, Any]:
    return {"type": "user_message", "content": content}


def send(server: Server, session_id: str, content: str, busy: str, **headers: str) -> Any:
    """Without reading the answer of one that is taken."""
    body = {"session_id": session_id, "message": message(content), "busy": busy}
    with server.http.stream("POST", STREAM, json=body, headers=headers) as answer:
        if answer.is_error:
            answer.read()
        return answer


def end_of(frames: list[Frame]) -> tuple[str, str | None]:
    (end,) = [frame.data for frame in frames if frame.type == "turn_finished"]
    return end["status"], end["code"]


def said_by_users(server: Server, session_id: str) -> list[str]:
    return [text for role, text in server.history(session_id) if role == "user"]


CANCELLED = ("cancelled", "cancelled")


# --- reject ----------------------------------------------------------------------------------------------------------


def test_a_message_that_does_not_want_to_wait_is_refused_while_a_turn_runs(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    played.script(hold("One ", "answer.", gate=gate), say("Another."))
    key = new_key()

    with server.streaming(message("first"), session_id) as first:
        gate.reached.wait()
        before = server.http.get(f"/sessions/{session_id}").json()
        refused(send(server, session_id, "second", "reject"), 409, "turn_running")
        refused(send(server, session_id, "second", "reject", **key), 409, "turn_running")
        assert server.http.get(f"/sessions/{session_id}").json() == before
        gate.open()
        until(first, "turn_finished")
    after = server.post(message("second"), session_id, busy="reject")

    assert end_of(after) == ("completed", None)
    assert send(server, session_id, "second", "reject", **key).status_code == 200, "what was refused freed its key"
    assert said_by_users(server, session_id) == ["first", "second", "second"]


@pytest.mark.parametrize("busy", ["enqueue", "reject", "interrupt"])
def test_a_turn_that_waits_is_superseded_whatever_is_said(
    server: Server, played: ScriptedLLM, session_id: str, busy: str
) -> None:
    played.script(call("write_file", {"path": "a.md", "content": ""}), say("Fine."))
    server.say(session_id, "Write it")

    answer = server.post(message("Never mind"), session_id, busy=busy)

    assert end_of(answer) == ("completed", None)
    with server.following(session_id) as frames:
        assert until(frames, "turn_finished")[-1].data["code"] == "superseded"


def test_other_messages_do_not_mind(server: Server, played: ScriptedLLM, session_id: str) -> None:
    gate = Gate()
    played.script(hold("One ", "answer.", gate=gate))
    switch = {"type": "switch_agent", "agent_type": "debug"}

    with server.streaming(message("Go"), session_id) as answer:
        gate.reached.wait()
        switched = [server.post(switch, session_id, busy=busy)[0].type for busy in ("reject", "interrupt")]
        gate.open()
        rest = list(answer)

    assert switched == ["agent_switched"] * 2
    assert end_of(rest) == ("completed", None)


# --- interrupt -------------------------------------------------------------------------------------------------------


def test_an_interruption_takes_the_place_of_all_that_runs_and_is_queued(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    played.script(hold("Half a ", "sentence", gate=gate), say("At your service."))

    with ExitStack() as stack:
        streams = [stack.enter_context(server.streaming(message("m0"), session_id))]
        gate.reached.wait()
        # As many as may wait: what is cancelled by the message does not count against it.
        queued = [server.streaming(message(f"m{number}"), session_id) for number in range(1, 6)]
        streams += [stack.enter_context(stream) for stream in queued]
        refused(send(server, session_id, "too many", "enqueue"), 429, "queue_full")
        answer = server.post(message("Stop, listen"), session_id, busy="interrupt")
        ends = [end_of(list(frames)) for frames in streams]

    assert ends == [CANCELLED] * 6
    assert end_of(answer) == ("completed", None)
    assert server.history(session_id) == [
        ("user", "m0"),
        ("assistant", "Half a "),
        *(("user", f"m{number}") for number in range(1, 6)),
        ("user", "Stop, listen"),
        ("assistant", "At your service."),
    ]


def test_an_interruption_of_nothing_is_a_message(server: Server, session_id: str) -> None:
    assert end_of(server.post(message("Go"), session_id, busy="interrupt")) == ("completed", None)


def test_of_twenty_interruptions_at_once_the_last_is_answered_and_none_is_in_the_way(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    played.script(hold("Half a ", "sentence", gate=gate))

    with server.streaming(message("first"), session_id) as first:
        gate.reached.wait()
        answers = at_once(lambda number: server.post(message(f"m{number}"), session_id, busy="interrupt"), 20)
        interrupted = end_of(list(first))

    said = said_by_users(server, session_id)
    by_content = {f"m{number}": end_of(answer) for number, answer in enumerate(answers)}
    assert interrupted == CANCELLED
    assert sorted(said[1:]) == sorted(by_content)
    assert by_content[said[-1]] == ("completed", None)
    assert {by_content[each] for each in said[1:-1]} <= {CANCELLED, ("completed", None)}
    assert server.http.get(f"/sessions/{session_id}/open-calls").json()["open_turn"] is None


def test_an_interruption_in_the_moment_in_which_a_turn_ends(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    ends = []
    for number in range(15):
        played.script(say(f"first {number}"), say(f"second {number}"))
        with server.streaming(message("first"), session_id) as first:
            # From before the first word to after the last, as it comes.
            for _ in range(number % 5):
                next(first)
            second = server.post(message("second"), session_id, busy="interrupt")
            ends.append((end_of(list(first)), end_of(second)))
        played.forget()

    assert {first for first, _ in ends} <= {CANCELLED, ("completed", None)}
    assert {second for _, second in ends} == {("completed", None)}
    assert said_by_users(server, session_id) == ["first", "second"] * 15


def test_a_repeated_interruption_interrupts_once(server: Server, played: ScriptedLLM, session_id: str) -> None:
    gates = Gate(), Gate()
    played.script(*[hold("Half ", "said.", gate=gate) for gate in gates])
    body = {"session_id": session_id, "message": message("Stop"), "busy": "interrupt"}

    with server.streaming(message("Go"), session_id) as first, ThreadPoolExecutor(1) as pool:
        gates[0].reached.wait()
        key = new_key()
        answers = pool.submit(at_once, lambda _: server.http.post(STREAM, json=body, headers=key).text, 10)
        gates[1].reached.wait()
        gates[1].open()
        told = answers.result(60)
        gates[0].open()
        assert end_of(list(first)) == CANCELLED

    assert len(set(told)) == 1
    assert '"status":"completed"' in told[0]
    assert said_by_users(server, session_id) == ["Go", "Stop"]


# --- The socket ------------------------------------------------------------------------------------------------------


def test_on_a_socket_it_is_said_in_the_message(server: Server, played: ScriptedLLM, session_id: str) -> None:
    gate = Gate()
    played.script(hold("Half a ", "sentence", gate=gate), say("Here."))

    with opened(server, f"/ws/{session_id}?live=1") as chat:
        chat.send(user("Go"))
        gate.reached.wait()
        chat.send(user("Now", busy="reject"))
        chat.send(user("Now", busy="whenever"))
        chat.send(user("Now", busy="interrupt"))
        seen: list[dict[str, Any]] = []
        while [each.get("status") for each in seen][-1:] != ["completed"]:
            seen.append(chat.receive())

    assert [each for each in seen if "id" not in each] == [error("Agent error: 409"), error("Agent error: 422")]
    assert [each["status"] for each in seen if each["type"] == "turn_finished"] == ["cancelled", "completed"]
    assert said_by_users(server, session_id) == ["Go", "Now"]


# --- Order -----------------------------------------------------------------------------------------------------------


def test_history_has_fifty_messages_in_the_order_in_which_they_were_acknowledged(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    llm.default = lambda request: say(f"to {request['messages'][-1]['content']}")
    began: dict[str, int] = {}
    sent: dict[str, float] = {}
    acknowledged: dict[str, float] = {}
    numbers = count()
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_QUEUE_LENGTH="50") as server:
        session_id = on_coder(server, "s")

        def talk(_: int) -> None:
            # One after the other, as soon as each is acknowledged; ten clients beside each other.
            with ExitStack() as stack:
                streams = {}
                for _ in range(5):
                    said = f"m{next(numbers)}"
                    sent[said] = time.monotonic()
                    streams[said] = stack.enter_context(server.streaming(message(said), session_id))
                    acknowledged[said] = time.monotonic()
                for said, frames in streams.items():
                    began[said] = next(frames).seq
                    assert end_of(list(frames)) == ("completed", None)

        at_once(talk, 10)
        history = server.history(session_id)
        eventually(lambda: server.http.get("/sessions/s/open-calls").json()["open_turn"] is None)

    order = [text for role, text in history if role == "user"]
    assert len(order) == 50
    assert history == [each for said in order for each in (("user", said), ("assistant", f"to {said}"))]
    assert order == sorted(began, key=lambda said: began[said]), "as the turns began, none within another"
    place = {said: number for number, said in enumerate(order)}
    for one in order:
        for other in order:
            assert acknowledged[one] >= sent[other] or place[one] < place[other]

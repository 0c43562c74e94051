"""Requests that are repeated: what is asked under one key is done once, and answered again in the same way."""

import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import httpx
import pytest

from tests import databases
from tests.scripted_llm import Gate, ScriptedLLM, call, hold, say
from tests.server import Frame, Server, eventually, parse_frames, until
from tests.test_socket import error, on_coder, opened, said, user

ARGUMENTS = {"path": "a.md", "content": "hello"}
STREAM = "/agent/message/stream"
BOTH = ("", "/api/v1")
AT_ONCE = 50

Told = list[tuple[int | None, str | None, dict[str, Any]]]


@pytest.fixture
def server(shared_server: Server, played: ScriptedLLM) -> Server:
    return shared_server


@pytest.fixture
def session_id(server: Server) -> str:
    return on_coder(server, str(uuid.uuid4()))


def new_key() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid.uuid4())}


def body_of(session_id: str, **message: Any) -> dict[str, Any]:
    return {"session_id": session_id, "message": {"type": "user_message", "content": "Go", **message}}


def told(frames: list[Frame]) -> Told:
    return [(frame.id, frame.event, frame.data) for frame in frames]


@contextmanager
def asking(server: Server, body: Any, headers: Any, prefix: str = "") -> Iterator[Iterator[Frame]]:
    with server.http.stream("POST", prefix + STREAM, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        yield parse_frames(response.iter_lines())


def ask(server: Server, body: Any, headers: Any, prefix: str = "") -> Told:
    """All that is answered."""
    with asking(server, body, headers, prefix) as frames:
        return told(list(frames))


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


def at_once(work: Callable[[int], Any], times: int = AT_ONCE) -> list[Any]:
    """What comes of doing it so many times at the same time."""
    barrier = Barrier(times)

    def together(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(together, range(times)))


def waiting_call(server: Server, played: ScriptedLLM, session_id: str) -> str:
    played.script(call("write_file", ARGUMENTS))
    return str(server.say(session_id, "Write it")[-2].data["call_id"])


def decisions(server: Server, session_id: str) -> list[tuple[Any, ...]]:
    """What the audit log has of decisions in a session."""
    query = "SELECT action, outcome FROM events_app_auditentry WHERE session_id = ? ORDER BY id"
    return databases.rows(server.database, query, session_id)


# --- Messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["Idempotency-Key", "message_id"])
def test_fifty_repetitions_at_once_are_one_turn_with_the_same_frames_for_all(
    server: Server, played: ScriptedLLM, session_id: str, way: str
) -> None:
    gate = Gate()
    played.script(hold("Once ", "and for all.", gate=gate))
    key, body = new_key(), body_of(session_id)
    if way == "message_id":
        key, body = {}, body_of(session_id, message_id="m1")

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(at_once, lambda number: ask(server, body, key, BOTH[number % 2]))
        gate.reached.wait()
        gate.open()
        first, *others = answers.result(60)

    assert first[-1][1] == "done"
    assert [data["type"] for _, event, data in first if event != "done"][-1] == "turn_finished"
    assert all(other == first for other in others)
    assert server.history(session_id) == [("user", "Go"), ("assistant", "Once and for all.")]
    assert ask(server, body, key) == first, "also when it is over"


def test_another_key_is_another_message(server: Server, session_id: str) -> None:
    body = body_of(session_id, message_id="m1")

    answers = [ask(server, body, new_key()) for _ in range(2)]

    assert answers[0] != answers[1]
    assert len(server.history(session_id)) == 4, "the header counts, not the message's own id"


def test_an_answer_is_repeated_as_far_as_it_went(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.script(call("write_file", ARGUMENTS, text="Well."), say("Written."))
    key, body = new_key(), body_of(session_id)
    asked = ask(server, body, key)
    call_id = asked[-2][2]["call_id"]
    result = {"session_id": session_id, "message": {"type": "tool_result", "call_id": call_id, "result": "ok"}}
    other_key = new_key()

    done = ask(server, result, other_key)

    assert [data.get("content") for _, _, data in done][-3] == "Written."
    assert ask(server, body, key) == asked, "up to the call that it waited for"
    assert ask(server, result, other_key) == done, "not the end alone, which a late result gets"
    assert [role for role, _ in server.history(session_id)] == ["user", "assistant", "tool", "assistant"]


def test_a_repeated_switch_is_one_handoff_with_its_one_frame(server: Server, session_id: str) -> None:
    body = {"session_id": session_id, "message": {"type": "switch_agent", "agent_type": "debug"}}
    key = new_key()

    answers = at_once(lambda _: ask(server, body, key), 10)

    assert [data["type"] for _, event, data in answers[0] if event != "done"] == ["agent_switched"]
    assert all(answer == answers[0] for answer in answers)
    assert server.http.get(f"/agents/{session_id}/current").json()["switch_count"] == 2


def test_a_repeated_decision_in_the_stream_is_one_decision(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    message = {"type": "hitl_decision", "call_id": waiting_call(server, played, session_id), "decision": "approve"}
    body, key = {"session_id": session_id, "message": message}, new_key()

    answers = at_once(lambda _: ask(server, body, key), 10)

    assert [data["type"] for _, event, data in answers[0] if event != "done"] == ["approval_resolved"]
    assert all(answer == answers[0] for answer in answers)
    assert decisions(server, session_id) == [("approval.approve", "done")]


def test_a_repetition_without_tokens_by_the_id_of_the_message_alone(server: Server, session_id: str) -> None:
    body = body_of(session_id, message_id="m1")
    whole = ask(server, body, {})

    shorter = ask(server, {**body, "stream_tokens": False}, {})

    assert shorter == [each for each in whole if "token" not in each[2]] != whole


def test_who_repeats_a_message_joins_its_answer_and_reads_it_from_the_beginning(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    played.script(hold("Half a ", "sentence.", gate=gate))
    body, key = body_of(session_id), new_key()

    with asking(server, body, key) as first:
        seen = [next(first), next(first)]
        with asking(server, body, key) as again:
            assert [next(again), next(again)] == seen
            gate.open()
            assert list(again) == list(first)


# --- Over the death of the server ------------------------------------------------------------------------------------


def test_a_key_outlives_the_server(mortal: Server, played: ScriptedLLM) -> None:
    session_id = on_coder(mortal, str(uuid.uuid4()))
    body, key, others = body_of(session_id), new_key(), new_key()
    answer = ask(mortal, body, key)
    created = mortal.http.post("/sessions", headers=others)
    mortal.kill()
    mortal.start()

    assert ask(mortal, body, key) == answer
    assert mortal.http.post("/sessions", headers=others).content == created.content
    assert len(mortal.history(session_id)) == 2


def test_a_message_whose_server_died_in_its_answer_is_joined_and_not_stored_again(
    mortal: Server, played: ScriptedLLM
) -> None:
    session_id, gate = on_coder(mortal, str(uuid.uuid4())), Gate()
    body, key = body_of(session_id), new_key()
    played.script(hold("Half a ", "lost sentence.", gate=gate), say("A whole sentence."))
    with asking(mortal, body, key) as frames:
        began = told(until(frames, "turn_started"))
        gate.reached.wait()
        mortal.kill()
    gate.open()
    mortal.start()

    answer = ask(mortal, body, key)

    assert answer[: len(began)] == began
    kinds = [data["type"] for _, event, data in answer if event != "done"]
    assert kinds.count("turn_started") == kinds.count("turn_finished") == 1
    assert "restarted" in kinds
    assert mortal.history(session_id) == [("user", "Go"), ("assistant", "A whole sentence.")]


# --- The other requests ----------------------------------------------------------------------------------------------


def test_a_decision_made_fifty_times_under_one_key_is_one_decision_with_one_answer(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    call_id = waiting_call(server, played, session_id)
    path, body, key = f"/approvals/{call_id}/decision", {"decision": "approve", "feedback": "fine"}, new_key()

    answers = at_once(lambda number: server.http.post(BOTH[number % 2] + path, json=body, headers=key))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].json()["decision"] == "approve"
    assert decisions(server, session_id) == [("approval.approve", "done")]
    refused(server.http.post(path, json=body), 409, "already_decided")


def test_a_session_created_fifty_times_under_one_key_is_one_session(server: Server) -> None:
    key, sizes = new_key(), [server.http.get("/sessions").json()["total"]]

    answers = at_once(lambda number: server.http.post(BOTH[number % 2] + "/sessions", headers=key))

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    sizes.append(server.http.get("/sessions").json()["total"])
    assert sizes[1] == sizes[0] + 1
    assert server.http.post("/sessions", json={}, headers=key).content == answers[0].content, "nothing, null, {}: one"


def test_a_session_of_ones_own_id_is_created_again_and_not_taken(server: Server) -> None:
    key, body = new_key(), {"session_id": str(uuid.uuid4())}

    answers = [server.http.post("/sessions", json=body, headers=key) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [201, 201]
    refused(server.http.post("/sessions", json=body, headers=new_key()), 409, "session_id_taken")


def test_a_repeated_switch_over_rest_is_one_switch(server: Server, session_id: str) -> None:
    path, body, key = f"/agents/{session_id}/switch", {"target_agent": "debug", "reason": "why"}, new_key()

    answers = at_once(lambda _: server.http.post(path, json=body, headers=key), 10)

    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    assert answers[0].json()["context"]["current_agent"] == "debug"
    assert server.http.get(f"/agents/{session_id}/current").json()["switch_count"] == 2


def test_a_repeated_cancel_does_not_cancel_the_next_turn(server: Server, played: ScriptedLLM, session_id: str) -> None:
    first, second = Gate(), Gate()
    played.script(hold("first ", "said", gate=first), hold("second ", "said", gate=second))
    key, path = new_key(), f"/sessions/{session_id}/cancel"
    message = {"type": "user_message", "content": "Go"}

    with server.streaming(message, session_id) as one:
        first.reached.wait()
        with server.streaming(message, session_id) as other:
            cancelled = server.http.post(path, headers=key)
            second.reached.wait()
            repeated = server.http.post(path, json={}, headers=key)
            for gate in (first, second):
                gate.open()
            ends = [until(frames, "turn_finished")[-1].data for frames in (one, other)]

    assert cancelled.json()["cancelled_turn"] == ends[0]["turn_id"]
    assert repeated.content == cancelled.content
    assert [end["status"] for end in ends] == ["cancelled", "completed"]


# --- What a key is not for -------------------------------------------------------------------------------------------


def test_a_key_is_for_one_request(server: Server, session_id: str) -> None:
    key, other_key, body = new_key(), new_key(), body_of(session_id)
    ask(server, body, key)
    server.http.post("/sessions", headers=other_key)
    before = server.history(session_id)

    others: list[tuple[str, Any]] = [
        (STREAM, body_of(session_id, content="Stop")),
        (STREAM, {**body, "stream_tokens": False}),
        (STREAM, {**body, "busy": "enqueue"}),
        ("/sessions", None),
        (f"/sessions/{session_id}/cancel", None),
        (f"/agents/{session_id}/switch", {"target_agent": "debug", "reason": ""}),
    ]
    for path, other in others:
        for prefix in BOTH:
            answer = server.http.post(prefix + path, json=other, headers=key)
            refused(answer, 422, "idempotency_key_reused")
            assert answer.json()["detail"][0]["loc"] == ["header", "Idempotency-Key"]
    same_body_elsewhere = server.http.post(f"/sessions/{session_id}/cancel", headers=other_key)
    refused(same_body_elsewhere, 422, "idempotency_key_reused")

    assert server.history(session_id) == before
    assert server.http.get(f"/agents/{session_id}/current").json()["current_agent"] == "coder"


def test_of_different_requests_at_once_under_one_key_one_is_done(server: Server, session_id: str) -> None:
    key = new_key()
    requests: list[tuple[str, Any]] = [
        (STREAM, body_of(session_id)),
        (f"/sessions/{session_id}/cancel", {}),
        (f"/agents/{session_id}/switch", {"target_agent": "debug", "reason": ""}),
    ]

    def send(number: int) -> tuple[str, int, str]:
        path, body = requests[number % 3]
        answer = server.http.post(path, json=body, headers=key)
        return path, answer.status_code, answer.text if answer.is_success else answer.json()["code"]

    answers = at_once(send, 30)

    done = {(path, text) for path, status, text in answers if status == 200}
    assert len(done) == 1
    assert sum(status == 200 for _, status, _ in answers) == 10
    assert {text for _, status, text in answers if status != 200} == {"idempotency_key_reused"}


def test_the_same_body_may_be_written_otherwise(server: Server, session_id: str) -> None:
    key = {**new_key(), "Content-Type": "application/json"}
    text = "Gr\u00fc\u00df dich"
    body = {"session_id": session_id, "message": {"type": "user_message", "content": text}}
    other = {"message": {"content": text, "type": "user_message"}, "session_id": session_id}
    texts = [json.dumps(body), json.dumps(other, ensure_ascii=False, indent=2)]

    first, second = (server.http.post(STREAM, content=text.encode(), headers=key) for text in texts)

    assert first.text == second.text
    assert len(server.history(session_id)) == 2


def test_an_id_is_for_one_message_of_its_session(server: Server, session_id: str) -> None:
    other_session = on_coder(server, str(uuid.uuid4()))
    ask(server, body_of(session_id, message_id="m1"), {})

    answer = server.http.post(STREAM, json=body_of(session_id, content="Stop", message_id="m1"))
    ask(server, body_of(other_session, content="Stop", message_id="m1"), {})

    refused(answer, 422, "idempotency_key_reused")
    assert answer.json()["detail"][0]["loc"] == ["body", "message", "message_id"]
    assert [len(server.history(each)) for each in (session_id, other_session)] == [2, 2]


def test_what_was_refused_was_not_done_and_its_key_is_free(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    key = new_key()
    nobody = body_of(session_id, agent_type="nobody")
    unknown = {"session_id": session_id, "message": {"type": "tool_result", "call_id": "call_x", "result": 1}}

    refused(server.http.post(STREAM, json=nobody, headers=key), 400, "unknown_agent")
    (in_the_stream, _) = ask(server, unknown, key)
    switch = {"target_agent": "coder", "reason": ""}
    refused(server.http.post(f"/agents/{session_id}/switch", json=switch, headers=key), 400, "agent_already_active")
    refused(server.http.post("/sessions", json={"session_id": session_id}, headers=key), 409, "session_id_taken")
    refused(server.http.post("/sessions/nobody/cancel", headers=key), 404, "session_not_found")
    refused(server.http.post(STREAM, json=[], headers=key), 422, "invalid")

    assert in_the_stream[2]["metadata"]["code"] == "unknown_call"
    answer = ask(server, body_of(session_id), key)
    assert answer[-2][2]["status"] == "completed"


@pytest.mark.parametrize("way", ["over REST", "in the stream", "by a result"])
def test_a_refused_decision_is_written_down_and_its_key_is_free(
    server: Server, played: ScriptedLLM, session_id: str, way: str
) -> None:
    call_id = waiting_call(server, played, session_id)
    path, key = f"/approvals/{call_id}/decision", new_key()
    refusal: Any = {"decision": "approve", "args_hash": "0" * 64}
    with others_decide(server):
        if way == "over REST":
            refused(server.http.post(path, json=refusal, headers=key), 409, "arguments_changed")
        elif way == "in the stream":
            message = {"type": "hitl_decision", "call_id": call_id, **refusal}
            assert ask(server, {"session_id": session_id, "message": message}, key)[0][2]["type"] == "error"
        else:
            message = {"type": "tool_result", "call_id": call_id, "result": 1}
            assert ask(server, {"session_id": session_id, "message": message}, key)[0][2]["type"] == "error"

    assert server.http.post(path, json={"decision": "approve"}, headers=key).status_code == 200
    assert decisions(server, session_id) == [("approval.decide", "refused"), ("approval.approve", "done")]


@contextmanager
def others_decide(server: Server) -> Iterator[None]:
    """While nobody may decide on what waits already by the key that drives the session."""
    databases.change(server.database, "UPDATE agents_app_approvalrequest SET self_approval = ?", False)
    yield
    databases.change(server.database, "UPDATE agents_app_approvalrequest SET self_approval = ?", True)


def test_a_message_to_a_session_that_was_deleted_is_not_told_again(server: Server, session_id: str) -> None:
    key, body = new_key(), body_of(session_id)
    ask(server, body, key)
    server.http.delete(f"/sessions/{session_id}")

    refused(server.http.post(STREAM, json=body, headers=key), 404, "session_not_found")


BAD_KEYS: dict[str, list[bytes]] = {
    "empty": [b""],
    "256 characters": [b"x" * 256],
    "a blank within": [b"a b"],
    "a tab within": [b"a\tb"],
    "beyond ASCII": ["\u00e9".encode()],
    "given twice": [b"a", b"b"],
    "the same twice": [b"a", b"a"],
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_key_that_is_none_is_refused_before_anything_is_stored(
    server: Server, played: ScriptedLLM, session_id: str, name: str
) -> None:
    call_id = waiting_call(server, played, session_id)
    before = (server.http.get("/sessions").json(), server.history(session_id), kept(server))
    headers = [(b"Idempotency-Key", value) for value in BAD_KEYS[name]]

    requests: list[tuple[str, Any]] = [
        (STREAM, body_of(session_id)),
        ("/sessions", None),
        (f"/sessions/{session_id}/cancel", None),
        (f"/agents/{session_id}/switch", {"target_agent": "debug", "reason": ""}),
        (f"/approvals/{call_id}/decision", {"decision": "approve"}),
    ]
    for path, body in requests:
        for prefix in BOTH:
            answer = server.http.post(prefix + path, json=body, headers=headers)
            refused(answer, 400, "invalid_idempotency_key")

    assert (server.http.get("/sessions").json(), server.history(session_id), kept(server)) == before


def kept(server: Server) -> int:
    return int(databases.rows(server.database, "SELECT count(*) FROM sessions_app_idempotencyrecord")[0][0])


@pytest.mark.parametrize("key", ["x" * 255, "a,b", '"quoted"', "~!"])
def test_a_key_is_any_visible_ascii(server: Server, session_id: str, key: str) -> None:
    body, headers = body_of(session_id, content=str(uuid.uuid4())), {"Idempotency-Key": key}
    databases.change(server.database, "DELETE FROM sessions_app_idempotencyrecord WHERE key = ?", key)

    assert ask(server, body, headers) == ask(server, body, headers)


def test_without_a_key_nothing_is_kept(server: Server, played: ScriptedLLM, session_id: str) -> None:
    before = kept(server)
    call_id = waiting_call(server, played, session_id)
    server.http.post(f"/approvals/{call_id}/decision", json={"decision": "reject"})
    server.http.post(f"/sessions/{session_id}/cancel")
    server.http.post("/sessions")

    assert kept(server) == before


# --- The socket ------------------------------------------------------------------------------------------------------


def test_a_message_on_a_socket_is_repeated_there_and_over_http(server: Server, session_id: str) -> None:
    message = user("Go", message_id="m1")
    with opened(server, f"/ws/{session_id}?tokens=1") as chat:
        answer = chat.answer_to(message)
        again = chat.answer_to(message)
    with opened(server, f"/api/v1/ws/{session_id}") as chat:
        plain = chat.answer_to({**message, "agent_type": None})
        reused = chat.answer_to(user("Stop", message_id="m1"))
        shapeless: list[Any] = [7, "", "a b", []]
        bad = [chat.answer_to(user("Go", message_id=value)) for value in shapeless]
        free = chat.answer_to(user("Go", message_id=None))

    over_http = ask(server, body_of(session_id, message_id="m1"), {})
    assert again == answer
    assert plain == [said("ok")]
    assert reused == [error("Agent error: 422")]
    assert bad == [[error("Agent error: 422")]] * 4
    assert free == [said("ok")]
    assert [
        {"id": number, **data} for number, _, data in over_http if data.get("type") == "assistant_message"
    ] == answer
    assert len(server.history(session_id)) == 4


def test_a_repetition_on_a_live_socket_stores_nothing_and_shows_nothing_twice(server: Server, session_id: str) -> None:
    with opened(server, f"/ws/{session_id}?live=1") as chat:
        for message in (user("Go", message_id="m1"), user("Go", message_id="m1"), user("Then", message_id="m2")):
            chat.send(message)
        seen: list[dict[str, Any]] = []
        while [each["type"] for each in seen].count("turn_finished") < 2:
            seen.append(chat.receive())

    numbers = [each["id"] for each in seen]
    assert numbers == sorted(set(numbers))
    eventually(lambda: [text for role, text in server.history(session_id) if role == "user"] == ["Go", "Then"])

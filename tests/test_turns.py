"""What one message does: routing, handoffs, order, queue, cancel, switch; over HTTP against a real server."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.scripted_llm import Gate, Reply, ScriptedLLM, drop, empty, hold, html, say, status
from tests.server import Frame, Server, eventually, until

pytestmark = pytest.mark.usefixtures("played")


@pytest.fixture
def session_id() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def server(shared_server: Server) -> Server:
    return shared_server


def types(frames: list[Frame]) -> list[str]:
    """What a client sees, with neighbouring deltas as one."""
    seen: list[str] = []
    for frame in frames:
        kind = "delta" if "token" in frame.data else frame.event if frame.event == "done" else frame.type
        if kind != "delta" or seen[-1:] != ["delta"]:
            seen.append(str(kind))
    return seen


def on_agent(server: Server, session_id: str, agent: str) -> None:
    """A session that sits on a specialist."""
    answer = server.post({"type": "switch_agent", "agent_type": agent}, session_id)
    assert types(answer) == ["agent_switched", "done"]


def test_a_message_is_routed_to_a_specialist_whose_answer_streams(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    played.route_to = "architect"
    played.script(say("Boxes and arrows.", usage=(20, 4)))

    frames = server.say(session_id, "Draw me the design")

    assert types(frames) == [
        "turn_started",
        "agent_switched",
        "delta",
        "assistant_message",
        "turn_finished",
        "done",
    ]
    switched, whole, finished = frames[1], frames[-3], frames[-2]
    assert switched.data["content"] == "Switched to architect agent"
    assert switched.data["is_final"] is False
    assert switched.data["from_agent"] == "orchestrator"
    assert switched.data["metadata"] == {
        "from_agent": "orchestrator",
        "to_agent": "architect",
        "reason": "scripted",
        "confidence": "high",
    }
    assert whole.data == {"type": "assistant_message", "content": "Boxes and arrows.", "is_final": True}
    assert "".join(frame.data["token"] for frame in frames if "token" in frame.data) == "Boxes and arrows."
    assert finished.data["status"] == "completed"
    assert finished.data["usage"]["total_tokens"] >= 24
    numbers = [frame.id for frame in frames if frame.id is not None]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == len(frames) - 1, "everything but the end marker has a number"
    assert server.history(session_id) == [("user", "Draw me the design"), ("assistant", "Boxes and arrows.")]
    assert server.http.get(f"/agents/{session_id}/current").json()["current_agent"] == "architect"


def test_the_old_gateway_forwards_whole_chunks_and_skips_the_rest(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    played.script(say("One two three"))

    frames = server.say(session_id, "hi")

    forwarded = [frame for frame in frames if frame.spaced]
    assert types(forwarded) == ["agent_switched", "assistant_message", "done"]
    assert {frame.event for frame in forwarded} == {"message", "done"}
    assert {frame.event for frame in frames if not frame.spaced} == {None}


def test_deltas_can_be_turned_off(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.script(say("One two three"))

    frames = server.post({"type": "user_message", "content": "hi"}, session_id, stream_tokens=False)

    assert "delta" not in types(frames)
    assert types(frames)[-3:] == ["assistant_message", "turn_finished", "done"]


def test_a_specialist_keeps_the_session(server: Server, played: ScriptedLLM, session_id: str) -> None:
    on_agent(server, session_id, "debug")
    routings = len(played.routings)
    played.script(say("It is the cache."))

    frames = server.say(session_id, "why?")

    assert types(frames) == ["turn_started", "delta", "assistant_message", "turn_finished", "done"]
    assert len(played.routings) == routings
    assert played.answers[-1]["messages"][0]["content"].startswith("You are the debug agent")


def test_agent_type_starts_a_new_session_on_that_agent(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.script(say("Ask me."))

    frames = server.say(session_id, "hi", agent_type="ask")

    assert "agent_switched" not in types(frames)
    context = server.http.get(f"/agents/{session_id}/current").json()["context"]
    assert (context["current_agent"], context["switch_count"]) == ("ask", 0)


def test_agent_type_switches_a_session_that_has_begun(server: Server, played: ScriptedLLM, session_id: str) -> None:
    on_agent(server, session_id, "coder")
    played.script(say("Plans."))

    frames = server.say(session_id, "plan it", agent_type="architect")

    assert types(frames)[:2] == ["turn_started", "agent_switched"]
    assert frames[1].data["reason"] == "User requested"
    assert frames[1].data["confidence"] == "high"
    assert server.http.get(f"/agents/{session_id}/current").json()["current_agent"] == "architect"


def test_agent_type_orchestrator_routes_again(server: Server, played: ScriptedLLM, session_id: str) -> None:
    on_agent(server, session_id, "coder")
    played.route_to = "ask"
    played.script(say("Because."))

    frames = server.say(session_id, "why", agent_type="orchestrator")

    switches = [frame.data["to_agent"] for frame in frames if frame.type == "agent_switched"]
    assert switches == ["orchestrator", "ask"]


@pytest.mark.parametrize("broken", ["no json at all", '{"agent": 7}', '```json\n{"agent":'])
def test_a_router_that_talks_nonsense_is_replaced_by_keywords(
    server: Server, played: ScriptedLLM, session_id: str, broken: str
) -> None:
    played.route(say(broken))
    played.script(say("ok"))

    frames = server.say(session_id, "investigate the crash")

    switched = frames[1].data
    assert (switched["to_agent"], switched["confidence"]) == ("debug", "low")
    assert switched["reason"] == "Fallback classification due to LLM error"


def test_a_router_may_fence_its_answer_and_an_unknown_agent_means_coder(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    played.route(say('Sure!\n```json\n{"agent": "poet", "confidence": "medium", "reasoning": "verse"}\n```'))
    played.script(say("ok"))

    switched = server.say(session_id, "sing")[1].data

    assert (switched["to_agent"], switched["confidence"], switched["reason"]) == ("coder", "medium", "verse")


def test_a_dead_router_still_gives_an_answer(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.route(status(400))
    played.script(say("ok"))

    frames = server.say(session_id, "explain this")

    assert frames[1].data["to_agent"] == "ask"
    assert types(frames)[-2:] == ["turn_finished", "done"]


def test_switch_agent_is_one_frame_and_no_turn(server: Server, played: ScriptedLLM, session_id: str) -> None:
    asked = len(played.requests)

    first = server.post({"type": "switch_agent", "agent_type": "coder", "content": "Switched to Coder"}, session_id)
    again = server.post({"type": "switch_agent", "agent_type": "code", "reason": None}, session_id)

    assert first[0].data["is_final"] is True
    assert first[0].data["reason"] == "User requested agent switch"
    assert (again[0].data["from_agent"], again[0].data["to_agent"]) == ("coder", "coder")
    assert again[0].data["reason"] == "User requested switch to coder"
    assert types(again) == ["agent_switched", "done"]
    current = server.http.get(f"/agents/{session_id}/current?include_history=true").json()
    assert current["switch_count"] == 1
    assert len(current["context"]["switch_history"]) == 1
    assert server.history(session_id) == []
    assert len(played.requests) == asked


def test_a_switch_while_a_turn_runs_shows_at_once_and_counts_from_the_next_step(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_agent(server, session_id, "coder")
    played.script(hold("Half a ", "sentence.", gate=gate), say("A plan."))
    with server.streaming({"type": "user_message", "content": "go"}, session_id) as answer:
        until(answer, "assistant_message")
        with server.following(session_id) as stream:
            switched = server.post({"type": "switch_agent", "agent_type": "architect"}, session_id)
            seen = until(stream, "agent_switched")
            while seen[-1].data.get("to_agent") != "architect":
                seen += until(stream, "agent_switched")
        gate.open()
        rest = list(answer)

    assert types(switched) == ["agent_switched", "done"]
    assert switched[0].id == seen[-1].id
    assert "agent_switched" not in types(rest), "the answer to a message carries the frames of its own turn only"
    assert types(rest)[-3:] == ["assistant_message", "turn_finished", "done"]
    server.say(session_id, "and now?")
    assert played.answers[-1]["messages"][0]["content"].startswith("You are the architect")


def test_messages_queue_behind_a_running_turn_and_a_seventh_is_refused(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_agent(server, session_id, "coder")
    played.script(hold("zero ", "done", gate=gate), *[say(f"answer {number}") for number in range(1, 6)])

    def send(number: int) -> list[Frame]:
        return server.say(session_id, f"message {number}")

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(send, 0)]
        gate.reached.wait()
        for number in range(1, 6):
            answers.append(pool.submit(send, number))
            eventually(lambda expected=number + 1: len(server.history(session_id)) == expected)
        body = {"session_id": session_id, "message": {"type": "user_message", "content": "one too many"}}
        refused = server.http.post("/agent/message/stream", json=body)
        gate.open()
        finished = [answer.result(30) for answer in answers]

    assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
    assert int(refused.headers["Retry-After"]) > 0
    assert all(types(frames)[-2:] == ["turn_finished", "done"] for frames in finished)
    assert server.history(session_id) == [
        (role, text)
        for number in range(6)
        for role, text in (
            ("user", f"message {number}"),
            ("assistant", "zero done" if number == 0 else f"answer {number}"),
        )
    ]
    for number, request in enumerate(played.answers[-6:]):
        assert request["messages"][-1]["content"] == f"message {number}", "a model reads no later turn's messages"


def test_cancel_keeps_what_was_said_and_the_next_message_works(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_agent(server, session_id, "coder")
    played.script(hold("Half a ", "sentence.", gate=gate), say("Fresh start."))
    with server.streaming({"type": "user_message", "content": "go"}, session_id) as answer:
        until(answer, "assistant_message")
        gate.reached.wait()
        outcome = server.http.post(f"/sessions/{session_id}/cancel").json()
        rest = list(answer)
    gate.open()

    assert outcome["session_id"] == session_id
    finished = next(frame for frame in rest if frame.type == "turn_finished")
    assert (finished.data["turn_id"], finished.data["status"]) == (outcome["cancelled_turn"], "cancelled")
    assert [frame.data["content"] for frame in rest if "content" in frame.data] == ["Half a "]
    assert types(server.say(session_id, "again"))[-3:] == ["assistant_message", "turn_finished", "done"]
    assert server.history(session_id) == [
        ("user", "go"),
        ("assistant", "Half a "),
        ("user", "again"),
        ("assistant", "Fresh start."),
    ]


def test_cancel_before_the_first_word_leaves_a_history_that_a_strict_model_takes(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_agent(server, session_id, "coder")
    played.script(hold("", "never heard", gate=gate), say("Fresh start."))
    with server.streaming({"type": "user_message", "content": "go"}, session_id) as answer:
        until(answer, "turn_started")
        gate.reached.wait()
        server.http.post(f"/sessions/{session_id}/cancel")
        rest = list(answer)
    gate.open()

    assert types(rest) == ["turn_finished", "done"]
    server.say(session_id, "again")
    assert played.answers[-1]["messages"][-1] == {"role": "user", "content": "go\n\nagain"}


def test_cancel_ends_the_open_turn_and_what_is_queued_goes_on(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_agent(server, session_id, "coder")
    played.script(hold("", "never heard", gate=gate), say("second answer"))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.say, session_id, "first")
        gate.reached.wait()
        second = pool.submit(server.say, session_id, "second")
        eventually(lambda: len(server.history(session_id)) == 2)
        server.http.post(f"/sessions/{session_id}/cancel")
        assert types(first.result(30))[-2:] == ["turn_finished", "done"]
        assert types(second.result(30))[-3:] == ["assistant_message", "turn_finished", "done"]
    gate.open()

    assert server.http.post(f"/sessions/{session_id}/cancel").json()["cancelled_turn"] is None


def test_a_deleted_session_ends_its_turn_and_its_streams_and_is_gone(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_agent(server, session_id, "coder")
    played.script(hold("", "never heard", gate=gate))
    with (
        server.streaming({"type": "user_message", "content": "go"}, session_id) as answer,
        server.following(session_id) as stream,
        ThreadPoolExecutor(1) as pool,
    ):
        gate.reached.wait()
        queued = pool.submit(server.say, session_id, "and then")
        eventually(lambda: len(server.history(session_id)) == 2)
        assert server.http.delete(f"/sessions/{session_id}").status_code == 204
        assert types(list(answer))[-2:] == ["turn_finished", "done"]
        assert types(queued.result(30)) == ["turn_finished", "done"]
        whole = list(stream)  # ends, with the last word
        assert [frame.data["status"] for frame in whole if frame.type == "turn_finished"] == ["cancelled"] * 2
    gate.open()

    assert server.http.get(f"/sessions/{session_id}/history").status_code == 404
    assert server.http.post("/sessions", json={"session_id": session_id}).status_code == 409
    body = {"session_id": session_id, "message": {"type": "user_message", "content": "hello?"}}
    assert server.http.post("/agent/message/stream", json=body).status_code == 404


def test_fifty_messages_at_once_keep_the_order_of_acceptance(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    on_agent(server, session_id, "coder")

    def send(number: int) -> bool:
        body = {"session_id": session_id, "message": {"type": "user_message", "content": f"m{number}"}}
        return server.http.post("/agent/message/stream", json=body).status_code == 200

    with ThreadPoolExecutor(12) as pool:
        accepted = sum(pool.map(send, range(50)))

    history = server.history(session_id)
    assert [role for role, _ in history] == ["user", "assistant"] * accepted
    assert accepted >= 6


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (status(400), "model_rejected"),
        (drop(after="Half"), "model_interrupted"),
        (html(), "model_bad_response"),
        (empty(), "model_empty_answer"),
    ],
)
def test_a_model_fault_is_a_clear_error_and_the_session_stays_usable(
    server: Server, played: ScriptedLLM, session_id: str, reply: Reply, code: str
) -> None:
    on_agent(server, session_id, "coder")
    played.script(reply, say("Back again."))

    frames = server.say(session_id, "go")

    error, finished = frames[-3].data, frames[-2].data
    assert (error["type"], error["metadata"]["code"], error["is_final"]) == ("error", code, True)
    assert error["content"] == error["error"]
    assert frames[-3].event == "message"
    assert (finished["status"], finished["code"]) == ("failed", code)
    assert types(server.say(session_id, "again"))[-3:] == ["assistant_message", "turn_finished", "done"]
    assert server.history(session_id) == [("user", "go"), ("user", "again"), ("assistant", "Back again.")]


def test_a_model_that_fails_twice_is_asked_again(server: Server, played: ScriptedLLM, session_id: str) -> None:
    on_agent(server, session_id, "coder")
    played.script(status(503), status(429, retry_after=0), say("Third time lucky."))

    server.say(session_id, "go")

    assert server.history(session_id)[-1] == ("assistant", "Third time lucky.")
    figures = server.http.get(f"/events/metrics/session/{session_id}").json()
    assert (figures["total_requests"], figures["failed_requests"]) == (1, 0)


def test_control_characters_of_the_model_reach_clients_in_one_frame(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    hostile = "a\u2028b\u2029c\u0085d\r\n\ndata: {}\n\nevent: done\n\x00\x1b[31m"
    on_agent(server, session_id, "coder")
    played.script(say(hostile, pieces=[hostile]))

    frames = server.say(session_id, "go")

    assert types(frames) == ["turn_started", "delta", "assistant_message", "turn_finished", "done"]
    assert frames[-3].data["content"] == hostile.replace("\x00", "\ufffd")
    assert server.history(session_id)[-1][1] == frames[-3].data["content"]


def test_the_router_reads_the_message_of_its_turn_alone(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.route(hold("", "never heard", gate=(gate := Gate())))
    with server.streaming({"type": "user_message", "content": "write a story"}, session_id) as answer:
        until(answer, "turn_started")
        gate.reached.wait()
        server.http.post(f"/sessions/{session_id}/cancel")
        list(answer)
    gate.open()
    played.script(say("ok"))

    server.say(session_id, "please explain recursion")

    assert played.routings[-1]["messages"][-1]["content"] == "please explain recursion"


def test_a_router_cannot_spell_what_no_database_takes(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.route(say(r'{"agent": "ask", "confidence": "high", "reasoning": "a \ud800 b \u0000 c"}'))
    played.script(say("ok"))

    frames = server.say(session_id, "hello")

    assert frames[1].data["reason"] == "a \ufffd b \ufffd c"
    assert frames[-2].data["status"] == "completed"


@pytest.mark.parametrize("tokens", [-1, 10**20])
def test_a_provider_that_cannot_count_spoils_no_answer(
    server: Server, played: ScriptedLLM, session_id: str, tokens: int
) -> None:
    on_agent(server, session_id, "coder")
    played.script(say("Well.", usage=(tokens, 5)))

    frames = server.say(session_id, "go")

    assert frames[-2].data["status"] == "completed"
    assert server.history(session_id)[-1] == ("assistant", "Well.")


def test_a_position_still_to_come_is_answered_by_a_reset_while_a_turn_runs(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    on_agent(server, session_id, "coder")
    played.script(hold("Half a ", "sentence.", gate=gate))
    with server.streaming({"type": "user_message", "content": "go"}, session_id) as answer:
        seen = until(answer, "assistant_message")
        with server.following(session_id, after=seen[-1].seq + 1_000) as stream:
            assert next(stream).type == "stream_reset"
        gate.open()
        list(answer)


def test_a_deleted_session_has_no_figures(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.script(say("ok"))
    server.say(session_id, "go", agent_type="ask")
    server.http.delete(f"/sessions/{session_id}")

    answer = server.http.get(f"/events/metrics/session/{session_id}")

    assert (answer.status_code, answer.json()["error"]) == (404, f"No metrics found for session {session_id}")


def test_numbers_that_nobody_saw_are_given_back_at_the_end(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    on_agent(server, session_id, "coder")
    played.script(say("one two"), say("three"))

    first = server.say(session_id, "go")
    second = server.say(session_id, "on")

    assert second[0].seq == first[-2].seq + 1
    with server.following(session_id, after=second[-2].seq + 1) as stream:
        assert next(stream).type == "stream_reset"

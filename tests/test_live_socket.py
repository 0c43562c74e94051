"""The socket for those who ask for more: `?tokens=1` and `?live=1`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests import databases
from tests.scripted_llm import Gate, ScriptedLLM, call, hold, say
from tests.server import Frame, Server, eventually, running, until
from tests.test_socket import (
    Chat,
    assert_refused,
    error,
    on_coder,
    opened,
    parrot,
    refusal,
    said,
    user,
)

WRITE = {"path": "a.md", "content": "x"}


@pytest.fixture(scope="module")
def server(shared_server: Server, shared_llm: ScriptedLLM) -> Iterator[Server]:
    shared_llm.default = parrot
    yield shared_server
    log = shared_server.log.read_text()
    assert "Traceback" not in log, log


def heard_until(chat: Chat, kind: str) -> list[dict[str, Any]]:
    """Everything up to and including the first message of a type."""
    received = [chat.receive()]
    while received[-1]["type"] != kind:
        received.append(chat.receive())
    return received


def as_shown(frames: list[Frame], *, tokens: bool = False) -> list[dict[str, Any]]:
    """Frames of an event stream as a live socket shows them."""
    return [{"id": frame.id, **frame.data} for frame in frames if tokens or "token" not in frame.data]


def whole_stream(server: Server, session_id: str, *, turns: int = 1, after: int = 0) -> list[Frame]:
    """What the session's stream says up to the end of so many turns."""
    with server.following(session_id, after) as stream:
        return [frame for _ in range(turns) for frame in until(stream, "turn_finished")]


def position(server: Server, session_id: str) -> int:
    return int(server.http.get(f"/sessions/{session_id}/open-calls").json()["position"])


# --- Token deltas ---------------------------------------------------------------------------------------------------


def test_tokens_come_as_chunks_with_a_token_and_then_once_whole(server: Server, played: ScriptedLLM) -> None:
    played.script(say("One two three."))

    with opened(server, "/ws/tokens?tokens=1") as chat:
        answer = chat.answer_to(user("Count."))

    routed, *deltas, whole = answer
    assert routed["type"] == "agent_switched"
    for delta in deltas:
        assert set(delta) == {"id", "type", "token", "is_final"}
        assert (delta["type"], delta["is_final"]) == ("assistant_message", False)
    assert "".join(delta["token"] for delta in deltas) == whole["content"] == "One two three."
    assert whole == {**said("One two three."), "id": whole["id"]}
    frames = whole_stream(server, "tokens")
    assert answer == as_shown([each for each in frames if not each.type.startswith("turn_")], tokens=True)


def test_tokens_are_not_others(server: Server) -> None:
    on_coder(server, "own-tokens")
    with opened(server, "/ws/own-tokens?tokens=true") as one, opened(server, "/ws/own-tokens") as other:
        assert other.answer_to(user("first")) == [said("first")]
        assert [each.get("token") or each["content"] for each in one.answer_to(user("second"))] == ["second", "second"]


def test_who_reads_tokens_is_told_when_they_are_void(server: Server, played: ScriptedLLM) -> None:
    gate = Gate()
    played.script(hold("Half an ", "answer.", gate=gate), say("Another answer."))

    with opened(server, f"/ws/{on_coder(server, 'void')}?tokens=1") as chat:
        chat.send(user("Say something."))
        first = chat.receive()
        with databases.changing(server.database) as database:
            database.execute("UPDATE sessions_app_turn SET lease_until = '2020-01-01' WHERE session_id = 'void'")
        restarted = heard_until(chat, "restarted")[-1]
        gate.open()
        rest = [chat.receive()]
        while "content" not in rest[-1]:
            rest.append(chat.receive())

    assert restarted["metadata"]["discard_after"] < first["id"] < restarted["id"]
    assert "".join(each["token"] for each in rest[:-1]) == rest[-1]["content"] == "Another answer."


# --- A live socket shows everything ---------------------------------------------------------------------------------


def test_a_live_socket_shows_what_others_bring_about(server: Server, played: ScriptedLLM) -> None:
    played.script(call("write_file", WRITE, text="I write it."), say("Written."), call("write_file", WRITE))
    on_coder(server, "live")
    before = position(server, "live")

    with opened(server, "/ws/live?live=1") as chat:
        assert chat.receive() == {"id": before, "type": "stream_position"}
        server.say("live", "Write it.")
        asked = heard_until(chat, "tool_call")
        call_id = asked[-1]["call_id"]
        server.http.post(f"/approvals/{call_id}/decision", json={"decision": "approve"})
        decided = chat.receive()
        server.post({"type": "tool_result", "call_id": call_id, "result": "ok"}, "live")
        done = heard_until(chat, "turn_finished")
        server.post({"type": "switch_agent", "agent_type": "debug"}, "live")
        switched = chat.receive()
        server.say("live", "Once more.", agent_type="coder")
        heard_until(chat, "tool_call")
        server.http.post("/sessions/live/cancel")
        cancelled = heard_until(chat, "turn_finished")

        received = [*asked, decided, *done, switched]
        assert [each["type"] for each in received] == [
            *("turn_started", "assistant_message", "tool_call", "approval_resolved"),
            *("assistant_message", "turn_finished", "agent_switched"),
        ]
        assert (decided["call_id"], decided["metadata"]["decision"]) == (call_id, "approve")
        assert switched["to_agent"] == "debug"
        assert [each["type"] for each in cancelled] == ["approval_resolved", "turn_finished"]
        assert cancelled[-1]["status"] == "cancelled"
        shown = as_shown(whole_stream(server, "live", turns=2, after=before))
        assert received == shown[: len(received)]
        assert cancelled == shown[-2:]


def test_it_shows_each_frame_once_and_in_order_its_own_answers_too(server: Server) -> None:
    on_coder(server, "both")
    before = position(server, "both")
    with opened(server, "/ws/both?live=1&tokens=1") as one, opened(server, "/ws/both?live=1&tokens=1") as other:
        for chat in (one, other):
            assert chat.receive()["type"] == "stream_position"
        one.send(user("from one"))
        other.send(user("from the other"))
        server.say("both", "from neither")
        heard = [[message for _ in range(3) for message in heard_until(chat, "turn_finished")] for chat in (one, other)]

        assert heard[0] == heard[1] == as_shown(whole_stream(server, "both", turns=3, after=before), tokens=True)
        # Nothing is left over: the answer to a last message is the next that comes.
        for chat in (one, other):
            assert chat.answer_to({"type": "?"}) == [error("Unknown message type: ?")]


def test_what_is_refused_is_told_to_its_sender_alone(server: Server) -> None:
    unknown = {"type": "tool_result", "call_id": "nobody-asked", "result": {}}
    path = f"/ws/{on_coder(server, 'refusals')}?live=1"
    with opened(server, path) as one, opened(server, path) as other:
        for chat in (one, other):
            chat.receive()

        assert one.answer_to("{") == [error("Invalid JSON message: The body is not valid JSON.")]
        assert one.answer_to(user("")) == [error("Agent error: 422")]
        (refused,) = one.answer_to(unknown)
        assert (refused["content"], refused["metadata"]["code"]) == (
            "No pending tool call nobody-asked",
            "unknown_call",
        )
        assert "id" not in refused
        server.post({"type": "switch_agent", "agent_type": "debug"}, "refusals")
        assert [chat.receive()["type"] for chat in (one, other)] == ["agent_switched"] * 2


def test_on_a_live_socket_nothing_waits_for_the_answer_before_it(server: Server, played: ScriptedLLM) -> None:
    gate = Gate()
    played.script(hold("Slow ", "answer.", gate=gate))
    with opened(server, f"/ws/{on_coder(server, 'busy')}?live=1") as chat:
        chat.receive()
        chat.send(user("Take your time."))
        gate.reached.wait()

        chat.send({"type": "switch_agent", "agent_type": "debug", "content": ""})
        assert heard_until(chat, "agent_switched")[-1]["to_agent"] == "debug"
        for number in range(6):
            chat.send(user(f"behind it {number}"))
        assert chat.receive() == error("Agent error: 429")
        gate.open()
        answers = [heard_until(chat, "turn_finished") for _ in range(6)]

    texts = [each["content"] for turn in answers for each in turn if each["type"] == "assistant_message"]
    assert texts == ["Slow answer.", *(f"behind it {number}" for number in range(5))]


def test_who_joins_in_the_middle_of_a_step_reads_it_from_its_beginning(server: Server, played: ScriptedLLM) -> None:
    gate = Gate()
    played.script(say("Long ago."), hold("Half an ", "answer.", gate=gate))
    server.say(on_coder(server, "joined"), "First.")
    with ThreadPoolExecutor(1) as pool:
        turn = pool.submit(server.say, "joined", "Second.")
        gate.reached.wait()
        with opened(server, "/ws/joined?live=1&tokens=1") as chat:
            chat.receive()
            first = chat.receive()
            gate.open()
            rest = heard_until(chat, "turn_finished")
        turn.result()

    assert "".join(each.get("token", "") for each in [first, *rest]) == "Half an answer."
    assert [each["content"] for each in rest if "content" in each] == ["Half an answer."]


# --- Coming back ----------------------------------------------------------------------------------------------------


def test_who_comes_back_by_number_misses_nothing_and_reads_nothing_twice(server: Server, played: ScriptedLLM) -> None:
    played.script(call("write_file", WRITE, text="I write it."), say("Another answer."))
    on_coder(server, "again")
    server.say("again", "Write it.")
    server.say("again", "Never mind.")
    everything = as_shown(whole_stream(server, "again", turns=2), tokens=True)
    assert len(everything) > 10

    for read, last in enumerate(everything, start=1):
        with opened(server, f"/ws/again?live=1&tokens=1&after={last['id']}") as chat:
            assert chat.receive() == {"id": last["id"], "type": "stream_position"}
            assert [chat.receive() for _ in everything[read:]] == everything[read:]
            assert chat.answer_to({"type": "?"}), "and nothing else"
    with opened(server, "/ws/again?live=1&after=0") as chat:
        assert chat.receive() == {"id": 0, "type": "stream_position"}
        assert chat.receive() == everything[0], "0 is the oldest frame that is kept"


def test_a_position_that_never_was_or_is_gone_is_reset(server: Server) -> None:
    server.say(on_coder(server, "reset"), "Hello")
    everything = as_shown(whole_stream(server, "reset"))
    highest = everything[-1]["id"]

    def shown_after(asked: int) -> list[dict[str, Any]]:
        with opened(server, f"/ws/reset?live=1&after={asked}") as chat:
            return heard_until(chat, "turn_finished")

    oldest = everything[0]["id"]
    reset = {"id": oldest - 1, "type": "stream_reset", "metadata": {"from": oldest}}
    assert shown_after(highest + 1) == [reset, *everything]
    assert shown_after(999_999_999_999_999_999) == [reset, *everything]

    pruned = "UPDATE sessions_app_session SET pruned_seq = {} WHERE id = 'reset'"
    with databases.meanwhile(server.database, [pruned.format(2)], [pruned.format(0)]):
        assert shown_after(1) == [reset, *everything]
    with opened(server, "/ws/never-was?live=1&after=7") as chat:
        assert chat.receive() == {"id": 0, "type": "stream_reset", "metadata": {"from": 1}}


# --- Whose it is ----------------------------------------------------------------------------------------------------


def test_a_session_that_is_not_there_yet_is_followed_from_its_first_message_on(server: Server) -> None:
    with opened(server, "/ws/unborn?live=1") as one, opened(server, "/api/v1/ws/unborn?live=1") as other:
        for chat in (one, other):
            assert chat.receive() == {"id": 0, "type": "stream_position"}
        assert server.http.get("/sessions/unborn").status_code == 404, "to listen makes nothing"
        one.send(user("Be born.", agent_type="coder"))

        heard = [heard_until(chat, "turn_finished") for chat in (one, other)]

    assert heard[0] == heard[1] == as_shown(whole_stream(server, "unborn"))


def test_a_session_that_turns_out_to_be_somebody_elses_shows_nothing(server: Server) -> None:
    steal, keep = (
        "UPDATE sessions_app_session SET account_id = 2 WHERE id = 'stolen'",
        "AFTER INSERT ON sessions_app_turn",
    )
    if databases.ON_POSTGRESQL:
        body = f"BEGIN IF NEW.session_id = 'stolen' THEN {steal}; END IF; RETURN NEW; END"
        there = [
            f"CREATE FUNCTION steal() RETURNS trigger LANGUAGE plpgsql AS $${body}$$",
            f"CREATE TRIGGER steal {keep} FOR EACH ROW EXECUTE FUNCTION steal()",
        ]
        back = ["DROP FUNCTION steal CASCADE"]
    else:
        there = [f"CREATE TRIGGER steal {keep} WHEN NEW.session_id = 'stolen' BEGIN {steal}; END"]
        back = ["DROP TRIGGER steal"]
    there.append("INSERT INTO sessions_app_account (id, name) VALUES (2, 'other')")
    back.append("UPDATE sessions_app_session SET account_id = 1 WHERE account_id = 2")
    back.append("DELETE FROM sessions_app_account WHERE id = 2")
    with (
        databases.meanwhile(server.database, there, back),
        opened(server, "/ws/stolen?live=1") as chat,
    ):
        chat.receive()
        server.say("stolen", "Mine.", agent_type="coder")

        with pytest.raises(ConnectionClosed):
            raise AssertionError(chat.receive())
        assert chat.connection.close_code == 4404
        assert_refused(refusal(server, "/ws/stolen?live=1"), 404, "session_not_found")


def test_a_deleted_session_ends_its_live_sockets_and_takes_no_new_one(server: Server) -> None:
    server.say(on_coder(server, "mortal"), "Hello")
    with opened(server, "/ws/mortal?live=1") as live, opened(server, "/ws/mortal") as plain:
        live.receive()
        server.http.delete("/sessions/mortal")

        with pytest.raises(ConnectionClosed):
            live.receive()
        assert live.connection.close_code == 4404
        assert plain.answer_to(user("?")) == [error("Agent error: 404")], "as the gateway had it"
    for query in ("live=1", "live=1&after=1"):
        assert_refused(refusal(server, f"/ws/mortal?{query}"), 404, "session_not_found")


# --- The address ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("tokens=yes", 422),
        ("tokens=", 422),
        ("tokens=2", 422),
        ("tokens=1&tokens=1", 422),
        ("live=on", 422),
        ("live=%00", 422),
        ("live=1&live=0", 422),
        ("after=1", 422),
        ("live=0&after=1", 422),
        ("live=1&after=1&after=2", 422),
        ("live=1&after=" + "9" * 201, 422),
        ("live=1&after=", 400),
        ("live=1&after=-1", 400),
        ("live=1&after=1.0", 400),
        ("live=1&after=0x1", 400),
        ("live=1&after=%D9%A1", 400),
        ("live=1&after=" + "9" * 19, 400),
        ("&".join(f"a{number}=1" for number in range(1001)), 422),
    ],
)
def test_a_parameter_that_says_nothing_sensible_is_refused_before_the_socket_opens(
    server: Server, query: str, status: int
) -> None:
    assert_refused(refusal(server, f"/ws/parameters?{query}"), status, "invalid" if status == 422 else "bad_request")


@pytest.mark.parametrize("query", ["", "live=0", "tokens=false&live=false", "TOKENS=1", "x=1&y=%ff", "live=0&tokens=0"])
def test_other_parameters_change_nothing(server: Server, query: str) -> None:
    with opened(server, f"/ws/{on_coder(server, 'unasked')}?{query}") as chat:
        assert chat.answer_to(user("Hello")) == [said("Hello")]


def test_without_the_database_a_live_socket_is_refused(tmp_path: Path, migrated: Path) -> None:
    with running(tmp_path, migrated) as server, databases.without(server.database, "sessions_app_session"):
        refused = refusal(server, "/ws/nowhere?live=1")

        assert_refused(refused, 503, "unavailable")
        assert int(refused.headers["Retry-After"]) > 0
        with opened(server, "/ws/nowhere?tokens=1") as chat:
            assert chat.answer_to({"type": "?"}), "only a live one needs it"


# --- Places, stops, slow readers ------------------------------------------------------------------------------------


def test_a_live_socket_takes_one_place(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, STREAMS_AT_ONCE="2") as server:
        with opened(server, "/ws/a?live=1") as one, opened(server, "/ws/b") as other:
            one.send(user("Hello", agent_type="coder"))
            heard_until(one, "turn_finished")
            assert other.answer_to({"type": "?"})
            for path in ("/ws/a?live=1", "/ws/c"):
                assert_refused(refusal(server, path), 503, "too_many_streams")
        eventually(lambda: server.http.get("/sessions/nobody/stream").status_code == 404)


def test_a_live_socket_outlives_a_stop_by_its_number(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:
    gate = Gate()
    llm.script(hold("Half an ", "answer.", gate=gate), say("A whole answer."))
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, STREAM_MAX_AGE_SECONDS="1") as server:
        with opened(server, f"/ws/{on_coder(server, 'stopped')}?live=1&tokens=1") as chat:
            seen = [chat.receive()]
            chat.send(user("Say something."))
            gate.reached.wait()
            seen += heard_until(chat, "assistant_message")
            assert server.stop() == 0
            with pytest.raises(ConnectionClosed):
                while True:
                    seen.append(chat.receive())
            assert chat.connection.close_code == 1012
        assert "Traceback" not in server.log.read_text()
        gate.open()
        server.start()
        with opened(server, f"/ws/stopped?live=1&tokens=1&after={seen[-1]['id']}") as chat:
            assert chat.receive()["type"] == "stream_position"
            seen += heard_until(chat, "turn_finished")

        assert seen[1:] == as_shown(whole_stream(server, "stopped", after=seen[0]["id"]), tokens=True)


def test_a_live_reader_that_takes_nothing_is_cut_and_goes_on_where_it_was(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    text = "x" * 900
    llm.script(say(text * 6_000, pieces=[text] * 6_000))
    limits = {"STREAM_STALL_SECONDS": "1", "TURN_MAX_OUTPUT_CHARS": "9000000"}
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, **limits) as server:
        on_coder(server, "deaf")
        with opened(server, "/ws/deaf?live=1&tokens=1", max_queue=1) as deaf:
            ids = [deaf.receive()["id"]]
            server.say("deaf", "Talk a lot.")
            eventually(lambda: "reader_stalled" in server.log.read_text())
            with pytest.raises(ConnectionClosed):
                while True:
                    ids.append(deaf.receive()["id"])
        assert "Traceback" not in server.log.read_text()
        with opened(server, f"/ws/deaf?live=1&tokens=1&after={ids[-1]}", max_size=None) as chat:
            chat.receive()
            ids += [each["id"] for each in heard_until(chat, "turn_finished")]

        assert ids[1:] == [frame.id for frame in whole_stream(server, "deaf", after=ids[0])]


def test_daphne_serves_live_sockets_too(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:
    llm.script(say("Hello."))
    with running(tmp_path, migrated, server="daphne", LLM_BASE_URL=llm.url) as daphne:
        on_coder(daphne, "daphne")
        assert refusal(daphne, "/ws/daphne?live=maybe").status_code == 403
        with opened(daphne, "/ws/daphne?live=1&tokens=1") as chat:
            chat.receive()
            chat.send(user("Hello?"))
            assert heard_until(chat, "turn_finished") == as_shown(
                whole_stream(daphne, "daphne", after=position(daphne, "daphne") - 4), tokens=True
            )
            daphne.http.delete("/sessions/daphne")
            with pytest.raises(ConnectionClosed):
                chat.receive()
            assert chat.connection.close_code == 4404

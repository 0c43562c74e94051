"""What a model may do wrong with tools, and what else may go wrong around a call (guarantees F12, S26, S29, S31)."""

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import databases
from tests.scripted_llm import Body, Gate, Reply, ScriptedLLM, call, calls, drop, gated, raw, say
from tests.server import Frame, Server, eventually, running

Object = dict[str, Any]

LIMIT = 256 * 1024
READ = {"path": "a.md"}
WRITE = {"path": "a.md", "content": "x"}


@pytest.fixture
def server(shared_server: Server, played: ScriptedLLM) -> Server:
    return shared_server


def on(server: Server, agent: str = "coder") -> str:
    """A session that sits on a specialist."""
    session_id = str(uuid.uuid4())
    server.post({"type": "switch_agent", "agent_type": agent}, session_id)
    return session_id


def result_of(server: Server, session_id: str, asked: Object, result: Any = "done") -> list[Frame]:
    return server.post({"type": "tool_result", "call_id": asked["call_id"], "result": result}, session_id)


def calls_in(frames: list[Frame]) -> list[Object]:
    return [frame.data for frame in frames if frame.type == "tool_call"]


def texts_in(frames: list[Frame]) -> list[tuple[str, bool]]:
    whole = [frame.data for frame in frames if frame.type == "assistant_message" and "content" in frame.data]
    return [(chunk["content"], chunk["is_final"]) for chunk in whole]


def errors_in(frames: list[Frame]) -> list[str]:
    return [frame.data["metadata"]["code"] for frame in frames if frame.type == "error"]


def ended(frames: list[Frame]) -> tuple[str, str | None]:
    """How the turn ended with this answer, which is complete."""
    assert frames[-1].event == "done"
    assert frames[-2].type == "turn_finished", frames[-2].data
    return frames[-2].data["status"], frames[-2].data["code"]


def messages(server: Server, session_id: str) -> list[Object]:
    return server.http.get(f"/sessions/{session_id}/history").json()["messages"]


def open_calls(server: Server, session_id: str) -> list[Object]:
    return server.http.get(f"/sessions/{session_id}/open-calls").json()["open_calls"]


def pending(server: Server, session_id: str) -> list[Object]:
    return server.http.get(f"/sessions/{session_id}/pending-approvals").json()["pending_approvals"]


def rows(server: Server, query: str, *parameters: str) -> list[tuple[Any, ...]]:
    return databases.rows(server.database, query, *parameters)


def change(server: Server, statement: str, *parameters: Any) -> None:
    """What an administrator changes, while the server runs."""
    databases.change(server.database, statement, *parameters)


def read_by(request: Object) -> dict[str, str]:
    """The tool results in a model request."""
    return {one["tool_call_id"]: one["content"] for one in request["messages"] if one["role"] == "tool"}


def spoken_by(request: Object) -> str:
    return re.findall(r"You are the (\w+)", request["messages"][0]["content"])[0]


def nested(depth: int) -> str:
    """The arguments of a call, with so many levels in all."""
    return '{"path": "a.md", "more": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def filled(size: int, filler: str = "x") -> str:
    """Arguments of `write_file` with exactly so many bytes."""
    head, tail = '{"path":"a.md","content":"', '"}'
    room = size - len(head) - len(tail)
    assert room % len(filler.encode()) == 0
    return head + filler * (room // len(filler.encode())) + tail


def escaped(tool: str, arguments: str) -> Body:
    """A call whose event is pure ASCII: escapes can bring what UTF-8 cannot."""
    function = {"name": tool, "arguments": arguments}
    delta = {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]}
    events = [{"delta": delta}, {"delta": {}, "finish_reason": "tool_calls"}]
    return raw(*(f"data: {json.dumps({'choices': [event]})}\n\n".encode() for event in events), b"data: [DONE]\n\n")


# --- calls that cannot be made -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        pytest.param(call("no_such_tool", READ), "no_such_tool", id="unknown tool"),
        pytest.param(call("READ_FILE", READ), "READ_FILE", id="wrong case"),
        pytest.param(call("read_file", '{"path": "a'), "JSON", id="cut off"),
        pytest.param(call("read_file", "path=a.md"), "JSON", id="no JSON"),
        pytest.param(call("read_file", '{"path": "a.md"} {"path": "b.md"}'), "JSON", id="two objects"),
        pytest.param(call("read_file", "{'path': 'a.md'}"), "JSON", id="single quotes"),
        pytest.param(call("read_file", '["a.md"]'), "object", id="array"),
        pytest.param(call("read_file", '"a.md"'), "object", id="string"),
        pytest.param(call("read_file", "null"), "object", id="null"),
        pytest.param(call("read_file", '{"path": "a.md", "path": "b.md"}'), "twice", id="duplicate key"),
        pytest.param(call("read_file", '{"path": "a.md", "start_line": NaN}'), "JSON", id="NaN"),
        pytest.param(call("read_file", '{"path": "a.md", "start_line": -Infinity}'), "JSON", id="infinity"),
        pytest.param(call("read_file", '{"path": "a.md", "start_line": 1e999}'), "JSON", id="1e999"),
        pytest.param(call("read_file", '{"path": "a.md", "start_line": ' + "1" * 5000 + "}"), "JSON", id="5000 digits"),
        pytest.param(call("read_file", nested(65)), "64", id="depth 65"),
        pytest.param(call("read_file", nested(20_000)), "64", id="depth 20000"),
        pytest.param(call("read_file", r'{"path": "a\u0000.md"}'), "NUL", id="escaped NUL"),
        pytest.param(call("read_file", '{"path": "a\0.md"}'), "", id="raw NUL"),
        pytest.param(call("read_file", r'{"path": "a\ud800.md"}'), "surrogate", id="escaped lone surrogate"),
        pytest.param(escaped("read_file", '{"path": "a\ud800.md"}'), "", id="raw lone surrogate"),
        pytest.param(call("read_file", r'{"path": "a.md", "\u0000": 1}'), "NUL", id="NUL in a key"),
        pytest.param(call("read_file", ""), "path", id="empty text lacks what is required"),
        pytest.param(call("write_file", {"path": "a.md"}), "content", id="missing field"),
        pytest.param(call("read_file", {"path": 7}), "7", id="wrong type"),
        pytest.param(call("read_file", {"path": None}), "path", id="null for a text"),
        pytest.param(call("read_file", {"path": ""}), "path", id="too short"),
        pytest.param(call("execute_command", {"command": "ls", "timeout": 301}), "timeout", id="above the maximum"),
        pytest.param(call("write_file", filled(LIMIT + 1)), "256 KiB", id="one byte above 256 KiB"),
        pytest.param(call("write_file", filled(1024 * 1024)), "256 KiB", id="1 MiB"),
    ],
)
def test_a_call_that_cannot_be_made_is_answered_to_the_model_and_never_released(
    server: Server, played: ScriptedLLM, reply: Reply, why: str
) -> None:
    session_id = on(server)
    asked = len(played.answers)
    played.script(reply, say("Sorry."))

    answer = server.say(session_id, "go")

    assert calls_in(answer) == []
    assert errors_in(answer) == [], "a slip of the model is told to the model alone"
    assert texts_in(answer) == [("Sorry.", True)]
    assert ended(answer) == ("completed", None)
    assert (open_calls(server, session_id), pending(server, session_id)) == ([], [])
    (refusal,) = read_by(played.answers[-1]).values()
    assert refusal.startswith("Error: ")
    assert why in refusal
    assert len(refusal) < 2_000
    (told,) = [one for one in played.answers[-1]["messages"] if one.get("tool_calls")]
    assert isinstance(json.loads(told["tool_calls"][0]["function"]["arguments"]), dict), "what a strict provider takes"
    assert [one["role"] for one in messages(server, session_id)] == ["user", "assistant", "tool", "assistant"]
    assert len(played.answers) == asked + 2


def test_an_agent_that_does_not_exist_is_no_schema_of_a_handover(server: Server, played: ScriptedLLM) -> None:
    session_id = on(server, "architect")
    played.script(call("switch_mode", {"mode": "poet"}), call("switch_mode", {"mode": "universal"}), say("I stay."))

    answer = server.say(session_id, "go")

    assert texts_in(answer) == [("I stay.", True)]
    assert "agent_switched" not in [frame.type for frame in answer]
    assert [spoken_by(request) for request in played.answers[-3:]] == ["architect"] * 3
    assert all(text.startswith("Error: ") for text in read_by(played.answers[-1]).values())


def test_what_cannot_be_made_does_not_hold_up_what_can(server: Server, played: ScriptedLLM) -> None:
    session_id = on(server)
    played.script(
        calls(call("read_file", "{"), call("read_file", READ), call("nothing", READ), call("write_file", WRITE)),
        say("Done."),
    )

    reading, writing = calls_in(server.say(session_id, "go"))
    result_of(server, session_id, reading, "text of a.md")
    answer = result_of(server, session_id, writing, {"success": True})

    assert ended(answer) == ("completed", None)
    results = list(read_by(played.answers[-1]).values())
    assert [text.partition(":")[0] for text in results] == ["Error", "Error", "text of a.md", '{"success"']


@pytest.mark.parametrize("filler", ["x", "\u00e9", "\u20ac\u20ac"])
def test_arguments_of_exactly_256_kib_are_kept_whole(server: Server, played: ScriptedLLM, filler: str) -> None:
    session_id = on(server)
    size = LIMIT - (LIMIT - len(filled(28))) % len(filler.encode())
    arguments = filled(size, filler)
    played.script(call("write_file", arguments), say("Done."))

    (asked,) = calls_in(server.say(session_id, "go"))

    assert LIMIT - 6 < len(arguments.encode()) <= LIMIT
    assert asked["arguments"] == json.loads(arguments)
    assert open_calls(server, session_id)[0]["arguments"] == json.loads(arguments)
    assert ended(result_of(server, session_id, asked)) == ("completed", None)
    sent = played.answers[-1]["messages"][-2]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(sent) == json.loads(arguments)


def test_arguments_may_be_64_levels_deep(server: Server, played: ScriptedLLM) -> None:
    session_id = on(server)
    played.script(call("read_file", nested(64)), say("Done."))

    (asked,) = calls_in(server.say(session_id, "go"))

    assert asked["arguments"] == json.loads(nested(64))
    assert ended(result_of(server, session_id, asked)) == ("completed", None)


@pytest.mark.parametrize("arguments", ["", " \n"])
def test_empty_arguments_are_an_empty_object(server: Server, played: ScriptedLLM, arguments: str) -> None:
    session_id = on(server)
    played.script(call("list_files", arguments), say("Done."))
    ((schema,),) = rows(server, "SELECT parameters FROM agents_app_tool WHERE name = 'list_files'")
    set_schema = "UPDATE agents_app_tool SET parameters = ? WHERE name = 'list_files'"
    change(server, set_schema, '{"type": "object"}')  # which requires nothing, unlike all that are seeded
    try:
        (asked,) = calls_in(server.say(session_id, "go"))
    finally:
        change(server, set_schema, schema)

    assert asked["arguments"] == {}
    assert ended(result_of(server, session_id, asked)) == ("completed", None)
    assert json.loads(messages(server, session_id)[1]["tool_calls"][0]["function"]["arguments"]) == {}


# --- ids and names of the provider ---------------------------------------------------------------------------------


@pytest.mark.parametrize("provider_id", ["call_same", ""], ids=["repeated", "missing"])
def test_ids_that_tell_nothing_apart_are_replaced_by_our_own(
    server: Server, played: ScriptedLLM, provider_id: str
) -> None:
    session_id = on(server)
    both = [call("read_file", {"path": path}, id=provider_id) for path in ("a.md", "b.md")]
    played.script(calls(*both), call("read_file", {"path": "c.md"}, id=provider_id), say("Read."))

    first, second = calls_in(server.say(session_id, "go"))
    result_of(server, session_id, second, "of b")
    (third,) = calls_in(result_of(server, session_id, first, "of a"))
    answer = result_of(server, session_id, third, "of c")

    assert ended(answer) == ("completed", None)
    assert len({first["call_id"], second["call_id"], third["call_id"]}) == 3
    assert read_by(played.answers[-1]) == {
        first["call_id"]: "of a",
        second["call_id"]: "of b",
        third["call_id"]: "of c",
    }


def test_the_same_id_in_two_sessions_names_two_calls(server: Server, played: ScriptedLLM) -> None:
    here, there = on(server), on(server)
    played.script(call("write_file", WRITE, id="call_1"), call("write_file", WRITE, id="call_1"))
    (asked_here,) = calls_in(server.say(here, "go"))
    (asked_there,) = calls_in(server.say(there, "go"))
    played.script(say("Here."), say("There."))

    crossed = result_of(server, there, asked_here)
    answer_here = result_of(server, here, asked_here)
    answer_there = result_of(server, there, asked_there)

    assert asked_here["call_id"] != asked_there["call_id"]
    assert errors_in(crossed) == ["unknown_call"]
    assert texts_in(answer_here) == [("Here.", True)]
    assert texts_in(answer_there) == [("There.", True)]


def test_no_id_of_the_provider_is_on_any_wire(server: Server, played: ScriptedLLM) -> None:
    session_id, theirs = on(server), "toolu_theirs_alone"
    played.script(
        calls(
            call("read_file", READ, id=f"{theirs}_1"),
            call("write_file", WRITE, id=f"{theirs}_2"),
            call("nothing", "{", id=f"{theirs}_3"),
        )
    )
    answer = server.say(session_id, "go")
    reading, writing = calls_in(answer)

    while_open = [
        server.http.get(path).text
        for path in (f"/sessions/{session_id}/open-calls", f"/sessions/{session_id}/pending-approvals", "/approvals")
    ]
    played.script(say("Done."))
    answer += result_of(server, session_id, reading) + result_of(server, session_id, writing)
    afterwards = [
        server.http.get(path).text
        for path in (
            f"/sessions/{session_id}/history",
            f"/sessions/{session_id}?include_messages=true",
            f"/approvals/{writing['call_id']}",
            f"/events/audit-log?session_id={session_id}",
        )
    ]

    said = json.dumps([frame.data for frame in answer])
    told_to_the_model = json.dumps(played.answers[-1])
    assert reading["call_id"] in told_to_the_model
    assert not any(theirs in text for text in [*while_open, *afterwards, said, told_to_the_model])
    kept = "SELECT provider_id FROM sessions_app_toolcall WHERE session_id = ? ORDER BY position"
    assert rows(server, kept, session_id) == [(f"{theirs}_{number}",) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    "name",
    [
        "read the file",
        "",
        "r" * 300,
        "lire_\u00e9t\u00e9",
        "functions.read_file",
        "a\nb",
        "\u202e",
        'x"}]',
        "nul\0",
        " read_file",
    ],
    ids=["spaces", "empty", "long", "accents", "dotted", "newline", "bidi", "quotes", "NUL", "leading blank"],
)
def test_a_name_that_no_provider_takes_back_is_told_to_the_model_in_letters(
    server: Server, played: ScriptedLLM, name: str
) -> None:
    session_id = on(server)
    played.script(call(name, READ), say("Sorry."), say("Still here."))

    assert ended(server.say(session_id, "go")) == ("completed", None)
    assert ended(server.say(session_id, "again")) == ("completed", None)

    for request in played.answers[-2:]:
        named = [one["function"]["name"] for message in request["messages"] for one in message.get("tool_calls", ())]
        offered = [one["function"]["name"] for one in request["tools"]]
        assert len(named) == 1
        assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", one) for one in [*named, *offered])
        (refusal,) = read_by(request).values()
        assert refusal.startswith("Error: ")
        assert len(refusal) < 1_000


# --- text beside calls ---------------------------------------------------------------------------------------------


def test_the_text_before_the_calls_is_kept_with_them(server: Server, played: ScriptedLLM) -> None:
    session_id = on(server)
    played.script(calls(call("read_file", READ), call("nothing", READ), text="First I read."), say("Then I answer."))

    answer = server.say(session_id, "go")
    (reading,) = calls_in(answer)
    rest = result_of(server, session_id, reading, "text of a.md")

    whole = [frame.type for frame in answer if frame.event == "message"]
    assert whole == ["assistant_message", "tool_call"]
    assert texts_in(answer) == [("First I read.", False)]
    assert texts_in(rest) == [("Then I answer.", True)]
    stored = messages(server, session_id)
    assert stored[1]["content"] == "First I read."
    assert len(stored[1]["tool_calls"]) == 2
    asking = played.answers[-1]["messages"][2]
    assert (asking["content"], len(asking["tool_calls"])) == ("First I read.", 2)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_calls_without_a_text_say_nothing(server: Server, played: ScriptedLLM, text: str) -> None:
    session_id = on(server)
    played.script(call("read_file", READ, text=text), say("Done."))

    answer = server.say(session_id, "go")
    (reading,) = calls_in(answer)

    assert texts_in(answer) == []
    assert ended(result_of(server, session_id, reading)) == ("completed", None)


# --- limits --------------------------------------------------------------------------------------------------------


def test_calls_without_end_are_cut_after_25_rounds(server: Server, played: ScriptedLLM) -> None:
    session_id = on(server)
    asked = len(played.answers)
    played.script(*[call("read_file", {"path": f"{number}.md"}) for number in range(25)])

    answer = server.say(session_id, "go")
    while reading := calls_in(answer):
        answer = result_of(server, session_id, reading[0])

    assert errors_in(answer) == ["too_many_rounds"]
    assert ended(answer) == ("failed", "too_many_rounds")
    assert len(played.answers) == asked + 25
    assert [one["role"] for one in messages(server, session_id)] == ["user", *["assistant", "tool"] * 25]
    played.script(say("Fresh."))
    assert ended(server.say(session_id, "again")) == ("completed", None)


def test_an_agent_that_hands_over_to_itself_gets_no_further_than_25_rounds(server: Server, played: ScriptedLLM) -> None:
    session_id = on(server, "debug")
    asked = len(played.answers)
    played.script(*[call("switch_mode", {"mode": "debug"}) for _ in range(25)])

    answer = server.say(session_id, "go")

    assert "agent_switched" not in [frame.type for frame in answer]
    assert errors_in(answer) == ["too_many_rounds"]
    assert ended(answer) == ("failed", "too_many_rounds")
    assert len(played.answers) == asked + 25
    current = server.http.get(f"/agents/{session_id}/current").json()
    assert (current["current_agent"], current["switch_count"]) == ("debug", 1)
    played.script(say("Fresh."))
    assert ended(server.say(session_id, "again")) == ("completed", None)


def test_ten_handoffs_are_carried_out_and_an_eleventh_is_not(server: Server, played: ScriptedLLM) -> None:
    there_and_back = [call("switch_mode", {"mode": mode}) for mode in ("debug", "architect")] * 5
    kept, lost = on(server, "architect"), on(server, "architect")

    played.script(*there_and_back, say("Mine after all."))
    within = server.say(kept, "whose is it?")
    played.script(*there_and_back, call("switch_mode", {"mode": "debug"}))
    beyond = server.say(lost, "whose is it?")

    assert [sum(frame.type == "agent_switched" for frame in answer) for answer in (within, beyond)] == [10, 10]
    assert ended(within) == ("completed", None)
    assert errors_in(beyond) == ["too_many_handoffs"]
    assert ended(beyond) == ("failed", "too_many_handoffs")
    stored = messages(server, lost)
    asked = [one["id"] for message in stored for one in message.get("tool_calls", ())]
    answered = [message["tool_call_id"] for message in stored if message["role"] == "tool"]
    assert asked == answered, "each call has its answer"
    played.script(say("Fresh."))
    assert ended(server.say(lost, "again")) == ("completed", None)


def test_a_handover_to_the_agent_that_is_active_is_none_even_after_ten(server: Server, played: ScriptedLLM) -> None:
    session_id = on(server, "architect")
    there_and_back = [call("switch_mode", {"mode": mode}) for mode in ("debug", "architect")] * 5
    played.script(*there_and_back, call("switch_mode", {"mode": "architect"}), say("I was it all along."))

    answer = server.say(session_id, "whose is it?")

    assert sum(frame.type == "agent_switched" for frame in answer) == 10
    assert texts_in(answer) == [("I was it all along.", True)]
    assert ended(answer) == ("completed", None)


def test_a_handover_by_routing_counts_as_well(server: Server, played: ScriptedLLM) -> None:
    session_id = str(uuid.uuid4())
    played.route("debug", *["debug"] * 5)
    played.script(*[call("switch_mode", {"mode": "orchestrator"}) for _ in range(5)])

    answer = server.say(session_id, "whose is it?")

    assert sum(frame.type == "agent_switched" for frame in answer) == 10
    assert ended(answer) == ("failed", "too_many_handoffs")
    played.script(say("Fresh."))
    assert ended(server.say(session_id, "again", agent_type="ask")) == ("completed", None)


def test_a_person_is_asked_about_20_calls_at_once_and_the_rest_are_refused_to_the_model(
    server: Server, played: ScriptedLLM
) -> None:
    session_id = on(server)
    wanted = [call("write_file", {"path": f"{number}.md", "content": "x"}) for number in range(25)]
    played.script(calls(*wanted, call("read_file", READ)), say("Fewer, then."), call("write_file", WRITE))

    answer = server.say(session_id, "write them all")

    asked = calls_in(answer)
    assert [one["requires_approval"] for one in asked] == [True] * 20 + [False]
    assert [one["arguments"]["path"] for one in asked[:20]] == [f"{number}.md" for number in range(20)]
    assert [one["call_id"] for one in pending(server, session_id)] == [one["call_id"] for one in asked[:20]]
    assert server.http.get("/health").status_code == 200
    for one in asked[:20]:
        decided = server.http.post(f"/approvals/{one['call_id']}/decision", json={"decision": "reject"})
        assert decided.status_code == 200
    assert texts_in(result_of(server, session_id, asked[20])) == [("Fewer, then.", True)]
    refused = [text for text in read_by(played.answers[-1]).values() if text.startswith("Error: ")]
    assert len(refused) == 5
    (writing,) = calls_in(server.say(session_id, "one more"))
    assert writing["requires_approval"], "what was decided makes room"
    server.http.post(f"/sessions/{session_id}/cancel")


@pytest.mark.parametrize("content", ["x" * 400_000, {"success": True, "content": "\u20ac" * 130_000}])
def test_a_result_larger_than_the_models_window_fails_the_turn_and_not_the_session(
    server: Server, played: ScriptedLLM, content: Any
) -> None:
    session_id = on(server)
    asked = len(played.answers)
    played.script(call("read_file", READ))
    (reading,) = calls_in(server.say(session_id, "read it"))

    answer = result_of(server, session_id, reading, content)

    assert errors_in(answer) == ["context_too_long"]
    assert ended(answer) == ("failed", "context_too_long")
    assert len(played.answers) == asked + 1
    assert len(messages(server, session_id)[-1]["content"]) > 100_000, "the result is kept"
    played.script(say("Something shorter."))
    assert ended(server.say(session_id, "again")) == ("completed", None)
    assert [one["role"] for one in played.answers[-1]["messages"]] == ["system", "user"]


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory, shared_llm: ScriptedLLM, migrated: Path) -> Iterator[Server]:
    """A server where a turn may run for two seconds."""
    folder = tmp_path_factory.mktemp("hurried")
    with running(folder, migrated, LLM_BASE_URL=shared_llm.url, TURN_MAX_SECONDS="2") as started:
        yield started


def test_waiting_costs_a_turn_no_time(hurried: Server, played: ScriptedLLM) -> None:
    session_id = on(hurried)
    played.script(calls(call("read_file", READ), call("write_file", WRITE)), say("Patience."))
    reading, writing = calls_in(hurried.say(session_id, "go"))

    passed(seconds=1.2)
    result_of(hurried, session_id, reading)
    passed(seconds=1.2)
    answer = result_of(hurried, session_id, writing)

    assert ended(answer) == ("completed", None)


def test_running_before_and_after_a_wait_adds_up(hurried: Server, played: ScriptedLLM) -> None:
    session_id = on(hurried)
    before, after = Gate(), Gate()
    played.script(gated(call("read_file", READ, text="I read."), before), gated(say("Late."), after))
    with hurried.streaming({"type": "user_message", "content": "go"}, session_id) as frames:
        before.reached.wait()
        passed(seconds=1.2)
        before.open()
        (reading,) = calls_in(list(frames))

    message = {"type": "tool_result", "call_id": reading["call_id"], "result": "done"}
    with hurried.streaming(message, session_id) as frames:
        after.reached.wait()
        passed(seconds=1.2)
        after.open()
        answer = list(frames)

    assert errors_in(answer) == ["turn_timeout"]
    assert ended(answer) == ("failed", "turn_timeout")
    played.script(say("Fresh."))
    assert ended(hurried.say(session_id, "again")) == ("completed", None)


def passed(*, seconds: float) -> None:
    """Let time pass: it is what these tests are about."""
    until = time.monotonic() + seconds
    eventually(lambda: time.monotonic() >= until)


# --- the model breaks off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [drop("I wr", call=call("write_file", WRITE)), drop(call=call("write_file", WRITE))],
    ids=["after some text", "at once"],
)
def test_a_connection_lost_in_the_middle_of_a_call_leaves_nothing(
    server: Server, played: ScriptedLLM, reply: Reply
) -> None:
    session_id = on(server)
    played.script(reply, say("Back again."))

    answer = server.say(session_id, "go")

    assert calls_in(answer) == []
    assert errors_in(answer) == ["model_interrupted"]
    assert ended(answer) == ("failed", "model_interrupted")
    assert [one["role"] for one in messages(server, session_id)] == ["user"]
    assert rows(server, "SELECT * FROM sessions_app_toolcall WHERE session_id = ?", session_id) == []
    happened = "SELECT event_type FROM events_app_event WHERE session_id = ? AND event_type LIKE 'tool.%'"
    assert rows(server, happened, session_id) == []
    assert ended(server.say(session_id, "again")) == ("completed", None)


def test_a_connection_lost_after_a_result_keeps_the_result(server: Server, played: ScriptedLLM) -> None:
    session_id = on(server)
    played.script(call("read_file", READ), drop("I wr", call=call("write_file", WRITE)), say("Back again."))
    (reading,) = calls_in(server.say(session_id, "go"))

    answer = result_of(server, session_id, reading, "text of a.md")

    assert ended(answer) == ("failed", "model_interrupted")
    assert [one["role"] for one in messages(server, session_id)] == ["user", "assistant", "tool"]
    assert ended(server.say(session_id, "again")) == ("completed", None)
    assert list(read_by(played.answers[-1]).values()) == ["text of a.md"]


# --- agents that come and go ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["approve", "reject"])
def test_a_switch_while_a_call_waits_counts_from_the_next_model_step(
    server: Server, played: ScriptedLLM, verdict: str
) -> None:
    session_id = on(server)
    played.script(call("write_file", WRITE), say("I only explain."))
    (writing,) = calls_in(server.say(session_id, "go"))

    switched = server.http.post(f"/agents/{session_id}/switch", json={"target_agent": "ask", "reason": "enough"})
    still_open = pending(server, session_id)
    server.http.post(f"/approvals/{writing['call_id']}/decision", json={"decision": verdict})
    if verdict == "approve":
        result_of(server, session_id, writing)
    played.wait_for(lambda llm: llm.unplayed == 0)
    eventually(lambda: len(messages(server, session_id)) == 4)

    assert switched.status_code == 200
    assert [one["call_id"] for one in still_open] == [writing["call_id"]], "a switch closes nothing"
    assert spoken_by(played.answers[-2]) == "coder"
    assert spoken_by(played.answers[-1]) == "ask"
    offered = {one["function"]["name"] for one in played.answers[-1]["tools"]}
    assert "write_file" not in offered
    assert messages(server, session_id)[-1]["content"] == "I only explain."


def test_a_switch_to_the_orchestrator_while_a_call_waits_has_the_turn_routed_on(
    server: Server, played: ScriptedLLM
) -> None:
    session_id = on(server)
    routings = len(played.routings)
    played.route("architect")
    played.script(call("read_file", READ), say("Boxes and arrows."))
    (reading,) = calls_in(server.say(session_id, "draw it"))

    server.post({"type": "switch_agent", "agent_type": "orchestrator"}, session_id)
    answer = result_of(server, session_id, reading)

    assert [frame.data["to_agent"] for frame in answer if frame.type == "agent_switched"] == ["architect"]
    assert ended(answer) == ("completed", None)
    assert len(played.routings) == routings + 1
    assert played.routings[-1]["messages"][-1]["content"] == "draw it"
    assert spoken_by(played.answers[-1]) == "architect"


def test_the_only_agent_has_nobody_to_hand_over_to(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:
    handover = call("switch_mode", {"mode": "architect"})
    llm.script(handover, say("Then I do it."), handover, say("All alone."))
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, MULTI_AGENT_MODE="false") as server:
        forbidden = server.say("alone", "design it")
        # An administrator lets it try.
        change(server, "UPDATE agents_app_agent SET allowed_tools = '[\"switch_mode\"]' WHERE name = 'universal'")
        unknown = server.say("alone", "try again")
        current = server.http.get("/agents/alone/current").json()

    assert errors_in(forbidden) == ["tool_not_allowed"]
    assert ended(forbidden) == ("completed", None)
    assert (errors_in(unknown), texts_in(unknown)) == ([], [("All alone.", True)])
    assert all(text.startswith("Error: ") for text in read_by(llm.answers[-1]).values())
    assert (current["current_agent"], current["switch_count"]) == ("universal", 1)
    assert (llm.refused, llm.unplayed) == ([], 0)


# --- rules ---------------------------------------------------------------------------------------------------------

Rules = Callable[..., None]


@pytest.fixture
def rules(server: Server) -> Iterator[Rules]:
    """Adds rules to those of the contract, for one test."""

    def add(*added: tuple[str, str] | tuple[str, str, str], is_active: bool = True, position: int = 50) -> None:
        for number, (outcome, tool, *agent) in enumerate(added):
            change(
                server,
                "INSERT INTO agents_app_approvalrule"
                " (position, tool, agent, outcome, reason, self_approval, is_active) VALUES (?, ?, ?, ?, ?, true, ?)",
                *(position + number, tool, agent[0] if agent else "", outcome, f"{outcome}: {tool}", is_active),
            )

    ((highest,),) = rows(server, "SELECT max(id) FROM agents_app_approvalrule")
    yield add
    change(server, "UPDATE agents_app_approvalrequest SET rule_id = NULL WHERE rule_id > ?", highest)
    change(server, "DELETE FROM agents_app_approvalrule WHERE id > ?", highest)


def ruling(server: Server, llm: ScriptedLLM, agent: str = "coder", tool: str = "search_in_code") -> str:
    """What becomes of a call: released, held or refused."""
    arguments = {"search_in_code": {"query": "x"}, "read_file": READ, "write_file": WRITE}[tool]
    session_id = on(server, agent)
    llm.script(call(tool, arguments))
    llm.default = say("Denied.")
    answer = server.say(session_id, "go")
    states = [one["state"] for one in open_calls(server, session_id)]
    server.http.post(f"/sessions/{session_id}/cancel")
    if states:
        assert [one["requires_approval"] for one in calls_in(answer)] == [states == ["waiting"]]
        return {"waiting": "ask", "released": "allow"}[states[0]]
    assert calls_in(answer) == []
    assert errors_in(answer) == ["denied_by_policy"]
    return "deny"


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ([], "allow"),
        ([("ask", "search_in_code")], "ask"),
        ([("deny", "search_in_code")], "deny"),
        ([("allow", "search_in_code"), ("ask", "search_in_code")], "ask"),
        ([("ask", "search_in_code"), ("allow", "search_in_code")], "ask"),
        ([("deny", "search_in_code"), ("ask", "*"), ("allow", "*")], "deny"),
        ([("allow", "*"), ("ask", "search_in_code"), ("deny", "search_*")], "deny"),
    ],
)
def test_deny_beats_ask_beats_allow_whatever_their_order(
    server: Server, played: ScriptedLLM, rules: Rules, added: list[tuple[str, str]], expected: str
) -> None:
    rules(*added)

    assert ruling(server, played) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("search_in_code", "ask"),
        ("search*", "ask"),
        ("*_in_*", "ask"),
        ("search_in_c?de", "ask"),
        ("search", "allow"),
        ("in_code", "allow"),
        ("search_in_cod", "allow"),
        ("search_in_code?", "allow"),
        ("Search_In_Code", "allow"),
        ("search.*", "allow"),
        (" search_in_code", "allow"),
    ],
)
def test_a_pattern_matches_a_whole_name(
    server: Server, played: ScriptedLLM, rules: Rules, pattern: str, expected: str
) -> None:
    rules(("ask", pattern))

    assert ruling(server, played) == expected


def test_a_rule_for_one_agent_binds_no_other(server: Server, played: ScriptedLLM, rules: Rules) -> None:
    rules(("deny", "search_in_code", "debug"), ("ask", "search_in_code", "ask"))

    assert [ruling(server, played, agent) for agent in ("coder", "debug", "ask")] == ["allow", "deny", "ask"]


def test_a_rule_that_is_not_active_binds_nobody(server: Server, played: ScriptedLLM, rules: Rules) -> None:
    rules(("deny", "*"), is_active=False)

    assert ruling(server, played) == "allow"
    assert ruling(server, played, tool="write_file") == "ask"


def test_no_rule_that_allows_lifts_the_contracts_questions(server: Server, played: ScriptedLLM, rules: Rules) -> None:
    rules(("allow", "write_file"), ("allow", "*"), position=0)

    assert ruling(server, played, tool="write_file") == "ask"


def test_what_is_denied_is_told_with_the_first_rules_reason_and_the_model_goes_on(
    server: Server, played: ScriptedLLM, rules: Rules
) -> None:
    session_id = on(server)
    rules(("deny", "search_in_code"), ("deny", "search*"))
    played.script(call("search_in_code", {"query": "x"}), say("Then not."))

    answer = server.say(session_id, "go")

    (shown,) = [frame.data for frame in answer if frame.type == "error"]
    assert shown["content"] == "deny: search_in_code"
    assert texts_in(answer) == [("Then not.", True)]
    assert list(read_by(played.answers[-1]).values()) == ["Error: deny: search_in_code"]


@pytest.mark.parametrize(("verdict", "arrived"), [("approve", "coder"), ("edit", "debug"), ("reject", "architect")])
def test_a_handover_may_wait_for_a_person_and_is_carried_out_by_the_server(
    server: Server, played: ScriptedLLM, rules: Rules, verdict: str, arrived: str
) -> None:
    session_id = on(server, "architect")
    rules(("ask", "switch_mode"))
    played.script(call("switch_mode", {"mode": "coder"}), say("Here I am."))
    asked = server.say(session_id, "build it")
    (handing,) = [frame.data for frame in asked if frame.type == "server_call"]
    assert [(one["state"], one["executed_by"]) for one in open_calls(server, session_id)] == [("waiting", "server")]

    edited = {"modified_arguments": {"mode": "debug"}} if verdict == "edit" else {}
    answer = server.post(
        {"type": "hitl_decision", "call_id": handing["call_id"], "decision": verdict, **edited}, session_id
    )

    assert calls_in(asked) == [] and handing["state"] == "waiting"
    assert [frame.type for frame in answer][0] == "approval_resolved"
    switched = [frame.data["to_agent"] for frame in answer if frame.type == "agent_switched"]
    assert switched == ([] if verdict == "reject" else [arrived])
    assert texts_in(answer) == [("Here I am.", True)]
    assert spoken_by(played.answers[-1]) == arrived
    assert len(read_by(played.answers[-1])) == 1


def test_a_rule_that_turns_to_deny_keeps_a_waiting_call_from_being_approved(
    server: Server, played: ScriptedLLM, rules: Rules
) -> None:
    session_id = on(server)
    played.script(call("write_file", WRITE))
    (writing,) = calls_in(server.say(session_id, "go"))
    rules(("deny", "write_*"))

    approved = server.post({"type": "hitl_decision", "call_id": writing["call_id"], "decision": "approve"}, session_id)
    reported = result_of(server, session_id, writing)
    edited = server.http.post(
        f"/approvals/{writing['call_id']}/decision", json={"decision": "edit", "modified_arguments": WRITE}
    )
    still = [one["call_id"] for one in pending(server, session_id)]
    played.script(say("Understood."))
    rejected = server.post({"type": "hitl_decision", "call_id": writing["call_id"], "decision": "reject"}, session_id)

    assert errors_in(approved) == errors_in(reported) == ["policy_changed"]
    assert edited.status_code == 422
    assert still == [writing["call_id"]]
    assert texts_in(rejected) == [("Understood.", True)]
    refusals = rows(
        server, "SELECT outcome, target FROM events_app_auditentry WHERE session_id = ? ORDER BY id", session_id
    )
    assert refusals == [("refused", writing["call_id"])] * 3 + [("done", writing["call_id"])]

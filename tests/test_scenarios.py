"""Section 4 and 5 of the wire contract, row by row, as the old gateway and the IDE meet them.

Each test plays the IDE on both ways to the server: the old gateway, and the server's own socket.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from tests.old_clients import Bubble, Connection, Gateway, History, Ide, NativeSocket, ToolCall, ide_message
from tests.scripted_llm import Gate, Reply, ScriptedLLM, call, calls, drop, empty, gated, say, status
from tests.server import Server, eventually, parse_frames, running

NOBODY = ToolCall("call_AAAAAAAAAAAAAAAAAAAAAA", "read_file", {"path": "a.md"})
# For tests of many cases that differ in nothing a transport sees.
one_way = pytest.mark.parametrize("open_ide", ["gateway"], indirect=True)
READ = {"path": "a.md"}
WRITE = {"path": "a.md", "content": "x"}


class Asked:
    """What the model was asked during one test."""

    def __init__(self, llm: ScriptedLLM) -> None:
        self._llm = llm
        self._answers, self._routings = len(llm.answers), len(llm.routings)

    @property
    def answers(self) -> list[list[dict[str, Any]]]:
        """The messages of each request for an answer."""
        return [request["messages"] for request in self._llm.answers[self._answers :]]

    @property
    def routings(self) -> int:
        return len(self._llm.routings) - self._routings

    @property
    def agents(self) -> list[str]:
        """Whose prompt each request for an answer began with."""
        return [re.findall(r"You are the (\w+)", messages[0]["content"])[0] for messages in self.answers]


@pytest.fixture
def server(shared_server: Server) -> Server:
    return shared_server


@pytest.fixture
def asked(played: ScriptedLLM) -> Asked:
    return Asked(played)


@pytest.fixture(params=["gateway", "socket"])
def open_ide(request: pytest.FixtureRequest, server: Server) -> Iterator[Callable[[str], Ide]]:
    """Opens an IDE on a session, through the transport under test."""
    with ExitStack() as opened:

        def connected(session_id: str) -> Connection:
            if request.param == "gateway":
                return Gateway(server.http, session_id)
            return opened.enter_context(NativeSocket.connected(server.http, session_id))

        yield lambda session_id: Ide(connected(session_id), session_id)


@pytest.fixture
def ide(open_ide: Callable[[str], Ide], played: ScriptedLLM) -> Ide:
    """An IDE on a session that the server has never heard of."""
    return open_ide(str(uuid.uuid4()))


@pytest.fixture
def coder(ide: Ide) -> Ide:
    return on(ide, "coder")


@pytest.fixture
def architect(ide: Ide) -> Ide:
    return on(ide, "architect")


def on(ide: Ide, agent: str) -> Ide:
    """Its session, sitting on a specialist."""
    assert shown(ide.switch(agent)) == [switched(ANY, agent, final=True)]
    return ide


# What a person sees, in short; the rest of each message is checked on the way.


def shown(answer: list[Bubble]) -> list[tuple[Any, ...]]:
    return [_shown(bubble) for bubble in answer]


def _shown(bubble: Bubble) -> tuple[Any, ...]:
    match bubble.type:
        case "assistant_message":
            assert bubble.fields.keys() <= {"content", "is_final"}, bubble
            return "text", bubble["content"], bubble["is_final"]
        case "tool_call":
            assert re.fullmatch(r"call_[A-Za-z0-9]{22}", bubble["call_id"]), bubble
            assert bubble["is_final"] is True
            return "call", bubble["tool_name"], bool(bubble["requires_approval"]), bubble["arguments"]
        case "agent_switched":
            names = ("from_agent", "to_agent", "reason")
            assert {name: bubble[name] for name in names} == {name: bubble.metadata[name] for name in names}
            assert bubble.metadata.keys() == {*names, "confidence"}
            assert bubble["content"] == f"Switched to {bubble['to_agent']} agent"
            details = [bubble.metadata[name] for name in (*names, "confidence")]
            return "switched", *details, bool(bubble["is_final"])
        case "error":
            if bubble["error"] is not None:
                assert bubble["error"] == bubble["content"]
                assert bubble["is_final"] is True
                assert re.fullmatch("[a-z_]+", bubble.metadata["code"])
            return "error", bubble.metadata.get("code"), bubble.text
    raise AssertionError(f"the IDE would draw an empty bubble: {bubble}")


def text(content: str, *, final: bool = True) -> tuple[Any, ...]:
    return "text", content, final


def wants(tool: str, arguments: dict[str, Any], *, approval: bool = False) -> tuple[Any, ...]:
    return "call", tool, approval, arguments


def switched(origin: str, to: str, reason: str = ANY, confidence: str = ANY, *, final: bool = False) -> tuple[Any, ...]:
    return "switched", origin, to, reason, confidence, final


def error(code: str, content: str = ANY) -> tuple[Any, ...]:
    return "error", code, content


def refused(content: str) -> tuple[Any, ...]:
    """An error of the gateway's own (protocol 9.1)."""
    return "error", None, content


# What is stored, in short.


def stored(ide: Ide) -> list[tuple[Any, ...]]:
    return in_short(ide.history())


def in_short(history: History) -> list[tuple[Any, ...]]:
    """Each message as user(), assistant() and tool() below write it."""
    return [
        ("tool", message.tool_call_id, message.result)
        if message.role == "tool"
        else (message.role, message.content, *message.tool_calls)
        for message in history.messages
    ]


def user(content: str) -> tuple[Any, ...]:
    return "user", content


def assistant(content: str, *made: ToolCall) -> tuple[Any, ...]:
    return "assistant", content, *made


def tool(answered: ToolCall, content: Any) -> tuple[Any, ...]:
    """A tool's answer: its text, or the object when it is one in JSON."""
    return "tool", answered.call_id, content


def without_layout(result: str) -> str:
    """A result text without the spaces that JSON may have or not."""
    try:
        return json.dumps(json.loads(result))
    except ValueError:
        return result


# What else a test asks the server, past the gateway.


def message_count(server: Server, ide: Ide) -> int:
    return server.http.get(f"/sessions/{ide.session_id}").json()["message_count"]


def open_calls(server: Server, ide: Ide) -> list[dict[str, Any]]:
    answer = server.http.get(f"/sessions/{ide.session_id}/open-calls")
    assert answer.status_code == 200, answer.text
    return answer.json()["open_calls"]


def ended_turns(server: Server, ide: Ide, count: int) -> list[tuple[str, str | None]]:
    """How the first so many turns of the session ended."""
    ended: list[tuple[str, str | None]] = []
    # Less than the time between two heartbeats: what does not end makes a test fail, not wait.
    with server.http.stream("GET", f"/sessions/{ide.session_id}/stream", timeout=8) as response:
        frames = parse_frames(response.iter_lines())
        while len(ended) < count:
            frame = next(frames)
            if frame.type == "turn_finished":
                ended.append((frame.data["status"], frame.data["code"]))
    return ended


def audited(server: Server, ide: Ide, kind: str) -> list[dict[str, Any]]:
    answer = server.http.get("/events/audit-log", params={"session_id": ide.session_id, "event_type": kind})
    return answer.json()["audit_log"]


def decisions(server: Server, ide: Ide) -> list[tuple[str, str]]:
    """Every decision of the session: whose call, and what was decided."""
    return [(entry["call_id"], entry["decision"].lower()) for entry in audited(server, ide, "hitl_decision_made")]


def asks_for(ide: Ide, played: ScriptedLLM, name: str, arguments: dict[str, Any]) -> ToolCall:
    """A call that the model makes in answer to a message."""
    played.script(call(name, arguments))
    answer = ide.say("go")
    assert [bubble.type for bubble in answer] == ["tool_call"], answer
    return answer[0].call


def handovers(*modes: str) -> list[Reply]:
    return [call("switch_mode", {"mode": mode, "reason": "to and fro"}) for mode in modes]


def holds(ide: Ide, played: ScriptedLLM) -> ToolCall:
    """A call that waits for a person."""
    held = asks_for(ide, played, "write_file", WRITE)
    assert ide.pending_approvals() == [held]
    return held


# --- 1 to 3: messages and who takes them ---------------------------------------------------------------------------


def test_1_a_specialist_answers(coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(say("Hello."))

    answer = coder.say("hi")

    assert shown(answer) == [text("Hello.")]
    assert stored(coder) == [user("hi"), assistant("Hello.")]
    assert coder.current() == ("coder", 1)
    assert (asked.agents, asked.routings) == (["coder"], 0)


def test_2_the_orchestrator_routes(ide: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.route_to = "architect"
    played.script(say("Three layers."))

    answer = ide.say("design it")

    assert shown(answer) == [
        switched("orchestrator", "architect", "scripted", "high"),
        text("Three layers."),
    ]
    assert stored(ide) == [user("design it"), assistant("Three layers.")]
    assert ide.current() == ("architect", 1)
    assert (asked.agents, asked.routings) == (["architect"], 1)


def test_2_a_routed_message_may_lead_to_a_tool_call(ide: Ide, played: ScriptedLLM) -> None:
    played.script(call("read_file", READ))

    answer = ide.say("fix it")

    assert shown(answer) == [switched("orchestrator", "coder", "scripted", "high"), wants("read_file", READ)]
    assert stored(ide) == [user("fix it"), assistant("", answer[-1].call)]


def test_3_a_message_for_another_agent_switches(coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(say("A plan."))

    answer = coder.say("plan it", agent_type="architect")

    assert shown(answer) == [switched("coder", "architect", "User requested", "high"), text("A plan.")]
    assert stored(coder) == [user("plan it"), assistant("A plan.")]
    assert coder.current() == ("architect", 2)
    assert asked.routings == 0


def test_3_a_new_session_starts_on_the_agent_asked_for(ide: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(say("Because."))

    answer = ide.say("why", agent_type="ask")

    assert shown(answer) == [text("Because.")]
    assert ide.current() == ("ask", 0)
    assert (asked.agents, asked.routings) == (["ask"], 0)


def test_3_a_message_for_the_orchestrator_is_routed_again(coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.route_to = "ask"
    played.script(say("Because."))

    answer = coder.say("why", agent_type="orchestrator")

    assert shown(answer) == [
        switched("coder", "orchestrator", "User requested", "high"),
        switched("orchestrator", "ask", "scripted", "high"),
        text("Because."),
    ]
    assert coder.current() == ("ask", 3)
    assert asked.routings == 1


def test_3_an_unknown_agent_is_refused_before_the_stream(coder: Ide, asked: Asked) -> None:
    assert shown(coder.say("hi", agent_type="poet")) == [refused("Agent error: 400")]
    assert stored(coder) == []
    assert asked.answers == []


# --- 4 and 5: tool calls -------------------------------------------------------------------------------------------


def test_4_a_call_without_approval_goes_to_the_client(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    played.script(call("read_file", READ, id="provider-7"))

    answer = coder.say("what is in it?")

    assert shown(answer) == [wants("read_file", READ)]
    assert stored(coder) == [user("what is in it?"), assistant("", answer[0].call)]
    assert coder.pending_approvals() == []
    (waiting,) = open_calls(server, coder)
    assert (waiting["call_id"], waiting["state"], waiting["requires_approval"]) == (
        answer[0].call.call_id,
        "released",
        False,
    )
    assert len(asked.answers) == 1
    history = server.http.get(f"/sessions/{coder.session_id}/history").text
    assert "provider-7" not in json.dumps(coder.received) + history


def test_4b_a_result_goes_to_the_model_and_its_next_step_to_the_client(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    read = asks_for(coder, played, "read_file", READ)
    played.script(say("It is about cats."))

    answer = coder.execute(read, {"success": True, "content": "Кошки", "lines_read": 1})

    assert shown(answer) == [text("It is about cats.")]
    assert stored(coder) == [
        user("go"),
        assistant("", read),
        tool(read, {"success": True, "content": "Кошки", "lines_read": 1}),
        assistant("It is about cats."),
    ]
    assert message_count(server, coder) == 4
    assert open_calls(server, coder) == []
    assert ended_turns(server, coder, 1) == [("completed", None)]
    assert asked.agents == ["coder", "coder"]
    *_, made, result = asked.answers[-1]
    assert made["tool_calls"][0]["id"] == result["tool_call_id"] == read.call_id


def test_4b_the_next_step_may_be_another_call_and_then_one_that_waits(
    coder: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    first = asks_for(coder, played, "list_files", {"path": "."})
    played.script(call("read_file", READ, text="Two files."), call("write_file", WRITE), say("Done."))

    second = coder.execute(first, {"items": ["a.md", "b.md"]})
    third = coder.execute(second[-1].call, {"content": "y"})
    last = coder.execute(third[-1].call, {"bytes_written": 1})

    assert shown(second) == [text("Two files.", final=False), wants("read_file", READ)]
    assert shown(third) == [wants("write_file", WRITE, approval=True)]
    assert shown(last) == [text("Done.")]
    assert stored(coder) == [
        user("go"),
        assistant("", first),
        tool(first, {"items": ["a.md", "b.md"]}),
        assistant("Two files.", second[-1].call),
        tool(second[-1].call, {"content": "y"}),
        assistant("", third[-1].call),
        tool(third[-1].call, {"bytes_written": 1}),
        assistant("Done."),
    ]
    assert len(asked.answers) == 4


def test_5_a_call_that_needs_approval_is_listed(server: Server, coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(call("write_file", WRITE, id="provider-8"))

    answer = coder.say("write it")

    assert shown(answer) == [wants("write_file", WRITE, approval=True)]
    held = answer[0].call
    assert stored(coder) == [user("write it"), assistant("", held)]
    assert coder.pending_approvals() == [held]
    (item,) = server.http.get(f"/sessions/{coder.session_id}/pending-approvals").json()["pending_approvals"]
    assert (item["request_id"], item["request_type"], item["subject"]) == (held.call_id, "tool", "write_file")
    assert item["details"] == {"arguments": WRITE}
    assert item["reason"] == "File modification requires user approval"
    assert "provider-8" not in json.dumps([*coder.received, item])
    (waiting,) = open_calls(server, coder)
    assert (waiting["state"], waiting["requires_approval"]) == ("waiting", True)
    (entry,) = audited(server, coder, "tool_approval_required")
    assert (entry["tool_name"], entry["call_id"], entry["arguments"]) == ("write_file", held.call_id, WRITE)
    assert len(asked.answers) == 1


@one_way
@pytest.mark.parametrize(
    ("name", "arguments", "approval"),
    [
        ("execute_command", {"command": "ls"}, True),
        ("create_directory", {"path": "docs"}, True),
        ("list_files", {"path": "."}, False),
        ("search_in_code", {"query": "cat"}, False),
    ],
)
def test_5_the_policy_says_which_calls_wait(
    coder: Ide, played: ScriptedLLM, name: str, arguments: dict[str, Any], approval: bool
) -> None:
    played.script(call(name, arguments))

    answer = coder.say("go")

    assert shown(answer) == [wants(name, arguments, approval=approval)]
    assert coder.pending_approvals() == ([answer[0].call] if approval else [])


def test_5a_text_comes_before_the_calls_and_is_stored_with_them(coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(calls(call("read_file", READ), call("write_file", WRITE), text="Let me look."))

    answer = coder.say("go")

    assert shown(answer) == [
        text("Let me look.", final=False),
        wants("read_file", READ),
        wants("write_file", WRITE, approval=True),
    ]
    assert stored(coder) == [user("go"), assistant("Let me look.", answer[1].call, answer[2].call)]
    assert len(asked.answers) == 1


def test_5b_the_ide_approves_in_its_own_dialog_and_only_sends_the_result(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    held = holds(coder, played)
    played.script(say("Written."))

    answer = coder.execute(held, {"success": True, "bytes_written": 1})

    assert shown(answer) == [text("Written.")]
    assert stored(coder) == [
        user("go"),
        assistant("", held),
        tool(held, {"success": True, "bytes_written": 1}),
        assistant("Written."),
    ]
    assert coder.pending_approvals() == []
    assert decisions(server, coder) == [(held.call_id, "approve")]
    assert len(asked.answers) == 2


# --- 6 and 7: switches ---------------------------------------------------------------------------------------------


def test_6_a_switch_is_one_message_and_no_turn(coder: Ide, asked: Asked) -> None:
    answer = coder.switch("debug")
    again = coder.switch("debug")

    assert shown(answer) == [switched("coder", "debug", "User requested switch to debug", final=True)]
    assert shown(again) == [switched("debug", "debug", final=True)]
    assert stored(coder) == []
    assert coder.current() == ("debug", 2), "the switch to the agent that is active is not recorded"
    assert coder.history().handoffs == (("orchestrator", "coder"), ("coder", "debug"))
    assert (asked.answers, asked.routings) == ([], 0)


def test_6_a_switch_without_a_reason_has_another_one(coder: Ide) -> None:
    message = {"type": "switch_agent", "agent_type": "ask", "content": "Switched to Ask"}

    absent = coder.send(message)
    given = coder.send({**message, "agent_type": "debug", "reason": "it crashes"})

    assert shown(absent) == [switched("coder", "ask", "User requested agent switch", final=True)]
    assert shown(given) == [switched("ask", "debug", "it crashes", final=True)]


def test_6_a_switch_while_an_approval_is_pending_closes_nothing_and_counts_from_the_next_step(
    coder: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    held = holds(coder, played)
    played.script(say("Debugged."))

    switch = coder.switch("debug")
    still_pending = coder.pending_approvals()
    answer = coder.execute(held, {"success": True})

    assert shown(switch) == [switched("coder", "debug", final=True)]
    assert still_pending == [held]
    assert shown(answer) == [text("Debugged.")]
    assert asked.agents == ["coder", "debug"]


def test_7_a_model_hands_over_to_another_agent(architect: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(call("switch_mode", {"mode": "coder", "reason": "needs code"}, text="Over to you."), say("Done."))

    answer = architect.say("build it")

    assert shown(answer) == [
        text("Over to you.", final=False),
        switched("architect", "coder", "needs code", "medium"),
        text("Done."),
    ]
    history = architect.history()
    (made,) = history.calls
    assert (made.tool_name, made.arguments) == ("switch_mode", {"mode": "coder", "reason": "needs code"})
    assert in_short(history) == [
        user("build it"),
        assistant("Over to you.", made),
        tool(made, "Switched to coder agent"),
        assistant("Done."),
    ]
    assert history.handoffs[-1] == ("architect", "coder")
    assert architect.current() == ("coder", 2)
    assert architect.pending_approvals() == []
    assert (asked.agents, asked.routings) == (["architect", "coder"], 0)


def test_7_the_other_agent_may_call_a_tool(architect: Ide, played: ScriptedLLM) -> None:
    played.script(call("switch_mode", {"mode": "coder", "reason": "needs code"}), call("write_file", WRITE))

    answer = architect.say("build it")

    assert shown(answer) == [
        switched("architect", "coder", "needs code", "medium"),
        wants("write_file", WRITE, approval=True),
    ]
    assert architect.pending_approvals() == [answer[-1].call]


def test_7_a_handover_beside_a_client_tool_waits_for_its_result(
    architect: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    played.script(calls(call("read_file", READ), call("switch_mode", {"mode": "coder", "reason": "why not"})))
    played.script(say("Read and switched."))

    first = architect.say("go")
    (read,) = [bubble.call for bubble in first if bubble.type == "tool_call"]
    asked_before = len(asked.answers)
    second = architect.execute(read, {"content": "y"})

    assert sorted(shown(first)) == [wants("read_file", READ), switched("architect", "coder", "why not", "medium")]
    assert asked_before == 1
    assert shown(second) == [text("Read and switched.")]
    assert asked.agents == ["architect", "coder"]
    answered = {message.tool_call_id: message.result for message in architect.history().messages[2:4]}
    (_, handover) = architect.history().calls
    assert answered == {read.call_id: {"content": "y"}, handover.call_id: "Switched to coder agent"}


def test_7b_a_handover_to_the_orchestrator_is_routed_on(architect: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.route_to = "debug"
    played.script(call("switch_mode", {"mode": "orchestrator", "reason": "not mine"}), say("It is the cache."))

    answer = architect.say("why does it crash?")

    assert shown(answer) == [
        switched("architect", "orchestrator", "not mine", "medium"),
        switched("orchestrator", "debug", "scripted", "high"),
        text("It is the cache."),
    ]
    history = architect.history()
    (made,) = history.calls
    assert in_short(history) == [
        user("why does it crash?"),
        assistant("", made),
        tool(made, "Switched to orchestrator agent"),
        assistant("It is the cache."),
    ]
    assert architect.current() == ("debug", 3)
    assert (asked.agents, asked.routings) == (["architect", "debug"], 1)


def test_7b_ten_handoffs_within_a_turn_are_fine(architect: Ide, played: ScriptedLLM) -> None:
    played.script(*handovers("debug", "architect") * 5, say("Mine."))

    answer = architect.say("whose is it?")

    to_and_fro = [switched("architect", "debug"), switched("debug", "architect")]
    assert shown(answer) == [*to_and_fro * 5, text("Mine.")]


def test_7b_an_eleventh_handoff_ends_the_turn(server: Server, architect: Ide, played: ScriptedLLM) -> None:
    played.script(*handovers("debug", "architect") * 5, *handovers("debug"))

    answer = architect.say("whose is it?")

    to_and_fro = [switched("architect", "debug"), switched("debug", "architect")]
    assert shown(answer) == [*to_and_fro * 5, error("too_many_handoffs")]
    assert ended_turns(server, architect, 1) == [("failed", "too_many_handoffs")]
    assert architect.current() == ("architect", 11)
    played.script(say("Mine."))
    assert shown(architect.say("again")) == [text("Mine.")], "the session stays usable"


# --- 8: what a model may not do ------------------------------------------------------------------------------------


@one_way
@pytest.mark.parametrize(
    ("agent", "name", "arguments", "content"),
    [
        ("ask", "create_directory", {"path": "docs"}, r"Tool 'create_directory' is not allowed for Ask agent"),
        (
            "architect",
            "execute_command",
            {"command": "ls"},
            "Tool 'execute_command' is not allowed for Architect agent",
        ),
        ("debug", "write_file", WRITE, ".*Coder.*"),
        ("ask", "write_file", WRITE, ".*Coder.*"),
        ("ask", "execute_command", {"command": "ls"}, ".*Coder.*"),
        ("architect", "write_file", {"path": "src/a.py", "content": "x"}, ".*Coder.*"),
        ("architect", "write_file", {"path": "../plan.md", "content": "x"}, ".+"),
        ("architect", "write_file", {"path": "docs/../../plan.md", "content": "x"}, ".+"),
        ("architect", "write_file", {"path": "/etc/plan.md", "content": "x"}, ".+"),
    ],
)
def test_8_a_forbidden_call_is_shown_as_an_error_and_the_model_goes_on(
    server: Server,
    ide: Ide,
    played: ScriptedLLM,
    asked: Asked,
    agent: str,
    name: str,
    arguments: dict[str, Any],
    content: str,
) -> None:
    on(ide, agent)
    played.script(call(name, arguments), say("Then not."))

    answer = ide.say("go")

    assert shown(answer) == [error(ANY), text("Then not.")]
    assert re.fullmatch(content, answer[0].text), answer[0].text
    history = ide.history()
    (made,) = history.calls
    assert (made.tool_name, made.arguments) == (name, arguments)
    assert in_short(history) == [
        user("go"),
        assistant("", made),
        tool(made, f"Error: {answer[0].text}"),
        assistant("Then not."),
    ]
    assert ide.pending_approvals() == []
    assert open_calls(server, ide) == []
    assert ended_turns(server, ide, 1) == [("completed", None)]
    assert message_count(server, ide) == 4
    assert len(asked.answers) == 2


def test_8_an_architect_may_write_markdown(architect: Ide, played: ScriptedLLM) -> None:
    plan = {"path": "docs/plan.md", "content": "x"}
    played.script(call("write_file", plan))

    assert shown(architect.say("go")) == [wants("write_file", plan, approval=True)]


def test_8_a_forbidden_call_beside_an_allowed_one_waits_for_the_result(
    ide: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    on(ide, "ask")
    played.script(calls(call("create_directory", {"path": "x"}), call("read_file", READ)), say("Only read."))

    first = ide.say("go")
    (read,) = [bubble.call for bubble in first if bubble.type == "tool_call"]
    second = ide.execute(read, {"content": "y"})

    assert sorted(shown(first)) == [wants("read_file", READ), error(ANY)]
    assert shown(second) == [text("Only read.")]
    assert len(asked.answers) == 2


@one_way
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("no_such_tool", "{}"),
        ("read_file", '{"path": "a'),
        ("read_file", ""),
        ("read_file", "[1]"),
        ("read_file", "{}"),
        ("write_file", '{"path": "a.md"}'),
        ("read_file", '{"path": ["a.md"]}'),
        ("read_file", '{"path": "a.md", "start_line": 0}'),
        ("execute_command", '{"command": "ls", "timeout": 301}'),
    ],
)
def test_8_a_call_that_nobody_could_execute_is_answered_to_the_model_alone(
    coder: Ide, played: ScriptedLLM, asked: Asked, name: str, arguments: str
) -> None:
    played.script(call(name, arguments), say("Sorry."))

    answer = coder.say("go")

    assert shown(answer) == [text("Sorry.")]
    (made,) = coder.history().calls
    assert made.tool_name == name
    kinds = [(message.role, message.tool_call_id) for message in coder.history().messages]
    assert kinds == [("user", None), ("assistant", None), ("tool", made.call_id), ("assistant", None)]
    assert coder.history().messages[2].content.startswith("Error: ")
    assert coder.pending_approvals() == []
    assert len(asked.answers) == 2


def test_8_a_handover_to_nobody_is_answered_to_the_model_alone(
    architect: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    played.script(call("switch_mode", {"mode": "poet"}), say("Sorry."))

    answer = architect.say("go")

    assert shown(answer) == [text("Sorry.")]
    assert architect.history().messages[2].content.startswith("Error: ")
    assert architect.current() == ("architect", 1)
    assert asked.agents == ["architect", "architect"]


# --- 9: a model that fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "code"), [(status(400), "model_rejected"), (drop(after="Half an"), "model_interrupted")]
)
def test_9_a_model_that_fails_is_an_error(
    server: Server, coder: Ide, played: ScriptedLLM, reply: Reply, code: str
) -> None:
    played.script(reply)

    answer = coder.say("go")

    assert shown(answer) == [error(code)]
    assert not re.search("http|127.0.0.1|Error|aiohttp|scripted", answer[0].text)
    assert stored(coder) == [user("go")]
    figures = server.http.get(f"/events/metrics/session/{coder.session_id}").json()
    assert (figures["total_requests"], figures["failed_requests"]) == (1, 1)
    played.script(say("Back again."))
    assert shown(coder.say("again")) == [text("Back again.")]


def test_9_a_model_that_fails_after_a_result_leaves_a_session_that_works(coder: Ide, played: ScriptedLLM) -> None:
    read = asks_for(coder, played, "read_file", READ)
    played.script(status(400), say("Back again."))

    failed = coder.execute(read, {"content": "y"})
    answer = coder.say("again")

    assert shown(failed) == [error("model_rejected")]
    assert shown(answer) == [text("Back again.")]
    assert stored(coder) == [
        user("go"),
        assistant("", read),
        tool(read, {"content": "y"}),
        user("again"),
        assistant("Back again."),
    ]


# --- 10 to 17: what nobody asked for -------------------------------------------------------------------------------


def test_10_a_message_makes_its_session(ide: Ide, played: ScriptedLLM) -> None:
    assert ide.session() is None
    played.script(say("Hello."))

    answer = ide.say("hi")

    assert shown(answer) == [switched("orchestrator", "coder", "scripted", "high"), text("Hello.")]
    session = ide.session()
    assert session is not None
    assert (session.message_count, session.current_agent, session.title) == (2, "coder", "hi")


def test_11_a_result_for_an_unknown_session_is_an_error(ide: Ide, asked: Asked) -> None:
    answer = ide.execute(NOBODY, {"content": "y"})

    assert shown(answer) == [error("unknown_call")]
    assert ide.session() is None, "nothing is stored"
    assert (asked.answers, asked.routings) == ([], 0)


def test_12_a_switch_makes_its_session(ide: Ide, asked: Asked) -> None:
    answer = ide.switch("debug")

    assert shown(answer) == [switched("orchestrator", "debug", "User requested switch to debug", final=True)]
    assert ide.current() == ("debug", 1)
    assert stored(ide) == []
    assert (asked.answers, asked.routings) == ([], 0)


def test_13_a_result_that_nobody_asked_for_is_an_error(coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(say("Hello."), say("Still here."))
    coder.say("hi")

    answer = coder.execute(NOBODY, {"content": "y"})

    assert shown(answer) == [error("unknown_call")]
    assert answer[0].text.startswith("No pending tool call")
    assert stored(coder) == [user("hi"), assistant("Hello.")]
    assert len(asked.answers) == 1
    assert shown(coder.say("and now?")) == [text("Still here.")]


def test_13_a_result_for_the_call_of_another_session_is_an_error(
    coder: Ide, open_ide: Callable[[str], Ide], played: ScriptedLLM, asked: Asked
) -> None:
    held = holds(coder, played)
    stranger = on(open_ide(str(uuid.uuid4())), "coder")

    answer = stranger.execute(held, {"content": "y"})

    assert shown(answer) == [error("unknown_call")]
    assert (stored(stranger), coder.pending_approvals()) == ([], [held])
    assert len(asked.answers) == 1


def test_14_a_second_result_is_answered_with_nothing(coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    read = asks_for(coder, played, "read_file", READ)
    played.script(say("Thanks."), say("You are welcome."))
    coder.execute(read, {"content": "first"})
    before = stored(coder)

    again = coder.execute(read, {"content": "second"})
    failed = coder.fail(read, "too late")

    assert (again, failed) == ([], [])
    assert shown(coder.say("thanks")) == [text("You are welcome.")]
    assert stored(coder) == [*before, user("thanks"), assistant("You are welcome.")]
    assert len(asked.answers) == 3


def test_15_a_decision_on_an_unknown_call_is_an_error(coder: Ide, ide: Ide, asked: Asked) -> None:
    answer = coder.decide(NOBODY, "approve")

    assert shown(answer) == [error("unknown_call", f"No pending approval found for request_id={NOBODY.call_id}")]
    assert (stored(coder), asked.answers) == ([], [])


def test_15_a_decision_for_an_unknown_session_is_an_error(ide: Ide, asked: Asked) -> None:
    answer = ide.decide(NOBODY, "approve")

    assert shown(answer) == [error("unknown_call", f"No pending approval found for request_id={NOBODY.call_id}")]
    assert ide.session() is None


def test_15_one_session_cannot_decide_the_call_of_another(
    server: Server, coder: Ide, open_ide: Callable[[str], Ide], played: ScriptedLLM, asked: Asked
) -> None:
    held = holds(coder, played)
    stranger = on(open_ide(str(uuid.uuid4())), "coder")

    answers = [stranger.decide(held, verdict) for verdict in ("approve", "reject")]

    wanted = error("unknown_call", f"No pending approval found for request_id={held.call_id}")
    assert [shown(answer) for answer in answers] == [[wanted], [wanted]]
    assert (coder.pending_approvals(), decisions(server, coder)) == ([held], [])
    assert len(asked.answers) == 1


def test_15_a_decision_on_a_call_that_needs_none_is_an_error(coder: Ide, played: ScriptedLLM) -> None:
    read = asks_for(coder, played, "read_file", READ)
    played.script(say("Thanks."))

    answer = coder.decide(read, "approve")

    assert shown(answer) == [error(ANY, f"No pending approval found for request_id={read.call_id}")]
    assert shown(coder.execute(read, {"content": "y"})) == [text("Thanks.")]


@pytest.mark.parametrize(
    ("first", "second"),
    [("approve", "approve"), ("approve", "edit"), ("approve", "reject"), ("reject", "approve"), ("result", "reject")],
)
def test_16_a_second_decision_is_an_error(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked, first: str, second: str
) -> None:
    held = holds(coder, played)
    if first != "approve":
        played.script(say("Well."))
    if first == "result":
        coder.execute(held, {"success": True})
    else:
        coder.decide(held, first)
    before, requests = stored(coder), len(asked.answers)

    answer = coder.decide(held, second, modified_arguments=WRITE if second == "edit" else None)

    assert shown(answer) == [error("already_decided", f"No pending approval found for request_id={held.call_id}")]
    assert (stored(coder), len(asked.answers), len(decisions(server, coder))) == (before, requests, 1)


def test_17_an_unknown_decision_leaves_the_call_pending(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    held = holds(coder, played)

    # The gateway knows only three decisions, so this one comes from another client.
    frames = server.post({"type": "hitl_decision", "call_id": held.call_id, "decision": "maybe"}, coder.session_id)
    refusal = coder.decide(held, "maybe")

    assert [frame.event for frame in frames] == ["message", "done"]
    shown_error = frames[0].data
    assert shown_error["error"] == shown_error["content"] == "Invalid HITL decision: maybe"
    assert (shown_error["is_final"], shown_error["metadata"]["code"]) == (True, "invalid_decision")
    assert shown(refusal) == [refused(ANY)]
    assert refusal[0].text.startswith("Invalid JSON message: ")
    assert coder.pending_approvals() == [held]
    assert len(asked.answers) == 1


# --- 18: a person who moves on -------------------------------------------------------------------------------------


def test_18_a_new_message_closes_the_open_calls(server: Server, coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(calls(call("read_file", READ), call("write_file", WRITE)), say("Something else then."))
    read, held = (bubble.call for bubble in coder.say("go"))

    answer = coder.say("never mind")

    assert shown(answer) == [text("Something else then.")]
    assert stored(coder) == [
        user("go"),
        assistant("", read, held),
        tool(read, ANY),
        tool(held, ANY),
        user("never mind"),
        assistant("Something else then."),
    ]
    assert all("superseded" in message.content for message in coder.history().messages[2:4])
    assert (coder.pending_approvals(), open_calls(server, coder)) == ([], [])
    assert ended_turns(server, coder, 2) == [("cancelled", "superseded"), ("completed", None)]
    assert message_count(server, coder) == 6
    assert len(asked.answers) == 2


def test_18_what_was_closed_takes_no_result_and_no_decision(coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    held = holds(coder, played)
    played.script(say("Something else then."))
    coder.say("never mind")
    before = stored(coder)

    late = coder.execute(held, {"success": True})
    decided = coder.decide(held, "approve")

    assert late == []
    assert shown(decided) == [error(ANY, f"No pending approval found for request_id={held.call_id}")]
    assert stored(coder) == before
    assert len(asked.answers) == 2


def test_18_a_call_that_a_person_released_is_closed_as_well(server: Server, coder: Ide, played: ScriptedLLM) -> None:
    held = holds(coder, played)
    coder.decide(held, "approve")
    played.script(say("Something else then."))

    answer = coder.say("never mind")

    assert shown(answer) == [text("Something else then.")]
    assert open_calls(server, coder) == []
    assert coder.execute(held, {"success": True}) == []


def test_18_a_message_that_already_waits_closes_the_calls_as_they_are_made(
    server: Server, coder: Ide, open_ide: Callable[[str], Ide], played: ScriptedLLM, asked: Asked
) -> None:
    gate = Gate()
    played.script(gated(call("write_file", WRITE), gate), say("Second answer."))
    second_window = open_ide(coder.session_id)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(coder.say, "first")
        gate.reached.wait()
        second = pool.submit(second_window.say, "second")
        eventually(lambda: server.history(coder.session_id)[-1:] == [("user", "second")])
        gate.open()
        first.result(30)
        answer = second.result(30)

    assert shown(answer) == [text("Second answer.")]
    (made,) = coder.history().calls
    assert stored(coder) == [
        user("first"),
        assistant("", made),
        tool(made, ANY),
        user("second"),
        assistant("Second answer."),
    ]
    assert coder.pending_approvals() == []
    assert ended_turns(server, coder, 2) == [("cancelled", "superseded"), ("completed", None)]
    assert len(asked.answers) == 2


def test_18_a_cancelled_turn_ignores_its_results(server: Server, coder: Ide, played: ScriptedLLM) -> None:
    held = holds(coder, played)
    played.script(say("Hello."))

    server.http.post(f"/sessions/{coder.session_id}/cancel", json={})

    assert coder.pending_approvals() == []
    assert "cancelled" in coder.history().messages[-1].content
    assert coder.execute(held, {"success": True}) == []
    assert shown(coder.say("hi")) == [text("Hello.")]


# --- 19: several calls at once -------------------------------------------------------------------------------------


def test_19_the_model_is_asked_once_when_every_call_has_its_result(
    coder: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    other = {"path": "b.md"}
    # The provider repeats its ids; ours differ.
    played.script(calls(call("read_file", READ, id="1"), call("read_file", other, id="2")), say("Both read."))
    first = coder.say("go")
    one, two = (bubble.call for bubble in first)

    early = coder.execute(two, {"content": "b"})
    requests = len(asked.answers)
    late = coder.execute(one, {"content": "a"})

    assert shown(first) == [wants("read_file", READ), wants("read_file", other)]
    assert one.call_id != two.call_id
    assert (early, requests) == ([], 1)
    assert shown(late) == [text("Both read.")]
    messages = stored(coder)
    assert messages[:2] == [user("go"), assistant("", one, two)]
    assert sorted(messages[2:4], key=str) == sorted([tool(one, {"content": "a"}), tool(two, {"content": "b"})], key=str)
    assert messages[4:] == [assistant("Both read.")]
    assert len(asked.answers) == 2


def test_19_a_provider_may_repeat_its_ids(coder: Ide, played: ScriptedLLM) -> None:
    played.script(calls(call("read_file", READ, id=""), call("read_file", READ, id="")), say("Both read."))
    one, two = (bubble.call for bubble in coder.say("go"))

    assert one.call_id != two.call_id
    assert coder.execute(one, {}) == []
    assert shown(coder.execute(two, {})) == [text("Both read.")]


def test_19_one_call_waits_for_a_person_and_the_other_does_not(coder: Ide, played: ScriptedLLM, asked: Asked) -> None:
    played.script(calls(call("write_file", WRITE), call("read_file", READ)), say("Both done."))
    first = coder.say("go")
    held, read = (bubble.call for bubble in first)

    early = coder.execute(read, {"content": "y"})
    pending = coder.pending_approvals()
    late = coder.execute(held, {"success": True})

    assert shown(first) == [wants("write_file", WRITE, approval=True), wants("read_file", READ)]
    assert (early, pending) == ([], [held])
    assert shown(late) == [text("Both done.")]
    assert coder.pending_approvals() == []
    assert len(asked.answers) == 2


@pytest.mark.parametrize("verdict", ["approve", "reject"])
def test_19_a_decision_that_leaves_a_call_open_is_answered_with_nothing(
    coder: Ide, played: ScriptedLLM, asked: Asked, verdict: str
) -> None:
    played.script(calls(call("write_file", WRITE), call("read_file", READ)), say("Well."))
    held, read = (bubble.call for bubble in coder.say("go"))

    decided = coder.decide(held, verdict)
    early = coder.execute(held, {"success": True})
    requests = len(asked.answers)
    late = coder.execute(read, {"content": "y"})

    assert (decided, early, requests) == ([], [], 1)
    assert shown(late) == [text("Well.")]
    results = {message.tool_call_id for message in coder.history().messages if message.role == "tool"}
    assert results == {held.call_id, read.call_id}
    assert len(asked.answers) == 2


# --- 20 and 21: nothing said ---------------------------------------------------------------------------------------


def test_20_an_empty_answer_is_an_error(coder: Ide, played: ScriptedLLM) -> None:
    played.script(empty(), say("Here I am."))

    answer = coder.say("go")

    assert shown(answer) == [error("model_empty_answer")]
    assert stored(coder) == [user("go")]
    assert shown(coder.say("again")) == [text("Here I am.")]


@pytest.mark.parametrize("content", ["", " \n\t"])
def test_21_an_empty_message_is_refused(ide: Ide, asked: Asked, content: str) -> None:
    answer = ide.say(content)

    assert shown(answer) == [refused("Agent error: 422")]
    assert ide.session() is None
    assert (asked.answers, asked.routings) == ([], 0)


# --- what becomes the model's result text --------------------------------------------------------------------------


@one_way
@pytest.mark.parametrize(
    ("answer", "content"),
    [
        ({"result": {"exit_code": 0, "stdout": "ä\n"}}, '{"exit_code": 0, "stdout": "ä\\n"}'),
        ({"result": {}}, "{}"),
        ({"result": []}, "[]"),
        ({"result": [1, None]}, "[1, null]"),
        ({"result": 0}, "0"),
        ({"result": 1.5}, "1.5"),
        ({"result": False}, "false"),
        ({"result": True}, "true"),
        ({"result": None}, "Tool executed successfully"),
        ({}, "Tool executed successfully"),
        ({"result": "two\nlines"}, "two\nlines"),
        ({"result": None, "error": "disk full"}, "Error: disk full"),
    ],
)
def test_a_result_of_any_kind_becomes_text(
    coder: Ide, played: ScriptedLLM, asked: Asked, answer: dict[str, Any], content: str
) -> None:
    read = asks_for(coder, played, "read_file", READ)
    played.script(say("Thanks."))

    coder.send({"type": "tool_result", "call_id": read.call_id, **answer})

    (result,) = [message for message in coder.history().messages if message.role == "tool"]
    assert without_layout(result.content) == without_layout(content)
    told = asked.answers[-1][-1]
    assert (told["tool_call_id"], told["content"]) == (read.call_id, result.content)


def test_a_result_and_an_error_at_once_are_refused(coder: Ide, played: ScriptedLLM) -> None:
    read = asks_for(coder, played, "read_file", READ)
    message = {"type": "tool_result", "call_id": read.call_id, "result": {}, "error": "both"}

    assert shown(coder.send(message)) == [refused("Agent error: 422")]
    assert len(stored(coder)) == 2


# --- section 5: decisions ------------------------------------------------------------------------------------------


def test_an_approved_call_is_released_and_answered_by_its_result(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked
) -> None:
    held = holds(coder, played)
    played.script(say("Written."))

    released = coder.decide(held, "approve")
    (waiting,) = open_calls(server, coder)
    between = stored(coder)
    requests = len(asked.answers)
    answer = coder.execute(held, {"bytes_written": 1})

    assert (released, requests) == ([], 1)
    assert (waiting["call_id"], waiting["state"], waiting["arguments"]) == (held.call_id, "released", WRITE)
    assert (waiting["requires_approval"], bool(waiting["released_at"])) == (True, True)
    assert between == [user("go"), assistant("", held)], "no tool message before the result"
    assert shown(answer) == [text("Written.")]
    assert stored(coder)[2:] == [tool(held, {"bytes_written": 1}), assistant("Written.")]
    assert (coder.pending_approvals(), open_calls(server, coder)) == ([], [])
    assert decisions(server, coder) == [(held.call_id, "approve")]
    assert coder.execute(held, {"bytes_written": 1}) == []
    assert len(asked.answers) == 2


def test_a_release_is_told_on_the_stream(server: Server, coder: Ide, played: ScriptedLLM) -> None:
    held = holds(coder, played)
    edited = {"path": "b.md", "content": "y"}
    decision = {"type": "hitl_decision", "call_id": held.call_id, "decision": "edit", "modified_arguments": edited}

    frames = server.post({**decision, "feedback": "not there"}, coder.session_id)

    resolved, done = frames
    assert (resolved.type, resolved.data["call_id"], resolved.spaced) == ("approval_resolved", held.call_id, False)
    metadata = resolved.data["metadata"]
    assert (metadata["decision"], metadata["arguments"], metadata["feedback"]) == ("edit", edited, "not there")
    assert metadata.keys() >= {"args_hash", "decided_by", "decided_at"}
    assert metadata["args_hash"] == open_calls(server, coder)[0]["args_hash"]
    assert (done.event, done.data) == ("done", {"status": "completed"})


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        ({"result": {"ok": 1}}, '{"ok": 1}'),
        ({"result": "text"}, "text"),
        ({"result": None}, "Tool executed successfully"),
        ({"error": "disk full"}, "Error: disk full"),
    ],
)
def test_an_edited_call_stays_in_history_as_the_model_made_it(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked, answer: dict[str, Any], content: str
) -> None:
    held = holds(coder, played)
    edited = {"path": "b.md", "content": "y", "backup": False}
    played.script(say("Written elsewhere."))

    released = coder.decide(held, "edit", modified_arguments=edited)
    (waiting,) = open_calls(server, coder)
    requests = len(asked.answers)
    continued = coder.send({"type": "tool_result", "call_id": held.call_id, **answer})

    assert (released, requests) == ([], 1)
    assert (waiting["state"], waiting["arguments"]) == ("released", edited)
    assert shown(continued) == [text("Written elsewhere.")]
    first, made, result, last = coder.history().messages
    assert made.tool_calls == (held,)
    assert isinstance(result.result, dict)
    told = dict(result.result)
    assert without_layout(told.pop("result")) == without_layout(content)
    assert told == {"status": "approved_with_edits", "tool_name": "write_file", "arguments": edited}
    assert (first.role, last.content) == ("user", "Written elsewhere.")
    (entry,) = audited(server, coder, "hitl_decision_made")
    assert (entry["call_id"], entry["tool_name"], entry["decision"].lower()) == (held.call_id, "write_file", "edit")
    assert (entry["original_args"], entry["modified_args"]) == (WRITE, edited)
    assert len(asked.answers) == 2


@one_way
@pytest.mark.parametrize(
    ("verdict", "arguments"),
    [
        ("edit", None),
        ("edit", {}),
        ("edit", {"path": "b.md"}),
        ("edit", {"path": 7, "content": "y"}),
        ("edit", {"path": "b.py", "content": "y"}),
        ("approve", WRITE),
        ("reject", WRITE),
    ],
)
def test_an_edit_has_to_be_one_that_the_agent_could_have_asked_for(
    architect: Ide, played: ScriptedLLM, asked: Asked, verdict: str, arguments: dict[str, Any] | None
) -> None:
    held = holds(architect, played)

    answer = architect.decide(held, verdict, modified_arguments=arguments)

    assert shown(answer) == [refused("Agent error: 422")]
    assert architect.pending_approvals() == [held]
    assert len(asked.answers) == 1


@pytest.mark.parametrize(
    ("given", "told"), [("not like this", "not like this"), (None, "User rejected this operation")]
)
def test_a_rejected_call_is_answered_and_the_model_continues(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked, given: str | None, told: str
) -> None:
    held = holds(coder, played)
    played.script(say("Then not."))

    answer = coder.decide(held, "reject", feedback=given)
    late = [coder.execute(held, {"success": True}), coder.reject(held)]

    assert shown(answer) == [text("Then not.")]
    assert late == [[], []], "a late result is ignored"
    assert stored(coder) == [
        user("go"),
        assistant("", held),
        tool(held, {"status": "rejected", "tool_name": "write_file", "feedback": told}),
        assistant("Then not."),
    ]
    assert coder.pending_approvals() == []
    assert decisions(server, coder) == [(held.call_id, "reject")]
    assert len(asked.answers) == 2


@one_way
@pytest.mark.parametrize(
    ("message", "verdict"),
    [
        ("Операция отклонена: write_file", "reject"),
        ("User rejected: User cancelled", "reject"),
        ("disk full", "approve"),
        ("Permission denied. User rejected earlier", "approve"),
    ],
)
def test_an_error_on_a_pending_call_rejects_it_only_when_it_says_so(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked, message: str, verdict: str
) -> None:
    held = holds(coder, played)
    played.script(say("I see."))

    answer = coder.fail(held, message)
    late = coder.execute(held, {"success": True})

    assert shown(answer) == [text("I see.")]
    assert late == []
    assert stored(coder) == [
        user("go"),
        assistant("", held),
        tool(held, f"Error: {message}"),
        assistant("I see."),
    ]
    assert coder.pending_approvals() == []
    assert decisions(server, coder) == [(held.call_id, verdict)]
    assert len(asked.answers) == 2


def test_the_ide_rejects_in_two_languages(coder: Ide, played: ScriptedLLM) -> None:
    played.script(calls(call("write_file", WRITE), call("create_directory", {"path": "x"})), say("Neither."))
    live, restored = (bubble.call for bubble in coder.say("go"))

    assert coder.reject(live) == []
    assert shown(coder.reject_restored(restored)) == [text("Neither.")]
    messages = {message.tool_call_id: message.content for message in coder.history().messages}
    assert messages[live.call_id] == "Error: Операция отклонена: write_file"
    assert messages[restored.call_id] == "Error: User rejected: User cancelled"


@pytest.mark.parametrize("verdict", ["approve", "reject"])
def test_the_ide_of_2025_sends_a_decision_and_a_result(
    server: Server, coder: Ide, played: ScriptedLLM, asked: Asked, verdict: str
) -> None:
    held = holds(coder, played)
    played.script(say("I see."))

    decided = coder.decide(held, verdict)
    reported = coder.execute(held, {"success": True}) if verdict == "approve" else coder.reject(held)

    assert shown(decided + reported) == [text("I see.")]
    results = [message for message in coder.history().messages if message.role == "tool"]
    assert [result.tool_call_id for result in results] == [held.call_id], "one tool message for one call"
    assert decisions(server, coder) == [(held.call_id, verdict)]
    assert len(asked.answers) == 2


def test_figures_count_what_became_of_the_calls(server: Server, coder: Ide, played: ScriptedLLM) -> None:
    def figures() -> dict[str, int]:
        metrics: dict[str, dict[str, dict[str, int]]] = server.http.get("/events/metrics").json()["metrics"]
        return {**metrics["tool_executions"].get("write_file", {}), **metrics["hitl_decisions"].get("write_file", {})}

    before = figures()
    played.script(*[call("write_file", WRITE)] * 4, say("Enough."))
    (first,) = coder.say("go")
    (second,) = coder.execute(first.call, {"success": True})
    (third,) = coder.fail(second.call, "disk full")
    coder.decide(third.call, "edit", modified_arguments=WRITE)
    (fourth,) = coder.execute(third.call, {"success": True})
    coder.decide(fourth.call, "reject")

    assert {name: value - before.get(name, 0) for name, value in figures().items()} == {
        "requested": 4,
        "requires_approval": 4,
        "completed": 2,
        "failed": 1,
        "APPROVE": 2,
        "EDIT": 1,
        "REJECT": 1,
    }
    (failure,) = audited(server, coder, "tool_execution_failed")
    assert (failure["tool_name"], failure["call_id"]) == ("write_file", second.call.call_id)
    assert "disk full" in failure["error_message"]


def test_approvals_survive_a_restart(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:
    executed_id, rejected_id = str(uuid.uuid4()), str(uuid.uuid4())
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url) as server:
        executed, rejected = (Ide(Gateway(server.http, one), one) for one in (executed_id, rejected_id))
        llm.script(call("write_file", WRITE), call("execute_command", {"command": "ls"}))
        held = [one.say("go", agent_type="coder")[-1].call for one in (executed, rejected)]

        server.kill()
        server.start()
        restored = [one.pending_approvals() for one in (executed, rejected)]
        llm.script(say("Written."), say("Then not."))
        answers = [executed.execute(held[0], {"success": True}), rejected.reject_restored(held[1])]

        assert restored == [[held[0]], [held[1]]]
        assert [shown(answer) for answer in answers] == [[text("Written.")], [text("Then not.")]]
        assert (executed.pending_approvals(), rejected.pending_approvals()) == ([], [])
        assert stored(rejected)[2:] == [tool(held[1], "Error: User rejected: User cancelled"), assistant("Then not.")]
        assert decisions(server, rejected) == [(held[1].call_id, "reject")]
    assert llm.refused == []
    assert len(llm.answers) == 4


# --- the IDE's start, and what a socket refuses --------------------------------------------------------------------


def test_the_ide_starts(ide: Ide, open_ide: Callable[[str], Ide], played: ScriptedLLM) -> None:
    created = ide.create_session()
    opened = open_ide(created.id)
    played.script(call("write_file", WRITE))

    assert (created.message_count, created.current_agent) == (0, "orchestrator")
    assert (opened.history(), opened.pending_approvals()) == (History(current_agent="orchestrator"), [])
    opened.say("write it", agent_type="coder")
    session = opened.session()
    assert session is not None
    assert (session.id, session.title, session.message_count) == (created.id, "write it", 2)
    assert created.id in [one.id for one in opened.sessions()]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"type": "cancel"}, "Unknown message type: cancel"),
        ("no json", "Invalid JSON message: "),
        ("[]", "Invalid JSON message: "),
        ({"type": "user_message", "content": "hi"}, "Invalid JSON message: "),
        ({"type": "user_message", "content": "hi", "role": "poet"}, "Invalid JSON message: "),
        ({"type": "user_message", "content": 7, "role": "user"}, "Invalid JSON message: "),
        ({"type": "tool_result", "result": {}}, "Invalid JSON message: "),
        ({"type": "tool_result", "call_id": "c", "error": 7}, "Invalid JSON message: "),
        ({"type": "switch_agent", "agent_type": "coder"}, "Invalid JSON message: "),
        ({"type": "switch_agent", "agent_type": "poet", "content": ""}, "Agent error: 400"),
        ({"type": "hitl_decision", "call_id": "c", "decision": "APPROVE"}, "Invalid JSON message: "),
        ({"type": "hitl_decision", "call_id": "", "decision": "approve"}, "Agent error: 400"),
        (ide_message("tool_result", call_id="", error="x"), "Agent error: 400"),
    ],
)
def test_a_bad_message_is_refused_and_the_socket_stays_open(
    coder: Ide, played: ScriptedLLM, message: Any, content: str
) -> None:
    played.script(say("Hello."))

    answer = coder.send(message)

    assert shown(answer) == [refused(ANY)]
    assert answer[0].text.startswith(content)
    assert shown(coder.say("hi")) == [text("Hello.")]

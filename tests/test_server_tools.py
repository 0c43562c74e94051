"""Tools that the server executes itself: under the rules as any other, at least once, with one key; real processes."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from django.conf import settings

from tests import databases
from tests.scripted_llm import Gate, ScriptedLLM, call, calls, gated, say
from tests.server import BRIEF, Frame, Server, eventually, running, until
from tests.staff import COOKIE, OPERATORS, cookie_of
from tests.terminal import Chat
from tests.test_tool_faults import read_by
from tests.test_tool_survival import calls_in, messages, open_calls, refusal_in, results

Object = dict[str, Any]
TOOLS = ["add_note", "pay", "count_notes", "break", "wait", "hang", "hold_connection"]


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory, shared_llm: ScriptedLLM, migrated: Path) -> Iterator[Server]:
    """A server with tools of its own, which tests may kill; the coder may use them."""
    folder = tmp_path_factory.mktemp("tools")
    environment = {
        "SERVER_TOOLS": "tests.tools_for_the_server",
        "TOOLS_FOLDER": str(folder),
        "LLM_BASE_URL": shared_llm.url,
        "TURN_LEASE_SECONDS": "1",
    }
    with running(folder, migrated, **environment) as server:
        server.stop()
        outcome = server.manage("migrate", "-v0")
        assert outcome.returncode == 0, outcome.stderr
        allowed = json.dumps([*TOOLS, "read_file", "write_file"])
        databases.change(server.database, "UPDATE agents_app_agent SET allowed_tools = ? WHERE name = 'coder'", allowed)
        server.start()
        yield server


@pytest.fixture
def server(own_server: Server, played: ScriptedLLM) -> Iterator[Server]:
    folder = own_server.database.parent
    for name in ("notes", "payments", "notes-cancelled", "payments-cancelled", "open"):
        (folder / name).unlink(missing_ok=True)
    yield own_server
    (folder / "open").touch()
    if own_server.process is None or own_server.process.poll() is not None:
        own_server.start()


@pytest.fixture
def ask_about(server: Server) -> Iterator[Callable[[str], None]]:
    """Adds a rule, for one test: calls of this tool wait for a person."""

    def add(tool: str) -> None:
        databases.change(
            server.database,
            "INSERT INTO agents_app_approvalrule (position, tool, agent, outcome, reason, self_approval, is_active)"
            " VALUES (1, ?, '', 'ask', 'It matters.', true, true)",
            tool,
        )

    yield add
    databases.change(server.database, "UPDATE agents_app_approvalrequest SET rule_id = NULL")
    databases.change(server.database, "DELETE FROM agents_app_approvalrule WHERE reason = 'It matters.'")


def lines(server: Server, name: str) -> list[list[str]]:
    """What the tools have written down: ids of calls and what they were called with."""
    file = server.database.parent / name
    return [line.split(" ", 1) for line in file.read_text().splitlines()] if file.exists() else []


def let_go(server: Server) -> None:
    (server.database.parent / "open").touch()


def moves(frames: list[Frame]) -> list[tuple[str, str]]:
    return [(frame.data["tool_name"], frame.data["state"]) for frame in frames if frame.type == "server_call"]


def go(server: Server, session_id: str) -> list[Frame]:
    return server.say(session_id, "Go on.", agent_type="coder")


def begun(server: Server, session_id: str, content: str = "Go on.") -> Any:
    message = {"type": "user_message", "content": content, "agent_type": "coder"}
    return server.streaming(message, session_id)


def rows(server: Server, query: str, *values: Any) -> list[tuple[Any, ...]]:
    return databases.rows(server.database, query, *values)


def settle(server: Server, call_id: str, **fields: str) -> httpx.Response:
    """What an operator does on the page of a call in doubt."""
    with httpx.Client(base_url=server.url, cookies={COOKIE: cookie_of(OPERATORS[0])}, limits=BRIEF) as browser:
        page = f"/admin/sessions_app/toolcall/{quote(call_id.replace('_', '_5F'))}/given-up/"
        asked = browser.get(page)
        assert asked.status_code == 200
        assert "Execute again" in asked.text
        token = browser.cookies["csrftoken"]
        return browser.post(page, data={"csrfmiddlewaretoken": token, **fields}, headers={"Referer": server.url})


def is_stopping(server: Server) -> bool:
    try:
        return server.http.get("/readyz").status_code == 503
    except httpx.TransportError:
        return True


def in_doubt(server: Server, played: ScriptedLLM, session_id: str) -> str:
    """A payment that has begun when its server is killed; the id of its call when another has found it."""
    played.script(call("pay", {"text": "rent", "held": True}))
    with begun(server, session_id) as frames:
        until(frames, "server_call")
        eventually(lambda: lines(server, "payments"))
        server.kill()
    server.start()
    eventually(lambda: [each["state"] for each in open_calls(server, session_id)] == ["in_doubt"])
    [(call_id, _)] = lines(server, "payments")
    return call_id


def test_the_server_executes_it_and_no_client_is_asked_to(server: Server, played: ScriptedLLM) -> None:
    played.script(call("add_note", {"text": "milk"}, text="I note it."), say("Noted."))

    answer = go(server, "t0")

    assert calls_in(answer) == []
    assert moves(answer) == [("add_note", "executing"), ("add_note", "ok")]
    [(call_id, text)] = lines(server, "notes")
    assert text == "milk"
    assert read_by(played.answers[-1]) == {call_id: '{"noted": "milk", "agent": "coder"}'}
    assert answer[-1].event == "done" and answer[-2].data["status"] == "completed"
    assert {frame.spaced for frame in answer if frame.type == "server_call"} == {False}, "which the gateway skips"
    told = "SELECT event_type FROM events_app_event WHERE session_id = 't0' AND event_type LIKE 'tool%' ORDER BY id"
    assert [each for (each,) in rows(server, told)] == [
        f"tool.execution.{step}" for step in ("requested", "started", "completed")
    ]


def test_a_function_that_is_no_coroutine_runs_on_a_thread(server: Server, played: ScriptedLLM) -> None:
    played.script(
        calls(call("add_note", {"text": "a"}), call("add_note", {"text": "b"})), call("count_notes"), say("2")
    )

    go(server, "t1")

    assert list(read_by(played.answers[-1]).values())[-1] == "2"


@pytest.mark.parametrize(
    ("text", "state", "told"),
    [
        ("kindly", "error", "Error: There is nothing to break."),
        ("badly", "error", "Error: break failed on the server. Whether it took effect is not known."),
        ("without json", "error", "Error: break failed on the server. Whether it took effect is not known."),
        ("in silence", "ok", "Tool executed successfully"),
    ],
)
def test_whatever_becomes_of_it_the_model_reads_and_goes_on(
    server: Server, played: ScriptedLLM, text: str, state: str, told: str
) -> None:
    played.script(call("break", {"text": text}), say("I see."))

    answer = go(server, f"t2-{state}-{len(text)}")

    assert moves(answer)[-1] == ("break", state)
    assert list(read_by(played.answers[-1]).values()) == [told]
    assert "secret of the inside" not in str([frame.data for frame in answer])


def test_a_result_that_is_too_long_is_cut(server: Server, played: ScriptedLLM) -> None:
    played.script(call("break", {"text": "x"}), say("I see."))

    go(server, "t3")

    [read] = read_by(played.answers[-1]).values()
    assert read.startswith("x" * 262_144) and read.endswith("\n… 37,856 more characters were left out.")


def test_one_that_does_not_end_is_ended_at_its_deadline(server: Server, played: ScriptedLLM) -> None:
    played.script(call("wait", {"text": "for ever"}), say("I see."))

    answer = go(server, "t4")

    assert moves(answer)[-1] == ("wait", "timed_out")
    [read] = map(json.loads, read_by(played.answers[-1]).values())
    assert read["status"] == "timed_out" and "within 1 s" in read["message"]


def test_arguments_that_do_not_fit_are_refused_and_nothing_is_executed(server: Server, played: ScriptedLLM) -> None:
    played.script(call("add_note", {"text": 7}), say("I see."))

    answer = go(server, "t5")

    assert moves(answer) == []
    assert lines(server, "notes") == []


def test_while_it_executes_clients_see_it_and_cannot_answer_it(server: Server, played: ScriptedLLM) -> None:
    played.script(call("add_note", {"text": "milk", "held": True}), say("Noted."))
    with begun(server, "t6") as frames:
        [moved] = [frame.data for frame in until(frames, "server_call") if frame.type == "server_call"]
        [shown] = open_calls(server, "t6")
        refused = server.post({"type": "tool_result", "call_id": moved["call_id"], "result": "mine"}, "t6")
        let_go(server)
        rest = list(frames)

    assert (shown["call_id"], shown["state"], shown["executed_by"]) == (moved["call_id"], "executing", "server")
    assert refusal_in(refused) == {"code": "executed_by_server"}
    assert results(server, "t6") == [(moved["call_id"], '{"noted": "milk", "agent": "coder"}')]
    assert rest[-1].event == "done"


def test_each_result_is_stored_as_soon_as_it_is_there(server: Server, played: ScriptedLLM) -> None:
    both = calls(call("add_note", {"text": "slow", "held": True}), call("add_note", {"text": "quick"}))
    played.script(both, say("Noted."))
    with begun(server, "t22") as frames:
        eventually(lambda: len(results(server, "t22")) == 1)
        let_go(server)
        rest = list(frames)

    assert [state for _, state in moves(rest)] == ["executing", "executing", "ok", "ok"]
    assert rest[-2].data["status"] == "completed"


@pytest.mark.parametrize("client_first", [True, False])
def test_beside_calls_of_the_client_the_model_is_asked_once_when_all_are_answered(
    server: Server, played: ScriptedLLM, client_first: bool
) -> None:
    session_id = f"t7-{client_first}"
    both = calls(call("read_file", {"path": "a.md"}), call("add_note", {"text": "milk", "held": True}))
    played.script(both, say("Both are done."))
    asked = len(played.answers)

    with begun(server, session_id) as frames:
        seen = until(frames, "server_call")
        [reading] = calls_in(seen)
        mine = {"type": "tool_result", "call_id": reading["call_id"], "result": "text"}
        if client_first:
            with ThreadPoolExecutor(1) as pool:
                answered = pool.submit(server.post, mine, session_id)
                eventually(lambda: len(results(server, session_id)) == 1)
                let_go(server)
                answer = answered.result()
            rest = list(frames)
        else:
            let_go(server)
            rest = list(frames)
            assert [each["state"] for each in open_calls(server, session_id)] == ["released"]
            answer = server.post(mine, session_id)

    assert moves(rest) == [("add_note", "ok")]
    assert rest[-1].event == "done"
    assert [frame.data["status"] for frame in answer if frame.type == "turn_finished"] == ["completed"]
    assert len(played.answers) == asked + 2
    assert sorted(text for _, text in results(server, session_id)) == sorted(read_by(played.answers[-1]).values())


@pytest.mark.parametrize("verdict", ["approve", "edit", "reject"])
def test_under_a_rule_that_asks_it_is_executed_once_a_person_has_said_so(
    server: Server, played: ScriptedLLM, ask_about: Callable[[str], None], verdict: str
) -> None:
    ask_about("pay")
    played.script(call("pay", {"text": "rent"}), say("Done."))
    session_id = f"t8-{verdict}"

    asked = go(server, session_id)
    [waiting] = server.http.get(f"/sessions/{session_id}/pending-approvals").json()["pending_approvals"]
    unasked = server.post(
        {"type": "tool_result", "call_id": waiting["call_id"], "error": "Unsupported tool"}, session_id
    )
    assert lines(server, "payments") == []
    edited = {"modified_arguments": {"text": "half the rent"}} if verdict == "edit" else {}
    decision = {"type": "hitl_decision", "call_id": waiting["call_id"], "decision": verdict, **edited}
    answer = server.post(decision, session_id)

    assert moves(asked) == [("pay", "waiting")] and calls_in(asked) == []
    assert refusal_in(unasked) == {"code": "executed_by_server"}
    assert [frame.type for frame in answer][0] == "approval_resolved"
    assert answer[-2].data["status"] == "completed"
    said = {"approve": ["rent"], "edit": ["half the rent"], "reject": []}[verdict]
    assert [text for _, text in lines(server, "payments")] == said
    assert moves(answer) == [("pay", "executing"), ("pay", "ok")][: 2 * len(said)]


def test_a_client_whose_user_says_no_rejects_it(
    server: Server, played: ScriptedLLM, ask_about: Callable[[str], None]
) -> None:
    ask_about("pay")
    played.script(call("pay", {"text": "rent"}), say("Then not."))
    go(server, "t9")
    [waiting] = open_calls(server, "t9")

    refusal = {"type": "tool_result", "call_id": waiting["call_id"], "error": "User rejected this operation"}
    answer = server.post(refusal, "t9")

    assert answer[-2].data["status"] == "completed"
    assert lines(server, "payments") == []
    assert rows(server, "SELECT status FROM agents_app_approvalrequest WHERE session_id = 't9'") == [("rejected",)]


def test_one_that_is_approved_while_another_executes_is_executed_too(
    server: Server, played: ScriptedLLM, ask_about: Callable[[str], None]
) -> None:
    ask_about("pay")
    played.script(calls(call("add_note", {"text": "a", "held": True}), call("pay", {"text": "rent"})), say("Both."))
    with begun(server, "t10") as frames, ThreadPoolExecutor(1) as pool:
        until(frames, "server_call")
        waiting = eventually(lambda: [each for each in open_calls(server, "t10") if each["state"] == "waiting"])[0]
        decision = {"type": "hitl_decision", "call_id": waiting["call_id"], "decision": "approve"}
        decided = pool.submit(server.post, decision, "t10")
        eventually(lambda: [each["state"] for each in open_calls(server, "t10")] == ["executing", "executing"])
        let_go(server)
        answer, rest = decided.result(), list(frames)

    assert answer[-2].data["status"] == rest[-2].data["status"] == "completed"
    assert len(lines(server, "notes")) == len(lines(server, "payments")) == 1


def test_what_may_be_repeated_is_executed_again_under_the_same_key(server: Server, played: ScriptedLLM) -> None:
    played.script(call("add_note", {"text": "milk", "held": True}), say("Noted."))
    with begun(server, "t11") as frames:
        until(frames, "server_call")
        eventually(lambda: lines(server, "notes"))
        server.kill()
    let_go(server)
    server.start()

    eventually(lambda: not server.http.get("/sessions/t11/open-calls").json()["open_turn"])

    [first, second] = lines(server, "notes")
    assert first == second
    assert results(server, "t11") == [(first[0], '{"noted": "milk", "agent": "coder"}')]
    assert messages(server, "t11")[-1]["content"] == "Noted."


def test_what_may_not_be_repeated_waits_for_an_operator_who_has_it_executed_again(
    server: Server, played: ScriptedLLM
) -> None:
    call_id = in_doubt(server, played, "t12")
    let_go(server)
    played.script(say("It is paid."))

    with server.following("t12") as frames:
        seen = until(frames, "error")
        assert settle(server, call_id, again="1", reason="The bank knows nothing.").status_code == 302
        rest = until(frames, "turn_finished")

    assert seen[-1].data["metadata"] == {"code": "tool_in_doubt", "call_id": call_id}
    assert moves(rest) == [("pay", "executing"), ("pay", "ok")]
    assert [each for each, _ in lines(server, "payments")] == [call_id, call_id]
    audited = "SELECT action, actor, reason FROM events_app_auditentry WHERE target = ? ORDER BY id"
    assert rows(server, audited, call_id) == [
        ("call.in_doubt", "system", "The server ended while it executed pay."),
        ("call.executed_again", OPERATORS[0], "The bank knows nothing."),
    ]
    assert messages(server, "t12")[-1]["content"] == "It is paid."


def test_an_operator_gives_up_what_is_in_doubt_and_the_model_reads_why(server: Server, played: ScriptedLLM) -> None:
    call_id = in_doubt(server, played, "t13")
    played.script(say("I shall ask the bank."))

    assert settle(server, call_id, reason="Paid by hand.").status_code == 302

    eventually(lambda: messages(server, "t13")[-1]["content"] == "I shall ask the bank.")
    [read] = map(json.loads, read_by(played.answers[-1]).values())
    assert (read["status"], read["reason"]) == ("in_doubt", "Paid by hand.")
    assert len(lines(server, "payments")) == 1


def test_a_message_takes_the_place_of_what_is_in_doubt(server: Server, played: ScriptedLLM) -> None:
    call_id = in_doubt(server, played, "t14")
    played.script(say("Something else, then."))

    answer = server.say("t14", "Never mind.")

    assert answer[-2].data["status"] == "completed"
    [(answered, text)] = results(server, "t14")
    assert answered == call_id
    assert json.loads(text)["status"] == "superseded" and "not known" in text


def test_a_server_that_stops_lets_what_ends_soon_end(server: Server, played: ScriptedLLM) -> None:
    played.script(call("pay", {"text": "rent", "held": True}), say("Paid."))
    with begun(server, "t15") as frames:
        until(frames, "server_call")
        eventually(lambda: lines(server, "payments"))
        server.tell()
        eventually(lambda: is_stopping(server))
        let_go(server)
        assert server.end() == 0
    server.start()

    eventually(lambda: messages(server, "t15")[-1]["content"] == "Paid.")

    assert len(lines(server, "payments")) == 1
    assert rows(server, "SELECT outcome FROM sessions_app_toolcall WHERE session_id = 't15'") == [("ok",)]


def test_a_thread_that_hangs_does_not_keep_a_server_from_ending(server: Server, played: ScriptedLLM) -> None:
    played.script(call("hang", {"text": "for ever"}), say("I see."))

    answer = go(server, "t19")

    assert moves(answer)[-1] == ("hang", "timed_out")
    assert server.stop() == 0


def test_tools_that_hold_all_their_threads_leave_the_server_its_connections(
    server: Server, played: ScriptedLLM
) -> None:
    holding = [call("hold_connection", {"text": str(number)}) for number in range(settings.SERVER_TOOL_THREADS)]
    played.script(calls(*holding), say("Elsewhere."), say("Held."))

    with begun(server, "t20") as frames:
        eventually(lambda: len(lines(server, "notes")) == len(holding))
        elsewhere = server.say("t21", "Hello.", agent_type="coder")
        let_go(server)
        rest = list(frames)

    assert [each[-2].data["status"] for each in (elsewhere, rest)] == ["completed", "completed"]


def test_cancelling_ends_what_is_executing(server: Server, played: ScriptedLLM) -> None:
    played.script(calls(call("add_note", {"text": "a", "held": True}), call("read_file", {"path": "a.md"})))
    with begun(server, "t16") as frames:
        until(frames, "server_call")
        eventually(lambda: lines(server, "notes"))
        assert server.http.post("/sessions/t16/cancel").json()["cancelled_turn"]
        rest = list(frames)

    assert [(each.data["status"], each.data["code"]) for each in rest if each.type == "turn_finished"] == [
        ("cancelled", "cancelled")
    ]
    assert eventually(lambda: lines(server, "notes-cancelled")) == lines(server, "notes")
    told = [json.loads(text) for _, text in results(server, "t16")]
    assert [each["status"] for each in told] == ["cancelled", "cancelled"]
    assert "not known" in told[0]["message"] and "not known" not in told[1]["message"]
    played.script(say("Again."))
    assert go(server, "t16")[-2].data["status"] == "completed", "the history is one that a strict model takes"


def test_a_message_that_came_meanwhile_keeps_the_turn_from_waiting(server: Server, played: ScriptedLLM) -> None:
    both = calls(call("read_file", {"path": "a.md"}), call("add_note", {"text": "milk", "held": True}))
    played.script(both, say("Here I am."))
    with begun(server, "t17") as frames, ThreadPoolExecutor(1) as pool:
        until(frames, "server_call")
        later = pool.submit(server.say, "t17", "Never mind.")
        queued = "SELECT count(*) FROM sessions_app_turn WHERE session_id = 't17' AND status = 'queued'"
        eventually(lambda: rows(server, queued) == [(1,)])
        let_go(server)
        rest, answer = list(frames), later.result()

    assert [(each.data["status"], each.data["code"]) for each in rest if each.type == "turn_finished"] == [
        ("cancelled", "superseded")
    ]
    assert answer[-2].data["status"] == "completed"
    outcomes = "SELECT tool_name, outcome FROM sessions_app_toolcall WHERE session_id = 't17' ORDER BY position"
    assert rows(server, outcomes) == [("read_file", "superseded"), ("add_note", "ok")]


def test_when_the_user_has_gone_on_before_nothing_is_executed_that_leads_nowhere(
    server: Server, played: ScriptedLLM
) -> None:
    gate = Gate()
    both = calls(call("read_file", {"path": "a.md"}), call("pay", {"text": "rent"}), text="Let me see.")
    played.script(gated(both, gate), say("Here I am."))
    with begun(server, "t18") as frames, ThreadPoolExecutor(1) as pool:
        gate.reached.wait()
        later = pool.submit(server.say, "t18", "Never mind.")
        queued = "SELECT count(*) FROM sessions_app_turn WHERE session_id = 't18' AND status = 'queued'"
        eventually(lambda: rows(server, queued) == [(1,)])
        gate.open()
        assert list(frames)[-2].data["code"] == "superseded"
        assert later.result()[-2].data["status"] == "completed"

    assert lines(server, "payments") == []
    assert {json.loads(text)["status"] for _, text in results(server, "t18")} == {"superseded"}


def test_the_terminal_shows_what_the_server_executes_and_leaves_it_alone(
    server: Server, played: ScriptedLLM, ask_about: Callable[[str], None], tmp_path: Path
) -> None:
    ask_about("pay")
    server.post({"type": "switch_agent", "agent_type": "coder"}, "t19")
    played.script(call("pay", {"text": "rent"}), call("add_note", {"text": "rent is paid"}), say("All done."))
    with Chat(server, tmp_path, "--session", "t19") as chat:
        chat.expect("Session t19 again")
        chat.say("Pay the rent")
        chat.expect("pay")
        chat.expect("waits for an operator")
        [waiting] = eventually(lambda: open_calls(server, "t19"))
        decision = server.http.post(f"/approvals/{waiting['call_id']}/decision", json={"decision": "approve"})
        assert decision.status_code == 200
        chat.expect("pay was approved by internal")
        chat.expect("  → ok, on the server\n")
        chat.expect("add_note")
        chat.expect("  → ok, on the server\n")
        chat.expect("│ All done.\n")

    assert len(lines(server, "payments")) == len(lines(server, "notes")) == 1
    assert rows(server, "SELECT count(*) FROM events_app_auditentry WHERE action = 'call.late_result'") == [(0,)]

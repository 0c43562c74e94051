"""Deadlines on a real server: the clock ends what is overdue, also after a death, and whatever meets it, once."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from messages_app.acceptance import LATE_RESULTS_KEPT
from tests import databases
from tests.scripted_llm import ScriptedLLM, call, calls, say
from tests.server import Frame, Server, eventually, running, until

Object = dict[str, Any]
READ = {"path": "a.md"}
WRITE = {"path": "a.md", "content": "text"}


def give(server: Server, seconds: int) -> None:
    """Let clients have so many seconds for the result of any tool."""
    databases.change(server.database, "UPDATE agents_app_tool SET deadline_seconds = ?", seconds)


def let_time_run_out(server: Server, call_id: str) -> None:
    databases.change(
        server.database, "UPDATE sessions_app_toolcall SET deadline_at = released_at WHERE call_id = ?", call_id
    )


def ask_for(server: Server, session_id: str) -> list[Object]:
    """Have the coder ask for what the model's script says next; the calls."""
    frames = server.say(session_id, "go", agent_type="coder")
    return [frame.data for frame in frames if frame.type == "tool_call"]


def open_calls(server: Server, session_id: str) -> list[Object]:
    return server.http.get(f"/sessions/{session_id}/open-calls").json()["open_calls"]


def outcome_of(server: Server, call_id: str) -> str:
    query = "SELECT outcome FROM sessions_app_toolcall WHERE call_id = ?"
    return str(databases.rows(server.database, query, call_id)[0][0])


def codes(frames: list[Frame]) -> list[tuple[str, str]]:
    errors = [frame.data["metadata"] for frame in frames if frame.type == "error"]
    return [(error["code"], error["call_id"]) for error in errors]


def read_of_the_call(body: Object) -> Object:
    """What a model request says of the only call in it."""
    (told,) = [message["content"] for message in body["messages"] if message["role"] == "tool"]
    return dict(json.loads(told))


def test_who_follows_reads_that_a_call_timed_out_and_what_the_agent_says_next(server: Server, llm: ScriptedLLM) -> None:
    give(server, 1)
    llm.script(call("read_file", READ), say("Then without it."))
    with server.following(on_coder(server)) as stream:
        (asked,) = ask_for(server, "s")

        seen = until(stream, "turn_finished")

    assert codes(seen) == [("tool_timed_out", asked["call_id"])]
    assert seen[-1].data["status"] == "completed"
    assert read_of_the_call(llm.answers[-1])["status"] == "timed_out"
    assert server.history("s")[-1] == ("assistant", "Then without it.")
    assert open_calls(server, "s") == []
    late = server.post({"type": "tool_result", "call_id": asked["call_id"], "result": "text"}, "s")
    assert [frame.event for frame in late] == ["done"]
    assert llm.refused == [] and len(llm.answers) == 2


def on_coder(server: Server) -> str:
    server.post({"type": "switch_agent", "agent_type": "coder"}, "s")
    return "s"


def test_a_call_waits_for_a_person_as_long_as_it_takes_and_its_deadline_begins_with_the_decision(
    server: Server, llm: ScriptedLLM
) -> None:
    give(server, 1)
    llm.script(calls(call("read_file", READ), call("write_file", WRITE)), say("Then without both."))
    reading, writing = ask_for(server, "s")

    # The other one's time has run out long since when nothing has happened to this one.
    eventually(lambda: outcome_of(server, reading["call_id"]) == "timed_out")
    (waiting,) = open_calls(server, "s")
    assert (waiting["call_id"], waiting["state"], waiting["deadline_at"]) == (writing["call_id"], "waiting", None)
    decided = server.post({"type": "hitl_decision", "call_id": writing["call_id"], "decision": "approve"}, "s")
    with server.following("s", after=decided[0].seq) as stream:
        seen = until(stream, "turn_finished")

    assert codes(seen) == [("tool_timed_out", writing["call_id"])]
    assert len(llm.answers) == 2, "the model was asked when no call was open"


def test_a_call_whose_time_ran_out_while_the_server_was_dead_is_ended_after_its_start(
    server: Server, llm: ScriptedLLM
) -> None:
    llm.script(call("read_file", READ), say("Then without it."))
    (asked,) = ask_for(server, "s")
    (before,) = open_calls(server, "s")
    assert before["deadline_at"] is not None
    server.kill()
    let_time_run_out(server, asked["call_id"])

    server.start()

    with server.following("s") as stream:
        seen = until(stream, "turn_finished")
    assert codes(seen) == [("tool_timed_out", asked["call_id"])]
    assert seen[-1].data["status"] == "completed"
    assert outcome_of(server, asked["call_id"]) == "timed_out"


def test_a_result_before_the_deadline_is_the_answer(server: Server, llm: ScriptedLLM) -> None:
    llm.script(call("read_file", READ), say("Read."))
    (asked,) = ask_for(server, "s")

    answer = server.post({"type": "tool_result", "call_id": asked["call_id"], "result": "text"}, "s")

    assert answer[-2].data["status"] == "completed"
    assert [message["content"] for message in llm.answers[-1]["messages"] if message["role"] == "tool"] == ["text"]


def test_of_many_late_results_at_once_so_many_are_written_down_and_no_more(server: Server, llm: ScriptedLLM) -> None:
    llm.script(call("read_file", READ), say("Read."))
    (asked,) = ask_for(server, "s")
    message = {"type": "tool_result", "call_id": asked["call_id"], "result": "text"}
    server.post(message, "s")

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.post(message, "s"), range(4 * LATE_RESULTS_KEPT)))

    assert all([frame.event for frame in answer] == ["done"] for answer in answers)
    written = "SELECT count(*) FROM events_app_auditentry WHERE target = ? AND action = 'call.late_result'"
    assert databases.rows(server.database, written, asked["call_id"]) == [(LATE_RESULTS_KEPT,)]


ROUNDS = 50
# In a process of its own, on a database with real commits: two clocks and a client, all at the same moment.
RACE = """
import json, random, threading, time
from django.db import connection
from django.db.models.functions import Now
from events_app.models import AuditEntry, Event
from messages_app import acceptance
from messages_app.inbound import ToolResult
from sessions_app import unanswered
from sessions_app.models import ToolCall
from tests.factories import CALLER, make_calls, make_session, wanted

for number in range({rounds}):
    (call,) = make_calls(make_session(f"s{{number}}"), wanted("read_file"))
    ToolCall.objects.filter(pk=call.pk).update(deadline_at=Now())
    together, done = threading.Barrier(3), []

    def act(name, do):
        try:
            together.wait()
            # Whoever has the shorter way to the lock would win each time.
            time.sleep(random.random() * 0.01)
            done.append([name, bool(do())])
        except Exception as error:
            done.append([name, repr(error)])
        finally:
            connection.close()

    def answer():
        return acceptance.tool_result(ToolResult(call.session_id, call.pk, "text"), CALLER).has_frames

    acts = [("clock", unanswered.end_overdue), ("clock", unanswered.end_overdue), ("client", answer)]
    threads = [threading.Thread(target=act, args=each) for each in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    call = ToolCall.objects.select_related("turn").get(pk=call.pk)
    ended = ("tool.execution.completed", "tool.execution.failed")
    facts = Event.objects.filter(session_id=call.session_id, event_type__in=ended)
    print(json.dumps({{
        "done": sorted(done), "outcome": call.outcome, "turn": call.turn.status,
        "facts": list(facts.values_list("event_type", flat=True)),
        "late": AuditEntry.objects.filter(target=call.pk, action="call.late_result").count(),
    }}))
"""


def test_when_a_result_meets_two_clocks_one_of_them_counts(tmp_path: Path, migrated: Path) -> None:
    with running(tmp_path, migrated) as server:
        server.kill()
        raced = server.manage("shell", "-v0", "-c", RACE.format(rounds=ROUNDS))
    assert raced.returncode == 0, raced.stderr
    rounds = [json.loads(line) for line in raced.stdout.splitlines()]

    assert len(rounds) == ROUNDS
    for each in rounds:
        won_by = [name for name, won in each["done"] if won is True]
        lost_by = [name for name, won in each["done"] if won is False]
        assert len(won_by) == 1 and len(lost_by) == 2, each
        by_client = won_by == ["client"]
        assert each["outcome"] == ("ok" if by_client else "timed_out"), each
        assert each["facts"] == ["tool.execution.completed" if by_client else "tool.execution.failed"], each
        assert each["late"] == (0 if by_client else 1), each
        assert each["turn"] == "queued", each
    assert set(Counter(each["outcome"] for each in rounds)) == {"ok", "timed_out"}, "they did meet"

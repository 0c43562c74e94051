"""Calls that their clients do not answer: ended at their deadline or given up, each once, and what comes late counts
for nothing."""

import hashlib
import json
from datetime import timedelta
from typing import Any

import pytest
from django.apps import apps
from django.db import connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from agents_app import approvals, team
from agents_app.approval_views import opened
from agents_app.approvals import Choice, Verdict
from agents_app.models import ApprovalRequest, TeamVersion, Tool
from agents_app.team import Team
from events_app import log
from events_app.log import AuditUnavailable
from events_app.models import AuditEntry, Event
from messages_app import acceptance, claims, ending
from messages_app.acceptance import LATE_RESULTS_KEPT, Refused
from messages_app.history import history
from messages_app.inbound import ToolResult
from orchestrator_site.http import wire_time
from sessions_app import unanswered
from sessions_app.callers import Caller
from sessions_app.models import Account, CallMoved, Session, ToolCall, Turn, UnknownSession
from tests.factories import (
    CALLER,
    OPERATOR,
    act,
    block_audit_entries,
    complete,
    let_audit_entries,
    make_calls,
    make_session,
    make_turn,
    make_waiting_call,
    run,
    wanted,
)

pytestmark = pytest.mark.django_db

TEN_MINUTES = timedelta(minutes=10)
APPROVE = Choice(Verdict.APPROVE)
EDIT = Choice(Verdict.EDIT, {"path": "b.md", "content": "edited"})
REJECT = Choice(Verdict.REJECT)


def fresh(call: ToolCall) -> ToolCall:
    return ToolCall.objects.select_related("turn").get(pk=call.pk)


def make_released(session_id: str = "s") -> ToolCall:
    return make_calls(make_session(session_id), wanted("read_file"))[0]


def let_time_run_out(*calls: ToolCall) -> None:
    ToolCall.objects.filter(pk__in=[call.pk for call in calls]).update(deadline_at=Now())


def state_of(call: ToolCall) -> tuple[str, str, str]:
    call = fresh(call)
    return call.status, call.outcome, call.turn.status


def said(session_id: str = "s") -> list[dict[str, Any]]:
    """The chunks on the session's stream so far, and whether each ends an answer."""
    frames, _ = log.page(session_id, 0)
    return [{**json.loads(frame.body.split("data:", 1)[1]), "closes": frame.closes} for frame in frames]


def errors(session_id: str = "s") -> list[dict[str, Any]]:
    return [chunk for chunk in said(session_id) if chunk["type"] == "error"]


def results(session_id: str = "s") -> list[dict[str, Any]]:
    messages = history(CALLER, session_id)["messages"]
    return [json.loads(message["content"]) for message in messages if message["role"] == "tool"]


def failures() -> list[dict[str, Any]]:
    found = Event.objects.filter(event_type="tool.execution.failed").order_by("id")
    return list(found.values_list("data", flat=True))


def everything(*but: type) -> dict[str, list[dict[str, Any]]]:
    ours = [model for app in apps.get_app_configs() if app.name.endswith("s_app") for model in app.get_models()]
    return {model.__name__: list(model._default_manager.order_by("pk").values()) for model in ours if model not in but}


# --- When it begins ------------------------------------------------------------------------------------------------


def test_the_tools_of_clients_have_ten_minutes_and_the_servers_own_none() -> None:
    deadlines = dict(Tool.objects.values_list("name", "deadline_seconds"))

    assert deadlines.pop("switch_mode") is None
    assert len(deadlines) == 6
    assert set(deadlines.values()) == {600}


def test_a_call_that_is_released_at_once_has_its_deadline_from_then_on() -> None:
    call = fresh(make_released())

    assert call.deadline_at is not None and call.released_at is not None
    assert call.deadline_at - call.released_at == TEN_MINUTES


@pytest.mark.parametrize("choice", [APPROVE, EDIT], ids=["approve", "edit"])
def test_no_time_runs_while_a_call_waits_for_a_person(choice: Choice) -> None:
    call = make_waiting_call(make_session())
    asked_long_ago = Now() - timedelta(days=30)
    ToolCall.objects.filter(pk=call.pk).update(created_at=asked_long_ago)
    assert fresh(call).deadline_at is None
    assert unanswered.end_overdue() == 0

    approvals.decide_by_id(OPERATOR, call.pk, choice)

    call = fresh(call)
    assert call.deadline_at is not None and call.released_at is not None
    assert call.deadline_at - call.released_at == TEN_MINUTES
    assert unanswered.end_overdue() == 0


def test_a_tool_without_a_deadline_is_waited_for_as_long_as_it_takes() -> None:
    Tool.objects.filter(pk="read_file").update(deadline_seconds=None)
    call = make_released()
    ToolCall.objects.filter(pk=call.pk).update(released_at=Now() - timedelta(days=30))

    assert unanswered.end_overdue() == 0

    assert fresh(call).deadline_at is None
    assert state_of(call) == ("released", "", "waiting")


def test_a_deadline_that_is_changed_counts_from_the_next_turn() -> None:
    session = make_session()
    stream = run(make_turn(session))
    Tool.objects.update(deadline_seconds=7)
    act(stream, wanted("read_file"))
    (before,) = ToolCall.objects.all()
    acceptance.tool_result(ToolResult("s", before.pk, "text"), CALLER)
    complete(run(before.turn))

    (after,) = make_calls(Session.objects.get(pk="s"), wanted("read_file"))

    assert (before.deadline_seconds, after.deadline_seconds) == (600, 7)


def test_a_deadline_that_is_changed_leaves_what_waits_for_a_person_as_it_is() -> None:
    call = make_waiting_call(make_session())
    Tool.objects.update(deadline_seconds=7)

    approvals.decide_by_id(OPERATOR, call.pk, APPROVE)

    call = fresh(call)
    assert (call.status, call.deadline_seconds, call.tool_version) == ("released", 600, 1)


def test_a_turn_whose_team_was_stored_before_there_were_deadlines_has_none() -> None:
    stream = run(make_turn(make_session()))
    version = TeamVersion.objects.get(pk=stream.claim.team_version)
    content = json.loads(version.content)
    for tool in content["tools"]:
        del tool["deadline_seconds"]
    TeamVersion.objects.filter(pk=version.pk).update(content=json.dumps(content))
    team._version.cache_clear()

    act(stream, wanted("read_file"))

    (call,) = ToolCall.objects.all()
    team._version.cache_clear()
    assert (call.status, call.deadline_seconds, call.deadline_at) == ("released", None, None)
    assert Team.of(version.content).tools["read_file"].deadline_seconds == 600


# --- How it ends ---------------------------------------------------------------------------------------------------


def test_a_call_without_a_result_in_its_time_is_ended_and_the_turn_goes_on() -> None:
    call, other = make_released(), make_released("other")
    messages = Session.objects.get(pk="s").message_count
    let_time_run_out(call)

    assert unanswered.end_overdue() == 1

    assert state_of(call) == ("answered", "timed_out", "queued")
    assert state_of(other) == ("released", "", "waiting"), "its time is not over"
    message = "No result of read_file came within 600 s. Whether the call was executed is not known."
    assert results() == [{"status": "timed_out", "tool_name": "read_file", "message": message}]
    assert failures() == [
        {"tool_name": "read_file", "call_id": call.pk, "error_message": message, "error_type": "tool_timed_out"}
    ]
    metadata = {"code": "tool_timed_out", "call_id": call.pk}
    shown = {"type": "error", "content": message, "error": message, "is_final": True, "metadata": metadata}
    assert errors() == [{**shown, "closes": False}]
    assert Session.objects.get(pk="s").message_count == messages + 1
    assert fresh(call).deadline_at is None
    assert [each.session_id for each, *_ in claims.claim_turns("runner", 10)] == ["s"], "the model is asked now"


def test_the_end_of_a_call_is_all_or_nothing() -> None:
    call = make_released()
    let_time_run_out(call)
    Turn.objects.update(status=Turn.Status.COMPLETED)  # which does not wait, so that the last step fails
    before = everything()

    assert unanswered.end_overdue() == 0

    assert everything() == before


def test_calls_that_cannot_be_ended_keep_no_others_waiting(caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = make_released("broken"), make_released("sound")
    Turn.objects.filter(pk=broken.turn_id).update(status=Turn.Status.COMPLETED)
    let_time_run_out(broken, sound)

    assert unanswered.end_overdue() == 1

    assert state_of(sound) == ("answered", "timed_out", "queued")
    assert "overdue_calls_not_ended" in caplog.text


def test_calls_of_one_answer_end_each_at_its_own_time_and_the_last_lets_the_turn_go_on() -> None:
    session = make_session()
    early, late, waiting = make_calls(session, wanted("read_file"), wanted("list_files"), wanted("write_file"))
    let_time_run_out(early)
    unanswered.end_overdue()
    assert (state_of(early), state_of(late)) == (("answered", "timed_out", "waiting"), ("released", "", "waiting"))

    let_time_run_out(late)
    unanswered.end_overdue()
    assert state_of(late) == ("answered", "timed_out", "waiting")
    assert state_of(waiting) == ("waiting", "", "waiting"), "a person still has to decide"

    approvals.decide_by_id(OPERATOR, waiting.pk, REJECT)
    assert state_of(waiting) == ("answered", "rejected", "queued")


def test_a_call_that_was_approved_times_out_beside_one_that_still_waits() -> None:
    approved, waiting = make_calls(make_session(), wanted("write_file"), wanted("execute_command"))
    approvals.decide_by_id(OPERATOR, approved.pk, EDIT)
    let_time_run_out(approved)

    unanswered.end_overdue()

    assert state_of(approved) == ("answered", "timed_out", "waiting")
    assert ApprovalRequest.objects.get(call=approved).status == "edited", "what was decided stays"
    assert ApprovalRequest.objects.get(call=waiting).status == "pending"
    acceptance.tool_result(ToolResult("s", waiting.pk, "done"), CALLER)
    assert state_of(waiting) == ("answered", "ok", "queued")


def test_several_calls_that_end_together_queue_the_turn_once() -> None:
    calls = make_calls(make_session(), *[wanted("read_file")] * 3)
    let_time_run_out(*calls)

    assert unanswered.end_overdue() == 1

    assert [state_of(call) for call in calls] == [("answered", "timed_out", "queued")] * 3
    assert [error["metadata"]["call_id"] for error in errors()] == [call.pk for call in calls]
    assert unanswered.end_overdue() == 0


def test_more_sessions_than_one_look_takes_are_ended_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unanswered, "SESSIONS_AT_ONCE", 2)
    let_time_run_out(*[make_released(f"s{number}") for number in range(3)])

    assert [unanswered.end_overdue() for _ in range(3)] == [2, 1, 0]


def test_a_result_in_time_counts_and_nothing_is_ended_after_it() -> None:
    call = make_released()
    acceptance.tool_result(ToolResult("s", call.pk, "text"), CALLER)

    assert unanswered.end_overdue() == 0

    assert (fresh(call).outcome, fresh(call).answer, fresh(call).deadline_at) == ("ok", "text", None)


def test_a_result_after_the_deadline_counts_as_long_as_nobody_has_ended_the_call() -> None:
    call = make_released()
    let_time_run_out(call)
    acceptance.tool_result(ToolResult("s", call.pk, "text"), CALLER)

    assert unanswered.end_overdue() == 0

    assert state_of(call) == ("answered", "ok", "queued")


@pytest.mark.parametrize("ways", ["cancelled", "superseded"])
def test_a_call_that_was_closed_is_not_ended_again(ways: str) -> None:
    call = make_released()
    let_time_run_out(call)
    if ways == "cancelled":
        ending.cancel(CALLER, "s")
    else:
        make_turn(Session.objects.get(pk="s"), "Something else")

    assert unanswered.end_overdue() == 0

    assert fresh(call).outcome == ways


def test_looking_for_overdue_calls_is_one_query_over_an_index_of_those_that_have_a_deadline() -> None:
    make_released()
    with CaptureQueriesContext(connection) as queries:
        assert unanswered.end_overdue() == 0
    assert len(queries) == 1

    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SET LOCAL enable_seqscan = off")  # of so few rows it would read all
    assert "call_by_deadline" in ToolCall.objects.overdue().order_by().explain()


# --- What comes late -----------------------------------------------------------------------------------------------


def late_results() -> list[AuditEntry]:
    return list(AuditEntry.objects.filter(action="call.late_result").order_by("id"))


def test_a_late_result_is_written_down_and_changes_nothing() -> None:
    call = make_released()
    let_time_run_out(call)
    unanswered.end_overdue()
    before = everything(AuditEntry)

    accepted = acceptance.tool_result(ToolResult("s", call.pk, "the sécret text"), CALLER)

    assert not accepted.has_frames, "event: done alone"
    assert everything(AuditEntry) == before
    (entry,) = late_results()
    text = "the sécret text".encode()
    assert (entry.actor, entry.session_id, entry.target, entry.tool_name) == ("tests", "s", call.pk, "read_file")
    assert entry.details == {
        "answered_with": "timed_out",
        "size": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    assert "sécret" not in json.dumps(AuditEntry.objects.values_list("details", "reason").last(), ensure_ascii=False)


def test_a_repeated_result_is_written_down_and_changes_nothing() -> None:
    call = make_released()
    acceptance.tool_result(ToolResult("s", call.pk, "text"), CALLER)
    before = everything(AuditEntry)

    acceptance.tool_result(ToolResult("s", call.pk, None, "and now an error"), CALLER)

    assert everything(AuditEntry) == before
    (entry,) = late_results()
    assert entry.details["answered_with"] == "ok"
    assert entry.details["sha256"] == hashlib.sha256(b"Error: and now an error").hexdigest()


def test_a_client_that_repeats_itself_for_ever_does_not_fill_the_audit_log() -> None:
    call, other = make_calls(make_session(), *[wanted("read_file")] * 2)
    for each in (call, other):
        acceptance.tool_result(ToolResult("s", each.pk, "text"), CALLER)

    for _ in range(LATE_RESULTS_KEPT + 5):
        assert not acceptance.tool_result(ToolResult("s", call.pk, "again"), CALLER).has_frames
    acceptance.tool_result(ToolResult("s", other.pk, "again"), CALLER)

    assert [entry.target for entry in late_results()] == [call.pk] * LATE_RESULTS_KEPT + [other.pk]


def test_a_result_for_a_call_of_others_is_refused_and_leaves_no_trace() -> None:
    call = make_released("theirs")
    make_session("mine")
    stranger = Caller(Account.objects.create(name="another").pk, "stranger")
    before = everything()

    with pytest.raises(Refused) as refused:
        acceptance.tool_result(ToolResult("mine", call.pk, "text"), CALLER)
    with pytest.raises(UnknownSession):
        acceptance.tool_result(ToolResult("theirs", call.pk, "text"), stranger)

    assert refused.value.chunk.code == "unknown_call"
    assert everything() == before


# --- What nobody will ever answer ------------------------------------------------------------------------------------


def test_a_call_that_is_given_up_is_in_doubt_and_the_turn_goes_on() -> None:
    call = make_released()

    unanswered.give_up(OPERATOR, call, "The laptop is gone.\nReally.")

    assert state_of(call) == ("answered", "in_doubt", "queued")
    message = "No result of read_file came, and an operator ended the wait. Whether the call was executed is not known."
    assert results() == [
        {
            "status": "in_doubt",
            "tool_name": "read_file",
            "message": message,
            "reason": "The laptop is gone.\nReally.",
        }
    ]
    assert [(error["metadata"], error["closes"]) for error in errors()] == [
        ({"code": "tool_given_up", "call_id": call.pk}, False)
    ]
    assert [failure["error_type"] for failure in failures()] == ["tool_given_up"]
    entry = AuditEntry.objects.get()
    assert (entry.action, entry.actor, entry.channel, entry.target) == ("call.given_up", "olga", "admin", call.pk)
    assert (entry.reason, entry.tool_name) == ("The laptop is gone.\nReally.", "read_file")
    assert [each.session_id for each, *_ in claims.claim_turns("runner", 10)] == ["s"]


def test_a_call_without_a_deadline_can_be_given_up() -> None:
    Tool.objects.update(deadline_seconds=None)
    call = make_released()

    unanswered.give_up(OPERATOR, call, "Gone.")

    assert state_of(call) == ("answered", "in_doubt", "queued")


def test_a_result_that_comes_after_a_call_was_given_up_counts_for_nothing() -> None:
    call = make_released()
    unanswered.give_up(OPERATOR, call, "Gone.")
    before = everything(AuditEntry)

    acceptance.tool_result(ToolResult("s", call.pk, "here it is"), CALLER)

    assert everything(AuditEntry) == before
    assert [entry.details["answered_with"] for entry in late_results()] == ["in_doubt"]


def test_only_released_calls_can_be_given_up() -> None:
    waiting = make_waiting_call(make_session("waiting"))
    answered, timed_out = make_released("answered"), make_released("late")
    acceptance.tool_result(ToolResult("answered", answered.pk, "text"), CALLER)
    let_time_run_out(timed_out)
    unanswered.end_overdue()
    before = everything()

    for call, why in ((waiting, "decision"), (answered, "answer"), (timed_out, "answer")):
        with pytest.raises(CallMoved, match=why):
            unanswered.give_up(OPERATOR, call, "Gone.")

    assert everything() == before


def test_giving_up_beside_a_call_that_waits_leaves_the_turn_waiting() -> None:
    released, waiting = make_calls(make_session(), wanted("read_file"), wanted("write_file"))

    unanswered.give_up(OPERATOR, released, "Gone.")

    assert state_of(released) == ("answered", "in_doubt", "waiting")
    assert state_of(waiting) == ("waiting", "", "waiting")


def test_giving_up_that_cannot_be_written_down_is_not_done() -> None:
    call = make_released()
    before = everything()
    block_audit_entries()

    with pytest.raises(AuditUnavailable):
        unanswered.give_up(OPERATOR, call, "Gone.")

    let_audit_entries()
    assert everything() == before


# --- What clients are told -------------------------------------------------------------------------------------------


def test_open_calls_say_until_when_a_result_is_waited_for() -> None:
    released, waiting = make_calls(make_session(), wanted("read_file"), wanted("write_file"))
    now = fresh(released)

    assert now.deadline_at is not None
    assert (opened(now)["state"], opened(now)["deadline_at"]) == ("released", wire_time(now.deadline_at))
    assert (opened(fresh(waiting))["state"], opened(fresh(waiting))["deadline_at"]) == ("waiting", None)

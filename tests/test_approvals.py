"""What waits for a person: bound to what was shown, decided once, written down with what it does, never left behind."""

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from django.apps import apps
from django.db import IntegrityError, transaction
from django.db.models.functions import Now
from rest_framework.test import APIRequestFactory, force_authenticate
from rest_framework.views import APIView

from agents_app import approvals, handoffs
from agents_app.approval_views import (
    ApprovalsView,
    ApprovalView,
    DecisionView,
    OpenCallsView,
    PendingApprovalsView,
    detailed,
)
from agents_app.approvals import (
    AlreadyDecided,
    ArgumentsChanged,
    ArgumentsTampered,
    Choice,
    EditRefused,
    PolicyChanged,
    Result,
    SelfApprovalForbidden,
    UnknownApproval,
    Verdict,
)
from agents_app.binding import args_hash, canonical
from agents_app.models import Agent, ApprovalRequest, ApprovalRule, Decision, Tool
from events_app import figures, log
from events_app.feed import feed
from events_app.log import AuditUnavailable
from events_app.models import AuditEntry, Event, StreamBatch
from messages_app import acceptance, claims, ending
from messages_app.acceptance import Refused
from messages_app.history import history
from messages_app.inbound import HitlDecision, SwitchAgent, ToolResult, UserMessage
from messages_app.steps import PENDING_PER_SESSION, Spent, TooManyRounds, look
from orchestrator_site.errors import APIError, Conflict
from sessions_app.callers import Caller
from sessions_app.models import (
    Account,
    CallMoved,
    CancelRequested,
    LostClaim,
    Session,
    ToolCall,
    Turn,
    TurnMoved,
)
from tests.factories import (
    CALLER,
    FITTING,
    OPERATOR,
    act,
    block_audit_entries,
    claim,
    complete,
    fail,
    let_audit_entries,
    let_lease_run_out,
    make_calls,
    make_session,
    make_turn,
    make_waiting_call,
    run,
    wanted,
)

pytestmark = pytest.mark.django_db

APPROVE = Choice(Verdict.APPROVE)
REJECT = Choice(Verdict.REJECT)
OTHER_ARGUMENTS = {"path": "b.md", "content": "edited"}
EDIT = Choice(Verdict.EDIT, OTHER_ARGUMENTS)
EVERY_CHOICE = [APPROVE, EDIT, REJECT]
VERDICTS = [choice.verdict.value for choice in EVERY_CHOICE]
each_choice = pytest.mark.parametrize("choice", EVERY_CHOICE, ids=VERDICTS)


def decide(call: ToolCall, choice: Choice, by: Caller = CALLER) -> None:
    approvals.decide_by_id(by, call.pk, choice)


def fresh_call(call: ToolCall) -> ToolCall:
    return ToolCall.objects.get(pk=call.pk)


def fresh(call: ToolCall) -> ToolCall:
    """With everything around it."""
    return ToolCall.objects.select_related("turn", "approval", "approval__decision").get(pk=call.pk)


def status_of(call: ToolCall) -> tuple[str, str, str]:
    """Where the request, its call and their turn are."""
    call = fresh(call)
    return call.approval.status, call.status, call.turn.status


def said(session_id: str = "s") -> list[dict[str, Any]]:
    """The chunks on the session's stream so far."""
    frames, _ = log.page(session_id, 0)
    return [{**json.loads(frame.body.split("data:", 1)[1]), "closes": frame.closes} for frame in frames]


def get(view: type[APIView], **path: str) -> dict[str, Any]:
    request = APIRequestFactory().get("/")
    force_authenticate(request, user=CALLER)  # type: ignore[arg-type]
    return dict(view.as_view()(request, **path).data)


def tool_messages(session_id: str = "s") -> list[dict[str, Any]]:
    return [message for message in history(CALLER, session_id)["messages"] if message["role"] == "tool"]


def facts(*event_types: str) -> list[dict[str, Any]]:
    return list(Event.objects.filter(event_type__in=event_types).order_by("id").values_list("data", flat=True))


def everything(*but: type) -> dict[str, list[dict[str, Any]]]:
    """Every row of ours, so that a test can say that nothing has changed."""
    ours = [model for app in apps.get_app_configs() if app.name.endswith("s_app") for model in app.get_models()]
    return {model.__name__: list(model._default_manager.order_by("pk").values()) for model in ours if model not in but}


# --- what becomes of a call ---


def test_a_call_under_an_ask_rule_waits_and_is_shown_with_what_it_is_bound_to() -> None:
    call = make_waiting_call(make_session(), "write_file", {"path": "a.md", "content": "hé"})

    text = '{"content":"hé","path":"a.md"}'
    assert status_of(call) == ("pending", "waiting", "waiting")
    assert call.approval.arguments_text == call.arguments_text == text
    assert call.approval.args_hash == call.args_hash == args_hash("s", call.pk, "write_file", 1, text)
    assert call.approval.reason == "File modification requires user approval"
    assert (call.requires_approval, call.released_at, call.answered_at) == (True, None, None)
    assert tool_messages() == []


def test_an_approval_releases_the_call_and_the_turn_still_waits() -> None:
    call = make_waiting_call(make_session())
    messages = Session.objects.get(pk="s").message_count

    decide(call, APPROVE)

    call = fresh(call)
    assert status_of(call) == ("approved", "released", "waiting")
    assert call.final_arguments == call.arguments == FITTING["write_file"]
    assert (call.released_text, call.args_hash) == ("", call.approval.args_hash)
    assert call.released_at is not None
    assert tool_messages() == [], "somebody still has to execute it"
    assert Session.objects.get(pk="s").message_count == messages


def test_an_edit_releases_the_edited_arguments_with_a_hash_of_their_own_and_keeps_both() -> None:
    call = make_waiting_call(make_session())

    decide(call, EDIT)

    call = fresh(call)
    made = call.approval.decision
    assert status_of(call) == ("edited", "released", "waiting")
    assert (call.arguments, call.final_arguments) == (FITTING["write_file"], OTHER_ARGUMENTS)
    assert (call.approval.arguments, made.edited_arguments) == (FITTING["write_file"], OTHER_ARGUMENTS)
    assert made.args_hash == call.args_hash == args_hash("s", call.pk, "write_file", 1, canonical(OTHER_ARGUMENTS))
    assert call.approval.args_hash != made.args_hash
    (asked,) = history(CALLER, "s")["messages"][-1]["tool_calls"]
    assert json.loads(asked["function"]["arguments"]) == FITTING["write_file"], "history has it as the model made it"


@pytest.mark.parametrize(
    ("feedback", "told"),
    [
        (None, "User rejected this operation"),
        ("", "User rejected this operation"),
        ("use “b.md”\n", "use “b.md”\n"),
    ],
)
def test_a_rejection_answers_the_call_and_queues_the_turn(feedback: str | None, told: str) -> None:
    call = make_waiting_call(make_session())

    decide(call, Choice(Verdict.REJECT, feedback=feedback))

    assert status_of(call) == ("rejected", "answered", "queued")
    assert fresh(call).outcome == "rejected"
    (message,) = tool_messages()
    assert (message["tool_call_id"], message["name"]) == (call.pk, "write_file")
    assert json.loads(message["content"]) == {"status": "rejected", "tool_name": "write_file", "feedback": told}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_only_the_answer_that_leaves_no_call_open_queues_the_turn(order: tuple[int, int]) -> None:
    calls = make_calls(make_session(), wanted(), wanted("execute_command"))

    decide(calls[order[0]], REJECT)
    assert status_of(calls[order[0]]) == ("rejected", "answered", "waiting")
    assert status_of(calls[order[1]]) == ("pending", "waiting", "waiting")
    decide(calls[order[1]], REJECT)

    assert status_of(calls[0]) == status_of(calls[1]) == ("rejected", "answered", "queued")


def test_a_released_call_keeps_the_turn_waiting_until_its_result() -> None:
    approved, rejected = make_calls(make_session(), wanted(), wanted("execute_command"))

    decide(approved, APPROVE)
    decide(rejected, REJECT)
    assert fresh(approved).turn.status == "waiting"
    acceptance.tool_result(ToolResult("s", approved.pk, {"success": True}), CALLER)

    assert fresh(approved).turn.status == "queued"


def test_a_call_that_needs_no_person_is_released_at_once() -> None:
    (call,) = make_calls(make_session(), wanted("read_file"))

    assert (call.status, call.requires_approval, call.turn.status) == ("released", False, "waiting")
    assert call.released_at is not None
    assert call.args_hash == args_hash("s", call.pk, "read_file", 1, '{"path":"a.md"}')
    assert not ApprovalRequest.objects.exists()
    assert said()[-1] == {
        "type": "tool_call",
        "call_id": call.pk,
        "tool_name": "read_file",
        "arguments": {"path": "a.md"},
        "requires_approval": False,
        "is_final": True,
        "metadata": {"args_hash": call.args_hash},
        "closes": True,
    }


def test_every_call_of_an_answer_is_held_released_executed_or_refused_on_its_own() -> None:
    session = make_session(agent="architect")

    calls = make_calls(
        session,
        wanted("write_file"),
        wanted("read_file"),
        wanted("switch_mode", {"mode": "ask"}),
        wanted("execute_command"),
        wanted("read_file", '{"path": '),
        wanted("nonsense", "{}"),
        text="Let me see.",
    )

    assert [(call.position, call.round, call.status, call.outcome) for call in calls] == [
        (0, 1, "waiting", ""),
        (1, 1, "released", ""),
        (2, 1, "answered", "ok"),
        (3, 1, "answered", "refused"),
        (4, 1, "answered", "refused"),
        (5, 1, "answered", "refused"),
    ]
    assert [call.agent for call in calls] == ["architect"] * 6
    assert calls[4].unusable_arguments == '{"path": '
    assert calls[4].arguments == {}
    assert [chunk["type"] for chunk in said()] == [
        "turn_started",
        "assistant_message",
        "tool_call",
        "tool_call",
        "agent_switched",
        "error",
    ], "a slip of the model is told to the model alone"
    assert [chunk["closes"] for chunk in said()] == [False] * 5 + [True]
    assert said()[1]["is_final"] is False
    error = said()[-1]
    assert error["metadata"] == {"code": "tool_not_allowed", "call_id": calls[3].pk}
    assert calls[3].turn.status == "waiting"
    assert all(call.answer.startswith("Error: ") for call in calls[3:])


def test_with_no_call_open_the_model_is_asked_again_and_the_turn_runs_on() -> None:
    turn = make_turn(make_session())
    running = run(turn)

    assert act(running, wanted("nonsense", "{}")) is None

    turn.refresh_from_db()
    assert (turn.status, turn.round_count) == ("running", 1)
    act(running, wanted("nonsense", "{}"), wanted("read_file"))
    assert list(turn.calls.in_order().values_list("round", "position")) == [(1, 0), (2, 0), (2, 1)]


def test_a_flood_of_calls_does_not_all_wait_for_a_person() -> None:
    calls = make_calls(make_session(), *[wanted()] * PENDING_PER_SESSION, wanted("read_file"), wanted())

    assert [call.status for call in calls] == ["waiting"] * PENDING_PER_SESSION + ["released", "answered"]
    assert calls[-1].outcome == "refused"
    assert "Too many calls wait" in calls[-1].answer
    assert ApprovalRequest.objects.pending().count() == PENDING_PER_SESSION == 20


# --- written down, once, with what it does ---


@each_choice
def test_a_decision_is_one_row_one_entry_one_event_and_one_frame(choice: Choice) -> None:
    call = make_waiting_call(make_session())
    before, frames = call.approval.args_hash, len(said())
    edited = choice.arguments
    by = replace(OPERATOR, request_id="r-1", address="192.0.2.7")

    decide(call, replace(choice, feedback="because", args_hash=before), by)

    made = Decision.objects.get()
    after = made.args_hash
    assert (after != before) is (choice.verdict == Verdict.EDIT)
    assert (made.verdict, made.decided_by, made.channel, made.feedback) == (choice.verdict, "olga", "admin", "because")
    entry = AuditEntry.objects.get()
    assert (entry.action, entry.outcome, entry.actor) == (f"approval.{choice.verdict}", "done", "olga")
    assert (entry.channel, entry.address, entry.request_id) == ("admin", "192.0.2.7", "r-1")
    assert (entry.account_id, entry.session_id, entry.target, entry.reason) == (1, "s", call.pk, "because")
    assert entry.tool_name == "write_file"
    assert entry.details == {
        "args_hash_before": before,
        "args_hash_after": after,
        "modified_arguments": edited,
        "implicit": False,
    }
    assert facts("hitl.decision.made") == [
        {
            "call_id": call.pk,
            "decision": choice.verdict,
            "tool_name": "write_file",
            "original_args": FITTING["write_file"],
            "modified_args": edited,
            "decided_by": "olga",
            "feedback": "because",
            "implicit": False,
        }
    ]
    (frame,) = said()[frames:]
    assert frame == {
        "type": "approval_resolved",
        "call_id": call.pk,
        "metadata": {
            "decision": choice.verdict,
            "arguments": edited or FITTING["write_file"],
            "args_hash": after,
            "feedback": "because",
            "decided_by": "olga",
            "decided_at": made.decided_at.isoformat(),
        },
        # The answer to a rejection goes on with the turn; the other two end here, as nobody has executed anything yet.
        "closes": choice.verdict != Verdict.REJECT,
    }


@pytest.mark.parametrize("verdict", [Verdict.APPROVE, Verdict.EDIT, Verdict.REJECT])
def test_the_answer_to_a_decision_has_the_hash_that_a_result_echoes(verdict: Verdict) -> None:
    call = make_waiting_call(make_session())
    edited = {"path": "other.md", "content": ""} if verdict == Verdict.EDIT else None

    approval = approvals.decide_by_id(CALLER, call.pk, Choice(verdict, edited))

    told = detailed(approval)
    released = ToolCall.objects.get(pk=call.pk)
    assert told["args_hash"] == call.args_hash
    assert told["released_args_hash"] == (None if verdict == Verdict.REJECT else released.args_hash)


def test_a_frame_of_a_decision_belongs_to_the_answer_of_its_turn() -> None:
    call = make_waiting_call(make_session())

    decide(call, APPROVE)

    frame = log.page("s", 0)[0][-1]
    assert frame.origin == str(call.turn_id)
    assert frame.wire.startswith(f"id: {frame.seq}\ndata:{{".encode()), "in the form that the old gateway skips"


@each_choice
def test_without_feedback_nobody_is_told_any(choice: Choice) -> None:
    call = make_waiting_call(make_session())

    decide(call, choice)

    assert said()[-1]["metadata"]["feedback"] is None
    assert facts("hitl.decision.made")[0]["feedback"] is None
    assert AuditEntry.objects.get().reason == ""


# Every way in which a request ends.
WAYS: dict[str, Callable[[ToolCall], Any]] = {
    "approve": lambda call: decide(call, APPROVE),
    "edit": lambda call: decide(call, EDIT),
    "reject": lambda call: decide(call, REJECT),
    "decision in the stream": lambda call: acceptance.hitl_decision(HitlDecision("s", call.pk, "approve"), CALLER),
    "result": lambda call: acceptance.tool_result(ToolResult("s", call.pk, "done"), CALLER),
    "error": lambda call: acceptance.tool_result(ToolResult("s", call.pk, error="User rejected: no"), CALLER),
    "cancel": lambda call: ending.cancel(CALLER, "s"),
    "new message": lambda call: acceptance.user_message(UserMessage("s", "never mind"), CALLER),
    "delete": lambda call: ending.delete(CALLER, "s"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_audited_does_not_happen(way: str) -> None:
    call = make_waiting_call(make_session())
    before = everything()
    block_audit_entries()

    with pytest.raises(AuditUnavailable):
        WAYS[way](call)

    assert everything() == before
    let_audit_entries()
    WAYS[way](call)
    assert Decision.objects.count() == AuditEntry.objects.filter(action__startswith="approval.").count() == 1


def test_a_refusal_that_cannot_be_audited_changes_nothing_either() -> None:
    call = make_waiting_call(make_session(), self_approval=False)
    before = everything()
    block_audit_entries()

    with pytest.raises(AuditUnavailable):
        decide(call, APPROVE)

    assert everything() == before


def test_a_decision_that_cannot_be_audited_is_answered_with_503_and_nothing_of_the_cause() -> None:
    call = make_waiting_call(make_session())
    block_audit_entries()

    with pytest.raises(AuditUnavailable) as failed:
        decide(call, APPROVE)

    assert (failed.value.status, failed.value.code) == (503, "audit_unavailable")
    assert "not now" not in str(failed.value.detail)


@each_choice
def test_the_answer_to_a_decision_in_the_stream_begins_with_its_frame(choice: Choice) -> None:
    call = make_waiting_call(make_session())
    message = HitlDecision("s", call.pk, choice.verdict, choice.arguments, "because", call.args_hash)

    accepted = acceptance.hitl_decision(message, CALLER)

    assert (accepted.session_id, accepted.origin, accepted.has_frames) == ("s", str(call.turn_id), True)
    (frame,) = log.page("s", accepted.after)[0]
    assert json.loads(frame.body[5:])["metadata"]["decision"] == choice.verdict
    assert Decision.objects.get().feedback == "because"
    assert fresh(call).final_arguments == (choice.arguments or call.arguments)


@pytest.mark.parametrize(
    ("way", "wakes"),
    [
        ("approve", False),
        ("edit", False),
        ("decision in the stream", False),
        ("reject", True),
        ("result", True),
        ("error", True),
        ("cancel", True),
        ("new message", True),
        ("delete", True),
    ],
)
def test_a_runner_is_woken_after_the_commit_when_a_turn_may_be_ready(
    way: str, wakes: bool, django_capture_on_commit_callbacks: Any
) -> None:
    call = make_waiting_call(make_session())

    with django_capture_on_commit_callbacks() as callbacks:
        WAYS[way](call)

    assert (feed.wake_runner in callbacks) is wakes
    assert len(callbacks) > wakes, "followers are told in any case"


def test_the_result_of_a_released_call_wakes_a_runner(django_capture_on_commit_callbacks: Any) -> None:
    (call,) = make_calls(make_session(), wanted("read_file"))

    with django_capture_on_commit_callbacks() as callbacks:
        acceptance.tool_result(ToolResult("s", call.pk, "done"), CALLER)

    assert feed.wake_runner in callbacks


# --- once and for all ---


@pytest.mark.parametrize("second", EVERY_CHOICE, ids=VERDICTS)
@pytest.mark.parametrize("first", EVERY_CHOICE, ids=VERDICTS)
def test_the_second_decider_learns_who_decided_what_and_when(first: Choice, second: Choice) -> None:
    call = make_waiting_call(make_session())
    decide(call, first, replace(OPERATOR, name="bob"))
    before = everything()

    with pytest.raises(AlreadyDecided) as late:
        decide(call, second, replace(OPERATOR, name="carol"))

    made = Decision.objects.get()
    assert (late.value.status, late.value.code) == (409, "already_decided")
    assert late.value.more == {
        "decision": first.verdict,
        "decided_by": "bob",
        "decided_at": made.decided_at.isoformat(),
    }
    assert "bob" in str(late.value.detail)
    assert everything() == before, "losing a race is not even an entry"


@pytest.mark.parametrize("second", EVERY_CHOICE, ids=VERDICTS)
@pytest.mark.parametrize("first", EVERY_CHOICE, ids=VERDICTS)
def test_only_the_first_decision_counts_whatever_the_second_saw(first: Choice, second: Choice) -> None:
    call = make_waiting_call(make_session())
    session = Session.objects.get(pk="s")
    seen_by_carol = approvals.of_call(session, call.pk)
    approvals.decide(session, approvals.of_call(session, call.pk), first, replace(OPERATOR, name="bob"))
    before = everything()

    with pytest.raises(AlreadyDecided), transaction.atomic():
        approvals.decide(session, seen_by_carol, second, replace(OPERATOR, name="carol"))

    assert everything() == before
    assert AuditEntry.objects.get().actor == "bob"


@pytest.mark.parametrize("late", [replace(APPROVE, args_hash="0" * 64), Choice(Verdict.EDIT, {}), APPROVE])
def test_who_comes_too_late_is_told_so_whatever_else_is_wrong(late: Choice) -> None:
    call = make_waiting_call(make_session(), self_approval=False)
    decide(call, REJECT, OPERATOR)
    before = everything()

    with pytest.raises(AlreadyDecided):
        decide(call, late)
    session = Session.objects.get(pk="s")
    with pytest.raises(AlreadyDecided):
        approvals.decide(session, approvals.of_call(session, call.pk), late, CALLER)

    assert everything() == before


def test_decide_says_whether_the_turn_goes_on_by_it() -> None:
    first, second, third = make_calls(make_session(), wanted(), wanted(), wanted())

    def goes_on_by(call: ToolCall, choice: Choice, result: Result | None = None) -> bool:
        session = Session.objects.locked().get(pk="s")
        return approvals.decide(session, approvals.of_call(session, call.pk), choice, CALLER, result=result)

    assert goes_on_by(first, REJECT) is False
    assert goes_on_by(second, APPROVE, Result("done", ToolCall.Outcome.OK)) is False
    assert goes_on_by(third, APPROVE, Result("done", ToolCall.Outcome.OK)) is True
    assert status_of_turn(first) == "queued"


@each_choice
def test_a_decision_on_other_arguments_than_those_that_wait_is_refused_and_audited(choice: Choice) -> None:
    call = make_waiting_call(make_session())
    before = everything(AuditEntry)

    with pytest.raises(ArgumentsChanged) as refused:
        decide(call, replace(choice, args_hash="0" * 64))

    assert (refused.value.status, refused.value.code) == (409, "arguments_changed")
    assert everything(AuditEntry) == before
    entry = AuditEntry.objects.get()
    assert (entry.outcome, entry.actor, entry.target) == ("refused", "tests", call.pk)
    assert entry.details == {"code": "arguments_changed"}
    decide(call, replace(choice, args_hash=call.args_hash))


def test_an_empty_hash_is_not_the_hash_that_waits() -> None:
    call = make_waiting_call(make_session())

    with pytest.raises(ArgumentsChanged):
        decide(call, replace(APPROVE, args_hash=""))


TAMPERINGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "the call's arguments": (ToolCall, {"arguments_text": '{"content":"rm","path":"a.md"}'}),
    "the call's arguments, to no JSON": (ToolCall, {"arguments_text": '{"content":'}),
    "the call's arguments, to no object": (ToolCall, {"arguments_text": "null"}),
    "the call's tool": (ToolCall, {"tool_name": "execute_command"}),
    "the call's tool version": (ToolCall, {"tool_version": 2}),
    "the arguments that are shown": (ApprovalRequest, {"arguments_text": '{"content":"","path":"a.md"}'}),
    "the arguments that are shown, to no JSON": (ApprovalRequest, {"arguments_text": '{"content":'}),
    "the arguments that are shown, to no object": (ApprovalRequest, {"arguments_text": "[1]"}),
    "the tool that is shown": (ApprovalRequest, {"tool_name": "read_file"}),
    "the hash": (ApprovalRequest, {"args_hash": "0" * 64}),
}


@each_choice
@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_what_was_changed_behind_the_back_of_its_request_is_not_released_and_ends_the_turn(
    tampering: str, choice: Choice
) -> None:
    call = make_waiting_call(make_session())
    model, changes = TAMPERINGS[tampering]
    model.objects.filter(pk=call.pk if model is ToolCall else call.approval.pk).update(**changes)

    with pytest.raises(ArgumentsTampered) as refused:
        decide(call, choice)

    assert (refused.value.status, refused.value.code) == (409, "arguments_changed")
    assert status_of(call) == ("cancelled", "answered", "failed")
    assert fresh(call).turn.code == "arguments_changed"
    assert fresh(call).released_at is None
    refusal, closed = AuditEntry.objects.order_by("id")
    assert (refusal.outcome, refusal.actor, refusal.details) == ("refused", "tests", {"code": "arguments_changed"})
    assert (closed.action, closed.actor, closed.channel) == ("approval.cancelled", "system", "system")
    assert [(chunk["type"], chunk["closes"]) for chunk in said()[-3:]] == [
        ("approval_resolved", False),
        ("error", False),
        ("turn_finished", True),
    ]
    assert (said()[-1]["status"], said()[-1]["code"]) == ("failed", "arguments_changed")
    assert claims.claim_turns("runner", 10) == []
    assert make_turn(Session.objects.get(pk="s"), "and now?").status == "queued", "the session goes on"


def test_tampering_found_in_a_turn_that_has_ended_is_written_down_and_nothing_else() -> None:
    call = make_waiting_call(make_session())
    ending.cancel(CALLER, "s")
    before = everything(AuditEntry)

    with pytest.raises(ArgumentsTampered), approvals.recording_refusals(CALLER, call):
        raise ArgumentsTampered("Changed.")

    assert everything(AuditEntry) == before
    assert AuditEntry.objects.filter(outcome="refused").count() == 1


def test_a_request_whose_hash_changes_under_the_decider_is_a_conflict() -> None:
    session = make_session()
    call = make_waiting_call(session)
    seen = approvals.of_call(session, call.pk)
    ApprovalRequest.objects.filter(pk=seen.pk).update(args_hash="0" * 64)

    with pytest.raises(ArgumentsChanged), transaction.atomic():
        approvals.decide(session, seen, APPROVE, CALLER)

    assert status_of(call)[:2] == ("pending", "waiting")


@pytest.mark.parametrize("text", ['{"content":', "", "null", "[1]", "NaN"])
def test_one_request_that_cannot_be_read_does_not_hide_the_others(text: str) -> None:
    broken, healthy = make_waiting_call(make_session("broken")), make_waiting_call(make_session("healthy"))
    ApprovalRequest.objects.filter(pk=broken.approval.pk).update(arguments_text=text)

    shown = {approval["call_id"]: approval["arguments"] for approval in get(ApprovalsView)["approvals"]}
    assert shown[healthy.pk] == healthy.arguments, "guarantees F21"
    assert shown.get(broken.pk, {"unreadable": text}) == {"unreadable": text}, "arguments are an object always"


@pytest.mark.parametrize("way", ["cancel", "new message", "delete"])
def test_a_call_that_cannot_be_read_does_not_wedge_its_session(way: str) -> None:
    call = make_waiting_call(make_session())
    ToolCall.objects.filter(pk=call.pk).update(arguments_text='{"content":')

    WAYS[way](call)

    assert status_of_turn(call) == "cancelled"


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments_text": '{"path":"/etc/passwd"}'},
        {"arguments_text": '{"path":'},
        {"released_text": '{"path":"/etc/passwd"}'},
        {"tool_name": "list_files"},
        {"args_hash": "0" * 64},
    ],
)
def test_what_was_changed_after_its_release_is_not_handed_out(changes: dict[str, str]) -> None:
    changed, kept = make_calls(make_session(), wanted("read_file"), wanted("read_file"))
    ToolCall.objects.filter(pk=changed.pk).update(**changes)

    shown = get(OpenCallsView, session_id="s")

    assert shown["count"] == 1
    assert [call["call_id"] for call in shown["open_calls"]] == [kept.pk]


def test_a_client_that_was_away_finds_what_to_execute() -> None:
    session = make_session()
    waiting, edited, released, answered = make_calls(session, *[wanted()] * 2, *[wanted("read_file")] * 2)
    decide(edited, EDIT)
    acceptance.tool_result(ToolResult("s", answered.pk, "done"), CALLER)

    shown = get(OpenCallsView, session_id="s")

    assert shown["open_calls"] == [
        {
            "call_id": call.pk,
            "tool_name": call.tool_name,
            "arguments": OTHER_ARGUMENTS if call == edited else call.arguments,
            "args_hash": fresh_call(call).args_hash,
            "state": "waiting" if call == waiting else "released",
            "executed_by": "client",
            "requires_approval": call != released,
            "released_at": None if call == waiting else fresh_call(call).released_at.isoformat(),  # type: ignore[union-attr]
            "deadline_at": None if call == waiting else fresh_call(call).deadline_at.isoformat(),  # type: ignore[union-attr]
        }
        for call in (waiting, edited, released)
    ]


# --- what has changed while it waited (S11, S13) ---


def deny_writing() -> None:
    ApprovalRule.objects.create(tool="write_*", outcome="deny", reason="Frozen")


def forbid_the_tool_to_the_agent() -> None:
    Agent.objects.filter(pk="coder").update(allowed_tools=["read_file"])


def remove_the_tool() -> None:
    Tool.objects.filter(pk="write_file").delete()


def tighten_the_schema() -> None:
    parameters = {"type": "object", "properties": {"path": {"pattern": "^docs/"}}, "required": ["reason"]}
    Tool.objects.filter(pk="write_file").update(parameters=parameters, version=2)


def break_the_schema() -> None:
    Tool.objects.filter(pk="write_file").update(parameters={"$ref": "#/nowhere"})


def restrict_the_paths() -> None:
    Agent.objects.filter(pk="coder").update(writable_paths="docs/.*")


def rename_the_agent() -> None:
    Agent.objects.filter(pk="coder").update(name="programmer")


CHANGES = [
    break_the_schema,
    rename_the_agent,
    deny_writing,
    forbid_the_tool_to_the_agent,
    remove_the_tool,
    tighten_the_schema,
    restrict_the_paths,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_may_not_be_made_any_more_can_only_be_rejected(change: Callable[[], None]) -> None:
    call = make_waiting_call(make_session())
    change()
    before = everything(AuditEntry)

    with pytest.raises(PolicyChanged) as refused:
        decide(call, APPROVE)
    with pytest.raises(EditRefused) as edit_refused:
        decide(call, EDIT)

    assert (refused.value.status, refused.value.code) == (409, "policy_changed")
    assert edit_refused.value.status == 422
    assert everything(AuditEntry) == before
    assert list(AuditEntry.objects.values_list("outcome", flat=True)) == ["refused", "refused"]
    decide(call, REJECT)
    assert status_of(call) == ("rejected", "answered", "queued")


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_for_a_call_that_may_not_be_made_any_more_is_refused(change: Callable[[], None]) -> None:
    call = make_waiting_call(make_session())
    change()
    before = everything(AuditEntry)

    with pytest.raises(Refused) as refused:
        acceptance.tool_result(ToolResult("s", call.pk, "done"), CALLER)

    assert refused.value.chunk.code == "policy_changed"
    assert everything(AuditEntry) == before


def test_what_was_asked_of_one_version_of_a_tool_is_not_approved_for_another() -> None:
    call = make_waiting_call(make_session())
    Tool.objects.filter(pk="write_file").update(version=2)

    with pytest.raises(Conflict):
        decide(call, APPROVE)

    assert fresh(call).released_at is None


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({}, ["body", "modified_arguments"]),
        ({"path": "a.md"}, ["body", "modified_arguments"]),
        ({"path": 1, "content": ""}, ["body", "modified_arguments", "path"]),
        ({"path": "a.py", "content": ""}, ["body", "modified_arguments", "path"]),
        ({"path": "../a.md", "content": ""}, ["body", "modified_arguments", "path"]),
    ],
)
def test_an_edit_has_to_be_a_call_that_the_agent_could_have_made(arguments: dict[str, Any], where: list[str]) -> None:
    call = make_waiting_call(make_session(), agent="architect")
    before = everything(AuditEntry)

    with pytest.raises(EditRefused) as refused:
        decide(call, Choice(Verdict.EDIT, arguments))

    assert refused.value.status == 422
    assert isinstance(refused.value.detail, list)
    assert refused.value.detail[0]["loc"] == where
    assert everything(AuditEntry) == before
    assert AuditEntry.objects.get().outcome == "refused"


def test_an_edit_in_the_stream_is_refused_with_the_place_in_the_message() -> None:
    call = make_waiting_call(make_session(), agent="architect")
    message = HitlDecision("s", call.pk, "edit", {"path": "a.py", "content": ""})

    with pytest.raises(EditRefused) as refused:
        acceptance.hitl_decision(message, CALLER)

    assert isinstance(refused.value.detail, list)
    assert refused.value.detail[0]["loc"] == ["body", "message", "modified_arguments", "path"]
    assert status_of(call) == ("pending", "waiting", "waiting")


def test_an_edit_is_judged_by_the_agent_that_asked_and_not_by_the_one_that_is_active() -> None:
    session = make_session()
    call = make_waiting_call(session, agent="architect")
    acceptance.switch_agent(SwitchAgent("s", "coder", "because"), CALLER)

    with pytest.raises(EditRefused):
        decide(call, Choice(Verdict.EDIT, {"path": "a.py", "content": ""}))


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"decision": None},
        {"decision": "maybe"},
        {"decision": "APPROVE"},
        {"decision": "superseded"},
        {"decision": "edit"},
        {"decision": "edit", "modified_arguments": None},
        {"decision": "edit", "modified_arguments": "{}"},
        {"decision": "edit", "modified_arguments": []},
        {"decision": "approve", "modified_arguments": {}},
        {"decision": "approve", "modified_arguments": OTHER_ARGUMENTS},
        {"decision": "reject", "modified_arguments": OTHER_ARGUMENTS},
        {"decision": "reject", "feedback": 1},
        {"decision": "reject", "feedback": "x" * 10_001},
        {"decision": "approve", "args_hash": 1},
        {"decision": "approve", "args_hash": "0" * 65},
        {"decision": "edit", "modified_arguments": {"path": "a", "content": "x" * 256 * 1024}},
    ],
)
def test_a_malformed_decision_leaves_the_request_pending(body: Any) -> None:
    call = make_waiting_call(make_session())
    before = everything(AuditEntry)

    with pytest.raises(APIError) as refused:
        post_decision(call, body)

    assert 400 <= refused.value.status < 500
    assert everything(AuditEntry) == before


def post_decision(call: ToolCall, body: Any, by: Caller = CALLER) -> dict[str, Any]:
    request = APIRequestFactory().post("/", body, format="json")
    force_authenticate(request, user=by)  # type: ignore[arg-type]
    return dict(DecisionView.as_view()(request, call_id=call.pk).data)


def test_what_is_listed_as_pending_is_undecided_and_oldest_first() -> None:
    first, decided, last = make_calls(make_session(), wanted(), wanted(), wanted("execute_command"))
    decide(decided, APPROVE)

    shown = get(PendingApprovalsView, session_id="s")

    assert (shown["session_id"], shown["count"]) == ("s", 2)
    assert shown["pending_approvals"] == [
        {
            "request_id": call.pk,
            "request_type": "tool",
            "subject": call.tool_name,
            "details": {"arguments": call.arguments},
            "reason": call.approval.reason,
            "created_at": call.approval.created_at.isoformat(),
            "call_id": call.pk,
            "tool_name": call.tool_name,
            "arguments": call.arguments,
            "args_hash": call.args_hash,
        }
        for call in (first, last)
    ]


def test_a_decision_over_rest_is_answered_with_what_the_request_has_become() -> None:
    call = make_waiting_call(make_session())
    body = {"decision": "edit", "modified_arguments": OTHER_ARGUMENTS, "args_hash": call.args_hash, "feedback": "so"}

    shown = post_decision(call, body)

    made = Decision.objects.get()
    assert shown == {
        "request_id": call.pk,
        "request_type": "tool",
        "subject": "write_file",
        "details": {"arguments": FITTING["write_file"]},
        "reason": "File modification requires user approval",
        "created_at": call.approval.created_at.isoformat(),
        "call_id": call.pk,
        "tool_name": "write_file",
        "arguments": FITTING["write_file"],
        "args_hash": call.args_hash,
        "session_id": "s",
        "status": "edited",
        "decision": "edit",
        "decided_by": "tests",
        "decided_at": made.decided_at.isoformat(),
        "feedback": "so",
        "modified_arguments": OTHER_ARGUMENTS,
        "released_args_hash": ToolCall.objects.get(pk=call.pk).args_hash,
    }


# --- who may decide (R9) ---


@each_choice
def test_where_self_approval_is_off_the_requester_is_refused_and_audited_and_an_operator_decides(
    choice: Choice,
) -> None:
    call = make_waiting_call(make_session(), self_approval=False)
    before = everything(AuditEntry)

    with pytest.raises(SelfApprovalForbidden) as refused:
        decide(call, choice)

    assert (refused.value.status, refused.value.code) == (403, "self_approval_forbidden")
    assert everything(AuditEntry) == before
    entry = AuditEntry.objects.get()
    assert (entry.action, entry.outcome, entry.actor, entry.target) == ("approval.decide", "refused", "tests", call.pk)
    assert entry.details == {"code": "self_approval_forbidden"}
    decide(call, choice, OPERATOR)
    assert Decision.objects.get().decided_by == "olga"


@pytest.mark.parametrize("way", ["approve", "edit", "reject", "decision in the stream", "result", "error"])
def test_where_self_approval_is_off_no_path_leads_around_it(way: str) -> None:
    call = make_waiting_call(make_session(), self_approval=False)
    before = everything(AuditEntry)

    with pytest.raises((SelfApprovalForbidden, Refused)):
        WAYS[way](call)

    assert everything(AuditEntry) == before
    assert AuditEntry.objects.get().details == {"code": "self_approval_forbidden"}


@pytest.mark.parametrize("way", ["approve", "edit", "decision in the stream", "result"])
def test_a_rule_that_takes_self_approval_back_holds_for_what_waits_already(way: str) -> None:
    call = make_waiting_call(make_session())
    ApprovalRule.objects.filter(tool="write_file").update(self_approval=False)
    before = everything(AuditEntry)

    with pytest.raises((SelfApprovalForbidden, Refused)):
        WAYS[way](call)

    assert everything(AuditEntry) == before
    assert AuditEntry.objects.get().details == {"code": "self_approval_forbidden"}
    decide(call, APPROVE, OPERATOR)


def test_a_rule_that_asks_no_more_still_needs_the_decision_that_was_asked_for() -> None:
    call = make_waiting_call(make_session(), self_approval=False)
    ApprovalRule.objects.all().delete()

    with pytest.raises(SelfApprovalForbidden):
        decide(call, APPROVE)

    assert status_of(call) == ("pending", "waiting", "waiting")
    decide(call, APPROVE, OPERATOR)


@pytest.mark.parametrize("way", ["cancel", "new message", "delete"])
def test_where_self_approval_is_off_the_requester_may_still_give_up(way: str) -> None:
    call = make_waiting_call(make_session(), self_approval=False)

    WAYS[way](call)

    assert status_of(call)[1:] == ("answered", "cancelled")
    assert fresh(call).released_at is None


def test_a_stranger_finds_nothing_to_decide() -> None:
    call = make_waiting_call(make_session())
    stranger = replace(OPERATOR, account_id=Account.objects.create(name="other").pk)
    before = everything()

    with pytest.raises(UnknownApproval) as unknown:
        decide(call, APPROVE, stranger)
    with pytest.raises(UnknownApproval) as never_was:
        decide(ToolCall(pk="call_" + "x" * 22), APPROVE, stranger)

    assert str(unknown.value.detail).replace(call.pk, "") == str(never_was.value.detail).replace("call_" + "x" * 22, "")
    assert everything() == before


def test_a_request_of_a_deleted_session_is_gone() -> None:
    call = make_waiting_call(make_session())
    ending.delete(CALLER, "s")

    with pytest.raises(UnknownApproval):
        decide(call, APPROVE, OPERATOR)


def test_one_session_cannot_decide_the_call_of_another() -> None:
    call = make_waiting_call(make_session())
    make_session("other")
    before = everything()

    for verdict in ("approve", "reject"):
        with pytest.raises(Refused) as refused:
            acceptance.hitl_decision(HitlDecision("other", call.pk, verdict), CALLER)
        assert refused.value.chunk.message == f"No pending approval found for request_id={call.pk}"
    with pytest.raises(Refused) as refused:
        acceptance.tool_result(ToolResult("other", call.pk, "done"), CALLER)

    assert refused.value.chunk.message == f"No pending tool call {call.pk}"
    assert everything() == before


# --- decided by its result (protocol 5) ---


@pytest.mark.parametrize(
    ("result", "verdict", "outcome", "text"),
    [
        (ToolResult("s", "", {"success": True}), "approve", "ok", '{"success": true}'),
        (ToolResult("s", "", error="no such file"), "approve", "error", "Error: no such file"),
        (ToolResult("s", "", error="It says: User rejected"), "approve", "error", "Error: It says: User rejected"),
        (ToolResult("s", "", error="User rejected: later"), "reject", "rejected", "Error: User rejected: later"),
        (
            ToolResult("s", "", error="Операция отклонена: write_file"),
            "reject",
            "rejected",
            "Error: Операция отклонена: write_file",
        ),
    ],
)
def test_a_result_for_a_call_that_waits_is_a_decision_as_well(
    result: ToolResult, verdict: str, outcome: str, text: str
) -> None:
    call = make_waiting_call(make_session())

    accepted = acceptance.tool_result(replace(result, call_id=call.pk), CALLER)

    made = Decision.objects.get()
    assert (made.verdict, made.decided_by) == (verdict, "tests")
    assert made.feedback == (result.error if verdict == "reject" else "")
    assert AuditEntry.objects.get().details["implicit"] is facts("hitl.decision.made")[0]["implicit"] is True
    assert (fresh(call).status, fresh(call).outcome, fresh(call).turn.status) == ("answered", outcome, "queued")
    assert [message["content"] for message in tool_messages()] == [text]
    assert (accepted.origin, accepted.has_frames) == (str(call.turn_id), True)
    assert [chunk["type"] for chunk in said()][-1] == "approval_resolved"
    assert said()[-1]["closes"] is False
    assert log.page("s", accepted.after)[0][0].seq == log.page("s", 0)[0][-1].seq, "the answer begins with it"


def test_a_long_rejection_is_kept_as_far_as_feedback_is_and_read_whole_by_the_model() -> None:
    call = make_waiting_call(make_session())
    error = "User rejected: " + "x" * 20_000

    acceptance.tool_result(ToolResult("s", call.pk, error=error), CALLER)

    assert Decision.objects.get().feedback == error[:10_000]
    assert tool_messages()[0]["content"] == f"Error: {error}"


def test_a_result_that_leaves_calls_open_is_answered_with_its_frame_alone() -> None:
    first, _ = make_calls(make_session(), wanted(), wanted())

    accepted = acceptance.tool_result(ToolResult("s", first.pk, "done"), CALLER)

    assert accepted.has_frames is True
    assert (said()[-1]["type"], said()[-1]["closes"]) == ("approval_resolved", True)


def test_a_result_of_a_released_call_is_followed_only_when_the_turn_goes_on_by_it() -> None:
    first, second = make_calls(make_session(), wanted("read_file"), wanted("list_files"))

    assert acceptance.tool_result(ToolResult("s", first.pk, "one"), CALLER).has_frames is False
    assert status_of_turn(first) == "waiting"
    assert acceptance.tool_result(ToolResult("s", second.pk, "two"), CALLER).has_frames is True
    assert status_of_turn(first) == "queued"


def status_of_turn(call: ToolCall) -> str:
    return Turn.objects.get(pk=call.turn_id).status


def test_what_comes_after_the_answer_changes_nothing() -> None:
    call = make_waiting_call(make_session())
    acceptance.tool_result(ToolResult("s", call.pk, "first"), CALLER)
    before = everything(AuditEntry)

    assert acceptance.tool_result(ToolResult("s", call.pk, "second"), CALLER).has_frames is False
    with pytest.raises(Refused) as refused:
        acceptance.hitl_decision(HitlDecision("s", call.pk, "reject"), CALLER)

    assert refused.value.chunk.code == "already_decided"
    assert refused.value.chunk.metadata["decided_by"] == "tests"
    assert everything(AuditEntry) == before
    assert AuditEntry.objects.filter(action="call.late_result").count() == 1, "who sent it is written down"


@pytest.mark.parametrize("way", ["reject", "error", "cancel", "new message"])
def test_a_result_for_a_call_that_was_closed_is_passed_over(way: str) -> None:
    call = make_waiting_call(make_session())
    WAYS[way](call)
    before = everything(AuditEntry)

    assert acceptance.tool_result(ToolResult("s", call.pk, "late"), CALLER).has_frames is False

    assert everything(AuditEntry) == before


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"a": [1, "é"]}, '{"a": [1, "é"]}'),
        ([], "[]"),
        ({}, "{}"),
        (False, "false"),
        (0, "0"),
        ("text", "text"),
        ("", "Tool executed successfully"),
        (None, "Tool executed successfully"),
    ],
)
def test_a_result_of_any_kind_becomes_text(result: Any, text: str) -> None:
    (call,) = make_calls(make_session(), wanted("read_file"))

    acceptance.tool_result(ToolResult("s", call.pk, result), CALLER)

    assert tool_messages()[0]["content"] == text


def test_the_result_of_an_edited_call_tells_the_model_what_was_executed() -> None:
    call = make_waiting_call(make_session())
    decide(call, EDIT)

    acceptance.tool_result(ToolResult("s", call.pk, {"success": True}, args_hash=fresh(call).args_hash), CALLER)

    assert json.loads(tool_messages()[0]["content"]) == {
        "status": "approved_with_edits",
        "tool_name": "write_file",
        "arguments": OTHER_ARGUMENTS,
        "result": '{"success": true}',
    }
    assert not AuditEntry.objects.filter(action="call.executed_otherwise").exists()


@pytest.mark.parametrize("choice", [APPROVE, EDIT], ids=VERDICTS[:2])
def test_a_client_that_executed_other_arguments_is_recorded_and_the_model_told(choice: Choice) -> None:
    call = make_waiting_call(make_session())
    decide(call, choice)
    released = fresh(call).args_hash

    acceptance.tool_result(ToolResult("s", call.pk, "done", args_hash="0" * 64), CALLER)

    entry = AuditEntry.objects.get(action="call.executed_otherwise")
    assert (entry.actor, entry.target) == ("tests", call.pk)
    assert entry.details == {"released_hash": released, "executed_hash": "0" * 64}
    assert "executed other arguments" in tool_messages()[0]["content"]


def test_a_decision_on_a_call_that_needs_none_is_refused() -> None:
    (call,) = make_calls(make_session(), wanted("read_file"))

    with pytest.raises(Refused) as refused:
        acceptance.hitl_decision(HitlDecision("s", call.pk, "approve"), CALLER)

    assert refused.value.chunk.message == f"No pending approval found for request_id={call.pk}"
    assert fresh_call(call).status == "released"


def test_an_unknown_decision_in_the_stream_leaves_the_call_pending() -> None:
    call = make_waiting_call(make_session())
    before = everything()

    with pytest.raises(Refused) as refused:
        acceptance.hitl_decision(HitlDecision("s", call.pk, "superseded"), CALLER)

    assert refused.value.chunk.message == "Invalid HITL decision: superseded"
    assert everything() == before


# --- what the server executes itself ---


def test_an_approved_call_of_the_servers_own_is_executed_and_the_turn_goes_on() -> None:
    call = make_waiting_call(make_session(), "switch_mode", {"mode": "debug", "reason": "it fails"}, agent="architect")
    assert Session.objects.get(pk="s").current_agent == "architect"

    decide(call, APPROVE)

    session = Session.objects.get(pk="s")
    assert status_of(call) == ("approved", "answered", "queued")
    assert (session.current_agent, session.switch_count) == ("debug", 1)
    handoff = session.handoffs.get()
    assert (handoff.from_agent, handoff.to_agent, handoff.reason) == ("architect", "debug", "it fails")
    assert (handoff.confidence, handoff.turn_id) == ("medium", call.turn_id)
    assert fresh(call).turn.handoff_count == 1
    assert [message["content"] for message in tool_messages()] == ["Switched to debug agent"]
    assert [(chunk["type"], chunk["closes"]) for chunk in said()[-2:]] == [
        ("approval_resolved", False),
        ("agent_switched", False),
    ]
    assert facts("tool.execution.completed") == [{"tool_name": "switch_mode", "call_id": call.pk}]


def test_a_rejected_call_of_the_servers_own_is_not_executed() -> None:
    call = make_waiting_call(make_session(), "switch_mode", agent="architect")

    decide(call, REJECT)

    assert status_of(call) == ("rejected", "answered", "queued")
    assert Session.objects.get(pk="s").current_agent == "architect"


def test_an_edited_call_of_the_servers_own_is_executed_as_edited_and_the_model_is_told_so() -> None:
    call = make_waiting_call(make_session(), "switch_mode", {"mode": "debug"}, agent="architect")

    decide(call, Choice(Verdict.EDIT, {"mode": "ask"}))

    assert Session.objects.get(pk="s").current_agent == "ask"
    assert json.loads(tool_messages()[0]["content"]) == {
        "status": "approved_with_edits",
        "tool_name": "switch_mode",
        "arguments": {"mode": "ask"},
        "result": "Switched to ask agent",
    }, "protocol 5: after an edit the call's tool message is this JSON"


def test_a_call_of_the_servers_own_beside_an_open_one_leaves_the_turn_waiting() -> None:
    session = make_session(agent="architect")
    ApprovalRule.objects.create(tool="switch_mode", outcome="ask", self_approval=True)
    switch, _ = make_calls(session, wanted("switch_mode"), wanted("read_file"))

    decide(switch, APPROVE)

    assert status_of(switch) == ("approved", "answered", "waiting")
    assert [chunk["closes"] for chunk in said()[-2:]] == [False, True]


# --- a call has one answer, and is released once ---


def test_a_second_answer_is_refused() -> None:
    call = make_waiting_call(make_session())
    seen_by_another = fresh(call)
    call.answer_with("first", ToolCall.Outcome.OK)
    before = everything()

    for copy in (call, seen_by_another):
        with pytest.raises(CallMoved):
            copy.answer_with("second", ToolCall.Outcome.ERROR)

    assert (fresh(call).answer, fresh(call).outcome) == ("first", "ok")
    assert everything() == before, "not even a message is counted"


@pytest.mark.parametrize("how", ["released", "answered"])
def test_only_a_call_that_waits_can_be_released(how: str) -> None:
    call = make_waiting_call(make_session())
    seen_by_another = fresh(call)
    if how == "released":
        call.release(args_hash=call.args_hash)
    else:
        call.answer_with("first", ToolCall.Outcome.OK)
    before = everything()

    for copy in (call, seen_by_another):
        with pytest.raises(CallMoved):
            copy.release(args_hash="f" * 64, edited_text="{}")

    assert everything() == before


def test_an_answer_counts_as_a_message_and_as_activity() -> None:
    call = make_waiting_call(make_session())
    past = datetime(2020, 1, 1, tzinfo=UTC)
    Session.objects.filter(pk="s").update(last_activity=past)

    call.answer_with("done", ToolCall.Outcome.OK)

    session = Session.objects.get(pk="s")
    assert session.message_count == len(history(CALLER, "s")["messages"]) == 3
    assert session.last_activity > past
    assert (call.is_open, fresh(call).is_open) == (False, False)
    assert fresh(call).answered_at is not None


def test_two_calls_cannot_have_one_place_in_an_answer() -> None:
    call = make_waiting_call(make_session())

    with pytest.raises(IntegrityError), transaction.atomic():
        ToolCall.objects.create(
            session_id="s",
            turn_id=call.turn_id,
            round=call.round,
            position=call.position,
            agent="coder",
            tool_name="read_file",
            arguments_text="{}",
            status=ToolCall.Status.RELEASED,
        )


def test_a_request_has_one_decision() -> None:
    call = make_waiting_call(make_session())
    decide(call, APPROVE)
    made = Decision.objects.get()

    with pytest.raises(IntegrityError), transaction.atomic():
        Decision.objects.create(request_id=made.request_id, verdict="reject", decided_at=made.decided_at)


def test_ids_of_calls_are_ours_and_never_repeat() -> None:
    calls = make_calls(make_session(), *[wanted("read_file")] * 50)

    assert len({call.pk for call in calls}) == 50
    assert all(re.fullmatch("call_[A-Za-z0-9]{22}", call.pk) for call in calls)


# --- the turn that waits ---


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_turn_that_has_ended_does_not_go_on(status: str) -> None:
    turn = make_turn(make_session())
    Turn.objects.filter(pk=turn.pk).update(status=status)

    with pytest.raises(TurnMoved):
        turn.go_on()

    assert Turn.objects.get(pk=turn.pk).status == status


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_turn_that_a_runner_has_goes_on_by_itself(status: str) -> None:
    turn = make_turn(make_session())
    Turn.objects.filter(pk=turn.pk).update(status=status)

    assert turn.go_on() is True

    assert Turn.objects.get(pk=turn.pk).status == status


def test_a_turn_with_an_open_call_does_not_go_on() -> None:
    call = make_waiting_call(make_session())

    assert call.turn.go_on() is False
    assert status_of_turn(call) == "waiting"
    call.answer_with("done", ToolCall.Outcome.OK)
    assert call.turn.go_on() is True
    assert status_of_turn(call) == "queued"


def test_a_turn_that_goes_on_is_claimed_anew_and_says_nothing_of_a_start() -> None:
    call = make_waiting_call(make_session())
    decide(call, REJECT)
    frames = len(said())

    again = claim(Turn.objects.get(pk=call.turn_id))

    assert again.attempt == 2
    assert len(said()) == frames


def test_what_a_turn_ran_before_it_waited_counts_when_it_goes_on() -> None:
    turn = make_turn(make_session())
    act(run(turn), wanted(), ran_ms=1_234)
    decide(ToolCall.objects.get(), REJECT)

    assert claim(turn).ran_ms == 1_234


def test_waiting_needs_the_claim() -> None:
    turn = make_turn(make_session())
    stale = claim(turn, "one")
    let_lease_run_out(turn)

    with pytest.raises(LostClaim):
        Turn.wait(stale)
    held = claim(turn, "two")
    with pytest.raises(LostClaim):
        Turn.wait(stale)
    assert Turn.objects.get(pk=turn.pk).status == "running"
    Turn.wait(held, round_count=1)

    turn.refresh_from_db()
    assert (turn.status, turn.owner, turn.lease_until, turn.round_count) == ("waiting", "", None, 1)
    with pytest.raises(LostClaim):
        Turn.wait(held)


def test_a_cancelled_turn_cannot_begin_to_wait() -> None:
    running = run(make_turn(make_session()))
    scene = look(running.claim)
    ending.cancel(CALLER, "s")
    before = everything()

    with pytest.raises(CancelRequested):
        act(running, wanted(), scene=scene)
    with pytest.raises(CancelRequested):
        Turn.wait(running.claim)

    assert everything() == before, "no call and no request is left behind"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "running"])
def test_only_a_turn_that_nobody_holds_is_ended_from_outside(status: str) -> None:
    turn = make_turn(make_session())
    claim(turn)
    Turn.objects.filter(pk=turn.pk).update(status=status)

    assert turn.end_unheld(Turn.Status.CANCELLED, "cancelled") is False
    assert Turn.objects.get(pk=turn.pk).status == status


def test_a_turn_left_behind_by_its_runner_is_ended_from_outside() -> None:
    turn = make_turn(make_session())
    claim(turn)
    let_lease_run_out(turn)

    assert ending.cancel(CALLER, "s") == turn.pk

    turn.refresh_from_db()
    assert (turn.status, turn.code, turn.lease_until) == ("cancelled", "cancelled", None)
    assert turn.finished_at is not None


@pytest.mark.parametrize("status", ["queued", "waiting", "completed", "failed", "cancelled"])
def test_a_wish_to_cancel_is_for_a_turn_that_runs(status: str) -> None:
    turn = make_turn(make_session())
    Turn.objects.filter(pk=turn.pk).update(status=status, lease_until=Now())

    assert turn.request_cancel() is False
    assert Turn.objects.get(pk=turn.pk).cancel_requested_at is None


def test_a_turn_that_asks_for_tools_without_end_is_stopped(settings: Any) -> None:
    settings.TURN_MAX_ROUNDS = 2
    running = run(make_turn(make_session()))
    act(running, wanted("nonsense", "{}"))
    act(running, wanted("nonsense", "{}"))

    with pytest.raises(TooManyRounds):
        look(running.claim)


def test_a_turn_that_is_passed_on_without_end_is_stopped(settings: Any) -> None:
    settings.TURN_MAX_HANDOFFS = 2
    running = run(make_turn(make_session(agent="architect")))
    act(running, wanted("switch_mode", {"mode": "debug"}))
    act(running, wanted("switch_mode", {"mode": "ask"}))
    before = everything()

    with pytest.raises(handoffs.TooManyHandoffs):
        act(running, wanted("switch_mode", {"mode": "architect"}))

    assert everything() == before


def test_handovers_of_one_answer_are_counted_together(settings: Any) -> None:
    settings.TURN_MAX_HANDOFFS = 1
    running = run(make_turn(make_session(agent="architect")))

    with pytest.raises(handoffs.TooManyHandoffs):
        act(running, wanted("switch_mode", {"mode": "debug"}), wanted("switch_mode", {"mode": "ask"}))


def test_a_handover_to_the_agent_that_is_active_is_none(settings: Any) -> None:
    settings.TURN_MAX_HANDOFFS = 0
    turn = make_turn(make_session(agent="architect"))

    act(run(turn), wanted("switch_mode", {"mode": "architect"}))

    call = turn.calls.get()
    assert (call.outcome, call.answer) == ("ok", "The architect agent is active already")
    assert Session.objects.get(pk="s").switch_count == 0
    assert "agent_switched" not in [chunk["type"] for chunk in said()]


def test_an_approved_handover_of_a_turn_that_had_all_of_its_own_is_answered_with_an_error(settings: Any) -> None:
    settings.TURN_MAX_HANDOFFS = 1
    running = run(make_turn(make_session(agent="architect")))
    act(running, wanted("switch_mode", {"mode": "debug"}))
    ApprovalRule.objects.create(tool="switch_mode", outcome="ask", self_approval=True)
    act(running, wanted("switch_mode", {"mode": "ask"}))
    call = ToolCall.objects.get(status="waiting")

    decide(call, APPROVE)

    assert (fresh(call).outcome, status_of_turn(call)) == ("error", "queued")
    assert Session.objects.get(pk="s").current_agent == "debug"


# --- calls that are closed with their turn ---


def closed(call: ToolCall) -> dict[str, Any]:
    return dict(json.loads(fresh_call(call).answer))


def test_cancelling_a_turn_that_waits_answers_its_open_calls() -> None:
    waiting, released, answered = make_calls(make_session(), wanted(), wanted("read_file"), wanted("list_files"))
    acceptance.tool_result(ToolResult("s", answered.pk, "[]"), CALLER)

    assert ending.cancel(replace(CALLER, name="dora"), "s") == waiting.turn_id

    turn = Turn.objects.get()
    assert (turn.status, turn.code) == ("cancelled", "cancelled")
    assert status_of(waiting) == ("cancelled", "answered", "cancelled")
    for call in (waiting, released):
        assert closed(call)["status"] == "cancelled"
        assert fresh_call(call).outcome == "cancelled"
    assert fresh_call(answered).answer == "[]"
    made = Decision.objects.get()
    assert (made.verdict, made.decided_by) == ("cancelled", "dora")
    assert AuditEntry.objects.get().action == "approval.cancelled"
    assert [(chunk["type"], chunk["closes"]) for chunk in said()[-2:]] == [
        ("approval_resolved", False),
        ("turn_finished", True),
    ]
    assert said()[-2]["metadata"]["decision"] == "cancelled"
    assert (said()[-1]["status"], said()[-1]["code"]) == ("cancelled", "cancelled")
    assert facts("session.updated") == [{"cancelled_by": "dora"}]
    assert ending.cancel(CALLER, "s") is None


def test_a_new_message_supersedes_the_turn_that_waits() -> None:
    waiting, released = make_calls(make_session(), wanted(), wanted("read_file"))

    accepted = acceptance.user_message(UserMessage("s", "never mind"), CALLER)

    assert status_of(waiting) == ("superseded", "answered", "cancelled")
    assert fresh(waiting).turn.code == "superseded"
    assert closed(waiting)["status"] == closed(released)["status"] == "superseded"
    assert fresh_call(released).outcome == "superseded"
    assert Decision.objects.get().verdict == "superseded"
    assert said()[-1]["turn_id"] == str(waiting.turn_id)
    assert (said()[-1]["status"], said()[-1]["code"], said()[-1]["closes"]) == ("cancelled", "superseded", True)
    assert log.page("s", accepted.after)[0] == [], "the old turn's end is not in the new one's answer"
    claim(Turn.objects.get(pk=accepted.origin))


def test_cancelling_ends_the_oldest_turn_and_what_is_queued_behind_it_goes_on() -> None:
    session = make_session()
    first, second = make_turn(session, "one"), make_turn(session, "two")

    assert ending.cancel(CALLER, "s") == first.pk

    assert list(session.turns.order_by("position").values_list("status", flat=True)) == ["cancelled", "queued"]
    claim(second)


@pytest.mark.parametrize(("way", "verdict"), [("cancel", "cancelled"), ("new message", "superseded")])
def test_a_decision_comes_too_late_for_what_was_closed(way: str, verdict: str) -> None:
    call = make_waiting_call(make_session())
    WAYS[way](call)
    before = everything()

    with pytest.raises(AlreadyDecided) as late:
        decide(call, APPROVE, OPERATOR)

    assert (late.value.more["decision"], late.value.more["decided_by"]) == (verdict, "tests")
    assert everything() == before


def test_a_new_message_waits_behind_a_turn_that_goes_on() -> None:
    call = make_waiting_call(make_session())
    decide(call, REJECT)

    make_turn(Session.objects.get(pk="s"), "and")

    assert status_of(call) == ("rejected", "answered", "queued")


def test_a_turn_does_not_begin_to_wait_while_the_user_has_gone_on() -> None:
    session = make_session(agent="architect")
    turn = make_turn(session)
    running = run(turn)
    later = make_turn(session, "and another thing")

    outcome = act(running, wanted(), wanted("read_file"), wanted("switch_mode"), wanted("execute_command"))

    assert outcome == Turn.Status.CANCELLED
    turn.refresh_from_db()
    assert (turn.status, turn.code) == ("cancelled", "superseded")
    outcomes = list(turn.calls.in_order().values_list("status", "outcome"))
    assert outcomes == [
        ("answered", "superseded"),
        ("answered", "superseded"),
        ("answered", "ok"),
        ("answered", "refused"),
    ]
    assert not ApprovalRequest.objects.exists()
    assert "tool_call" not in [chunk["type"] for chunk in said()], "nobody is asked to execute it"
    assert (said()[-1]["type"], said()[-1]["code"]) == ("turn_finished", "superseded")
    claim(later)


def test_a_late_turn_whose_calls_the_server_answers_goes_on() -> None:
    session = make_session(agent="architect")
    running = run(make_turn(session))
    make_turn(session, "and another thing")

    assert act(running, wanted("switch_mode"), wanted("nonsense", "{}")) is None


def test_deleting_a_session_cancels_what_waits_in_it() -> None:
    call = make_waiting_call(make_session())
    ending.delete(CALLER, "s")

    assert status_of(call) == ("cancelled", "answered", "cancelled")
    assert Decision.objects.get().verdict == "cancelled"


@pytest.mark.parametrize("way", WAYS)
def test_messages_are_counted_as_history_shows_them(way: str) -> None:
    call, *_ = make_calls(make_session(), wanted(), wanted("read_file"), wanted("nonsense", "{}"), text="Well.")
    WAYS[way](call)

    session = Session.objects.get(pk="s")
    if way == "delete":
        Session.objects.filter(pk="s").update(deleted_at=None)
    shown = history(CALLER, "s")
    assert session.message_count == shown["message_count"] == len(shown["messages"])


# --- messages ---


def test_so_many_messages_wait_behind_a_turn_and_no_more(settings: Any) -> None:
    settings.TURN_QUEUE_LENGTH = 2
    session = make_session()
    claim(make_turn(session))
    make_turn(session)
    make_turn(session)
    before = everything()

    with pytest.raises(acceptance.QueueFull) as full:
        make_turn(session)

    assert (full.value.status, full.value.code, full.value.headers) == (429, "queue_full", {"Retry-After": "5"})
    assert everything() == before


def test_the_first_message_gives_a_session_its_title_for_good() -> None:
    session = make_session()

    make_turn(session, "  first " + "x" * 600)
    make_turn(session, "second")

    assert Session.objects.get(pk="s").title == ("first " + "x" * 600)[:500]


def test_a_session_that_has_had_nothing_starts_on_the_agent_asked_for_and_later_is_switched() -> None:
    session = make_session(agent="orchestrator")

    for agent in ("ask", "debug"):
        acceptance.user_message(UserMessage("s", "hello", agent), CALLER)

    session.refresh_from_db()
    assert (session.current_agent, session.switch_count) == ("ask", 0)
    assert list(session.turns.order_by("position").values_list("requested_agent", flat=True)) == ["", "debug"]


# --- figures (protocol 8) ---


def make_scripted_facts() -> None:
    """Switches, calls, results and decisions of every kind, and an error."""
    make_session("a", agent="architect")
    architect = Session.objects.get(pk="a")
    writes = make_calls(architect, wanted(), wanted(), wanted(), wanted("read_file"), wanted("execute_command"))
    decide(writes[0], APPROVE)
    acceptance.tool_result(ToolResult("a", writes[0].pk, "done"), CALLER)
    decide(writes[1], EDIT)
    acceptance.tool_result(ToolResult("a", writes[1].pk, error="not now"), CALLER)
    decide(writes[2], Choice(Verdict.REJECT, feedback="no"))
    acceptance.tool_result(ToolResult("a", writes[3].pk, "text"), CALLER)
    running = run(Turn.objects.get(session="a"))
    act(running, wanted("switch_mode", {"mode": "debug"}), spent=spent("architect", 30))
    complete(running, spent=spent("debug", 10))
    make_session("b", agent="debug")
    commands = make_calls(Session.objects.get(pk="b"), wanted("execute_command"), wanted("execute_command"))
    acceptance.tool_result(ToolResult("b", commands[0].pk, "ok"), CALLER)
    acceptance.user_message(UserMessage("b", "never mind"), CALLER)
    fail(run(Turn.objects.get(session="b", position=2)), spent=spent("debug", 25, error="model_timeout"))
    make_waiting_call(make_session("c"), "create_directory")


def spent(agent: str, ms: int, error: str = "") -> Spent:
    return Spent(agent, "demo", "answer", ms, 7, 3, 10, has_tool_calls=agent == "architect", error=error)


def test_metrics_count_what_happened() -> None:
    make_scripted_facts()

    shown = figures.metrics(1)

    assert shown["metrics"] == {
        "agent_switches": {"architect_to_debug": 1},
        "agent_processing": {
            "architect": {"count": 1, "total_duration_ms": 30, "success_count": 1, "failure_count": 0},
            "debug": {"count": 2, "total_duration_ms": 35, "success_count": 1, "failure_count": 1},
        },
        "tool_executions": {
            "write_file": {"requested": 3, "completed": 1, "failed": 1, "requires_approval": 3},
            "read_file": {"requested": 1, "completed": 1, "failed": 0, "requires_approval": 0},
            "execute_command": {"requested": 3, "completed": 1, "failed": 1, "requires_approval": 2},
            "switch_mode": {"requested": 1, "completed": 1, "failed": 0, "requires_approval": 0},
            "create_directory": {"requested": 1, "completed": 0, "failed": 0, "requires_approval": 1},
        },
        "hitl_decisions": {
            "write_file": {"APPROVE": 1, "EDIT": 1, "REJECT": 1},
            "execute_command": {"APPROVE": 1, "EDIT": 0, "REJECT": 0},
        },
        "errors": {"debug": {"model_timeout": 1}},
    }
    assert shown["computed"] == {
        "architect_avg_duration_ms": 30.0,
        "debug_avg_duration_ms": 17.5,
        "write_file_success_rate": 0.5,
        "read_file_success_rate": 1.0,
        "execute_command_success_rate": 0.5,
        "switch_mode_success_rate": 1.0,
        "create_directory_success_rate": 0.0,
    }
    assert datetime.fromisoformat(shown["timestamp"]).tzinfo is not None


def test_metrics_of_nothing_have_every_key() -> None:
    shown = figures.metrics(1)

    assert shown["metrics"] == dict.fromkeys(
        ["agent_switches", "agent_processing", "tool_executions", "hitl_decisions", "errors"], {}
    )
    assert shown["computed"] == {}


def test_a_rate_has_three_digits_and_is_zero_while_nothing_has_ended() -> None:
    first, second, third, fourth = make_calls(make_session(), *[wanted("read_file")] * 3, wanted("list_files"))
    acceptance.tool_result(ToolResult("s", first.pk, "one"), CALLER)
    acceptance.tool_result(ToolResult("s", second.pk, "two"), CALLER)
    acceptance.tool_result(ToolResult("s", third.pk, error="three"), CALLER)

    assert figures.metrics(1)["computed"] == {"read_file_success_rate": 0.667, "list_files_success_rate": 0.0}


def test_another_account_has_its_own_figures() -> None:
    make_scripted_facts()

    assert figures.metrics(2)["metrics"]["tool_executions"] == {}
    assert figures.audit_log(2, session_id=None, event_type=None, limit=100)["audit_log"] == []


COMMON = {"timestamp", "event_type", "event_id", "session_id", "correlation_id"}
EXTRA = {
    "agent_switched": {"from_agent", "to_agent", "reason", "confidence"},
    "hitl_decision_made": {"call_id", "decision", "tool_name", "original_args", "modified_args"},
    "agent_error": {"agent", "error_message", "error_type"},
    "tool_execution_failed": {"tool_name", "call_id", "error_message", "error_type"},
    "tool_approval_required": {"tool_name", "call_id", "reason", "arguments"},
}


def audit_log(session_id: str | None = None, event_type: str | None = None, limit: int = 1000) -> list[dict[str, Any]]:
    shown = figures.audit_log(1, session_id=session_id, event_type=event_type, limit=limit)
    assert shown["count"] == len(shown["audit_log"])
    assert shown["filters"] == {"session_id": session_id, "event_type": event_type, "limit": limit}
    return list(shown["audit_log"])


@pytest.mark.parametrize("kind", EXTRA)
def test_an_entry_of_the_log_has_exactly_the_keys_of_its_kind(kind: str) -> None:
    make_scripted_facts()

    entries = audit_log(event_type=kind)

    assert entries
    assert all(set(entry) == COMMON | EXTRA[kind] for entry in entries)
    assert all(entry["event_type"] == kind for entry in entries)
    assert all(uuid.UUID(entry["event_id"]) and uuid.UUID(entry["correlation_id"]) for entry in entries)
    assert entries == [entry for entry in audit_log() if entry["event_type"] == kind]


def test_the_log_tells_what_was_asked_decided_and_failed() -> None:
    make_scripted_facts()

    asked = audit_log("a", "tool_approval_required")[0]
    assert (asked["tool_name"], asked["arguments"]) == ("write_file", FITTING["write_file"])
    assert asked["reason"] == "File modification requires user approval"
    decisions = audit_log("a", "hitl_decision_made")
    assert [entry["decision"] for entry in decisions] == ["approve", "edit", "reject"]
    assert [entry["modified_args"] for entry in decisions] == [None, OTHER_ARGUMENTS, None]
    assert all(entry["original_args"] == FITTING["write_file"] for entry in decisions)
    assert [entry["decision"] for entry in audit_log("b", "hitl_decision_made")] == ["approve", "superseded"]
    failed = audit_log("a", "tool_execution_failed")
    assert [(entry["tool_name"], entry["error_type"]) for entry in failed] == [
        ("execute_command", "tool_not_allowed"),
        ("write_file", "error"),
    ]
    assert "not now" in failed[1]["error_message"]
    (switched,) = audit_log("a", "agent_switched")
    assert (switched["from_agent"], switched["to_agent"], switched["confidence"]) == ("architect", "debug", "medium")
    (error,) = audit_log("b", "agent_error")
    assert (error["agent"], error["error_message"], error["error_type"]) == ("debug", "Too slow.", "model_timeout")


def test_the_log_shows_the_last_entries_oldest_first() -> None:
    make_scripted_facts()

    assert audit_log(limit=3) == audit_log()[-3:]
    assert [entry["timestamp"] for entry in audit_log()] == sorted(entry["timestamp"] for entry in audit_log())
    assert audit_log(event_type="hitl.decision.made") == [], "its own names, not those of the events"
    assert audit_log("nobody") == []


def test_the_figures_of_a_session_are_those_of_its_model_steps() -> None:
    make_scripted_facts()

    shown = figures.session_metrics(1, "a")

    assert {key: value for key, value in shown.items() if key != "requests"} == {
        "session_id": "a",
        "total_requests": 2,
        "successful_requests": 2,
        "failed_requests": 0,
        "total_duration_ms": 40,
        "average_duration_ms": 20.0,
        "total_prompt_tokens": 14,
        "total_completion_tokens": 6,
        "total_tokens": 20,
        "average_tokens_per_request": 10.0,
        "requests_with_tools": 1,
    }
    failed = figures.session_metrics(1, "b")
    assert (failed["total_requests"], failed["failed_requests"], failed["total_tokens"]) == (1, 1, 0)
    assert failed["requests"][0]["error"] == "model_timeout"
    assert Turn.objects.get(session="a").usage == {"prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20}
    assert figures.sessions_with_metrics(1) == {"sessions": ["a", "b"], "count": 2}


def test_a_request_is_read_as_it_stands() -> None:
    call = make_waiting_call(make_session())

    shown = get(ApprovalView, call_id=call.pk)

    assert (shown["status"], shown["decision"], shown["decided_at"]) == ("pending", None, None)
    assert shown["args_hash"] == call.args_hash
    assert StreamBatch.objects.unnumbered().count() == 0


def test_a_rejection_is_no_report_of_an_execution() -> None:
    call = make_waiting_call(make_session())

    acceptance.tool_result(ToolResult("s", call.pk, error="User rejected: no", args_hash="0" * 64), CALLER)

    assert [entry.action for entry in AuditEntry.objects.all()] == ["approval.reject"]
    assert tool_messages()[0]["content"] == "Error: User rejected: no"


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_what_was_changed_behind_the_back_of_its_request_is_not_shown_to_those_who_execute(tampering: str) -> None:
    changed, kept = make_calls(make_session(), wanted(), wanted())
    model, changes = TAMPERINGS[tampering]
    model.objects.filter(pk=changed.pk if model is ToolCall else changed.approval.pk).update(**changes)

    shown = get(PendingApprovalsView, session_id="s")

    assert [approval["call_id"] for approval in shown["pending_approvals"]] == [kept.pk]
    assert shown["count"] == 1


def test_the_failure_of_an_edited_call_is_recorded_in_the_words_of_its_client() -> None:
    call = make_waiting_call(make_session())
    decide(call, EDIT)

    acceptance.tool_result(ToolResult("s", call.pk, error="not now"), CALLER)

    assert facts("tool.execution.failed")[-1]["error_message"] == "not now"
    assert json.loads(tool_messages()[0]["content"])["result"] == "Error: not now"

"""Approval requests and the one way in which they end (guarantees 3.3).

Everybody who decides, over whatever path, goes through `decide`, with the lock of the session's row held: the decision,
its audit entry, what it does to the call and the requeue of the turn are one transaction.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.utils import timezone

from agents_app import server_tools
from agents_app.binding import args_hash, canonical
from agents_app.llm import ModelError
from agents_app.models import ApprovalRequest, ApprovalRule, Decision
from agents_app.policy import Outcome as Ruled
from agents_app.policy import Ruling
from agents_app.team import Team, UnknownToTeam
from agents_app.tools import CallRefused
from events_app import log
from events_app.chunks import ApprovalResolved, Chunk, ErrorShown, TurnFinished
from events_app.log import Fact
from orchestrator_site.errors import Conflict, Forbidden, Invalid, NotFound
from orchestrator_site.http import wire_time
from sessions_app import lifecycle
from sessions_app.callers import Caller
from sessions_app.models import Session, ToolCall, Turn, TurnMoved

logger = logging.getLogger(__name__)

Verdict = Decision.Verdict
Outcome = ToolCall.Outcome
# What a person says; every other verdict is what happens to a request.
BY_A_PERSON = (Verdict.APPROVE, Verdict.EDIT, Verdict.REJECT)
STATUS = {
    Verdict.APPROVE: ApprovalRequest.Status.APPROVED,
    Verdict.EDIT: ApprovalRequest.Status.EDITED,
    Verdict.REJECT: ApprovalRequest.Status.REJECTED,
    Verdict.SUPERSEDED: ApprovalRequest.Status.SUPERSEDED,
    Verdict.CANCELLED: ApprovalRequest.Status.CANCELLED,
}
ERROR_CHARS = 2_000
MAX_FEEDBACK_CHARS = 10_000
EXECUTED_OTHERWISE = "The client reports that it executed other arguments than those that were released."
NO_FEEDBACK = "User rejected this operation"
CLOSED = {
    Verdict.SUPERSEDED: (Outcome.SUPERSEDED, "The user sent a new message before this call had a result."),
    Verdict.CANCELLED: (Outcome.CANCELLED, "The turn was ended before this call had a result."),
}


class UnknownApproval(NotFound):
    code = "unknown_call"


class AlreadyDecided(Conflict):
    code = "already_decided"

    def __init__(self, request: ApprovalRequest) -> None:
        made = getattr(request, "decision", None)
        if made is None:  # a row that somebody damaged is no reason to fail
            super().__init__("Already decided.")
            return
        super().__init__(f"Already decided ({made.verdict}) by {made.decided_by} at {wire_time(made.decided_at)}.")
        self.more = {
            "decision": made.verdict,
            "decided_by": made.decided_by,
            "decided_at": wire_time(made.decided_at),
        }


class ArgumentsChanged(Conflict):
    """The decision was made on other arguments than those that would run."""

    code = "arguments_changed"


class ArgumentsTampered(ArgumentsChanged):
    """The stored arguments are no longer those that were hashed when the request was made."""


class PolicyChanged(Conflict):
    """The call may not be made any more, whoever approves it."""

    code = "policy_changed"


class SelfApprovalForbidden(Forbidden):
    code = "self_approval_forbidden"


class EditRefused(Invalid):
    """The edited arguments may not run: they break the tool's schema, the agent's paths or the rules."""


# Refusals that an auditor wants to know of. Losing a race is none.
AUDITED = (ArgumentsChanged, PolicyChanged, SelfApprovalForbidden, EditRefused)


@dataclass(frozen=True, slots=True)
class Choice:
    """What somebody wants to become of a request. `args_hash`: of the arguments that were looked at, if told;
    `considered_ms`: for how long, where that is known.
    """

    verdict: Verdict
    arguments: dict[str, Any] | None = None
    feedback: str | None = None
    args_hash: str | None = None
    considered_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call that was executed, as text; the note is for the model."""

    text: str
    outcome: Outcome
    note: str = ""


def request(call: ToolCall, ruling: Ruling) -> ApprovalRequest:
    """Have a stored call wait for a person."""
    # The rule may be one of the time when the turn began, and gone since; what it said is kept here.
    rule = ApprovalRule.objects.kept(ruling.rule.pk) if ruling.rule else None
    return ApprovalRequest.objects.create(
        call=call,
        session_id=call.session_id,
        tool_name=call.tool_name,
        arguments_text=call.arguments_text,
        args_hash=call.args_hash,
        rule=rule,
        reason=ruling.reason,
        self_approval=ruling.self_approval,
    )


def one_visible_to(caller: Caller, call_id: str) -> ApprovalRequest:
    """The request with its call and decision. Raises UnknownApproval, also for a stranger's."""
    found = ApprovalRequest.objects.visible_to(caller).select_related("call", "decision")
    approval = found.filter(call_id=call_id).first()
    if approval is None:
        raise UnknownApproval(f"No approval request {call_id}")
    return approval


def decide_by_id(caller: Caller, call_id: str, choice: Choice) -> ApprovalRequest:
    """Decide on a request by its id alone; the request as it is then. Raises UnknownApproval and what `decide` does."""
    found = one_visible_to(caller, call_id)
    with recording_refusals(caller, found.call):
        return decide_on(found, choice, caller)


def decide_on(found: ApprovalRequest, choice: Choice, by: Caller) -> ApprovalRequest:
    """The same for one that was found already, without recording what is refused."""
    # Of many who decide at once, those who come too late need not queue up for the lock.
    ensure_pending(found)
    with transaction.atomic():
        session = lifecycle.locked_for(by, found.session_id)
        decide(session, of_call(session, found.call_id), choice, by)
        return ApprovalRequest.objects.select_related("call", "decision").get(pk=found.pk)


def of_call(session: Session, call_id: str) -> ApprovalRequest:
    """A session's request, read under the session's lock."""
    return session.approvals.select_related("call__turn").get(call_id=call_id)


def ensure_pending(approval: ApprovalRequest) -> None:
    if approval.status != ApprovalRequest.Status.PENDING:
        raise AlreadyDecided(approval)


def decide(
    session: Session, approval: ApprovalRequest, choice: Choice, by: Caller, *, result: Result | None = None
) -> bool:
    """Settle a request, and say so on the session's stream. Returns whether the turn goes on by it.

    Approve and edit release the call, to its client or to the server; reject, supersede and cancel answer it.
    `result`: the one that a client sent for a call that still waited, which is a decision as well. The caller holds the
    session's lock.

    Raises AlreadyDecided, ArgumentsChanged, SelfApprovalForbidden, PolicyChanged, EditRefused, with nothing written.
    """
    call = approval.call
    ensure_pending(approval)
    if choice.verdict in BY_A_PERSON:
        _ensure_may_decide(approval, choice, by)
    edited_text = canonical(choice.arguments) if choice.arguments is not None else ""
    hash_after = _hash_of(call, edited_text) if edited_text else approval.args_hash
    settled = ApprovalRequest.objects.pending().filter(pk=approval.pk, args_hash=approval.args_hash)
    if not settled.update(status=STATUS[choice.verdict]):
        ensure_pending(ApprovalRequest.objects.get(pk=approval.pk))
        raise ArgumentsChanged("The request has changed while it was being decided on.")
    made = Decision.objects.create(
        request=approval,
        verdict=choice.verdict,
        decided_by=by.name,
        channel=by.channel,
        feedback=choice.feedback or "",
        edited_text=edited_text,
        args_hash=hash_after,
        decided_at=timezone.now(),
    )
    _write_down(session, approval, made, by, choice, implicit=result is not None)
    chunks = [_resolved(call, made), *_carry_out(session, call, made, result)]
    goes_on = choice.verdict in BY_A_PERSON and call.turn.go_on()
    closes = choice.verdict in BY_A_PERSON and not goes_on
    lifecycle.emit(session, *chunks, origin=str(call.turn_id), closes=closes)
    if goes_on:
        lifecycle.wake_runner(session.pk)
    return goes_on


def close_calls(session: Session, turn: Turn, verdict: Verdict, by: Caller) -> None:
    """Answer every open call of a turn that ends: superseded or cancelled. The caller holds the session's lock."""
    for call in turn.calls.open().in_order():
        if call.status == ToolCall.Status.WAITING:
            decide(session, of_call(session, call.pk), Choice(verdict), by)
        else:
            if call.begun_at is not None or call.status == ToolCall.Status.IN_DOUBT:
                # Nobody will learn any more whether it took effect: let it be known that this was so.
                log.audit(
                    by,
                    "call.left_in_doubt",
                    session_id=session.pk,
                    target=call.pk,
                    tool_name=call.tool_name,
                    verdict=verdict,
                )
            call.answer_with(*closing(call.tool_name, verdict, has_begun=call.begun_at is not None))


def answer(session: Session, call: ToolCall, result: Result) -> None:
    """Give a call the result that was reported for it, and record how it went."""
    call.answer_with(result_text(call, result), result.outcome)
    log.record(executed(session, call, result.text))


def executed(session: Session, call: ToolCall, text: str) -> Fact:
    """The fact that a call ended, with a result or with an error in `text`."""
    named = {"tool_name": call.tool_name, "call_id": call.pk}
    if call.outcome == Outcome.OK:
        return lifecycle.fact(session, "tool.execution.completed", turn_id=call.turn_id, **named)
    failure = {"error_message": text.removeprefix("Error: ")[:ERROR_CHARS], "error_type": call.outcome, **named}
    return lifecycle.fact(session, "tool.execution.failed", turn_id=call.turn_id, **failure)


@contextmanager
def recording_refusals(by: Caller, call: ToolCall) -> Iterator[None]:
    """Around the transaction that decides: what it refuses is written down after it was rolled back."""
    try:
        yield
    except AUDITED as refusal:
        with transaction.atomic():
            log.audit(
                by,
                "approval.decide",
                session_id=call.session_id,
                target=call.pk,
                tool_name=call.tool_name,
                reason=refusal.message,
                refused=True,
                code=refusal.code,
            )
            if isinstance(refusal, ArgumentsTampered):
                _fail_turn(call)
        raise


def result_text(call: ToolCall, result: Result) -> str:
    """What the model reads of a result: of an edited call with what was really executed (protocol 5)."""
    if not call.released_text:
        return f"{result.text}\n\n{result.note}" if result.note else result.text
    edited = {"status": "approved_with_edits", "tool_name": call.tool_name, "arguments": call.final_arguments}
    note = {"note": result.note} if result.note else {}
    return json.dumps({**edited, "result": result.text, **note}, ensure_ascii=False)


def rejected_text(tool_name: str, feedback: str | None) -> str:
    """What the model reads of a rejection (protocol 5)."""
    return json.dumps(
        {"status": "rejected", "tool_name": tool_name, "feedback": feedback or NO_FEEDBACK}, ensure_ascii=False
    )


def closing(tool_name: str, verdict: Verdict, *, has_begun: bool = False) -> tuple[str, Outcome]:
    """What the model reads of a call that is superseded or cancelled, perhaps after the server began to execute it."""
    outcome, message = CLOSED[verdict]
    if has_begun:
        message = f"{message} {server_tools.UNKNOWN}"
    return json.dumps({"status": verdict, "tool_name": tool_name, "message": message}, ensure_ascii=False), outcome


def _ensure_may_decide(approval: ApprovalRequest, choice: Choice, by: Caller) -> None:
    call = approval.call
    current = _hash_of(call, call.arguments_text)
    shown = (approval.args_hash, approval.arguments_text, approval.tool_name)
    if shown != (current, call.arguments_text, call.tool_name):
        raise ArgumentsTampered("The stored arguments are not those that were asked for.")
    if choice.args_hash is not None and choice.args_hash != current:
        raise ArgumentsChanged("These are not the arguments that wait.")
    if not approval.self_approval and not by.is_operator:
        raise _not_by_oneself()
    if choice.verdict == Verdict.REJECT:
        return
    if choice.arguments is not None:
        ruling = judge_edit(call, choice.arguments)
    else:
        try:
            ruling = _judge_again(call, call.arguments)
        except CallRefused as refused:
            raise PolicyChanged(refused.message) from None
    # A rule that has become stricter holds for what waits already.
    if ruling.outcome == Ruled.ASK and not ruling.self_approval and not by.is_operator:
        raise _not_by_oneself()


def _not_by_oneself() -> SelfApprovalForbidden:
    return SelfApprovalForbidden("Somebody else has to decide on this call.")


def judge_edit(call: ToolCall, arguments: dict[str, Any]) -> Ruling:
    """What the rules say of other arguments for a waiting call. Raises EditRefused when they may not run."""
    try:
        return _judge_again(call, arguments)
    except CallRefused as refused:
        raise EditRefused(refused.message, "body", "modified_arguments", *refused.path, kind=refused.code) from None


def _judge_again(call: ToolCall, arguments: dict[str, Any]) -> Ruling:
    """What was true when the call was asked for may have changed. Raises CallRefused."""
    try:
        toolbox = Team.now().toolbox(call.agent)
    except UnknownToTeam:
        raise CallRefused("tool_not_allowed", "The agent that asked for this is gone.") from None
    tool = toolbox.tool_named(call.tool_name)
    if tool.version != call.tool_version:
        raise CallRefused("tool_changed", f"{tool.name} is not the tool any more that was asked for.")
    return toolbox.judge(tool, arguments)


def is_sound(call: ToolCall, approval: ApprovalRequest | None = None) -> bool:
    """Whether the arguments that are about to be shown or executed are those that were hashed when they came to be."""
    stored = call.released_text or call.arguments_text
    sound = call.args_hash == _hash_of(call, stored)
    if approval is not None:
        shown = (approval.args_hash, approval.arguments_text, approval.tool_name)
        sound = sound and shown == (call.args_hash, call.arguments_text, call.tool_name)
    if not sound:
        logger.error("arguments_tampered", extra={"call_id": call.pk, "session_id": call.session_id})
    return sound


def _hash_of(call: ToolCall, text: str) -> str:
    return args_hash(call.session_id, call.pk, call.tool_name, call.tool_version, text)


def _write_down(
    session: Session, approval: ApprovalRequest, made: Decision, by: Caller, choice: Choice, *, implicit: bool
) -> None:
    """The audit entry and the fact. `implicit`: told by a result, not by a decision."""
    call = approval.call
    considered: dict[str, Any] = {} if choice.considered_ms is None else {"considered_ms": choice.considered_ms}
    log.audit(
        by,
        f"approval.{made.verdict}",
        session_id=session.pk,
        target=call.pk,
        reason=made.feedback,
        tool_name=call.tool_name,
        args_hash_before=approval.args_hash,
        args_hash_after=made.args_hash,
        modified_arguments=made.edited_arguments,
        implicit=implicit,
        **considered,
    )
    log.record(
        lifecycle.fact(
            session,
            "hitl.decision.made",
            turn_id=call.turn_id,
            call_id=call.pk,
            decision=made.verdict,
            tool_name=call.tool_name,
            original_args=call.arguments,
            modified_args=made.edited_arguments,
            decided_by=by.name,
            feedback=made.feedback or None,
            implicit=implicit,
        )
    )


def _resolved(call: ToolCall, made: Decision) -> ApprovalResolved:
    edited = made.edited_arguments
    return ApprovalResolved(
        call.pk,
        made.verdict,
        call.arguments if edited is None else edited,
        made.args_hash,
        made.feedback or None,
        made.decided_by,
        wire_time(made.decided_at),
    )


def _carry_out(session: Session, call: ToolCall, made: Decision, result: Result | None) -> list[Chunk]:
    """What the decision does to the call, and the chunks that its execution by the server adds."""
    if made.verdict == Verdict.REJECT:
        text = result.text if result is not None else rejected_text(call.tool_name, made.feedback)
        call.answer_with(text, Outcome.REJECTED)
        return []
    if made.verdict not in BY_A_PERSON:
        call.answer_with(*closing(call.tool_name, Verdict(made.verdict)))
        return []
    call.release(args_hash=made.args_hash, edited_text=made.edited_text)
    log.record(
        lifecycle.fact(
            session, "tool.execution.started", turn_id=call.turn_id, tool_name=call.tool_name, call_id=call.pk
        )
    )
    if result is not None:
        answer(session, call, result)
    elif (tool := server_tools.step_tool_named(call.tool_name)) is not None:
        try:
            done = tool.perform(session, call.turn, call.final_arguments, call.agent)
        except ModelError as error:
            done = server_tools.Performed(f"Error: {error.message}", Outcome.ERROR)
        answer(session, call, Result(done.text, done.outcome))
        return list(done.chunks)
    return []


def system(session: Session) -> Caller:
    """Who the records name where the server itself ends something."""
    return Caller(session.account_id, "system", "system")


def _fail_turn(call: ToolCall) -> None:
    """End the turn of a call whose arguments somebody changed behind the back of its request."""
    session = Session.objects.locked().get(pk=call.session_id)
    turn = Turn.objects.get(pk=call.turn_id)
    if turn.status != Turn.Status.WAITING:
        return
    close_calls(session, turn, Verdict.CANCELLED, system(session))
    if not turn.end_unheld(Turn.Status.FAILED, ArgumentsChanged.code):
        raise TurnMoved(f"{turn} moved on while it was being failed")
    lifecycle.emit(
        session,
        ErrorShown("The arguments of a waiting tool call were changed. It was not released.", ArgumentsChanged.code),
        TurnFinished(str(turn.pk), Turn.Status.FAILED, ArgumentsChanged.code, turn.usage),
        origin=str(turn.pk),
    )
    lifecycle.wake_runner(session.pk)

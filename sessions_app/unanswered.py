"""Calls that get no result: ended at their deadline by the clock, given up by an operator, or executed again.

Nobody knows whether such a call was executed. The model is told so and goes on; a result that comes after all changes
nothing.
"""

import json
import logging

from django.db import InterfaceError, OperationalError, transaction

from events_app import log
from events_app.chunks import ErrorShown
from sessions_app import lifecycle
from sessions_app.callers import Caller
from sessions_app.models import CallMoved, Session, ToolCall

logger = logging.getLogger(__name__)

SESSIONS_AT_ONCE = 100
MAX_REASON_CHARS = 2_000
# What the errors of such calls are known by, in facts and on streams.
TIMED_OUT, GIVEN_UP = "tool_timed_out", "tool_given_up"
CODES = {ToolCall.Outcome.TIMED_OUT: TIMED_OUT, ToolCall.Outcome.IN_DOUBT: GIVEN_UP}
UNKNOWN = "Whether the call was executed is not known."


def end_overdue() -> int:
    """End the calls whose deadline has passed, of at most SESSIONS_AT_ONCE sessions; of how many it was done.

    A session that cannot be worked with must not keep the others waiting.
    """
    overdue = ToolCall.objects.overdue().order_by().values_list("session_id", flat=True).distinct()
    ended = 0
    for session_id in list(overdue[:SESSIONS_AT_ONCE]):
        try:
            ended += _end_overdue_in(session_id)
        except (OperationalError, InterfaceError):
            raise
        except Exception:
            logger.exception("overdue_calls_not_ended", extra={"session_id": session_id})
    return ended


@transaction.atomic
def _end_overdue_in(session_id: str) -> bool:
    """End those of one session; False when somebody was faster: its client, or another process."""
    session = Session.objects.locked().get(pk=session_id)
    # Looked for again: what was found before the lock may have its answer by now.
    calls = list(session.calls.overdue().select_related("turn").in_order())
    for call in calls:
        message = f"No result of {call.tool_name} came within {call.deadline_seconds} s. {UNKNOWN}"
        _answer(session, call, ToolCall.Outcome.TIMED_OUT, message)
    if calls:
        _go_on(session, calls[-1])
        logger.warning("calls_timed_out", extra={"session_id": session_id, "calls": len(calls)})
    return bool(calls)


@transaction.atomic
def give_up(by: Caller, call: ToolCall, reason: str) -> None:
    """End a call that nobody will ever answer, for a reason that the model reads.

    Raises CallMoved when it waits for a decision, is being executed here or has its answer, UnknownSession for another
    account's.
    """
    session = lifecycle.locked_for(by, call.session_id)
    call = session.calls.select_related("turn").get(pk=call.pk)
    if not call.may_be_given_up:
        raise CallMoved(why_not(call))
    log.audit(by, "call.given_up", session_id=session.pk, target=call.pk, tool_name=call.tool_name, reason=reason)
    message = f"No result of {call.tool_name} came, and an operator ended the wait. {UNKNOWN}"
    _answer(session, call, ToolCall.Outcome.IN_DOUBT, message, reason=reason)
    _go_on(session, call)


@transaction.atomic
def execute_again(by: Caller, call: ToolCall, reason: str) -> None:
    """Have the server execute a call in doubt once more, under the same key.

    Raises CallMoved when it is not in doubt any more, UnknownSession for another account's.
    """
    session = lifecycle.locked_for(by, call.session_id)
    call = session.calls.select_related("turn").get(pk=call.pk)
    if call.status != ToolCall.Status.IN_DOUBT:
        raise CallMoved(why_not(call))
    log.audit(by, "call.executed_again", session_id=session.pk, target=call.pk, tool_name=call.tool_name, reason=reason)
    call.release_again()
    _go_on(session, call)


def why_not(call: ToolCall) -> str:
    """Why a call is neither given up nor executed again."""
    if not call.is_open:
        return "The call has its answer already."
    if call.status == ToolCall.Status.WAITING:
        return "The call waits for a decision."
    return "The call is being executed." if call.on_server else "The call waits for its client's result."


def _answer(session: Session, call: ToolCall, outcome: ToolCall.Outcome, message: str, **more: str) -> None:
    """Close the call in a result's place, record it and say it; the caller holds the session's lock."""
    told = {"status": outcome, "tool_name": call.tool_name, "message": message, **more}
    call.answer_with(json.dumps(told, ensure_ascii=False), outcome)
    named, code = {"tool_name": call.tool_name, "call_id": call.pk}, CODES[outcome]
    failed = {"error_message": message, "error_type": code, **named}
    log.record(lifecycle.fact(session, "tool.execution.failed", turn_id=call.turn_id, **failed))
    # It ends no answer: the turn's last one ended when it began to wait.
    shown = ErrorShown(message, code, {"call_id": call.pk})
    lifecycle.emit(session, shown, origin=str(call.turn_id), closes=False)


def _go_on(session: Session, call: ToolCall) -> None:
    """Have the turn go on when a runner has something to do; open calls of a session are of one turn."""
    if call.turn.go_on():
        lifecycle.wake_runner(session.pk)

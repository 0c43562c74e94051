"""Storing what a client sent, in one transaction, before anything is said about it."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from django.conf import settings
from django.db import InterfaceError, OperationalError, transaction

from agents_app import approvals, handoffs
from agents_app.approvals import (
    MAX_FEEDBACK_CHARS,
    AlreadyDecided,
    ArgumentsChanged,
    Choice,
    EditRefused,
    Outcome,
    PolicyChanged,
    Result,
    SelfApprovalForbidden,
    Verdict,
)
from agents_app.server_tools import NO_RESULT
from events_app import ids, log
from events_app.chunks import ErrorShown
from events_app.frames import Frame
from events_app.models import AuditEntry
from messages_app import claims, ending
from messages_app.claims import Begun
from messages_app.inbound import Busy, HitlDecision, SwitchAgent, ToolResult, UserMessage
from messages_app.models import Message, say
from messages_app.turn_stream import BLOCK
from orchestrator_site.errors import Conflict, TooMany
from sessions_app import following, idempotency, lifecycle
from sessions_app.callers import Caller
from sessions_app.idempotency import Key
from sessions_app.models import Session, ToolCall, Turn, turn_opened, turn_stored, unfinished_turns

logger = logging.getLogger(__name__)

TITLE_CHARS = 500
DECISIONS = {"approve": Verdict.APPROVE, "edit": Verdict.EDIT, "reject": Verdict.REJECT}
# How clients begin the error of a call that their user did not want (protocol 5).
REJECTIONS = ("User rejected", "Операция отклонена")
# Of one call so many results that came late or again are written down: a client that repeats itself for ever must not
# fill the audit log.
LATE_RESULTS_KEPT = 20
LATE_RESULT = "call.late_result"


class QueueFull(TooMany):
    code = "queue_full"


class TurnRunning(Conflict):
    code = "turn_running"


class Refused(Exception):
    """A refusal that the contract puts into the stream, for this request alone; nothing was stored."""

    def __init__(self, message: str, code: str, **metadata: Any) -> None:
        super().__init__(code)
        self.chunk = ErrorShown(message, code, metadata)


@dataclass(frozen=True, slots=True)
class Accepted:
    """Where the answer is to be looked for: the session's stream past number `after`, frames of `origin`, if any.

    `lost` is shown in its place when a message is repeated whose answer was pruned. `begins` says that a turn begins as
    soon as this process comes to it, `is_new` that all of this was done just now.
    """

    session_id: str
    origin: str = ""
    after: int = 0
    has_frames: bool = True
    lost: Frame | None = None
    begins: bool = False
    is_new: bool = field(default=False, compare=False)


class CannotBegin(Exception):
    """A new turn cannot be claimed, whatever the reason: whoever claims what is queued will see to it."""


class Taker(Protocol):
    """A runner that has a place for one more turn, and begins it as soon as it is stored."""

    owner: str
    is_stopping: bool

    def take_new(self, begun: Begun) -> None:
        """After the commit, from any thread."""

    def abandon(self, begun: Begun) -> None:
        """It may have been stored or not: to be released if it was. From any thread."""


# What is stored under a key. An older version of this program answers repeated requests with it too, and knows no more.
KEPT = ("session_id", "origin", "after", "has_frames", "lost", "begins")


def user_message(
    message: UserMessage, caller: Caller, key: Key | None = None, *, taker: Taker | None = None
) -> Accepted:
    """Store the message and the turn that it opens: claimed by `taker` if it may begin at once, queued otherwise.

    A turn that waits is superseded by it.

    Raises UnknownAgent, UnknownSession for another account's session, QueueFull, TurnRunning, KeyReused.
    """
    claimed: list[Begun] = []
    try:
        return _once(key, partial(_open_turn, message, caller, taker, claimed))
    except CannotBegin:
        return _once(key, partial(_open_turn, message, caller, None, claimed))
    except (OperationalError, InterfaceError):
        if taker is not None and claimed:
            taker.abandon(claimed[-1])
        raise


@transaction.atomic
def _open_turn(message: UserMessage, caller: Caller, taker: Taker | None, claimed: list[Begun]) -> Accepted:
    if message.agent_type is not None:
        handoffs.ensure_known(message.agent_type)
    session = lifecycle.locked_or_created(caller, message.session_id)
    unfinished = _make_way(session, message.busy, caller)
    requested = message.agent_type or ""
    if requested and session.turn_count == 0 and session.switch_count == 0:
        # A session that has had nothing yet starts on the agent asked for, without a handoff (section 4, row 3).
        Session.objects.filter(pk=session.pk).update(current_agent=requested)
        session.current_agent, requested = requested, ""
    turn = Turn(pk=ids.in_order(), session=session, position=session.turn_count + 1, requested_agent=requested)
    turn_stored.instance(turn)
    say(turn, Message.Role.USER, message.content)
    title = session.title if session.title is not None else message.content.strip()[:TITLE_CHARS]
    # Whoever sent it may have left since, and a runner that stops waits no longer for what is stored.
    if unfinished or (taker is not None and taker.is_stopping):
        taker = None
    numbers = BLOCK if taker is not None else 0
    turn_opened(id=session.pk, turn_count=turn.position, title=title, numbers=numbers)
    log.record(lifecycle.fact(session, "session.message.added", turn_id=turn.pk, role="user", sent_by=caller.name))
    after = lifecycle.position(session) if unfinished else session.next_seq - 1
    if unfinished:
        return Accepted(session.pk, str(turn.pk), after)  # the end of the turn before it lets it run
    if taker is not None:
        claimed.append(_claimed(turn, taker))
        transaction.on_commit(partial(_hand_over, turn, claimed[-1], taker))
    else:
        lifecycle.wake_runner(session.pk)
    return Accepted(session.pk, str(turn.pk), after, begins=settings.TURN_RUNNER == "embedded")


def _claimed(turn: Turn, taker: Taker) -> Begun:
    try:
        return claims.claim_new(turn, taker.owner)
    except (OperationalError, InterfaceError):
        raise
    except Exception as error:
        logger.exception("claim_failed", extra={"turns": 1})
        raise CannotBegin from error


def _hand_over(turn: Turn, begun: Begun, taker: Taker) -> None:
    claims.find_openings([turn], [begun])
    taker.take_new(begun)


def _make_way(session: Session, busy: Busy, caller: Caller) -> list[Turn]:
    """The turns that a new message goes behind, when what it replaces has been ended. Raises QueueFull, TurnRunning."""
    unfinished = sorted(unfinished_turns(session=session.pk), key=lambda turn: turn.position)
    if unfinished and unfinished[0].status == Turn.Status.WAITING:
        ending.supersede(session, unfinished.pop(0), caller)
    if unfinished and busy == Busy.REJECT:
        raise TurnRunning("A turn of this session is queued or running.")
    if unfinished and busy == Busy.INTERRUPT:
        unfinished = ending.interrupt(session, caller)
    # One that is being worked on and TURN_QUEUE_LENGTH behind it.
    if len(unfinished) > settings.TURN_QUEUE_LENGTH:
        raise QueueFull("This session has as many messages waiting as it may.", Retry_After="5")
    return unfinished


def switch_agent(message: SwitchAgent, caller: Caller, key: Key | None = None) -> Accepted:
    """Raises UnknownAgent, UnknownSession for another account's session, KeyReused."""

    def switch() -> Accepted:
        session_id = message.session_id
        after, origin = handoffs.switch_by_message(caller, session_id, message.agent_type, reason=message.reason)
        return Accepted(session_id, origin, after)

    return _once(key, switch)


def tool_result(message: ToolResult, caller: Caller, key: Key | None = None) -> Accepted:
    """Answer the call, or write down what comes too late. On a call that still waits it is a decision as well.

    Raises Refused (section 4, rows 11 and 13), UnknownSession for another account's session, KeyReused.
    """
    call = _call(message.session_id, message.call_id, caller)
    if call is None:
        raise Refused(f"No pending tool call {message.call_id}", "unknown_call")
    if not call.is_open and key is None and _late_results(call) >= LATE_RESULTS_KEPT:
        return Accepted(message.session_id, has_frames=False)  # and a client that loops waits for no lock
    with _deciding(call, caller):
        return _once(key, partial(_take_result, message, call.pk, caller))


@transaction.atomic
def _take_result(message: ToolResult, call_id: str, caller: Caller) -> Accepted:
    session = lifecycle.locked_for(caller, message.session_id)
    call = session.calls.select_related("turn").get(pk=call_id)
    if not call.is_open:
        _write_down_late(session, call, message, caller)
        return Accepted(session.pk, has_frames=False)
    # A client's user may say no to it as long as somebody is asked.
    if call.on_server and not (call.status == ToolCall.Status.WAITING and _is_rejection(message)):
        raise Refused("The server executes this call itself.", "executed_by_server")
    after, origin = lifecycle.position(session), str(call.turn_id)
    if _executed_otherwise(call, message):
        log.audit(
            caller,
            "call.executed_otherwise",
            session_id=session.pk,
            target=call.pk,
            tool_name=call.tool_name,
            released_hash=call.args_hash,
            executed_hash=message.args_hash,
        )
    if call.status == ToolCall.Status.WAITING:
        # Whoever executed it has decided on it: the IDE asks its own user and never sends a decision (protocol 5).
        choice = Choice(Verdict.APPROVE)
        if _is_rejection(message):
            choice = Choice(Verdict.REJECT, feedback=(message.error or "")[:MAX_FEEDBACK_CHARS])
        approval = approvals.of_call(session, call.pk)
        approvals.decide(session, approval, choice, caller, result=_result_of(call, message))
        return Accepted(session.pk, origin, after)
    approvals.answer(session, call, _result_of(call, message))
    goes_on = call.turn.go_on()
    if goes_on:
        lifecycle.wake_runner(session.pk)
    return Accepted(session.pk, origin, after, has_frames=goes_on)


def hitl_decision(message: HitlDecision, caller: Caller, key: Key | None = None) -> Accepted:
    """Raises Refused (section 4, rows 15 to 17, and what `approvals.decide` refuses), EditRefused, UnknownSession,
    KeyReused.
    """
    call = _call(message.session_id, message.call_id, caller)
    verdict = DECISIONS.get(message.decision)
    if verdict is None:
        raise Refused(f"Invalid HITL decision: {message.decision}", "invalid_decision")
    nothing_pending = f"No pending approval found for request_id={message.call_id}"
    if call is None or not call.requires_approval:
        raise Refused(nothing_pending, "unknown_call")
    choice = Choice(verdict, message.modified_arguments, message.feedback, message.args_hash)
    try:
        with _deciding(call, caller):
            return _once(key, partial(_take_decision, call, choice, caller))
    except AlreadyDecided as late:
        raise Refused(nothing_pending, late.code, **late.more) from None


@transaction.atomic
def _take_decision(call: ToolCall, choice: Choice, caller: Caller) -> Accepted:
    session = lifecycle.locked_for(caller, call.session_id)
    after, approval = lifecycle.position(session), approvals.of_call(session, call.pk)
    approvals.decide(session, approval, choice, caller)
    return Accepted(session.pk, str(call.turn_id), after)


def _once(key: Key | None, work: Callable[[], Accepted]) -> Accepted:
    """What `work` accepts; for a message that is repeated under its key, what it has accepted then."""
    if key is None:
        return replace(work(), is_new=True)
    done: list[Accepted] = []

    def once() -> dict[str, Any]:
        done.append(work())
        return {name: value for name, value in asdict(done[-1]).items() if name in KEPT}

    # While a new version is rolled out, the other one may have stored more than this one knows.
    stored = idempotency.once(key, once)
    accepted = Accepted(**{name: value for name, value in stored.items() if name in KEPT})
    if accepted in done:
        return replace(accepted, is_new=True)
    if not accepted.has_frames:
        return accepted
    return replace(accepted, lost=following.lost(key.caller, accepted.session_id, accepted.after))


@contextmanager
def _deciding(call: ToolCall, caller: Caller) -> Iterator[None]:
    """Around the transaction that decides. What `decide` refuses becomes a chunk, but for an edit that does not fit:
    that is bad input like any other.
    """
    try:
        with approvals.recording_refusals(caller, call):
            yield
    except (ArgumentsChanged, PolicyChanged, SelfApprovalForbidden) as refusal:
        raise Refused(refusal.message, refusal.code) from None
    except EditRefused as refusal:
        refusal.detail[0]["loc"].insert(1, "message")  # where the arguments stand in a message of the stream
        raise


def _call(session_id: str, call_id: str, caller: Caller) -> ToolCall | None:
    """A call of this session. Raises UnknownSession for a session that exists and is not the caller's."""
    found = ToolCall.objects.filter(pk=call_id, session__in=Session.objects.visible_to(caller).filter(pk=session_id))
    call = found.first()
    if call is None and Session.objects.filter(pk=session_id).exists():
        Session.objects.one_visible_to(caller, session_id)
    return call


def _late_results(call: ToolCall) -> int:
    return AuditEntry.objects.filter(target=call.pk, action=LATE_RESULT).count()


def _write_down_late(session: Session, call: ToolCall, message: ToolResult, caller: Caller) -> None:
    """A result of a call that has its answer: it came too late, or once more. Of its text only what tells it apart."""
    if _late_results(call) >= LATE_RESULTS_KEPT:
        return
    text = _text_of(message).encode()
    log.audit(
        caller,
        LATE_RESULT,
        session_id=session.pk,
        target=call.pk,
        tool_name=call.tool_name,
        answered_with=call.outcome,
        size=len(text),
        sha256=hashlib.sha256(text).hexdigest(),
    )


def _is_rejection(message: ToolResult) -> bool:
    return message.error is not None and message.error.startswith(REJECTIONS)


def _executed_otherwise(call: ToolCall, message: ToolResult) -> bool:
    if _is_rejection(message):
        return False
    return message.args_hash is not None and message.args_hash != call.args_hash


def _result_of(call: ToolCall, message: ToolResult) -> Result:
    outcome = Outcome.OK if message.error is None else Outcome.ERROR
    note = approvals.EXECUTED_OTHERWISE if _executed_otherwise(call, message) else ""
    return Result(_text_of(message), outcome, note)


def _text_of(message: ToolResult) -> str:
    """Protocol 4, last paragraph."""
    if message.error is not None:
        return f"Error: {message.error}"
    if message.result is None:
        return NO_RESULT
    if isinstance(message.result, str):
        # Providers refuse what is blank.
        return message.result if message.result.strip() else NO_RESULT
    return json.dumps(message.result, ensure_ascii=False)

"""Passing a session to another agent, whoever asks for it."""

import uuid
from dataclasses import replace
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F

from agents_app.llm import ModelError
from agents_app.models import Agent
from agents_app.server_tools import Performed, step_tool
from events_app import log
from events_app.chunks import AgentSwitched
from orchestrator_site.errors import BadRequest
from sessions_app import lifecycle
from sessions_app.callers import Caller
from sessions_app.models import Session, ToolCall, Turn

MAX_SWITCHES = 50
MAX_REASON_CHARS = 2_000


class UnknownAgent(BadRequest):
    code = "unknown_agent"


class AlreadyActive(BadRequest):
    code = "agent_already_active"


class TooManyHandoffs(ModelError):
    """The turn has had all the handoffs that a turn may have."""

    def __init__(self) -> None:
        super().__init__("too_many_handoffs", "The agents passed the message on too many times.")


class TooManySwitches(BadRequest):
    code = "too_many_switches"


def ensure_known(name: str) -> None:
    """Raise UnknownAgent unless an agent of that name is registered in the configured mode."""
    # Names are short; what is longer, or no name at all, need not be looked for.
    if len(name) > 32 or not Agent.objects.registered().filter(pk=name).exists():
        raise UnknownAgent(f"Unknown agent type: {name[:50]}")


def hand_over(
    session: Session, to: str, *, reason: str, confidence: str | None, by: str, turn: Turn | None = None
) -> AgentSwitched:
    """Record a handoff in the transaction that holds the session's lock; the chunk that says so.

    Raises TooManyHandoffs when it is one too many for the turn that it is made in.
    """
    if turn is not None and turn.handoff_count >= settings.TURN_MAX_HANDOFFS:
        raise TooManyHandoffs
    turn_id = turn.pk if turn else None
    handoff = session.hand_over(to, reason=reason, confidence=confidence, turn_id=turn_id)
    if turn is not None:
        Turn.objects.filter(pk=turn.pk).update(handoff_count=F("handoff_count") + 1)
        turn.handoff_count += 1
    details = {"from_agent": handoff.from_agent, "to_agent": to, "reason": reason, "confidence": confidence}
    log.record(lifecycle.fact(session, "agent.switched", turn_id=turn_id, switched_by=by, **details))
    return AgentSwitched(handoff.from_agent, to, reason, confidence)


@step_tool("switch_mode")
def switch_mode(session: Session, turn: Turn, arguments: dict[str, Any], by: str) -> Performed:
    """An agent's own call to pass the session on. Raises TooManyHandoffs."""
    to = arguments["mode"]
    try:
        ensure_known(to)
    except UnknownAgent as unknown:
        return Performed(f"Error: {unknown.detail}", ToolCall.Outcome.ERROR)
    if to == session.current_agent:
        return Performed(f"The {to} agent is active already")
    reason = (arguments.get("reason") or f"{by} asked for {to}")[:MAX_REASON_CHARS]
    chunk = hand_over(session, to, reason=reason, confidence="medium", by=by, turn=turn)
    return Performed(f"Switched to {to} agent", chunks=(chunk,))


@transaction.atomic
def switch(caller: Caller, session_id: str, to: str, *, reason: str, confidence: str | None) -> Session:
    """POST switch: takes effect at once, counts from the next model step, closes nothing.

    Raises UnknownSession, UnknownAgent, AlreadyActive, TooManySwitches.
    """
    session = lifecycle.locked_for(caller, session_id)
    ensure_known(to)
    if session.current_agent == to:
        raise AlreadyActive(f"Agent {to} is already active")
    if session.switch_count >= MAX_SWITCHES:
        raise TooManySwitches(f"A session may be switched {MAX_SWITCHES} times")
    chunk = hand_over(session, to, reason=reason, confidence=confidence, by=caller.name)
    lifecycle.emit(session, replace(chunk, is_final=True), origin=str(uuid.uuid4()))
    return session


@transaction.atomic
def switch_by_message(caller: Caller, session_id: str, to: str, *, reason: str) -> tuple[int, str]:
    """`switch_agent` in the stream: makes the session on first use, tolerates the agent that is active already.

    Returns where its one frame is to be looked for: past which number, and under which origin.
    """
    ensure_known(to)
    session = lifecycle.locked_or_created(caller, session_id)
    after, origin = lifecycle.position(session), str(uuid.uuid4())
    if session.current_agent == to:
        chunk = AgentSwitched(to, to, reason)
    else:
        chunk = hand_over(session, to, reason=reason, confidence=None, by=caller.name)
    lifecycle.emit(session, replace(chunk, is_final=True), origin=origin)
    return after, origin

"""The lasting record of a conversation, as clients read it."""

from datetime import datetime
from typing import Any

from messages_app.transcript import Asked, Calls, Said, answered, as_chat, calls_of
from orchestrator_site.http import wire_time
from sessions_app.callers import Caller
from sessions_app.models import Session

HANDOFF = ("from_agent", "to_agent", "reason", "created_at", "confidence")


def history(caller: Caller, session_id: str) -> dict[str, Any]:
    """Protocol 2.8. Raises UnknownSession."""
    session = Session.objects.one_visible_to(caller, session_id)
    stored = list(session.messages.in_order().values_list(*Said._fields))
    calls = _calls_of(session, stored)
    messages: list[dict[str, Any]] = []
    for row in stored:
        messages += as_chat(Said._make(row), calls.get(row[:2], ()))
    return {
        "session_id": session.pk,
        "messages": messages,
        "message_count": len(messages),
        "last_activity": wire_time(session.last_activity),
        "current_agent": session.current_agent,
        "agent_history": [_past(*handoff) for handoff in session.handoffs.order_by("id").values_list(*HANDOFF)],
    }


def messages_of(session: Session) -> list[dict[str, Any]]:
    """Form M of protocol 2.7."""
    stored = list(session.messages.in_order().values_list(*Said._fields, "id", "created_at"))
    calls = _calls_of(session, stored)
    detailed = []
    for *row, message_id, created_at in stored:
        message = Said._make(row)
        asked = calls.get((message.turn_position, message.round), ())
        said, *results = as_chat(message, asked)
        detailed.append(_detailed(message_id, created_at, said))
        if results:
            detailed += [_detailed_result(*each) for each in zip(answered(asked), results, strict=True)]
    return detailed


def _calls_of(session: Session, stored: list[Any]) -> Calls:
    """A message without calls has round 0, which no call has."""
    return calls_of(session.calls.all()) if any(row[1] for row in stored) else {}


def _detailed(message_id: int, created_at: datetime, said: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(message_id),
        "role": said["role"],
        "content": said["content"],
        "name": None,
        "tool_call_id": None,
        "tool_calls": said.get("tool_calls"),
        "created_at": wire_time(created_at),
    }


def _detailed_result(call: Asked, said: dict[str, Any]) -> dict[str, Any]:
    assert call.answered_at is not None  # noqa: S101 (it has a result)
    return {"id": call.call_id, **said, "tool_calls": None, "created_at": wire_time(call.answered_at)}


def _past(start: str, to: str, reason: str, at: datetime, confidence: str | None) -> dict[str, Any]:
    return {"from": start, "to": to, "reason": reason, "timestamp": wire_time(at), "confidence": confidence}

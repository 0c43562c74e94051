"""The lasting record of a conversation, as clients read it."""

from datetime import datetime
from typing import Any

from messages_app.transcript import Asked, Calls, Said, answered, as_chat, calls_of
from orchestrator_site.http import wire_time
from sessions_app.callers import Caller
from sessions_app.models import Handoff, Session


def history(caller: Caller, session_id: str) -> dict[str, Any]:
    """Protocol 2.8. Raises UnknownSession."""
    session = Session.objects.one_visible_to(caller, session_id)
    stored = [*map(Said._make, session.messages.in_order().values_list(*Said._fields))]
    calls = _calls_of(session, stored)
    messages = [said for message in stored for said in as_chat(message, _asked_by(message, calls))]
    return {
        "session_id": session.pk,
        "messages": messages,
        "message_count": len(messages),
        "last_activity": wire_time(session.last_activity),
        "current_agent": session.current_agent,
        "agent_history": [_past(handoff) for handoff in session.handoffs.order_by("id")],
    }


def messages_of(session: Session) -> list[dict[str, Any]]:
    """Form M of protocol 2.7."""
    rows = list(session.messages.in_order().values_list("id", "created_at", *Said._fields))
    stored = [Said._make(said) for _, _, *said in rows]
    calls = _calls_of(session, stored)
    detailed = []
    for (message_id, created_at, *_), message in zip(rows, stored, strict=True):
        asked = _asked_by(message, calls)
        said, *results = as_chat(message, asked)
        detailed.append(_detailed(message_id, created_at, said))
        detailed += [_detailed_result(*each) for each in zip(answered(asked), results, strict=True)]
    return detailed


def _calls_of(session: Session, stored: list[Said]) -> Calls:
    return calls_of(session.calls.all()) if any(message.round for message in stored) else {}


def _asked_by(message: Said, calls: Calls) -> list[Asked]:
    return calls.get((message.turn_position, message.round), []) if message.round else []


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
    return {
        "id": call.call_id,
        **said,
        "tool_calls": None,
        "created_at": wire_time(call.answered_at or call.created_at),
    }


def _past(handoff: Handoff) -> dict[str, Any]:
    return {
        "from": handoff.from_agent,
        "to": handoff.to_agent,
        "reason": handoff.reason,
        "timestamp": wire_time(handoff.created_at),
        "confidence": handoff.confidence,
    }

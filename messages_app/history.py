"""The lasting record of a conversation, as clients read it."""

from typing import Any

from messages_app.models import Message
from orchestrator_site.http import wire_time
from sessions_app.callers import Caller
from sessions_app.models import Handoff, Session


def history(caller: Caller, session_id: str) -> dict[str, Any]:
    """Protocol 2.8. Raises UnknownSession."""
    session = Session.objects.one_visible_to(caller, session_id)
    messages = [message.as_chat() for message in session.messages.in_order()]
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
    return [_detailed(message) for message in session.messages.in_order()]


def _detailed(message: Message) -> dict[str, Any]:
    return {
        "id": str(message.pk),
        "role": message.role,
        "content": message.content,
        "name": None,
        "tool_call_id": None,
        "tool_calls": None,
        "created_at": wire_time(message.created_at),
    }


def _past(handoff: Handoff) -> dict[str, Any]:
    return {
        "from": handoff.from_agent,
        "to": handoff.to_agent,
        "reason": handoff.reason,
        "timestamp": wire_time(handoff.created_at),
        "confidence": handoff.confidence,
    }

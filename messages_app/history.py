"""The lasting record of a conversation, as clients read it."""

from typing import Any

from messages_app.models import Message
from messages_app.transcript import as_chat, calls_of
from orchestrator_site.http import wire_time
from sessions_app.callers import Caller
from sessions_app.models import Handoff, Session, ToolCall


def history(caller: Caller, session_id: str) -> dict[str, Any]:
    """Protocol 2.8. Raises UnknownSession."""
    session = Session.objects.one_visible_to(caller, session_id)
    stored = list(session.messages.in_order())
    calls = calls_of(stored)
    messages = [said for message in stored for said in as_chat(message, calls[message.turn_id, message.round])]
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
    stored = list(session.messages.in_order())
    calls = calls_of(stored)
    detailed = []
    for message in stored:
        of_its_round = {call.pk: call for call in calls[message.turn_id, message.round]}
        for said in as_chat(message, of_its_round.values()):
            call = of_its_round.get(said.get("tool_call_id", ""))
            detailed.append(_detailed(message, said) if call is None else _detailed_result(call, said))
    return detailed


def _detailed(message: Message, said: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(message.pk),
        "role": said["role"],
        "content": said["content"],
        "name": None,
        "tool_call_id": None,
        "tool_calls": said.get("tool_calls"),
        "created_at": wire_time(message.created_at),
    }


def _detailed_result(call: ToolCall, said: dict[str, Any]) -> dict[str, Any]:
    return {"id": call.pk, **said, "tool_calls": None, "created_at": wire_time(call.answered_at or call.created_at)}


def _past(handoff: Handoff) -> dict[str, Any]:
    return {
        "from": handoff.from_agent,
        "to": handoff.to_agent,
        "reason": handoff.reason,
        "timestamp": wire_time(handoff.created_at),
        "confidence": handoff.confidence,
    }

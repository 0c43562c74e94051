"""Agents over REST: who there is, who is active in a session, switching."""

from typing import Any

from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from agents_app import handoffs
from agents_app.models import Agent
from orchestrator_site.http import boolean, caller_in, json_body, wire_time
from sessions_app.models import Session
from sessions_app.views import StrictText, answered_once, validated


class SwitchRequest(serializers.Serializer[Any]):
    # A string that names no agent is a 400 of its own, so it is not bounded here.
    target_agent = StrictText(allow_blank=True)
    reason = StrictText(allow_blank=True, max_length=2_000)
    confidence = StrictText(required=False, allow_null=True, max_length=32)


class AgentsView(APIView):
    """GET /agents"""

    def get(self, request: Request) -> Response:
        agents = [agent.as_wire() for agent in Agent.objects.registered()]
        return Response({"agents": agents, "total": len(agents)})


class CurrentAgentView(APIView):
    """GET /agents/{session_id}/current"""

    def get(self, request: Request, session_id: str) -> Response:
        wants_history = boolean(request.GET, "include_history", False)
        session = Session.objects.one_visible_to(caller_in(request), session_id)
        return Response(context_of(session, include_history=wants_history))


class SwitchView(APIView):
    """POST /agents/{session_id}/switch"""

    def post(self, request: Request, session_id: str) -> Response:
        body = json_body(request)
        asked = validated(SwitchRequest, body)

        def switch() -> dict[str, Any]:
            session = handoffs.switch(
                caller_in(request),
                session_id,
                asked["target_agent"],
                reason=asked["reason"],
                confidence=asked.get("confidence"),
            )
            return {"context": context_of(session, include_history=True)["context"]}

        return answered_once(request, body, switch)


def context_of(session: Session, *, include_history: bool) -> dict[str, Any]:
    """The nested form of protocol 2.3 and, beside it, the flat one that the IDE's parser reads."""
    history = list(session.handoffs.order_by("id"))
    context = {
        "id": session.pk,
        "session_id": session.pk,
        "current_agent": session.current_agent,
        "switch_count": session.switch_count,
        "switch_history": [
            {
                "from_agent": handoff.from_agent,
                "to_agent": handoff.to_agent,
                "reason": handoff.reason,
                "switched_at": wire_time(handoff.created_at),
                "confidence": handoff.confidence,
            }
            for handoff in history
        ]
        if include_history
        else None,
        "last_switch_at": wire_time(history[-1].created_at) if history else None,
        "created_at": wire_time(session.created_at),
    }
    return {
        "context": context,
        "session_id": session.pk,
        "current_agent": session.current_agent,
        "agent_history": [
            {
                "from": handoff.from_agent,
                "to": handoff.to_agent,
                "reason": handoff.reason,
                "timestamp": wire_time(handoff.created_at),
            }
            for handoff in history
        ],
        "switch_count": session.switch_count,
    }

"""The stream endpoint: parse, one call, one response. And sessions as conversations."""

from functools import partial
from typing import Any

import orjson
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from rest_framework import serializers
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from events_app.stream import Place, wire_of
from messages_app import ending, inbound
from messages_app.history import history, messages_of
from messages_app.orchestration import MessageOrchestrationService
from orchestrator_site.errors import Invalid
from orchestrator_site.http import allow, boolean, caller_in, json_body, read_json
from sessions_app import idempotency, lifecycle
from sessions_app.models import Session
from sessions_app.views import StrictText, answered_once, body_or_nothing, detailed, validated


@allow("POST")
async def message_stream(request: HttpRequest) -> HttpResponseBase:
    """POST /agent/message/stream: everything that can be refused is refused before the stream begins."""
    with Place() as place:
        body = read_json(request.body, request.headers.get("Content-Type", ""))
        message, tokens = inbound.parse(body)
        key = idempotency.key_in(request, body)
        arrived_at = request.scope.get("state", {}).get("arrived_at")  # type: ignore[attr-defined]
        service = MessageOrchestrationService(request.caller, arrived_at=arrived_at)  # type: ignore[attr-defined]
        frames = service.receive(message, key)
        await anext(frames)
        return place.response(frames, partial(wire_of, tokens=tokens))


class NewTitle(serializers.Serializer[Any]):
    title = StrictText(max_length=500)

    def validate_title(self, title: str) -> str:
        if not title.strip():
            raise serializers.ValidationError("Has to say something.", code="blank")
        return title.strip()


class ConversationRenderer(JSONRenderer):
    """Texts as the database keeps them, of which nothing is beyond orjson; there may be thousands."""

    def render(self, data: Any, accepted_media_type: str | None = None, renderer_context: Any = None) -> bytes:
        return b"" if data is None else orjson.dumps(data)


class SessionView(APIView):
    """GET, PATCH and DELETE /sessions/{session_id}"""

    renderer_classes = (ConversationRenderer,)

    def get(self, request: Request, session_id: str) -> Response:
        wants_messages = boolean(request.GET, "include_messages", False)
        session = Session.objects.one_visible_to(caller_in(request), session_id)
        return Response(detailed(session, messages_of(session) if wants_messages else None))

    def patch(self, request: Request, session_id: str) -> Response:
        title = validated(NewTitle, json_body(request))["title"]
        return Response(detailed(lifecycle.rename(caller_in(request), session_id, title), None))

    def delete(self, request: Request, session_id: str) -> Response:
        ending.delete(caller_in(request), session_id)
        return Response(status=204)


class CancelView(APIView):
    """POST /sessions/{session_id}/cancel"""

    def post(self, request: Request, session_id: str) -> Response:
        body = body_or_nothing(request)
        if not isinstance(body, dict):
            raise Invalid("Has to be an object.", "body", kind="dict_type")

        def cancel() -> dict[str, Any]:
            turn_id = ending.cancel(caller_in(request), session_id)
            return {"session_id": session_id, "cancelled_turn": str(turn_id) if turn_id else None}

        return answered_once(request, body, cancel)


class HistoryView(APIView):
    """GET /sessions/{session_id}/history"""

    renderer_classes = (ConversationRenderer,)

    def get(self, request: Request, session_id: str) -> Response:
        return Response(history(caller_in(request), session_id))

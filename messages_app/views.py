"""The stream endpoint: parse, one call, one response."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from events_app.chunks import ErrorShown
from events_app.frames import DONE, unnumbered_wire
from events_app.stream import Place, wire_of
from messages_app import inbound
from messages_app.history import history
from messages_app.orchestration import Frames, MessageOrchestrationService, Refused
from orchestrator_site.http import allow, caller_in


@allow("POST")
async def message_stream(request: HttpRequest) -> HttpResponseBase:
    """POST /agent/message/stream: everything that can be refused is refused before the stream begins."""
    with Place() as place:
        message, tokens = inbound.parse(request.body, request.headers.get("Content-Type", ""))
        frames = MessageOrchestrationService(request.caller).receive(message)  # type: ignore[attr-defined]
        try:
            await anext(frames)
        except Refused as refused:
            return place.response(_refusal(refused.chunk))
        return place.response(_answer(frames, tokens))


async def _answer(frames: Frames, tokens: bool) -> AsyncGenerator[bytes, None]:
    is_complete = False
    async with aclosing(frames):
        async for ready in frames:
            if wire := wire_of(ready, tokens=tokens):
                yield wire
            is_complete = is_complete or (bool(ready) and ready[-1].closes)
    # A server that stops ends the stream, not the answer: whoever was cut resumes it.
    if is_complete:
        yield DONE


async def _refusal(chunk: ErrorShown) -> AsyncGenerator[bytes, None]:
    yield unnumbered_wire(chunk) + DONE


class HistoryView(APIView):
    """GET /sessions/{session_id}/history"""

    def get(self, request: Request, session_id: str) -> Response:
        return Response(history(caller_in(request), session_id))

"""Sessions over REST: create and list; the forms in which they are shown; and the stream of a whole session."""

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from events_app.database import read
from events_app.feed import feed
from events_app.frames import PING
from events_app.stream import Place, follow, until_old, wire_of
from orchestrator_site.http import allow, boolean, caller_in, json_body, whole_number, wire_time
from sessions_app import following, idempotency, lifecycle
from sessions_app.callers import Caller
from sessions_app.following import Start
from sessions_app.models import Session

# How long a reader that was cut waits before it comes back, in milliseconds.
RETRY_MS = (500, 5_000)


class StrictText(serializers.CharField):
    """A text as it was sent: not trimmed, and nothing else (a number, true) taken for one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(trim_whitespace=False, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class NewSession(serializers.Serializer[Any]):
    session_id = StrictText(required=False, allow_null=True, max_length=128)


def validated(serializer: type[serializers.Serializer[Any]], data: Any) -> dict[str, Any]:
    """The body's fields. Raises the 422 of protocol 1.4 through DRF's exception handler."""
    checked = serializer(data=data)
    checked.is_valid(raise_exception=True)
    return dict(checked.validated_data)


def body_or_nothing(request: Request) -> Any:
    """The JSON body; nothing at all, null and {} mean the same (protocol 2.5)."""
    value = json_body(request) if request._request.body else None
    return {} if value is None else value


def answered_once(request: Request, body: Any, work: Callable[[], dict[str, Any]], *, status: int = 200) -> Response:
    """The answer whose body `work` makes: once for all requests under one key."""
    return Response(idempotency.once(idempotency.key_in(request._request, body), work), status=status)


class SessionsView(APIView):
    """POST and GET /sessions"""

    def post(self, request: Request) -> Response:
        body = body_or_nothing(request)
        session_id = validated(NewSession, body).get("session_id")
        if session_id is not None:
            lifecycle.valid_session_id(session_id)

        def create() -> dict[str, Any]:
            return created(lifecycle.create(caller_in(request), session_id))

        return answered_once(request, body, create, status=201)

    def get(self, request: Request) -> Response:
        limit = whole_number(request.GET, "limit", 100, at_least=1, at_most=1000)
        offset = whole_number(request.GET, "offset", 0, at_least=0)
        sessions = Session.objects.visible_to(caller_in(request))
        if boolean(request.GET, "active_only", True):
            sessions = sessions.filter(is_active=True)
        page = sessions.order_by("-last_activity", "pk")[offset : offset + limit]
        return Response(
            {
                "sessions": [listed(session) for session in page],
                "total": sessions.count(),
                "limit": limit,
                "offset": offset,
            }
        )


def created(session: Session) -> dict[str, Any]:
    """What protocol 2.5 answers."""
    return {
        "id": session.pk,
        "session_id": session.pk,
        "message_count": 0,
        "created_at": wire_time(session.created_at),
        "is_active": True,
        "current_agent": session.current_agent,
    }


def listed(session: Session) -> dict[str, Any]:
    """Form I of protocol 2.6, with the old form's keys."""
    return {
        "id": session.pk,
        "session_id": session.pk,
        "title": session.title,
        "description": None,
        "message_count": session.message_count,
        "last_activity": wire_time(session.last_activity),
        "is_active": session.is_active,
        "current_agent": session.current_agent,
        "created_at": wire_time(session.created_at),
    }


def detailed(session: Session, messages: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Form D of protocol 2.7, at top level for the IDE and under `session` for everybody else."""
    lasted = (session.last_activity - session.created_at).total_seconds()
    details = {**listed(session), "messages": messages, "duration_seconds": max(lasted, 0.0)}
    return {**details, "session": details}


@allow("GET")
async def session_stream(request: HttpRequest, session_id: str) -> HttpResponseBase:
    """GET /sessions/{session_id}/stream: everything of the session, live, from any position (protocol 2.11)."""
    with Place() as place:
        # As browsers send it, or where no header can be set.
        asked = following.position(request.headers.get("Last-Event-ID") or request.GET.get("after") or "0")
        caller: Caller = request.caller  # type: ignore[attr-defined]
        start = await read(following.resumed, caller, session_id, asked, feed.last_given(session_id))
        return place.response(until_old(_everything(session_id, start)))


async def _everything(session_id: str, start: Start) -> AsyncGenerator[bytes, None]:
    if start.reset is not None:
        yield start.reset.wire
    async with aclosing(follow(session_id, after=start.after)) as batches:
        async for frames in batches:
            yield wire_of(frames) if frames else _come_back() + PING
    yield _come_back() + b"\n"


def _come_back() -> bytes:
    """Readers that are cut together, by a process that stops or dies, do not come back together."""
    return b"retry: %d\n" % random.randint(*RETRY_MS)  # noqa: S311 (no secret)

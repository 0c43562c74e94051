"""Metrics, statistics and the audit log over REST, each of the caller's own account."""

from collections.abc import Callable
from typing import Any

from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from events_app import figures
from orchestrator_site.errors import body_of
from orchestrator_site.http import caller_in, text, whole_number


class MetricsView(APIView):
    """GET /events/metrics"""

    def get(self, request: Request) -> Response:
        return Response(figures.metrics(caller_in(request).account_id))


class AuditLogView(APIView):
    """GET /events/audit-log"""

    def get(self, request: Request) -> Response:
        return Response(
            figures.audit_log(
                caller_in(request).account_id,
                session_id=text(request.GET, "session_id"),
                event_type=text(request.GET, "event_type"),
                limit=whole_number(request.GET, "limit", 100, at_least=1, at_most=1000),
            )
        )


class StatisticsView(APIView):
    """GET /events/stats"""

    def get(self, request: Request) -> Response:
        return Response(figures.statistics(caller_in(request).account_id))


class SessionMetricsView(APIView):
    """GET /events/metrics/session/{session_id}. Whether there is such a session is told by the app that has them."""

    is_visible: Callable[[Any, str], bool] | None = None

    def get(self, request: Request, session_id: str) -> Response:
        assert self.is_visible is not None  # noqa: S101 (urls.py passes it)
        try:
            if not self.is_visible(caller_in(request), session_id):
                raise figures.NoMetrics(f"No metrics found for session {session_id}")
            return Response(figures.session_metrics(caller_in(request).account_id, session_id))
        except figures.NoMetrics as error:
            # Old clients read `error` here, everybody else `detail` (protocol 1.4).
            body = {**body_of(error, request.request_id), "error": error.detail}  # type: ignore[attr-defined]
            return Response(body, status=error.status)


class SessionsWithMetricsView(APIView):
    """GET /events/metrics/sessions"""

    def get(self, request: Request) -> Response:
        return Response(figures.sessions_with_metrics(caller_in(request).account_id))

from django.urls import path

from events_app.views import AuditLogView, MetricsView, SessionMetricsView, SessionsWithMetricsView, StatisticsView
from orchestrator_site.http import SESSION_PATH

urlpatterns = [
    path("events/metrics", MetricsView.as_view()),
    path("events/metrics/sessions", SessionsWithMetricsView.as_view()),
    path(f"events/metrics/session/{SESSION_PATH}", SessionMetricsView.as_view()),
    path("events/audit-log", AuditLogView.as_view()),
    path("events/stats", StatisticsView.as_view()),
]

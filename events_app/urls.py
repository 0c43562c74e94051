from django.urls import path

from events_app.database import on_database_thread
from events_app.views import AuditLogView, MetricsView, SessionMetricsView, SessionsWithMetricsView, StatisticsView
from orchestrator_site.http import SESSION_PATH

urlpatterns = [
    path("events/metrics", on_database_thread(MetricsView.as_view())),
    path("events/metrics/sessions", on_database_thread(SessionsWithMetricsView.as_view())),
    path(f"events/metrics/session/{SESSION_PATH}", on_database_thread(SessionMetricsView.as_view())),
    path("events/audit-log", on_database_thread(AuditLogView.as_view())),
    path("events/stats", on_database_thread(StatisticsView.as_view())),
]

from django.urls import path

from events_app.database import on_database_thread
from events_app.views import AuditLogView, MetricsView, SessionsWithMetricsView, StatisticsView

urlpatterns = [
    path("events/metrics", on_database_thread(MetricsView.as_view())),
    path("events/metrics/sessions", on_database_thread(SessionsWithMetricsView.as_view())),
    path("events/audit-log", on_database_thread(AuditLogView.as_view())),
    path("events/stats", on_database_thread(StatisticsView.as_view())),
]

from django.urls import path

from events_app.database import on_database_thread
from messages_app.views import CancelView, HistoryView, SessionView, message_stream
from orchestrator_site.http import SESSION_PATH

urlpatterns = [
    path("agent/message/stream", message_stream),
    path(f"sessions/{SESSION_PATH}", on_database_thread(SessionView.as_view())),
    path(f"sessions/{SESSION_PATH}/cancel", on_database_thread(CancelView.as_view())),
    path(f"sessions/{SESSION_PATH}/history", on_database_thread(HistoryView.as_view())),
]

from django.urls import path

from events_app.database import on_database_thread
from messages_app.views import HistoryView, message_stream
from orchestrator_site.http import SESSION_PATH

urlpatterns = [
    path("agent/message/stream", message_stream),
    path(f"sessions/{SESSION_PATH}/history", on_database_thread(HistoryView.as_view())),
]

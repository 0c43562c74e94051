from django.urls import path

from messages_app.views import HistoryView, message_stream
from orchestrator_site.http import SESSION_PATH

urlpatterns = [
    path("agent/message/stream", message_stream),
    path(f"sessions/{SESSION_PATH}/history", HistoryView.as_view()),
]

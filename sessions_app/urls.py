from django.urls import path

from orchestrator_site.http import SESSION_PATH
from sessions_app.views import CancelView, SessionsView, session_stream

urlpatterns = [
    path("sessions", SessionsView.as_view()),
    path(f"sessions/{SESSION_PATH}/cancel", CancelView.as_view()),
    path(f"sessions/{SESSION_PATH}/stream", session_stream),
]

from django.urls import path

from events_app.database import on_database_thread
from orchestrator_site.http import SESSION_PATH
from sessions_app.views import SessionsView, session_stream

urlpatterns = [
    path("sessions", on_database_thread(SessionsView.as_view())),
    path(f"sessions/{SESSION_PATH}/stream", session_stream),
]

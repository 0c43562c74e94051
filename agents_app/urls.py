from django.urls import path

from agents_app.views import AgentsView, CurrentAgentView, SwitchView
from events_app.database import on_database_thread
from orchestrator_site.http import SESSION_PATH

urlpatterns = [
    path("agents", on_database_thread(AgentsView.as_view())),
    path(f"agents/{SESSION_PATH}/current", on_database_thread(CurrentAgentView.as_view())),
    path(f"agents/{SESSION_PATH}/switch", on_database_thread(SwitchView.as_view())),
]

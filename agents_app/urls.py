from django.urls import path

from agents_app.views import AgentsView, CurrentAgentView, SwitchView
from orchestrator_site.http import SESSION_PATH

urlpatterns = [
    path("agents", AgentsView.as_view()),
    path(f"agents/{SESSION_PATH}/current", CurrentAgentView.as_view()),
    path(f"agents/{SESSION_PATH}/switch", SwitchView.as_view()),
]

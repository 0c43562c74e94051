from django.urls import path

from agents_app.approval_views import (
    ApprovalsView,
    ApprovalView,
    DecisionView,
    OpenCallsView,
    PendingApprovalsView,
)
from agents_app.views import AgentsView, CurrentAgentView, SwitchView
from events_app.database import on_database_thread
from orchestrator_site.http import CALL_PATH, SESSION_PATH

urlpatterns = [
    path("agents", on_database_thread(AgentsView.as_view())),
    path(f"agents/{SESSION_PATH}/current", on_database_thread(CurrentAgentView.as_view())),
    path(f"agents/{SESSION_PATH}/switch", on_database_thread(SwitchView.as_view())),
    path(f"sessions/{SESSION_PATH}/pending-approvals", on_database_thread(PendingApprovalsView.as_view())),
    path(f"sessions/{SESSION_PATH}/open-calls", on_database_thread(OpenCallsView.as_view())),
    path("approvals", on_database_thread(ApprovalsView.as_view())),
    path(f"approvals/{CALL_PATH}", on_database_thread(ApprovalView.as_view())),
    path(f"approvals/{CALL_PATH}/decision", on_database_thread(DecisionView.as_view())),
]

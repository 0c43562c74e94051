"""Every path of the contract without a prefix and the same under /api/v1."""

from django.contrib import admin
from django.urls import URLPattern, URLResolver, include, path
from django.views.generic import RedirectView

import agents_app.urls
import events_app.urls
import messages_app.urls
import sessions_app.urls
from events_app.changes import changes
from events_app.database import on_database_thread
from events_app.views import SessionMetricsView
from orchestrator_site.http import SESSION_PATH
from orchestrator_site.schema.views import docs, schema
from orchestrator_site.views import HealthView, favicon, healthz, readyz
from sessions_app.callers import Caller
from sessions_app.models import Session


def is_visible(caller: Caller, session_id: str) -> bool:
    return Session.objects.visible_to(caller).filter(pk=session_id).exists()


# A view of a lower app that needs something of a higher one is given it here.
session_metrics_view = SessionMetricsView.as_view(is_visible=staticmethod(is_visible))

contract: list[URLPattern | URLResolver] = [
    path("health", HealthView.as_view()),
    path("", include(sessions_app.urls)),
    path(f"events/metrics/session/{SESSION_PATH}", on_database_thread(session_metrics_view)),
    path("", include(agents_app.urls)),
    path("", include(messages_app.urls)),
    path("", include(events_app.urls)),
]
urlpatterns = [
    path("admin/changes/", changes, name="changes"),
    path("admin/", admin.site.urls),
    path("admin", RedirectView.as_view(url="/admin/")),
    path("schema", schema),
    path("docs", docs),
    path("healthz", healthz),
    path("readyz", readyz),
    path("favicon.ico", favicon),
    *contract,
    path("api/v1/", include(contract)),
]
handler400 = "orchestrator_site.views.bad_request"
handler404 = "orchestrator_site.views.not_found"
handler500 = "orchestrator_site.views.server_error"

"""The sidebar of the admin. Here because only the composition root knows every app."""

from typing import Any

from django.apps import apps
from django.contrib import admin
from django.http import HttpRequest
from django.urls import reverse

from agents_app.models import ApprovalRequest

PAGES = {
    "Approvals": [
        ("Waiting", "pending_actions", "agents_app", "pendingapproval"),
        ("Decided", "fact_check", "agents_app", "approvalrequest"),
    ],
    "Conversations": [
        ("Sessions", "forum", "sessions_app", "session"),
        ("Messages", "chat", "messages_app", "message"),
        ("Turns", "conversion_path", "sessions_app", "turn"),
        ("Tool calls", "build", "sessions_app", "toolcall"),
        ("Handoffs", "swap_horiz", "sessions_app", "handoff"),
    ],
    "Team": [
        ("Agents", "smart_toy", "agents_app", "agent"),
        ("Tools", "handyman", "agents_app", "tool"),
        ("Rules", "rule", "agents_app", "approvalrule"),
    ],
    "Record": [
        ("Audit entries", "policy", "events_app", "auditentry"),
        ("Events", "history", "events_app", "event"),
        ("Model calls", "neurology", "events_app", "modelcall"),
    ],
    "Access": [
        ("Accounts", "domain", "sessions_app", "account"),
        ("Users", "person", "auth", "user"),
        ("Groups", "group", "auth", "group"),
    ],
}
# Every page of the admin asks how many wait, so that the counting ends here.
MOST_COUNTED = 100


def sidebar(request: HttpRequest) -> list[dict[str, Any]]:
    """The pages that whoever asks may open."""
    # A transcript is the page of a message by its address, of a session by its meaning.
    transcript = reverse("admin:messages_app_message_transcript", args=["-"]).removesuffix("-/")
    here = reverse("admin:sessions_app_session_changelist") if request.path.startswith(transcript) else request.path
    groups = [
        {"title": title, "items": [_item(here, *page) for page in pages if may_open(request, *page[2:])]}
        for title, pages in PAGES.items()
    ]
    return [group for group in groups if group["items"]]


def may_open(request: HttpRequest, app: str, model: str) -> bool:
    """Whether there is a list of these and who asks may see it."""
    return admin.site.is_registered(apps.get_model(app, model)) and request.user.has_perm(f"{app}.view_{model}")


def _item(here: str, name: str, icon: str, app: str, model: str) -> dict[str, Any]:
    link = reverse(f"admin:{app}_{model}_changelist")
    badge = _waiting() if model == "pendingapproval" else ""
    return {
        "title": name,
        "icon": icon,
        "link": link,
        "active": here.startswith(link),
        "badge": badge,
        "badge_variant": "warning",
    }


def _waiting() -> str:
    number = ApprovalRequest.objects.pending()[:MOST_COUNTED].count()
    return "" if number == 0 else str(number) if number < MOST_COUNTED else f"{MOST_COUNTED - 1}+"

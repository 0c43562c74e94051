"""The sidebar of the admin. Here because only the composition root knows every app."""

from typing import Any

from django.http import HttpRequest
from django.urls import reverse

PAGES = {
    "Conversations": [
        ("Sessions", "forum", "sessions_app", "session"),
        ("Messages", "chat", "messages_app", "message"),
        ("Turns", "conversion_path", "sessions_app", "turn"),
        ("Handoffs", "swap_horiz", "sessions_app", "handoff"),
    ],
    "Team": [
        ("Agents", "smart_toy", "agents_app", "agent"),
        ("Tools", "build", "agents_app", "tool"),
        ("Rules", "rule", "agents_app", "approvalrule"),
    ],
    "Record": [
        ("Events", "history", "events_app", "event"),
        ("Model calls", "neurology", "events_app", "modelcall"),
    ],
    "Access": [
        ("Accounts", "domain", "sessions_app", "account"),
        ("Users", "person", "auth", "user"),
        ("Groups", "group", "auth", "group"),
    ],
}


def sidebar(request: HttpRequest) -> list[dict[str, Any]]:
    """The pages that whoever asks may open."""
    groups = [
        {
            "title": title,
            "items": [
                _item(request, name, icon, reverse(f"admin:{app}_{model}_changelist"))
                for name, icon, app, model in pages
                if request.user.has_perm(f"{app}.view_{model}")
            ],
        }
        for title, pages in PAGES.items()
    ]
    return [group for group in groups if group["items"]]


def _item(request: HttpRequest, name: str, icon: str, link: str) -> dict[str, Any]:
    # A transcript is the page of a message by its address, of a session by its meaning.
    transcript = reverse("admin:messages_app_message_transcript", args=["-"]).removesuffix("-/")
    shown = name == "Sessions" if request.path.startswith(transcript) else request.path.startswith(link)
    return {"title": name, "icon": icon, "link": link, "active": shown}

"""Every address of the admin: looking at it changes nothing, and nothing is sent there without a token of ours."""

import re
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from agents_app import approvals
from agents_app.approvals import Choice, Verdict
from tests.factories import OPERATOR, make_session, make_waiting_call
from tests.pages import Page
from tests.test_admin import everything, make_conversation

pytestmark = pytest.mark.django_db
ENDS_THE_SESSION = "/admin/logout/"
STREAM = "/admin/changes/"


def rows_of_everything() -> None:
    make_conversation()
    make_waiting_call(make_session("waits"))
    decided = make_waiting_call(make_session("decided"), "execute_command")
    approvals.decide_by_id(OPERATOR, decided.pk, Choice(Verdict.REJECT, feedback="No."))


def browser(*, strict: bool = False) -> Client:
    client = Client(enforce_csrf_checks=strict)
    user, _ = User.objects.get_or_create(username="root", is_staff=True, is_superuser=True)
    client.force_login(user, "django.contrib.auth.backends.ModelBackend")
    return client


def kind(address: str) -> str:
    """Addresses that differ in ids and values alone are of one kind."""
    path, _, query = address.partition("?")
    names = sorted(part.partition("=")[0] for part in query.split("&") if part)
    path = re.sub(r"/(call_\w+|[0-9a-f]{8}-[0-9a-f-]{27}|\d+|s_5F1|waits|decided)/", "/id/", path)
    return f"{path}?{'&'.join(names)}"


def crawl(client: Client) -> dict[str, int]:
    """Every kind of address that links lead to from the start page, with its status."""
    found: dict[str, int] = {}
    seen: set[str] = set()
    waiting = ["/admin/"]
    while waiting:
        address = waiting.pop(0)
        if kind(address) in seen or address.startswith((ENDS_THE_SESSION, STREAM)):
            continue
        seen.add(kind(address))
        answer = client.get(address)
        found[address] = answer.status_code
        if answer.status_code == 302:
            waiting.append(answer.headers["Location"])
        elif "html" in answer.headers.get("Content-Type", ""):
            here = address.partition("?")[0]
            links = Page(answer.content.decode()).links
            leads = [here + link if link.startswith("?") else link.partition("#")[0] for link in links]
            waiting += [lead for lead in leads if lead.startswith("/admin/")]
    return found


def patterns(resolver: Any, prefix: str = "") -> list[str]:
    """The pattern of every address under /admin/, as Django writes it."""
    listed: list[str] = []
    for entry in resolver.url_patterns:
        path = prefix + str(entry.pattern)
        if isinstance(entry, URLResolver):
            listed += patterns(entry, path)
        elif isinstance(entry, URLPattern) and path.startswith("admin/"):
            listed.append(path)
    return listed


def filled(pattern: str) -> str:
    """An address that the pattern takes, of a record that most probably exists."""
    path = re.sub(r"<session_id:\w+>", "waits", pattern)
    return "/" + re.sub(r"<[^>]+>", "1", path).replace("^", "").replace("$", "").replace("\\Z", "")


def test_a_crawl_of_every_address_changes_no_row() -> None:
    rows_of_everything()
    client = browser()
    client.get("/admin/")  # content types are stored when they are first asked for
    before = everything()

    found = crawl(client)
    addresses = {filled(pattern) for pattern in patterns(get_resolver()) if "?P" not in pattern}
    statuses = {
        address: client.get(address).status_code
        for address in addresses - {ENDS_THE_SESSION, STREAM, "/admin/login/", *found}
    }

    assert len(found) > 60
    assert set(found.values()) <= {200, 302}, found
    assert set(statuses.values()) <= {200, 301, 302, 403, 404, 405}, statuses
    assert everything() == before


def test_nothing_is_sent_without_a_token_of_ours() -> None:
    rows_of_everything()
    strict = browser(strict=True)
    before = everything()

    for address in {filled(pattern) for pattern in patterns(get_resolver()) if "?P" not in pattern}:
        answer = strict.post(address, {"decision": "approve", "post": "yes", "_save": "Save", "action": "reject"})
        assert answer.status_code in (403, 405), (address, answer.status_code)

    assert everything() == before

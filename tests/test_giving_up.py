"""Giving up in the admin: an operator ends the wait for a result that will never come, on purpose and with a reason."""

from typing import Any

import pytest
from django.contrib.admin.utils import quote
from django.db.models.functions import Now
from django.test import Client
from django.urls import reverse

from agents_app import approvals
from agents_app.approvals import Choice, Verdict
from agents_app.models import ApprovalRequest
from events_app.display import visible
from events_app.models import AuditEntry
from messages_app import acceptance
from messages_app.inbound import ToolResult
from sessions_app import unanswered
from sessions_app.models import ToolCall
from tests.factories import (
    CALLER,
    OPERATOR,
    block_audit_entries,
    let_audit_entries,
    make_calls,
    make_session,
    make_waiting_call,
    wanted,
)
from tests.pages import INJECTIONS, RAW, TRICKS, Page, logged_in, staff
from tests.test_admin import everything

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_passwords")]


def page_of(call: ToolCall, page: str = "given_up") -> str:
    return reverse(f"admin:sessions_app_toolcall_{page}", args=[quote(call.pk)])


def make_released(session_id: str = "s", **arguments: Any) -> ToolCall:
    return make_calls(make_session(session_id), wanted("read_file", arguments or None))[0]


def read(client: Client, address: str) -> Page:
    answer = client.get(address)
    assert answer.status_code == 200, (address, answer.status_code)
    return Page(answer.content.decode())


def outcome_of(call: ToolCall) -> str:
    return ToolCall.objects.get(pk=call.pk).outcome


def told_after(client: Client, call: ToolCall, **fields: str) -> tuple[int, str]:
    answer = client.post(page_of(call), fields, follow=True)
    return answer.status_code, Page(answer.content.decode()).text


def test_an_operator_gives_a_call_up_and_its_page_says_in_doubt(operator: Client) -> None:
    call = make_released()

    status, text = told_after(operator, call, reason="Its laptop\r\nis gone.")

    assert status == 200
    assert "Given up. The agent has been told." in text
    assert "in doubt" in text
    assert outcome_of(call) == "in_doubt"
    entry = AuditEntry.objects.get()
    assert (entry.action, entry.actor, entry.channel) == ("call.given_up", "olga", "admin")
    assert (entry.reason, entry.address, entry.target) == ("Its laptop\nis gone.", "127.0.0.1", call.pk)
    assert entry.request_id


def test_the_page_that_asks_shows_what_would_be_given_up_and_changes_nothing(operator: Client) -> None:
    call = make_released(path="docs/plan.md")
    before = everything()

    text = read(operator, page_of(call)).text

    assert all(words in text for words in ("read_file", "docs/plan.md", "nobody knows whether it was executed"))
    assert everything() == before


@pytest.mark.parametrize("reason", ["", "  \r\n ", "r" * 2_001, "a\x00b"])
def test_a_reason_is_needed_and_bounded(operator: Client, reason: str) -> None:
    call = make_released()
    before = everything()

    answer = operator.post(page_of(call), {"reason": reason})

    assert answer.status_code == 422
    assert list(answer.context["form"].errors) == ["reason"]
    assert everything() == before


def test_who_may_not_decide_gives_nothing_up(auditor: Client) -> None:
    call = make_released()
    before = everything()

    assert auditor.get(page_of(call)).status_code == 403
    assert auditor.post(page_of(call), {"reason": "Gone."}).status_code == 403
    assert Client().post(page_of(call), {"reason": "Gone."}).status_code == 302, "to the login"
    assert everything() == before


def test_giving_up_needs_a_token_of_ours_and_no_other_method_does_it() -> None:
    call = make_released()
    client = Client(enforce_csrf_checks=True)
    client.force_login(staff("omar", "operators"), "django.contrib.auth.backends.ModelBackend")

    assert client.post(page_of(call), {"reason": "Gone."}).status_code == 403
    assert client.get(page_of(call), {"reason": "Gone."}).status_code == 200
    plain = logged_in(staff("oona", "operators"))
    assert plain.put(page_of(call)).status_code == 405

    assert outcome_of(call) == ""


def test_a_call_that_waits_for_a_decision_or_has_its_answer_is_not_given_up(operator: Client) -> None:
    waiting, answered = make_waiting_call(make_session("waiting")), make_released("answered")
    acceptance.tool_result(ToolResult("answered", answered.pk, "text"), CALLER)

    for call, outcome in ((waiting, ""), (answered, "ok")):
        assert "Not done. The call " in told_after(operator, call, reason="Gone.")[1]
        assert operator.get(page_of(call)).status_code == 302
        assert outcome_of(call) == outcome
    assert not AuditEntry.objects.exists()


def test_a_call_of_nobody_is_404(operator: Client) -> None:
    assert operator.get(page_of(ToolCall(pk="call_nobody"))).status_code == 404


def test_what_cannot_be_written_down_is_not_given_up(operator: Client) -> None:
    call = make_released()
    block_audit_entries()

    _, text = told_after(operator, call, reason="Gone.")

    let_audit_entries()
    assert "Not done. This cannot be written down at the moment" in text
    assert outcome_of(call) == ""


def links_of(client: Client, address: str, call: ToolCall) -> list[str]:
    """Those that lead to giving a call up: the page that asks, and unfold's action, which leads there."""
    ways = (page_of(call), page_of(call, "give_up"))
    return [link for link in read(client, address).links if link in ways]


def test_giving_up_is_offered_for_released_calls_alone_and_to_who_may(operator: Client, auditor: Client) -> None:
    released, waiting = make_calls(make_session(), wanted("write_file"), wanted("write_file"))
    approvals.decide_by_id(OPERATOR, released.pk, Choice(Verdict.APPROVE))
    transcript = reverse("admin:messages_app_message_transcript", args=["s"])

    for call, offered in ((released, 1), (waiting, 0)):
        card = ApprovalRequest.objects.get(call=call).pk
        for address in (
            page_of(call, "change"),
            reverse("admin:agents_app_approvalrequest_change", args=[card]),
            transcript,
        ):
            assert len(links_of(operator, address, call)) == offered, address
            assert links_of(auditor, address, call) == []

    (action,) = links_of(operator, page_of(released, "change"), released)
    assert operator.get(action).headers["Location"] == page_of(released)


def test_a_session_leads_to_its_calls_without_a_result(operator: Client) -> None:
    make_released("other")
    released, answered = make_calls(make_session(), *[wanted("read_file")] * 2)
    acceptance.tool_result(ToolResult("s", answered.pk, "text"), CALLER)

    answer = operator.get(reverse("admin:sessions_app_session_calls_released", args=["s"]))
    shown = read(operator, answer.headers["Location"])

    assert shown.rows == 1
    assert page_of(released, "change") in [link.partition("?")[0] for link in shown.links]


def test_every_page_says_in_words_how_a_call_ended(operator: Client) -> None:
    session = make_session()
    fine, failed, late, doubtful = make_calls(session, *[wanted("write_file")] * 4)
    for call in (fine, failed, late, doubtful):
        approvals.decide_by_id(OPERATOR, call.pk, Choice(Verdict.APPROVE))
    acceptance.tool_result(ToolResult("s", fine.pk, "written"), CALLER)
    acceptance.tool_result(ToolResult("s", failed.pk, None, "disk full"), CALLER)
    ToolCall.objects.filter(pk=late.pk).update(deadline_at=Now())
    unanswered.end_overdue()
    unanswered.give_up(OPERATOR, doubtful, "Gone.")

    transcript = read(operator, reverse("admin:messages_app_message_transcript", args=["s"])).text
    listed = read(operator, reverse("admin:sessions_app_toolcall_changelist")).text
    for call, words in ((fine, "ok"), (failed, "error"), (late, "timed out"), (doubtful, "in doubt")):
        badge = [word.strip() for word in read(operator, page_of(call, "change")).texts]
        assert words in badge
        for text in (transcript, listed):
            assert words in [line.strip() for line in text.split("\n")], words
    cards = [
        read(operator, reverse("admin:agents_app_approvalrequest_change", args=[call.approval.pk])).text
        for call in (late, doubtful)
    ]
    assert "Timed out: no result came within 600 s" in cards[0]
    assert "In doubt: an operator ended the wait for a result" in cards[1] and "Gone." in cards[1]


def test_what_a_model_wrote_does_not_come_alive_on_the_page_that_asks(operator: Client) -> None:
    plain = read(operator, page_of(make_released("plain", path="a.md")))
    hostile = make_released("hostile", path="\n".join([*INJECTIONS, *TRICKS]))

    page = read(operator, page_of(hostile))

    assert len(page.elements) == len(plain.elements)
    assert page.scripts == plain.scripts
    assert RAW.search(page.text) is None
    assert visible(TRICKS[9]) != TRICKS[9]

"""What is read of many rows takes as many queries as of a few."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext
from rest_framework.test import APIRequestFactory, force_authenticate
from rest_framework.views import APIView

from agents_app import approvals, team
from agents_app.approval_views import ApprovalsView, OpenCallsView, PendingApprovalsView
from agents_app.approvals import Choice, Verdict
from agents_app.binding import args_hash
from agents_app.policy import Outcome, Ruling
from events_app.views import AuditLogView, MetricsView
from messages_app import acceptance, claims
from messages_app.inbound import ToolResult
from messages_app.views import HistoryView, SessionView
from sessions_app.models import Session, ToolCall, Turn
from tests.factories import CALLER, complete, make_calls, make_session, make_turn, make_waiting_call, run, wanted

pytestmark = pytest.mark.django_db


def read(view: type[APIView], query: str = "", **path: str) -> tuple[int, dict[str, Any]]:
    """How many queries an answer took, and the answer."""
    request = APIRequestFactory().get(f"/?{query}")
    force_authenticate(request, user=CALLER)  # type: ignore[arg-type]
    with CaptureQueriesContext(connection) as queries:
        response = view.as_view()(request, **path)
    return len(queries), dict(response.data)


def make_waiting(number: int) -> None:
    """More calls that wait in one session than one answer may ask for."""
    first = make_waiting_call(make_session())
    for position in range(1, number):
        call = ToolCall.objects.create(
            session_id="s",
            turn_id=first.turn_id,
            round=1,
            position=position,
            agent="coder",
            tool_name="write_file",
            tool_version=1,
            arguments_text=first.arguments_text,
            requires_approval=True,
            status=ToolCall.Status.WAITING,
        )
        call.args_hash = args_hash("s", call.pk, "write_file", 1, call.arguments_text)
        call.save()
        approvals.request(call, Ruling(Outcome.ASK, first.approval.rule))


def make_decided(number: int) -> None:
    for place in range(number):
        call = make_waiting_call(make_session(f"s{place}"))
        approvals.decide_by_id(CALLER, call.pk, Choice(Verdict.EDIT, {"path": "b", "content": ""}))


def make_released(number: int) -> None:
    make_calls(make_session(), *[wanted("read_file")] * number)


def make_conversation(number: int) -> None:
    """So many messages and more: four a turn."""
    session = make_session()
    for _ in range(number // 4 + 1):
        (call,) = make_calls(Session.objects.get(pk="s"), wanted("read_file"), text="Well.")
        acceptance.tool_result(ToolResult("s", call.pk, "done"), CALLER)
        complete(run(Turn.objects.get(pk=call.turn_id)))
        session.hand_over("coder", reason="again", confidence=None, turn_id=None)


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (
            make_waiting,
            [
                (PendingApprovalsView, "", {"session_id": "s"}, "pending_approvals"),
                (OpenCallsView, "", {"session_id": "s"}, "open_calls"),
                (ApprovalsView, "limit=1000", {}, "approvals"),
            ],
        ),
        (make_released, [(OpenCallsView, "", {"session_id": "s"}, "open_calls")]),
        (
            make_conversation,
            [
                (HistoryView, "", {"session_id": "s"}, "messages"),
                (SessionView, "include_messages=true", {"session_id": "s"}, "messages"),
            ],
        ),
        (
            make_decided,
            [
                (ApprovalsView, "status=all", {}, "approvals"),
                (AuditLogView, "limit=1000", {}, "audit_log"),
                (MetricsView, "", {}, "metrics"),
            ],
        ),
    ],
)
def test_fifty_rows_take_as_many_queries_as_five(
    make: Callable[[int], None], reads: list[tuple[type[APIView], str, dict[str, str], str]]
) -> None:
    taken = []
    for number in (5, 50):
        with transaction.atomic():
            make(number)
            answers = [(key, *read(view, query, **path)) for view, query, path, key in reads]
            transaction.set_rollback(True)
        assert all(len(shown[key]) >= number or key == "metrics" for key, _, shown in answers)
        taken.append([(key, queries) for key, queries, _ in answers])

    assert taken[0] == taken[1]
    assert all(queries <= 8 for _, queries in taken[0])


@pytest.mark.parametrize("lost", [False, True])
def test_fifty_turns_are_claimed_with_as_many_queries_as_five(lost: bool) -> None:
    taken = []
    for number in (5, 50):
        with transaction.atomic():
            for place in range(number):
                make_turn(make_session(f"s{place}"))
            if lost:
                claims.claim_turns("dead", number)
                Turn.objects.update(lease_until=Now())
            team.pin()  # the version is known until the team is changed
            with CaptureQueriesContext(connection) as queries:
                claimed = claims.claim_turns("next", 100)
            transaction.set_rollback(True)
        assert len(claimed) == number
        taken.append(len(queries))

    assert taken[0] == taken[1]
    assert taken[0] <= 16

"""The start page: what it counts, for whom, at what cost; the sidebar; what the admin's pages may load."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.db.models.functions import Now
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from agents_app import approvals
from agents_app.approvals import Choice, Verdict
from agents_app.models import ApprovalRequest, Decision
from events_app.models import ModelCall
from messages_app import claims
from orchestrator_site import dashboard, navigation
from orchestrator_site.dashboard import DAYS, Chart, Figure
from sessions_app.models import Session, Turn
from tests.factories import OPERATOR, claim, fail, make_session, make_turn, make_waiting_call, run
from tests.pages import Page, logged_in, staff

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_passwords")]

HOME = "/admin/"


def figures(client: Client) -> dict[str, Figure]:
    return {figure.name: figure for figure in client.get(HOME).context["figures"]}


def charts(client: Client) -> dict[str, Chart]:
    return {chart.name: chart for chart in client.get(HOME).context["charts"]}


def failures(client: Client) -> dict[str, dict[str, str]]:
    shown = client.get(HOME).context["failures"]
    return {failed["name"]: {row.name: row.value for row in failed["rows"]} for failed in shown}


def decide(session_id: str, verdict: Verdict, at: datetime | None = None) -> Decision:
    call = make_waiting_call(make_session(session_id))
    approvals.decide_by_id(OPERATOR, call.pk, Choice(verdict))
    made = Decision.objects.get(request__call=call)
    if at is not None:
        Decision.objects.filter(pk=made.pk).update(decided_at=at)
    return made


def spend(prompt: int, completion: int, at: datetime, *, error: str = "", purpose: str = "answer") -> None:
    ModelCall.objects.create(
        account_id=1,
        duration_ms=1,
        prompt_tokens=prompt,
        completion_tokens=completion,
        error=error,
        purpose=purpose,
        created_at=at,
    )


def midnight(days_ago: int = 0) -> datetime:
    today = timezone.now().astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return today - timedelta(days=days_ago)


# --- What it shows ---------------------------------------------------------------------------------------------


def test_what_waits_and_what_runs_is_counted(operator: Client) -> None:
    old = make_waiting_call(make_session("old"))
    ApprovalRequest.objects.filter(call=old).update(created_at=timezone.now() - timedelta(minutes=90))
    make_waiting_call(make_session("new"))
    run(make_turn(make_session("running")))
    make_turn(make_session("queued"))
    Session.objects.filter(pk="old").update(last_activity=timezone.now() - timedelta(hours=2))

    shown = figures(operator)

    assert shown["Approvals waiting"].value == "2"
    assert shown["Approvals waiting"].note == "the oldest since 90 minutes"
    assert shown["Approvals waiting"].alarm
    assert [shown[f"Turns {status}"].value for status in ("queued", "running", "waiting")] == ["1", "1", "2"]
    assert shown["Sessions active in the last hour"].value == "3"


def test_an_empty_installation_has_a_start_page_too(superuser: Client) -> None:
    page = Page(superuser.get(HOME).content.decode())

    assert "nothing waits" in page.text
    assert page.text.count("Nothing in these days.") == 2
    assert page.text.count("None.") == 2
    assert "canvas" not in {tag for tag, _ in page.tags}


def test_failures_of_the_last_day_are_counted_by_their_code_and_lead_to_just_those(auditor: Client) -> None:
    for name, code in (
        ("a", "model_timeout"),
        ("b", "model_timeout"),
        ("c", "context_too_long"),
        ("d", "model_timeout"),
    ):
        fail(run(make_turn(make_session(name))), code)
    Turn.objects.filter(session="d").update(finished_at=timezone.now() - timedelta(hours=25))
    spend(0, 0, timezone.now(), error="rate_limited")
    spend(0, 0, timezone.now() - timedelta(hours=25), error="rate_limited")
    spend(1, 1, timezone.now())

    assert failures(auditor) == {
        "Failed turns": {"model_timeout": "2", "context_too_long": "1"},
        "Failed model calls": {"rate_limited": "1"},
    }
    rows = [row for failed in auditor.get(HOME).context["failures"] for row in failed["rows"]]
    assert [Page(auditor.get(row.link).content.decode()).rows for row in rows] == [2, 1, 1]


def test_decisions_are_counted_by_their_utc_day_and_verdict(operator: Client) -> None:
    decide("a", Verdict.APPROVE, midnight())
    decide("b", Verdict.APPROVE, midnight() - timedelta(microseconds=1))
    decide("c", Verdict.REJECT, midnight(1))
    decide("d", Verdict.REJECT, midnight(DAYS - 1))
    decide("e", Verdict.REJECT, midnight(DAYS - 1) - timedelta(microseconds=1))

    chart = charts(operator)["Decisions a day"]

    assert chart.columns[:3] == ["Approve", "Edit", "Reject"]
    assert len(chart.rows) == DAYS
    assert dict(chart.rows)[f"{midnight():%Y-%m-%d}"] == [1, 0, 0, 0, 0]
    assert dict(chart.rows)[f"{midnight(1):%Y-%m-%d}"] == [1, 0, 1, 0, 0]
    assert chart.rows[0] == (f"{midnight(DAYS - 1):%Y-%m-%d}", [0, 0, 1, 0, 0])
    assert sum(sum(values) for _, values in chart.rows) == 4


def test_tokens_are_summed_by_day_routing_included(auditor: Client) -> None:
    spend(100, 10, midnight())
    spend(20, 2, midnight() + timedelta(microseconds=1), purpose="routing")
    spend(7, 3, midnight(1))
    spend(5, 5, midnight(DAYS))

    rows = dict(charts(auditor)["Tokens a day"].rows)

    assert rows[f"{midnight():%Y-%m-%d}"] == [120, 12]
    assert rows[f"{midnight(1):%Y-%m-%d}"] == [7, 3]
    assert sum(sum(values) for values in rows.values()) == 142


def test_a_chart_stands_as_a_table_too_and_says_that_its_days_are_utc(auditor: Client) -> None:
    spend(1234, 56, midnight())

    page = Page(auditor.get(HOME).content.decode())

    assert {"canvas", "details", "table"} <= {tag for tag, _ in page.tags}
    assert "1234" in page.text and "56" in page.text
    assert "last 14 days, UTC" in page.text


def test_the_latest_decisions_lead_to_their_cards(operator: Client) -> None:
    made = [decide(f"s{number}", Verdict.REJECT) for number in range(dashboard.LATEST + 1)]

    page = Page(operator.get(HOME).content.decode())

    cards = [reverse("admin:agents_app_approvalrequest_change", args=[each.request_id]) for each in made]
    assert [lead for lead in page.links if lead in cards] == cards[:0:-1]
    assert operator.get(cards[-1]).status_code == 200


# --- For whom, and at what cost --------------------------------------------------------------------------------


def test_everybody_is_shown_what_they_may_see_and_no_more(operator: Client, auditor: Client) -> None:
    decide("a", Verdict.APPROVE)
    spend(1, 1, timezone.now(), error="rate_limited")

    assert set(charts(operator)) == {"Decisions a day"}
    assert set(failures(operator)) == {"Failed turns"}
    assert "rate_limited" not in operator.get(HOME).content.decode()
    assert set(charts(auditor)) == {"Decisions a day", "Tokens a day"}
    assert set(failures(auditor)) == {"Failed turns", "Failed model calls"}
    nobody = logged_in(staff("nobody")).get(HOME)
    assert (nobody.context["figures"], nobody.context["charts"], nobody.context["failures"]) == ([], [], [])
    assert "There is nothing here that you may see." in nobody.content.decode()
    assert "latest_decisions" not in nobody.context


def test_turns_that_killed_the_server_are_named_and_their_list_says_how_often(operator: Client) -> None:
    assert figures(operator)["Turns parked"].alarm is False
    turn = make_turn(make_session("poisoned"))
    make_turn(make_session("healthy"))
    for owner in ("one", "two", "three"):
        claim(turn, owner)
        Turn.objects.filter(pk=turn.pk).update(lease_until=Now() - timedelta(seconds=1))
    claims.claim_turns("four", 10)

    parked = figures(operator)["Turns parked"]

    assert (parked.value, parked.alarm) == ("1", True)
    listed = Page(operator.get(parked.link).content.decode())
    assert "poisoned" in listed.text
    assert "healthy" not in listed.text
    shown = Page(operator.get(reverse("admin:sessions_app_turn_change", args=[turn.pk])).content.decode())
    assert re.search(r"Runners lost\s+3\b", shown.text)


def test_the_start_page_takes_the_same_queries_however_much_there_is(superuser: Client) -> None:
    def taken() -> int:
        with CaptureQueriesContext(connection) as queries:
            assert superuser.get(HOME).status_code == 200
        return len(queries)

    decide("first", Verdict.REJECT)
    taken()
    before = taken()
    for number in range(30):
        decide(f"s{number}", Verdict.APPROVE, midnight(number % DAYS))
        spend(1, 1, midnight(number % DAYS), error="x" if number % 2 else "")
        make_waiting_call(make_session(f"w{number}"))

    assert taken() == before <= 14


def test_every_figure_is_found_over_an_index(superuser: Client) -> None:
    """The plans for the tables that grow; SQLite would otherwise read all of each."""
    decide("a", Verdict.REJECT)
    spend(1, 1, timezone.now())
    with CaptureQueriesContext(connection) as queries:
        superuser.get(HOME)

    growing = (
        "sessions_app_turn|sessions_app_session|events_app_modelcall|agents_app_decision|agents_app_approvalrequest"
    )
    plans = []
    with connection.cursor() as cursor:
        for query in queries:
            if re.search(f'FROM "({growing})"', query["sql"]):
                cursor.execute(f"EXPLAIN QUERY PLAN {query['sql']}")
                plans += [row[3] for row in cursor.fetchall()]
    scans = [plan for plan in plans if re.match(f"SCAN ({growing})", plan)]
    assert len(plans) > 10
    # In the order of its key, and only until there are enough.
    assert set(scans) <= {"SCAN agents_app_decision"}


def test_a_count_that_says_nothing_more_ends(superuser: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "MOST_COUNTED", 2)
    monkeypatch.setattr(navigation, "MOST_COUNTED", 2)
    for number in range(3):
        make_waiting_call(make_session(f"s{number}"))

    assert figures(superuser)["Approvals waiting"].value == "2+"
    assert navigation._waiting() == "1+"


# --- The sidebar -----------------------------------------------------------------------------------------------


def test_the_sidebar_is_grouped_for_people_and_counts_what_waits(operator: Client, superuser: Client) -> None:
    def groups(client: Client) -> dict[str, list[str]]:
        shown = client.get(HOME).context["sidebar_navigation"]
        return {group["title"]: [item["title"] for item in group["items"]] for group in shown}

    make_waiting_call(make_session())

    assert groups(operator)["Approvals"] == ["Waiting", "Decided"]
    assert groups(operator)["Conversations"] == ["Sessions", "Messages", "Turns", "Tool calls", "Handoffs"]
    assert "Record" not in groups(operator)
    assert groups(superuser)["Record"] == ["Audit entries", "Events", "Model calls"]
    assert list(groups(superuser)) == ["Approvals", "Conversations", "Team", "Record", "Access"]
    waiting = operator.get(HOME).context["sidebar_navigation"][0]["items"][0]
    assert (waiting["badge"], waiting["link"]) == ("1", reverse("admin:agents_app_pendingapproval_changelist"))


# --- What a page may load --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/admin/", 200),
        ("/admin/login/", 302),
        ("/admin/events_app/event/", 200),
        ("/admin/auth/user/1/change/", 200),
        ("/admin/password_change/", 200),
        ("/admin/jsi18n/", 200),
        ("/admin/events_app/event/add/", 403),
        ("/admin/no/such/page/", 404),
        ("/admin/events_app", 301),
    ],
)
def test_every_answer_of_the_admin_says_what_its_page_may_load(path: str, status: int, superuser: Client) -> None:
    answer = superuser.get(path.replace("/1/", f"/{User.objects.get().pk}/"))

    assert answer.status_code == status
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["script-src"] == "'self' 'unsafe-eval'"
    assert policy["frame-ancestors"] == policy["object-src"] == policy["base-uri"] == "'none'"
    assert not re.search(r"https?:|\*|script-src[^;]*unsafe-inline", answer.headers["Content-Security-Policy"])


@pytest.mark.asyncio
async def test_so_does_the_login_as_the_server_runs_it_and_nothing_beside_the_admin() -> None:
    client = AsyncClient()

    assert "default-src 'self'" in (await client.get("/admin/login/")).headers["Content-Security-Policy"]
    assert "Content-Security-Policy" not in (await client.get("/health")).headers


def test_no_page_holds_a_script_of_its_own(superuser: Client) -> None:
    decide("a", Verdict.REJECT)
    spend(1, 1, timezone.now())
    pages = [HOME, "/admin/events_app/auditentry/", "/admin/sessions_app/toolcall/", "/admin/auth/user/add/"]

    for address in pages:
        page = Page(superuser.get(address).content.decode())
        inline = [dict(attrs) for tag, attrs in page.tags if tag == "script" and "src" not in dict(attrs)]
        handlers = [name for _, attrs in page.tags for name, _ in attrs if name.startswith("on")]
        assert inline == handlers == []
        assert not [lead for lead in page.links if lead.startswith(("http", "//"))]

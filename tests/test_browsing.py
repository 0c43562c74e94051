"""Browsing the past: filters, links from one record to what it speaks of, the transcript; nobody changes any of it."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.utils import quote
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from agents_app import approvals
from agents_app.approvals import ArgumentsChanged, Choice, Verdict
from agents_app.binding import canonical
from agents_app.models import ApprovalRequest, Decision
from events_app import log
from events_app.admin import BrowseOnlyAdmin
from events_app.models import AuditEntry, Event, ModelCall
from messages_app import acceptance
from messages_app.inbound import ToolResult
from messages_app.models import Message
from sessions_app import lifecycle
from sessions_app.models import Handoff, Session, ToolCall, Turn
from tests.factories import CALLER, OPERATOR, make_calls, make_session, make_turn, make_waiting_call, wanted
from tests.pages import INJECTIONS, RAW, TRICKS, Page, logged_in, staff

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_passwords")]

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
TIMED: dict[str, tuple[Any, str]] = {
    "events_app_event": (Event, "timestamp"),
    "events_app_auditentry": (AuditEntry, "at"),
    "events_app_modelcall": (ModelCall, "created_at"),
    "sessions_app_session": (Session, "last_activity"),
    "sessions_app_turn": (Turn, "created_at"),
    "sessions_app_toolcall": (ToolCall, "created_at"),
    "sessions_app_handoff": (Handoff, "created_at"),
    "messages_app_message": (Message, "created_at"),
}


def list_of(model: type[Any]) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist")


def detail_of(record: Any) -> str:
    return reverse(f"admin:{record._meta.app_label}_{record._meta.model_name}_change", args=[quote(record.pk)])


def read(client: Client, address: str, **query: str) -> Page:
    answer = client.get(address, query)
    assert answer.status_code == 200, (address, query)
    return Page(answer.content.decode())


def found(client: Client, model: type[Any], **query: str) -> int:
    """How many records a list shows."""
    return read(client, list_of(model), **query).rows


def decided_call(session_id: str = "s", verdict: Verdict = Verdict.EDIT) -> ToolCall:
    """A call that the operator decided on, with its answer where it was released."""
    call = make_waiting_call(make_session(session_id), "write_file", {"path": "a.md", "content": "long"})
    arguments = {"path": "a.md", "content": "short"} if verdict == Verdict.EDIT else None
    approvals.decide_by_id(OPERATOR, call.pk, Choice(verdict, arguments, "because"))
    if verdict != Verdict.REJECT:
        acceptance.tool_result(ToolResult(session_id, call.pk, "done"), CALLER)
    return ToolCall.objects.get(pk=call.pk)


def make_of(page: str, at: datetime) -> None:
    """One record more of the kind that a page lists, of that time."""
    model, column = TIMED[page]
    number = Session.objects.count()
    session = make_session(f"s{number}")
    turn = make_turn(session)
    if model in (AuditEntry, ModelCall, ToolCall, Handoff):
        record = {
            AuditEntry: lambda: AuditEntry.objects.create(account_id=1, at=at, actor="a", action="b"),
            ModelCall: lambda: ModelCall.objects.create(account_id=1, duration_ms=1, created_at=at),
            ToolCall: lambda: ToolCall.objects.create(
                session=session, turn=turn, round=1, position=0, status="released", arguments_text="{}"
            ),
            Handoff: lambda: session.hand_over("ask", reason="r", confidence=None, turn_id=None),
        }[model]()
    elif model is Session:
        record = session
    elif model is Event:
        log.record(log.fact("agent.switched", account_id=1, session_id=session.pk))
        record = Event.objects.latest("id")
    else:
        record = model.objects.filter(session=session).first()
    model.objects.filter(pk=record.pk).update(**{column: at})


# --- Filters ---------------------------------------------------------------------------------------------------


def test_audit_entries_are_filtered_by_all_that_an_auditor_asks_for(auditor: Client) -> None:
    decided_call("mine")
    other = decided_call("other", Verdict.REJECT)
    waiting = make_waiting_call(make_session("third"), "execute_command")
    with pytest.raises(ArgumentsChanged):
        approvals.decide_by_id(CALLER, waiting.pk, Choice(Verdict.APPROVE, args_hash="0" * 64))

    shown = {
        "all": found(auditor, AuditEntry),
        "session": found(auditor, AuditEntry, session_id__exact="mine"),
        "actor": found(auditor, AuditEntry, actor__exact="olga"),
        "action": found(auditor, AuditEntry, action="approval.reject"),
        "tool": found(auditor, AuditEntry, tool_name__exact="write_file"),
        "outcome": found(auditor, AuditEntry, outcome="refused"),
        "channel": found(auditor, AuditEntry, channel="api"),
        "several": found(auditor, AuditEntry, actor__exact="olga", session_id__exact="other", outcome="done"),
        "call searched for": found(auditor, AuditEntry, q=other.pk),
        "reason searched for": found(auditor, AuditEntry, q="becaus"),
        "part of a name": found(auditor, AuditEntry, actor__exact="olg"),
        "no such channel": found(auditor, AuditEntry, channel="pigeon"),
    }

    assert shown == {
        "all": 3,
        "session": 1,
        "actor": 2,
        "action": 1,
        "tool": 2,
        "outcome": 1,
        "channel": 1,
        "several": 1,
        "call searched for": 1,
        "reason searched for": 2,
        "part of a name": 0,
        "no such channel": 0,
    }
    assert AuditEntry.objects.get(outcome="refused").tool_name == "execute_command"


def test_the_actions_that_one_may_choose_from_are_those_that_occur(auditor: Client) -> None:
    decided_call("a", Verdict.REJECT)
    decided_call("b", Verdict.EDIT)
    decided_call("c", Verdict.EDIT)

    options = [dict(attrs).get("value") for tag, attrs in read(auditor, list_of(AuditEntry)).tags if tag == "option"]

    assert options == ["", "approval.edit", "approval.reject"]


def test_events_are_filtered_by_session_type_tool_and_turn(auditor: Client) -> None:
    call = decided_call("mine")
    make_calls(make_session("other"), wanted("read_file"))
    of_the_tool = Event.objects.filter(data__tool_name="write_file")

    assert found(auditor, Event, session_id__exact="mine") == Event.objects.filter(session_id="mine").count() > 3
    assert found(auditor, Event, event_type="tool.execution.requested") == 2
    assert found(auditor, Event, tool_name__exact="write_file") == of_the_tool.count() > 2
    assert set(of_the_tool.values_list("tool_name", flat=True)) == {"write_file"}
    of_the_turn = Event.objects.filter(correlation_id=str(call.turn_id)).count()
    assert found(auditor, Event, correlation_id__exact=str(call.turn_id)) == of_the_turn > 3
    assert found(auditor, Event, session_id__exact="other", tool_name__exact="write_file") == 0


def test_tool_calls_are_filtered_by_how_they_ended(operator: Client) -> None:
    decided_call("done")
    decided_call("rejected", Verdict.REJECT)
    make_waiting_call(make_session("waiting"), "execute_command")
    make_calls(make_session("free"), wanted("read_file"))

    shown = [
        found(operator, ToolCall, **{name: value})
        for name, value in (
            ("tool_name__exact", "write_file"),
            ("agent__exact", "coder"),
            ("agent__exact", "nobody"),
            ("status", "waiting"),
            ("status", "released"),
            ("outcome", "rejected"),
            ("requires_approval", "True"),
            ("requires_approval", "False"),
            ("requires_approval", "perhaps"),
            ("session__exact", "done"),
        )
    ]

    assert shown == [2, 4, 0, 1, 1, 1, 3, 1, 0, 1]
    text = read(operator, list_of(ToolCall)).text
    assert all(words in text for words in ("waits for a person", "released, waits for its result", "ok", "rejected"))


@pytest.mark.parametrize("page", TIMED)
def test_a_range_of_time_holds_both_its_ends_and_is_utc(page: str, superuser: Client) -> None:
    model, column = TIMED[page]
    for at in (NOON - timedelta(seconds=1), NOON, NOON + timedelta(milliseconds=900), NOON + timedelta(days=1)):
        make_of(page, at)

    def between(start: tuple[str, str], end: tuple[str, str]) -> int:
        ends = {f"{column}_from_0": start[0], f"{column}_from_1": start[1]}
        return found(superuser, model, **ends, **{f"{column}_to_0": end[0], f"{column}_to_1": end[1]})

    nothing = ("", "")
    assert between(("2026-03-01", "12:00:00"), ("2026-03-01", "12:00:00")) == 2
    assert between(("2026-03-01", "11:59"), ("2026-03-01", "11:59")) == 1
    assert between(("2026-03-01", ""), ("2026-03-01", "")) == 3
    assert between(("2026-03-02", ""), ("2026-03-02", "")) == 1
    assert between(("2026-03-01", "12:00:01"), ("2026-03-02", "")) == 1
    assert between(nothing, ("2026-03-01", "11:59:58")) == 0
    assert between(nothing, ("2026-02-28", "")) == 0


@pytest.mark.parametrize("entered", ["yesterday", "2026-02-30", "9999-12-31", "0000-01-01", "2026-03-01 12:00", "⟨"])
def test_what_is_no_time_finds_nothing_and_says_so(entered: str, auditor: Client) -> None:
    decided_call()

    page = read(auditor, list_of(AuditEntry), at_from_0="2020-01-01", at_to_0=entered, at_to_1="12")

    assert page.rows == 0
    assert "A time is written as" in page.text


def test_a_time_without_a_date_finds_nothing(auditor: Client) -> None:
    decided_call()

    assert found(auditor, AuditEntry, at_from_1="12:00:00") == 0


def test_another_filter_begins_at_the_first_page(auditor: Client) -> None:
    log.record(*[log.fact("agent.switched", account_id=1, session_id="s") for _ in range(60)])

    kept = read(auditor, list_of(Event), p="2", q="s")

    hidden = {dict(attrs)["name"] for tag, attrs in kept.tags if tag == "input" and dict(attrs).get("type") == "hidden"}
    assert "q" in hidden
    assert "p" not in hidden


# --- Links -----------------------------------------------------------------------------------------------------


def test_every_link_of_a_record_leads_to_a_page(auditor: Client) -> None:
    """Also for those who may not go everywhere; a superuser's links are followed in test_admin_crawl.py."""
    client = auditor
    call = decided_call()
    Session.objects.get().hand_over("ask", reason="r", confidence=None, turn_id=call.turn_id)
    records = [
        call,
        call.turn,
        Handoff.objects.get(),
        AuditEntry.objects.get(),
        Event.objects.get(event_type="hitl.decision.made"),
        Event.objects.get(event_type="tool.execution.requested"),
    ]
    addresses = [reverse("admin:index"), reverse("admin:messages_app_message_transcript", args=["s"])]
    addresses += [page for record in records for page in (detail_of(record), list_of(type(record)))]

    followed = {reverse("admin:logout")}
    for address in addresses:
        leads = {lead for lead in read(client, address).links if lead.startswith("/admin/")} - followed
        followed |= leads
        for lead in leads:
            assert client.get(lead, follow=True).status_code == 200, (address, lead)


def test_a_decision_in_the_record_leads_to_its_call_its_card_and_its_place_in_the_transcript(auditor: Client) -> None:
    call = decided_call()
    card = detail_of(ApprovalRequest.objects.get())
    entry, fact = AuditEntry.objects.get(), Event.objects.get(event_type="hitl.decision.made")

    for record in (entry, fact):
        leads = [lead for lead in read(auditor, detail_of(record)).links if "/toolcall/" in lead or "/session/" in lead]
        led = {auditor.get(lead).headers.get("Location") for lead in leads}
        assert card in led
        assert f"/admin/messages_app/message/transcript/s/?call={call.pk}" in led
    assert card in read(auditor, detail_of(call)).links


def test_a_call_and_a_turn_are_jumped_to_on_their_page_of_a_long_transcript(operator: Client) -> None:
    session = make_session()
    for position in range(1, 104):
        Turn.objects.create(session=session, position=position, status="completed")
    turn = Turn.objects.get(position=102)
    call = ToolCall.objects.create(session=session, turn=turn, round=1, position=0, status="released", tool_name="x")
    transcript = reverse("admin:messages_app_message_transcript", args=["s"])

    def jump(**to: str) -> str | None:
        return operator.get(transcript, to).headers.get("Location")

    assert jump(call=call.pk) == f"{transcript}?p=3#{call.pk}"
    assert jump(turn=str(turn.pk)) == f"{transcript}?p=3#turn-102"
    assert jump(turn=str(Turn.objects.get(position=50).pk)) == f"{transcript}?p=1#turn-50"
    page = read(operator, transcript, p="3")
    assert {call.pk, "turn-102"} <= {dict(attrs).get("id") for _, attrs in page.tags}
    for unknown in ({"call": "call_" + "x" * 22}, {"turn": str(session.turns.model().pk)}, {"turn": "<b>"}):
        assert operator.get(transcript, unknown).status_code == 404


def test_a_call_of_another_session_is_not_jumped_to(operator: Client) -> None:
    call = decided_call("mine")
    make_session("other")

    answer = operator.get(reverse("admin:messages_app_message_transcript", args=["other"]), {"call": call.pk})

    assert answer.status_code == 404


def test_the_way_to_a_card_needs_the_right_to_see_calls(operator: Client) -> None:
    call = decided_call()
    free = make_calls(make_session("free"), wanted("read_file"))[0]

    def way(client: Client, to: ToolCall) -> int:
        return client.get(reverse("admin:sessions_app_toolcall_approval", args=[quote(to.pk)])).status_code

    assert [way(operator, call), way(logged_in(staff("nobody")), call), way(operator, free)] == [302, 403, 404]


# --- The transcript --------------------------------------------------------------------------------------------


def test_a_transcript_tells_the_course_of_a_call_and_what_the_session_cost(operator: Client) -> None:
    call = decided_call()
    ToolCall.objects.update(
        created_at=NOON, released_at=NOON + timedelta(seconds=3), answered_at=NOON + timedelta(seconds=7)
    )
    Decision.objects.update(decided_at=NOON + timedelta(seconds=2.5))
    Turn.objects.update(total_tokens=30, prompt_tokens=20, completion_tokens=10)

    text = " ".join(read(operator, reverse("admin:messages_app_message_transcript", args=["s"])).text.split())

    assert "asked 2026-03-01 12:00:00, decided after 2.5 s, released after 3.0 s, answered after 7.0 s" in text
    assert "In all 1 turn, 1 tool call, 1 decision, 0 handoffs, 30 tokens (20 in, 10 out)" in text
    assert "Edit by olga" in text and "because" in text
    assert call.pk in text
    assert "-long" in text and "+short" in text


def test_a_call_too_large_for_the_page_is_whole_on_its_own(operator: Client) -> None:
    call = make_calls(make_session(), wanted("read_file", {"path": "a"}))[0]
    ToolCall.objects.update(arguments_text='{"path":"' + "p" * 1_100_000 + '"}')

    transcript = read(operator, reverse("admin:messages_app_message_transcript", args=["s"]))

    assert "The whole call" in transcript.text
    assert transcript.text.count("p") < 3_000
    assert "p" * 1_100_000 in read(operator, detail_of(call)).text


def test_a_call_whose_id_looks_quoted_is_led_to(operator: Client) -> None:
    turn = make_turn(make_session())
    call = ToolCall.objects.create(
        call_id="call_2Cx_5Fxxxxxxxxxxxxxxxx", session_id="s", turn=turn, round=1, position=0, status="released"
    )

    page = read(operator, reverse("admin:messages_app_message_transcript", args=["s"]))

    assert detail_of(call) in page.links
    assert call.pk in read(operator, detail_of(call)).text


def test_a_call_whose_arguments_somebody_damaged_is_still_shown(operator: Client) -> None:
    call = decided_call()
    ToolCall.objects.update(arguments_text="{nonsense", released_text="[1")

    for address in (detail_of(call), reverse("admin:messages_app_message_transcript", args=["s"])):
        assert "{nonsense" in read(operator, address).text


# --- Text stays text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["arguments", "edit and feedback", "names"])
def test_hostile_text_in_calls_and_decisions_stays_text(part: str, superuser: Client) -> None:
    call = decided_call()
    entry, fact = AuditEntry.objects.get(), Event.objects.get(event_type="hitl.decision.made")
    addresses = [detail_of(each) for each in (call, entry, fact)] + [
        list_of(type(each)) for each in (call, entry, fact)
    ]
    addresses += [reverse("admin:messages_app_message_transcript", args=["s"]), reverse("admin:index")]

    def fill(text: str) -> None:
        long = canonical({"path": text, "content": text})
        if part == "arguments":
            ToolCall.objects.update(arguments_text=long, released_text="", answer=text)
        elif part == "edit and feedback":
            ToolCall.objects.update(arguments_text="{}", released_text=canonical({"path": text}))
            Decision.objects.update(edited_text=long, feedback=text)
            AuditEntry.objects.update(details={"modified_arguments": {"path": text}, "rest": text}, reason=text)
            Event.objects.update(data={"call_id": text, "feedback": text})
        else:
            ToolCall.objects.update(tool_name=text[:200], agent=text[:32], provider_id=text[:200])
            ApprovalRequest.objects.update(tool_name=text[:200], reason=text[:500])
            Decision.objects.update(decided_by=text[:150])
            AuditEntry.objects.update(actor=text[:150], target=text[:128], tool_name=text[:200], request_id=text[:64])

    def pages() -> dict[str, Page]:
        return {address: read(superuser, address) for address in addresses}

    fill("harmless")
    harmless = pages()
    for text in ["".join(INJECTIONS), *INJECTIONS[::12], "".join(TRICKS)]:
        fill(text)
        for address, page in pages().items():
            assert page.skeleton == harmless[address].skeleton, (address, text)
            assert not (raw := RAW.search(page.text)), (address, page.text[raw.start() - 200 : raw.end()])


def test_hostile_filters_are_values_and_nothing_else(superuser: Client) -> None:
    decided_call()
    fields = {
        AuditEntry: (
            "session_id__exact",
            "actor__exact",
            "action",
            "tool_name__exact",
            "outcome",
            "at_from_0",
            "at_to_1",
        ),
        Event: ("session_id__exact", "event_type", "correlation_id__exact", "timestamp_to_0"),
        ToolCall: ("session__exact", "status", "requires_approval", "created_at_from_0"),
        Turn: ("session__exact", "code__exact", "status"),
        ModelCall: ("outcome", "error__exact", "has_tool_calls"),
    }

    for model, names in fields.items():
        for name in names:
            for text in [INJECTIONS[0], INJECTIONS[7], "' OR 1=1 --", "%\u202e"]:
                answer = superuser.get(list_of(model), {name: text})
                assert answer.status_code == 200, (name, text)
                assert "alert(1)" not in "".join(Page(answer.content.decode()).scripts)


# --- Nobody changes the past; pages stay quick -----------------------------------------------------------------


@pytest.mark.parametrize("who", ["superuser", "auditor", "operator"])
def test_nobody_adds_changes_or_deletes_records_of_the_past(who: str, request: pytest.FixtureRequest) -> None:
    client: Client = request.getfixturevalue(who)
    call = decided_call()
    records: list[Any] = [
        call,
        call.turn,
        call.session,
        AuditEntry.objects.get(),
        Event.objects.latest("id"),
        Message.objects.first(),
    ]
    before = [model.objects.order_by("pk").values_list() for model in (ToolCall, AuditEntry, Event, Decision)]
    was = [list(rows) for rows in before]

    for record in records:
        model_admin = admin.site.get_model_admin(type(record))
        assert isinstance(model_admin, BrowseOnlyAdmin)
        base = f"admin:{record._meta.app_label}_{record._meta.model_name}"
        for page in (
            reverse(f"{base}_add"),
            *(reverse(f"{base}_{name}", args=[quote(record.pk)]) for name in ("change", "delete")),
        ):
            assert client.post(page, {"post": "yes", "_save": "Save", "reason": "x"}).status_code == 403, page
        assert client.get(reverse(f"{base}_add")).status_code == 403
        assert client.get(reverse(f"{base}_delete", args=[quote(record.pk)])).status_code == 403
    way = reverse("admin:sessions_app_toolcall_approval", args=[quote(call.pk)])
    assert client.post(way).status_code == 405
    assert [list(rows.all()) for rows in before] == was


def test_operators_see_calls_and_no_records_and_auditors_both(operator: Client, auditor: Client) -> None:
    call = decided_call()
    pages = [list_of(ToolCall), detail_of(call), list_of(AuditEntry), detail_of(AuditEntry.objects.get())]

    assert [operator.get(page).status_code for page in pages] == [200, 200, 403, 403]
    assert [auditor.get(page).status_code for page in pages] == [200] * 4


def test_lists_and_transcripts_take_as_many_queries_for_forty_decided_calls_as_for_one(superuser: Client) -> None:
    call = decided_call("first")
    Turn.objects.update(status="completed")
    pages = [list_of(model) for model in (ToolCall, AuditEntry, Event, Turn)]
    pages += [reverse("admin:messages_app_message_transcript", args=["first"]), detail_of(call)]

    def taken() -> list[int]:
        counts = []
        for page in pages:
            with CaptureQueriesContext(connection) as queries:
                assert superuser.get(page).status_code == 200
            counts.append(len(queries))
        return counts

    taken()  # content types are asked for once
    one = taken()
    for number in range(40):
        decided_call(f"more{number}")
        Turn.objects.update(status="completed")
        again = make_waiting_call(Session.objects.get(pk="first"))
        approvals.decide_by_id(OPERATOR, again.pk, Choice(Verdict.REJECT, feedback="no"))
    Turn.objects.update(status="completed")

    assert taken() == one
    assert max(one) <= 14


# --- What was recorded before ----------------------------------------------------------------------------------


def test_facts_and_entries_keep_the_tool_they_speak_of() -> None:
    decided_call()
    log.record(lifecycle.fact(Session.objects.get(), "agent.switched"))

    assert AuditEntry.objects.get().tool_name == "write_file"
    assert Event.objects.latest("id").tool_name is None
    assert Event.objects.filter(data__has_key="tool_name", tool_name=None).count() == 0


@pytest.mark.parametrize(
    "asked",
    [
        "?content__regex=^(a|a)*$",
        "?content__regex=(",
        "?content__startswith=a",
        "?q=\x00",
    ],
)
def test_a_list_is_asked_for_nothing_but_its_filters(asked: str, auditor: Client) -> None:
    decided_call()

    assert auditor.get(f"/admin/messages_app/message/{asked}").status_code == 400


@pytest.mark.parametrize(
    "address",
    [
        "events_app/event/?data__regex=(",
        "events_app/event/?data__x=1",
        "sessions_app/turn/?owner__range=x",
        "sessions_app/toolcall/?answer__startswith=x",
        "sessions_app/session/?account__name__iregex=(",
        "events_app/auditentry/?actor__exact=a%00",
        "agents_app/agent/?prompt__regex=(",
        "agents_app/approvalrequest/?arguments_text__iregex=(",
        "agents_app/pendingapproval/?arguments_text__contains=x",
    ],
)
def test_what_is_no_filter_is_refused_on_every_list(address: str, auditor: Client) -> None:
    decided_call()

    assert auditor.get(f"/admin/{address}").status_code == 400

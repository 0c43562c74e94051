"""The admin: who sees what, that the past cannot be changed, that no text of a client or a model comes alive there."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.contrib import admin
from django.contrib.admin.utils import quote
from django.contrib.auth.models import Group, User
from django.contrib.sessions.models import Session as BrowserSession
from django.db import connection
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from agents_app import approvals
from agents_app.approvals import Choice, Verdict
from agents_app.models import Agent, ApprovalRequest, ApprovalRule, PendingApproval, Tool
from events_app import log
from events_app.admin import EVENT_TYPES, BrowseOnlyAdmin
from events_app.display import Shown, as_json, clipped, visible
from events_app.models import AuditEntry, Event, ModelCall
from messages_app import acceptance, ending
from messages_app.inbound import ToolResult
from messages_app.models import Message
from sessions_app import lifecycle
from sessions_app.models import Account, Handoff, Session, ToolCall, Turn
from tests.factories import CALLER, make_answered_turn, make_session, make_turn, make_waiting_call
from tests.pages import CONTROLS, INJECTIONS, PASSWORD, RAW, TRICKS, Page, logged_in, staff

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_passwords")]

CONVERSATIONS: list[type[Any]] = [Session, Turn, ToolCall, Handoff, Message]
RECORDS: list[type[Any]] = [Event, ModelCall, AuditEntry]
PAST: list[type[Any]] = [*CONVERSATIONS, *RECORDS, Account]
TEAM: list[type[Any]] = [Agent, Tool, ApprovalRule]  # edited by superusers: test_team_admin.py


def page_of(model: type[Any], page: str, *args: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}", args=args)


def list_of(model: type[Any]) -> str:
    return page_of(model, "changelist")


def detail_of(record: Any, page: str = "change") -> str:
    return page_of(type(record), page, quote(record.pk))


def transcript_of(session: Session) -> str:
    return page_of(Message, "transcript", session.pk)


def make_conversation(session_id: str = "s_1") -> Session:
    """A session with one row of everything that the admin shows."""
    session = make_session(session_id, agent="orchestrator")
    turn = make_answered_turn(session, "What is this?", "A test.")
    session.hand_over("coder", reason="It is about code.", confidence="high", turn_id=turn.pk)
    session.hand_over("ask", reason="By hand.", confidence=None, turn_id=None)
    log.record(lifecycle.fact(session, "agent.switched", turn_id=turn.pk, reason="It is about code."))
    make_model_call(session, turn)
    make_call(turn)
    log.audit(CALLER, "call.executed_otherwise", session_id=session.pk, target="something", reason="Because.", more=1)
    session.refresh_from_db()
    return session


def make_call(turn: Turn) -> ToolCall:
    return ToolCall.objects.create(
        session=turn.session,
        turn=turn,
        round=1,
        position=turn.calls.count(),
        agent="coder",
        tool_name="read_file",
        arguments_text='{"path":"a.md"}',
        status=ToolCall.Status.ANSWERED,
        outcome=ToolCall.Outcome.OK,
        answer="text",
        answered_at=timezone.now(),
    )


def make_model_call(session: Session, turn: Turn) -> ModelCall:
    return ModelCall.objects.create(
        account_id=session.account_id,
        session_id=session.pk,
        turn_id=str(turn.pk),
        agent="coder",
        model="m",
        purpose=ModelCall.Purpose.ANSWER,
        duration_ms=1,
        created_at=timezone.now(),
    )


def one_of_each(session: Session) -> list[Any]:
    others: list[type[Any]] = [Turn, Handoff, Message, ToolCall]
    return [
        session,
        session.account,
        *[model.objects.filter(session=session).first() for model in others],
        *[model.objects.filter(session_id=session.pk).last() for model in RECORDS],
    ]


def everything() -> dict[str, list[Any]]:
    """Every row of every table, but the one of browser sessions."""
    models = [model for model in apps.get_models() if model is not BrowserSession]
    return {model._meta.label: list(model._default_manager.order_by("pk").values()) for model in models}


# --- Who may see what ------------------------------------------------------------------------------------------


def test_the_groups_may_read_and_operators_alone_decide() -> None:
    reading = {f"view_{model._meta.model_name}" for model in CONVERSATIONS} | {
        *(f"view_{model._meta.model_name}" for model in TEAM),
        "view_toolcall",
        "view_pendingapproval",
        "view_approvalrequest",
    }
    records = {f"view_{model._meta.model_name}" for model in RECORDS} | {"view_auditentry"}

    granted = {
        group.name: set(group.permissions.values_list("codename", flat=True)) for group in Group.objects.order_by("pk")
    }

    assert granted == {"operators": reading | {"decide_approvalrequest"}, "auditors": reading | records}


@pytest.mark.parametrize("model", PAST)
def test_people_open_what_their_group_may_read(model: type[Any], operator: Client, auditor: Client) -> None:
    make_conversation()
    record = next(each for each in one_of_each(Session.objects.get()) if type(each) is model)
    expected = {"operator": model in CONVERSATIONS, "auditor": model in CONVERSATIONS + RECORDS}

    for name, client in (("operator", operator), ("auditor", auditor)):
        for address in (list_of(model), detail_of(record)):
            assert client.get(address).status_code == (200 if expected[name] else 403), (name, address)


def test_a_transcript_needs_both_messages_and_sessions(operator: Client) -> None:
    session = make_conversation()
    half = staff("half")
    half.user_permissions.set(Group.objects.get(name="operators").permissions.filter(codename="view_message"))

    assert operator.get(transcript_of(session)).status_code == 200
    assert logged_in(half).get(transcript_of(session)).status_code == 403
    assert logged_in(staff("none")).get(transcript_of(session)).status_code == 403


def test_the_sidebar_leads_only_where_one_may_go(operator: Client, auditor: Client, superuser: Client) -> None:
    leads = {
        name: set(Page(client.get(reverse("admin:index")).content.decode()).links)
        for name, client in (("operator", operator), ("auditor", auditor), ("superuser", superuser))
    }

    assert list_of(Session) in leads["operator"]
    assert list_of(Event) not in leads["operator"]
    assert list_of(Event) in leads["auditor"]
    assert list_of(User) not in leads["auditor"]
    assert {*map(list_of, PAST), list_of(User), list_of(Group)} <= leads["superuser"]


def test_strangers_are_sent_to_the_login() -> None:
    session = make_conversation()
    customer = logged_in(User.objects.create_user("customer", password=PASSWORD))
    addresses = [reverse("admin:index"), transcript_of(session), *map(list_of, PAST)]
    addresses += [detail_of(record) for record in one_of_each(session)]

    for client in (Client(), customer):
        for address in addresses:
            response = client.get(address)
            assert (response.status_code, response.headers.get("Location", "").partition("?")[0]) == (
                302,
                reverse("admin:login"),
            ), address


def test_a_deleted_session_stays_in_sight(operator: Client) -> None:
    session = make_conversation()
    ending.delete(CALLER, session.pk)

    assert "deleted" in Page(operator.get(list_of(Session)).content.decode()).text
    assert operator.get(detail_of(session)).status_code == 200
    assert operator.get(transcript_of(session)).status_code == 200


def test_a_superuser_puts_people_into_groups(superuser: Client) -> None:
    user = staff("new")

    page = superuser.get(detail_of(user)).content.decode()

    assert "operators" in page
    assert superuser.get(list_of(User)).status_code == superuser.get(page_of(User, "add")).status_code == 200
    assert superuser.get(detail_of(Group.objects.get(name="auditors"))).status_code == 200


# --- Nobody changes the past -----------------------------------------------------------------------------------


def test_every_page_of_the_past_is_browse_only() -> None:
    ours = {
        model: model_admin
        for model, model_admin in admin.site._registry.items()
        if model._meta.app_label not in ("auth", "axes")
    }

    assert set(ours) == {*PAST, *TEAM, PendingApproval, ApprovalRequest}
    assert all(isinstance(ours[model], BrowseOnlyAdmin) for model in set(ours) - set(TEAM))


@pytest.mark.parametrize("who", ["superuser", "auditor", "operator"])
def test_nobody_adds_changes_or_deletes(who: str, request: pytest.FixtureRequest) -> None:
    client: Client = request.getfixturevalue(who)
    session = make_conversation()
    before = everything()

    for record in one_of_each(session):
        fields = {field.name: getattr(record, field.attname) or "" for field in record._meta.concrete_fields}
        turns = {"turns-TOTAL_FORMS": "1", "turns-INITIAL_FORMS": "0", "turns-0-position": "99"}
        for address in (
            page_of(type(record), "add"),
            detail_of(record),
            detail_of(record, "delete"),
            detail_of(record, "history"),
        ):
            answer = client.post(address, {**fields, **turns, "_save": "Save", "_saveasnew": "1", "post": "yes"})
            assert answer.status_code == 403, address
        chosen = {"action": "delete_selected", "_selected_action": str(record.pk), "post": "yes"}
        assert client.post(list_of(type(record)), chosen).status_code == 403
        assert client.get(page_of(type(record), "add")).status_code == 403
        assert client.get(detail_of(record, "delete")).status_code == 403
    assert client.post(transcript_of(session)).status_code == 405

    assert everything() == before


def test_a_get_changes_nothing(superuser: Client) -> None:
    session = make_conversation()
    before = everything()
    pages = ["change", "history", "delete"]
    addresses = [detail_of(record, page) for record in one_of_each(session) for page in pages]
    addresses += [page_of(model, page) for model in PAST for page in ("changelist", "add")]
    addresses += [f"{list_of(model)}?q=code&o=1&p=9&all=1&e=1" for model in PAST]
    addresses += [transcript_of(session), f"{transcript_of(session)}?p=-1", f"{transcript_of(session)}?p=x"]
    addresses += [reverse("admin:sessions_app_session_transcript", args=[quote(session.pk)])]
    addresses += [reverse("admin:sessions_app_session_events", args=[quote(session.pk)])]
    addresses += [reverse("admin:index"), f"{reverse('admin:search')}?s=session"]

    statuses = {superuser.get(address).status_code for address in addresses}

    assert statuses <= {200, 302, 403}
    assert everything() == before


# --- Text stays text -------------------------------------------------------------------------------------------


def fill(text_of: Callable[[int], str], session_ids: list[str]) -> None:
    """Put a text into every field that a client, a model or a provider can reach."""
    for number, session_id in enumerate(session_ids):
        text = text_of(number)
        write(Session.objects.filter(pk=session_id), text, "title", "current_agent")
        write(Turn.objects.filter(session=session_id), text, "code", "requested_agent", "owner")
        write(Handoff.objects.filter(session=session_id), text, "from_agent", "to_agent", "reason", "confidence")
        write(Message.objects.filter(session=session_id), text, "content", "agent")
        calls = ToolCall.objects.filter(session=session_id)
        write(calls, text, "agent", "tool_name", "provider_id", "unusable_arguments", "answer")
        calls.update(arguments_text=json.dumps({"text": text}))
        events = Event.objects.filter(session_id=session_id)
        write(events, text, "event_type", "source", "correlation_id", "causation_id")
        events.update(data={text: text, "list": [text, {"deep": text}]})
        write(ModelCall.objects.filter(session_id=session_id), text, "agent", "model", "error", "turn_id")
        entries = AuditEntry.objects.filter(session_id=session_id)
        write(entries, text, "actor", "address", "request_id", "target", "tool_name", "reason")
        entries.update(details={text: text, "modified_arguments": {text: text}})
    Account.objects.update(name=text_of(0)[:100])


def write(rows: Any, text: str, *fields: str) -> None:
    rows.update(**{field: text[: rows.model._meta.get_field(field).max_length] for field in fields})


def read_all(client: Client, addresses: list[str]) -> dict[str, str]:
    answers = {address: client.get(address) for address in addresses}
    assert {answer.status_code for answer in answers.values()} == {200}
    return {address: answer.content.decode() for address, answer in answers.items()}


@pytest.mark.parametrize("hostile", [INJECTIONS, TRICKS], ids=["injections", "tricks"])
def test_lists_show_hostile_text_as_text(hostile: list[str], superuser: Client) -> None:
    ids = [make_conversation(f"s_{number}").pk for number in range(len(hostile))]
    addresses = [list_of(model) for model in PAST]
    fill(lambda _: "harmless", ids)
    harmless = read_all(superuser, addresses)
    fill(lambda number: hostile[number], ids)

    for address, html in read_all(superuser, addresses).items():
        assert Page(html).skeleton == Page(harmless[address]).skeleton, address
        assert not RAW.search(html), address
    titles = Page(superuser.get(list_of(Session)).content.decode()).text
    assert all(visible(text[:60]) in titles for text in hostile)


def test_single_pages_show_hostile_text_as_text(superuser: Client) -> None:
    session = make_conversation()
    addresses = [detail_of(record) for record in one_of_each(session)]
    addresses += [transcript_of(session), reverse("admin:index")]
    # Headings and short fields hold only the beginning of a text, so each text gets its turn in front.
    texts = ["\n".join(INJECTIONS[n:] + CONTROLS + INJECTIONS[:n]) for n in range(0, len(INJECTIONS), 9)]
    texts.append("".join(TRICKS))
    fill(lambda _: "harmless", [session.pk])
    harmless = read_all(superuser, addresses)

    for text in texts:
        fill(lambda _, text=text: text, [session.pk])  # type: ignore[misc]
        for address, html in read_all(superuser, addresses).items():
            assert Page(html).skeleton == Page(harmless[address]).skeleton, address
            assert not RAW.search(html), address
        # Transcripts, messages and reasons are shown to the last character.
        for shown in (transcript_of(session), detail_of(one_of_each(session)[4])):
            assert visible(text) in Page(superuser.get(shown).content.decode()).text, shown


def test_searching_for_hostile_text_finds_it_as_text(superuser: Client) -> None:
    session = make_conversation()
    Session.objects.update(title=" ".join(INJECTIONS)[:500])
    Message.objects.update(content=" ".join(INJECTIONS))
    addresses = [list_of(Session), list_of(Message), list_of(Event), reverse("admin:search")]

    for address in addresses:
        harmless = Page(superuser.get(address, {"q": "nothing like it", "s": "nothing like it"}).content.decode())
        found = Page(superuser.get(address, {"q": "e", "s": "e"}).content.decode())
        for text in INJECTIONS:
            page = Page(superuser.get(address, {"q": text, "s": text}).content.decode())
            assert page.skeleton in (harmless.skeleton, found.skeleton), (address, text)
    rows = Page(superuser.get(list_of(Session), {"q": INJECTIONS[0]}).content.decode())
    assert detail_of(session) in "".join(rows.links)


def test_a_missing_record_is_told_as_text(superuser: Client) -> None:
    for text in INJECTIONS:
        page = superuser.get(page_of(Session, "change", quote(text)), follow=True)
        assert page.status_code == 200
        assert "alert(1)" not in "".join(Page(page.content.decode()).scripts)


def test_addresses_in_text_are_never_links(superuser: Client) -> None:
    session = make_conversation()
    fill(lambda _: "https://evil.example/ and http://evil.example", [session.pk])

    for html in read_all(
        superuser, [transcript_of(session), *map(list_of, PAST), *map(detail_of, one_of_each(session))]
    ).values():
        assert not [link for link in Page(html).links if link.startswith("http")]


def test_long_text_is_cut_in_lists_and_whole_where_it_is_read(operator: Client) -> None:
    session = make_session()
    make_answered_turn(session, "q" * 150_000, "a" * 150_000)

    listed = Page(operator.get(list_of(Message)).content.decode()).text
    read = Page(operator.get(transcript_of(session)).content.decode()).text

    assert "… 149,900 more characters" in listed
    assert "q" * 101 not in listed
    assert "q" * 150_000 in read
    assert "a" * 150_000 in read


def test_a_page_of_a_transcript_is_bounded_and_says_where_the_rest_is(operator: Client) -> None:
    session = make_session()
    for number in range(6):
        turn = make_answered_turn(session, "q" * 200_000, None)
        assert turn.position == number + 1

    page = Page(operator.get(transcript_of(session)).content.decode())

    assert page.text.count("q") < 1_010_000
    assert "… 199,000 more characters" in page.text
    last = session.messages.last()
    assert detail_of(last) in page.links
    assert "q" * 200_000 in Page(operator.get(detail_of(last)).content.decode()).text


def test_what_hides_is_written_out() -> None:
    assert visible("a\u202eb\ud800c\x00\x1b[1m") == "a⟨U+202E⟩b⟨U+D800⟩c⟨U+0000⟩⟨U+001B⟩[1m"
    assert visible("two\nlines\tand ünïcode 漢字 🙂") == "two\nlines\tand ünïcode 漢字 🙂"
    assert visible(as_json({"ä\u202e": "\ud800"})) == '{\n  "ä⟨U+202E⟩": "⟨U+D800⟩"\n}'
    assert clipped("\u202e" * 3, 2) == "⟨U+202E⟩⟨U+202E⟩… 1 more character"


def test_an_id_that_looks_quoted_leads_to_its_own_page(superuser: Client) -> None:
    session = make_session("a_2Fb__")

    page = Page(superuser.get(detail_of(session)).content.decode())

    assert session.pk in page.text
    assert Shown(session).pk == "a_5F2Fb_5F_5F"
    assert detail_of(session) in page.links
    opened = superuser.get(reverse("admin:sessions_app_session_transcript", args=[quote(session.pk)]))
    assert opened.headers["Location"] == transcript_of(session)


# --- The transcript --------------------------------------------------------------------------------------------


def test_a_transcript_reads_from_the_question_over_the_handoff_to_the_answer(operator: Client) -> None:
    session = make_session()
    turn = make_turn(session, "Where is the bug?")
    session.refresh_from_db()
    session.hand_over("debug", reason="Somebody has to look.", confidence="high", turn_id=turn.pk)
    Message.objects.create(
        session=session, turn=turn, turn_position=1, role="assistant", content="In line 3.", agent="debug"
    )
    Turn.objects.update(status="failed", code="model_unavailable", total_tokens=1234)
    session.hand_over("ask", reason="By hand.", confidence=None, turn_id=None)
    make_turn(session, "And now?")

    text = Page(operator.get(transcript_of(session)).content.decode()).text

    parts = [
        "model_unavailable",
        "Where is the bug?",
        "debug",
        "Somebody has to look.",
        "In line 3.",
        "By hand.",
        "And",
    ]
    places = [text.index(part, text.index("Turn 1")) for part in parts]
    assert places == sorted(places)
    assert "1234 tokens" in text


def test_a_transcript_has_pages_and_leads_to_the_newest(operator: Client) -> None:
    session = make_session()
    for number in range(1, 102):
        turn = Turn.objects.create(session=session, position=number, status="completed")
        session.turn_count = number
        Message.objects.create(session=session, turn=turn, turn_position=number, role="user", content=f"<{number}>")
        if number in (50, 75):
            session.hand_over("ask", reason=f"after {number}", confidence=None, turn_id=None)

    first, second, last = (
        Page(operator.get(transcript_of(session), {"p": number}).content.decode()) for number in ("1", "2", "3")
    )

    assert "<1>" in first.text and "<50>" in first.text and "<51>" not in first.text
    assert "<101>" in last.text and "<100>" not in last.text
    assert "?p=3" in first.links
    assert "after 50" in first.text and "after 75" not in first.text
    assert "after 75" in second.text and "after 50" not in second.text


def test_switches_without_end_do_not_make_a_page_without_end(operator: Client) -> None:
    session = make_session()
    Handoff.objects.bulk_create(
        Handoff(session=session, from_agent="ask", to_agent="coder", reason=f"no. {number}!") for number in range(150)
    )

    text = Page(operator.get(transcript_of(session)).content.decode()).text

    assert "no. 99!" in text
    assert "no. 100!" not in text
    assert "50 more handoffs" in text


def test_a_transcript_of_nothing(operator: Client) -> None:
    assert "Nothing was said" in operator.get(transcript_of(make_session())).content.decode()
    assert operator.get(page_of(Message, "transcript", "unknown")).status_code == 404


# --- Pages stay quick ------------------------------------------------------------------------------------------


def test_a_page_takes_as_many_queries_for_fifty_rows_as_for_one(superuser: Client) -> None:
    session = make_conversation("first")
    addresses = [*map(list_of, PAST), transcript_of(session), *map(detail_of, one_of_each(session))]
    read_all(superuser, addresses)  # content types are asked for once
    one = {address: queries(superuser, address) for address in addresses}

    for number in range(49):
        make_conversation(f"more{number}")
        turn = Turn.objects.create(session=session, position=number + 2, status="completed")
        Message.objects.create(session=session, turn=turn, turn_position=turn.position, role="user", content="more")
        session.hand_over("ask", reason="more", confidence=None, turn_id=turn.pk)
        Account.objects.create(name=f"account{number}")

    assert {address: queries(superuser, address) for address in addresses} == one
    assert max(one.values()) <= 12


def queries(client: Client, address: str) -> int:
    with CaptureQueriesContext(connection) as captured:
        assert client.get(address).status_code == 200
    return len(captured)


def test_a_list_has_fifty_rows_however_many_are_asked_for(operator: Client) -> None:
    for number in range(55):
        make_session(f"s{number}")

    for asked in ({}, {"all": ""}, {"p": "1", "all": "1"}):
        page = Page(operator.get(list_of(Session), asked).content.decode())
        assert page.rows == 50


def test_events_are_found_by_type_and_by_session(auditor: Client) -> None:
    mine, other = make_conversation("mine"), make_conversation("other")
    log.record(log.fact("agent.error.occurred", account_id=1, session_id="gone"))

    by_type = Page(auditor.get(list_of(Event), {"event_type": "agent.switched"}).content.decode()).text
    found = auditor.get(reverse("admin:sessions_app_session_events", args=[mine.pk]), follow=True)
    searched = Page(auditor.get(list_of(Event), {"q": "gone"}).content.decode())

    assert mine.pk in by_type and other.pk in by_type and "gone" not in by_type
    assert f">{mine.pk}<" in found.content.decode() and f">{other.pk}<" not in found.content.decode()
    assert "gone" in searched.text and searched.rows == 1
    assert len(EVENT_TYPES) == len(set(EVENT_TYPES))


# --- The login -------------------------------------------------------------------------------------------------


@async_to_sync
async def try_to_log_in(client: AsyncClient, name: str, password: str) -> tuple[int, str]:
    answer = await client.post(reverse("admin:login"), {"username": name, "password": password})
    return answer.status_code, answer.content.decode()


def test_guessing_passwords_is_locked_out() -> None:
    # The middleware runs as on the server. axes 8.3.1 hands its credentials over in the wrong place there, which is
    # harmless as long as the answer needs none.
    staff("olga", "operators")
    client = AsyncClient()

    statuses = [try_to_log_in(client, "olga", f"guess{number}")[0] for number in range(11)]
    with_the_right_one = try_to_log_in(client, "olga", PASSWORD)

    assert statuses == [200] * 9 + [429] * 2
    assert with_the_right_one == (429, "Account locked: too many login attempts. Please try again later.")
    assert try_to_log_in(client, "somebody_else", "guess")[0] == 200


def test_a_nul_in_an_address_or_a_cookie_is_refused(superuser: Client) -> None:
    assert superuser.get("/admin/sessions_app/session/%00/change/").status_code == 400
    # As cookies spell characters that they cannot hold.
    assert Client().get("/admin/", headers={"Cookie": f'sessionid="\\000{"x" * 32}"'}).status_code == 400


def test_a_guess_may_be_hostile_too() -> None:
    client = AsyncClient()

    for text in ("<script>alert(1)</script>", "\u202eabc", "x" * 5_000):
        for number in range(11):
            status, html = try_to_log_in(client, text, f"guess{number}")
            assert status in (200, 429)
            assert "alert(1)" not in "".join(Page(html).scripts)


def test_a_transcript_shows_each_call_with_who_decided_what_was_changed_and_what_came_of_it(operator: Client) -> None:
    call = make_waiting_call(make_session(), "write_file", {"path": "a.md", "content": "long"})
    edited = Choice(Verdict.EDIT, {"path": "a.md", "content": "short"}, "shorter <b>please</b>")
    approvals.decide_by_id(CALLER, call.pk, edited)
    acceptance.tool_result(ToolResult("s", call.pk, {"success": True}), CALLER)

    text = Page(operator.get(transcript_of(Session.objects.get())).content.decode()).text

    parts = [
        "write_file",
        '"content": "long"',
        "Needs approval: File modification requires user approval. Edit by tests",
        "shorter <b>please</b>",
        "-long",
        "+short",
        '"status": "approved_with_edits"',
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)

"""Agents, tools and rules in the admin: who may change them, what is refused, what is written down, when it counts."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from typing import Any

import httpx
import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from agents_app import approvals, team
from agents_app.admin.editing import CHANGED_MEANWHILE
from agents_app.approvals import Choice, Verdict
from agents_app.models import Agent, ApprovalRequest, ApprovalRule, TeamVersion, Tool
from events_app.display import visible
from events_app.models import AuditEntry
from sessions_app.models import Session, ToolCall, Turn
from tests.browsing import Form
from tests.factories import (
    CALLER,
    act,
    block_audit_entries,
    claim,
    look,
    make_calls,
    make_session,
    make_turn,
    make_waiting_call,
    run,
    wanted,
)
from tests.pages import INJECTIONS, PASSWORD, RAW, TRICKS, Page, logged_in, staff
from tests.scripted_llm import Gate, ScriptedLLM, call, gated, say
from tests.server import BRIEF, Server, eventually
from tests.staff import ADMIN, COOKIE, cookie_of
from tests.test_admin import TEAM, detail_of, everything, list_of, page_of, queries

TRY = "/admin/agents_app/approvalrule/try/"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"path": {"type": "string"}}}


@pytest.fixture(autouse=True)
def quick_passwords(settings: Any) -> None:
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture
def superuser(db: None) -> Client:
    return logged_in(User.objects.create_superuser("root", password=PASSWORD))


def one_of_each() -> list[Any]:
    return [Agent.objects.get(pk="coder"), Tool.objects.get(pk="write_file"), ApprovalRule.objects.get(position=1)]


def form_at(client: Client, address: str) -> Form:
    answer = client.get(address)
    assert answer.status_code == 200, address
    return Form(answer.content.decode())


def edit(client: Client, record: Any, **changes: Any) -> Any:
    """Open a record's page, change some fields, save."""
    return client.post(detail_of(record), form_at(client, detail_of(record)).filled(**changes))


# The empty forms as superusers get them: to make one takes longer than to refuse what was written into it.
EMPTY: dict[type[Any], Form] = {}


def add(client: Client, kind: type[Any], **values: Any) -> Any:
    if kind not in EMPTY:
        EMPTY[kind] = form_at(client, page_of(kind, "add"))
    return client.post(page_of(kind, "add"), EMPTY[kind].filled(**values))


def delete(client: Client, record: Any) -> Any:
    return client.post(detail_of(record, "delete"), {"post": "yes"})


def errors_of(answer: Any) -> dict[str, str]:
    """What a form that came back says of each field."""
    assert answer.status_code == 200, (answer.status_code, answer.headers.get("Location"))
    return {field: " ".join(said) for field, said in answer.context["adminform"].form.errors.items()}


def make_agent(name: str = "reviewer", **values: Any) -> Agent:
    return Agent.objects.create(name=name, position=50, prompt="You review.", **values)


def make_tool(name: str = "deploy", **values: Any) -> Tool:
    return Tool.objects.create(name=name, description="Deploys.", parameters=SCHEMA, **values)


# --- Changing, and what is written down --------------------------------------------------------------------------


def test_what_is_saved_without_a_change_stays_and_leaves_no_trace(superuser: Client) -> None:
    before = [list(model.objects.values()) for model in TEAM]

    for model in TEAM:
        for record in model.objects.all():
            assert edit(superuser, record).status_code == 302, record.pk

    assert [list(model.objects.values()) for model in TEAM] == before
    assert not AuditEntry.objects.exists()


def test_an_agent_is_changed_and_the_audit_log_has_what_it_was(superuser: Client) -> None:
    was = Agent.objects.get(pk="coder").prompt

    answer = edit(superuser, Agent.objects.get(pk="coder"), prompt="You code.\r\nWell.", temperature="0.5")

    agent = Agent.objects.get(pk="coder")
    assert (answer.status_code, agent.prompt, agent.temperature) == (302, "You code.\nWell.", 0.5)
    entry = AuditEntry.objects.get()
    assert (entry.action, entry.target, entry.outcome, entry.session_id) == ("agent.changed", "coder", "done", "")
    assert (entry.actor, entry.channel, entry.address, entry.account_id) == ("root", "admin", "127.0.0.1", 1)
    assert entry.request_id == answer.headers["X-Request-ID"]
    assert entry.details == {
        "before": {"prompt": was, "temperature": None},
        "after": {"prompt": "You code.\nWell.", "temperature": 0.5},
    }


def test_what_is_added_and_deleted_is_written_down_whole(superuser: Client) -> None:
    asked = {"reason": "Somebody looks.", "tool": "deploy*", "outcome": "ask", "agent": "coder", "position": "7"}
    assert add(superuser, Tool, name="deploy", description="Deploys.", parameters=json.dumps(SCHEMA)).status_code == 302
    assert add(superuser, ApprovalRule, **asked).status_code == 302
    chosen = {"allowed_tools": ["deploy", "read_file"], "multi_agent": "on"}
    answer = add(superuser, Agent, name="reviewer", position="50", prompt="You review.", **chosen)
    assert answer.status_code == 302
    rule = ApprovalRule.objects.get(tool="deploy*")
    assert (rule.self_approval, rule.is_active) == (False, True), (
        "who asks is not who approves, unless somebody says so"
    )
    number = str(rule.pk)

    for record in (Agent.objects.get(pk="reviewer"), rule, Tool.objects.get(pk="deploy")):
        assert delete(superuser, record).status_code == 302

    entries = list(AuditEntry.objects.order_by("id"))
    assert [(entry.action, entry.target) for entry in entries] == [
        ("tool.added", "deploy"),
        ("rule.added", number),
        ("agent.added", "reviewer"),
        ("agent.deleted", "reviewer"),
        ("rule.deleted", number),
        ("tool.deleted", "deploy"),
    ]
    assert entries[0].details["after"]["parameters"] == SCHEMA
    assert (
        [entry.details["before"] for entry in entries[:3]]
        == [entry.details["after"] for entry in entries[3:]]
        == [{}] * 3
    )
    for added, deleted in zip(entries[:3], reversed(entries[3:]), strict=True):
        if added.action != "rule.added":
            assert added.details["after"] == deleted.details["before"]


def test_a_change_that_cannot_be_written_down_is_not_made(superuser: Client) -> None:
    agent, tool, rule = make_agent(), make_tool(), ApprovalRule.objects.create(tool="deploy", outcome="allow")
    block_audit_entries()
    before = everything()

    answers = [
        edit(superuser, agent, prompt="Another."),
        edit(superuser, tool, description="Another."),
        edit(superuser, rule, position="9"),
        *[delete(superuser, record) for record in (agent, tool, rule)],
        add(superuser, ApprovalRule, tool="x", outcome="allow", position="1"),
    ]

    assert {(answer.status_code, answer.headers["Retry-After"]) for answer in answers} == {(503, "5")}
    assert "cannot be written down at the moment" in answers[0].content.decode()
    assert everything() == before


def test_of_two_who_edit_the_same_row_the_second_is_told(superuser: Client) -> None:
    for record, field in zip(one_of_each(), ("prompt", "description", "reason"), strict=True):
        mine = form_at(superuser, detail_of(record))
        assert edit(superuser, record, **{field: "Of the other one."}).status_code == 302

        late = superuser.post(detail_of(record), mine.filled(**{field: "Mine."}))
        without = superuser.post(detail_of(record), mine.filled(**{field: "Mine.", "seen": None}))

        assert errors_of(late) == errors_of(without) == {"__all__": CHANGED_MEANWHILE}
        record.refresh_from_db()
        assert getattr(record, field) == "Of the other one."


# --- What is refused -----------------------------------------------------------------------------------------------

NESTED: dict[str, Any] = {}
for _ in range(40):
    NESTED = {"type": "object", "properties": {"a": NESTED}}


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("name", "Coder", "Use a to z"),
        ("name", "1st", "Use a to z"),
        ("name", "two words", "Use a to z"),
        ("name", "reviewer\u202e", "Use a to z"),
        ("name", "a" * 33, "at most 32"),
        ("name", "", "required"),
        ("name", "coder", "already exists"),
        ("position", "1", "already exists"),
        ("position", "-1", "greater than or equal to 0"),
        ("position", "999999999", "less than or equal to"),
        ("prompt", "", "required"),
        ("prompt", "  \r\n ", "required"),
        ("prompt", "p" * 50_001, "at most 50000"),
        ("temperature", "2.1", "less than or equal to 2"),
        ("temperature", "-0.1", "greater than or equal to 0"),
        ("temperature", "NaN", "number"),
        ("temperature", "warm", "number"),
        ("model", "gpt\u200b-4", "⟨U+200B⟩"),
        ("model", "m" * 201, "at most 200"),
        ("allowed_tools", ["read_file", "no_such_tool"], "no_such_tool"),
        ("allowed_tools", ["attempt_completion"], "attempt_completion"),
        ("writable_paths", "(", "no regular expression"),
        ("writable_paths", "(a+)+", "very long"),
        ("writable_paths", "(a|a)*", "very long"),
        ("writable_paths", ".*.*.*x", "very long"),
        ("writable_paths", "a?" * 30 + "a" * 30, "very long"),
        ("writable_paths", "a" * 201, "at most 200"),
        ("writable_paths", "docs/\u202e.*", "⟨U+202E⟩"),
    ],
)
def test_an_agent_that_would_break_something_is_refused(
    superuser: Client, field: str, value: str | list[str], why: str
) -> None:
    fitting = {"name": "reviewer", "position": "50", "prompt": "You review.", "multi_agent": "on"}

    errors = errors_of(add(superuser, Agent, **{**fitting, field: value}))

    assert list(errors) == [field]
    assert why in errors[field]
    assert not Agent.objects.filter(position=50).exists()


def test_a_name_stays_once_there_is_one(superuser: Client) -> None:
    for record in one_of_each()[:2]:
        assert list(errors_of(edit(superuser, record, name="renamed"))) == ["name"]
    assert not Agent.objects.filter(pk="renamed").exists() and not Tool.objects.filter(pk="renamed").exists()


def test_tools_that_an_agent_lists_and_nobody_knows_stay_with_a_word(superuser: Client) -> None:
    agent = Agent.objects.get(pk="coder")
    page = superuser.get(detail_of(agent)).content.decode()
    assert "attempt_completion (not offered: no such tool)" in Page(page).text

    kept = ["attempt_completion", "read_file"]
    assert edit(superuser, agent, allowed_tools=[*kept, "switch_mode"]).status_code == 302

    agent.refresh_from_db()
    assert agent.allowed_tools == ["read_file", "attempt_completion", "switch_mode"]
    assert edit(superuser, agent, allowed_tools=["read_file"]).status_code == 302
    assert list(errors_of(edit(superuser, agent, allowed_tools=kept))) == ["allowed_tools"], "now it would be a new one"


@pytest.mark.parametrize("name", ["orchestrator", "coder", "architect", "debug", "ask"])
def test_agents_that_the_router_needs_stay(superuser: Client, name: str) -> None:
    agent = Agent.objects.get(pk=name)

    assert list(errors_of(edit(superuser, agent, multi_agent=None))) == ["multi_agent"]
    answer = superuser.post(detail_of(agent, "delete"), {"post": "yes"}, follow=True)

    assert "by the server itself" in Page(answer.content.decode()).text
    assert Agent.objects.get(pk=name).multi_agent


@pytest.mark.parametrize("name", ["orchestrator", "universal"])
def test_agents_of_the_other_mode_stay_too(superuser: Client, name: str) -> None:
    agent = Agent.objects.get(pk=name)

    assert list(errors_of(edit(superuser, agent, single_agent=None))) == ["single_agent"]
    assert delete(superuser, agent).headers["Location"] == detail_of(agent)
    assert Agent.objects.filter(pk=name, single_agent=True).exists()


def use_session() -> None:
    make_session(agent="reviewer")


def use_requested() -> None:
    turn = make_turn(make_session())
    Turn.objects.filter(pk=turn.pk).update(requested_agent="reviewer")


def use_call() -> None:
    make_waiting_call(make_session(), agent="reviewer")
    Session.objects.update(current_agent="coder")


def use_mode() -> None:
    tool = Tool.objects.get(pk="switch_mode")
    tool.parameters["properties"]["mode"]["enum"].append("reviewer")
    tool.save()


@pytest.mark.parametrize("use", [use_session, use_requested, use_call, use_mode])
def test_an_agent_that_is_needed_at_the_moment_stays(superuser: Client, use: Any) -> None:
    agent = make_agent(allowed_tools=["write_file"])
    use()

    assert list(errors_of(edit(superuser, agent, multi_agent=None))) == ["multi_agent"]
    assert delete(superuser, agent).headers["Location"] == detail_of(agent)
    assert Agent.objects.filter(pk="reviewer", multi_agent=True).exists()


def test_an_agent_that_nobody_needs_any_more_goes(superuser: Client) -> None:
    agent = make_agent()
    make_session(agent="reviewer")
    Session.objects.update(current_agent="ask")

    assert edit(superuser, agent, multi_agent=None).status_code == 302
    assert delete(superuser, agent).status_code == 302
    assert not Agent.objects.filter(pk="reviewer").exists()


DOUBLED = {str(number): {"allOf": [{"$ref": f"#/$defs/{number + 1}"}] * 2} for number in range(20)}


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("name", "run tests", "Use letters"),
        ("name", "<b>", "Use letters"),
        ("name", "a" * 65, "at most 64"),
        ("name", "read_file", "already exists"),
        ("description", "", "required"),
        ("description", "d" * 10_001, "at most 10000"),
        ("parameters", "", "required"),
        ("parameters", "{", "not valid JSON"),
        ("parameters", '{"type": "object", "type": "object"}', "twice"),
        ("parameters", '{"type": "object", "maximum": NaN}', "not valid JSON"),
        ("parameters", "[" * 100 + "]" * 100, "nested deeper"),
        ("parameters", [], "at the top"),
        ("parameters", True, "at the top"),
        ("parameters", {}, "at the top"),
        ("parameters", {"type": "array"}, "at the top"),
        ("parameters", {"type": ["object"]}, "at the top"),
        ("parameters", {"type": "object", "properties": {"a": {"type": "text"}}}, "properties.a.type"),
        ("parameters", {"type": "object", "required": "path"}, "At required"),
        ("parameters", {"type": "object", "properties": {"a": {"minLength": -1}}}, "properties.a.minLength"),
        ("parameters", {"type": "object", "description": "d" * 70_000}, "64 KiB"),
        ("parameters", NESTED, "levels"),
        ("parameters", {"type": "object", "$schema": "http://json-schema.org/draft-07/schema#"}, "$schema"),
        ("parameters", {"type": "object", "$id": "http://evil.example/"}, "$id"),
        ("parameters", {"type": "object", "properties": {"a": {"$ref": "http://evil.example/"}}}, "beginning with #"),
        ("parameters", {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}, "leads to no schema"),
        ("parameters", {"type": "object", "properties": {"a": {"$ref": "#/type"}}}, "leads to no schema"),
        ("parameters", {"type": "object", "$ref": "#"}, "leads back"),
        ("parameters", {"type": "object", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "leads back"),
        ("parameters", {"type": "object", "$defs": {**DOUBLED, "20": {}}, "$ref": "#/$defs/0"}, "more than 500"),
        ("parameters", {"type": "object", "anyOf": [{}] * 501}, "more than 500"),
        ("parameters", {"type": "object", "properties": {"a": {"pattern": "("}}}, "properties.a.pattern"),
        ("parameters", {"type": "object", "properties": {"a": {"pattern": "^(a+)+$"}}}, "very long"),
        ("parameters", {"type": "object", "properties": {"a": {"pattern": ".*x"}}}, "maxLength"),
        ("parameters", {"type": "object", "propertyNames": {"pattern": "(a|a)*b"}}, "propertyNames.pattern"),
        ("parameters", {"type": "object", "patternProperties": {"a": {}}}, "patternProperties"),
        ("parameters", {"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ("parameters", {"type": "object", "properties": {"a": {"unevaluatedItems": False}}}, "unevaluatedItems"),
        ("parameters", {"type": "object", "properties": {"a": {"$dynamicRef": "#a"}}}, "$dynamicRef"),
        ("parameters", {"type": "object", "properties": {"\u202ea": {"type": 5}}}, "⟨U+202E⟩"),
        ("deadline_seconds", "0", "greater than or equal to 1"),
        ("deadline_seconds", "-1", "greater than or equal to 1"),
        ("deadline_seconds", "86401", "less than or equal to 86400"),
        ("deadline_seconds", "9" * 30, "less than or equal to 86400"),
        ("deadline_seconds", "1.5", "whole number"),
        ("deadline_seconds", "NaN", "whole number"),
        ("deadline_seconds", "ten minutes", "whole number"),
    ],
)
def test_a_tool_that_would_break_something_is_refused(superuser: Client, field: str, value: Any, why: str) -> None:
    fitting = {"name": "deploy", "description": "Deploys.", "parameters": json.dumps(SCHEMA)}
    text = value if isinstance(value, str) else json.dumps(value)

    errors = errors_of(add(superuser, Tool, **{**fitting, field: text}))

    assert list(errors) == [field]
    assert why in errors[field]
    assert not Tool.objects.filter(description__startswith="D").exists() or field == "description"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"enum": ["$ref", {"$id": 1}]}}},
        {"type": "object", "properties": {"pattern": {"const": "("}, "$ref": {"default": "("}}},
        {"type": "object", "properties": {"a": {"pattern": r"^[a-z]+/[a-z]+\.md$", "maxLength": 200}}},
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        {"type": "object", "$schema": "https://json-schema.org/draft/2020-12/schema", "additionalProperties": False},
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": False},
    ],
)
def test_a_schema_with_bounds_is_taken(superuser: Client, schema: dict[str, Any]) -> None:
    assert add(superuser, Tool, name="deploy", description="Deploys.", parameters=json.dumps(schema)).status_code == 302

    assert Tool.objects.get(pk="deploy").parameters == schema


@pytest.mark.parametrize(("entered", "stored"), [("1", 1), ("86400", 86_400), ("", None)])
def test_a_deadline_is_stored_and_makes_no_other_version(superuser: Client, entered: str, stored: int | None) -> None:
    tool = make_tool(deadline_seconds=30)

    assert edit(superuser, tool, deadline_seconds=entered).status_code == 302

    tool.refresh_from_db()
    assert (tool.deadline_seconds, tool.version) == (stored, 1)
    details = AuditEntry.objects.get().details
    assert details == {"before": {"deadline_seconds": 30}, "after": {"deadline_seconds": stored}}


def test_a_tool_that_is_executed_at_once_has_no_deadline(superuser: Client) -> None:
    tool = Tool.objects.get(pk="switch_mode")

    errors = errors_of(edit(superuser, tool, deadline_seconds="60"))

    assert list(errors) == ["deadline_seconds"]
    assert "nothing to wait for" in errors["deadline_seconds"]
    tool.refresh_from_db()
    assert tool.deadline_seconds is None


def test_another_schema_or_description_is_another_version(superuser: Client) -> None:
    tool = make_tool()
    assert edit(superuser, tool, position="3").status_code == 302
    assert Tool.objects.get(pk="deploy").version == 1
    assert edit(superuser, tool, description="Deploys it all.", version="9").status_code == 302
    assert Tool.objects.get(pk="deploy").version == 2
    assert edit(superuser, tool, parameters='{"type": "object"}').status_code == 302
    assert Tool.objects.get(pk="deploy").version == 3
    assert AuditEntry.objects.latest("id").details["after"] == {"parameters": {"type": "object"}, "version": 3}

    delete(superuser, tool)
    add(superuser, Tool, name="deploy", description="Deploys.", parameters=json.dumps(SCHEMA))

    assert Tool.objects.get(pk="deploy").version == 4, "an approval of the deleted one must not fit this one"


def test_what_waits_for_a_person_was_asked_of_the_tool_as_it_was(superuser: Client) -> None:
    waiting = make_waiting_call(make_session())
    edit(superuser, Tool.objects.get(pk="write_file"), description="Writes everywhere.")

    with pytest.raises(approvals.PolicyChanged):
        approvals.decide_by_id(CALLER, waiting.pk, Choice(Verdict.APPROVE))

    assert ToolCall.objects.get().status == "waiting"


@pytest.mark.parametrize(
    "change",
    [
        lambda schema: schema["properties"].pop("mode"),
        lambda schema: schema["properties"].pop("reason"),
        lambda schema: schema["properties"]["mode"].update(type="integer", enum=[1]),
        lambda schema: schema["required"].remove("mode"),
        lambda schema: schema["properties"]["mode"]["enum"].append("nobody"),
    ],
)
def test_the_tool_that_the_server_executes_keeps_what_the_server_reads(superuser: Client, change: Any) -> None:
    tool = Tool.objects.get(pk="switch_mode")
    schema = json.loads(json.dumps(tool.parameters))
    change(schema)

    assert list(errors_of(edit(superuser, tool, parameters=json.dumps(schema)))) == ["parameters"]
    assert delete(superuser, tool).headers["Location"] == detail_of(tool)
    assert Tool.objects.get(pk="switch_mode").parameters == tool.parameters


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("tool", "", "required"),
        ("tool", "write file", "Use letters"),
        ("tool", "[abc]", "Use letters"),
        ("tool", "a" * 101, "at most 100"),
        ("agent", "nobody", "nobody"),
        ("outcome", "perhaps", "perhaps"),
        ("outcome", "", "required"),
        ("reason", "", "Say why"),
        ("reason", "fine\u202e", "⟨U+202E⟩"),
        ("reason", "r" * 501, "at most 500"),
        ("position", "", "required"),
        ("position", "-1", "greater than or equal to 0"),
    ],
)
@pytest.mark.parametrize("outcome", ["ask", "deny"])
def test_a_rule_that_says_nothing_sensible_is_refused(
    superuser: Client, outcome: str, field: str, value: str, why: str
) -> None:
    fitting = {"tool": "deploy", "outcome": outcome, "reason": "Somebody looks.", "position": "77"}

    errors = errors_of(add(superuser, ApprovalRule, **{**fitting, field: value}))

    assert list(errors) == [field]
    assert why in errors[field]
    assert not ApprovalRule.objects.filter(position=77).exists()


# --- Who may -------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize("group", ["operators", "auditors"])
def test_operators_and_auditors_read_and_change_nothing(group: str) -> None:
    client = logged_in(staff("olga", group))
    before = everything()

    for record in one_of_each():
        page = client.get(detail_of(record))
        assert page.status_code == client.get(list_of(type(record))).status_code == 200
        assert Form(page.content.decode()).filled().keys() <= {"csrfmiddlewaretoken"}, "nothing to fill in"
        sent = {
            "name": "x",
            "prompt": "x",
            "tool": "x",
            "outcome": "allow",
            "_save": "Save",
            "_saveasnew": "1",
            "post": "yes",
        }
        for page_name in ("change", "delete", "history"):
            assert client.post(detail_of(record, page_name), sent).status_code == 403
        for address in (page_of(type(record), "add"), list_of(type(record))):
            assert client.post(address, {**sent, "action": "delete_selected"}).status_code == 403
        assert client.get(page_of(type(record), "add")).status_code == 403
        assert client.get(detail_of(record, "delete")).status_code == 403
    assert client.get(TRY).status_code == 200
    assert client.post(TRY, {"agent": "coder", "tool": "read_file"}).status_code == 405

    assert everything() == before


@pytest.mark.django_db
def test_who_may_see_nothing_sees_nothing() -> None:
    client = logged_in(staff("nobody"))

    for address in (TRY, *map(list_of, TEAM), *map(detail_of, one_of_each())):
        assert client.get(address).status_code == 403


def test_nothing_is_deleted_in_bulk_and_history_is_the_audit_logs(superuser: Client) -> None:
    before = everything()
    for record in one_of_each():
        chosen = {"action": "delete_selected", "_selected_action": str(record.pk), "post": "yes"}
        assert superuser.post(list_of(type(record)), chosen).status_code == 403
        assert superuser.get(detail_of(record, "history")).status_code == 403
    assert everything() == before


def test_looking_changes_nothing(superuser: Client) -> None:
    make_agent()
    before = everything()
    records = [*one_of_each(), Agent.objects.get(pk="reviewer")]
    addresses = [detail_of(record, page) for record in records for page in ("change", "delete", "history")]
    addresses += [page_of(model, page) for model in TEAM for page in ("changelist", "add")]
    addresses += [f"{list_of(model)}?q=code&o=1&p=9&all=1" for model in TEAM]
    addresses += [TRY, f"{TRY}?agent=coder&tool=write_file&arguments=%7B%7D"]

    assert {superuser.get(address).status_code for address in addresses} <= {200, 302, 403}
    assert everything() == before


def test_every_field_says_what_it_is_for(superuser: Client) -> None:
    for model in TEAM:
        form = superuser.get(page_of(model, "add")).context["adminform"].form
        assert [name for name, field in form.fields.items() if not field.help_text] == ["seen"]


def test_lists_take_as_many_queries_for_fifty_rows_as_for_few(superuser: Client) -> None:
    for model in TEAM:
        superuser.get(list_of(model))
    few = [queries(superuser, list_of(model)) for model in TEAM]
    for number in range(40):
        Agent.objects.create(name=f"agent{number}", position=100 + number, prompt="p")
        make_tool(f"tool{number}")
        ApprovalRule.objects.create(tool=f"tool{number}", outcome="allow")

    assert [queries(superuser, list_of(model)) for model in TEAM] == few
    assert max(few) <= 8


# --- Text stays text -----------------------------------------------------------------------------------------------


def fill(text: str) -> None:
    """Put a text into every field that can be edited, whatever the forms would say of it."""
    Agent.objects.filter(pk="coder").update(
        prompt=text, model=text[:200], writable_paths=text[:200], allowed_tools=["write_file", text]
    )
    Tool.objects.filter(pk="write_file").update(description=text, parameters={"type": "object", text: [text]})
    ApprovalRule.objects.filter(position=1).update(tool=text[:100], agent=text[:32], reason=text[:500])


def test_hostile_text_stays_text_where_it_is_edited_and_where_it_is_read(superuser: Client) -> None:
    reader = logged_in(staff("olga", "operators"))
    addresses = [*map(detail_of, one_of_each()), *map(list_of, TEAM)]
    pages = [(client, address) for client in (superuser, reader) for address in addresses] + [(reader, TRY)]
    texts = ["\n".join(INJECTIONS[n : n + 4]) for n in range(0, len(INJECTIONS), 4)] + ["".join(TRICKS)]

    def read(text: str) -> list[str]:
        fill(text)
        tried = {"agent": "coder", "tool": text[:200], "arguments": text}
        return [client.get(address, tried if address == TRY else {}).content.decode() for client, address in pages]

    skeletons = [Page(page).skeleton for page in read("harmless")]
    for hostile in texts:
        html = read(hostile)
        for (client, address), page, skeleton in zip(pages, html, skeletons, strict=True):
            seen = Page(re.sub(r"(?s)<pre class=.said.>.*?</pre>", "None", page) if client is superuser else page)
            unlike = (address, hostile)
            assert seen.skeleton == skeleton or client is superuser and seen.elements == skeleton[0], unlike
            if client is reader and address != TRY:
                assert not RAW.search(page), unlike
        assert visible(hostile) in Page(html[0]).text, "what an editor cannot see is written out beside it"


def test_a_schema_is_edited_with_what_hides_spelled_out(superuser: Client) -> None:
    schema = {**SCHEMA, "description": "\u202e\U000e0041 漢字\n"}
    Tool.objects.filter(pk="write_file").update(parameters=schema)
    tool = Tool.objects.get(pk="write_file")

    text = form_at(superuser, detail_of(tool)).fields["parameters"][0]
    assert '"\\u202e\\udb40\\udc41 漢字\\n"' in text
    assert edit(superuser, tool).status_code == 302

    assert Tool.objects.get(pk="write_file").parameters == schema
    assert Tool.objects.get(pk="write_file").version == 1


# --- Trying a call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "tool", "arguments", "outcome", "why"),
    [
        ("coder", "read_file", '{"path": "a"}', "allow", "read_file"),
        ("coder", "write_file", '{"path": "a", "content": ""}', "ask a person", "File modification requires"),
        ("coder", "search_in_code", '{"query": "a"}', "allow", "No rule matches"),
        ("coder", "execute_command", '{"command": "ls"}', "deny", "Not on this machine."),
        ("coder", "write_file", '{"path": "a"}', "refused", "content"),
        ("coder", "write_file", "{", "refused", "cannot be used"),
        ("coder", "no_such_tool", "", "refused", "There is no tool"),
        ("ask", "write_file", "{}", "refused", "is not allowed for Ask agent"),
        ("architect", "write_file", '{"path": "a.py", "content": ""}', "refused", "only files inside the workspace"),
    ],
)
def test_a_call_is_tried_without_being_made(
    superuser: Client, agent: str, tool: str, arguments: str, outcome: str, why: str
) -> None:
    ApprovalRule.objects.create(tool="execute_*", outcome="deny", reason="Not on this machine.")

    answer = superuser.get(TRY, {"agent": agent, "tool": tool, "arguments": arguments})

    shown = re.search(r'(?s)<section[^>]*id="outcome">(.*?)</section>', answer.content.decode())
    assert shown is not None
    text = unescape(shown[1])
    assert outcome.lower() in text.lower() and why in text


def test_a_call_of_nobody_is_not_tried(superuser: Client) -> None:
    answer = superuser.get(TRY, {"agent": "nobody", "tool": ""})

    assert answer.status_code == 200
    assert list(answer.context["form"].errors) == ["agent", "tool"]


# --- From when it counts -------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_turn_keeps_the_team_it_began_with() -> None:
    running, later = run(make_turn(make_session("a"))), make_turn(make_session("b"))
    Agent.objects.filter(pk="coder").update(prompt="Another.", model="other", temperature=1.5, allowed_tools=[])
    Tool.objects.update(description="Another.", version=7)

    now, then = look(claim(later)), look(running.claim)

    assert (now.messages[0]["content"], now.temperature, now.toolbox.offered()) == ("Another.", 1.5, [])
    assert then.messages[0]["content"].startswith("You are the coder") and then.temperature is None
    assert len(then.toolbox.offered()) == 6
    assert TeamVersion.objects.count() == 2


@pytest.mark.django_db
def test_the_same_team_is_one_version() -> None:
    versions = {claim(make_turn(make_session(f"s{number}"))).team_version for number in range(2)}
    was = Agent.objects.get(pk="ask").prompt
    Agent.objects.filter(pk="ask").update(prompt="Another.")
    Agent.objects.filter(pk="ask").update(prompt=was)

    assert {claim(make_turn(make_session())).team_version} == versions == {TeamVersion.objects.get().pk}


@pytest.mark.django_db
def test_a_turn_that_waited_goes_on_under_its_own_version() -> None:
    (read,) = make_calls(make_session(), wanted("read_file"))
    Agent.objects.filter(pk="coder").update(prompt="Another.")
    approvals.answer(Session.objects.get(), read, approvals.Result("done", approvals.Outcome.OK))
    turn = Turn.objects.get()
    turn.go_on()

    scene = look(claim(turn))

    assert scene.messages[0]["content"].startswith("You are the coder")


@pytest.mark.django_db
def test_an_agent_that_is_deleted_under_a_running_turn_finishes_it() -> None:
    running = run(make_turn(make_session()))
    Agent.objects.filter(pk="coder").delete()
    Tool.objects.all().delete()

    act(running, wanted("read_file"))

    assert ToolCall.objects.get().status == "released"


@pytest.mark.django_db
def test_a_session_whose_agent_is_gone_says_so_and_can_be_switched() -> None:
    turn = make_turn(make_session())
    Agent.objects.filter(pk="coder").delete()

    with pytest.raises(team.UnknownToTeam) as error:
        look(claim(turn))

    assert (error.value.code, error.value.message) == (
        "unknown_agent",
        "There is no agent 'coder' any more. Switch to another.",
    )


@pytest.mark.django_db
def test_a_running_turn_that_is_switched_to_a_new_agent_takes_it_as_it_is() -> None:
    running = run(make_turn(make_session()))
    make_agent(allowed_tools=["read_file"])
    Session.objects.update(current_agent="reviewer")

    scene = look(running.claim)

    assert (scene.agent, [tool["function"]["name"] for tool in scene.toolbox.offered()]) == ("reviewer", ["read_file"])


@pytest.mark.django_db
@pytest.mark.parametrize("now", ["allow", "ask", "ask somebody", "deny", "gone"])
@pytest.mark.parametrize("then", ["allow", "ask", "ask somebody", "deny", "none"])
def test_of_the_rules_then_and_now_the_stricter_holds(then: str, now: str) -> None:
    strength = ["none", "gone", "allow", "ask", "ask somebody", "deny"]
    rule = ApprovalRule(position=3, tool="search_in_code", reason=f"was {then}")
    if then != "none":
        rule.outcome, rule.self_approval = then.split()[0], then == "ask"
        rule.save()
    running = run(make_turn(make_session()))
    ApprovalRule.objects.filter(tool="search_in_code").delete()
    if now != "gone":
        changed = {"outcome": now.split()[0], "self_approval": now == "ask", "reason": f"is {now}"}
        ApprovalRule.objects.create(pk=rule.pk, position=3, tool="search_in_code", **changed)

    act(running, wanted("search_in_code"))

    made, strictest = ToolCall.objects.get(), max(then, now, key=strength.index)
    if strictest == "deny":
        assert (made.outcome, made.answer) == ("refused", f"Error: {'is' if now == 'deny' else 'was'} deny")
    elif strictest.startswith("ask"):
        approval = ApprovalRequest.objects.get()
        assert (made.status, approval.self_approval) == ("waiting", strictest == "ask")
        assert approval.reason == (f"is {now}" if now == strictest else f"was {then}")
        assert approval.rule_id == (None if now == "gone" else rule.pk or approval.rule_id)
    else:
        assert made.status == "released"


@pytest.mark.django_db
def test_a_step_reads_no_team_again_and_few_rows_to_judge() -> None:
    running = run(make_turn(make_session()))
    look(running.claim)
    with reading() as asked:
        scene = look(running.claim)
    assert not [query for query in asked if "agents_app_" in query]
    with reading() as asked:
        act(running, wanted("read_file"), scene=scene)
    assert len([query for query in asked if query.startswith("SELECT") and "agents_app_" in query]) == 1


@contextmanager
def reading() -> Iterator[list[str]]:
    asked: list[str] = []
    with CaptureQueriesContext(connection) as captured:
        yield asked
    asked += [query["sql"] for query in captured]


# --- The same, on a real server and through its real pages ---------------------------------------------------------


class Browser:
    """A superuser's browser."""

    def __init__(self, server: Server) -> None:
        self.http = httpx.Client(base_url=server.url, timeout=30, cookies={COOKIE: cookie_of(ADMIN)}, limits=BRIEF)

    def edit(self, page: str, **changes: Any) -> None:
        form = Form(self.http.get(f"/admin/agents_app/{page}/").text)
        answer = self.http.post(f"/admin/agents_app/{page}/", data=form.filled(**changes))
        assert answer.status_code == 302, re.findall(r"(?s)errorlist.*?</ul>", answer.text)


@pytest.fixture
def browser(server: Server) -> Iterator[Browser]:
    opened = Browser(server)
    yield opened
    opened.http.close()


def test_an_edited_agent_counts_from_the_next_turn(server: Server, llm: ScriptedLLM, browser: Browser) -> None:
    gate = Gate()
    llm.route_to = "coder"
    llm.script(gated(call("read_file", {"path": "a.md"}), gate), say("First."), say("Second."))
    with server.streaming({"type": "user_message", "content": "go"}, "s") as frames:
        llm.wait_for(lambda model: len(model.answers) == 1)
        browser.edit(
            "agent/coder/change",
            prompt="You are the coder, edited.",
            model="edited-model",
            temperature="0.5",
            allowed_tools=["list_files"],
        )
        gate.open()
        asked = next(frame.data for frame in frames if frame.type == "tool_call")
    server.post({"type": "tool_result", "call_id": asked["call_id"], "result": "text"}, "s")
    server.say("s", "again")

    told = [(answer["messages"][0]["content"].splitlines()[0], answer["model"]) for answer in llm.answers]
    assert [("edited" in prompt, model) for prompt, model in told] == [
        (False, "gpt-4o-mini"),
        (False, "gpt-4o-mini"),
        (True, "edited-model"),
    ]
    assert [answer.get("temperature") for answer in llm.answers] == [None, None, 0.5]
    assert [len(answer["tools"]) for answer in llm.answers] == [6, 6, 1]


def test_an_edited_tool_counts_from_the_next_turn(server: Server, llm: ScriptedLLM, browser: Browser) -> None:
    gate = Gate()
    schema = {"type": "object", "properties": {"file": {"type": "string"}}, "required": ["file"]}
    llm.route_to = "coder"
    old = call("read_file", {"path": "a.md"})
    llm.script(gated(old, gate), say("First."), old, say("Sorry."))
    with server.streaming({"type": "user_message", "content": "go"}, "s") as frames:
        llm.wait_for(lambda model: len(model.answers) == 1)
        browser.edit("tool/read_5Ffile/change", parameters=json.dumps(schema))
        gate.open()
        asked = next(frame.data for frame in frames if frame.type == "tool_call")
    server.post({"type": "tool_result", "call_id": asked["call_id"], "result": "text"}, "s")
    again = server.say("s", "again")

    assert not [frame for frame in again if frame.type == "tool_call"], "it does not fit any more"
    offered = [
        next(tool["function"]["parameters"] for tool in answer["tools"] if tool["function"]["name"] == "read_file")
        for answer in llm.answers
    ]
    assert ["path" in parameters["properties"] for parameters in offered] == [True, True, False, False]


def test_a_stricter_rule_holds_at_once_and_a_weaker_one_from_the_next_turn(
    server: Server, llm: ScriptedLLM, browser: Browser
) -> None:
    gates = Gate(), Gate()
    write = call("write_file", {"path": "a.md", "content": "x"})
    llm.route_to = "coder"
    llm.script(gated(write, gates[0]), say("Well."), gated(write, gates[1]), say("Well."), write)

    def write_under(outcome: str, gate: Gate) -> list[Any]:
        seen = len(llm.answers)
        with server.streaming({"type": "user_message", "content": "go"}, "s") as frames:
            llm.wait_for(lambda model: len(model.answers) > seen)
            browser.edit("approvalrule/1/change", outcome=outcome, reason="Because.")
            gate.open()
            return list(frames)

    denied = write_under("deny", gates[0])
    still_denied = write_under("allow", gates[1])
    allowed = server.say("s", "go")

    for frames in (denied, still_denied):
        assert [frame.data["metadata"]["code"] for frame in frames if frame.type == "error"] == ["denied_by_policy"]
    (released,) = [frame.data for frame in allowed if frame.type == "tool_call"]
    assert released["requires_approval"] is False


def test_a_refused_page_of_a_real_server_names_its_field(server: Server, browser: Browser) -> None:
    page = "/admin/agents_app/tool/write_5Ffile/change/"
    form = Form(browser.http.get(page).text)

    answer = browser.http.post(page, data=form.filled(parameters='{"type": "object", "$ref": "#"}'))

    assert answer.status_code == 200
    assert "a reference leads back to where it stands" in unescape(answer.text)
    assert eventually(lambda: server.http.get("/health").status_code == 200)

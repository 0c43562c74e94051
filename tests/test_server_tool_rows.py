"""What is registered, and what its rows, pages and rules make of it; within this process."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.contrib.admin.utils import quote
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.sql import emit_post_migrate_signal
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.test import Client
from django.urls import reverse

from agents_app import approvals, server_tools, tools
from agents_app.approvals import Choice, Verdict
from agents_app.models import Agent, ApprovalRequest, ApprovalRule, Tool
from agents_app.server_tools import ServerCall, server_tool
from events_app.models import AuditEntry, Event
from messages_app import acceptance, ending, steps
from messages_app.acceptance import Refused
from messages_app.inbound import ToolResult
from messages_app.turn_stream import TurnStream
from sessions_app import unanswered
from sessions_app.models import CallMoved, LostClaim, Session, ToolCall, Turn
from tests.factories import (
    CALLER,
    OPERATOR,
    act,
    claim,
    let_lease_run_out,
    look,
    make_session,
    make_turn,
    run,
    wanted,
)
from tests.pages import INJECTIONS, RAW, TRICKS, Page

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_passwords")]

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]}


@pytest.fixture(autouse=True)
def pay() -> Iterator[None]:
    """A tool that may not be repeated and one that may, with their rows, which the coder may use."""
    before = dict(server_tools.registered)
    server_tool("pay", description="Pay somebody.", parameters=SCHEMA, is_repeatable=False, deadline_seconds=30)(paying)
    server_tool("look_up", description="Look somebody up.", parameters=SCHEMA)(paying)
    tools.follow_registry()
    coder = Agent.objects.get(pk="coder")
    Agent.objects.filter(pk="coder").update(allowed_tools=[*coder.allowed_tools, "pay", "look_up"])
    yield
    server_tools.registered.clear()
    server_tools.registered.update(before)


async def paying(call: ServerCall) -> str:
    return "paid"


def make_doubtful(session_id: str = "s", to: str = "Ann") -> ToolCall:
    """A call whose first runner died after it had begun."""
    turn = make_turn(make_session(session_id))
    running = run(turn)
    act(running, wanted("pay", {"to": to}))
    begun: list[ServerCall] = []
    running.write(lambda step: steps.begin(step, begun, 0))
    assert [call.arguments for call in begun] == [{"to": to}]
    let_lease_run_out(turn)
    again: list[ServerCall] = []
    run(turn).write(lambda step: steps.begin(step, again, 0))
    assert again == []
    return turn.calls.get()


def executed(run: server_tools.Run) -> tuple[str, ToolCall.Outcome]:
    """What the model reads of a tool that does this."""
    server_tool("odd", description="", parameters={})(run)
    return asyncio.run(server_tools.execute(ServerCall("call_1", "odd", {}, "coder", "s", "t", 1, 5)))


def page_of(call: ToolCall) -> str:
    return reverse("admin:sessions_app_toolcall_given_up", args=[quote(call.pk)])


def status_of(call: ToolCall) -> tuple[str, str]:
    call.refresh_from_db()
    return call.status, Turn.objects.get(pk=call.turn_id).status


# --- The registry ---


@pytest.mark.parametrize("name", ["", "two words", "a" * 65, "pay", "switch_mode"])
def test_a_name_that_is_none_or_taken_stops_the_start(name: str) -> None:
    with pytest.raises(ImproperlyConfigured):
        server_tool(name, description="", parameters=SCHEMA)(paying)


@pytest.mark.parametrize("seconds", [0, -1, 86_401])
def test_a_deadline_out_of_range_stops_the_start(seconds: int) -> None:
    with pytest.raises(ImproperlyConfigured, match="1 to 86400"):
        server_tool("slow", description="", parameters=SCHEMA, deadline_seconds=seconds)


def test_a_module_that_cannot_be_imported_stops_the_start() -> None:
    with pytest.raises(ImproperlyConfigured, match="SERVER_TOOLS: there.is.none"):
        server_tools.load(["there.is.none"])


def test_a_schema_that_cannot_be_used_stops_the_migration() -> None:
    server_tool("odd", description="", parameters={"type": "nonsense"})(paying)

    with pytest.raises(ImproperlyConfigured, match="odd"):
        tools.follow_registry()


@pytest.mark.parametrize("error", [SystemExit(1), asyncio.CancelledError(), StopIteration()])
@pytest.mark.parametrize("on_thread", [True, False])
def test_what_would_end_more_than_the_tool_is_a_failure_like_any_other(error: BaseException, on_thread: bool) -> None:
    def fail(call: ServerCall) -> None:
        raise error

    async def fail_too(call: ServerCall) -> None:
        raise error

    told = "Error: odd failed on the server. Whether it took effect is not known."
    assert executed(fail if on_thread else fail_too) == (told, "error")


def test_a_function_that_returns_a_coroutine_is_awaited() -> None:
    async def work(call: ServerCall) -> str:
        return f"done for {call.agent}"

    assert executed(lambda call: work(call)) == ("done for coder", "ok")


# --- Its row ---


def test_migrating_makes_the_row_and_keeps_what_admins_may_change() -> None:
    row = Tool.objects.get(pk="pay")
    assert (row.description, row.parameters, row.deadline_seconds, row.on_server, row.version) == (
        "Pay somebody.",
        SCHEMA,
        30,
        True,
        1,
    )
    Tool.objects.filter(pk="pay").update(deadline_seconds=5, position=3)

    call_command("migrate", verbosity=0)

    row.refresh_from_db()
    assert (row.deadline_seconds, row.position, row.version) == (5, 3, 1)


def test_flushing_the_database_makes_the_row_as_well() -> None:
    Tool.objects.filter(pk="pay").delete()

    emit_post_migrate_signal(verbosity=0, interactive=False, db="default")  # what `flush` ends with

    assert Tool.objects.get(pk="pay").on_server


def test_migrating_back_to_before_there_were_any_makes_none() -> None:
    Tool.objects.filter(pk="pay").delete()
    before = MigrationLoader(connection).project_state(("agents_app", "0009_first_deadlines")).apps

    emit_post_migrate_signal(verbosity=0, interactive=False, db="default", apps=before)

    assert not Tool.objects.filter(pk="pay").exists()


def test_another_schema_in_the_code_is_another_version() -> None:
    Tool.objects.filter(pk="pay").update(description="Something else.", version=4)

    tools.follow_registry()

    row = Tool.objects.get(pk="pay")
    assert (row.description, row.version) == ("Pay somebody.", 5)


def test_one_that_comes_back_is_none_that_was_approved_before(superuser: Client) -> None:
    Tool.objects.filter(pk="pay").update(version=4)
    code = server_tools.registered.pop("pay")
    superuser.post(reverse("admin:agents_app_tool_delete", args=["pay"]), {"post": "yes"})
    assert not Tool.objects.filter(pk="pay").exists()
    server_tools.registered["pay"] = code

    tools.follow_registry()

    assert Tool.objects.get(pk="pay").version == 5


def test_a_tool_that_clients_execute_is_not_taken_over() -> None:
    Tool.objects.filter(pk="pay").update(on_server=False)

    with pytest.raises(ImproperlyConfigured, match="pay has the name of a tool that clients execute"):
        tools.follow_registry()

    assert not tools.is_on_server(Tool.objects.get(pk="pay"))


def test_what_is_left_in_doubt_without_an_operator_is_audited() -> None:
    call = make_doubtful()

    ending.delete(CALLER, call.session_id)

    assert [entry.action for entry in AuditEntry.objects.order_by("id")] == ["call.in_doubt", "call.left_in_doubt"]


def test_what_the_server_does_not_have_any_more_stays_in_doubt(operator: Client) -> None:
    call = make_doubtful()
    del server_tools.registered["pay"]
    unanswered.execute_again(OPERATOR, call, "Nothing came.")

    begun: list[ServerCall] = []
    run(Turn.objects.get()).write(lambda step: steps.begin(step, begun, 0))

    assert begun == []
    assert status_of(call) == ("in_doubt", "waiting")
    assert "does not have the tool" in Page(operator.get(page_of(call)).content.decode()).text


def test_one_that_the_server_does_not_have_any_more_is_no_client_s_to_execute() -> None:
    del server_tools.registered["pay"]
    turn = make_turn(make_session())

    assert act(run(turn), wanted("pay", {"to": "Ann"})) is None

    call = turn.calls.get()
    assert (call.status, call.outcome, call.on_server) == ("answered", "refused", True)
    assert "does not have pay" in call.answer


def test_what_the_code_says_is_not_edited_and_the_row_stays(superuser: Client) -> None:
    page = reverse("admin:agents_app_tool_change", args=["pay"])
    shown = Page(superuser.get(page).content.decode())
    assert "the server, again only if an operator says so" in shown.text

    form = superuser.get(page).context["adminform"].form
    fields = {name: form[name].value() for name in form.fields}
    fields["parameters"] = '{"type": "object"}'
    answer = superuser.post(page, {**fields, "description": "Pay nobody.", "deadline_seconds": "5"})

    assert answer.status_code == 200
    assert set(answer.context["adminform"].form.errors) == {"description", "parameters"}
    superuser.post(reverse("admin:agents_app_tool_delete", args=["pay"]), {"post": "yes"})
    assert Tool.objects.get(pk="pay").description == "Pay somebody."


# --- In doubt ---


def test_what_may_have_been_executed_is_left_to_an_operator() -> None:
    call = make_doubtful()

    assert status_of(call) == ("in_doubt", "waiting")
    entry = AuditEntry.objects.get()
    assert (entry.action, entry.actor, entry.target) == ("call.in_doubt", "system", call.pk)
    told = Event.objects.get(event_type="agent.error.occurred")
    assert told.data["error_type"] == "tool_in_doubt"
    assert (entry.reason, told.data["error_message"].partition(".")[0]) == (
        "The server ended while it executed pay.",
        "The server ended while it executed pay",
    )


def test_the_pages_of_an_operator_lead_to_it(operator: Client) -> None:
    call = make_doubtful()

    queue = operator.get(reverse("admin:agents_app_pendingapproval_changelist")).content.decode()
    start = Page(operator.get(reverse("admin:index")).content.decode()).text
    listed = Page(
        operator.get(reverse("admin:sessions_app_toolcall_changelist"), {"status": "in_doubt"}).content.decode()
    )
    asked = Page(operator.get(page_of(call)).content.decode()).text

    assert "In doubt: 1" in queue and "status=in_doubt" in queue
    assert "Calls in doubt" in start
    assert "in doubt, waits for an operator" in listed.text
    assert "pay is in doubt" in asked and "Execute again" in asked and "Ann" in asked


def test_without_any_nothing_is_said_of_it(operator: Client) -> None:
    assert "In doubt" not in operator.get(reverse("admin:agents_app_pendingapproval_changelist")).content.decode()
    assert "Calls in doubt" not in operator.get(reverse("admin:index")).content.decode()


def test_an_operator_has_it_executed_again_once(operator: Client) -> None:
    call = make_doubtful()

    answer = operator.post(page_of(call), {"reason": "Nothing came.", "again": "1"}, follow=True)

    assert "The server executes it again." in Page(answer.content.decode()).text
    assert status_of(call) == ("released", "queued")
    entry = AuditEntry.objects.order_by("-id").first()
    assert entry is not None
    assert (entry.action, entry.actor, entry.reason) == ("call.executed_again", "olga", "Nothing came.")
    begun: list[ServerCall] = []
    run(Turn.objects.get()).write(lambda step: steps.begin(step, begun, 0))
    assert [each.call_id for each in begun] == [call.pk]
    with pytest.raises(CallMoved, match="being executed"):
        unanswered.execute_again(OPERATOR, call, "Twice.")
    with pytest.raises(CallMoved, match="being executed"):
        unanswered.give_up(OPERATOR, call, "Gone.")


def test_it_needs_a_reason_and_the_right(operator: Client, auditor: Client) -> None:
    call = make_doubtful()

    assert operator.post(page_of(call), {"reason": "", "again": "1"}).status_code == 422
    assert auditor.post(page_of(call), {"reason": "Now.", "again": "1"}).status_code == 403
    assert status_of(call) == ("in_doubt", "waiting")


def test_a_client_s_call_is_never_executed_again(operator: Client) -> None:
    turn = make_turn(make_session())
    act(run(turn), wanted("read_file"))
    call = turn.calls.get()

    answer = operator.post(page_of(call), {"reason": "Now.", "again": "1"}, follow=True)

    assert "Not done." in Page(answer.content.decode()).text
    assert status_of(call) == ("released", "waiting")


def test_what_a_model_wrote_does_not_come_alive_on_the_page_of_a_call_in_doubt(operator: Client) -> None:
    plain, hostile = make_doubtful("plain"), make_doubtful("hostile", to="\n".join([*INJECTIONS, *TRICKS]))

    quiet, page = (Page(operator.get(page_of(call)).content.decode()) for call in (plain, hostile))

    assert len(page.elements) == len(quiet.elements)
    assert page.scripts == quiet.scripts
    assert RAW.search(page.text) is None


@pytest.mark.parametrize(("tool", "who"), [("pay", "this server itself"), ("write_file", "the client, on its side")])
def test_the_card_says_who_will_execute(operator: Client, tool: str, who: str) -> None:
    ApprovalRule.objects.create(tool=tool, outcome="ask")
    turn = make_turn(make_session())
    act(run(turn), wanted(tool, {"to": "Ann"} if tool == "pay" else None))

    card = reverse("admin:agents_app_approvalrequest_change", args=[turn.calls.get().approval.pk])

    assert who in Page(operator.get(card).content.decode()).text


# --- The turn ---


def test_arguments_that_somebody_changed_are_not_executed() -> None:
    turn = make_turn(make_session())
    running = run(turn)
    act(running, wanted("pay", {"to": "Ann"}))
    ToolCall.objects.update(arguments_text='{"to":"Mallory"}')

    with pytest.raises(steps.ArgumentsTampered):
        running.write(lambda step: steps.begin(step, [], 0))


def test_a_tool_is_told_who_asks_for_what_and_until_when() -> None:
    turn = make_turn(make_session())
    running = run(turn)
    act(running, wanted("pay", {"to": "Ann"}))
    begun: list[ServerCall] = []

    running.write(lambda step: steps.begin(step, begun, 0))

    call_id = turn.calls.get().pk
    assert begun == [ServerCall(call_id, "pay", {"to": "Ann"}, "coder", "s", str(turn.pk), CALLER.account_id, 30)]


def test_the_time_in_which_the_server_executes_counts_as_the_turn_s() -> None:
    turn = make_turn(make_session())
    running = run(turn)
    act(running, wanted("pay", {"to": "Ann"}), wanted("read_file"))
    running.write(lambda step: steps.begin(step, [], 0))

    call = turn.calls.get(tool_name="pay")
    running.write(lambda step: steps.store(step, call.pk, "paid", ToolCall.Outcome.OK, 1_500))

    turn.refresh_from_db()
    assert (turn.status, turn.ran_ms) == ("waiting", 1_500)


def test_its_time_is_none_that_a_client_has() -> None:
    ApprovalRule.objects.create(position=0, tool="pay", outcome="ask", self_approval=True)
    turn = make_turn(make_session())
    act(run(turn), wanted("pay", {"to": "Ann"}), wanted("look_up", {"to": "Ann"}))

    approvals.decide_by_id(CALLER, turn.calls.get(tool_name="pay").pk, Choice(Verdict.APPROVE))

    assert {(call.status, call.deadline_at) for call in turn.calls.all()} == {("released", None)}


def test_of_two_runners_that_execute_it_the_one_that_has_the_turn_is_heard() -> None:
    turn = make_turn(make_session())
    first = run(turn)
    act(first, wanted("look_up", {"to": "Ann"}))
    begun: list[ServerCall] = []
    first.write(lambda step: steps.begin(step, begun, 0))
    let_lease_run_out(turn)
    second = TurnStream(claim(turn, "another"))
    second.write(lambda step: steps.begin(step, begun, 0))

    with pytest.raises(LostClaim):
        first.write(lambda step: steps.store(step, begun[0].call_id, "first", ToolCall.Outcome.OK, 0))
    second.write(lambda step: steps.store(step, begun[1].call_id, "second", ToolCall.Outcome.OK, 0))

    assert begun[0] == begun[1]
    assert [call.answer for call in turn.calls.all()] == ["second"]


def test_what_is_approved_and_cancelled_before_a_runner_comes_is_not_executed() -> None:
    ApprovalRule.objects.create(position=0, tool="pay", outcome="ask", self_approval=True)
    turn = make_turn(make_session())
    act(run(turn), wanted("pay", {"to": "Ann"}))
    call = turn.calls.get()
    approvals.decide_by_id(CALLER, call.pk, Choice(Verdict.APPROVE))
    assert status_of(call) == ("released", "queued")

    ending.cancel(CALLER, "s")

    assert status_of(call) == ("answered", "cancelled")
    assert "not known" not in call.answer
    with pytest.raises(KeyError):
        claim(turn)


def test_a_client_s_no_comes_too_late_for_what_the_server_executes() -> None:
    turn = make_turn(make_session())
    running = run(turn)
    act(running, wanted("pay", {"to": "Ann"}))
    call = turn.calls.get()
    running.write(lambda step: steps.begin(step, [], 0))

    with pytest.raises(Refused) as refused:
        acceptance.tool_result(ToolResult("s", call.pk, error="User rejected this operation"), CALLER)

    assert refused.value.chunk.code == "executed_by_server"
    running.write(lambda step: steps.store(step, call.pk, "paid", ToolCall.Outcome.OK, 0))
    call.refresh_from_db()
    assert call.answer == "paid"


def test_a_client_s_no_says_nothing_of_what_is_in_doubt() -> None:
    call = make_doubtful()

    with pytest.raises(Refused):
        acceptance.tool_result(ToolResult("s", call.pk, error="User rejected this operation"), CALLER)

    assert status_of(call) == ("in_doubt", "waiting")


def test_one_that_kills_its_server_each_time_is_not_executed_for_ever() -> None:
    turn = make_turn(make_session())
    act(run(turn), wanted("look_up", {"to": "Ann"}))
    began = 0

    with pytest.raises(KeyError):  # parked
        while began < 10:
            let_lease_run_out(turn)
            stream = TurnStream(claim(turn, f"runner {began}"))
            stream.write(lambda step: steps.begin(step, [], 0))
            began += 1

    assert began <= settings.TURN_MAX_LOSSES + 1
    assert status_of(turn.calls.get()) == ("answered", "failed")


def test_what_it_lost_is_forgotten_with_a_result() -> None:
    turn = make_turn(make_session())
    act(run(turn), wanted("look_up", {"to": "Ann"}), wanted("look_up", {"to": "Bob"}))
    let_lease_run_out(turn)
    stream = TurnStream(claim(turn, "another"))
    stream.write(lambda step: steps.begin(step, [], 0))
    turn.refresh_from_db()
    assert turn.lost_count == 1

    stream.write(lambda step: steps.store(step, turn.calls.in_order()[0].pk, "Ann", ToolCall.Outcome.OK, 0))

    turn.refresh_from_db()
    assert turn.lost_count == 0


def test_a_turn_that_fails_meanwhile_leaves_no_call_open() -> None:
    turn = make_turn(make_session())
    running = run(turn)
    act(running, wanted("pay", {"to": "Ann"}), wanted("write_file"), wanted("read_file"))
    running.write(lambda step: steps.begin(step, [], 0))

    running.write(lambda step: steps.fail(step, "turn_timeout", "Too slow.", "coder", None))

    told = {call.tool_name: json.loads(call.answer) for call in turn.calls.all()}
    assert {each["status"] for each in told.values()} == {"cancelled"}
    assert {name for name, each in told.items() if "not known" in each["message"]} == {"pay"}
    assert not any("user" in each["message"] for each in told.values())
    assert ApprovalRequest.objects.get().status == "cancelled"


def test_a_turn_that_is_parked_leaves_no_call_open() -> None:
    turn = make_turn(make_session())
    act(run(turn), wanted("pay", {"to": "Ann"}))
    Turn.objects.filter(pk=turn.pk).update(lost_count=2, is_singled_out=True, owner="dead")
    let_lease_run_out(turn)

    with pytest.raises(KeyError):
        claim(turn)

    call = turn.calls.get()
    assert status_of(call) == ("answered", "failed")
    assert call.outcome == "cancelled"


def test_a_parked_turn_whose_calls_cannot_be_closed_keeps_no_other_waiting() -> None:
    turn = make_turn(make_session())
    act(run(turn), wanted("pay", {"to": "Ann"}), wanted("write_file"))
    ApprovalRequest.objects.update(status=ApprovalRequest.Status.APPROVED)  # by somebody's hand: its call waits still
    Turn.objects.filter(pk=turn.pk).update(lost_count=2, is_singled_out=True, owner="dead")
    let_lease_run_out(turn)
    other = make_turn(make_session("other"))

    assert claim(other).session_id == "other"

    assert Turn.objects.get(pk=turn.pk).status == "failed"


def test_before_its_calls_are_answered_the_model_is_not_asked() -> None:
    turn = make_turn(make_session())
    running = run(turn)
    act(running, wanted("pay", {"to": "Ann"}), scene=look(running.claim))

    assert steps.look(running.claim) is None

    running.write(lambda step: steps.begin(step, [], 0))
    running.write(lambda step: steps.store(step, turn.calls.get().pk, "paid", ToolCall.Outcome.OK, 0))
    assert look(running.claim).messages[-1]["content"] == "paid"
    assert Session.objects.get().message_count == 3

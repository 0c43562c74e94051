"""Rows with plain defaults, made the way the product makes them."""

import json
from datetime import timedelta
from functools import partial
from typing import Any

from django.db import connection
from django.db.models.functions import Now

from agents_app.llm import CallWanted, FinishedStep
from agents_app.models import ApprovalRequest, ApprovalRule
from messages_app import acceptance, claims, steps
from messages_app.inbound import UserMessage
from messages_app.models import Message
from messages_app.steps import Scene, Spent
from messages_app.turn_stream import TurnStream
from sessions_app import lifecycle
from sessions_app.callers import FIRST_ACCOUNT, Caller
from sessions_app.models import Claim, Session, ToolCall, Turn
from tests import databases

CALLER = Caller(FIRST_ACCOUNT, "tests")
OPERATOR = Caller(FIRST_ACCOUNT, "olga", channel="admin", is_operator=True)
# What fits the schema of each tool that is there from the beginning.
FITTING: dict[str, dict[str, Any]] = {
    "read_file": {"path": "a.md"},
    "write_file": {"path": "a.md", "content": "hello"},
    "list_files": {"path": "."},
    "create_directory": {"path": "docs"},
    "execute_command": {"command": "ls"},
    "search_in_code": {"query": "x"},
    "switch_mode": {"mode": "debug"},
}


def make_session(session_id: str = "s", *, agent: str = "coder") -> Session:
    session = lifecycle.create(CALLER, session_id)
    Session.objects.filter(pk=session.pk).update(current_agent=agent)
    session.refresh_from_db()
    return session


def make_turn(session: Session, content: str = "hello") -> Turn:
    """A queued turn, as a user message opens it."""
    accepted = acceptance.user_message(UserMessage(session.pk, content), CALLER)
    return Turn.objects.get(pk=accepted.origin)


def block_audit_entries() -> None:
    """From now on no audit entry can be stored."""
    _execute(databases.refusal("events_app_auditentry")[0])


def let_audit_entries() -> None:
    _execute(databases.refusal("events_app_auditentry")[1])


def _execute(statements: list[str]) -> None:
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


def make_answered_turn(session: Session, content: str, answer: str | None) -> Turn:
    """A turn of the past; without an answer, one that failed."""
    turn = make_turn(session, content)
    if answer is not None:
        Message.objects.create(
            session=session, turn=turn, turn_position=turn.position, role="assistant", content=answer, agent="coder"
        )
    status = Turn.Status.FAILED if answer is None else Turn.Status.COMPLETED
    Turn.objects.filter(pk=turn.pk).update(status=status, finished_at=Now())
    return turn


def claim(turn: Turn, owner: str = "runner") -> Claim:
    claimed = {each.turn_id: each for each, *_ in claims.claim_turns(owner, 100)}
    return claimed[turn.pk]


def let_lease_run_out(turn: Turn) -> None:
    Turn.objects.filter(pk=turn.pk).update(lease_until=Now() - timedelta(seconds=1))


def wanted(tool: str = "write_file", arguments: dict[str, Any] | str | None = None) -> CallWanted:
    """A call as a model writes it; without arguments, with some that fit."""
    if arguments is None:
        arguments = FITTING[tool]
    return CallWanted("", tool, arguments if isinstance(arguments, str) else json.dumps(arguments))


def run(turn: Turn) -> TurnStream:
    """What a runner holds a claimed turn by."""
    return TurnStream(claim(turn))


def act(
    stream: TurnStream,
    *calls: CallWanted,
    text: str = "",
    scene: Scene | None = None,
    spent: Spent | None = None,
    ran_ms: int = 0,
) -> Turn.Status | None:
    """Have a running turn store a model's answer that asks for tools; what becomes of the turn."""
    scene, finished = scene or look(stream.claim), FinishedStep(text, list(calls))
    asked = steps.weigh(finished, scene)
    act = partial(steps.act, finished=finished, asked=asked, scene=scene, spent=spent, ran_ms=ran_ms)
    return stream.write(act)[1]


def look(claim: Claim) -> Scene:
    """What the next model step starts from, with no call open."""
    scene = steps.look(claim)
    assert scene is not None
    return scene


def complete(stream: TurnStream, text: str = "done", spent: Spent | None = None) -> None:
    """Have a running turn end with an answer."""
    stream.write(partial(steps.complete, text=text, agent=look(stream.claim).agent, spent=spent))


def fail(stream: TurnStream, code: str = "model_timeout", spent: Spent | None = None) -> None:
    """Have a running turn end with an error."""
    agent = look(stream.claim).agent
    stream.write(partial(steps.fail, code=code, message="Too slow.", agent=agent, spent=spent))


def make_calls(session: Session, *calls: CallWanted, text: str = "") -> list[ToolCall]:
    """A new turn whose model asks for these tools at once."""
    turn = make_turn(session)
    act(run(turn), *calls, text=text)
    return list(turn.calls.select_related("turn").in_order())


def make_waiting_call(
    session: Session,
    tool: str = "write_file",
    arguments: dict[str, Any] | None = None,
    *,
    self_approval: bool = True,
    agent: str = "coder",
) -> ToolCall:
    """A call of a turn that waits for a person to decide on it."""
    Session.objects.filter(pk=session.pk).update(current_agent=agent)
    if tool == "switch_mode" or not self_approval:
        ApprovalRule.objects.create(position=0, tool=tool, outcome="ask", self_approval=self_approval)
    return make_calls(session, wanted(tool, arguments))[0]


def many_waiting(like: ApprovalRequest, count: int) -> None:
    """Requests beside one, each in a session of its own, as rows."""
    call = ToolCall.objects.select_related("turn").get(pk=like.call_id)
    sessions = [Session(pk=f"many{n}", account_id=1, current_agent="coder") for n in range(count)]
    turns = [Turn(session=session, position=1, status="waiting") for session in sessions]
    calls = [
        ToolCall(
            session=turn.session,
            turn=turn,
            round=1,
            position=0,
            agent="coder",
            tool_name=call.tool_name,
            tool_version=1,
            arguments_text=call.arguments_text,
            args_hash="0" * 64,
            requires_approval=True,
            status="waiting",
        )
        for turn in turns
    ]
    requests = [
        ApprovalRequest(
            call=each,
            session=each.session,
            tool_name=each.tool_name,
            arguments_text=each.arguments_text,
            args_hash=each.args_hash,
            rule=like.rule,
            reason=like.reason,
            self_approval=True,
        )
        for each in calls
    ]
    Session.objects.bulk_create(sessions)
    Turn.objects.bulk_create(turns)
    ToolCall.objects.bulk_create(calls)
    ApprovalRequest.objects.bulk_create(requests)

"""What a person is shown who decides on a tool call: all of what would run, and what is known around it.

The queries are a fixed number, however long the session is; what is left out is counted.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.core import signing
from django.utils import timezone

from agents_app import effects
from agents_app.binding import canonical
from agents_app.effects import Change, KnownContent, Line
from agents_app.models import ApprovalRequest, Decision, Tool
from events_app.display import as_json, clipped, escaped_json, moment, odd_words, visible
from sessions_app.admin import ENDED
from sessions_app.models import Session, ToolCall

SALT = "agents_app.decision"
SEEN_FOR_SECONDS = 24 * 3600
MESSAGES_AROUND = 6
CALLS_AROUND = 20
SIMILAR_SHOWN = 8
SIMILAR_LOOKED_THROUGH = 30
BEGINNING = 2_000


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument as it will run, with its size where it has more than one line."""

    name: str
    text: str
    size: str = ""
    kind: str = ""  # of what is no text: true is not "true"

    @property
    def is_long(self) -> bool:
        return bool(self.size)


@dataclass(frozen=True, slots=True)
class Said:
    """A message or a call of the conversation around; `who` in the words of the page."""

    at: datetime
    who: str
    text: str
    is_call: bool = False


@dataclass(frozen=True, slots=True)
class Similar:
    """What somebody decided on another call of the same tool."""

    made: Decision
    about: str
    is_same: bool


@dataclass(frozen=True, slots=True)
class Command:
    """A command line as it will run."""

    line: str
    words: list[str]
    by_shell: bool
    folder: str
    timeout: str


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that became of the call."""

    at: datetime | None
    text: str
    note: str = ""


@dataclass(slots=True)
class Card:
    """Everything that the page of one approval request shows; texts of others are made visible already."""

    approval: ApprovalRequest
    arguments: list[Argument]
    whole: str
    odd: list[str]
    about: str
    command: Command | None = None
    known: KnownContent | None = None
    content_changes: list[Line] = field(default_factory=list)
    edits: list[Change] = field(default_factory=list)
    replaces: bool = False

    @classmethod
    def of(cls, approval: ApprovalRequest) -> "Card":
        call, arguments = approval.call, approval.arguments
        whole = as_json(arguments)
        card = cls(
            approval,
            # What is short first: a path should not be looked for below a file's content.
            sorted((_argument(name, value) for name, value in arguments.items()), key=lambda each: each.is_long),
            visible(whole),
            odd_words(whole),
            effects.touched(arguments),
        )
        if effects.is_command(approval.tool_name, arguments):
            card.command = _command(arguments)
        if effects.replaces_content(approval.tool_name, arguments):
            card.replaces = True
            card.known = effects.known_content(call, arguments["path"])
            if card.known is not None:
                card.content_changes = shown(effects.difference(card.known.text, arguments["content"]))
        if card.decision and card.decision.edited_arguments is not None:
            card.edits = shown_changes(effects.changes(arguments, card.decision.edited_arguments))
        return card

    @property
    def call(self) -> ToolCall:
        return self.approval.call

    @property
    def session(self) -> Session:
        return self.approval.session

    @property
    def decision(self) -> Decision | None:
        return getattr(self.approval, "decision", None)

    @property
    def is_pending(self) -> bool:
        return self.approval.status == ApprovalRequest.Status.PENDING

    @property
    def size(self) -> str:
        return f"{len(canonical(self.approval.arguments).encode('utf-8', 'replace')):,} bytes"

    @property
    def as_typed(self) -> str:
        """The arguments as an editor begins with them."""
        return escaped_json(self.approval.arguments)

    @property
    def schema(self) -> dict[str, Any]:
        """The tool's schema, for the editor; of a tool that is gone anything goes, and the server refuses it."""
        tool = Tool.objects.filter(pk=self.approval.tool_name).first()
        return tool.parameters if tool else {}

    @property
    def agent_says(self) -> str:
        """The words with which the agent asked: its own, and no description of what will run."""
        message = self.call.turn.messages.filter(round=self.call.round).first()
        return visible(message.content) if message else ""

    @property
    def around(self) -> list[Said]:
        """The latest messages and calls before the call, oldest first."""
        before = self.session.messages.filter(turn_position__lte=self.call.turn.position)
        messages = before.exclude(turn=self.call.turn_id, round=self.call.round).order_by("-turn_position", "-id")
        calls = self.session.calls.filter(created_at__lte=self.call.created_at).exclude(pk=self.call.pk)
        # In this order also where two have the same time: the sort keeps it.
        said = [
            *(_message(message) for message in reversed(list(messages[:MESSAGES_AROUND]))),
            *(_call(call) for call in reversed(list(calls.order_by("-created_at")[:CALLS_AROUND]))),
        ]
        oldest = min((each.at for each in said if not each.is_call), default=None)
        return sorted((each for each in said if not each.is_call or not oldest or each.at >= oldest), key=_when)

    @property
    def similar(self) -> list[Similar]:
        """What people decided on calls of the same tool: those about the same thing first, then the latest."""
        made = Decision.objects.filter(
            request__tool_name=self.approval.tool_name,
            request__session__account_id=self.session.account_id,
            verdict__in=(Decision.Verdict.APPROVE, Decision.Verdict.EDIT, Decision.Verdict.REJECT),
        ).exclude(request=self.approval)
        latest = made.select_related("request").defer("edited_text").order_by("-id")[:SIMILAR_LOOKED_THROUGH]
        found = [_similar(each, self.about) for each in latest]
        return sorted(found, key=lambda each: not each.is_same)[:SIMILAR_SHOWN]

    @property
    def steps(self) -> list[Step]:
        return list(_steps(self))

    @property
    def is_executed(self) -> bool:
        """Whether the client, or the server, told how it went."""
        return self.call.outcome in (ToolCall.Outcome.OK, ToolCall.Outcome.ERROR)

    @property
    def result(self) -> str:
        return visible(effects.client_result(self.call))


def seal(approval: ApprovalRequest, user_id: Any) -> str:
    """What a decision in the admin has to send back: which arguments were shown, to whom and when, signed."""
    return signing.dumps([approval.call_id, approval.args_hash, str(user_id), _now_ms()], salt=SALT)


def unseal(text: str, approval: ApprovalRequest, user_id: Any) -> tuple[str, int]:
    """The hash of the arguments that were shown, and how many milliseconds ago. Raises BadSignature."""
    call_id, args_hash, who, at = signing.loads(text, salt=SALT, max_age=SEEN_FOR_SECONDS)
    if (call_id, who) != (approval.call_id, str(user_id)):
        raise signing.BadSignature("sealed for another call or person")
    return args_hash, max(0, _now_ms() - at)


def _now_ms() -> int:
    return round(timezone.now().timestamp() * 1000)


def shown(lines: list[Line]) -> list[Line]:
    return [Line(line.kind, visible(line.text)) for line in lines]


def shown_changes(changes: list[Change]) -> list[Change]:
    return [Change(visible(change.name), shown(change.lines)) for change in changes]


def _argument(name: str, value: Any) -> Argument:
    if not isinstance(value, str):
        value = json.dumps(value, indent=2, ensure_ascii=False)
        return Argument(visible(name), visible(value), _measured(value) if "\n" in value else "", "no text")
    return Argument(visible(name), visible(value), _measured(value) if "\n" in value or len(value) > 200 else "")


def _measured(text: str) -> str:
    lines = text.count("\n") + (not text.endswith("\n"))
    return f"{lines:,} line{'s' * (lines != 1)}, {len(text):,} characters"


def _command(arguments: dict[str, Any]) -> Command:
    timeout = arguments.get("timeout")
    return Command(
        visible(arguments["command"]),
        [visible(word) for word in effects.command_words(arguments) or []],
        bool(arguments.get("shell")),
        visible(str(arguments.get("cwd") or "")),
        "" if timeout is None else f"{timeout} s",
    )


def _message(message: Any) -> Said:
    who = f"{message.agent} (agent)" if message.agent else message.role
    return Said(message.created_at, visible(who), clipped(message.content, BEGINNING))


def _call(call: ToolCall) -> Said:
    ended, _ = ENDED[call.outcome]
    text = f"{visible(call.tool_name)} {clipped(effects.touched(call.final_arguments), 200)}: {ended or call.status}"
    return Said(call.created_at, visible(call.agent), text, is_call=True)


def _when(said: Said) -> datetime:
    return said.at


def _similar(made: Decision, about: str) -> Similar:
    was = effects.touched(made.request.arguments)
    return Similar(made, clipped(was, 120), was == about)


def _steps(card: Card) -> Iterator[Step]:
    call, made = card.call, card.decision
    yield Step(card.approval.created_at, f"Asked for by the {visible(call.agent)} agent")
    if made is not None:
        by = f"{visible(made.decided_by)} ({made.channel})"
        words = {
            Decision.Verdict.APPROVE: f"Approved by {by}",
            Decision.Verdict.EDIT: f"Approved with other arguments by {by}",
            Decision.Verdict.REJECT: f"Rejected by {by}",
            Decision.Verdict.SUPERSEDED: f"Superseded: {by} sent a new message",
            Decision.Verdict.CANCELLED: f"Cancelled by {by}",
        }
        yield Step(made.decided_at, words[Decision.Verdict(made.verdict)], visible(made.feedback))
    who = "server" if call.on_server else "client"
    if call.released_at is not None:
        yield Step(call.released_at, f"Released to the {who}")
    if call.begun_at is not None:
        yield Step(call.begun_at, "The server began to execute it")
    if call.answered_at is not None and call.outcome != ToolCall.Outcome.REJECTED:
        words_of = {
            ToolCall.Outcome.OK: "Executed" if call.on_server else "Executed: the client sent its result",
            ToolCall.Outcome.ERROR: "Failed" if call.on_server else "Failed: the client sent an error",
            ToolCall.Outcome.TIMED_OUT: f"Timed out: no result came within {call.deadline_seconds} s",
            ToolCall.Outcome.IN_DOUBT: "In doubt: an operator ended the wait for a result",
        }
        yield Step(call.answered_at, words_of.get(ToolCall.Outcome(call.outcome), f"Closed: {call.outcome}"))
    elif call.status == ToolCall.Status.IN_DOUBT:
        yield Step(None, "In doubt: the server ended meanwhile. An operator has to say what becomes of it")
    elif call.is_to_be_executed:
        yield Step(None, "The server executes it")
    elif call.is_open and call.released_at is not None:
        until = f", until {moment(call.deadline_at)} UTC" if call.deadline_at is not None else ""
        yield Step(None, f"Waiting for the client's result{until}")
    if made is not None and made.verdict == Decision.Verdict.REJECT:
        yield Step(call.answered_at, "The agent was told, and goes on without it")

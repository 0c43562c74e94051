"""What a client may send to the stream endpoint: bytes to one of four typed messages, or a refusal (protocol 3.1)."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

from django.conf import settings

from agents_app.approvals import MAX_FEEDBACK_CHARS
from agents_app.llm.base import MAX_ARGUMENT_BYTES
from orchestrator_site.errors import BadRequest, Invalid, TooLarge
from sessions_app.callers import Caller
from sessions_app.idempotency import KEY, Key, fingerprint
from sessions_app.lifecycle import valid_session_id

MAX_REASON_CHARS = 2_000
MAX_CALL_ID_CHARS = 128
MAX_HASH_CHARS = 64
MAX_RESULT_BYTES = 1024 * 1024

T = TypeVar("T")


class Busy(StrEnum):
    """What a user's message does when a turn is queued or running already."""

    ENQUEUE = "enqueue"
    REJECT = "reject"
    INTERRUPT = "interrupt"


@dataclass(frozen=True, slots=True)
class UserMessage:
    session_id: str
    content: str
    agent_type: str | None = None
    busy: Busy = Busy.ENQUEUE
    message_id: str | None = None


@dataclass(frozen=True, slots=True)
class SwitchAgent:
    session_id: str
    agent_type: str
    reason: str
    message_id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    session_id: str
    call_id: str
    result: Any = None
    error: str | None = None
    args_hash: str | None = None
    message_id: str | None = None


@dataclass(frozen=True, slots=True)
class HitlDecision:
    session_id: str
    call_id: str
    decision: str
    modified_arguments: dict[str, Any] | None = None
    feedback: str | None = None
    args_hash: str | None = None
    message_id: str | None = None


Inbound = UserMessage | SwitchAgent | ToolResult | HitlDecision


def parse(envelope: Any) -> tuple[Inbound, bool]:
    """The message in a request's body, and whether its sender wants token deltas.

    Unknown keys are ignored and null counts as absent, because the IDE sends every key it knows with each message.
    Raises BadRequest, TooLarge or Invalid where protocol 3.1 and guarantees 2.5 say so.
    """
    if not isinstance(envelope, dict):
        raise Invalid("Has to be an object.", "body", kind="dict_type")
    session_id = valid_session_id(_typed(envelope, "session_id", str, required=True))
    tokens = _typed(envelope, "stream_tokens", bool)
    busy = busy_in(envelope)
    return typed(session_id, _typed(envelope, "message", dict, required=True), busy), tokens is not False


def busy_in(source: dict[str, Any]) -> Busy:
    """What is asked for beside a message, or on a socket in it. Raises Invalid."""
    word = _typed(source, "busy", str)
    if word not in (None, *Busy):
        raise Invalid(f"Has to be one of {', '.join(Busy)}.", "body", "busy", kind="enum")
    return Busy(word or Busy.ENQUEUE)


def typed(session_id: str, message: dict[str, Any], busy: Busy) -> Inbound:
    """The typed form of a message object, or the refusals of `parse`."""
    kind = message.get("type")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise BadRequest(f"Unsupported message type: {kind[:50]}" if isinstance(kind, str) else "A message has a type.")
    read = reader(session_id, message)
    if isinstance(read, UserMessage):
        read = replace(read, busy=busy)
    return replace(read, message_id=_message_id(message))


def own_key(message: Inbound, caller: Caller) -> Key | None:
    """The key that a message brings along as its id, the same over HTTP and on a socket; None without an id."""
    if message.message_id is None:
        return None
    # Without what is absent: a later version, which knows more fields, finds the same in what was sent to this one.
    said = {name: value for name, value in asdict(message).items() if value is not None}
    return Key(caller, message.message_id, fingerprint(type(message).__name__, said), session_id=message.session_id)


def _message_id(message: dict[str, Any]) -> str | None:
    value = _typed(message, "message_id", str, "message")
    if value is not None and not re.fullmatch(KEY, value):
        raise Invalid("Has to be 1 to 255 visible ASCII characters.", "body", "message", "message_id", kind="pattern")
    return value


def _user_message(session_id: str, message: dict[str, Any]) -> UserMessage:
    content = _typed(message, "content", str, "message", required=True)
    if len(content) > settings.MAX_MESSAGE_CHARS:
        raise TooLarge(f"A message may have {settings.MAX_MESSAGE_CHARS} characters.")
    if not content.strip():
        raise Invalid("Has to say something.", "body", "message", "content", kind="blank")
    return UserMessage(session_id, content, _agent_type(message))


def _switch_agent(session_id: str, message: dict[str, Any]) -> SwitchAgent:
    target = _agent_type(message)
    if not target:
        raise BadRequest("switch_agent needs an agent_type.")
    # Absent and null have texts of their own in the contract (section 4, row 6).
    reason = "User requested agent switch"
    if "reason" in message:
        reason = _short(message, "reason", MAX_REASON_CHARS) or f"User requested switch to {target}"
    return SwitchAgent(session_id, target, reason)


def _tool_result(session_id: str, message: dict[str, Any]) -> ToolResult:
    call_id = _needed(message, "call_id")
    error = _typed(message, "error", str, "message")
    result = message.get("result")
    if error is not None and result is not None:
        raise Invalid("Has either a result or an error.", "body", "message", "error")
    _weigh(result if error is None else error, MAX_RESULT_BYTES, "A result")
    return ToolResult(session_id, call_id, result, error, _short(message, "args_hash", MAX_HASH_CHARS))


def _hitl_decision(session_id: str, message: dict[str, Any]) -> HitlDecision:
    call_id = _needed(message, "call_id")
    decision = _needed(message, "decision")
    arguments = _typed(message, "modified_arguments", dict, "message")
    feedback = _typed(message, "feedback", str, "message")
    if decision == "edit" and arguments is None:
        raise Invalid("An edit needs its arguments.", "body", "message", "modified_arguments", kind="missing")
    if decision in ("approve", "reject") and arguments is not None:
        raise Invalid("Only an edit has arguments.", "body", "message", "modified_arguments")
    _weigh(arguments, MAX_ARGUMENT_BYTES, "Arguments")
    if feedback is not None and len(feedback) > MAX_FEEDBACK_CHARS:
        raise TooLarge(f"Feedback may have {MAX_FEEDBACK_CHARS} characters.")
    args_hash = _short(message, "args_hash", MAX_HASH_CHARS)
    return HitlDecision(session_id, call_id, decision, arguments, feedback, args_hash)


_READERS: dict[str, Callable[[str, dict[str, Any]], Inbound]] = {
    "user_message": _user_message,
    "switch_agent": _switch_agent,
    "tool_result": _tool_result,
    "hitl_decision": _hitl_decision,
}


def _typed(source: dict[str, Any], name: str, kind: type[T], *where: str, required: bool = False) -> T | Any:
    value = source.get(name)
    if value is None:
        if required:
            raise Invalid("Field required.", "body", *where, name, kind="missing")
        return None
    if not isinstance(value, kind):
        raise Invalid(f"Has to be {_NAMES[kind]}.", "body", *where, name, kind=f"{kind.__name__}_type")
    return value


_NAMES: dict[type, str] = {str: "a text", bool: "true or false", dict: "an object"}


def _weigh(value: Any, limit: int, what: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) > limit:
        raise TooLarge(f"{what} may have {limit} bytes.")


def _short(message: dict[str, Any], name: str, limit: int) -> str | None:
    value = _typed(message, name, str, "message")
    if value is not None and len(value) > limit:
        raise Invalid(f"May have {limit} characters.", "body", "message", name, kind="too_long")
    return value


def _needed(message: dict[str, Any], name: str) -> str:
    """A text without which the message means nothing: 400 when it is missing, 422 when it is something else."""
    value = _short(message, name, MAX_CALL_ID_CHARS)
    if not value:
        raise BadRequest(f"{message['type']} needs a {name}.")
    return value


def _agent_type(message: dict[str, Any]) -> str | None:
    name = _typed(message, "agent_type", str, "message")
    # What the IDE calls the coder inside (protocol 6.1).
    return "coder" if name == "code" else name

"""What clients send: the bodies of requests, the messages of the stream endpoint and those of the socket."""

from typing import Any

from django.conf import settings

from agents_app.approvals import BY_A_PERSON, MAX_FEEDBACK_CHARS
from agents_app.llm.base import MAX_ARGUMENT_BYTES
from messages_app.consumers import FIELDS
from messages_app.inbound import MAX_CALL_ID_CHARS, MAX_HASH_CHARS, MAX_REASON_CHARS, MAX_RESULT_BYTES, Busy
from orchestrator_site.schema import examples
from orchestrator_site.schema.shapes import (
    AGENT,
    FLAG,
    KEY,
    NULL,
    OBJECT,
    SESSION_ID,
    TEXT,
    Schema,
    body,
    nullable,
    one_of,
    only,
    ref,
    text,
    told_apart,
)

AGENT_ASKED_FOR = {**AGENT, "description": "An agent of `GET /agents`; `code` is taken for `coder`."}
CALL_ASKED_FOR = text(MAX_CALL_ID_CHARS, least=1)
HASH_SEEN = text(MAX_HASH_CHARS, description="The `args_hash` of what was looked at, or executed.")
BUSY = {
    **one_of(*Busy),
    "default": "enqueue",
    "description": "What a user message does when a turn is queued or running: it queues behind it, it is refused "
    "(`turn_running`), or all of them are cancelled for it. One that waits is superseded in any case.",
}
MESSAGE_ID = {
    "message_id": {
        **KEY,
        "description": "The client's own id of the message, unique within the session: sent again, it is stored once "
        "and its answer is told again. With an `Idempotency-Key` it counts for nothing.",
    }
}
VERDICT = one_of(*BY_A_PERSON)
EDITED = {**OBJECT, "description": f"The whole of what is to run instead, at most {MAX_ARGUMENT_BYTES} bytes."}
FEEDBACK = text(MAX_FEEDBACK_CHARS, description="What the model reads of a rejection; kept with every decision.")
ONLY_AN_EDIT_HAS_ARGUMENTS = {
    "if": {"properties": {"decision": {"const": "edit"}}, "required": ["decision"]},
    "then": {"properties": {"modified_arguments": OBJECT}, "required": ["modified_arguments"]},
    "else": {"properties": {"modified_arguments": NULL}},
}
EITHER_RESULT_OR_ERROR = {
    "not": {
        "properties": {"result": {"not": NULL}, "error": {"not": NULL}},
        "required": ["result", "error"],
    }
}

USER_MESSAGE: dict[str, Schema] = {
    "type": only("user_message"),
    "content": text(settings.MAX_MESSAGE_CHARS, least=1, pattern=r"\S"),
    "agent_type": {
        **AGENT_ASKED_FOR,
        "description": "Who is to answer; without it the orchestrator routes.",
    },
    **MESSAGE_ID,
}
SWITCH_AGENT: dict[str, Schema] = {
    "type": only("switch_agent"),
    "agent_type": AGENT_ASKED_FOR,
    "reason": text(MAX_REASON_CHARS),
    **MESSAGE_ID,
}
TOOL_RESULT: dict[str, Schema] = {
    "type": only("tool_result"),
    "call_id": CALL_ASKED_FOR,
    "result": {"description": f"What came of it: any JSON, at most {MAX_RESULT_BYTES} bytes."},
    "error": {**TEXT, "description": "What went wrong; one that begins with `User rejected` rejects a waiting call."},
    "args_hash": HASH_SEEN,
    **MESSAGE_ID,
}
HITL_DECISION: dict[str, Schema] = {
    "type": only("hitl_decision"),
    "call_id": CALL_ASKED_FOR,
    "decision": VERDICT,
    "modified_arguments": EDITED,
    "feedback": FEEDBACK,
    "args_hash": HASH_SEEN,
    **MESSAGE_ID,
}


def _of_the_socket(properties: dict[str, Schema], **more: Any) -> Schema:
    """A message with what the socket asks for beyond the stream endpoint."""
    fields = FIELDS[properties["type"]["const"]]
    own = {name: one_of(*field.one_of) if field.one_of else TEXT for name, field in fields.items() if field.required}
    known = {**own, **properties}
    return body(known, optional=tuple(name for name in known if name != "type" and name not in own), **more)


MESSAGES = {
    "UserMessage": body(
        USER_MESSAGE,
        optional=("agent_type", "message_id"),
        description="Opens a turn; makes the session if there is none.",
    ),
    "SwitchAgent": body(
        SWITCH_AGENT,
        optional=("reason", "message_id"),
        description="Passes the session to another agent at once; asks no model.",
    ),
    "ToolResult": body(
        TOOL_RESULT,
        optional=("result", "error", "args_hash", "message_id"),
        description="Answers a tool call; for one that still waits it is the decision as well.",
        **EITHER_RESULT_OR_ERROR,
    ),
    "HitlDecision": body(
        HITL_DECISION,
        optional=("modified_arguments", "feedback", "args_hash", "message_id"),
        description="Decides on a tool call that waits.",
        **ONLY_AN_EDIT_HAS_ARGUMENTS,
    ),
}
SCHEMAS: dict[str, Schema] = {
    "NewSession": nullable(body({"session_id": SESSION_ID}, optional=("session_id",))),
    "NewTitle": body({"title": text(500, least=1, pattern=r"\S")}),
    "SwitchRequest": body(
        {"target_agent": AGENT, "reason": text(2_000), "confidence": text(32, least=1)}, optional=("confidence",)
    ),
    "DecisionRequest": body(
        {
            "decision": VERDICT,
            "modified_arguments": EDITED,
            "feedback": FEEDBACK,
            "args_hash": {**HASH_SEEN, "minLength": 1},
        },
        optional=("modified_arguments", "feedback", "args_hash"),
        **ONLY_AN_EDIT_HAS_ARGUMENTS,
    ),
    "Nothing": {**nullable(OBJECT), "description": "Nothing that matters."},
    "MessageRequest": body(
        {
            "session_id": SESSION_ID,
            "message": ref("Message"),
            "stream_tokens": {**FLAG, "default": True, "description": "false leaves the token deltas out."},
            "busy": BUSY,
        },
        optional=("stream_tokens", "busy"),
    ),
    "Message": {
        "description": "What a client says to a session. Unknown keys are passed over, null counts as absent.",
        **told_apart(
            "type",
            user_message="UserMessage",
            switch_agent="SwitchAgent",
            tool_result="ToolResult",
            hitl_decision="HitlDecision",
        ),
    },
    **MESSAGES,
    "SocketMessage": {
        "description": "A text frame that a client sends: a `Message`, with what the old gateway asked for.",
        **told_apart(
            "type",
            user_message="SocketUserMessage",
            switch_agent="SocketSwitchAgent",
            tool_result="SocketToolResult",
            hitl_decision="SocketHitlDecision",
        ),
    },
    "SocketUserMessage": _of_the_socket({**USER_MESSAGE, "busy": BUSY}),
    "SocketSwitchAgent": _of_the_socket(SWITCH_AGENT),
    "SocketToolResult": _of_the_socket(TOOL_RESULT, **EITHER_RESULT_OR_ERROR),
    "SocketHitlDecision": _of_the_socket(HITL_DECISION, **ONLY_AN_EDIT_HAS_ARGUMENTS),
}

_CALL = {"call_id": examples.CALL}
MESSAGE_EXAMPLES: dict[str, dict[str, Any]] = {
    "user message": {"type": "user_message", "content": examples.QUESTION},
    "user message to an agent": {"type": "user_message", "content": examples.QUESTION, "agent_type": "architect"},
    "user message that may be repeated": {
        "type": "user_message",
        "content": examples.QUESTION,
        "message_id": examples.KEY,
    },
    "switch of the agent": {"type": "switch_agent", "agent_type": "debug", "reason": "It does not compile"},
    "tool result": {"type": "tool_result", **_CALL, "result": {"success": True, "bytes_written": 15}},
    "tool result with the hash of what ran": {
        "type": "tool_result",
        **_CALL,
        "result": "done",
        "args_hash": examples.HASH,
    },
    "tool result that is an error": {"type": "tool_result", **_CALL, "error": "No such folder"},
    "tool result that rejects": {"type": "tool_result", **_CALL, "error": "User rejected: not this file"},
    "approval": {"type": "hitl_decision", **_CALL, "decision": "approve"},
    "edit": {
        "type": "hitl_decision",
        **_CALL,
        "decision": "edit",
        "modified_arguments": examples.EDITED,
        "args_hash": examples.HASH,
    },
    "rejection": {"type": "hitl_decision", **_CALL, "decision": "reject", "feedback": "Not this file."},
}
_ON_A_SOCKET = {"user_message": {"role": "user"}, "switch_agent": {"content": "Switched to Debug"}}
SOCKET_EXAMPLES = {
    name: {**message, **_ON_A_SOCKET.get(message["type"], {})} for name, message in MESSAGE_EXAMPLES.items()
}

"""What streams carry: the data of each frame, and what a socket receives."""

from agents_app.models import Decision
from messages_app import steps
from orchestrator_site.schema.answers import CONFIDENCE, DECIDED
from orchestrator_site.schema.shapes import (
    AGENT,
    CALL_ID,
    COUNT,
    FLAG,
    HASH,
    NAME,
    NULL,
    OBJECT,
    TEXT,
    TIME,
    UUID,
    Schema,
    nullable,
    one_of,
    only,
    prose,
    record,
    ref,
    text,
    told_apart,
)
from sessions_app.models import EXECUTING, RUNNER_LOST, ToolCall, Turn
from sessions_app.unanswered import GIVEN_UP, TIMED_OUT

Status = Turn.Status
# The stable words in `metadata.code` of an error, and in `code` of the end of the turn that it fails.
ENDS_THE_TURN = {
    "model_unreachable": "the model's server cannot be reached",
    "model_unavailable": "the model's server answers with an error",
    "model_rate_limited": "the model's server asks to wait",
    "model_circuit_open": "the model failed several times in a row and is left alone for a moment",
    "model_timeout": "the model did not begin, or did not go on, in time",
    "model_interrupted": "the model stopped in the middle of its answer",
    "model_rejected": "the model's server refused the request",
    "model_bad_response": "the model's answer cannot be understood",
    "model_empty_answer": "the model answered nothing",
    "context_too_long": "the message is longer than the model can read",
    "output_limit": "the answer is longer than an answer may be",
    "turn_timeout": "the turn ran longer than a turn may",
    "too_many_handoffs": "the agents passed the message on too often",
    "too_many_rounds": "the agent asked for tools too often",
    "arguments_changed": "somebody changed the arguments of a waiting call; it was not released",
    RUNNER_LOST: "the server died each time it worked on the turn",
    "internal_error": "a fault of the server's own",
}
# Of a call that the agent may not make; the model was told, and the turn goes on.
REFUSES_A_CALL = {
    "tool_not_allowed": "the agent may not use this tool",
    "path_not_allowed": "the agent may not write this file",
    "denied_by_policy": "a rule denies it",
}
# Of a call that the server executes; the turn waits.
DOUBTS_A_CALL = {
    steps.IN_DOUBT: "the server ended while it executed it, or does not have its tool; an operator is asked"
}
# Of a released call that got no result; the model was told, and the turn goes on.
ENDS_A_CALL = {
    TIMED_OUT: "its client sent no result in time",
    GIVEN_UP: "an operator ended the wait for its result",
}
# For the request alone that sent a result or a decision; such a frame has no number.
REFUSES_A_MESSAGE = {
    "unknown_call": "no call of this session waits for it",
    "executed_by_server": "the server executes this call itself",
    "invalid_decision": "there is no such decision",
    "arguments_changed": "other arguments wait than those that were looked at",
    "policy_changed": "a rule or the tool has changed: nobody may approve it now",
    "self_approval_forbidden": "somebody else has to decide",
}
ENDS_OF_A_SERVER_CALL = (ToolCall.Outcome.OK, ToolCall.Outcome.ERROR, ToolCall.Outcome.TIMED_OUT)
STOPPED = ("cancelled", "superseded")

USAGE = record({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
SWITCHED: dict[str, Schema] = {"from_agent": AGENT, "to_agent": AGENT, "reason": TEXT, "confidence": TEXT}


def _explained(*codes: dict[str, str]) -> str:
    return "\n".join(f"- `{code}`: {meaning}" for group in codes for code, meaning in group.items())


ERROR = f"""
What went wrong, in words for people and in one stable word for programs. `metadata.code` of what ends the turn:

{_explained(ENDS_THE_TURN)}

Of a call that may not be made (the model was told, and goes on):

{_explained(REFUSES_A_CALL)}

Of a released call that got no result (nobody knows whether it was executed; the model was told, and goes on). Its
client need not execute it any more, and a result that comes after all changes nothing:

{_explained(ENDS_A_CALL)}

Of a call that the server executes and that may not be executed twice by its own choice (the turn waits):

{_explained(DOUBTS_A_CALL)}

Of a result or a decision that is refused:

{_explained(REFUSES_A_MESSAGE, {"already_decided": "somebody was faster: who, how and when"})}
"""
SERVER_CALL = """
Where a call stands that the server executes itself: it waits for a person, is being executed, or how it ended. No
client is to execute it, and a `tool_result` for it is refused. `executing` is told again when the server died.
"""
RESET = """
The position that was asked for is gone or never was: drop what you showed and read the history again. All that is kept
follows, from that number on. Only in the stream of a session; its own number is the one before.
"""
NUMBERED = """
What a socket with `tokens=1` or `live=1` receives: a `Chunk` of the session's stream and its number there as `id`,
which is what `after` takes; first of all on a live one `stream_position`, or `stream_reset` for a position that is gone
or never was. What answers its own message alone has no number. A piece of a text has `token` and no `content`; the
whole text follows with `content` and no `token`.
"""
GATEWAY = """
What the old gateway said: no message that can be read, none of the four types, `Agent error: <status>` with the status
that the stream endpoint would have answered, or an answer that broke off.
"""

CHUNKS: dict[str, Schema] = {
    "TokenDelta": record(
        {"type": only("assistant_message"), "token": TEXT, "is_final": only(False)},
        description="A piece of what an agent says; the whole of it follows as an `AssistantMessage`.",
    ),
    "AssistantMessage": record(
        {"type": only("assistant_message"), "content": TEXT, "is_final": FLAG},
        description="The whole of what an agent said in one step; not final when tool calls follow.",
    ),
    "ToolCallChunk": record(
        {
            "type": only("tool_call"),
            "call_id": CALL_ID,
            "tool_name": NAME,
            "arguments": OBJECT,
            "requires_approval": FLAG,
            "is_final": only(True),
            "metadata": record({"args_hash": HASH}),
        },
        description="A tool call that is the client's to execute, or with `requires_approval` a person's to decide on.",
    ),
    "ServerCallChunk": record(
        {
            "type": only("server_call"),
            "call_id": CALL_ID,
            "tool_name": NAME,
            "arguments": OBJECT,
            "state": one_of(ToolCall.Status.WAITING, EXECUTING, *ENDS_OF_A_SERVER_CALL),
            "metadata": record({"args_hash": HASH}),
        },
        description=prose(SERVER_CALL),
    ),
    "AgentSwitchedChunk": record(
        {
            "type": only("agent_switched"),
            "content": TEXT,
            "is_final": {**FLAG, "description": "true when it is the whole answer to a switch."},
            **SWITCHED,
            "metadata": record({**SWITCHED, "confidence": CONFIDENCE}),
        },
        optional=("confidence",),
        description="The session passed from one agent to another.",
    ),
    "ErrorChunk": record(
        {
            "type": only("error"),
            "content": TEXT,
            "error": {**TEXT, "description": "The same text."},
            "is_final": only(True),
            "metadata": {
                "oneOf": [
                    record({"code": one_of(*dict.fromkeys([*ENDS_THE_TURN, *REFUSES_A_MESSAGE]))}),
                    record({"code": one_of(*REFUSES_A_CALL, *ENDS_A_CALL, *DOUBTS_A_CALL), "call_id": CALL_ID}),
                    record({"code": only("already_decided"), **DECIDED}),
                ]
            },
        },
        description=prose(ERROR),
    ),
    "TurnStartedChunk": record({"type": only("turn_started"), "turn_id": UUID}),
    "TurnFinishedChunk": record(
        {
            "type": only("turn_finished"),
            "turn_id": UUID,
            "status": one_of(Status.COMPLETED, Status.FAILED, Status.CANCELLED),
            "code": {**nullable(TEXT), "description": "Why it failed or was cancelled."},
            "usage": {**USAGE, "description": "Routing and answers together."},
        },
        oneOf=[
            {"properties": {"status": only(Status.COMPLETED.value), "code": NULL}},
            {"properties": {"status": only(Status.FAILED.value), "code": one_of(*ENDS_THE_TURN)}},
            {"properties": {"status": only(Status.CANCELLED.value), "code": one_of(*STOPPED)}},
        ],
        description="How the turn ended. Never sent for one that waits for its tool calls.",
    ),
    "ApprovalResolvedChunk": record(
        {
            "type": only("approval_resolved"),
            "call_id": CALL_ID,
            "metadata": record(
                {
                    "decision": one_of(*Decision.Verdict.values),
                    "arguments": {**OBJECT, "description": "Those that were decided on: of an edit the edited ones."},
                    "args_hash": HASH,
                    "feedback": nullable(TEXT),
                    "decided_by": text(150),
                    "decided_at": TIME,
                }
            ),
        },
        description="What became of a tool call that waited for a person.",
    ),
    "RestartedChunk": record(
        {"type": only("restarted"), "turn_id": UUID, "metadata": record({"discard_after": COUNT})},
        description="The server died or stopped in the middle of an answer: text after that number is void.",
    ),
    "StreamResetChunk": record(
        {
            "type": only("stream_reset"),
            "metadata": record({"from": {"type": "integer", "minimum": 1}}),
        },
        description=prose(RESET),
    ),
}


def _with_number(chunk: Schema) -> Schema:
    return {
        **chunk,
        "properties": {"id": COUNT, **chunk["properties"]},
        "required": ["id", *chunk["required"]],
    }


SCHEMAS: dict[str, Schema] = {
    "Chunk": {
        "description": "The data of one frame of an event stream.",
        **told_apart(
            "type",
            assistant_message="AssistantChunk",
            tool_call="ToolCallChunk",
            agent_switched="AgentSwitchedChunk",
            error="ErrorChunk",
            turn_started="TurnStartedChunk",
            turn_finished="TurnFinishedChunk",
            server_call="ServerCallChunk",
            approval_resolved="ApprovalResolvedChunk",
            restarted="RestartedChunk",
            stream_reset="StreamResetChunk",
        ),
    },
    "AssistantChunk": {"oneOf": [ref("TokenDelta"), ref("AssistantMessage")]},
    **CHUNKS,
    "StreamEnd": record(
        {"status": only("completed")},
        description="The data of `event: done`: this answer has ended. How its turn ended is told by `turn_finished`.",
    ),
    "SocketChunk": {
        "description": "A text frame that a socket receives: whole chunks that answer its own messages, or an error.",
        **told_apart(
            "type",
            assistant_message="AssistantMessage",
            tool_call="ToolCallChunk",
            agent_switched="AgentSwitchedChunk",
            error="SocketErrorChunk",
        ),
    },
    "NumberedChunk": {
        "description": prose(NUMBERED),
        "oneOf": [
            *({**_with_number(chunk), "title": f"Numbered{name}"} for name, chunk in CHUNKS.items()),
            record({"id": COUNT, "type": only("stream_position")}, title="StreamPosition"),
            ref("SocketErrorChunk"),
        ],
    },
    "SocketErrorChunk": {"oneOf": [ref("ErrorChunk"), ref("SocketError")]},
    "SocketError": record(
        {
            "type": only("error"),
            "content": {
                "type": "string",
                "pattern": "^(Invalid JSON message|Unknown message type|Agent error|Streaming error): ",
            },
        },
        description=prose(GATEWAY),
    ),
}

"""Every path and what may be done there. What is routed and does not stand here fails a test."""

from typing import Any

from agents_app.approval_views import EVERY_STATUS
from agents_app.approvals import (
    AlreadyDecided,
    ArgumentsChanged,
    PolicyChanged,
    SelfApprovalForbidden,
    UnknownApproval,
)
from agents_app.handoffs import AlreadyActive, TooManySwitches, UnknownAgent
from agents_app.models import ApprovalRequest
from events_app.admission import Overloaded
from events_app.figures import NoMetrics
from events_app.log import AuditUnavailable
from events_app.stream import HEADERS, TooManyStreams
from messages_app.acceptance import QueueFull, TurnRunning
from orchestrator_site.errors import Invalid, NotFound, Unauthorized, Unavailable
from orchestrator_site.http import InvalidJSON
from orchestrator_site.schema import examples
from orchestrator_site.schema.bodies import MESSAGE_EXAMPLES, SOCKET_EXAMPLES
from orchestrator_site.schema.refusals import EVERYWHERE, REQUEST_ID_HEADER, Refusal, responses
from orchestrator_site.schema.shapes import CALL_ID, FLAG, KEY, SESSION_ID, Schema, one_of, only, prose, ref, text
from orchestrator_site.sockets import ForeignOrigin
from sessions_app.idempotency import HEADER, InvalidKey, KeyReused
from sessions_app.models import CallMoved, SessionIdTaken, TurnMoved, UnknownSession

TAGS = {
    "messages": "Talking to the agents, and following what they say.",
    "sessions": "Conversations.",
    "approvals": "Tool calls that wait for a person.",
    "agents": "Who answers.",
    "events": "Figures and the audit log.",
    "service": "Whether the server is well.",
}

POSITION: Schema = {"type": "string", "pattern": "^[0-9]{1,18}$"}
REPEATED = """
Made once for all that the caller asks under one key within 24 hours: the same request again has the same answer, or
joins the same stream from its beginning. Another path or body is refused (`idempotency_key_reused`); the order of
an object's keys does not matter. What was refused was not done, and its key is free.
"""

# --- The pieces ----------------------------------------------------------------------------------------------------


def query(name: str, schema: Schema, *, example: Any = None, description: str = "") -> Schema:
    shown = {"description": description, "example": example}
    return {"name": name, "in": "query", "schema": schema, **{key: value for key, value in shown.items() if value}}


def whole_number(default: int, least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most, "default": default}


PARAMETERS: dict[str, Schema] = {
    "SessionId": {
        "name": "session_id",
        "in": "path",
        "required": True,
        "schema": SESSION_ID,
        "example": examples.SESSION,
    },
    "CallId": {"name": "call_id", "in": "path", "required": True, "schema": CALL_ID, "example": examples.CALL},
    "RequestId": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "What the answer and the logs call this request: 1 to 64 letters, digits, `.`, `_` or `-`. The "
        "server takes a name of its own instead of any other.",
        "schema": {"type": "string"},
    },
    "IdempotencyKey": {
        "name": HEADER,
        "in": "header",
        "description": prose(REPEATED),
        "schema": KEY,
        "example": examples.KEY,
    },
    "Limit": query("limit", whole_number(100, 1, 1000), example=20),
    "Offset": query("offset", whole_number(0, 0, 2**63 - 1)),
}


def _parameter(name: str) -> Schema:
    return {"$ref": f"#/components/parameters/{name}"}


IN_SESSION, OF_CALL, REPEATABLE, LIMIT, OFFSET = map(
    _parameter, ("SessionId", "CallId", "IdempotencyKey", "Limit", "Offset")
)


def _flag(name: str) -> Schema:
    return query(name, {**FLAG, "default": name == "active_only"}, example=True, description="Also `1` or `0`.")


def sent(schema: str, shown: dict[str, Any], *, required: bool = True) -> Schema:
    named = {name: {"value": value} for name, value in shown.items()}
    return {"required": required, "content": {"application/json": {"schema": ref(schema), "examples": named}}}


def answer(schema: str, description: str, *, status: int = 200) -> Schema:
    content = {"application/json": {"schema": ref(schema)}}
    return {str(status): {"description": description, "headers": REQUEST_ID_HEADER, "content": content}}


def stream(description: str, schema: Schema, *, shown: tuple[str, ...]) -> Schema:
    named = {name: {"value": examples.EXAMPLES[name]} for name in shown}
    own = {name: {"required": True, "schema": only(value)} for name, value in HEADERS.items()}
    return {
        "200": {
            "description": description,
            "headers": {**REQUEST_ID_HEADER, **own},
            "content": {"text/event-stream": {"schema": schema, "examples": named}},
        }
    }


def operation(
    name: str,
    tag: str,
    summary: str,
    answers: Schema,
    *refusals: Refusal,
    parameters: tuple[Schema, ...] = (),
    request: Schema | None = None,
    description: str = "",
    **more: Any,
) -> Schema:
    """One operation. Each needs the key and the database, where `more` does not say otherwise."""
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        **({"description": prose(description)} if description else {}),
        "parameters": [*parameters, _parameter("RequestId")],
        **({"requestBody": request} if request else {}),
        "responses": {**answers, **responses((*EVERYWHERE, *refusals))},
        **more,
    }


KEYED: tuple[Refusal, ...] = (Unauthorized, Unavailable)
OF_SESSION: tuple[Refusal, ...] = (*KEYED, NotFound, UnknownSession)
READS_BODY: tuple[Refusal, ...] = (InvalidJSON, Invalid)
TAKES_KEY: tuple[Refusal, ...] = (InvalidKey, KeyReused)
# What should not happen while everybody holds the session's lock, and may be tried again.
MOVED: tuple[Refusal, ...] = (TurnMoved, CallMoved)

# --- The longer texts ----------------------------------------------------------------------------------------------

FRAMES = """
The schema is that of each frame's data; a frame is some lines and an empty one:

    id: 7
    event: message
    data: {"type":"assistant_message","content":"Hello there.","is_final":true}

- `id:` is the number of the frame in the session's stream: increasing, gaps are normal. It is what `Last-Event-ID`
  takes.
- `AssistantMessage`, `ToolCallChunk`, `AgentSwitchedChunk` and `ErrorChunk` have `event: message` and `data: {...}`.
  All others have no `event:` line and are written `data:{...}`, without the space.
- The JSON is ASCII on one line. A comment (`: ping`) comes at least every 15 s.
"""
SEND = f"""
Everything that can be refused is refused before the stream begins. What is refused in the stream instead is one
`ErrorChunk` without a number. While a turn runs, up to five messages queue behind it; `busy` says whether one is
refused instead (409), or takes the place of all that is queued or running.

{FRAMES.strip()}
- The answer ends with `event: done` and `data: {{"status":"completed"}}` (`StreamEnd`), which has no number. One that
  ends without it was cut, and is resumed with `GET /sessions/{{session_id}}/stream`.
- A turn that waits for tool calls ends its answer without `turn_finished`.
- When a message is repeated whose answer is not kept any more, `stream_reset` and the end come in its place.
"""
FOLLOW = f"""
Everything of the session, live, over all its turns, for at most 15 minutes; resume it then. Without a position, or with
0, it begins with the oldest frame that is kept. It has no `event: done`.

{FRAMES.strip()}
"""
SOCKET = """
Each text frame is one JSON object. Clients send a `SocketMessage` and receive the `SocketChunk`s that answer it: whole
chunks, without token deltas, the frames of turns and decisions, any end of a turn, and what others bring about.
Messages are answered one after the other, and up to 16 wait. What goes wrong is a `SocketError`, and the socket stays
open. Binary frames (1003), messages beyond 4 MiB (1009) and pings that nobody answers (1011) end the connection; a
server that stops closes with 1012.

With `tokens=1` its own answers come as a `NumberedChunk` each, with token deltas before the whole texts. With `live=1`
everything that happens in the session does, from now on or past the number `after`, whoever brings it about, its own
answers among the rest and once; messages are stored as they come. A session that is not there yet is followed from its
first message. When the session is deleted the connection ends with 4404.

Pages of a foreign origin are refused. Whether a client may come without a key is told by `WS_WITHOUT_KEY`; a wrong one
never may.
"""
OPEN_CALLS = """
`waiting` calls wait for a person, `released` ones for the client's result, until `deadline_at` where their tool has a
deadline. One that got its answer is not listed any more, however it ended: with a result, by a decision, at its
deadline or because an operator gave it up. History has what the model read in place of a result.
"""
DECIDE = """
Exactly one decision counts, whatever path it comes by. `approve` and `edit` release the call to the client that
executes it, `reject` answers it with the feedback. With `args_hash` it is refused when something else would run.
"""

READINESS = """
`degraded` serves all the same: there is nobody who runs turns, or processes hear of each other late. `unavailable` is
answered with 503: the database is away, or the process stops. Answered within two seconds, from what was found within
the last.
"""
ROOT = [{"url": "/"}]
NOT_READY: Schema = {
    **answer("Readiness", "It cannot, at the moment.")["200"],
    "headers": {**REQUEST_ID_HEADER, "Retry-After": {"$ref": "#/components/headers/RetryAfter"}},
}

# --- The table -----------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, dict[str, Schema]] = {
    "/health": {
        "get": operation("health", "service", "Whether the server is well", answer("Health", "It is."), security=[])
    },
    "/healthz": {
        "get": operation(
            "read_liveness",
            "service",
            "Whether the process answers",
            answer("Alive", "It does, whatever else is broken."),
            security=[],
            servers=ROOT,
        )
    },
    "/readyz": {
        "get": operation(
            "read_readiness",
            "service",
            "Whether the process can serve, and what is missing",
            {**answer("Readiness", "It can."), "503": NOT_READY},
            description=READINESS,
            security=[],
            servers=ROOT,
        )
    },
    "/sessions": {
        "get": operation(
            "list_sessions",
            "sessions",
            "List sessions, the latest activity first",
            answer("SessionList", "A page of them."),
            *KEYED,
            Invalid,
            parameters=(LIMIT, OFFSET, _flag("active_only")),
        ),
        "post": operation(
            "create_session",
            "sessions",
            "Create a session",
            answer("CreatedSession", "It is made.", status=201),
            *KEYED,
            *READS_BODY,
            *TAKES_KEY,
            SessionIdTaken,
            parameters=(REPEATABLE,),
            request=sent(
                "NewSession",
                {"any id": {}, "an id of one's own": {"session_id": examples.SESSION}, "null": None},
                required=False,
            ),
            description="Without a body, or without an id in it, the server makes one up.",
        ),
    },
    "/sessions/{session_id}": {
        "get": operation(
            "read_session",
            "sessions",
            "Read a session",
            answer("Session", "The session."),
            *OF_SESSION,
            Invalid,
            parameters=(IN_SESSION, _flag("include_messages")),
        ),
        "patch": operation(
            "rename_session",
            "sessions",
            "Give a session another title",
            answer("Session", "The session, without its messages."),
            *OF_SESSION,
            *READS_BODY,
            parameters=(IN_SESSION,),
            request=sent("NewTitle", {"a title": {"title": "Release notes"}}),
        ),
        "delete": operation(
            "delete_session",
            "sessions",
            "Delete a session",
            {"204": {"description": "It is gone.", "headers": REQUEST_ID_HEADER}},
            *OF_SESSION,
            *MOVED,
            AuditUnavailable,
            parameters=(IN_SESSION,),
            description="Its turns are cancelled, its id stays taken; events and audit entries stay.",
        ),
    },
    "/sessions/{session_id}/history": {
        "get": operation(
            "read_history",
            "sessions",
            "The messages in chat-completions form, and the handoffs",
            answer("History", "The conversation."),
            *OF_SESSION,
            parameters=(IN_SESSION,),
        )
    },
    "/sessions/{session_id}/cancel": {
        "post": operation(
            "cancel_turn",
            "sessions",
            "Cancel the open turn",
            answer("Cancelled", "What was cancelled."),
            *OF_SESSION,
            *READS_BODY,
            *TAKES_KEY,
            *MOVED,
            AuditUnavailable,
            parameters=(IN_SESSION, REPEATABLE),
            request=sent("Nothing", {"nothing": {}}, required=False),
            description="The oldest turn that has not ended; messages that are queued behind it go on.",
        )
    },
    "/sessions/{session_id}/stream": {
        "get": operation(
            "follow_session",
            "messages",
            "Follow a session, from any position",
            stream("The frames.", ref("Chunk"), shown=("StreamResetChunk", "RestartedChunk", "ApprovalResolvedChunk")),
            *OF_SESSION,
            Invalid,
            TooManyStreams,
            parameters=(
                IN_SESSION,
                {
                    "name": "Last-Event-ID",
                    "in": "header",
                    "description": "The number after which to go on, as browsers send it.",
                    "schema": POSITION,
                },
                query("after", POSITION, description="The same, where no header can be set."),
            ),
            description=FOLLOW,
        )
    },
    "/sessions/{session_id}/open-calls": {
        "get": operation(
            "list_open_calls",
            "approvals",
            "Every tool call without its result",
            answer("OpenCalls", "What a client that was away has to execute, or to wait for."),
            *OF_SESSION,
            parameters=(IN_SESSION,),
            description=OPEN_CALLS,
        )
    },
    "/sessions/{session_id}/pending-approvals": {
        "get": operation(
            "list_pending_approvals",
            "approvals",
            "The calls of a session that wait for a person, oldest first",
            answer("PendingApprovals", "Those that wait."),
            *OF_SESSION,
            parameters=(IN_SESSION,),
        )
    },
    "/approvals": {
        "get": operation(
            "list_approvals",
            "approvals",
            "Approval requests of all sessions, oldest first",
            answer("ApprovalList", "A page of them."),
            *KEYED,
            Invalid,
            parameters=(
                query(
                    "status",
                    {**one_of(*ApprovalRequest.Status.values, EVERY_STATUS), "default": "pending"},
                    example=EVERY_STATUS,
                ),
                query("session_id", text(200), example=examples.SESSION),
                query("tool", text(200), example=examples.TOOL),
                LIMIT,
                OFFSET,
            ),
        )
    },
    "/approvals/{call_id}": {
        "get": operation(
            "read_approval",
            "approvals",
            "Read an approval request",
            answer("Approval", "The request, and the decision if there is one."),
            *KEYED,
            NotFound,
            UnknownApproval,
            parameters=(OF_CALL,),
        )
    },
    "/approvals/{call_id}/decision": {
        "post": operation(
            "decide",
            "approvals",
            "Approve, edit or reject a tool call",
            answer("Approval", "The request as it is now."),
            *OF_SESSION,
            *READS_BODY,
            *TAKES_KEY,
            *MOVED,
            UnknownApproval,
            AlreadyDecided,
            ArgumentsChanged,
            PolicyChanged,
            SelfApprovalForbidden,
            AuditUnavailable,
            parameters=(OF_CALL, REPEATABLE),
            request=sent(
                "DecisionRequest",
                {
                    "approval": {"decision": "approve"},
                    "approval of what was seen": {"decision": "approve", "args_hash": examples.HASH},
                    "edit": {
                        "decision": "edit",
                        "modified_arguments": examples.EDITED,
                        "args_hash": examples.HASH,
                        "feedback": "A shorter title.",
                    },
                    "rejection": {"decision": "reject", "feedback": "Not this file."},
                },
            ),
            description=DECIDE,
        )
    },
    "/agents": {
        "get": operation(
            "list_agents", "agents", "The agents and what they may use", answer("Agents", "The team."), *KEYED
        )
    },
    "/agents/{session_id}/current": {
        "get": operation(
            "read_current_agent",
            "agents",
            "Who is active in a session",
            answer("CurrentAgent", "The agent, in the nested form and in the flat one."),
            *OF_SESSION,
            Invalid,
            parameters=(IN_SESSION, _flag("include_history")),
        )
    },
    "/agents/{session_id}/switch": {
        "post": operation(
            "switch_agent",
            "agents",
            "Pass a session to another agent",
            answer("Switched", "The session is with that agent now."),
            *OF_SESSION,
            *READS_BODY,
            *TAKES_KEY,
            UnknownAgent,
            AlreadyActive,
            TooManySwitches,
            parameters=(IN_SESSION, REPEATABLE),
            request=sent(
                "SwitchRequest",
                {
                    "a switch": {"target_agent": "debug", "reason": "It does not compile"},
                    "with confidence": {"target_agent": "ask", "reason": "A question", "confidence": "high"},
                },
            ),
            description="It takes effect at once, at most 50 times in a session.",
        )
    },
    "/agent/message/stream": {
        "post": operation(
            "send_message",
            "messages",
            "Say something to a session, and stream the answer",
            stream(
                "The answer.",
                {"oneOf": [ref("Chunk"), ref("StreamEnd")]},
                shown=(
                    "TurnStartedChunk",
                    "AgentSwitchedChunk",
                    "TokenDelta",
                    "AssistantMessage",
                    "ToolCallChunk",
                    "ErrorChunk",
                    "TurnFinishedChunk",
                    "StreamEnd",
                ),
            ),
            *KEYED,
            *READS_BODY,
            *TAKES_KEY,
            *MOVED,
            UnknownAgent,
            UnknownSession,
            TurnRunning,
            QueueFull,
            AuditUnavailable,
            Overloaded,
            TooManyStreams,
            parameters=(REPEATABLE,),
            request=sent(
                "MessageRequest",
                {
                    **{
                        name: {"session_id": examples.SESSION, "message": message}
                        for name, message in MESSAGE_EXAMPLES.items()
                    },
                    "user message without token deltas": {
                        "session_id": examples.SESSION,
                        "message": MESSAGE_EXAMPLES["user message"],
                        "stream_tokens": False,
                    },
                    "user message instead of what runs": {
                        "session_id": examples.SESSION,
                        "message": MESSAGE_EXAMPLES["user message"],
                        "busy": "interrupt",
                    },
                },
            ),
            description=SEND,
        )
    },
    "/ws/{session_id}": {
        "get": operation(
            "open_socket",
            "messages",
            "A WebSocket, message for message what the old gateway offered",
            {
                "101": {
                    "description": "The socket is open.",
                    "headers": {"Upgrade": {"required": True, "schema": only("websocket")}},
                }
            },
            Unauthorized,
            ForeignOrigin,
            NotFound,
            TooManyStreams,
            Invalid,
            UnknownSession,
            Unavailable,
            parameters=(
                IN_SESSION,
                query("tokens", {**FLAG, "default": False}, example=True, description="Token deltas too."),
                query("live", {**FLAG, "default": False}, example=True, description="Everything of the session."),
                query("after", POSITION, description="Of a live one: the number after which to go on."),
            ),
            description=SOCKET,
            security=[{"InternalAuth": []}, {"Bearer": []}, {}],
            **{
                "x-websocket": {
                    "sends": ref("SocketMessage"),
                    "receives": ref("SocketChunk"),
                    "receives with tokens or live": ref("NumberedChunk"),
                    "examples": {name: {"value": message} for name, message in SOCKET_EXAMPLES.items()},
                }
            },
        )
    },
    "/events/metrics": {
        "get": operation(
            "read_metrics",
            "events",
            "Switches, processing and errors by agent; calls and decisions by tool",
            answer("Metrics", "The figures."),
            *KEYED,
        )
    },
    "/events/stats": {
        "get": operation(
            "read_statistics", "events", "How many events are recorded", answer("Statistics", "The figures."), *KEYED
        )
    },
    "/events/metrics/sessions": {
        "get": operation(
            "list_sessions_with_metrics",
            "events",
            "The sessions with at least one answer of a model, in order of first appearance",
            answer("SessionsWithMetrics", "At most 10,000 of them."),
            *KEYED,
        )
    },
    "/events/metrics/session/{session_id}": {
        "get": operation(
            "read_session_metrics",
            "events",
            "What the answers of models in a session took and cost",
            answer("SessionMetrics", "The figures; the latest 1,000 answers are listed. Failed ones count no tokens."),
            *KEYED,
            NotFound,
            NoMetrics,
            parameters=(IN_SESSION,),
        )
    },
    "/events/audit-log": {
        "get": operation(
            "read_audit_log",
            "events",
            "Switches, decisions, calls that needed one, failed calls and errors",
            answer("AuditLog", "The last that match, oldest first."),
            *KEYED,
            Invalid,
            parameters=(
                query("session_id", text(200), example=examples.SESSION),
                query("event_type", text(200), example="agent_switched"),
                LIMIT,
            ),
        )
    },
}

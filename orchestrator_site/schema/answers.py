"""What the endpoints answer, beside streams and refusals."""

from agents_app.models import ApprovalRequest, Decision
from events_app.figures import AUDIT_LOG, DECISIONS, EXECUTIONS
from orchestrator_site.readiness import DEGRADED, MEMORY, MISSING, NO_ANSWER, OK, READY, STOPPING, UNAVAILABLE
from orchestrator_site.schema.shapes import (
    AGENT,
    CALL_ID,
    COUNT,
    FLAG,
    HASH,
    NAME,
    NULL,
    NUMBER,
    OBJECT,
    SESSION_ID,
    TEXT,
    TIME,
    UUID,
    Schema,
    listed,
    mapping,
    nullable,
    one_of,
    only,
    prose,
    record,
    ref,
    text,
    told_apart,
)
from sessions_app.models import EXECUTING, ToolCall

Verdict = Decision.Verdict
DEADLINE = """
Until when a result of a released call is waited for; null: as long as it takes. Then the call is closed, is listed no
more, and the model is told that no result came.
"""
POSITIVE: Schema = {"type": "integer", "minimum": 1}
CONFIDENCE = nullable(TEXT)
REASON = nullable(text(500))
PAGE: dict[str, Schema] = {
    "total": {**COUNT, "description": "How many there are on all pages together."},
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    "offset": COUNT,
}

SESSION_LISTED: dict[str, Schema] = {
    "id": SESSION_ID,
    "session_id": SESSION_ID,
    "title": nullable(text(500)),
    "description": NULL,
    "message_count": COUNT,
    "last_activity": TIME,
    "is_active": FLAG,
    "current_agent": AGENT,
    "created_at": TIME,
}
SESSION: dict[str, Schema] = {
    **SESSION_LISTED,
    "messages": {
        **nullable(listed(ref("StoredMessage"))),
        "description": "null unless `include_messages` is true.",
    },
    "duration_seconds": NUMBER,
}
STORED: dict[str, Schema] = {
    "id": {"type": "string", "pattern": "^[0-9]+$"},
    "role": TEXT,
    "content": TEXT,
    "name": NULL,
    "tool_call_id": NULL,
    "tool_calls": NULL,
    "created_at": TIME,
}
TOOL_CALLS = listed(ref("RecordedCall"), minItems=1)
PAST: dict[str, Schema] = {"from": AGENT, "to": AGENT, "reason": TEXT, "timestamp": TIME}
CONTEXT: dict[str, Schema] = {
    "id": SESSION_ID,
    "session_id": SESSION_ID,
    "current_agent": AGENT,
    "switch_count": COUNT,
    "switch_history": nullable(listed(ref("Switch"))),
    "last_switch_at": nullable(TIME),
    "created_at": TIME,
}
APPROVAL_WAITING: dict[str, Schema] = {
    "request_id": CALL_ID,
    "request_type": only("tool"),
    "subject": NAME,
    "details": record({"arguments": OBJECT}),
    "reason": REASON,
    "created_at": TIME,
    "call_id": CALL_ID,
    "tool_name": NAME,
    "arguments": {**OBJECT, "description": "As the model asked for them."},
    "args_hash": HASH,
}
PENDING = ApprovalRequest.Status.PENDING
DECIDED: dict[str, Schema] = {
    "decision": one_of(*Verdict.values),
    "decided_by": text(150),
    "decided_at": TIME,
}
APPROVAL: dict[str, Schema] = {
    **APPROVAL_WAITING,
    "session_id": SESSION_ID,
    "status": one_of(*ApprovalRequest.Status.values),
    **{name: nullable(schema) for name, schema in DECIDED.items()},
    "feedback": nullable(TEXT),
    "modified_arguments": {**nullable(OBJECT), "description": "Those of an edit."},
    "released_args_hash": {**nullable(HASH), "description": "Of the arguments that may run: what a result echoes."},
}
ENTRY: dict[str, Schema] = {
    "timestamp": TIME,
    "event_type": TEXT,
    "event_id": UUID,
    "session_id": SESSION_ID,
    "correlation_id": {**nullable(UUID), "description": "The turn that it belongs to."},
}
# What the entries of each kind have beyond that; their keys are those of `figures.AUDIT_LOG`.
EXTRA: dict[str, Schema] = {
    "from_agent": AGENT,
    "to_agent": AGENT,
    "reason": TEXT,
    "confidence": CONFIDENCE,
    "call_id": CALL_ID,
    "decision": one_of(*Verdict.values),
    "tool_name": text(200),
    "original_args": OBJECT,
    "modified_args": nullable(OBJECT),
    "agent": AGENT,
    "error_message": TEXT,
    "error_type": NAME,
    "arguments": OBJECT,
}
SUMS: dict[str, Schema] = {
    "total_requests": POSITIVE,
    "successful_requests": COUNT,
    "failed_requests": COUNT,
    "total_duration_ms": COUNT,
    "average_duration_ms": NUMBER,
    "total_prompt_tokens": COUNT,
    "total_completion_tokens": COUNT,
    "total_tokens": COUNT,
    "average_tokens_per_request": NUMBER,
    "requests_with_tools": COUNT,
}


def _entry(shown: str, extra: tuple[str, ...]) -> Schema:
    own = {name: EXTRA[name] for name in extra}
    if shown == "tool_approval_required":
        own["reason"] = REASON
    return record({**ENTRY, "event_type": only(shown), **own})


def _component(shown: str) -> str:
    return f"{shown.title().replace('_', '')}Entry"


SCHEMAS: dict[str, Schema] = {
    "Health": record({"status": only("healthy"), "service": only("agent-runtime"), "version": NAME}),
    "Alive": record({"status": only("alive")}),
    "Readiness": record(
        {
            "status": one_of(READY, DEGRADED, UNAVAILABLE),
            "database": one_of(OK, UNAVAILABLE, NO_ANSWER),
            "runner": one_of(OK, MISSING, UNAVAILABLE, NO_ANSWER, STOPPING),
            "layer": one_of(OK, MEMORY, UNAVAILABLE, NO_ANSWER),
        }
    ),
    "CreatedSession": record(
        {
            "id": SESSION_ID,
            "session_id": SESSION_ID,
            "message_count": only(0),
            "created_at": TIME,
            "is_active": only(True),
            "current_agent": only("orchestrator"),
        }
    ),
    "ListedSession": record(SESSION_LISTED),
    "SessionList": record({"sessions": listed(ref("ListedSession"), maxItems=1000), **PAGE}),
    "SessionDetails": record(SESSION),
    "Session": record(
        {**SESSION, "session": ref("SessionDetails")},
        description="The same twice, at top level and under `session`, because clients of both forms exist.",
    ),
    "StoredMessage": told_apart("role", user="StoredQuestion", assistant="StoredAnswer", tool="StoredResult"),
    "StoredQuestion": record({**STORED, "role": only("user")}),
    "StoredAnswer": record({**STORED, "role": only("assistant"), "tool_calls": nullable(TOOL_CALLS)}),
    "StoredResult": record({**STORED, "id": CALL_ID, "role": only("tool"), "name": text(200), "tool_call_id": CALL_ID}),
    "RecordedCall": record(
        {
            "id": CALL_ID,
            "type": only("function"),
            "function": record({"name": text(200), "arguments": {**TEXT, "contentMediaType": "application/json"}}),
        }
    ),
    "History": record(
        {
            "session_id": SESSION_ID,
            "messages": listed(ref("ChatMessage")),
            "message_count": COUNT,
            "last_activity": TIME,
            "current_agent": AGENT,
            "agent_history": listed(ref("PastHandoff")),
        }
    ),
    "ChatMessage": told_apart("role", user="ChatQuestion", assistant="ChatAnswer", tool="ChatResult"),
    "ChatQuestion": record({"role": only("user"), "content": TEXT}),
    "ChatAnswer": record(
        {"role": only("assistant"), "content": TEXT, "tool_calls": TOOL_CALLS}, optional=("tool_calls",)
    ),
    "ChatResult": record({"role": only("tool"), "content": TEXT, "name": text(200), "tool_call_id": CALL_ID}),
    "PastHandoff": record({**PAST, "confidence": CONFIDENCE}),
    "Cancelled": record(
        {
            "session_id": SESSION_ID,
            "cancelled_turn": {**nullable(UUID), "description": "null when there was none to cancel."},
        }
    ),
    "OpenCalls": record(
        {
            "session_id": SESSION_ID,
            "open_calls": listed(ref("OpenCall")),
            "count": COUNT,
            "open_turn": {**nullable(UUID), "description": "The turn that is not over, if there is one."},
            "position": {**COUNT, "description": "The session's stream goes on from here after this number."},
        }
    ),
    "OpenCall": record(
        {
            "call_id": CALL_ID,
            "tool_name": NAME,
            "arguments": {**OBJECT, "description": "Those that are to be executed: of an edit the edited ones."},
            "args_hash": HASH,
            "state": {
                **one_of(ToolCall.Status.WAITING, ToolCall.Status.RELEASED, EXECUTING, ToolCall.Status.IN_DOUBT),
                "description": "Only what is released is a client's to execute.",
            },
            "executed_by": one_of("client", "server"),
            "requires_approval": FLAG,
            "released_at": nullable(TIME),
            "deadline_at": {**nullable(TIME), "description": prose(DEADLINE)},
        },
        oneOf=[
            {
                "properties": {
                    "state": only("waiting"),
                    "requires_approval": only(True),
                    "released_at": NULL,
                    "deadline_at": NULL,
                }
            },
            {"properties": {"state": only("released"), "released_at": TIME}},
        ],
    ),
    "PendingApprovals": record(
        {"session_id": SESSION_ID, "pending_approvals": listed(ref("PendingApproval")), "count": COUNT}
    ),
    "PendingApproval": record(APPROVAL_WAITING),
    "Approval": record(
        APPROVAL,
        oneOf=[
            {"properties": {"status": only(PENDING.value), "decision": NULL, "decided_by": NULL, "decided_at": NULL}},
            {"properties": {"status": one_of(*(s for s in ApprovalRequest.Status if s != PENDING)), **DECIDED}},
        ],
    ),
    "ApprovalList": record({"approvals": listed(ref("Approval"), maxItems=1000), **PAGE}),
    "Agents": record({"agents": listed(ref("Agent")), "total": COUNT}),
    "Agent": record(
        {
            "type": AGENT,
            "name": NAME,
            "description": TEXT,
            "allowed_tools": listed(NAME),
            "has_file_restrictions": FLAG,
        }
    ),
    "CurrentAgent": record(
        {
            "context": ref("AgentContext"),
            "session_id": SESSION_ID,
            "current_agent": AGENT,
            "agent_history": listed(record(PAST)),
            "switch_count": COUNT,
        }
    ),
    "AgentContext": record(CONTEXT, description="`switch_history` is null unless `include_history` is true."),
    "Switched": record({"context": record({**CONTEXT, "switch_history": listed(ref("Switch"), minItems=1)})}),
    "Switch": record(
        {"from_agent": AGENT, "to_agent": AGENT, "reason": TEXT, "switched_at": TIME, "confidence": CONFIDENCE}
    ),
    "Metrics": record(
        {
            "metrics": record(
                {
                    "agent_switches": {**mapping(POSITIVE), "propertyNames": {"pattern": "_to_"}},
                    "agent_processing": mapping(
                        record(
                            {
                                "count": POSITIVE,
                                "total_duration_ms": COUNT,
                                "success_count": COUNT,
                                "failure_count": COUNT,
                            }
                        )
                    ),
                    "tool_executions": mapping(record(dict.fromkeys(EXECUTIONS.values(), COUNT))),
                    "hitl_decisions": mapping(record({decision.upper(): COUNT for decision in DECISIONS})),
                    "errors": mapping(mapping(POSITIVE)),
                }
            ),
            "computed": {
                "type": "object",
                "patternProperties": {
                    "_avg_duration_ms$": NUMBER,
                    "_success_rate$": {**NUMBER, "maximum": 1},
                },
                "additionalProperties": False,
            },
            "timestamp": TIME,
        }
    ),
    "Statistics": record(
        {
            "total_published": COUNT,
            "successful_handlers": COUNT,
            "failed_handlers": COUNT,
            "last_event_time": nullable(TIME),
            "success_rate": {**NUMBER, "maximum": 1},
        }
    ),
    "SessionsWithMetrics": record({"sessions": listed(SESSION_ID, uniqueItems=True, maxItems=10_000), "count": COUNT}),
    "SessionMetrics": record(
        {"session_id": SESSION_ID, **SUMS, "requests": listed(ref("ModelRequest"), minItems=1, maxItems=1000)}
    ),
    "ModelRequest": record(
        {
            "timestamp": TIME,
            "model": text(200),
            "duration_ms": COUNT,
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "has_tool_calls": FLAG,
            "success": FLAG,
            "error": nullable(NAME),
        }
    ),
    "AuditLog": record(
        {
            "audit_log": listed(ref("AuditLogEntry"), maxItems=1000),
            "count": COUNT,
            "filters": record(
                {
                    "session_id": nullable(text(200)),
                    "event_type": nullable(text(200)),
                    "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
                }
            ),
        }
    ),
    "AuditLogEntry": told_apart("event_type", **{shown: _component(shown) for shown, _ in AUDIT_LOG.values()}),
    **{_component(shown): _entry(shown, extra) for shown, extra in AUDIT_LOG.values()},
}

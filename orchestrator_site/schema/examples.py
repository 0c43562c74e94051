"""What the examples speak of: one conversation, in which the coder asks for a file and a person decides.

The hashes are those that a server would have made of these ids and arguments.
"""

import json
from typing import Any

from agents_app.binding import args_hash, canonical

SESSION = "release-notes"
CALL = "call_8sK2mQ4vX7bN1cR5tY9wZa"
TURN = "f6c40b1e-5a8d-4b1c-9a53-0c6d1f0f7a11"
KEY = "0b8f2a53-6e0d-4a71-8d2e-51c7f8b0a9de"
REQUEST = "6f1c0d5a8b7e4f3c9a2b1d0e5f6a7b8c"
TOOL = "write_file"
ARGUMENTS = {"path": "notes.md", "content": "# Release notes"}
EDITED = {"path": "notes.md", "content": "# Notes"}
HASH = args_hash(SESSION, CALL, TOOL, 1, canonical(ARGUMENTS))
EDITED_HASH = args_hash(SESSION, CALL, TOOL, 1, canonical(EDITED))
REASON = "File modification requires user approval"
QUESTION = "Write the release notes"
BEGAN = "2026-03-02T09:30:00.120000+00:00"
ASKED = "2026-03-02T09:30:02.480000+00:00"
DECIDED = "2026-03-02T09:31:10.005000+00:00"
DEADLINE = "2026-03-02T09:41:10.005000+00:00"

_ROUTED = {"from_agent": "orchestrator", "to_agent": "coder", "reason": "It asks for a file.", "confidence": "high"}
_USAGE = {"prompt_tokens": 412, "completion_tokens": 57, "total_tokens": 469}
_LISTED = {
    "id": SESSION,
    "session_id": SESSION,
    "title": QUESTION,
    "description": None,
    "message_count": 2,
    "last_activity": ASKED,
    "is_active": True,
    "current_agent": "coder",
    "created_at": BEGAN,
}
_DETAILS = {**_LISTED, "messages": None, "duration_seconds": 2.36}
_RECORDED = {"id": CALL, "type": "function", "function": {"name": TOOL, "arguments": json.dumps(ARGUMENTS)}}
_PAST = {"from": "orchestrator", "to": "coder", "reason": _ROUTED["reason"], "timestamp": BEGAN}
_SWITCH = {**_ROUTED, "switched_at": BEGAN}
_CONTEXT = {
    "id": SESSION,
    "session_id": SESSION,
    "current_agent": "coder",
    "switch_count": 1,
    "switch_history": [_SWITCH],
    "last_switch_at": BEGAN,
    "created_at": BEGAN,
}
_WAITING = {
    "request_id": CALL,
    "request_type": "tool",
    "subject": TOOL,
    "details": {"arguments": ARGUMENTS},
    "reason": REASON,
    "created_at": ASKED,
    "call_id": CALL,
    "tool_name": TOOL,
    "arguments": ARGUMENTS,
    "args_hash": HASH,
}
_APPROVAL = {
    **_WAITING,
    "session_id": SESSION,
    "status": "edited",
    "decision": "edit",
    "decided_by": "internal",
    "decided_at": DECIDED,
    "feedback": "A shorter title.",
    "modified_arguments": EDITED,
    "released_args_hash": EDITED_HASH,
}

# By component.
EXAMPLES: dict[str, Any] = {
    "Health": {"status": "healthy", "service": "agent-runtime", "version": "0.1.0"},
    "Alive": {"status": "alive"},
    "Readiness": {"status": "ready", "database": "ok", "runner": "ok", "layer": "memory"},
    "CreatedSession": {
        "id": SESSION,
        "session_id": SESSION,
        "message_count": 0,
        "created_at": BEGAN,
        "is_active": True,
        "current_agent": "orchestrator",
    },
    "SessionList": {"sessions": [_LISTED], "total": 1, "limit": 20, "offset": 0},
    "Session": {**_DETAILS, "session": _DETAILS},
    "History": {
        "session_id": SESSION,
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "", "tool_calls": [_RECORDED]},
            {"role": "tool", "content": "done", "name": TOOL, "tool_call_id": CALL},
            {"role": "assistant", "content": "They are in notes.md."},
        ],
        "message_count": 4,
        "last_activity": DECIDED,
        "current_agent": "coder",
        "agent_history": [{**_PAST, "confidence": "high"}],
    },
    "Cancelled": {"session_id": SESSION, "cancelled_turn": TURN},
    "OpenCalls": {
        "session_id": SESSION,
        "open_calls": [
            {
                "call_id": CALL,
                "tool_name": TOOL,
                "arguments": EDITED,
                "args_hash": EDITED_HASH,
                "state": "released",
                "executed_by": "client",
                "requires_approval": True,
                "released_at": DECIDED,
                "deadline_at": DEADLINE,
            }
        ],
        "count": 1,
        "open_turn": TURN,
        "position": 41,
    },
    "PendingApprovals": {"session_id": SESSION, "pending_approvals": [_WAITING], "count": 1},
    "Approval": _APPROVAL,
    "ApprovalList": {"approvals": [_APPROVAL], "total": 1, "limit": 20, "offset": 0},
    "Agents": {
        "agents": [
            {
                "type": "architect",
                "name": "Architect Agent",
                "description": "You are the architect: you design and you write documents.",
                "allowed_tools": ["read_file", "write_file"],
                "has_file_restrictions": True,
            }
        ],
        "total": 1,
    },
    "CurrentAgent": {
        "context": _CONTEXT,
        "session_id": SESSION,
        "current_agent": "coder",
        "agent_history": [_PAST],
        "switch_count": 1,
    },
    "Switched": {"context": _CONTEXT},
    "Metrics": {
        "metrics": {
            "agent_switches": {"orchestrator_to_coder": 1},
            "agent_processing": {
                "coder": {"count": 2, "total_duration_ms": 3050, "success_count": 2, "failure_count": 0}
            },
            "tool_executions": {TOOL: {"requested": 1, "completed": 1, "failed": 0, "requires_approval": 1}},
            "hitl_decisions": {TOOL: {"APPROVE": 0, "EDIT": 1, "REJECT": 0}},
            "errors": {"coder": {"model_timeout": 1}},
        },
        "computed": {"coder_avg_duration_ms": 1525.0, f"{TOOL}_success_rate": 1.0},
        "timestamp": DECIDED,
    },
    "Statistics": {
        "total_published": 12,
        "successful_handlers": 12,
        "failed_handlers": 0,
        "last_event_time": DECIDED,
        "success_rate": 1.0,
    },
    "SessionsWithMetrics": {"sessions": [SESSION], "count": 1},
    "SessionMetrics": {
        "session_id": SESSION,
        "total_requests": 1,
        "successful_requests": 1,
        "failed_requests": 0,
        "total_duration_ms": 1480,
        "average_duration_ms": 1480.0,
        "total_prompt_tokens": 412,
        "total_completion_tokens": 57,
        "total_tokens": 469,
        "average_tokens_per_request": 469.0,
        "requests_with_tools": 1,
        "requests": [
            {
                "timestamp": ASKED,
                "model": "gpt-4o-mini",
                "duration_ms": 1480,
                **_USAGE,
                "has_tool_calls": True,
                "success": True,
                "error": None,
            }
        ],
    },
    "AuditLog": {
        "audit_log": [
            {
                "timestamp": DECIDED,
                "event_type": "hitl_decision_made",
                "event_id": "0b7a4d0c-3c56-4c1e-8a8e-6f2f7f1d9e42",
                "session_id": SESSION,
                "correlation_id": TURN,
                "call_id": CALL,
                "decision": "edit",
                "tool_name": TOOL,
                "original_args": ARGUMENTS,
                "modified_args": EDITED,
            }
        ],
        "count": 1,
        "filters": {"session_id": SESSION, "event_type": None, "limit": 100},
    },
    "TokenDelta": {"type": "assistant_message", "token": "Hello ", "is_final": False},
    "AssistantMessage": {"type": "assistant_message", "content": "Hello there.", "is_final": True},
    "ToolCallChunk": {
        "type": "tool_call",
        "call_id": CALL,
        "tool_name": TOOL,
        "arguments": ARGUMENTS,
        "requires_approval": True,
        "is_final": True,
        "metadata": {"args_hash": HASH},
    },
    "AgentSwitchedChunk": {
        "type": "agent_switched",
        "content": "Switched to coder agent",
        "is_final": False,
        **_ROUTED,
        "metadata": _ROUTED,
    },
    "ErrorChunk": {
        "type": "error",
        "content": "The model did not answer in time.",
        "error": "The model did not answer in time.",
        "is_final": True,
        "metadata": {"code": "model_timeout"},
    },
    "TurnStartedChunk": {"type": "turn_started", "turn_id": TURN},
    "TurnFinishedChunk": {
        "type": "turn_finished",
        "turn_id": TURN,
        "status": "completed",
        "code": None,
        "usage": _USAGE,
    },
    "ApprovalResolvedChunk": {
        "type": "approval_resolved",
        "call_id": CALL,
        "metadata": {
            "decision": "edit",
            "arguments": EDITED,
            "args_hash": EDITED_HASH,
            "feedback": "A shorter title.",
            "decided_by": "internal",
            "decided_at": DECIDED,
        },
    },
    "RestartedChunk": {"type": "restarted", "turn_id": TURN, "metadata": {"discard_after": 41}},
    "StreamResetChunk": {"type": "stream_reset", "metadata": {"from": 1200}},
    "NumberedChunk": {"id": 7, "type": "assistant_message", "token": "Hello ", "is_final": False},
    "StreamEnd": {"status": "completed"},
    "SocketError": {"type": "error", "content": "Agent error: 404"},
}

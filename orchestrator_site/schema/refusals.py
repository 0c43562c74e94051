"""How requests are refused: statuses and codes, from the very classes that are raised."""

from typing import Any

from agents_app.approvals import (
    AlreadyDecided,
    ArgumentsChanged,
    PolicyChanged,
    SelfApprovalForbidden,
    UnknownApproval,
)
from agents_app.handoffs import AlreadyActive, TooManySwitches, UnknownAgent
from events_app.admission import Overloaded
from events_app.figures import NoMetrics
from events_app.log import AuditUnavailable
from events_app.stream import TooManyStreams
from messages_app.acceptance import QueueFull, TurnRunning
from orchestrator_site import errors
from orchestrator_site.errors import APIError
from orchestrator_site.guard import BodyTimeout, HeadersTooLarge
from orchestrator_site.http import InvalidJSON
from orchestrator_site.middleware import InvalidHost, internal_error
from orchestrator_site.schema import examples
from orchestrator_site.schema.answers import DECIDED
from orchestrator_site.schema.shapes import NULL, TEXT, Schema, listed, one_of, only, record, ref
from orchestrator_site.sockets import ForeignOrigin
from sessions_app.idempotency import HEADER, InvalidKey, KeyReused
from sessions_app.models import CallMoved, SessionIdTaken, TurnMoved, UnknownSession

Refusal = type[APIError] | APIError
INTERNAL = internal_error()

# What each of them says, for example.
DETAILS: dict[Refusal, Any] = {
    errors.BadRequest: "Bad Request",
    InvalidHost: "This host is not served here.",
    InvalidJSON: "The body is not valid JSON.",
    InvalidKey: f"{HEADER} has to be given once, as 1 to 255 visible ASCII characters.",
    UnknownAgent: "Unknown agent type: nobody",
    AlreadyActive: "Agent coder is already active",
    TooManySwitches: "A session may be switched 50 times",
    errors.Unauthorized: "unauthorized",
    SelfApprovalForbidden: "Somebody else has to decide on this call.",
    ForeignOrigin: "Pages of this origin may not connect.",
    errors.NotFound: "Not Found",
    UnknownSession: f"Session {examples.SESSION} not found",
    UnknownApproval: f"No approval request {examples.CALL}",
    NoMetrics: f"No metrics found for session {examples.SESSION}",
    errors.MethodNotAllowed: "Method Not Allowed",
    BodyTimeout: "The body took too long.",
    SessionIdTaken: "This session id is taken.",
    AlreadyDecided: f"Already decided (approve) by internal at {examples.DECIDED}.",
    ArgumentsChanged: "These are not the arguments that wait.",
    PolicyChanged: "This is not allowed here.",
    TurnRunning: "A turn of this session is queued or running.",
    TurnMoved: "The turn moved on while it was being ended.",
    CallMoved: "The call moved on while it was being answered.",
    errors.TooLarge: "A body may have 2097152 bytes.",
    errors.UnsupportedMedia: "The body has to be application/json in UTF-8.",
    errors.Invalid: [{"type": "missing", "loc": ["body", "reason"], "msg": "Field required.", "input": None}],
    KeyReused: [
        {"type": "value_error", "loc": ["header", HEADER], "msg": "Is the key of another request.", "input": None}
    ],
    QueueFull: "This session has as many messages waiting as it may.",
    HeadersTooLarge: "Headers may have 32768 bytes.",
    INTERNAL: "Internal server error",
    errors.Unavailable: "The database does not answer at the moment.",
    AuditUnavailable: "This cannot be written down at the moment, so it is not done.",
    Overloaded: "This server has more to do than it can.",
    TooManyStreams: "This server holds as many streams as it can.",
}

_DECISION = {"decision": "approve", "decided_by": "internal", "decided_at": examples.DECIDED}
# The keys that some have beside the three of all.
_MORE: dict[Refusal, dict[str, Any]] = {AlreadyDecided: _DECISION, NoMetrics: {"error": DETAILS[NoMetrics]}}
_OWN_SCHEMA: dict[Refusal, str] = {
    errors.Invalid: "Invalid",
    KeyReused: "KeyReused",
    AlreadyDecided: "AlreadyDecided",
    NoMetrics: "NoMetrics",
}

ERROR: dict[str, Schema] = {
    "detail": {**TEXT, "description": "For people."},
    "code": {**TEXT, "description": "For programs: stable."},
    "request_id": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
}
PROBLEM = record({"type": TEXT, "loc": listed({"type": ["string", "integer"]}), "msg": TEXT, "input": NULL})
SCHEMAS: dict[str, Schema] = {
    "Error": record(ERROR),
    "Invalid": record({**ERROR, "detail": listed(PROBLEM, minItems=1), "code": only(errors.Invalid.code)}),
    "KeyReused": record({**ERROR, "detail": listed(PROBLEM, minItems=1), "code": only(KeyReused.code)}),
    "AlreadyDecided": record({**ERROR, "code": only(AlreadyDecided.code), **DECIDED}),
    "NoMetrics": record({**ERROR, "code": only(NoMetrics.code), "error": {**TEXT, "description": "The same text."}}),
}
HEADERS: dict[str, Schema] = {
    "RequestId": {
        "description": "The id of the request: its own `X-Request-ID`, or one that the server made.",
        "required": True,
        "schema": ERROR["request_id"],
    },
    "RetryAfter": {
        "description": "Seconds to wait.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"},
    },
    "Allow": {
        "description": "The methods that this path has.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Z]+(, [A-Z]+)*$"},
    },
}
REQUEST_ID_HEADER = {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}
_HEADERS_OF: dict[int, Schema] = {
    405: {"Allow": {"$ref": "#/components/headers/Allow"}},
    429: {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}},
    503: {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}},
}


def response(*refusals: Refusal) -> Schema:
    """How refusals of one status are answered."""
    plain = [refusal.code for refusal in refusals if refusal not in _OWN_SCHEMA]
    schemas = [ref(_OWN_SCHEMA[refusal]) for refusal in refusals if refusal in _OWN_SCHEMA]
    if plain:
        schemas.append({"allOf": [ref("Error"), {"properties": {"code": one_of(*plain)}}]})
    return {
        "description": ", ".join(f"`{refusal.code}`" for refusal in refusals),
        "headers": {**REQUEST_ID_HEADER, **_HEADERS_OF.get(refusals[0].status, {})},
        "content": {
            "application/json": {
                "schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas},
                "examples": {refusal.code: {"value": _example(refusal)} for refusal in refusals},
            }
        },
    }


def _example(refusal: Refusal) -> Schema:
    body = {"detail": DETAILS[refusal], "code": refusal.code, "request_id": examples.REQUEST}
    return {**body, **_MORE.get(refusal, {})}


RESPONSES: dict[str, Schema] = {
    "Unauthorized": response(errors.Unauthorized),
    "MethodNotAllowed": response(errors.MethodNotAllowed),
    "BodyTimeout": response(BodyTimeout),
    "TooLarge": response(errors.TooLarge),
    "UnsupportedMedia": response(errors.UnsupportedMedia),
    "Invalid": response(errors.Invalid),
    "HeadersTooLarge": response(HeadersTooLarge),
    "InternalError": response(INTERNAL),
}
_SHARED = {
    errors.Unauthorized: "Unauthorized",
    BodyTimeout: "BodyTimeout",
    errors.TooLarge: "TooLarge",
    errors.UnsupportedMedia: "UnsupportedMedia",
    errors.Invalid: "Invalid",
    HeadersTooLarge: "HeadersTooLarge",
    INTERNAL: "InternalError",
}
# What any request may meet before it reaches its endpoint, and the fault of ours that nobody foresaw.
EVERYWHERE: tuple[Refusal, ...] = (
    errors.BadRequest,
    InvalidHost,
    BodyTimeout,
    errors.TooLarge,
    errors.UnsupportedMedia,
    HeadersTooLarge,
    INTERNAL,
)


def responses(refusals: tuple[Refusal, ...]) -> Schema:
    """By status, in order."""
    by_status: dict[int, list[Refusal]] = {}
    for refusal in sorted(refusals, key=lambda refusal: refusal.status):
        by_status.setdefault(refusal.status, []).append(refusal)
    return {
        str(status): {"$ref": f"#/components/responses/{_SHARED[same[0]]}"}
        if len(same) == 1 and same[0] in _SHARED
        else response(*same)
        for status, same in by_status.items()
    }

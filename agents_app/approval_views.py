"""Approvals over REST: what waits, what is open, deciding (protocol 2.9 and 2.11)."""

import json
from typing import Any

from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from agents_app import approvals
from agents_app.approvals import MAX_FEEDBACK_CHARS, Choice, Verdict
from agents_app.llm.base import MAX_ARGUMENT_BYTES
from agents_app.models import ApprovalRequest
from orchestrator_site.errors import Invalid, TooLarge
from orchestrator_site.http import caller_in, json_body, text, whole_number, wire_time
from sessions_app import lifecycle
from sessions_app.models import Session, ToolCall
from sessions_app.views import StrictText, answered_once, validated

EVERY_STATUS = "all"


class DecisionRequest(serializers.Serializer[Any]):
    decision = StrictText()
    modified_arguments = serializers.JSONField(required=False, allow_null=True)
    feedback = StrictText(required=False, allow_null=True, allow_blank=True)
    args_hash = StrictText(required=False, allow_null=True, max_length=64)

    def validate_decision(self, decision: str) -> str:
        if decision not in approvals.BY_A_PERSON:
            raise serializers.ValidationError("Has to be approve, edit or reject.", code="enum")
        return decision

    def validate_modified_arguments(self, arguments: Any) -> Any:
        if arguments is not None and not isinstance(arguments, dict):
            raise serializers.ValidationError("Has to be an object.", code="dict_type")
        return arguments


class PendingApprovalsView(APIView):
    """GET /sessions/{session_id}/pending-approvals"""

    def get(self, request: Request, session_id: str) -> Response:
        session = Session.objects.one_visible_to(caller_in(request), session_id)
        found = session.approvals.pending().select_related("call").order_by("id")
        # There are clients that execute what they read here.
        pending = [waiting(approval) for approval in found if approvals.is_sound(approval.call, approval)]
        return Response({"session_id": session.pk, "pending_approvals": pending, "count": len(pending)})


class OpenCallsView(APIView):
    """GET /sessions/{session_id}/open-calls: what a client that was away finds to do."""

    def get(self, request: Request, session_id: str) -> Response:
        session = Session.objects.one_visible_to(caller_in(request), session_id)
        # First: a call that comes in between is told twice then, here and in the stream, and not never.
        position, turn_id = lifecycle.rejoining(session)
        calls = [opened(call) for call in session.calls.open().in_order() if approvals.is_sound(call)]
        return Response(
            {
                "session_id": session.pk,
                "open_calls": calls,
                "count": len(calls),
                "open_turn": str(turn_id) if turn_id else None,
                "position": position,
            }
        )


class ApprovalsView(APIView):
    """GET /approvals"""

    def get(self, request: Request) -> Response:
        limit = whole_number(request.GET, "limit", 100, at_least=1, at_most=1000)
        offset = whole_number(request.GET, "offset", 0, at_least=0)
        status = text(request.GET, "status") or ApprovalRequest.Status.PENDING
        if status not in (*ApprovalRequest.Status.values, EVERY_STATUS):
            known = ", ".join([*ApprovalRequest.Status.values, EVERY_STATUS])
            raise Invalid(f"Has to be one of {known}.", "query", "status", kind="enum")
        found = ApprovalRequest.objects.visible_to(caller_in(request))
        if status != EVERY_STATUS:
            found = found.filter(status=status)
        for parameter, column in (("session_id", "session_id"), ("tool", "tool_name")):
            wanted = text(request.GET, parameter)
            if wanted is not None:
                found = found.filter(**{column: wanted})
        page = found.select_related("decision").order_by("id")[offset : offset + limit]
        return Response(
            {
                "approvals": [detailed(approval) for approval in page],
                "total": found.count(),
                "limit": limit,
                "offset": offset,
            }
        )


class ApprovalView(APIView):
    """GET /approvals/{call_id}"""

    def get(self, request: Request, call_id: str) -> Response:
        return Response(detailed(approvals.one_visible_to(caller_in(request), call_id)))


class DecisionView(APIView):
    """POST /approvals/{call_id}/decision"""

    def post(self, request: Request, call_id: str) -> Response:
        body = json_body(request)
        caller, choice = caller_in(request), choice_in(body)
        found = approvals.one_visible_to(caller, call_id)
        # Around the transaction in which a key makes it happen: refusals are written down when it is rolled back.
        with approvals.recording_refusals(caller, found.call):
            return answered_once(request, body, lambda: detailed(approvals.decide_on(found, choice, caller)))


def choice_in(body: Any) -> Choice:
    """What a decision's body says. Raises the 422 of protocol 1.4, or TooLarge."""
    asked = validated(DecisionRequest, body)
    verdict, arguments, feedback = Verdict(asked["decision"]), asked.get("modified_arguments"), asked.get("feedback")
    if verdict == Verdict.EDIT and arguments is None:
        raise Invalid("An edit needs its arguments.", "body", "modified_arguments", kind="missing")
    if verdict != Verdict.EDIT and arguments is not None:
        raise Invalid("Only an edit has arguments.", "body", "modified_arguments")
    if len(json.dumps(arguments, ensure_ascii=False, separators=(",", ":")).encode()) > MAX_ARGUMENT_BYTES:
        raise TooLarge(f"Arguments may have {MAX_ARGUMENT_BYTES} bytes.")
    if feedback is not None and len(feedback) > MAX_FEEDBACK_CHARS:
        raise TooLarge(f"Feedback may have {MAX_FEEDBACK_CHARS} characters.")
    return Choice(verdict, arguments, feedback, asked.get("args_hash"))


def waiting(approval: ApprovalRequest) -> dict[str, Any]:
    """Form P of protocol 2.9, with the hash that a decision may send back."""
    arguments = approval.arguments
    return {
        "request_id": approval.call_id,
        "request_type": "tool",
        "subject": approval.tool_name,
        "details": {"arguments": arguments},
        "reason": approval.reason or None,
        "created_at": wire_time(approval.created_at),
        "call_id": approval.call_id,
        "tool_name": approval.tool_name,
        "arguments": arguments,
        "args_hash": approval.args_hash,
    }


def detailed(approval: ApprovalRequest) -> dict[str, Any]:
    """Form A of protocol 2.11. `args_hash` is of the arguments that were shown, `released_args_hash` of those that may
    run: after an edit they differ, and a result echoes the latter.
    """
    made = getattr(approval, "decision", None)
    return {
        **waiting(approval),
        "session_id": approval.session_id,
        "status": approval.status,
        "decision": made.verdict if made else None,
        "decided_by": made.decided_by if made else None,
        "decided_at": wire_time(made.decided_at) if made else None,
        "feedback": (made.feedback or None) if made else None,
        "modified_arguments": made.edited_arguments if made else None,
        "released_args_hash": made.args_hash if made and made.verdict in (Verdict.APPROVE, Verdict.EDIT) else None,
    }


def opened(call: ToolCall) -> dict[str, Any]:
    """An open call of protocol 2.11, with the arguments that are to be executed."""
    return {
        "call_id": call.pk,
        "tool_name": call.tool_name,
        "arguments": call.final_arguments,
        "args_hash": call.args_hash,
        "state": call.state,
        "executed_by": "server" if call.on_server else "client",
        "requires_approval": call.requires_approval,
        "released_at": wire_time(call.released_at) if call.released_at else None,
        "deadline_at": wire_time(call.deadline_at) if call.deadline_at else None,
    }

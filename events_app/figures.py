"""Metrics and statistics, from rows (protocol section 8)."""

from typing import Any

from django.db.models import Avg, Count, IntegerField, Max, Min, Q, Sum
from django.db.models.fields.json import KT
from django.db.models.functions import Cast
from django.utils import timezone

from events_app.models import Event, ModelCall
from orchestrator_site.errors import NotFound
from orchestrator_site.http import wire_time

# What /events/audit-log shows, under the names it has there, with the extra keys of each.
AUDIT_LOG = {
    "agent.switched": ("agent_switched", ("from_agent", "to_agent", "reason", "confidence")),
    "hitl.decision.made": (
        "hitl_decision_made",
        ("call_id", "decision", "tool_name", "original_args", "modified_args"),
    ),
    "agent.error.occurred": ("agent_error", ("agent", "error_message", "error_type")),
    "tool.execution.failed": ("tool_execution_failed", ("tool_name", "call_id", "error_message", "error_type")),
    "tool.approval.required": ("tool_approval_required", ("tool_name", "call_id", "reason", "arguments")),
}
# What is counted of each tool (protocol 8.2), and the decisions that have a figure of their own.
EXECUTIONS = {
    "tool.execution.requested": "requested",
    "tool.execution.completed": "completed",
    "tool.execution.failed": "failed",
    "tool.approval.required": "requires_approval",
}
DECISIONS = ("approve", "edit", "reject")


class NoMetrics(NotFound):
    code = "no_metrics"


def metrics(account_id: int) -> dict[str, Any]:
    """Protocol 8.2."""
    events = Event.objects.filter(account_id=account_id).order_by()
    switches = (
        events.filter(event_type="agent.switched")
        .values_list(KT("data__from_agent"), KT("data__to_agent"))
        .annotate(number=Count("id"))
    )
    errors: dict[str, dict[str, int]] = {}
    for agent, kind, number in (
        events.filter(event_type="agent.error.occurred")
        .values_list(KT("data__agent"), KT("data__error_type"))
        .annotate(number=Count("id"))
    ):
        errors.setdefault(agent, {})[kind] = number
    processing = {
        row["agent"]: {
            "count": row["count"],
            "total_duration_ms": row["total"],
            "success_count": row["succeeded"],
            "failure_count": row["count"] - row["succeeded"],
        }
        for row in events.filter(event_type="agent.processing.completed")
        .values(agent=KT("data__agent"))
        .annotate(
            count=Count("id"),
            total=Sum(Cast(KT("data__duration_ms"), IntegerField())),
            succeeded=Count("id", filter=Q(data__success=True)),
        )
    }
    executions: dict[str, dict[str, int]] = {}
    for tool, kind, number in _by_tool(events.filter(event_type__in=EXECUTIONS), "event_type"):
        executions.setdefault(tool, dict.fromkeys(EXECUTIONS.values(), 0))[EXECUTIONS[kind]] = number
    decisions: dict[str, dict[str, int]] = {}
    made = events.filter(event_type="hitl.decision.made", data__decision__in=DECISIONS)
    for tool, decision, number in _by_tool(made, KT("data__decision")):
        decisions.setdefault(tool, {each.upper(): 0 for each in DECISIONS})[decision.upper()] = number
    return {
        "metrics": {
            "agent_switches": {f"{start}_to_{end}": number for start, end, number in switches},
            "agent_processing": processing,
            "tool_executions": executions,
            "hitl_decisions": decisions,
            "errors": errors,
        },
        "computed": {
            f"{agent}_avg_duration_ms": round(row["total_duration_ms"] / row["count"], 2)
            for agent, row in processing.items()
        }
        | {
            f"{tool}_success_rate": round(row["completed"] / max(row["completed"] + row["failed"], 1), 3)
            for tool, row in executions.items()
        },
        "timestamp": wire_time(timezone.now()),
    }


def _by_tool(events: Any, by: Any) -> Any:
    return events.values_list(KT("data__tool_name"), by).annotate(number=Count("id"))


def audit_log(account_id: int, *, session_id: str | None, event_type: str | None, limit: int) -> dict[str, Any]:
    """Protocol 8.3: the last `limit` entries that match, oldest first."""
    names = {shown: stored for stored, (shown, _) in AUDIT_LOG.items()}
    events = Event.objects.filter(account_id=account_id, event_type__in=AUDIT_LOG)
    if session_id is not None:
        events = events.filter(session_id=session_id)
    if event_type is not None:
        events = events.filter(event_type=names.get(event_type, ""))
    entries = [_entry(event) for event in events.order_by("-id")[:limit]][::-1]
    filters = {"session_id": session_id, "event_type": event_type, "limit": limit}
    return {"audit_log": entries, "count": len(entries), "filters": filters}


def _entry(event: Event) -> dict[str, Any]:
    shown, extra = AUDIT_LOG[event.event_type]
    return {
        "timestamp": wire_time(event.timestamp),
        "event_type": shown,
        "event_id": str(event.event_id),
        "session_id": event.session_id,
        "correlation_id": event.correlation_id or None,
        **{key: event.data.get(key) for key in extra},
    }


def statistics(account_id: int) -> dict[str, Any]:
    """Protocol 8.4. Recording a fact is its handling, in one transaction: a stored event has been handled."""
    # Both from an index alone; the latest time among them by reading every row.
    figures = Event.objects.filter(account_id=account_id).aggregate(number=Count("id"), last=Max("id"))
    number, last = (
        figures["number"],
        Event.objects.filter(pk=figures["last"]).values_list("timestamp", flat=True).first(),
    )
    return {
        "total_published": number,
        "successful_handlers": number,
        "failed_handlers": 0,
        "last_event_time": wire_time(last) if last else None,
        "success_rate": 1.0 if number else 0.0,
    }


def session_metrics(account_id: int, session_id: str, *, most: int = 1000) -> dict[str, Any]:
    """Protocol 8.5: the model requests that answered, of which the latest `most` are listed. Raises NoMetrics."""
    calls = _answers(account_id).filter(session_id=session_id)
    succeeded = Q(error="")
    sums = calls.aggregate(
        total=Count("id"),
        successful=Count("id", filter=succeeded),
        duration=Sum("duration_ms", filter=succeeded, default=0),
        average=Avg("duration_ms", filter=succeeded, default=0.0),
        prompt=Sum("prompt_tokens", filter=succeeded, default=0),
        completion=Sum("completion_tokens", filter=succeeded, default=0),
        tokens=Sum("total_tokens", filter=succeeded, default=0),
        tokens_average=Avg("total_tokens", filter=succeeded, default=0.0),
        with_tools=Count("id", filter=succeeded & Q(has_tool_calls=True)),
    )
    if not sums["total"]:
        raise NoMetrics(f"No metrics found for session {session_id}")
    return {
        "session_id": session_id,
        "total_requests": sums["total"],
        "successful_requests": sums["successful"],
        "failed_requests": sums["total"] - sums["successful"],
        "total_duration_ms": sums["duration"],
        "average_duration_ms": round(sums["average"], 2),
        "total_prompt_tokens": sums["prompt"],
        "total_completion_tokens": sums["completion"],
        "total_tokens": sums["tokens"],
        "average_tokens_per_request": round(sums["tokens_average"], 2),
        "requests_with_tools": sums["with_tools"],
        "requests": [_request(call) for call in calls.order_by("-id")[:most]][::-1],
    }


def _request(call: ModelCall) -> dict[str, Any]:
    failed = bool(call.error)
    return {
        "timestamp": wire_time(call.created_at),
        "model": call.model,
        "duration_ms": 0 if failed else call.duration_ms,
        "prompt_tokens": 0 if failed else call.prompt_tokens,
        "completion_tokens": 0 if failed else call.completion_tokens,
        "total_tokens": 0 if failed else call.total_tokens,
        "has_tool_calls": call.has_tool_calls and not failed,
        "success": not failed,
        "error": call.error or None,
    }


def sessions_with_metrics(account_id: int, *, most: int = 10_000) -> dict[str, Any]:
    """Protocol 8.6: in order of first appearance."""
    first = _answers(account_id).values("session_id").annotate(first=Min("id")).order_by("first")
    sessions = list(first.values_list("session_id", flat=True)[:most])
    return {"sessions": sessions, "count": len(sessions)}


def _answers(account_id: int) -> Any:
    # Routing requests are not in a session's metrics (protocol 8.7); the turn's usage has them.
    return ModelCall.objects.filter(account_id=account_id, purpose=ModelCall.Purpose.ANSWER).order_by()

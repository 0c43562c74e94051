"""The admin's start page: what waits, what runs, what failed, what was decided and used. Days are UTC.

Each figure is one query over an index, and is asked for only on behalf of who may see the rows behind it.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db.models import Count, IntegerField, QuerySet, Sum, Value
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from django.utils.http import urlencode

from agents_app.models import ApprovalRequest, Decision
from events_app.display import visible
from events_app.models import ModelCall
from orchestrator_site.navigation import may_open
from sessions_app.models import RUNNER_LOST, Session, ToolCall, Turn

DAYS = 14
LATEST = 8
# A count that goes on beyond this says nothing more to a person.
MOST_COUNTED = 1_000
VERDICTS = {
    Decision.Verdict.APPROVE: "var(--color-green-500)",
    Decision.Verdict.EDIT: "var(--color-blue-500)",
    Decision.Verdict.REJECT: "var(--color-red-500)",
    Decision.Verdict.SUPERSEDED: "var(--color-base-400)",
    Decision.Verdict.CANCELLED: "var(--color-base-300)",
}
TOKENS = {"prompt": "var(--color-primary-300)", "completion": "var(--color-primary-600)"}
GREY = "#9ca3af"
# unfold hands these to Chart.js as they are.
STACKED = json.dumps(
    {
        "responsive": True,
        "maintainAspectRatio": False,
        "animation": False,
        "plugins": {"legend": {"align": "end", "labels": {"color": GREY, "boxWidth": 10, "boxHeight": 10}}},
        "scales": {
            "x": {"stacked": True, "grid": {"display": False}, "ticks": {"color": GREY}},
            "y": {"stacked": True, "beginAtZero": True, "grid": {}, "ticks": {"color": GREY, "precision": 0}},
        },
    }
)


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    value: str
    note: str = ""
    link: str = ""
    alarm: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Stacked bars, a stack for each day; the same figures as rows for whoever sees no picture."""

    name: str
    columns: list[str]
    rows: list[tuple[str, list[int]]]
    data: str
    options: str = STACKED

    @property
    def is_empty(self) -> bool:
        return not any(any(values) for _, values in self.rows)


def start_page(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """What unfold's start page is rendered with."""
    now = timezone.now()
    charts = []
    if may_open(request, "agents_app", "approvalrequest"):
        charts.append(_decisions_a_day(now))
        context["latest_decisions"] = _latest_decisions()
    if may_open(request, "events_app", "modelcall"):
        charts.append(_tokens_a_day(now))
    shown = {"figures": _figures(request, now), "failures": _failures(request, now), "charts": charts}
    return {**context, "title": "Overview", **shown}


def _figures(request: HttpRequest, now: datetime) -> list[Figure]:
    figures = []
    if may_open(request, "agents_app", "pendingapproval"):
        figures.append(_waiting(now))
    if may_open(request, "sessions_app", "toolcall"):
        figures += _in_doubt()
    if may_open(request, "sessions_app", "turn"):
        figures += [*_unfinished(), _parked(now)]
    if may_open(request, "sessions_app", "session"):
        since = now - timedelta(hours=1)
        active = _counted(Session.objects.filter(last_activity__gte=since))
        figures.append(
            Figure("Sessions active in the last hour", active, link=_list("sessions_app_session", last_activity=since))
        )
    return figures


def _waiting(now: datetime) -> Figure:
    pending = ApprovalRequest.objects.pending()
    number = _counted(pending)
    oldest = pending.order_by("id").values_list("created_at", flat=True).first()
    note = f"the oldest since {_age(now - oldest)}" if oldest else "nothing waits"
    return Figure("Approvals waiting", number, note, _list("agents_app_pendingapproval"), alarm=oldest is not None)


def _in_doubt() -> list[Figure]:
    """Shown when there are any: most installations have no tool that may not be repeated."""
    number = ToolCall.objects.in_doubt().count()
    page = _list("sessions_app_toolcall", status=ToolCall.Status.IN_DOUBT)
    note = "may have been executed; an operator is asked"
    return [Figure("Calls in doubt", f"{number:,}", note, page, alarm=True)] if number else []


def _unfinished() -> list[Figure]:
    counted = Turn.objects.unfinished().order_by().values_list("status").annotate(number=Count("pk"))
    numbers = dict(counted)
    return [
        Figure(
            f"Turns {status.label.lower()}",
            f"{numbers.get(status, 0):,}",
            link=_list("sessions_app_turn", status=status),
        )
        for status in Turn.UNFINISHED
    ]


def _parked(now: datetime) -> Figure:
    since = now - timedelta(days=1)
    number = Turn.objects.filter(status=Turn.Status.FAILED, code=RUNNER_LOST, finished_at__gte=since).count()
    page = _list("sessions_app_turn", status=Turn.Status.FAILED, code__exact=RUNNER_LOST, finished_at=since)
    note = "the server died with them; last 24 hours" if number else "none in the last 24 hours"
    return Figure("Turns parked", f"{number:,}", note, page, alarm=number > 0)


def _failures(request: HttpRequest, now: datetime) -> list[dict[str, Any]]:
    """What went wrong in the last day, by its code, with the list of just those."""
    since = now - timedelta(days=1)
    failures = []
    if may_open(request, "sessions_app", "turn"):
        failed = Turn.objects.filter(status=Turn.Status.FAILED, finished_at__gte=since)
        rows = _by_code(failed, "code", "sessions_app_turn", status="failed", finished_at=since)
        failures.append({"name": "Failed turns", "rows": rows})
    if may_open(request, "events_app", "modelcall"):
        failed_calls = ModelCall.objects.filter(created_at__gte=since).exclude(error="")
        rows = _by_code(failed_calls, "error", "events_app_modelcall", outcome="failed", created_at=since)
        failures.append({"name": "Failed model calls", "rows": rows})
    return failures


def _by_code(rows: QuerySet[Any], column: str, page: str, **chosen: Any) -> list[Figure]:
    counted = rows.order_by().values_list(column).annotate(number=Count("pk")).order_by("-number", column)[:LATEST]
    return [
        Figure(visible(code), f"{number:,}", link=_list(page, **{f"{column}__exact": code}, **chosen))
        for code, number in counted
    ]


def _decisions_a_day(now: datetime) -> Chart:
    made = Decision.objects.order_by().values("verdict").annotate(number=Count("pk"))
    numbers = {(row["day"], row["verdict"]): row["number"] for row in _each_day(made, "decided_at", now)}
    rows = [[numbers.get((day, verdict), 0) for verdict in VERDICTS] for day in range(DAYS)]
    return _chart("Decisions a day", [verdict.label for verdict in VERDICTS], list(VERDICTS.values()), rows, now)


def _tokens_a_day(now: datetime) -> Chart:
    spent = ModelCall.objects.order_by().values("purpose")
    spent = spent.annotate(prompt=Sum("prompt_tokens"), completion=Sum("completion_tokens"))
    rows = [[0, 0] for _ in range(DAYS)]
    for row in _each_day(spent, "created_at", now):
        rows[row["day"]][0] += row["prompt"]
        rows[row["day"]][1] += row["completion"]
    return _chart("Tokens a day", [name.capitalize() for name in TOKENS], list(TOKENS.values()), rows, now)


def _each_day(rows: QuerySet[Any], column: str, now: datetime) -> QuerySet[Any]:
    """The same figures for each of the last days, numbered from the oldest, in one query: ranges, which an index finds;
    SQLite would ask Python for the date of each row.
    """
    first, *others = (
        rows.filter(**{f"{column}__gte": start, f"{column}__lt": start + timedelta(days=1)}).annotate(
            day=Value(number, IntegerField())
        )
        for number, start in enumerate(_days(now))
    )
    return first.union(*others, all=True)


def _days(now: datetime) -> list[datetime]:
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return [today - timedelta(days=ago) for ago in reversed(range(DAYS))]


def _chart(name: str, columns: list[str], colours: list[str], rows: list[list[int]], now: datetime) -> Chart:
    days = _days(now)
    bars = [
        {"label": column, "data": [row[place] for row in rows], "backgroundColor": colour, "maxBarThickness": 28}
        for place, (column, colour) in enumerate(zip(columns, colours, strict=True))
    ]
    data = json.dumps({"labels": [f"{day:%d %b}" for day in days], "datasets": bars})
    return Chart(name, columns, [(f"{day:%Y-%m-%d}", row) for day, row in zip(days, rows, strict=True)], data)


def _latest_decisions() -> QuerySet[Decision]:
    return (
        Decision.objects.select_related("request")
        .defer("edited_text", "request__arguments_text")
        .order_by("-id")[:LATEST]
    )


def _counted(rows: QuerySet[Any]) -> str:
    number = rows[: MOST_COUNTED + 1].count()
    return f"{number:,}" if number <= MOST_COUNTED else f"{MOST_COUNTED:,}+"


def _list(page: str, **chosen: Any) -> str:
    """The address of a list with its filters set; a moment is the beginning of a range."""
    query: dict[str, str] = {}
    for name, value in chosen.items():
        if isinstance(value, datetime):
            query |= {f"{name}_from_0": f"{value:%Y-%m-%d}", f"{name}_from_1": f"{value:%H:%M:%S}"}
        else:
            query[name] = value
    address = reverse(f"admin:{page}_changelist")
    return f"{address}?{urlencode(query)}" if query else address


def _age(waited: timedelta) -> str:
    minutes = int(waited.total_seconds()) // 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 120:
        return f"{minutes} minute{'s' * (minutes > 1)}"
    return f"{minutes // 60} hours" if minutes < 2880 else f"{minutes // 1440} days"

"""Browsing what happened: audit entries, events, model calls. `BrowseOnlyAdmin` is the base for records of the past."""

import re
from typing import Any

from django.contrib import admin
from django.core.exceptions import FieldDoesNotExist, PermissionDenied, SuspiciousOperation
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import DropdownFilter
from unfold.decorators import display

from events_app.display import EMPTY, Shown, as_json, badge, box, clipped, link, moment, visible
from events_app.filters import Exactly, OneOf, OneOfThose, TimeRange, exactly, one_of
from events_app.models import AuditEntry, Event, ModelCall
from orchestrator_site.http import CALL_ID

# The names of protocol 8.1. A constant, because to ask the table for its distinct values is to read all of it.
EVENT_TYPES = (
    "agent.switched",
    "agent.processing.started",
    "agent.processing.completed",
    "agent.error.occurred",
    "session.created",
    "session.updated",
    "session.deleted",
    "session.message.added",
    "tool.execution.requested",
    "tool.execution.started",
    "tool.execution.completed",
    "tool.execution.failed",
    "tool.approval.required",
    "hitl.approval.requested",
    "hitl.decision.made",
    "hitl.timeout.occurred",
    "approval.requested",
    "approval.approved",
    "approval.rejected",
    "system.startup",
    "system.shutdown",
    "system.background_task.started",
    "system.background_task.completed",
    "metrics.collected",
    "metrics.performance.measured",
    "llm.request.started",
    "llm.request.completed",
    "llm.request.failed",
)
CHANNELS = (("api", "API"), ("socket", "Socket"), ("admin", "Admin"), ("system", "System"))
YES_OR_NO = (("True", "Yes"), ("False", "No"))


HARMLESS = {"exact", "isnull", "gte", "gt", "lte", "lt"}


def is_harmless(model: type[Model], lookup: str) -> bool:
    """Whether a list may be asked for this in its address. Django takes any lookup on a column, a regular expression
    that runs for minutes among them.
    """
    options = model._meta
    for part in lookup.split("__"):
        try:
            field = options.get_field(part)
        except FieldDoesNotExist:
            # A filter's own parameter is no column at all; of a column's lookups only these.
            return part in HARMLESS or part == lookup or not lookup.startswith(tuple(_columns(model)))
        if field.related_model is not None and not isinstance(field.related_model, str):
            options = field.related_model._meta
    return True


def _columns(model: type[Model]) -> list[str]:
    return [f"{field.name}__" for field in model._meta.get_fields()]


def ensure_text(request: HttpRequest) -> None:
    """Refuse a NUL in an address: no column holds one, and PostgreSQL takes none."""
    if any("\x00" in value for values in request.GET.lists() for value in values[1]):
        raise SuspiciousOperation("a NUL in a query")


class BrowseOnlyAdmin(ModelAdmin):
    """For records of the past: nobody adds, changes or deletes them, superusers included; a GET changes nothing.

    What is shown goes through the functions of `events_app.display`, never as the bare field of a client's text.
    """

    list_per_page = 50
    list_max_show_all = 50
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # a count of the table for each choice of each filter
    list_filter_submit = True

    def has_add_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        return is_harmless(self.model, lookup) and super().lookup_allowed(lookup, value, request)

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponseBase:
        ensure_text(request)
        # Without an action there is nothing to post; Django would answer with the list.
        if request.method == "POST" and not self.get_actions(request):
            raise PermissionDenied
        return super().changelist_view(request, extra_context)

    def render_change_form(self, request: HttpRequest, context: dict[str, Any], **kwargs: Any) -> HttpResponseBase:
        shown = Shown(context["original"])
        context.update(original=shown, subtitle=str(shown), show_history=False)
        return super().render_change_form(request, context, **kwargs)

    def history_view(
        self, request: HttpRequest, object_id: str, extra_context: dict[str, Any] | None = None
    ) -> HttpResponseBase:
        # What nobody changes has no history of changes, and Django's page would print the record's bare name.
        raise PermissionDenied


class EventTypeFilter(DropdownFilter):
    title = "type"
    parameter_name = "event_type"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, name) for name in EVENT_TYPES]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(event_type=self.value()) if self.value() else queryset


@admin.register(Event)
class EventAdmin(BrowseOnlyAdmin):
    list_display = ("at", "name", "session", "call", "details", "origin")
    list_display_links = ("at", "name")
    list_filter = (
        ("session_id", exactly("session")),
        EventTypeFilter,
        ("tool_name", exactly("tool")),
        ("correlation_id", exactly("turn")),
        ("timestamp", TimeRange),
    )
    search_fields = ("=session_id", "=correlation_id", "=event_id", "=event_type")
    search_help_text = "Id of a session, a turn or an event, or a type"
    ordering = ("-id",)
    fieldsets = (
        (None, {"fields": (("name", "event_category"), ("at", "origin"), ("session", "turn"), ("call", "approval"))}),
        ("Data", {"fields": ("data_shown",)}),
        ("Envelope", {"fields": (("event_id", "causation"), ("account_id", "version"))}),
    )

    @display(description="Time (UTC)", ordering="id")
    def at(self, event: Event) -> str:
        return moment(event.timestamp)

    @display(description="Type", ordering="event_type")
    def name(self, event: Event) -> str:
        return visible(event.event_type)

    @display(description="Category")
    def event_category(self, event: Event) -> str:
        return visible(event.event_category)

    @display(description="Source")
    def origin(self, event: Event) -> str:
        return visible(event.source)

    @display(description="Session")
    def session(self, event: Event) -> str:
        return session_link(event.session_id)

    @display(description="Turn")
    def turn(self, event: Event) -> str:
        return turn_link(event.correlation_id)

    @display(description="Tool call")
    def call(self, event: Event) -> str:
        return call_link(event.session_id, event.data.get("call_id"))

    @display(description="Approval")
    def approval(self, event: Event) -> str:
        asked = event.event_category in ("approval", "hitl")
        return approval_link(event.data.get("call_id")) if asked else EMPTY

    @display(description="Cause")
    def causation(self, event: Event) -> str:
        return visible(event.causation_id) or EMPTY

    @display(description="Data")
    def details(self, event: Event) -> str:
        return clipped(", ".join(f"{name}: {value}" for name, value in event.data.items() if value is not None))

    @display(description="Data")
    def data_shown(self, event: Event) -> str:
        return box(as_json(event.data))


class FailedFilter(OneOf):
    title = "outcome"
    parameter_name = "outcome"
    values = (("answered", "Answered"), ("failed", "Failed"))

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        failed = {"answered": queryset.filter(error=""), "failed": queryset.exclude(error="")}
        return failed.get(self.value() or "", queryset)


@admin.register(ModelCall)
class ModelCallAdmin(BrowseOnlyAdmin):
    list_display = ("at", "outcome", "purpose", "agent_shown", "model_shown", "session", "took", "tokens")
    list_filter = (
        ("session_id", exactly("session")),
        one_of("purpose", ModelCall.Purpose.choices),
        one_of("has_tool_calls", YES_OR_NO, "tool calls"),
        FailedFilter,
        ("error", Exactly),
        ("created_at", TimeRange),
    )
    search_fields = ("=session_id", "=turn_id", "=agent", "=model", "=error")
    search_help_text = "Id of a session or a turn, an agent, a model or an error code"
    ordering = ("-id",)
    fieldsets = (
        (None, {"fields": (("at", "took"), ("purpose", "outcome"), ("session", "turn"))}),
        ("Model", {"fields": (("agent_shown", "model_shown"), ("has_tool_calls", "account_id"))}),
        ("Tokens", {"fields": (("prompt_tokens", "completion_tokens", "total_tokens"),)}),
    )

    @display(description="Time (UTC)", ordering="id")
    def at(self, call: ModelCall) -> str:
        return moment(call.created_at)

    @display(description="Outcome", ordering="error")
    def outcome(self, call: ModelCall) -> str:
        return badge(call.error, "danger") if call.error else badge("answered", "success")

    @display(description="Agent", ordering="agent")
    def agent_shown(self, call: ModelCall) -> str:
        return visible(call.agent)

    @display(description="Model", ordering="model")
    def model_shown(self, call: ModelCall) -> str:
        return visible(call.model)

    @display(description="Session")
    def session(self, call: ModelCall) -> str:
        return session_link(call.session_id)

    @display(description="Turn")
    def turn(self, call: ModelCall) -> str:
        return turn_link(call.turn_id)

    @display(description="Duration", ordering="duration_ms")
    def took(self, call: ModelCall) -> str:
        return f"{call.duration_ms:,} ms"

    @display(description="Tokens", ordering="total_tokens")
    def tokens(self, call: ModelCall) -> str:
        return f"{call.total_tokens:,}"


class ActionFilter(OneOfThose):
    title = "action"
    parameter_name = "action"
    model = AuditEntry


@admin.register(AuditEntry)
class AuditEntryAdmin(BrowseOnlyAdmin):
    list_display = ("time", "by", "channel_shown", "deed", "ended", "done_to", "session", "why")
    list_display_links = ("time", "deed")
    list_filter = (
        ("session_id", exactly("session")),
        ("actor", Exactly),
        ActionFilter,
        ("tool_name", exactly("tool")),
        one_of("outcome", AuditEntry.Outcome.choices),
        one_of("channel", CHANNELS),
        ("at", TimeRange),
    )
    search_fields = ("=session_id", "=target", "=request_id", "=actor", "=action", "reason")
    search_help_text = "Id of a session, a call or a request, an actor, an action, or words of a reason"
    ordering = ("-id",)
    fieldsets = (
        (None, {"fields": (("deed", "ended"), ("by", "channel_shown"), ("time", "session"))}),
        ("Done to", {"fields": (("done_to", "tool"), ("call", "approval"))}),
        ("Reason", {"fields": ("reason_whole",)}),
        ("Details", {"fields": ("edited", "rest")}),
        ("Request", {"fields": (("from_where", "request_shown"), "account_id")}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[AuditEntry]:
        return super().get_queryset(request).defer("details")

    @display(description="Time (UTC)", ordering="id")
    def time(self, entry: AuditEntry) -> str:
        return moment(entry.at)

    @display(description="Actor", ordering="actor")
    def by(self, entry: AuditEntry) -> str:
        return clipped(entry.actor, 40)

    @display(description="Channel", ordering="channel")
    def channel_shown(self, entry: AuditEntry) -> str:
        return visible(entry.channel)

    @display(description="Action", ordering="action")
    def deed(self, entry: AuditEntry) -> str:
        return visible(entry.action)

    @display(description="Outcome", ordering="outcome")
    def ended(self, entry: AuditEntry) -> str:
        return badge(entry.outcome, "danger" if entry.outcome == AuditEntry.Outcome.REFUSED else "success")

    @display(description="Target", ordering="target")
    def done_to(self, entry: AuditEntry) -> str:
        return call_link(entry.session_id, entry.target) if is_call(entry.target) else clipped(entry.target, 40)

    @display(description="Tool", ordering="tool_name")
    def tool(self, entry: AuditEntry) -> str:
        return clipped(entry.tool_name)

    @display(description="Tool call")
    def call(self, entry: AuditEntry) -> str:
        return record_link(entry.target)

    @display(description="Approval")
    def approval(self, entry: AuditEntry) -> str:
        return approval_link(entry.target) if entry.action.startswith("approval.") else EMPTY

    @display(description="Session")
    def session(self, entry: AuditEntry) -> str:
        return session_link(entry.session_id)

    @display(description="Reason")
    def why(self, entry: AuditEntry) -> str:
        return clipped(entry.reason)

    @display(description="Reason")
    def reason_whole(self, entry: AuditEntry) -> str:
        return box(entry.reason)

    @display(description="Edited arguments")
    def edited(self, entry: AuditEntry) -> str:
        changed = entry.details.get("modified_arguments")
        return EMPTY if changed is None else box(as_json(changed))

    @display(description="Details")
    def rest(self, entry: AuditEntry) -> str:
        return box(as_json({name: value for name, value in entry.details.items() if name != "modified_arguments"}))

    @display(description="Address")
    def from_where(self, entry: AuditEntry) -> str:
        return visible(entry.address) or EMPTY

    @display(description="Request")
    def request_shown(self, entry: AuditEntry) -> str:
        return visible(entry.request_id) or EMPTY


# Links by the names of pages: what is below here knows nothing of sessions, turns, calls and approvals.


def session_link(session_id: str) -> str:
    return link("sessions_app_session_change", session_id, clipped(session_id, 40)) if session_id else EMPTY


def turn_link(turn_id: str) -> str:
    return link("sessions_app_turn_change", turn_id, clipped(turn_id, 40)) if turn_id else EMPTY


def is_call(call_id: Any) -> bool:
    return isinstance(call_id, str) and re.fullmatch(CALL_ID, call_id) is not None


def call_link(session_id: str, call_id: Any) -> str:
    """To the place of a call in its session's transcript."""
    if not is_call(call_id):
        return EMPTY
    return link("sessions_app_session_transcript", session_id, call_id, query={"call": call_id})


def record_link(call_id: Any) -> str:
    """To the page of a call itself."""
    return link("sessions_app_toolcall_change", call_id, "arguments and answer") if is_call(call_id) else EMPTY


def approval_link(call_id: Any) -> str:
    """To the card of a call's approval, which has a number of its own."""
    return link("sessions_app_toolcall_approval", call_id, "approval") if is_call(call_id) else EMPTY

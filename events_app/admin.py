"""Browsing what happened: events and model calls. `BrowseOnlyAdmin` is the base for every record of the past."""

from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from unfold.admin import ModelAdmin
from unfold.decorators import display

from events_app.display import EMPTY, Shown, as_json, badge, box, clipped, link, moment, visible
from events_app.models import Event, ModelCall

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


class BrowseOnlyAdmin(ModelAdmin):
    """For records of the past: nobody adds, changes or deletes them, superusers included; a GET changes nothing.

    What is shown goes through the functions of `events_app.display`, never as the bare field of a client's text.
    """

    list_per_page = 50
    list_max_show_all = 50
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # a count of the table for each choice of each filter

    class Media:
        css = {"all": ["events_app/admin.css"]}

    def has_add_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponseBase:
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


class EventTypeFilter(admin.SimpleListFilter):
    title = "type"
    parameter_name = "event_type"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, name) for name in EVENT_TYPES]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(event_type=self.value()) if self.value() else queryset


@admin.register(Event)
class EventAdmin(BrowseOnlyAdmin):
    list_display = ("at", "name", "session", "details", "origin")
    list_display_links = ("at", "name")
    list_filter = (EventTypeFilter, "timestamp")
    search_fields = ("=session_id", "=correlation_id", "=event_id", "=event_type")
    search_help_text = "Id of a session, a turn or an event, or a type"
    ordering = ("-id",)
    fieldsets = (
        (None, {"fields": (("name", "event_category"), ("at", "origin"), ("session", "turn"))}),
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

    @display(description="Cause")
    def causation(self, event: Event) -> str:
        return visible(event.causation_id) or EMPTY

    @display(description="Data")
    def details(self, event: Event) -> str:
        return clipped(", ".join(f"{name}: {value}" for name, value in event.data.items() if value is not None))

    @display(description="Data")
    def data_shown(self, event: Event) -> str:
        return box(as_json(event.data))


@admin.register(ModelCall)
class ModelCallAdmin(BrowseOnlyAdmin):
    list_display = ("at", "outcome", "purpose", "agent_shown", "model_shown", "session", "took", "tokens")
    list_filter = ("purpose", "has_tool_calls", "created_at")
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


def session_link(session_id: str) -> str:
    """To the session's page by its name: what is below here knows nothing of sessions."""
    return link("sessions_app_session_change", session_id, clipped(session_id, 40)) if session_id else EMPTY


def turn_link(turn_id: str) -> str:
    return link("sessions_app_turn_change", turn_id, clipped(turn_id, 40)) if turn_id else EMPTY

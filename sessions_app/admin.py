"""Browsing sessions with their turns, tool calls and handoffs, and the accounts they belong to; who may log in."""

from dataclasses import replace
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.core.exceptions import PermissionDenied
from django.db import OperationalError
from django.db.models import Max, Model, QuerySet
from django.http import HttpRequest, HttpResponseNotAllowed, HttpResponseRedirect
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.views.decorators.http import require_safe
from unfold.admin import ModelAdmin, TabularInline
from unfold.decorators import action, display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
from unfold.widgets import UnfoldAdminTextareaWidget

from events_app.admin import YES_OR_NO, BrowseOnlyAdmin, call_link, session_link
from events_app.display import EMPTY, Shown, as_json, badge, box, clipped, duration, link, moment, visible
from events_app.filters import Exactly, OneOf, TimeRange, exactly, one_of
from orchestrator_site.errors import APIError
from sessions_app import unanswered
from sessions_app.callers import person
from sessions_app.models import Account, Handoff, Session, ToolCall, Turn

# Who may decide on a call that waits may also end the wait for its result. By its name: it is of an app above.
DECIDE = "agents_app.decide_approvalrequest"
STATUS_COLOURS = {
    Turn.Status.QUEUED: "info",
    Turn.Status.RUNNING: "primary",
    Turn.Status.WAITING: "warning",
    Turn.Status.COMPLETED: "success",
    Turn.Status.FAILED: "danger",
    Turn.Status.CANCELLED: "default",
}


def status_badge(turn: Turn) -> SafeString:
    return badge(turn.status, STATUS_COLOURS[Turn.Status(turn.status)])


class TurnColumns:
    """What a turn shows, on its own page, in the list of turns and on its session's page."""

    @display(description="Status", ordering="status")
    def state(self, turn: Turn) -> str:
        return status_badge(turn)

    @display(description="Turn", ordering="position")
    def number(self, turn: Turn) -> str:
        return link("sessions_app_turn_change", turn.pk, str(turn.position))

    @display(description="Code", ordering="code")
    def code_shown(self, turn: Turn) -> str:
        return visible(turn.code) or EMPTY

    @display(description="Runners lost", ordering="lost_count")
    def losses_shown(self, turn: Turn) -> str:
        return badge(str(turn.lost_count), "danger") if turn.lost_count else EMPTY

    @display(description="Requested agent")
    def requested(self, turn: Turn) -> str:
        return visible(turn.requested_agent) or EMPTY

    @display(description="Handoffs", ordering="handoff_count")
    def handoff_number(self, turn: Turn) -> int:
        return turn.handoff_count

    @display(description="Tokens", ordering="total_tokens")
    def tokens(self, turn: Turn) -> str:
        return f"{turn.total_tokens:,}"

    @display(description="Accepted (UTC)", ordering="created_at")
    def accepted(self, turn: Turn) -> str:
        return moment(turn.created_at)

    @display(description="Started (UTC)", ordering="started_at")
    def started(self, turn: Turn) -> str:
        return moment(turn.started_at)

    @display(description="Finished (UTC)", ordering="finished_at")
    def finished(self, turn: Turn) -> str:
        return moment(turn.finished_at)

    @display(description="Duration")
    def took(self, turn: Turn) -> str:
        return duration(turn.started_at, turn.finished_at)

    @display(description="Session")
    def in_session(self, turn: Turn) -> str:
        return session_link(turn.session_id)


class TurnsOfSession(TurnColumns, TabularInline):
    model = Turn
    fields = readonly_fields = (
        "number",
        "state",
        "code_shown",
        "answered_by",
        "handoff_number",
        "tokens",
        "accepted",
        "started",
        "finished",
        "took",
    )
    ordering = ("-position",)
    per_page = 25
    extra = 0
    can_delete = False
    hide_title = True

    def get_queryset(self, request: HttpRequest) -> QuerySet[Turn]:
        # By the accessor that messages leave on turns; it is of one session, so there is little to group.
        return super().get_queryset(request).annotate(agent=Max("messages__agent"))

    @display(description="Agent")
    def answered_by(self, turn: Turn) -> str:
        return visible(turn.agent or "") or EMPTY  # type: ignore[attr-defined]

    def has_add_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class DeletedFilter(OneOf):
    title = "deletion"
    parameter_name = "deleted"
    values = (("no", "Kept"), ("yes", "Deleted by its client"))

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(deleted_at__isnull=self.value() == "no") if self.value() else queryset


@admin.register(Session)
class SessionAdmin(BrowseOnlyAdmin):
    """Deleted sessions stay in sight here: they are what happened."""

    list_display = ("heading", "identity", "agent", "message_count", "turn_count", "last_active", "owner", "state")
    list_display_links = ("heading", "identity")
    list_filter = (
        DeletedFilter,
        ("current_agent", exactly("agent")),
        ("last_activity", TimeRange),
        ("created_at", TimeRange),
    )
    list_select_related = ("account",)
    search_fields = ("^id", "title", "=current_agent", "=account__name")
    search_help_text = "Beginning of an id, words of a title, an agent or an account"
    fieldsets = (
        (None, {"fields": ("title_shown", ("identity_whole", "owner"), ("agent", "state"))}),
        ("Figures", {"fields": (("message_count", "turn_count", "switch_count"),)}),
        ("Times", {"fields": (("created", "last_active"), "deleted")}),
        ("Stream", {"fields": (("next_seq", "pruned_seq"),), "classes": ["collapse"]}),
    )
    inlines = (TurnsOfSession,)
    actions_detail = ("transcript", "calls_released", "events")

    @display(description="Title", ordering="title")
    def heading(self, session: Session) -> str:
        return clipped(session.title, 60)

    @display(description="Title")
    def title_shown(self, session: Session) -> str:
        return visible(session.title or "") or EMPTY

    @display(description="Id", ordering="id")
    def identity(self, session: Session) -> str:
        return clipped(session.pk, 40)

    @display(description="Id")
    def identity_whole(self, session: Session) -> str:
        return visible(session.pk)

    @display(description="Agent", ordering="current_agent")
    def agent(self, session: Session) -> str:
        return visible(session.current_agent)

    @display(description="Account", ordering="account__name")
    def owner(self, session: Session) -> str:
        return clipped(session.account.name)

    @display(description="Created (UTC)", ordering="created_at")
    def created(self, session: Session) -> str:
        return moment(session.created_at)

    @display(description="Last activity (UTC)", ordering="last_activity")
    def last_active(self, session: Session) -> str:
        return moment(session.last_activity)

    @display(description="Deleted (UTC)")
    def deleted(self, session: Session) -> str:
        return moment(session.deleted_at)

    @display(description="State", ordering="deleted_at")
    def state(self, session: Session) -> str:
        if session.deleted_at is not None:
            return badge("deleted", "danger")
        return badge("open", "success") if session.is_active else badge("closed")

    # They only lead elsewhere, so the plain GET that unfold makes of an action without a dialog does no harm. Whether
    # somebody may is asked by methods: unfold looks up permissions given by name while no table may exist yet.

    @action(description="Transcript", icon="forum", permissions=["read_messages"])
    def transcript(self, request: HttpRequest, object_id: str) -> HttpResponseRedirect:
        transcript = reverse("admin:messages_app_message_transcript", args=[unquote(object_id)])
        return redirect(f"{transcript}?{request.GET.urlencode()}" if request.GET else transcript)

    @action(description="Calls without a result", icon="hourglass_top", permissions=["read_calls"])
    def calls_released(self, request: HttpRequest, object_id: str) -> HttpResponseRedirect:
        chosen = urlencode({"session__exact": unquote(object_id), "status": ToolCall.Status.RELEASED})
        return redirect(f"{reverse('admin:sessions_app_toolcall_changelist')}?{chosen}")

    @action(description="Events", icon="history", permissions=["read_events"])
    def events(self, request: HttpRequest, object_id: str) -> HttpResponseRedirect:
        chosen = urlencode({"session_id__exact": unquote(object_id)})
        return redirect(f"{reverse('admin:events_app_event_changelist')}?{chosen}")

    def has_read_messages_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return request.user.has_perm("messages_app.view_message") and self.has_view_permission(request)

    def has_read_calls_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return request.user.has_perm("sessions_app.view_toolcall")

    def has_read_events_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return request.user.has_perm("events_app.view_event")


@admin.register(Turn)
class TurnAdmin(TurnColumns, BrowseOnlyAdmin):
    list_display = (
        "accepted",
        "in_session",
        "position",
        "state",
        "code_shown",
        "losses_shown",
        "handoff_number",
        "tokens",
        "took",
    )
    list_display_links = ("accepted", "position")
    list_filter = (
        ("session", Exactly),
        one_of("status", Turn.Status.choices),
        ("code", Exactly),
        ("created_at", TimeRange),
        ("finished_at", TimeRange),
    )
    search_fields = ("=id", "=session__id", "=code")
    search_help_text = "Id of a turn or a session, or an error code"
    ordering = ("-created_at", "-position")
    fieldsets = (
        (
            None,
            {"fields": (("in_session", "place", "read"), ("state", "code_shown"), ("answered_by", "requested"))},
        ),
        ("Times", {"fields": (("accepted", "started"), ("finished", "took"), "cancel_requested")}),
        ("Tokens", {"fields": (("prompt_tokens", "completion_tokens", "total_tokens"),)}),
        ("Runner", {"fields": ("runner", "lease", ("attempt", "losses_shown"), "settled_seq", "handoff_count")}),
    )

    @display(description="Position")
    def place(self, turn: Turn) -> int:
        return turn.position

    @display(description="Transcript")
    def read(self, turn: Turn) -> str:
        place = {"turn": str(turn.pk)}
        return link("sessions_app_session_transcript", turn.session_id, "what was said", query=place)

    @display(description="Agent")
    def answered_by(self, turn: Turn) -> str:
        said = turn.messages.exclude(agent="").values_list("agent", flat=True)
        return visible(", ".join(sorted(set(said)))) or EMPTY

    @display(description="Cancellation requested (UTC)")
    def cancel_requested(self, turn: Turn) -> str:
        return moment(turn.cancel_requested_at)

    @display(description="Held by")
    def runner(self, turn: Turn) -> str:
        return visible(turn.owner) or EMPTY

    @display(description="Lease until (UTC)")
    def lease(self, turn: Turn) -> str:
        return moment(turn.lease_until)


# What became of a call, in words and in colour.
ENDED = {
    "": ("", "default"),
    ToolCall.Outcome.OK: ("ok", "success"),
    ToolCall.Outcome.ERROR: ("error", "danger"),
    ToolCall.Outcome.REFUSED: ("refused", "danger"),
    ToolCall.Outcome.REJECTED: ("rejected", "danger"),
    ToolCall.Outcome.SUPERSEDED: ("superseded", "default"),
    ToolCall.Outcome.CANCELLED: ("cancelled", "default"),
    ToolCall.Outcome.TIMED_OUT: ("timed out", "danger"),
    ToolCall.Outcome.IN_DOUBT: ("in doubt", "warning"),
}
OPEN = {
    ToolCall.Status.WAITING: ("waits for a person", "warning"),
    ToolCall.Status.RELEASED: ("released, waits for its result", "primary"),
    ToolCall.Status.IN_DOUBT: ("in doubt, waits for an operator", "danger"),
}


def call_state(call: ToolCall) -> SafeString:
    if call.is_to_be_executed:
        return badge("being executed by the server", "primary")
    words, colour = OPEN[ToolCall.Status(call.status)] if call.is_open else ENDED[call.outcome]
    return badge(words, colour)


class GiveUpForm(forms.Form):
    reason = forms.CharField(
        max_length=unanswered.MAX_REASON_CHARS,
        widget=UnfoldAdminTextareaWidget({"rows": 4}),
        help_text="It stands in the audit log. The agent reads why a call was given up.",
    )

    def clean_reason(self) -> str:
        # Browsers send the line ends of a form as CR LF.
        reason: str = self.cleaned_data["reason"]
        return reason.replace("\r\n", "\n")


@admin.register(ToolCall)
class ToolCallAdmin(BrowseOnlyAdmin):
    """Every call, open or not. One that nobody will ever answer may be given up here, one of the server's that is in
    doubt also executed again.
    """

    list_display = ("asked", "tool", "by_agent", "state", "gated", "until", "in_session", "identity", "took")
    list_display_links = ("asked", "tool")
    list_filter = (
        ("session", Exactly),
        ("tool_name", exactly("tool")),
        ("agent", Exactly),
        one_of("status", ToolCall.Status.choices),
        one_of("outcome", ToolCall.Outcome.choices),
        one_of("requires_approval", YES_OR_NO, "need of approval"),
        one_of("on_server", YES_OR_NO, "executed by the server"),
        ("created_at", TimeRange),
    )
    search_fields = ("=call_id", "=session__id", "=tool_name")
    search_help_text = "Id of a call or a session, or a tool"
    ordering = ("-created_at",)
    fieldsets = (
        (
            None,
            {"fields": (("tool", "by_agent"), ("state", "executor"), ("in_session", "in_turn"), ("card", "identity"))},
        ),
        ("Times", {"fields": (("asked", "released"), ("begun", "answered"), ("until", "patience"), "took")}),
        ("Arguments", {"fields": ("wanted", "unusable", "final")}),
        ("Answer", {"fields": ("said",)}),
        ("Origin", {"fields": (("round", "place"), ("provider", "tool_version"), "args_hash")}),
    )
    actions_detail = ("give_up", "settle")

    def get_queryset(self, request: HttpRequest) -> QuerySet[ToolCall]:
        whole = super().get_queryset(request).select_related("turn", "approval")
        return whole.defer("arguments_text", "unusable_arguments", "released_text", "answer")

    def get_urls(self) -> list[URLPattern]:
        wrapped = self.admin_site.admin_view
        approval, given_up = wrapped(require_safe(self.approval_view)), wrapped(self.given_up_view)
        return [
            path("<path:object_id>/approval/", approval, name="sessions_app_toolcall_approval"),
            path("<path:object_id>/given-up/", given_up, name="sessions_app_toolcall_given_up"),
            *super().get_urls(),
        ]

    def approval_view(self, request: HttpRequest, object_id: str) -> HttpResponseRedirect:
        """From a call's id, which is what records keep, to the card of its approval."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        asked = get_object_or_404(ToolCall, approval__isnull=False, pk=unquote(object_id))
        return redirect("admin:agents_app_approvalrequest_change", asked.approval.pk)

    # As with a session's: only leads to the page that asks.
    @action(description="Give up…", icon="timer_off", permissions=["give_up"])
    def give_up(self, request: HttpRequest, object_id: str) -> HttpResponseRedirect:
        return redirect("admin:sessions_app_toolcall_given_up", object_id)

    @action(description="Give up or execute again…", icon="help_center", permissions=["settle"])
    def settle(self, request: HttpRequest, object_id: str) -> HttpResponseRedirect:
        return self.give_up(request, object_id)

    def has_give_up_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self._is_offered(request, object_id, on_server=False)

    def has_settle_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self._is_offered(request, object_id, on_server=True)

    def _is_offered(self, request: HttpRequest, object_id: str | None, *, on_server: bool) -> bool:
        call = ToolCall.objects.filter(pk=unquote(object_id or ""), on_server=on_server).only("status", "on_server")
        return self._may_give_up(request) and any(each.may_be_given_up for each in call)

    def _may_give_up(self, request: HttpRequest) -> bool:
        return request.user.has_perm(DECIDE) and self.has_view_permission(request)

    def given_up_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        """GET: what giving a call up means, and the form for a reason. POST: give it up, or execute it again."""
        if request.method not in ("GET", "HEAD", "POST"):
            return HttpResponseNotAllowed(["GET", "POST"])
        if not self._may_give_up(request):
            raise PermissionDenied
        call = get_object_or_404(ToolCall.objects.select_related("session"), pk=unquote(object_id))
        form = GiveUpForm(request.POST if request.method == "POST" else None)
        if not call.may_be_given_up:
            self.message_user(request, f"Not done. {unanswered.why_not(call)}", messages.ERROR)
        elif form.is_valid():
            self._settle(request, call, form.cleaned_data["reason"])
        else:
            return self._ask_for_reason(request, call, form)
        return redirect("admin:sessions_app_toolcall_change", object_id)

    def _settle(self, request: HttpRequest, call: ToolCall, reason: str) -> None:
        by = replace(person(request), account_id=call.session.account_id)
        settle, done = unanswered.give_up, "Given up. The agent has been told."
        if "again" in request.POST:
            settle, done = unanswered.execute_again, "The server executes it again."
        try:
            settle(by, call, reason)
        except APIError as refusal:
            self.message_user(request, f"Not done. {visible(refusal.message)}", messages.ERROR)
        except OperationalError:
            away = "The database does not answer at the moment: nothing was done. Try again."
            self.message_user(request, away, messages.ERROR)
        else:
            self.message_user(request, done, messages.SUCCESS)

    def _ask_for_reason(self, request: HttpRequest, call: ToolCall, form: GiveUpForm) -> HttpResponseBase:
        context = {
            **self.admin_site.each_context(request),
            "title": "Settle a call in doubt" if call.on_server else "Give a tool call up",
            "subtitle": clipped(str(call), 60),
            "opts": self.opts,
            "original": Shown(call),
            "media": self.media + form.media,
            "form": form,
            "call": call,
            "arguments": box(as_json(call.final_arguments)),
        }
        status = 422 if form.is_bound else 200
        return TemplateResponse(request, "sessions_app/give_up.html", context, status=status)

    @display(description="Asked (UTC)", ordering="created_at")
    def asked(self, call: ToolCall) -> str:
        return moment(call.created_at)

    @display(description="Tool", ordering="tool_name")
    def tool(self, call: ToolCall) -> str:
        return clipped(call.tool_name, 40)

    @display(description="Agent", ordering="agent")
    def by_agent(self, call: ToolCall) -> str:
        return visible(call.agent)

    @display(description="State", ordering="status")
    def state(self, call: ToolCall) -> str:
        return call_state(call)

    @display(description="Needs approval", ordering="requires_approval", boolean=True)
    def gated(self, call: ToolCall) -> bool:
        return call.requires_approval

    @display(description="Approval")
    def card(self, call: ToolCall) -> str:
        asked = getattr(call, "approval", None)
        return EMPTY if asked is None else link("agents_app_approvalrequest_change", asked.pk, asked.status)

    @display(description="Session")
    def in_session(self, call: ToolCall) -> str:
        return session_link(call.session_id)

    @display(description="Turn")
    def in_turn(self, call: ToolCall) -> str:
        return link("sessions_app_turn_change", call.turn_id, f"turn {call.turn.position}")

    @display(description="In the transcript")
    def identity(self, call: ToolCall) -> str:
        return call_link(call.session_id, call.pk)

    @display(description="Executed by")
    def executor(self, call: ToolCall) -> str:
        return "the server" if call.on_server else "the client"

    @display(description="Begun by the server (UTC)")
    def begun(self, call: ToolCall) -> str:
        return moment(call.begun_at)

    @display(description="Released (UTC)")
    def released(self, call: ToolCall) -> str:
        return moment(call.released_at)

    @display(description="Answered (UTC)")
    def answered(self, call: ToolCall) -> str:
        return moment(call.answered_at)

    @display(description="Result until (UTC)")
    def until(self, call: ToolCall) -> str:
        return moment(call.deadline_at)

    @display(description="Time for its result")
    def patience(self, call: ToolCall) -> str:
        return EMPTY if call.deadline_seconds is None else f"{call.deadline_seconds:,} s"

    @display(description="Duration")
    def took(self, call: ToolCall) -> str:
        return duration(call.created_at, call.answered_at)

    @display(description="Asked for")
    def wanted(self, call: ToolCall) -> str:
        return box(as_json(call.arguments))

    @display(description="As the model wrote them")
    def unusable(self, call: ToolCall) -> str:
        return box(call.unusable_arguments)

    @display(description="Released, after an edit")
    def final(self, call: ToolCall) -> str:
        return box(as_json(call.final_arguments)) if call.released_text else EMPTY

    @display(description="What the model reads")
    def said(self, call: ToolCall) -> str:
        return box(call.answer)

    @display(description="Place in it")
    def place(self, call: ToolCall) -> int:
        return call.position + 1

    @display(description="The provider's id")
    def provider(self, call: ToolCall) -> str:
        return visible(call.provider_id) or EMPTY


@admin.register(Handoff)
class HandoffAdmin(BrowseOnlyAdmin):
    list_display = ("at", "in_session", "passed", "reason_begins", "confidence_shown")
    list_filter = (("session", Exactly), ("created_at", TimeRange))
    search_fields = ("=session__id", "=from_agent", "=to_agent", "reason")
    search_help_text = "Id of a session, an agent, or words of a reason"
    ordering = ("-id",)
    fieldsets = (
        (None, {"fields": (("passed", "confidence_shown"), ("in_session", "in_turn"), "at")}),
        ("Reason", {"fields": ("reason_whole",)}),
    )

    @display(description="Time (UTC)", ordering="id")
    def at(self, handoff: Handoff) -> str:
        return moment(handoff.created_at)

    @display(description="Session")
    def in_session(self, handoff: Handoff) -> str:
        return session_link(handoff.session_id)

    @display(description="Turn")
    def in_turn(self, handoff: Handoff) -> str:
        return EMPTY if handoff.turn is None else link("sessions_app_turn_change", handoff.turn_id, str(handoff.turn))

    @display(description="Handoff")
    def passed(self, handoff: Handoff) -> str:
        return f"{visible(handoff.from_agent)} → {visible(handoff.to_agent)}"

    @display(description="Reason")
    def reason_begins(self, handoff: Handoff) -> str:
        return clipped(handoff.reason)

    @display(description="Reason")
    def reason_whole(self, handoff: Handoff) -> str:
        return box(handoff.reason)

    @display(description="Confidence", ordering="confidence")
    def confidence_shown(self, handoff: Handoff) -> str:
        return visible(handoff.confidence or "") or EMPTY


@admin.register(Account)
class AccountAdmin(BrowseOnlyAdmin):
    list_display = ("name_shown", "created")
    search_fields = ("name",)
    ordering = ("name",)
    fieldsets = ((None, {"fields": ("name_shown", "created")}),)

    @display(description="Name", ordering="name")
    def name_shown(self, account: Account) -> str:
        return visible(account.name)

    @display(description="Created (UTC)", ordering="created_at")
    def created(self, account: Account) -> str:
        return moment(account.created_at)


# Django registered the people who log in with its own admin; unfold's pages need unfold's forms.
admin.site.unregister([User, Group])


@admin.register(User)
class UserAdmin(DjangoUserAdmin, ModelAdmin):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ModelAdmin):
    pass

"""The approval queue, the card on which an operator decides, and what was decided."""

from dataclasses import replace
from typing import Any

from django.contrib import admin, messages
from django.core import signing
from django.core.exceptions import PermissionDenied
from django.db import OperationalError
from django.db.models import QuerySet
from django.forms import Media
from django.http import Http404, HttpRequest, HttpResponseNotAllowed, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect
from django.template.loader import render_to_string
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.http import urlencode
from rest_framework.exceptions import ValidationError
from unfold.decorators import display

from agents_app import approvals, effects
from agents_app.admin.card import Card, seal, shown_changes, unseal
from agents_app.admin.json_editor import JSONTextarea
from agents_app.approval_views import choice_in
from agents_app.approvals import ArgumentsChanged, Choice
from agents_app.models import ApprovalRequest, Decision, PendingApproval
from events_app.admin import BrowseOnlyAdmin, session_link
from events_app.changes import APPROVALS, SESSION
from events_app.display import EMPTY, badge, clipped, link, moment, visible
from events_app.filters import TimeRange, exactly
from orchestrator_site.errors import APIError, Unavailable, from_validation
from orchestrator_site.http import read_json, wire_time
from sessions_app.callers import Caller, person
from sessions_app.models import ToolCall

DECIDE = "agents_app.decide_approvalrequest"
ABOUT_CHARS = 160
STATUS_COLOURS = {
    ApprovalRequest.Status.PENDING: "warning",
    ApprovalRequest.Status.APPROVED: "success",
    ApprovalRequest.Status.EDITED: "info",
    ApprovalRequest.Status.REJECTED: "danger",
}
MAX_REJECTED_AT_ONCE = 100
# Texts of up to a megabyte that no list shows.
LARGE = ("call__answer", "call__arguments_text", "call__released_text", "call__unusable_arguments")
LIVE = ["django_eventstream/reconnecting-eventsource.js", "agents_app/live.js"]


def operator(request: HttpRequest, approval: ApprovalRequest) -> Caller:
    """The person at the browser, as somebody who decides. Every account's: operators have no accounts yet."""
    return replace(person(request), account_id=approval.session.account_id)


class AboutCall:
    """Columns that say what a call is about."""

    @display(description="Tool", ordering="tool_name")
    def tool(self, approval: ApprovalRequest) -> str:
        return link("agents_app_approvalrequest_change", approval.pk, clipped(approval.tool_name, 60))

    @display(description="What it touches")
    def about(self, approval: ApprovalRequest) -> str:
        text = clipped(effects.touched(approval.arguments), ABOUT_CHARS)
        return format_html('<code class="about">{}</code>', text)

    @display(description="Agent", ordering="call__agent")
    def agent(self, approval: ApprovalRequest) -> str:
        return visible(approval.call.agent)

    @display(description="Reason")
    def why(self, approval: ApprovalRequest) -> str:
        return clipped(approval.reason)

    @display(description="Session")
    def in_session(self, approval: ApprovalRequest) -> str:
        return session_link(approval.session_id)


class OfThoseWaiting(admin.SimpleListFilter):
    """A choice of the values that waiting requests have: few, whatever the table holds."""

    column = ""

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        found = ApprovalRequest.objects.pending().order_by(self.column).values_list(self.column, flat=True)
        return [(value, clipped(value, 60)) for value in found.distinct()[:50]]

    def has_output(self) -> bool:
        return True  # an empty queue fills while it is open

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{self.column: self.value()}) if self.value() else queryset


class WaitingToolFilter(OfThoseWaiting):
    title = "tool"
    parameter_name = column = "tool_name"


class WaitingAgentFilter(OfThoseWaiting):
    title = "agent"
    parameter_name = "agent"
    column = "call__agent"


@admin.register(PendingApproval)
class PendingApprovalAdmin(AboutCall, BrowseOnlyAdmin):
    """What waits, oldest first. One decides on the card of a request, where all of it is shown; here one may reject."""

    change_list_template = "agents_app/queue.html"
    list_display = ("tool", "about", "agent", "why", "age", "in_session")
    list_display_links = None
    list_filter = (WaitingToolFilter, WaitingAgentFilter)
    list_select_related = ("call", "session")
    list_per_page = 100
    show_full_result_count = True  # of those waiting: few
    search_fields = ("tool_name", "arguments_text", "reason", "=session__id", "=call__call_id")
    search_help_text = "Words of the arguments, a tool or a reason, or the id of a session or call"
    ordering = ("id",)
    sortable_by = ("tool", "agent")
    actions = ("reject",)

    class Media:
        css = {"all": ["agents_app/approvals.css"]}
        js = [*LIVE, "agents_app/queue.js"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[PendingApproval]:
        return super().get_queryset(request).pending().defer(*LARGE)

    @display(description="Waiting for", ordering="id")
    def age(self, approval: ApprovalRequest) -> str:
        return format_html(
            '<time datetime="{}" data-age title="{} UTC">{}</time>',
            wire_time(approval.created_at),
            moment(approval.created_at),
            moment(approval.created_at),
        )

    def change_view(self, request: HttpRequest, object_id: str, *args: Any, **kwargs: Any) -> HttpResponseBase:
        return redirect("admin:agents_app_approvalrequest_change", object_id)

    def has_decide_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm(DECIDE)

    @admin.action(description="Reject selected tool calls…", permissions=["decide"])
    def reject(self, request: HttpRequest, chosen: QuerySet[PendingApproval]) -> HttpResponseBase | None:
        """Ask for the feedback first, showing what is rejected; nobody approves in bulk what was not shown in full."""
        requests = list(chosen.order_by("id")[: MAX_REJECTED_AT_ONCE + 1])
        if len(requests) > MAX_REJECTED_AT_ONCE:
            self.message_user(request, f"At most {MAX_REJECTED_AT_ONCE} at once.", messages.ERROR)
            return None
        context = {
            **self.admin_site.each_context(request),
            "title": "Reject tool calls",
            "opts": self.model._meta,
            "media": self.media,
            "chosen": [
                (
                    approval,
                    visible(approval.tool_name),
                    clipped(effects.touched(approval.arguments), ABOUT_CHARS),
                    seal(approval, request.user.pk),
                )
                for approval in requests
            ],
        }
        return TemplateResponse(request, "agents_app/reject_many.html", context)

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponseBase:
        if request.method == "POST" and "confirmed" in request.POST:
            return self._reject_confirmed(request)
        waiting = ApprovalRequest.objects.pending().count()
        context = {
            "title": "Waiting approvals",
            "channel": APPROVALS,
            "waiting": waiting,
            "in_doubt": ToolCall.objects.in_doubt().count(),
            **(extra_context or {}),
        }
        return super().changelist_view(request, context)

    def _reject_confirmed(self, request: HttpRequest) -> HttpResponseBase:
        """What was confirmed, whatever became of it since: who was faster is told for each."""
        if not (self.has_decide_permission(request) and self.has_view_permission(request)):
            raise PermissionDenied
        keys = request.POST.getlist("_selected_action")[:MAX_REJECTED_AT_ONCE]
        numbers = [int(key) for key in keys if key.isascii() and key.isdecimal() and len(key) < 19]
        found = ApprovalRequest.objects.select_related("session", "call").filter(pk__in=numbers)
        try:
            for approval in found.order_by("id"):
                self._reject_one(request, approval)
        except OperationalError:
            # The next would wait for the database as long as this one, one after the other.
            left = "The database does not answer at the moment. Requests that are not named here still wait."
            self.message_user(request, left, messages.ERROR)
        return redirect("admin:agents_app_pendingapproval_changelist")

    def _reject_one(self, request: HttpRequest, approval: ApprovalRequest) -> None:
        name = f"{clipped(approval.tool_name, 60)} {approval.call_id}"
        try:
            choice = _choice(request, approval, "reject", seen=request.POST.get(f"seen-{approval.pk}", ""))
            approvals.decide_by_id(operator(request, approval), approval.call_id, choice)
        except APIError as refusal:
            self.message_user(request, f"{name}: not done. {visible(refusal.message)}", messages.ERROR)
        else:
            self.message_user(request, f"{name}: rejected.", messages.SUCCESS)


@admin.register(ApprovalRequest)
class ApprovalRequestAdmin(AboutCall, BrowseOnlyAdmin):
    """What was decided, and the card of every request, waiting or not."""

    list_display = ("decided", "tool", "about", "state", "decider", "said", "agent", "in_session")
    list_display_links = None
    list_filter = (
        "status",
        ("tool_name", exactly("tool")),
        ("decision__decided_by", exactly("operator")),
        ("session__id", exactly("session")),
        ("decision__decided_at", TimeRange),
    )
    list_select_related = ("call", "decision", "session")
    search_fields = ("tool_name", "arguments_text", "decision__feedback", "=session__id", "=call__call_id")
    search_help_text = "Words of the arguments, a tool or a feedback, or the id of a session or call"
    ordering = ("-decision__id",)

    class Media:
        css = {"all": ["agents_app/approvals.css"]}

    def get_queryset(self, request: HttpRequest) -> QuerySet[ApprovalRequest]:
        # What is not pending has a decision. Asked so, the latest are found from the end, and not all of them sorted.
        decided = super().get_queryset(request).filter(decision__isnull=False)
        return decided.defer(*LARGE, "decision__edited_text")

    @display(description="Decided (UTC)", ordering="decision__id")
    def decided(self, approval: ApprovalRequest) -> str:
        made = _decision(approval)
        return moment(made.decided_at) if made else EMPTY

    @display(description="Decision", ordering="status")
    def state(self, approval: ApprovalRequest) -> str:
        return state_badge(approval)

    @display(description="By", ordering="decision__decided_by")
    def decider(self, approval: ApprovalRequest) -> str:
        made = _decision(approval)
        return f"{visible(made.decided_by)} ({made.channel})" if made else EMPTY

    @display(description="Feedback")
    def said(self, approval: ApprovalRequest) -> str:
        made = _decision(approval)
        return clipped(made.feedback) if made else EMPTY

    def get_urls(self) -> list[URLPattern]:
        wrapped = self.admin_site.admin_view
        # First: Django's own patterns take any path for a request's id.
        return [
            path("<int:pk>/decide/", wrapped(self.decide_view), name="agents_app_approvalrequest_decide"),
            path("<int:pk>/check/", wrapped(self.check_view), name="agents_app_approvalrequest_check"),
            *super().get_urls(),
        ]

    def change_view(self, request: HttpRequest, object_id: str, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """The card. POST goes to `decide_view` alone."""
        if request.method not in ("GET", "HEAD"):
            raise PermissionDenied
        if not object_id.isascii() or not object_id.isdecimal() or len(object_id) > 18:
            raise Http404
        return self._card(request, self._one(request, int(object_id)))

    def decide_view(self, request: HttpRequest, pk: int) -> HttpResponseBase:
        """POST: approve, edit or reject; back to the card, which then tells what became of it."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        approval = self._one_to_decide(request, pk)
        verdict = request.POST.get("decision", "")
        try:
            choice = _choice(request, approval, verdict, seen=request.POST.get("seen", ""))
            approvals.decide_by_id(operator(request, approval), approval.call_id, choice)
        except (APIError, OperationalError) as refusal:
            # Read again: what refused it may be that somebody else decided.
            return self._card(request, self._one(request, pk), refusal=_as_api_error(refusal))
        done = {"approve": "Approved", "edit": "Approved with your arguments", "reject": "Rejected"}[verdict]
        told = "The server goes on." if approval.call.on_server else "The client has been told."
        messages.success(request, f"{done}. {told}")
        return redirect("admin:agents_app_approvalrequest_change", pk)

    def check_view(self, request: HttpRequest, pk: int) -> HttpResponseBase:
        """POST: what is wrong with edited arguments, and how they differ. Changes nothing."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        approval = self._one_to_decide(request, pk)
        try:
            choice = _read({"decision": "edit", "modified_arguments": _edited(request)})
            approvals.judge_edit(approval.call, choice.arguments or {})
        except APIError as refusal:
            return JsonResponse({"error": visible(refusal.message), "changes": ""})
        changes = shown_changes(effects.changes(approval.arguments, choice.arguments or {}))
        html = render_to_string("agents_app/changes.html", {"changes": changes, "is_told": True})
        return JsonResponse({"error": "", "changes": html})

    def _one(self, request: HttpRequest, pk: int) -> ApprovalRequest:
        if not self.has_view_permission(request):
            raise PermissionDenied
        found = ApprovalRequest.objects.select_related("call__turn", "session__account", "decision", "rule")
        return get_object_or_404(found, pk=pk)

    def _one_to_decide(self, request: HttpRequest, pk: int) -> ApprovalRequest:
        if not request.user.has_perm(DECIDE):
            raise PermissionDenied
        return self._one(request, pk)

    def _card(
        self, request: HttpRequest, approval: ApprovalRequest, *, refusal: APIError | None = None
    ) -> HttpResponseBase:
        card = Card.of(approval)
        sound = approvals.is_sound(approval.call, approval) if card.is_pending else True
        may_decide = request.user.has_perm(DECIDE) and card.is_pending
        edited = refusal is not None and request.POST.get("decision") == "edit" and may_decide
        context = {
            **self.admin_site.each_context(request),
            "title": "Approval",
            "subtitle": clipped(str(approval), 60),
            "opts": ApprovalRequest._meta,
            "media": self.media + JSONTextarea().media + Media(js=[*LIVE, "agents_app/card.js"]),
            "card": card,
            "approval": approval,
            "state": state_badge(approval),
            "is_sound": sound,
            "may_decide": may_decide,
            "seen": seal(approval, request.user.pk) if may_decide else "",
            "refusal": visible(refusal.message) if refusal else "",
            "refused_edit": edited,
            "typed": request.POST.get("arguments", "") if edited else card.as_typed,
            "feedback": request.POST.get("feedback", "") if refusal else "",
            "channel": f"{SESSION}{approval.session_id}",
            "transcript": _transcript(approval),
        }
        return TemplateResponse(request, "agents_app/card.html", context, status=refusal.status if refusal else 200)


def state_badge(approval: ApprovalRequest) -> str:
    colour = STATUS_COLOURS.get(ApprovalRequest.Status(approval.status), "default")
    return badge("waiting" if approval.status == ApprovalRequest.Status.PENDING else approval.status, colour)


def _decision(approval: ApprovalRequest) -> Decision | None:
    return getattr(approval, "decision", None)


def _transcript(approval: ApprovalRequest) -> str:
    page = reverse("admin:messages_app_message_transcript", args=[approval.session_id])
    return f"{page}?{urlencode({'call': approval.call_id})}#{approval.call_id}"


def _choice(request: HttpRequest, approval: ApprovalRequest, verdict: str, *, seen: str) -> Choice:
    """What the form says, bound to what the page showed. Raises APIError."""
    try:
        args_hash, considered_ms = unseal(seen, approval, request.user.pk)
    except (signing.BadSignature, ValueError):
        raise ArgumentsChanged("This page is too old or was not made for you. Look at the request again.") from None
    # Browsers send the line ends of a form as CR LF.
    feedback = request.POST.get("feedback", "").replace("\r\n", "\n").strip()
    body = {"decision": verdict, "feedback": feedback or None, "args_hash": args_hash}
    if verdict == "edit":
        body["modified_arguments"] = _edited(request)
    choice = _read(body)
    return Choice(choice.verdict, choice.arguments, choice.feedback, choice.args_hash, considered_ms)


def _read(body: dict[str, Any]) -> Choice:
    """As over REST, and every complaint as an APIError."""
    try:
        return choice_in(body)
    except ValidationError as complaint:
        raise from_validation(complaint, "body") from None


def _edited(request: HttpRequest) -> Any:
    return read_json(request.POST.get("arguments", "").encode("utf-8", "surrogatepass"), "application/json")


def _as_api_error(refusal: APIError | OperationalError) -> APIError:
    if isinstance(refusal, APIError):
        return refusal
    return Unavailable("The database does not answer at the moment: nothing was done. Try again.")

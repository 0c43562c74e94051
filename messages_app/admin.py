"""Browsing messages, and the transcript: a session as one reads it, turn by turn."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.core.paginator import Page, Paginator
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.views.decorators.http import require_safe
from unfold.decorators import display

from events_app.admin import BrowseOnlyAdmin, session_link
from events_app.display import Shown, badge, box, clipped, duration, link, moment, visible
from messages_app.models import Message
from orchestrator_site.http import SESSION_PATH
from sessions_app.admin import status_badge
from sessions_app.models import Handoff, Session, ToolCall, ToolCallQuerySet, Turn

TURNS_PER_PAGE = 50
# A turn's handoffs are bounded, switches between turns are not.
SWITCHES_PER_PAGE = 100
# Messages are shown whole until a page has this much; what comes then begins here and is whole on its own page.
CHARACTERS_PER_PAGE = 1_000_000
BEGINNING = 1_000
CALL_COLOURS = {"waiting": "warning", "released": "primary", "ok": "success", "error": "danger", "refused": "danger"}


@dataclass(slots=True)
class Said:
    """A message, a tool call or a handoff of a transcript, and its text as it is shown."""

    text: str
    message: Message | None = None
    call: ToolCall | None = None
    handoff: Handoff | None = None
    is_cut: bool = False
    edited: str = ""
    decided: str = ""
    answer: str = ""

    @property
    def order(self) -> tuple[Any, ...]:
        """By time; what may carry the same moment in the order in which it can only have happened."""
        if self.call is not None:
            return self.call.created_at, 2, self.call.position
        if self.handoff is not None:
            return self.handoff.created_at, 3, self.handoff.pk
        assert self.message is not None  # noqa: S101 (it is one of the three)
        asks = self.message.round > 0
        return self.message.created_at, 0 if self.message.role == Message.Role.USER else 1 if asks else 4, 0

    @property
    def state(self) -> str:
        """A call's status, or how it ended."""
        if self.call is None:
            return ""
        state = self.call.outcome or self.call.status
        return badge(state, CALL_COLOURS.get(state, "default"))


@dataclass(slots=True)
class Entry:
    """One turn of a transcript with all that was said in it, or a switch that no turn made."""

    turn: Turn | None = None
    said: list[Said] = field(default_factory=list)

    @property
    def state(self) -> str:
        return status_badge(self.turn) if self.turn else ""

    @property
    def duration(self) -> str:
        return duration(self.turn.started_at, self.turn.finished_at) if self.turn else ""


@admin.register(Message)
class MessageAdmin(BrowseOnlyAdmin):
    list_display = ("at", "speaker", "begins", "in_session", "turn_position")
    list_display_links = ("at", "begins")
    list_filter = ("role", "created_at")
    search_fields = ("=session__id", "=agent", "content")
    search_help_text = "Id of a session, an agent, or words of a message"
    ordering = ("-id",)
    fieldsets = (
        (None, {"fields": (("speaker", "at"), ("in_session", "in_turn"))}),
        ("Content", {"fields": ("length", "whole")}),
    )

    @display(description="Time (UTC)", ordering="id")
    def at(self, message: Message) -> str:
        return moment(message.created_at)

    @display(description="Said by", ordering="role")
    def speaker(self, message: Message) -> str:
        return f"{message.role} ({visible(message.agent)})" if message.agent else message.role

    @display(description="Content")
    def begins(self, message: Message) -> str:
        return clipped(message.content)

    @display(description="Content")
    def whole(self, message: Message) -> str:
        return box(message.content)

    @display(description="Length")
    def length(self, message: Message) -> str:
        return f"{len(message.content):,} characters"

    @display(description="Session")
    def in_session(self, message: Message) -> str:
        return session_link(message.session_id)

    @display(description="Turn")
    def in_turn(self, message: Message) -> str:
        return link("sessions_app_turn_change", message.turn_id, f"turn {message.turn_position}")

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(require_safe(self.transcript_view))
        # First: Django's own patterns take any path for a message's id.
        return [
            path(f"transcript/{SESSION_PATH}/", view, name="messages_app_message_transcript"),
            *super().get_urls(),
        ]

    def transcript_view(self, request: HttpRequest, session_id: str) -> HttpResponseBase:
        """A session's turns, TURNS_PER_PAGE to a page; deleted sessions too."""
        if not (self.has_view_permission(request) and request.user.has_perm("sessions_app.view_session")):
            raise PermissionDenied
        session = get_object_or_404(Session.objects.select_related("account"), pk=session_id)
        pages = Paginator(session.turns.order_by("position"), TURNS_PER_PAGE)
        page = pages.get_page(request.GET.get("p"))
        switches, switches_left = _switches_beside(session, page)
        context = {
            **self.admin_site.each_context(request),
            "title": "Transcript",
            "subtitle": clipped(str(session)),
            "opts": Session._meta,
            "original": Shown(session),
            "media": self.media,
            "session": session,
            "page": page,
            "page_numbers": list(pages.get_elided_page_range(page.number)),
            "entries": list(_entries(page.object_list, switches)),
            "switches_left": switches_left,
        }
        return TemplateResponse(request, "messages_app/transcript.html", context)


def _switches_beside(session: Session, page: Page[Turn]) -> tuple[list[Handoff], int]:
    """The handoffs that no turn made in the time of the page's turns, and how many more there are than are shown."""
    turns = list(page.object_list)
    found = session.handoffs.filter(turn__isnull=True).order_by("id")
    if page.has_previous():
        found = found.filter(after_position__gte=turns[0].position)
    if page.has_next():
        found = found.filter(after_position__lte=turns[-1].position)
    shown = list(found[: SWITCHES_PER_PAGE + 1])
    left = found.count() - SWITCHES_PER_PAGE if len(shown) > SWITCHES_PER_PAGE else 0
    return shown[:SWITCHES_PER_PAGE], left


def _entries(turns: Any, switches: list[Handoff]) -> Iterator[Entry]:
    """Turns in order with what was said in each, and between them the switches of the time before."""
    said: dict[Any, list[Said]] = {turn.pk: [] for turn in turns}
    room = CHARACTERS_PER_PAGE
    for message in Message.objects.filter(turn__in=list(said)).in_order():
        whole = len(message.content) <= room
        room -= len(message.content) if whole else 0
        text = visible(message.content) if whole else clipped(message.content, BEGINNING)
        said[message.turn_id].append(Said(text, message=message, is_cut=not whole))
    for call in _calls_of(list(said)):
        parts = [call.unusable_arguments or call.arguments_text, call.released_text, call.answer]
        whole = sum(map(len, parts)) <= room
        room -= sum(map(len, parts)) if whole else 0
        text, edited, answer = (visible(part) if whole else clipped(part, BEGINNING) if part else "" for part in parts)
        said[call.turn_id].append(Said(text, call=call, edited=edited, answer=answer, decided=_decided(call)))
    for handoff in Handoff.objects.filter(turn__in=list(said)).order_by("id"):
        said[handoff.turn_id].append(Said(visible(handoff.reason), handoff=handoff))
    waiting = deque(switches)
    for turn in turns:
        while waiting and waiting[0].after_position < turn.position:
            yield _switch(waiting.popleft())
        yield Entry(turn, sorted(said[turn.pk], key=lambda each: each.order))
    yield from map(_switch, waiting)


def _calls_of(turns: list[Any]) -> ToolCallQuerySet:
    return ToolCall.objects.filter(turn__in=turns).select_related("approval__decision").in_order()


def _decided(call: ToolCall) -> str:
    """Why the call had to wait, and how that ended."""
    if not call.requires_approval:
        return ""
    why = f"Needs approval: {visible(call.approval.reason)}" if call.approval.reason else "Needs approval"
    made = getattr(call.approval, "decision", None)
    if made is None:
        return why
    said = f": {clipped(made.feedback, BEGINNING)}" if made.feedback else ""
    return f"{why}. {made.verdict.capitalize()} by {visible(made.decided_by)}, {moment(made.decided_at)} UTC{said}"


def _switch(handoff: Handoff) -> Entry:
    return Entry(said=[Said(visible(handoff.reason), handoff=handoff)])

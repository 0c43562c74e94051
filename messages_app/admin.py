"""Browsing messages, and the transcript: a session as one reads it, turn by turn."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.paginator import Page, Paginator
from django.db.models import Count, Sum
from django.http import Http404, HttpRequest, QueryDict
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.views.decorators.http import require_safe
from unfold.decorators import display

from agents_app import effects
from agents_app.admin.card import shown_changes
from agents_app.effects import Change
from agents_app.models import Decision
from events_app.admin import BrowseOnlyAdmin, session_link
from events_app.display import Shown, as_json, box, clipped, duration, link, moment, visible
from events_app.filters import Exactly, TimeRange, one_of
from messages_app.models import Message
from orchestrator_site.http import SESSION_PATH
from sessions_app.admin import call_state, status_badge
from sessions_app.models import Handoff, Session, ToolCall, ToolCallQuerySet, Turn

TURNS_PER_PAGE = 50
# A turn's handoffs are bounded, switches between turns are not.
SWITCHES_PER_PAGE = 100
# Messages are shown whole until a page has this much; what comes then begins here and is whole on its own page.
CHARACTERS_PER_PAGE = 1_000_000
BEGINNING = 1_000
# Longer arguments are shown as they are stored: indented, deep ones grow many times over.
INDENTED_CHARACTERS = 20_000


@dataclass(slots=True)
class Said:
    """A message, a tool call or a handoff of a transcript, and its text as it is shown."""

    text: str
    message: Message | None = None
    call: ToolCall | None = None
    handoff: Handoff | None = None
    is_cut: bool = False
    changes: list[Change] = field(default_factory=list)
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
        return call_state(self.call) if self.call else ""

    @property
    def decision(self) -> Decision | None:
        asked = getattr(self.call, "approval", None)
        return getattr(asked, "decision", None)

    @property
    def card(self) -> str:
        """Where the approval of a call is to be read."""
        asked = getattr(self.call, "approval", None)
        return reverse("admin:agents_app_approvalrequest_change", args=[asked.pk]) if asked else ""

    @property
    def course(self) -> str:
        """When a call was asked for, and how long after that it was decided on, released and answered."""
        if self.call is None:
            return ""
        asked, decision = self.call.created_at, self.decision
        steps = {
            "decided": decision.decided_at if decision else None,
            "released": self.call.released_at,
            "answered": self.call.answered_at,
        }
        later = [f"{step} after {duration(asked, at)}" for step, at in steps.items() if at is not None]
        return ", ".join([f"asked {moment(asked)}", *later])


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
    list_filter = (("session", Exactly), one_of("role", Message.Role.choices), ("created_at", TimeRange))
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
        """A session's turns, TURNS_PER_PAGE to a page; deleted ones too. `?call=` and `?turn=` lead to the place."""
        if not (self.has_view_permission(request) and request.user.has_perm("sessions_app.view_session")):
            raise PermissionDenied
        session = get_object_or_404(Session.objects.select_related("account"), pk=session_id)
        if "call" in request.GET or "turn" in request.GET:
            return redirect(f"{request.path}?{_place(session, request.GET)}")
        pages = Paginator(session.turns.order_by("position"), TURNS_PER_PAGE)
        page = pages.get_page(request.GET.get("p"))
        switches, switches_left = _switches_beside(session, page)
        context = {
            **self.admin_site.each_context(request),
            "title": "Transcript",
            "subtitle": clipped(str(session)),
            "opts": Session._meta,
            "original": Shown(session),
            "session": session,
            "page": page,
            "page_numbers": list(pages.get_elided_page_range(page.number)),
            "entries": list(_entries(page.object_list, switches)),
            "total": _total(session),
            "switches_left": switches_left,
        }
        return TemplateResponse(request, "messages_app/transcript.html", context)


def _place(session: Session, wanted: QueryDict) -> str:
    """The page of a call or a turn, and where on it. Raises Http404."""
    try:
        if "call" in wanted:
            call = get_object_or_404(session.calls.select_related("turn"), pk=wanted["call"])
            turn, anchor = call.turn, call.pk
        else:
            turn = get_object_or_404(session.turns, pk=wanted["turn"])
            anchor = f"turn-{turn.position}"
    except ValidationError:
        raise Http404("No id of a turn") from None
    before = session.turns.filter(position__lt=turn.position).count()
    return f"p={before // TURNS_PER_PAGE + 1}#{anchor}"


def _total(session: Session) -> dict[str, int]:
    tokens = {name: Sum(name, default=0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    calls = session.calls.aggregate(calls=Count("pk"), decisions=Count("approval__decision"))
    return {**session.turns.aggregate(**tokens), **calls}


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
        said[call.turn_id].append(_asked(call) if whole else _begun(call))
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


def _asked(call: ToolCall) -> Said:
    """A call with its arguments indented, and what an edit changed of them."""
    wanted = visible(call.unusable_arguments or call.arguments_text)
    if not call.unusable_arguments and len(call.arguments_text) <= INDENTED_CHARACTERS:
        wanted = visible(as_json(call.arguments))
    changes = shown_changes(effects.changes(call.arguments, call.final_arguments)) if call.released_text else []
    return Said(wanted, call=call, changes=changes, answer=visible(call.answer))


def _begun(call: ToolCall) -> Said:
    """A call that the page has no more room for."""
    wanted = clipped(call.unusable_arguments or call.arguments_text, BEGINNING)
    return Said(wanted, call=call, is_cut=True, answer=clipped(call.answer, BEGINNING) if call.answer else "")


def _switch(handoff: Handoff) -> Entry:
    return Entry(said=[Said(visible(handoff.reason), handoff=handoff)])

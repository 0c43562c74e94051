"""Telling open admin pages to read again: which channels there are, who may listen, who says that something changed.

Pages are told that they are out of date, never what is new: what they show they read from the database, with the rights
of whoever looks. So a message that is lost or doubled does no harm. django-eventstream carries it, without its storage.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from asgiref.sync import SyncToAsync
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.db import connections
from django.db.models import Max, Q
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.http.response import HttpResponseBase
from django.views.decorators.http import require_safe
from django_eventstream import send_event
from django_eventstream.channelmanager import ChannelManagerBase
from django_eventstream.views import events, get_listener_manager

from events_app.database import read
from events_app.models import Event
from events_app.stream import Place
from orchestrator_site.errors import Unavailable
from orchestrator_site.http import SESSION_ID

logger = logging.getLogger(__name__)

APPROVALS = "approvals"
SESSION = "session-"
# Facts by which the approval queue changes; a session's page changes by every fact of its session.
OF_APPROVALS = {"tool.approval.required", "hitl.decision.made"}
PERMISSIONS = {APPROVALS: "agents_app.view_approvalrequest", SESSION: "sessions_app.view_session"}
MAX_CHANNELS = 2
LOOK_SECONDS = 0.25
RECHECK_SECONDS = 3
PAGE = 1_000
# No transaction that stores facts takes as long.
LATE_SECONDS = 10


def kind_of(channel: str) -> str | None:
    """Which permission a channel needs, by its name; None for one that does not exist."""
    if channel == APPROVALS:
        return APPROVALS
    return SESSION if re.fullmatch(f"{SESSION}{SESSION_ID}", channel) else None


class Channels(ChannelManagerBase):
    """Who may listen to what: denied unless a permission says otherwise."""

    def get_channels_for_request(self, request: HttpRequest, view_kwargs: dict[str, Any]) -> set[str]:
        return set(request.GET.getlist("channel"))

    def can_read_channel(self, user: Any, channel: str) -> bool:
        kind = kind_of(channel)
        is_staff = user is not None and user.is_active and user.is_staff
        return bool(kind and is_staff and user.has_perm(PERMISSIONS[kind]) and not watch.sends_away(user.pk, channel))

    def is_channel_reliable(self, channel: str) -> bool:
        return False


@require_safe
def changes(request: HttpRequest) -> HttpResponseBase:
    """GET /admin/changes/?channel=approvals&channel=session-<id>: says `changed` whenever a page should read again."""
    # A page never resumes: it reads everything again.
    request.META.pop("HTTP_LAST_EVENT_ID", None)
    query = request.GET.copy()
    query.pop("lastEventId", None)
    request.GET = query  # type: ignore[assignment]
    # The library reads more parameters than these, such as signed ones that name another user.
    if set(request.GET) != {"channel"} or len(request.GET.getlist("channel")) > MAX_CHANNELS:
        return HttpResponseBadRequest("Name one or two channels and nothing else.")
    manager = Channels()
    if not all(manager.can_read_channel(request.user, channel) for channel in request.GET.getlist("channel")):
        raise PermissionDenied
    if request.method == "HEAD":
        return HttpResponse(content_type="text/event-stream")
    try:
        with Place() as place:
            told = events(request)
            return place.response(_watched(told.streaming_content))
    except Unavailable as refusal:
        return HttpResponse(refusal.message, status=refusal.status, headers=refusal.headers)


async def _watched(parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    await watch.ensure_running()
    async for part in parts:
        _release_thread()
        yield part


def _release_thread() -> None:
    """Give back the thread that Django holds for a request to a page as long as the request is open.

    Its signal handlers, and the library when it asks whether this person may listen, run in a one-thread executor per
    request (asgiref's thread-sensitive context), made for the first of them and kept to the end of the response: 200
    streams held 200 threads. A new one is made if needed.
    """
    context = SyncToAsync.thread_sensitive_context.get(None)
    executor = SyncToAsync.context_to_thread_executor.pop(context, None) if context is not None else None
    if executor is not None:
        # What it looked up, such as a user of the admin, took a connection, which would be gone with the thread.
        executor.submit(connections.close_all)
        executor.shutdown(wait=False)


class Watch:
    """Follows the table of events while somebody listens: facts of this process and of every other one alike."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._refused: set[tuple[Any, str]] = set()
        self._is_stopping = False

    def sends_away(self, user_id: Any, channel: str) -> bool:
        """Whether a stream that asks once more has to end, though its request's user had the right."""
        return self._is_stopping or (user_id, channel) in self._refused

    async def ensure_running(self) -> None:
        """Start on the running loop, unless it runs there; it ends with the last listener.

        It has looked once by then: whoever listens hears of everything that is stored after this.
        """
        if self._runs_here():
            return
        facts = NewFacts()
        await self._look(facts)
        if not self._runs_here():
            self._task = asyncio.get_running_loop().create_task(self._run(facts))

    def _runs_here(self) -> bool:
        task = self._task
        return task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop()

    def close_all(self) -> None:
        """The server stops: every page's stream ends, and is opened again when there is a server. From any thread."""
        # Who is sent away asks once more whether it may listen; now nobody may.
        self._is_stopping = True
        task = self._task
        if task is not None and not task.done():
            task.get_loop().call_soon_threadsafe(_end_all)

    async def _run(self, facts: "NewFacts") -> None:
        looks = 1
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not _listeners():
                return
            await self._look(facts)
            looks += 1
            if looks % round(RECHECK_SECONDS / LOOK_SECONDS) == 0:
                await self._send_away()

    async def _look(self, facts: "NewFacts") -> None:
        with _unreadable_logged():
            for channel in await read(facts.channels) & set(_listeners()):
                send_event(channel, "changed", {})

    async def _send_away(self) -> None:
        """End the streams of those who may not listen any more: who was disabled, or lost a right."""
        listening = [(listener.user_id, channel) for channel, each in _listeners().items() for listener in each]
        with _unreadable_logged():
            self._refused = await read(_refused, set(listening))
        for user_id, channel in self._refused:
            get_listener_manager().kick(user_id, channel)


@contextmanager
def _unreadable_logged() -> Iterator[None]:
    """The database is away or locked: pages learn of what they miss when it is back."""
    try:
        yield
    except Exception:
        logger.exception("changes_unreadable")


def _listeners() -> dict[str, set[Any]]:
    manager = get_listener_manager()
    with manager.lock:
        return {channel: set(listeners) for channel, listeners in manager.listeners_by_channel.items()}


def _end_all() -> None:
    for channel, listeners in _listeners().items():
        for listener in listeners:
            get_listener_manager().kick(listener.user_id, channel)


class NewFacts:
    """Reads the facts that became visible since it last looked.

    Of two transactions the one that took the higher number may commit first, so numbers that are missing are asked for
    again for a while; most of them are of transactions that were rolled back.
    """

    def __init__(self) -> None:
        self._newest: int | None = None
        self._missing: dict[int, float] = {}

    def channels(self) -> set[str]:
        """Who has to be told. Whoever listens reads when its stream opens, so the first look tells of nothing."""
        last = Event.objects.aggregate(last=Max("id"))["last"] or 0
        if self._newest is None or (last <= self._newest and not self._missing):
            self._newest = last
            return set()
        # After a long pause, or under a heavy load, the latest are enough: every page hears of its session again soon.
        start = max(self._newest, last - PAGE)
        channels = {APPROVALS} if start > self._newest else set()
        found = set()
        facts = Event.objects.filter(Q(id__gt=start) | Q(id__in=self._missing))
        for number, session_id, event_type in facts.values_list("id", "session_id", "event_type"):
            found.add(number)
            channels.add(f"{SESSION}{session_id}")
            if event_type in OF_APPROVALS:
                channels.add(APPROVALS)
        self._remember(range(start + 1, last + 1), found)
        self._newest = max(last, self._newest)
        return channels

    def _remember(self, asked_for: range, found: set[int]) -> None:
        now = time.monotonic()
        missing = {number: self._missing.get(number, now) for number in {*self._missing, *asked_for} - found}
        self._missing = {number: since for number, since in missing.items() if now - since < LATE_SECONDS}


def _refused(listening: set[tuple[Any, str]]) -> set[tuple[Any, str]]:
    users = get_user_model().objects.in_bulk({user_id for user_id, _ in listening})
    manager = Channels()
    return {(who, channel) for who, channel in listening if not manager.can_read_channel(users.get(who), channel)}


watch = Watch()

"""Following a session's stream: replay from the log, then live; and the response that every stream uses."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, nullcontext
from typing import Any, Self
from weakref import WeakKeyDictionary

from django.conf import settings
from django.db import OperationalError
from django.http import StreamingHttpResponse

from events_app import log
from events_app.database import read
from events_app.feed import Subscription, feed
from events_app.frames import PING, Frame
from orchestrator_site.errors import Unavailable

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "Connection": "keep-alive",
    "X-Accel-Buffering": "no",
}


# How long replays rest, by the time that a page took to read; to send it takes as long.
REST_FOR_PAGE = 4
# However many they are, nobody waits much longer for a page: a stream may not be silent for too long.
LONGEST_ROUND_SECONDS = 5.0


class TooManyStreams(Unavailable):
    code = "too_many_streams"


async def follow(
    session_id: str, *, after: int, until: str | None = None, live: Subscription | None = None
) -> AsyncGenerator[list[Frame], None]:
    """Every frame past number `after`, in order, none twice; those that are ready at once come together.

    With `until`, the frames of that origin alone, up to the one that closes its answer. An empty list is a heartbeat.
    `live`: a subscription from before anything of that origin was said, which the log has nothing to add to.
    """
    has_to_read = live is None
    with nullcontext(live) if live else feed.subscribe(session_id, ends_with_session=until is None) as live:
        live.position = after
        while True:
            if has_to_read:
                ended = live.ended
                # The unlogged ones first: what leaves that list while the log is read is in the log by then.
                live.begin_reading()
                unlogged = feed.unlogged(session_id)
                logged, more = await read(log.page, session_id, after)
                while True:
                    ready, after, closed = _fresh(logged, after, until)
                    if ready:
                        yield ready
                    if closed:
                        return
                    if not more:
                        break
                    logged, more = await _further_page(session_id, after)
                ready, after, closed = _fresh(unlogged, after, until)
                if ready:
                    yield ready
                if closed or ended:
                    return
            has_to_read = True
            while not live.reread and not live.ended:
                ready, after, closed = _fresh(live.take(after), after, until)
                live.position = after
                if ready:
                    yield ready
                if closed:
                    return
                if live.beat:
                    live.beat = False
                    yield []
                if not live.has_hole:
                    await live.news()
                    continue
                # Of two commits the later one may be published first; another process's frames may come without those
                # before them. What is missing is in the log by now, or will be with the next group commit.
                if live.waits_for_commit:
                    await asyncio.sleep(settings.STREAM_COMMIT_SECONDS)
                live.reread = True


class _Replays:
    """Reads further pages of the log: readers of long ones come one after the other, with rests when others wait.

    Two hundred of them took the whole process for more than a minute, and a turn's first token came after 0.7 s.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._number = 0
        self._failed_at = 0.0

    async def page(self, session_id: str, after: int) -> tuple[list[Frame], bool]:
        self._number += 1
        asked_at = time.monotonic()
        try:
            async with self._lock:
                if asked_at < self._failed_at:
                    # Those that stood behind it do not wait as long once more, one after the other.
                    raise OperationalError("the database answered nobody before")
                began = time.monotonic()
                try:
                    page = await read(log.page, session_id, after)
                except OperationalError:
                    self._failed_at = time.monotonic()
                    raise
                if self._number > 1:
                    rest = REST_FOR_PAGE * (time.monotonic() - began)
                    await asyncio.sleep(min(rest, LONGEST_ROUND_SECONDS / self._number))
                return page
        finally:
            self._number -= 1


# Of each event loop.
_replays: WeakKeyDictionary[asyncio.AbstractEventLoop, _Replays] = WeakKeyDictionary()


async def _further_page(session_id: str, after: int) -> tuple[list[Frame], bool]:
    loop = asyncio.get_running_loop()
    if loop not in _replays:
        _replays[loop] = _Replays()
    return await _replays[loop].page(session_id, after)


def _fresh(frames: Sequence[Frame], after: int, until: str | None) -> tuple[list[Frame], int, bool]:
    """What a follower at `after` has not seen of `frames`, its new position, and whether its answer is complete."""
    fresh = []
    for frame in frames:
        if frame.seq > after:
            after = frame.seq
            if until is None or frame.origin == until:
                fresh.append(frame)
                if until is not None and frame.closes:
                    return fresh, after, True
    return fresh, after, False


def wire_of(frames: list[Frame], *, tokens: bool = True) -> bytes:
    """What `follow` yielded as bytes of an event stream; without `tokens`, the deltas are left out."""
    if not frames:
        return PING
    # One token, as nearly always.
    if tokens and len(frames) == 1:
        return frames[0].wire
    return b"".join([frame.wire for frame in frames if tokens or not frame.is_delta])


async def until_old(parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """End a stream at its maximum age; its reader resumes it. Heartbeats bound how late that is noticed."""
    ends = time.monotonic() + settings.STREAM_MAX_AGE_SECONDS
    async with aclosing(parts):
        async for part in parts:
            yield part
            if time.monotonic() >= ends:
                return


_places: set["Place"] = set()


class Place:
    """One of the STREAMS_AT_ONCE places of this process, held from before anything is stored to the response's end.

        with Place() as place:
            ...
            return place.response(parts)

    Raises TooManyStreams when there is none left, Unavailable when the process stops. Without a response it is given
    back at the end of the block.
    """

    def __init__(self) -> None:
        if feed.is_closing:
            raise Unavailable("This server is being stopped.", Retry_After="1")
        if len(_places) >= settings.STREAMS_AT_ONCE:
            raise TooManyStreams("This server holds as many streams as it can.", Retry_After="5")
        _places.add(self)
        self._is_taken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_taken:
            self.give_back()

    def give_back(self) -> None:
        _places.discard(self)

    def response(self, parts: AsyncGenerator[Any, None], wire: Callable[[Any], bytes] = bytes) -> "EventStream":
        """The response every stream uses, of what `wire` makes of each part."""
        response = EventStream(parts, wire)
        # Closed by whoever sends it, whether or not anybody has read of it.
        response._resource_closers.append(self.give_back)  # type: ignore[attr-defined]
        self._is_taken = True
        return response


class EventStream(StreamingHttpResponse):
    """`parts` is what it streams as what `wire` makes of each, without the layers that Django puts around it."""

    def __init__(self, parts: AsyncGenerator[Any, None], wire: Callable[[Any], bytes]) -> None:
        super().__init__(parts, headers=HEADERS)  # Django's handler, which has the pages, knows bytes alone
        self.parts = parts
        self.wire = wire

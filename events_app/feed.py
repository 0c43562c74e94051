"""The memory bus of one process: who follows which session, what is not logged yet, and who has to be woken.

Everything here happens on the server's event loop. Other threads use `poke`, `close` and `wake_runner`: they hand over.
The bus may lose nothing inside one process; a follower that cannot keep up is sent back to the log.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from events_app.frames import Frame

QUEUE_FRAMES = 1_000
BEATS_AT_ONCE = 100
BEAT_PAUSE_SECONDS = 0.02


class Writer(Protocol):
    """The runner's end of a session's stream."""

    def unlogged(self) -> list[Frame]:
        """Frames that were published but are not in the log yet."""

    def last_given(self) -> int:
        """The highest number that it has given so far."""

    def nudge(self) -> None:
        """Somebody stored something that this runner has to look at."""


class Subscription:
    """One follower's bounded queue. `reread` says that the log has news, or that the queue ran over."""

    def __init__(self, *, ends_with_session: bool) -> None:
        self.ends_with_session = ends_with_session
        self.frames: deque[Frame] = deque()
        self.reread = False
        self.ended = False
        self.beat = False
        self._news: asyncio.Future[None] | None = None

    def push(self, frames: Sequence[Frame]) -> None:
        if self.reread:
            return  # what comes now will be found in the log, or among the unlogged
        if len(self.frames) + len(frames) > QUEUE_FRAMES:
            self.frames.clear()
            self.reread = True
        else:
            self.frames.extend(frames)
        self.signal()

    def signal(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def end(self) -> None:
        """After what is stored by now, nothing more will come."""
        self.ended = True
        self.signal()

    async def news(self) -> None:
        """Wait until there is something to do: frames, something in the log, the end, a heartbeat."""
        if self.frames or self.reread or self.ended or self.beat:
            return
        self._news = asyncio.get_running_loop().create_future()
        await self._news


class Feed:
    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followers: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._writers: dict[str, Writer] = {}
        self._closing: set[str] = set()
        self._on_wake: Callable[[], None] = lambda: None

    def attach(self, loop: asyncio.AbstractEventLoop, *, on_wake: Callable[[], None]) -> None:
        """Bind the bus to the loop it lives on; `on_wake` is called there when a turn may be ready to run."""
        self._loop, self._on_wake = loop, on_wake

    def detach(self) -> None:
        self._loop, self._on_wake = None, lambda: None

    # --- from any thread, after a commit ---

    def poke(self, session_id: str) -> None:
        """The log or the facts of a session have changed: followers read again, its runner looks."""
        self._on_loop(self._poke, session_id)

    def close(self, session_id: str) -> None:
        """The session is gone: the streams of the whole session end."""
        self._on_loop(self._close, session_id)

    def close_all(self) -> None:
        """The server stops: every stream ends where it is, to be resumed."""
        self._on_loop(self._close_all)

    def wake_runner(self) -> None:
        self._on_loop(self._on_wake)

    def _on_loop(self, function: Callable[..., None], *args: str) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *args)

    # --- on the loop ---

    @contextmanager
    def subscribe(self, session_id: str, *, ends_with_session: bool) -> Iterator[Subscription]:
        """Follow a session; an answer goes on to its own end even when the session is deleted under it."""
        subscription = Subscription(ends_with_session=ends_with_session)
        self._followers[session_id].add(subscription)
        try:
            yield subscription
        finally:
            self._followers[session_id].discard(subscription)
            if not self._followers[session_id]:
                del self._followers[session_id]

    @contextmanager
    def writing(self, session_id: str, writer: Writer) -> Iterator[None]:
        self._writers[session_id] = writer
        try:
            yield
        finally:
            # A turn taken over within this process may have registered its own writer already.
            if self._writers.get(session_id) is writer:
                del self._writers[session_id]
                if session_id in self._closing:
                    self._close(session_id)

    def publish(self, session_id: str, frames: Sequence[Frame]) -> None:
        for subscription in self._followers.get(session_id, ()):
            subscription.push(frames)

    def unlogged(self, session_id: str) -> list[Frame]:
        writer = self._writers.get(session_id)
        return writer.unlogged() if writer else []

    def last_given(self, session_id: str) -> int | None:
        """The highest number given in a session, when a runner of this process gives them."""
        writer = self._writers.get(session_id)
        return writer.last_given() if writer else None

    async def heartbeat(self) -> None:
        """Have every follower send a comment: what it was pushed need not be what it sends to its reader.

        Some at a time: thousands in one moment hold up every token for more than a second.
        """
        followers = [subscription for followers in self._followers.values() for subscription in followers]
        for first in range(0, len(followers), BEATS_AT_ONCE):
            for subscription in followers[first : first + BEATS_AT_ONCE]:
                subscription.beat = True
                subscription.signal()
            await asyncio.sleep(BEAT_PAUSE_SECONDS)

    def _poke(self, session_id: str) -> None:
        for subscription in self._followers.get(session_id, ()):
            subscription.reread = True
            subscription.signal()
        if session_id in self._writers:
            self._writers[session_id].nudge()

    def _close(self, session_id: str) -> None:
        if session_id in self._writers:
            self._closing.add(session_id)  # its runner has the last word
            return
        self._closing.discard(session_id)
        for subscription in self._followers.get(session_id, ()):
            if subscription.ends_with_session:
                subscription.end()

    def _close_all(self) -> None:
        for followers in self._followers.values():
            for subscription in followers:
                subscription.end()


feed = Feed()

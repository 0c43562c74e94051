"""The memory bus of one process: who follows which session, what is not logged yet, and who has to be woken.

Everything here happens on one event loop. Other threads use `poke`, `close` and `wake_runner`: they hand over. The bus
may lose nothing inside one process; a follower that cannot keep up is sent back to the log. What other processes show
comes by the relay, which may lose it.
"""

import asyncio
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from events_app.frames import Frame

QUEUE_FRAMES = 1_000
# Of a follower that has not begun yet: nothing is missing.
NOWHERE = sys.maxsize
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


class Relay(Protocol):
    """Carries to other processes what is published here; may lose it."""

    def carry(self, session_id: str, batch: "Batch") -> None: ...

    def poke(self, session_id: str) -> None: ...

    def close(self, session_id: str) -> None: ...


# Frozen, it would take four times as long to make, and there is one for each token. Nobody changes it.
@dataclass(slots=True)
class Batch:
    """Frames that were published together, and how they join what came before.

    `prev` is the number that was given before theirs. Up to `logged` all was in the log when they were published.
    """

    frames: Sequence[Frame]
    prev: int
    logged: int

    @property
    def last(self) -> int:
        return self.frames[-1].seq


class Subscription:
    """One follower's bounded queue. `reread` says that the log has news, or that the queue ran over."""

    def __init__(self, *, ends_with_session: bool) -> None:
        self.ends_with_session = ends_with_session
        self.position = NOWHERE  # how far its follower has come
        self.reread = False
        self.ended = False
        self.beat = False
        self._batches: deque[Batch] = deque()
        self.waiting = 0  # so many frames
        self._covered = 0  # so many of them, from the left, were here before the log was last read
        self._news: asyncio.Future[None] | None = None
        # Asked for once: for each token it would be a system call each time.
        self._loop = asyncio.get_running_loop()

    def push(self, batch: Batch) -> None:
        if self.waiting + len(batch.frames) > QUEUE_FRAMES:
            self._batches.clear()
            self.waiting = self._covered = 0
            self.reread = True
        else:
            self._batches.append(batch)
            self.waiting += len(batch.frames)
        self.signal()

    def begin_reading(self) -> None:
        """The log is read now: what joins the batches that are here by now will be found in it, once it is logged."""
        self.reread = False
        self._covered = len(self._batches)

    def take(self, after: int) -> Sequence[Frame]:
        """The frames past number `after` up to the first hole, which `has_hole` then tells."""
        if len(self._batches) == 1 and (only := self._batches[0]).prev <= after < only.frames[0].seq:
            # As nearly always: the next token.
            self._batches.clear()
            self.waiting = self._covered = 0
            return only.frames
        taken: list[Frame] = []
        while self._batches and (self._joins(self._batches[0], after) or self._skip_void()):
            batch = self._batches.popleft()
            self.waiting -= len(batch.frames)
            self._covered = max(self._covered - 1, 0)
            taken += [frame for frame in batch.frames if frame.seq > after]
            after = max(after, batch.last)
        return taken

    def _joins(self, batch: Batch, after: int) -> bool:
        """Whether nothing can be missing between a follower at `after` and the batch, the leftmost one."""
        return batch.prev <= after or batch.last <= after or (self._covered > 0 and batch.prev <= batch.logged)

    def _skip_void(self) -> bool:
        """Drop what a later batch shows to be complete in the log, or never to be logged: its writer died.

        Whether there is now a leftmost batch that joins.
        """
        covered = list(self._batches)[: self._covered]
        for index in range(len(covered) - 1, 0, -1):
            if covered[index].prev <= covered[index].logged:
                for _ in range(index):
                    self.waiting -= len(self._batches.popleft().frames)
                self._covered -= index
                return True
        return False

    @property
    def has_hole(self) -> bool:
        """Whether frames are here that `take` did not give: something is missing before them."""
        return bool(self._batches)

    @property
    def waits_for_commit(self) -> bool:
        """Whether the log was read since they came, in vain: what is missing is not logged yet."""
        return self._covered > 0

    def signal(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def end(self) -> None:
        """After what is stored by now, nothing more will come."""
        self.ended = True
        self.signal()

    async def news(self) -> None:
        """Wait until there is something to do: frames, something in the log, the end, a heartbeat."""
        if self._batches or self.reread or self.ended or self.beat:
            return
        self._news = self._loop.create_future()
        await self._news


class Feed:
    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followers: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._writers: dict[str, Writer] = {}
        self._closing: set[str] = set()
        self._on_wake: Callable[[], None] = lambda: None
        self.relay: Relay | None = None
        self.is_closing = False

    def attach(self, loop: asyncio.AbstractEventLoop, *, on_wake: Callable[[], None]) -> None:
        """Bind the bus to the loop it lives on; `on_wake` is called there when a turn may be ready to run."""
        self._loop, self._on_wake = loop, on_wake

    def detach(self) -> None:
        self._loop, self._on_wake, self.relay = None, lambda: None, None

    # --- from any thread, after a commit ---

    def poke(self, session_id: str) -> None:
        """The log or the facts of a session have changed: followers read again, its runner looks."""
        self._on_loop(self._tell, session_id)

    def close(self, session_id: str) -> None:
        """The session is gone: the streams of the whole session end."""
        self._on_loop(self._tell_of_end, session_id)

    def close_all(self) -> None:
        """The process stops: every stream ends where it is, to be resumed, and none begins."""
        self.is_closing = True
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
                    self.end(session_id)

    def publish(self, session_id: str, frames: Sequence[Frame], *, prev: int, logged: int) -> None:
        """Show numbered frames to everybody who follows. `prev` and `logged` are those of a Batch."""
        if followers := self._followers.get(session_id):
            # Here what is not in the log is among the unlogged: whoever reads again finds it.
            batch = Batch(frames, prev, prev)
            for subscription in followers:
                subscription.push(batch)
        if self.relay is not None:
            self.relay.carry(session_id, Batch(frames, prev, logged))

    def deliver(self, session_id: str, batch: Batch) -> None:
        """What another process has published."""
        for subscription in self._followers.get(session_id, ()):
            subscription.push(batch)

    def followed(self) -> dict[str, int]:
        """The sessions that are followed here and written elsewhere, with the position of the hindmost follower."""
        return {
            session_id: min(subscription.position for subscription in followers)
            for session_id, followers in self._followers.items()
            if session_id not in self._writers
        }

    def is_followed(self, session_id: str) -> bool:
        return session_id in self._followers

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

    def _tell(self, session_id: str) -> None:
        self.look(session_id)
        if self.relay is not None:
            self.relay.poke(session_id)

    def _tell_of_end(self, session_id: str) -> None:
        self.end(session_id)
        if self.relay is not None:
            self.relay.close(session_id)

    def look(self, session_id: str) -> None:
        """What `poke` does within this process."""
        for subscription in self._followers.get(session_id, ()):
            subscription.reread = True
            subscription.signal()
        if session_id in self._writers:
            self._writers[session_id].nudge()

    def end(self, session_id: str) -> None:
        """What `close` does within this process."""
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

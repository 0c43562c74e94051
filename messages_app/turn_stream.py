"""The runner's end of a session's stream: it gives the numbers, and nothing but deltas is shown before its commit."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from django.db import transaction

from events_app import log
from events_app.chunks import Chunk, encode, encode_delta
from events_app.database import hop
from events_app.feed import feed
from events_app.frames import Frame
from sessions_app.models import CancelRequested, Claim, LostClaim, Session, Turn

T = TypeVar("T")

BLOCK = 4_000
LOW = BLOCK // 4


class Step:
    """What one transaction of a running turn may write through: the locked session, and the chunks it says."""

    def __init__(self, claim: Claim, session: Session) -> None:
        self.claim = claim
        self.session = session
        self.chunks: list[Chunk] = []

    def say(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)


class Stopping(Exception):
    """The server stops: the turn is left for another runner."""


class TimeIsUp(Exception):
    """The turn has run as long as a turn may."""


class TurnStream:
    """One claimed turn's numbers, its unlogged frames, and the means to interrupt it."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.session_id = claim.session_id
        self.origin = str(claim.turn_id)
        self.lock = asyncio.Lock()
        self._next, self._end = claim.first_seq, claim.block_end
        self._spare: tuple[int, int] | None = None
        self._unlogged: list[Frame] = []
        self._held: list[str] | None = None
        self._scope: asyncio.Timeout | None = None
        self._interruption: Exception | None = None
        self._nudged = False
        self._looking: asyncio.Task[None] | None = None

    # --- deltas ---

    async def delta(self, text: str) -> None:
        """Show a piece of text at once. Waits for the database only when a block of numbers has run out early."""
        if self._held is not None:
            # A commit is under way whose frames come first: followers read numbers in order.
            self._held.append(text)
            return
        if self._next >= self._end and self._spare is None:
            await self.commit(lambda step: None)
        self._show(text)

    def _show(self, text: str) -> None:
        frame = Frame.of(self._take(), self.origin, encode_delta(text))
        self._unlogged.append(frame)
        feed.publish(self.session_id, (frame,))

    def _take(self) -> int:
        if self._next >= self._end:
            if self._spare is None:
                raise RuntimeError("a turn's numbers were not reserved in time")
            (self._next, self._end), self._spare = self._spare, None
        self._next += 1
        return self._next - 1

    def unlogged(self) -> list[Frame]:
        return list(self._unlogged)

    # --- commits of steps ---

    async def commit(self, write: Callable[[Step], T], *, closes: bool = False) -> T:
        """Run `write` in one transaction with everything of this turn that is not logged yet and the chunks it says;
        publish those after the commit. Raises LostClaim, CancelRequested or what `write` raises, with nothing written.
        """
        async with self.lock:
            self._held = []
            writing = asyncio.ensure_future(hop(self._write, write, closes))
            try:
                result, frames = await asyncio.shield(writing)
                self._unlogged.clear()
                feed.publish(self.session_id, frames)
                return result
            finally:
                # The thread goes on when this task is cancelled, and it uses the counters.
                await asyncio.wait([writing])
                held, self._held = "".join(self._held), None
                if held:
                    self._show(held)

    def _write(self, write: Callable[[Step], T], closes: bool) -> tuple[T, list[Frame]]:
        numbers = self._next, self._end, self._spare
        try:
            with transaction.atomic():
                session = Session.objects.locked().get(pk=self.session_id)
                step = Step(self.claim, session)
                result = write(step)

                def number() -> int:
                    if self.wants_numbers:
                        self._spare = _reserve(session)
                    return self._take()

                waiting = log.number_waiting(session.pk, number)
                said = [encode(chunk) for chunk in step.chunks]
                own = [
                    Frame.of(number(), self.origin, body, closes=closes and index == len(said))
                    for index, body in enumerate(said, start=1)
                ]
                if waiting:
                    log.append(session.pk, self._unlogged)
                    log.append(session.pk, own)
                else:
                    log.append(session.pk, [*self._unlogged, *own])
                if own and not closes:
                    Turn.mine(self.claim).update(settled_seq=own[-1].seq)
                if self.wants_numbers and not closes:
                    self._spare = _reserve(session)
        except BaseException:
            self._next, self._end, self._spare = numbers
            raise
        return result, [*waiting, *own]

    # --- the group commit's part ---

    @property
    def has_news(self) -> bool:
        return bool(self._unlogged) and not self.lock.locked()

    @property
    def wants_numbers(self) -> bool:
        return self._end - self._next < LOW and self._spare is None

    def logged(self, count: int, spare: tuple[int, int] | None) -> None:
        """The first `count` unlogged frames are in the log now, and perhaps there is a new block of numbers."""
        del self._unlogged[:count]
        self._spare = self._spare or spare

    # --- interruptions ---

    @asynccontextmanager
    async def interruptible(self, deadline: float) -> AsyncIterator[None]:
        """A stretch without database work that may be cut short: raises what it was interrupted with, or TimeIsUp."""
        if self._interruption:
            raise self._interruption
        try:
            async with asyncio.timeout_at(deadline) as self._scope:
                yield
        except TimeoutError:
            raise self._interruption or TimeIsUp from None
        finally:
            self._scope = None

    def interrupt(self, reason: Exception) -> None:
        self._interruption = self._interruption or reason
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())

    def nudge(self) -> None:
        """Somebody stored something: a frame to be numbered, a wish to cancel. Look as soon as possible."""
        self._nudged = True
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while self._nudged:
            self._nudged = False
            try:
                await self.commit(_facts)
            except (CancelRequested, LostClaim) as interruption:
                self.interrupt(interruption)


def _facts(step: Step) -> None:
    # Frames that wait for a number are numbered by any commit; only the wish to cancel has to be asked for.
    Turn.ensure_running(step.claim)


def _reserve(session: Session) -> tuple[int, int]:
    first = session.reserve_numbers(BLOCK)
    return first, first + BLOCK

"""The runner's end of a session's stream: it gives the numbers, and nothing but deltas is shown before its commit."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from django.db import transaction

from events_app import log
from events_app.chunks import Chunk, TurnFinished, encode
from events_app.database import hop
from events_app.feed import feed
from events_app.frames import Frame
from events_app.log import Fact
from sessions_app import lifecycle
from sessions_app.models import CancelRequested, Claim, LostClaim, Turn

logger = logging.getLogger(__name__)

BLOCK = 4_000
LOW = BLOCK // 4


class Step:
    """What one transaction of a running turn does: it says chunks, records facts, changes the turn, perhaps ends it.

    The session's row is locked. Chunks, facts and changes are written together when the step's function has returned.
    """

    def __init__(self, claim: Claim, turn: Turn) -> None:
        self.claim = claim
        self.turn = turn
        self.session = turn.session
        self.chunks: list[Chunk] = []
        self.facts: list[Fact] = []
        self.changes: dict[str, Any] = {}
        self.messages = 0  # so many more has the session now
        self.ending: Turn.Status | None = None

    def say(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def record(self, event_type: str, **data: Any) -> None:
        self.facts.append(lifecycle.fact(self.session, event_type, turn_id=self.turn.pk, **data))

    def change(self, **changes: Any) -> None:
        """Set columns of the turn."""
        self.changes |= changes
        for name, value in changes.items():
            setattr(self.turn, name, value)

    def end(self, status: Turn.Status, code: str = "") -> None:
        """The turn ends with this step, which is also the end of the answer that its followers read."""
        self.ending = status
        self.change(code=code)
        self.say(TurnFinished(str(self.turn.pk), status, code or None, self.turn.usage))

    def wait(self) -> None:
        """The turn waits for its open calls: the answer that its followers read ends here, the turn does not."""
        self.ending = Turn.Status.WAITING


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
        self._published = self._logged = claim.first_seq - 1
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
        if not self.has_shown(text):
            await self.commit(nothing)
            self._show(text)

    def has_shown(self, text: str) -> bool:
        """The same without waiting; whether that was possible."""
        if self._held is not None:
            # A commit is under way whose frames come first: followers read numbers in order.
            self._held.append(text)
        elif self._next < self._end or self._spare is not None:
            self._show(text)
        else:
            return False
        return True

    def _show(self, text: str) -> None:
        frame = Frame.delta(self._take(), self.origin, text)
        self._unlogged.append(frame)
        self._publish((frame,))

    def _publish(self, frames: Sequence[Frame]) -> None:
        feed.publish(self.session_id, frames, prev=self._published, logged=self._logged)
        self._published = frames[-1].seq

    def _take(self) -> int:
        if self._next >= self._end:
            if self._spare is None:
                raise RuntimeError("a turn's numbers were not reserved in time")
            (self._next, self._end), self._spare = self._spare, None
        self._next += 1
        return self._next - 1

    def last_given(self) -> int:
        return self._next - 1

    def unlogged(self) -> list[Frame]:
        return list(self._unlogged)

    # --- commits of steps ---

    async def commit(self, write: Callable[[Step], None]) -> Turn.Status | None:
        """Run `write` in one transaction with everything of this turn that is not logged yet and the chunks it says;
        publish those after the commit. Returns what became of the turn, None when it runs on.

        Raises LostClaim, CancelRequested or what `write` raises, with nothing written.
        """
        async with self.lock:
            self._held = []
            writing = asyncio.ensure_future(hop(self.write, write))
            try:
                await asyncio.shield(writing)
            finally:
                # The thread goes on when this task is cancelled, and uses the counters; what it commits is committed.
                while not writing.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([writing])
                if writing.exception() is None:
                    self._unlogged.clear()
                    self._logged = self._published
                    if frames := writing.result()[0]:
                        self._publish(frames)
                        self._logged = self._published
                held, self._held = "".join(self._held), None
                # Without numbers the commit has failed, and this claim will say nothing more.
                if held and (self._next < self._end or self._spare):
                    self._show(held)
            return writing.result()[1]

    def write(self, write: Callable[[Step], None]) -> tuple[list[Frame], Turn.Status | None]:
        """The transaction of `commit`, on a database thread; the frames it numbered, and what became of the turn."""
        reserved: list[tuple[int, int]] = []
        try:
            with transaction.atomic():
                return self._write_step(write, reserved)
        except BaseException:
            # A failed commit may have happened: no number that it gave is given again, gaps are normal. But a block
            # reserved in it may not be ours.
            if self._spare in reserved:
                self._spare = None
            if any(self._end == end for _, end in reserved):
                self._next = self._end
            raise

    def _write_step(
        self, write: Callable[[Step], None], reserved: list[tuple[int, int]]
    ) -> tuple[list[Frame], Turn.Status | None]:
        step = Step(self.claim, Turn.locked(self.claim))
        write(step)

        def reserve() -> None:
            first = step.session.reserve_numbers(BLOCK)
            self._spare = (first, first + BLOCK)
            reserved.append(self._spare)

        def number() -> int:
            if self.wants_numbers:
                reserve()
            return self._take()

        waiting = log.number_waiting(self.session_id, number)
        last = len(step.chunks)
        own = [
            Frame.of(number(), self.origin, encode(chunk), closes=step.ending is not None and index == last)
            for index, chunk in enumerate(step.chunks, start=1)
        ]
        if waiting:
            log.append(self.session_id, self._unlogged)
            log.append(self.session_id, own)
        else:
            log.append(self.session_id, [*self._unlogged, *own])
        log.record(*step.facts)
        if own:
            step.changes["settled_seq"] = own[-1].seq
        if step.ending is not None:
            if step.ending == Turn.Status.WAITING:
                Turn.wait(self.claim, **step.changes)
            else:
                Turn.finish(self.claim, step.ending, **step.changes)
            # Nobody saw the rest of the block: given back, a position in it is known for one that never was.
            _, end = self._spare or (self._next, self._end)
            step.session.leave(step.messages, own[-1].seq + 1, end)
        else:
            if step.changes:
                Turn.progress(self.claim, **step.changes)
            step.session.count_messages(step.messages)
        if self.wants_numbers and step.ending is None:
            reserve()
        return [*waiting, *own], step.ending

    # --- the group commit's part ---

    @property
    def has_news(self) -> bool:
        return bool(self._unlogged) and not self.lock.locked()

    @property
    def wants_numbers(self) -> bool:
        return self._end - self._next < LOW and self._spare is None

    def logged(self, count: int, spare: tuple[int, int] | None) -> None:
        """The first `count` unlogged frames are in the log now, and perhaps there is a new block of numbers."""
        self._logged = self._unlogged[count - 1].seq
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
            except Exception:
                # What was left stays; the renewal of the lease points to it again.
                logger.exception("look_failed", extra={"turn_id": self.origin})


def nothing(step: Step) -> None:
    """A commit for what it does by itself: logs what was shown, numbers what was left, reserves numbers."""


def _facts(step: Step) -> None:
    # Frames that wait for a number are numbered by any commit; only the wish to cancel has to be asked for.
    if step.turn.cancel_requested_at is not None:
        raise CancelRequested(f"turn {step.turn.pk} was cancelled")

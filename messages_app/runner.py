"""Who runs turns: what every runner does with those it has claimed, and the one on the web server's own event loop."""

import asyncio
import contextvars
import logging
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from django.conf import settings
from django.db import InterfaceError, OperationalError

from agents_app.llm import close_model, get_model
from events_app.clock import every
from events_app.database import hop, keep, read
from events_app.feed import feed
from messages_app import claims, steps
from messages_app.claims import Begun
from messages_app.engine import give_up, run_turn
from messages_app.steps import Scene
from messages_app.turn_stream import Stopping, TurnStream
from sessions_app import lifecycle, retention, unanswered
from sessions_app.models import Claim, LostClaim

logger = logging.getLogger(__name__)

# How long a turn whose wake-up got lost, or whose runner died, waits to be noticed beyond its lease.
POLL_SECONDS = 1.0
# How long a wish of another process (a cancelled turn, a frame to be numbered) waits when its wake-up got lost.
WISH_SECONDS = 0.5
PRUNE_SECONDS = 600.0
# How late the end of a call's time may be noticed.
DEADLINE_SECONDS = 1.0
# What waits when a worker starts it takes up in parts, so that workers that start together share it.
PART, PART_SECONDS = 250, 0.2
# So many messages that come together each have their turn claimed as they are stored.
TAKEN_AT_ONCE = 16
HAND_OVER_SECONDS = 8.0
HAND_OVER_PAUSE_SECONDS = 0.5


class Locked(Exception):
    """Somebody else had the session locked when its turn was to be claimed."""


class Runner:
    """Runs claimed turns; commits what they stream, renews what they hold, hands them over when the process stops."""

    def __init__(self) -> None:
        self.owner = f"{socket.gethostname()[:20]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.is_stopping = False
        self._streams: dict[uuid.UUID, TurnStream] = {}
        self._abandoned: list[Claim] = []
        self._given_up: dict[uuid.UUID, float] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._under_way: set[asyncio.Future[None]] = set()
        self._places = asyncio.Semaphore(settings.TURNS_AT_ONCE)
        # One claim at a time: how many suspects are on trial is read before another is claimed.
        self._claim_lock = asyncio.Lock()
        self._asked: list[tuple[str, asyncio.Future[Begun | None]]] = []
        self._claiming: asyncio.Task[None] | None = None
        self._clocks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        get_model()  # imports what it needs now, not while the first turns wait
        self._clocks = [
            asyncio.create_task(every(settings.STREAM_COMMIT_SECONDS, self._commit_deltas)),
            asyncio.create_task(every(settings.TURN_LEASE_RENEWAL_SECONDS, self._renew)),
            asyncio.create_task(every(settings.TURN_LEASE_RENEWAL_SECONDS, self._release_abandoned)),
            asyncio.create_task(every(WISH_SECONDS, self._look)),
        ]

    @property
    def is_alive(self) -> bool:
        return bool(self._clocks) and not any(clock.done() for clock in self._clocks)

    def begin_stopping(self) -> None:
        """Take no turn any more, and interrupt those that run: each is handed over by whoever runs it."""
        self.is_stopping = True
        for stream in self._streams.values():
            stream.interrupt(Stopping())

    async def stop(self) -> None:
        """Hand every running turn over, with what it has streamed, and end."""
        self.begin_stopping()
        with suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER_SECONDS):
                await self._hand_all_over()
        for task in [*self._clocks, *self._running]:
            task.cancel()
        await asyncio.gather(*self._clocks, *self._running, return_exceptions=True)
        await close_model()

    async def _hand_all_over(self) -> None:
        while waited_for := {*self._under_way, *self._running}:
            await asyncio.wait(waited_for)
        while self._abandoned:
            try:
                await self._release_abandoned()
            except (OperationalError, InterfaceError):
                # A database that restarts is back in time, or the leases of these turns have to run out.
                await asyncio.sleep(HAND_OVER_PAUSE_SECONDS)

    @contextmanager
    def _taking_up(self) -> Iterator[None]:
        """Around a claim, until what it took runs: a process that stops waits for it, and hands that over as well."""
        under_way: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._under_way.add(under_way)
        try:
            yield
        finally:
            self._under_way.discard(under_way)
            under_way.set_result(None)

    async def take_up_all(self) -> None:
        """Take up what waits already. A job names each of these turns too, but jobs are fetched one by one."""
        while not self.is_stopping:
            with self._taking_up():
                if not await self._take_up_part():
                    return
            await asyncio.sleep(PART_SECONDS)

    async def _take_up_part(self) -> bool:
        """Whether there was anything."""
        places = 0
        while places < PART and not self._places.locked():
            places += await self._places.acquire()
        begun: list[Begun] = []
        try:
            async with self._claim_lock:
                begun = await hop(claims.claim_turns, self.owner, places)
        finally:
            for _ in range(places - len(begun)):
                self._places.release()
        for each in begun:
            self._begin(each.claim.session_id, each)
        return bool(begun)

    async def take_up(self, session_id: str) -> None:
        """Claim the turn of a session that may run now, and run it, and those after it, in a task of their own. Waits
        for a place among TURNS_AT_ONCE.

        What is left when the process stops is told to another one.
        """
        with self._taking_up():
            await self._places.acquire()
            begun: Begun | None = None
            try:
                if self.is_stopping:
                    await _try(hop(lifecycle.wake_runner, session_id))
                else:
                    begun = await self._claim_in(session_id)
            finally:
                if begun is None:
                    self._places.release()
            if begun is not None:
                self._begin(session_id, begun)

    def _begin(self, session_id: str, begun: Begun) -> None:
        task = asyncio.create_task(_try(self._run_all(session_id, begun)))
        self._running.add(task)
        task.add_done_callback(self._left)

    async def _run_all(self, session_id: str, begun: Begun | None) -> None:
        while begun is not None:
            await self.run(begun)
            if self.is_stopping:
                await hop(lifecycle.wake_runner, session_id)
                return
            begun = await self._claim_in(session_id)

    def _left(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._places.release()

    async def finish(self) -> None:
        """Wait until nothing runs here any more."""
        while self._running:
            await asyncio.wait(self._running)

    async def _claim_in(self, session_id: str) -> Begun | None:
        """The session's turn that may run now, claimed together with those of all who ask in the meantime."""
        answer: asyncio.Future[Begun | None] = asyncio.get_running_loop().create_future()
        self._asked.append((session_id, answer))
        if self._claiming is None:
            self._claiming = asyncio.create_task(self._claim_asked())
        try:
            return await answer
        except Locked:
            return await hop(claims.claim_waiting, self.owner, session_id)

    async def _claim_asked(self) -> None:
        """While some turns are claimed the next ones gather: many cost little more than one."""
        while self._asked:
            asked, self._asked = self._asked[: claims.CLAIMS_AT_ONCE], self._asked[claims.CLAIMS_AT_ONCE :]
            try:
                async with self._claim_lock:
                    begun, locked = await hop(claims.claim_in, self.owner, [session_id for session_id, _ in asked])
            except Exception as error:
                for _, answer in asked:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for session_id, answer in asked:
                turn = begun.pop(session_id, None)
                if not answer.done():
                    if session_id in locked:
                        answer.set_exception(Locked())
                    else:
                        answer.set_result(turn)
                elif turn is not None:
                    self._abandoned.append(turn.claim)  # who asked was cancelled
        self._claiming = None

    async def run(self, begun: Begun) -> None:
        """Run a turn that this runner has claimed."""
        claim, frames, opening = begun
        if (lost := self._streams.get(claim.turn_id)) is not None:
            # Taken over within this process: the earlier run still works on it and does not know yet.
            lost.interrupt(LostClaim(f"turn {lost.origin} was taken over"))
        stream = self._streams[claim.turn_id] = TurnStream(claim)
        if self.is_stopping:
            stream.interrupt(Stopping())
        settled = False
        try:
            with feed.writing(claim.session_id, stream):
                if frames:
                    # All before them is logged.
                    before = frames[0].seq - 1
                    feed.publish(claim.session_id, frames, prev=before, logged=before)
                settled = await self._run_to_its_end(claim, stream, opening)
        finally:
            if self._streams.get(claim.turn_id) is stream:
                del self._streams[claim.turn_id]
            if not settled:
                # What was shown may not be what is stored: followers go by the log.
                feed.poke(claim.session_id)

    async def _run_to_its_end(self, claim: Claim, stream: TurnStream, opening: list[Scene]) -> bool:
        """Run a claimed turn until it ends, waits, or is left to somebody else; whether what became of it is stored."""
        ids = {"turn_id": str(claim.turn_id), "session_id": claim.session_id, "attempt": claim.attempt}
        try:
            outcome = await run_turn(stream, get_model(), opening)
        except LostClaim:
            logger.warning("turn_lost", extra=ids)
        except Stopping:
            await self._hand_over(stream, ids)
        except (OperationalError, InterfaceError):
            # Whether the last write counts is unknown. It is released, and the next claim sees what is stored.
            logger.exception("turn_abandoned", extra=ids)
            self._abandoned.append(claim)
        except Exception:
            logger.exception("turn_failed", extra=ids)
            self._given_up[claim.turn_id] = time.monotonic()  # should even this fail
            await _try(give_up(stream))
        else:
            logger.info("turn_left", extra={**ids, "outcome": outcome})
            return True
        return False

    async def _hand_over(self, stream: TurnStream, ids: dict[str, Any]) -> None:
        """Log what was shown, and let somebody else take the turn at once."""
        try:
            await stream.commit(steps.release)
        except (OperationalError, InterfaceError):
            logger.exception("turn_abandoned", extra=ids)
            self._abandoned.append(stream.claim)
        except Exception:
            self._given_up[stream.claim.turn_id] = time.monotonic()
            logger.exception("turn_not_ended", extra=ids)
        else:
            logger.info("turn_handed_over", extra=ids)

    async def _commit_deltas(self) -> None:
        streams = [stream for stream in self._streams.values() if stream.has_news]
        if not streams:
            return
        held: list[TurnStream] = []
        try:
            for stream in streams:
                await stream.lock.acquire()
                held.append(stream)
            # A commit of its own may have been faster.
            streams = [stream for stream in streams if stream.unlogged()]
            parts = [claims.Unlogged(s.claim, s.unlogged(), s.wants_numbers) for s in streams]
            logged = await hop(claims.write_batches, self.owner, parts) if parts else {}
            for stream, part in zip(streams, parts, strict=True):
                if stream.claim.turn_id in logged:
                    stream.logged(len(part.frames), logged[stream.claim.turn_id])
                else:
                    stream.interrupt(LostClaim(f"turn {stream.origin} was taken over"))
        finally:
            for stream in held:
                stream.lock.release()

    async def _renew(self) -> None:
        forgotten = time.monotonic() - 2 * settings.TURN_LEASE_SECONDS
        self._given_up = {turn_id: when for turn_id, when in self._given_up.items() if when > forgotten}
        await keep(claims.renew_leases, self.owner, list(self._streams), list(self._given_up))

    async def _look(self) -> None:
        """Learn of what others have left to this runner's turns and could not tell it."""
        if self._streams:
            for session_id in await read(claims.wishes, self.owner):
                feed.look(session_id)

    async def _release_abandoned(self) -> None:
        """As soon as the database is back: this runner lives, and an outage must not look like its death."""
        while self._abandoned:
            claim = self._abandoned.pop()
            try:
                await hop(claims.release, claim)
            except LostClaim:
                continue  # ended after all, or taken over
            except BaseException:
                self._abandoned.append(claim)
                raise


class EmbeddedRunner(Runner):
    """Claims whatever turn may run, for itself alone; ends calls whose time is over, and prunes what is old."""

    def __init__(self) -> None:
        super().__init__()
        self._wake = asyncio.Event()
        self._loop, self._context = asyncio.get_running_loop(), contextvars.copy_context()
        self._taking = 0  # so many messages are being stored whose turns it takes
        # While others wait for a place, new ones are not taken first.
        self._has_backlog = True

    @contextmanager
    def taking(self) -> Iterator["EmbeddedRunner | None"]:
        """Around the acceptance of a message: this runner, if it may claim the turn in the same transaction.

        It begins sooner so. Of a crowd it is cheaper to claim many at once, and the last of it begins sooner.
        """
        self._has_backlog = self._has_backlog or not self._room
        if self._has_backlog or self._taking == TAKEN_AT_ONCE:
            yield None
            return
        self._taking += 1
        try:
            with self._taking_up():
                yield self
        finally:
            self._taking -= 1

    def take_new(self, begun: Begun) -> None:
        # Not in the context of the request, whose id all that the turn logs would carry.
        self._loop.call_soon_threadsafe(self._start, begun, context=self._context)

    def abandon(self, begun: Begun) -> None:
        self._loop.call_soon_threadsafe(self._abandoned.append, begun.claim)

    @property
    def _room(self) -> int:
        return max(settings.TURNS_AT_ONCE - len(self._running) - self._taking, 0)

    def _start(self, begun: Begun) -> None:
        task = asyncio.create_task(self.run(begun))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def wake(self) -> None:
        """A turn may be ready to run."""
        self._wake.set()

    def start(self) -> None:
        super().start()
        self._clocks += [
            asyncio.create_task(self._claim_for_ever()),
            asyncio.create_task(every(DEADLINE_SECONDS, end_overdue_calls)),
            asyncio.create_task(every(PRUNE_SECONDS, prune)),
        ]
        here.runner = self

    def begin_stopping(self) -> None:
        super().begin_stopping()
        here.runner = None
        self.wake()

    async def _claim_for_ever(self) -> None:
        while not self.is_stopping:
            self._wake.clear()
            with self._taking_up():
                claimed = await self._claim_some()
            if not claimed:
                await _wait(self._wake, POLL_SECONDS)

    async def _claim_some(self) -> bool:
        """Whether there was anything."""
        claimed: list[Begun] = []
        if room := self._room:
            try:
                claimed = await hop(claims.claim_turns, self.owner, room)
                self._has_backlog = len(claimed) == room
            except Exception:
                logger.exception("claim_failed")
        for begun in claimed:
            self._start(begun)
        return bool(claimed)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.wake()  # the session's next turn may be ready


class Here:
    """The runner of this process that takes new turns, if there is one."""

    def __init__(self) -> None:
        self.runner: EmbeddedRunner | None = None

    def taking(self) -> AbstractContextManager[EmbeddedRunner | None]:
        return self.runner.taking() if self.runner is not None else nullcontext()


here = Here()


async def end_overdue_calls() -> None:
    """End the calls that got no result in their time, each session's in a transaction of its own."""
    while await hop(unanswered.end_overdue) == unanswered.SESSIONS_AT_ONCE:
        pass


async def prune() -> None:
    """Forget what is older than it is kept, in transactions of bounded size."""
    while await hop(retention.prune_streams) == retention.SESSIONS_AT_ONCE:
        pass
    while await hop(retention.prune_records) == retention.RECORDS_AT_ONCE:
        pass


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


async def _try(attempt: Awaitable[Any]) -> None:
    try:
        await attempt
    except Exception:
        logger.exception("turn_not_ended")

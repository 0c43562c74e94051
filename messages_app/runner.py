"""The embedded runner: turns as tasks on the web server's own event loop."""

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from django.conf import settings
from django.db import InterfaceError, OperationalError

from agents_app.llm import close_model, get_model
from events_app.database import hop
from events_app.feed import feed
from events_app.frames import Frame
from messages_app import claims
from messages_app.engine import give_up, run_turn
from messages_app.turn_stream import Stopping, TurnStream, nothing
from sessions_app import retention
from sessions_app.models import Claim, LostClaim

logger = logging.getLogger(__name__)

# How long a turn whose wake-up got lost, or whose runner died, waits to be noticed beyond its lease.
POLL_SECONDS = 1.0
PRUNE_SECONDS = 600.0


class EmbeddedRunner:
    """Claims turns and runs them; commits what they stream, renews what they hold, prunes what is old."""

    def __init__(self) -> None:
        self.owner = f"{socket.gethostname()[:20]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._wake = asyncio.Event()
        self._streams: dict[uuid.UUID, TurnStream] = {}
        self._turns: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        get_model()  # imports what it needs now, not while the first turns wait
        feed.attach(asyncio.get_running_loop(), on_wake=self._wake.set)
        self._loops = [
            asyncio.create_task(self._claim_for_ever()),
            asyncio.create_task(_every(settings.STREAM_COMMIT_SECONDS, self._commit_deltas)),
            asyncio.create_task(_every(settings.TURN_LEASE_RENEWAL_SECONDS, self._renew)),
            # Well within the longest silence that is promised: a beat may come late.
            asyncio.create_task(_every(settings.STREAM_HEARTBEAT_SECONDS * 2 / 3, _heartbeat)),
            asyncio.create_task(_every(PRUNE_SECONDS, _prune)),
        ]

    @property
    def is_alive(self) -> bool:
        return bool(self._loops) and not any(loop.done() for loop in self._loops)

    async def stop(self) -> None:
        """Hand every running turn over, with what it has streamed, and end."""
        self._loops[0].cancel()
        for stream in self._streams.values():
            stream.interrupt(Stopping())
        if self._turns:
            await asyncio.wait(self._turns, timeout=5)
        for task in [*self._loops, *self._turns]:
            task.cancel()
        await asyncio.gather(*self._loops, *self._turns, return_exceptions=True)
        feed.detach()
        await close_model()

    async def _claim_for_ever(self) -> None:
        while True:
            self._wake.clear()
            claimed: list[tuple[Claim, list[Frame]]] = []
            if room := max(settings.TURNS_AT_ONCE - len(self._turns), 0):
                try:
                    claimed = await hop(claims.claim_turns, self.owner, room)
                except Exception:
                    logger.exception("claim_failed")
            for claim, frames in claimed:
                task = asyncio.create_task(self._run(claim, frames))
                self._turns.add(task)
                task.add_done_callback(self._turns.discard)
            if not claimed:
                await _wait(self._wake, POLL_SECONDS)

    async def _run(self, claim: Claim, frames: list[Frame]) -> None:
        if (lost := self._streams.get(claim.turn_id)) is not None:
            # Taken over within this process: the earlier run still works on it and does not know yet.
            lost.interrupt(LostClaim(f"turn {lost.origin} was taken over"))
        stream = self._streams[claim.turn_id] = TurnStream(claim)
        settled = False
        try:
            with feed.writing(claim.session_id, stream):
                feed.publish(claim.session_id, frames)
                settled = await self._run_to_its_end(claim, stream)
        finally:
            if self._streams.get(claim.turn_id) is stream:
                del self._streams[claim.turn_id]
            if not settled:
                # What was shown may not be what is stored: followers go by the log.
                feed.poke(claim.session_id)
            self._wake.set()  # the session's next turn may be ready

    async def _run_to_its_end(self, claim: Claim, stream: TurnStream) -> bool:
        """Run a claimed turn until it ends, waits, or is left to somebody else; whether what became of it is stored."""
        ids = {"turn_id": str(claim.turn_id), "session_id": claim.session_id, "attempt": claim.attempt}
        try:
            outcome = await run_turn(stream, get_model())
        except LostClaim:
            logger.warning("turn_lost", extra=ids)
        except Stopping:
            await _try(_hand_over(stream))
            logger.info("turn_handed_over", extra=ids)
        except (OperationalError, InterfaceError):
            # Whether the last write counts is unknown. The lease runs out, and the next claim sees what is stored.
            logger.exception("turn_abandoned", extra=ids)
        except Exception:
            logger.exception("turn_failed", extra=ids)
            await _try(give_up(stream))
        else:
            logger.info("turn_left", extra={**ids, "outcome": outcome})
            return True
        return False

    async def _commit_deltas(self) -> None:
        streams = [stream for stream in self._streams.values() if stream.has_news]
        if not streams:
            return
        async with AsyncExitStack() as locks:
            for stream in streams:
                await locks.enter_async_context(stream.lock)
            # A commit of its own may have been faster.
            streams = [stream for stream in streams if stream.unlogged()]
            parts = [claims.Unlogged(s.claim, s.unlogged(), s.wants_numbers) for s in streams]
            logged = await hop(claims.write_batches, self.owner, parts) if parts else {}
            for stream, part in zip(streams, parts, strict=True):
                if stream.claim.turn_id in logged:
                    stream.logged(len(part.frames), logged[stream.claim.turn_id])
                else:
                    stream.interrupt(LostClaim(f"turn {stream.origin} was taken over"))

    async def _renew(self) -> None:
        if self._streams:
            for session_id in await hop(claims.renew_leases, self.owner, list(self._streams)):
                feed.poke(session_id)


async def _hand_over(stream: TurnStream) -> None:
    """Log what was shown, and let somebody else take the turn at once."""
    await stream.commit(nothing)
    await hop(claims.give_back, stream.claim)


async def _heartbeat() -> None:
    await feed.heartbeat()


async def _prune() -> None:
    while await hop(retention.prune_streams) == retention.SESSIONS_AT_ONCE:
        pass


async def _every(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await act()
        except Exception:
            logger.exception("clock_work_failed", extra={"work": act.__name__})


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

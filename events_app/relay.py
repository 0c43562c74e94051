"""What one process tells the others: frames, wake-ups, ends. On the Channels layer, which may lose everything.

The layer makes frames fast, the log makes them certain: twice a second each process looks for what its followers have
not seen, so that nothing waits longer than that when the layer is away.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from channels.layers import get_channel_layer
from django.conf import settings

from events_app.clock import every
from events_app.database import read
from events_app.feed import Batch, feed
from events_app.frames import Frame

logger = logging.getLogger(__name__)

GROUP = "countersign"
LOOK_SECONDS = 0.5
SESSIONS_AT_ONCE = 500
# What cannot be sent in this time is not worth sending: the log has it sooner.
SEND_SECONDS = 1.0
REST_SECONDS = 1.0
# Between two messages: each costs everybody much, and a frame in it little.
GATHER_SECONDS = 0.002
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 3 * BEAT_SECONDS
FRAMES_AT_ONCE = 2_000
FRAMES_WAITING = 20_000

# Of some sessions: the id, the number of the last frame in the log, whether the session is gone.
Newest = Callable[[Sequence[str]], Sequence[tuple[str, int, bool]]]


class Relay:
    """One process's end of the layer. Everything here happens on the loop of the feed.

    All processes are in one group, and each hears all of it: frames of many sessions are packed into one message, which
    costs less than a subscription and a message for each of them (docs/decisions.md).
    """

    def __init__(self, newest: Newest) -> None:
        self._newest = newest
        self._me = uuid.uuid4().hex
        self._batches: list[tuple[str, Batch]] = []
        self._waiting = 0
        self._pokes: set[str] = set()
        self._ends: set[str] = set()
        self._something = asyncio.Event()
        self._is_away = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(every(LOOK_SECONDS, self._look))]
        if settings.REDIS_URL:
            feed.relay = self
            self._tasks += [
                asyncio.create_task(self._send_for_ever()),
                asyncio.create_task(self._hear_for_ever()),
                asyncio.create_task(every(BEAT_SECONDS, self._beat)),
            ]

    async def stop(self) -> None:
        """What is still waiting here is sent; the rest is left to the log."""
        if settings.REDIS_URL and not self._is_away:
            with suppress(Exception):
                await self._send()
        feed.relay = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if settings.REDIS_URL:
            with suppress(Exception):
                async with asyncio.timeout(SEND_SECONDS):
                    await get_channel_layer().flush()

    @property
    def state(self) -> str:
        """`ok`, `away`, or `memory` where frames do not leave the process."""
        if not settings.REDIS_URL:
            return "memory"
        return "away" if self._is_away else "ok"

    # --- what this process says ---

    def carry(self, session_id: str, batch: Batch) -> None:
        if self._is_away:
            return
        if self._waiting > FRAMES_WAITING:
            self._forget()  # others find it in the log
        self._batches.append((session_id, batch))
        self._waiting += len(batch.frames)
        self._something.set()

    def poke(self, session_id: str) -> None:
        self._pokes.add(session_id)
        self._something.set()

    def close(self, session_id: str) -> None:
        self._ends.add(session_id)
        self._something.set()

    def _forget(self) -> None:
        self._batches.clear()
        self._waiting = 0

    async def _send_for_ever(self) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            try:
                # While one message is on its way the next one fills, and a little longer: they grow with the load.
                while self._batches or self._pokes or self._ends:
                    await self._send()
                    await asyncio.sleep(GATHER_SECONDS)
            except Exception as error:
                self._forget()
                self._pokes.clear()
                self._ends.clear()
                self._lose(type(error).__name__)
                await asyncio.sleep(REST_SECONDS)

    async def _send(self) -> None:
        batches, self._batches = self._batches[:FRAMES_AT_ONCE], self._batches[FRAMES_AT_ONCE:]
        self._waiting -= sum(len(batch.frames) for _, batch in batches)
        pokes, self._pokes = self._pokes, set()
        ends, self._ends = self._ends, set()
        message = {
            "type": "relay",
            "from": self._me,
            "batches": [_packed(session_id, batch) for session_id, batch in batches],
            "pokes": list(pokes),
            "ends": list(ends),
        }
        async with asyncio.timeout(SEND_SECONDS):
            await get_channel_layer().group_send(GROUP, message)

    # --- what this process hears ---

    async def _hear_for_ever(self) -> None:
        layer = get_channel_layer()
        while True:
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    channel = await layer.new_channel()
                    await layer.group_add(GROUP, channel)
                while True:
                    async with asyncio.timeout(SILENCE_SECONDS):
                        self._hear(await layer.receive(channel))
            except Exception as error:
                # Not even the beats of this process come back. Begin anew, with new connections.
                self._lose(type(error).__name__)
                with suppress(Exception):
                    async with asyncio.timeout(SEND_SECONDS):
                        await layer.flush()
                await asyncio.sleep(REST_SECONDS)

    def _hear(self, message: dict[str, Any]) -> None:
        if self._is_away:
            self._is_away = False
            logger.info("layer_back")
        if message["from"] == self._me:
            return
        for session_id, *packed in message["batches"]:
            if feed.is_followed(session_id):
                feed.deliver(session_id, _unpacked(*packed))
        for session_id in message["pokes"]:
            feed.look(session_id)
        for session_id in message["ends"]:
            feed.end(session_id)

    async def _beat(self) -> None:
        """Say something every now and then, so that silence means that the layer is away."""
        self.poke("")

    def _lose(self, reason: str) -> None:
        if not self._is_away:
            self._is_away = True
            # The reason by its name alone: its text may hold the address with its password.
            logger.warning("layer_away", extra={"setting": "REDIS_URL", "reason": reason})

    # --- what nobody has told this process ---

    async def _look(self) -> None:
        positions = feed.followed()
        sessions = list(positions)
        for start in range(0, len(sessions), SESSIONS_AT_ONCE):
            for session_id, last, is_gone in await read(self._newest, sessions[start : start + SESSIONS_AT_ONCE]):
                if is_gone:
                    feed.end(session_id)
                elif last > positions[session_id]:
                    feed.look(session_id)


def _packed(session_id: str, batch: Batch) -> tuple[Any, ...]:
    frames = [(frame.seq, frame.origin, frame.wire, frame.is_delta, frame.closes) for frame in batch.frames]
    return session_id, batch.prev, batch.logged, frames


def _unpacked(prev: int, logged: int, frames: list[list[Any]]) -> Batch:
    return Batch([Frame(*frame) for frame in frames], prev, logged)

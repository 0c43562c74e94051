"""Whether this process can serve: what load balancers ask every few seconds, and anybody may."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

from django.db import connection

from events_app.database import read
from sessions_app.models import Session

logger = logging.getLogger(__name__)

READY, DEGRADED, UNAVAILABLE = "ready", "degraded", "unavailable"
OK, MEMORY, MISSING, NO_ANSWER, STOPPING = "ok", "memory", "missing", "no_answer", "stopping"
PATIENCE_SECONDS = 2.0
FRESH_SECONDS = 1.0


class Probe:
    """Asks how a part is at most once at a time and once a second, however many want to know, and has nobody wait for
    longer than PATIENCE_SECONDS.

    `ask` returns one word; what it raises means that the part is unavailable.
    """

    def __init__(self, ask: Callable[[], Awaitable[str]]) -> None:
        self._ask = ask
        self._asking: asyncio.Task[str] | None = None
        self._since = 0.0
        self._was_well = True

    async def word(self) -> str:
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._since >= FRESH_SECONDS):
            self._since = now
            self._asking = asyncio.create_task(self._safely())
        if not self._asking.done():
            await asyncio.wait([self._asking], timeout=max(self._since + PATIENCE_SECONDS - now, 0))
        return self._asking.result() if self._asking.done() else NO_ANSWER

    async def _safely(self) -> str:
        try:
            word = await self._ask()
        except Exception:
            if self._was_well:
                logger.exception("probe_failed", extra={"probe": self._ask.__name__})
            self._was_well = False
            return UNAVAILABLE
        self._was_well = True
        return word


class Readiness:
    """What is said of each part, and of all together.

    Without its database, or on its way out, a process serves nothing. Whatever else is away makes it slower or leaves
    some of the work to others, so it is named and the process goes on being asked.
    """

    def __init__(self) -> None:
        self.probes = {"database": Probe(database), "runner": Probe(nothing), "layer": Probe(nothing)}
        self.is_stopping = False

    async def look(self) -> dict[str, str]:
        words = await asyncio.gather(*(probe.word() for probe in self.probes.values()))
        parts = dict(zip(self.probes, words, strict=True))
        if self.is_stopping:
            parts["runner"] = STOPPING
        return {"status": _status(parts), **parts}


def _status(parts: dict[str, str]) -> str:
    if parts["database"] != OK or parts["runner"] == STOPPING:
        return UNAVAILABLE
    return READY if set(parts.values()) <= {OK, MEMORY} else DEGRADED


async def database() -> str:
    await read(_read_something)
    return OK


def _read_something() -> None:
    if connection.vendor != "sqlite":
        Session.objects.exists()
        return
    # A connection that is kept goes on reading a file that was deleted, and pages that it has in memory.
    file = Path(connection.settings_dict["NAME"]).resolve().as_uri()
    with closing(sqlite3.connect(f"{file}?mode=ro", uri=True, timeout=PATIENCE_SECONDS)) as fresh:
        fresh.execute(f"SELECT 1 FROM {Session._meta.db_table} LIMIT 1").fetchone()  # noqa: S608 (a name of ours)


async def nothing() -> str:
    """Until the process has started what it asks about."""
    return MISSING


readiness = Readiness()

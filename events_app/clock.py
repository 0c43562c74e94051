"""Work that comes back every so often on a process's event loop, and the end that comes in any case."""

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

END_SECONDS = 25.0


async def every(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    """Call `act` for ever, with this long a pause between its end and its next beginning; a failure is logged."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await act()
        except Exception:
            logger.exception("clock_work_failed", extra={"work": act.__name__})


def end_in_time() -> None:
    """See to it that a process that was told to end does, whatever hangs: a database that is frozen holds its threads.

    What it leaves behind is what a process leaves that was killed.
    """
    last = threading.Timer(END_SECONDS, os._exit, [1])
    last.daemon = True
    last.start()

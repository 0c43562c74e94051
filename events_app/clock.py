"""Work that comes back every so often on a process's event loop."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


async def every(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    """Call `act` for ever, with this long a pause between its end and its next beginning; a failure is logged."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await act()
        except Exception:
            logger.exception("clock_work_failed", extra={"work": act.__name__})

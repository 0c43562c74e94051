"""Waiting for a server that is gone: longer and longer, said once, and not for ever."""

import asyncio
import random
import time

from messages_app.terminal.connection import Unreachable
from messages_app.terminal.screen import Screen

FIRST_DELAY, LONGEST_DELAY = 0.2, 5.0
PATIENCE_SECONDS = 300


class GaveUp(Exception):
    """The server did not come back."""


class Patience:
    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._delay = FIRST_DELAY
        self._since: float | None = None

    async def wait(self, trouble: Unreachable) -> None:
        """Raises GaveUp."""
        if self._since is None:
            self._since = time.monotonic()
            self._screen.line(f"[Lost the server: {trouble}. Trying again.]", "attention")
        elif time.monotonic() - self._since > PATIENCE_SECONDS:
            raise GaveUp(f"The server did not come back: {trouble}.")
        await asyncio.sleep(self._delay * random.uniform(0.8, 1.2))  # noqa: S311 (so that not all come at once)
        self._delay = min(2 * self._delay, LONGEST_DELAY)

    def over(self) -> None:
        if self._since is not None:
            self._screen.line("[Connected again.]", "quiet")
        self._since, self._delay = None, FIRST_DELAY

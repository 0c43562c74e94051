"""Whether new work is taken. While what came earlier still waits to begin, more of it is refused before it costs much.

Without that everybody is as late as the last one: at three times what a process can do for 12 s, the last began after
17 s. A crowd that comes in one moment is another thing: it is taken as a whole, and worked off.
"""

import time
from collections import deque

from django.conf import settings

from events_app.database import held_up_until
from orchestrator_site.errors import Unavailable

# So many in so short a time are a crowd, of which not more than this comes until it has been worked off.
CROWD = 150
CROWD_SECONDS = 0.1
LONGEST_CROWD_SECONDS = 3.0
# How fast those who wait begin is judged by so long a time, at most and at least.
PACE_SECONDS, LEAST_PACE_SECONDS = 2.0, 0.25
# Turns begin in groups: of fewer than this no pace is made.
LEAST_BEGUN = 32


class Overloaded(Unavailable):
    code = "overloaded"


class Entrance:
    """Where messages wait for this process to begin their turns."""

    def __init__(self) -> None:
        # In the order of their coming, and since when.
        self._waiting: dict[Newcomer, float] = {}
        self._arrivals: deque[float] = deque(maxlen=CROWD)
        self._crowd_since: float | None = None
        self._begun: deque[float] = deque()
        self._busy_since = 0.0

    def admit(self, arrived_at: float | None, now: float | None = None) -> "Newcomer":
        """Raises Overloaded when others came OVERLOAD_SECONDS before, and still wait; or when so many wait that it will
        take as long until the last of them has begun.

        For a database that is locked or does not answer everybody waits, which is none of the load's doing.
        """
        now = time.monotonic() if now is None else now
        arrived_at = arrived_at or now
        self._arrivals.append(arrived_at)
        first = next(iter(self._waiting.values()), arrived_at)
        has_waited = arrived_at - max(first, held_up_until())
        is_late = max(has_waited, self._will_wait(now)) > settings.OVERLOAD_SECONDS
        if is_late and not self._is_of_a_crowd(arrived_at):
            raise Overloaded("This server has more to do than it can.", Retry_After="1")
        newcomer = Newcomer(self)
        if not self._waiting:
            self._busy_since = now
        self._waiting[newcomer] = now
        return newcomer

    def leave(self, newcomer: "Newcomer", *, begun_at: float | None = None) -> None:
        if self._waiting.pop(newcomer, None) is not None and begun_at is not None:
            self._begun.append(begun_at)
        if not self._waiting:
            self._crowd_since = None

    def _will_wait(self, now: float) -> float:
        """How long those who wait now will take, at the pace of late; 0 as long as nobody knows."""
        since = max(self._busy_since, held_up_until(), now - PACE_SECONDS)
        while self._begun and self._begun[0] < since:
            self._begun.popleft()
        if len(self._begun) < LEAST_BEGUN or now - since < max(LEAST_PACE_SECONDS, settings.OVERLOAD_SECONDS / 2):
            return 0.0
        return len(self._waiting) * (now - since) / len(self._begun)

    def _is_of_a_crowd(self, arrived_at: float) -> bool:
        if len(self._arrivals) < CROWD or arrived_at - self._arrivals[0] > CROWD_SECONDS:
            return False
        if self._crowd_since is None:
            self._crowd_since = arrived_at
        return arrived_at - self._crowd_since < LONGEST_CROWD_SECONDS


class Newcomer:
    def __init__(self, entrance: Entrance) -> None:
        self._entrance = entrance

    def has_begun(self, now: float | None = None) -> None:
        self._entrance.leave(self, begun_at=time.monotonic() if now is None else now)

    def has_left(self) -> None:
        """Or waits for something else than this process."""
        self._entrance.leave(self)


entrance = Entrance()

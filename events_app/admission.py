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
CROWD_SECONDS = 0.25
LONGEST_CROWD_SECONDS = 3.0


class Overloaded(Unavailable):
    code = "overloaded"


class Entrance:
    """Where messages wait for this process to begin their turns."""

    def __init__(self) -> None:
        # In the order of their coming, and since when.
        self._waiting: dict[Newcomer, float] = {}
        self._arrivals: deque[float] = deque(maxlen=CROWD)
        self._crowd_since: float | None = None

    def admit(self, arrived_at: float | None) -> "Newcomer":
        """Raises Overloaded when others came OVERLOAD_SECONDS before, and still wait.

        For a database that is locked or does not answer everybody waits, which is none of the load's doing.
        """
        now = time.monotonic()
        arrived_at = arrived_at or now
        self._arrivals.append(arrived_at)
        first = next(iter(self._waiting.values()), arrived_at)
        is_late = arrived_at - max(first, held_up_until()) > settings.OVERLOAD_SECONDS
        if is_late and not self._is_of_a_crowd(arrived_at):
            raise Overloaded("This server has more to do than it can.", Retry_After="1")
        newcomer = Newcomer(self)
        self._waiting[newcomer] = now
        return newcomer

    def leave(self, newcomer: "Newcomer") -> None:
        self._waiting.pop(newcomer, None)
        if not self._waiting:
            self._crowd_since = None

    def _is_of_a_crowd(self, arrived_at: float) -> bool:
        if len(self._arrivals) < CROWD or arrived_at - self._arrivals[0] > CROWD_SECONDS:
            return False
        if self._crowd_since is None:
            self._crowd_since = arrived_at
        return arrived_at - self._crowd_since < LONGEST_CROWD_SECONDS


class Newcomer:
    def __init__(self, entrance: Entrance) -> None:
        self._entrance = entrance

    def has_begun(self) -> None:
        """Or has left."""
        self._entrance.leave(self)


entrance = Entrance()

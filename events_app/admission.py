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
# Who waits, in the order of their coming, and since when.
_waiting: dict["Newcomer", float] = {}
_arrivals: deque[float] = deque(maxlen=CROWD)
_crowd_since: float | None = None


class Overloaded(Unavailable):
    code = "overloaded"


class Newcomer:
    """Work that waits for this process to begin it. Raises Overloaded when others came OVERLOAD_SECONDS before it, and
    still wait. For a database that is locked or does not answer everybody waits, which is none of the load's doing.
    """

    def __init__(self, arrived_at: float | None) -> None:
        now = time.monotonic()
        arrived_at = arrived_at or now
        first = next(iter(_waiting.values()), now)
        _arrivals.append(arrived_at)
        is_late = arrived_at - max(first, held_up_until()) > settings.OVERLOAD_SECONDS
        if is_late and not _is_of_a_crowd(arrived_at):
            raise Overloaded("This server has more to do than it can.", Retry_After="1")
        _waiting[self] = now

    def has_begun(self) -> None:
        global _crowd_since
        _waiting.pop(self, None)
        if not _waiting:
            _crowd_since = None


def _is_of_a_crowd(arrived_at: float) -> bool:
    global _crowd_since
    if len(_arrivals) < CROWD or arrived_at - _arrivals[0] > CROWD_SECONDS:
        return False
    if _crowd_since is None:
        _crowd_since = arrived_at
    return arrived_at - _crowd_since < LONGEST_CROWD_SECONDS

"""Where a reader of a whole session's stream begins."""

import re
from dataclasses import dataclass

from events_app import log
from events_app.chunks import StreamReset, encode
from events_app.frames import Frame
from orchestrator_site.errors import BadRequest
from sessions_app import lifecycle
from sessions_app.callers import Caller
from sessions_app.models import Session


@dataclass(frozen=True, slots=True)
class Start:
    """The number past which a reader goes on; the reset to be shown first when what it asked for is gone or never was.

    `is_known` says whether there is such a session, and so whose it is.
    """

    after: int
    reset: Frame | None = None
    is_known: bool = True


def position(raw: str) -> int:
    """A position as clients write it. Raises BadRequest."""
    if not re.fullmatch("[0-9]{1,18}", raw):
        raise BadRequest("A position in the stream is a number.")
    return int(raw)


def resumed(caller: Caller, session_id: str, asked: int, last_given: int | None) -> Start:
    """Where a reader goes on that has read up to `asked`; 0 is the oldest frame that is kept. Raises UnknownSession.

    While a runner gives the numbers (the last one so far: `last_given`), those of its block that are still to come are
    among the reserved ones and never were all the same.
    """
    session = Session.objects.one_visible_to(caller, session_id)
    highest = session.next_seq - 1 if last_given is None else last_given
    if asked == 0 or session.pruned_seq <= asked <= highest:
        return Start(asked)
    return _reset(_oldest(session))


def lost(caller: Caller, session_id: str, after: int) -> Frame | None:
    """What whoever asks once more for an answer past `after` is shown in its place, when it is not all kept any more.

    Raises UnknownSession.
    """
    session = Session.objects.one_visible_to(caller, session_id)
    return _reset(_oldest(session)).reset if after < session.pruned_seq else None


def joined(caller: Caller, session_id: str, asked: int | None, last_given: int | None) -> Start:
    """The same for a client that talks to the session too, which makes one that is not there yet by its first message.

    Without a position it begins with what is said from now on; of a step that is under way, with its beginning. Raises
    UnknownSession for a deleted one and for another account's.
    """
    if not Session.objects.filter(pk=session_id).exists():
        return _reset(1, is_known=False) if asked else Start(0, is_known=False)
    if asked is not None:
        return resumed(caller, session_id, asked, last_given)
    after, _ = lifecycle.rejoining(Session.objects.one_visible_to(caller, session_id))
    return Start(after)


def _oldest(session: Session) -> int:
    return log.oldest_kept(session.pk) or session.next_seq


def _reset(oldest: int, *, is_known: bool = True) -> Start:
    return Start(oldest - 1, Frame.of(oldest - 1, "", encode(StreamReset(oldest))), is_known)

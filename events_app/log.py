"""The only writers of events, audit entries and stream batches, and the reader of the stream log."""

import logging
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any, NamedTuple

from django.db import DatabaseError
from django.db.models import Max
from django.db.models.constants import OnConflict
from django.utils import timezone

from events_app import ids
from events_app.frames import Frame
from events_app.models import AuditEntry, Event, StreamBatch
from events_app.prepared import Insert, Rows
from orchestrator_site.errors import Unavailable

logger = logging.getLogger(__name__)

PAGE = 100
PAGE_BYTES = 64 * 1024

_logged = Rows(
    StreamBatch,
    lambda slot: (
        StreamBatch.objects.numbered()
        .filter(session_id=slot("session_id"), last_seq__gt=slot("last_seq", "after"))
        .order_by("last_seq")[:PAGE]
        .only("origin", "frames", "closes", "last_seq")
    ),
)
_RUN = ("session_id", "origin", "first_seq", "last_seq", "frames", "closes", "created_at")
_appended = Insert(StreamBatch, *_RUN)
_appended_again = Insert(StreamBatch, *_RUN, on_conflict=OnConflict.IGNORE)
_unnumbered = Rows(StreamBatch, lambda slot: StreamBatch.objects.unnumbered().filter(session_id=slot("session_id")))


class AuditUnavailable(Unavailable):
    code = "audit_unavailable"


class Fact(NamedTuple):
    """A row of Event that is to be recorded."""

    event_id: uuid.UUID
    account_id: int
    session_id: str
    event_type: str
    correlation_id: str
    source: str
    tool_name: str | None
    data: dict[str, Any]
    timestamp: datetime
    causation_id: str = ""
    version: str = "1.0"


_recorded = Insert(Event, *Fact._fields)


def fact(event_type: str, *, account_id: int, session_id: str, turn_id: str = "", **data: Any) -> Fact:
    """One thing that happened, to be recorded in the transaction in which it does."""
    source, tool_name = event_type.partition(".")[0], data.get("tool_name")
    return Fact(ids.in_order(), account_id, session_id, event_type, turn_id, source, tool_name, data, timezone.now())


def record(*facts: Fact) -> None:
    """Insert facts in the caller's transaction."""
    _recorded(facts)


def audit(
    by: Any,
    action: str,
    *,
    session_id: str,
    target: str = "",
    tool_name: str | None = None,
    reason: str = "",
    refused: bool = False,
    **details: Any,
) -> None:
    """Write down who did what, in the transaction in which it happens. `by`: a Caller.

    Raises AuditUnavailable, whatever the database's reason: what cannot be written down does not happen.
    """
    entry = AuditEntry(
        account_id=by.account_id,
        at=timezone.now(),
        actor=by.name,
        channel=by.channel,
        address=by.address,
        request_id=by.request_id,
        action=action,
        outcome=AuditEntry.Outcome.REFUSED if refused else AuditEntry.Outcome.DONE,
        session_id=session_id,
        target=target,
        tool_name=tool_name,
        reason=reason,
        details=details,
    )
    try:
        entry.save(force_insert=True)
    except DatabaseError:
        logger.exception("audit_unavailable", extra={"action": action, "session_id": session_id})
        raise AuditUnavailable("This cannot be written down at the moment, so it is not done.") from None


def append(session_id: str, frames: Sequence[Frame]) -> None:
    """Log numbered frames, in order, in the caller's transaction: one row for each run of the same origin."""
    append_runs([(session_id, list(run)) for _, run in groupby(frames, key=lambda frame: frame.origin)])


def append_runs(runs: Sequence[tuple[str, Sequence[Frame]]], *, again: bool = False) -> None:
    """Log consecutive numbered frames of one origin each, with the ids of their sessions: one row for each run.

    `again`: some may have been logged before, by a commit that was reported as failed.
    """
    now = timezone.now()
    (_appended_again if again else _appended)(
        [
            (
                session_id,
                run[0].origin,
                run[0].seq,
                run[-1].seq,
                [(frame.seq, frame.body) for frame in run],
                run[-1].closes,
                now,
            )
            for session_id, run in runs
        ]
    )


def leave_unnumbered(session_id: str, origin: str, body: str, *, closes: bool) -> None:
    """Store a frame for the session's live runner to number."""
    StreamBatch.objects.create(
        session_id=session_id, origin=origin, frames=[[None, body]], closes=closes, created_at=timezone.now()
    )


def number_waiting(session_id: str, next_number: Any) -> list[Frame]:
    """Give numbers to the frames that others left; the caller holds the session's lock and its numbers."""
    frames = []
    for batch in _unnumbered(session_id=session_id):
        try:
            body = batch.frames[0][1]
        except (IndexError, KeyError, TypeError):
            # Damaged: nobody will ever read it, and the session would stand still before it.
            logger.exception("frame_unreadable", extra={"session_id": session_id, "batch": batch.pk})
            batch.delete()
            continue
        frame = Frame.of(next_number(), batch.origin, body, closes=batch.closes)
        batch.first_seq = batch.last_seq = frame.seq
        batch.frames = [[frame.seq, body]]
        batch.save(update_fields=["first_seq", "last_seq", "frames"])
        frames.append(frame)
    return frames


def page(session_id: str, after: int) -> tuple[list[Frame], bool]:
    """The next logged frames past number `after`, and whether there may be more.

    A reader holds them until it has sent them, which may take it long: so not many more than PAGE_BYTES.
    """
    frames: list[Frame] = []
    count = size = 0
    for row in _logged.each(session_id=session_id, after=after):
        fresh = [frame for frame in _frames(row) if frame.seq > after]
        frames += fresh
        count, size = count + 1, size + sum(len(frame.wire) for frame in fresh)
        if size >= PAGE_BYTES:
            return frames, True
    return frames, count == PAGE


def _frames(batch: StreamBatch) -> Iterator[Frame]:
    for seq, body in batch.frames:
        yield Frame.of(seq, batch.origin, body, closes=batch.closes and seq == batch.last_seq)


def oldest_kept(session_id: str) -> int | None:
    """The number of the oldest frame that is still in the log."""
    kept = StreamBatch.objects.numbered().filter(session_id=session_id).order_by("last_seq")
    return kept.values_list("first_seq", flat=True).first()


def last_before(session_id: str, moment: Any) -> int | None:
    """The last number that was logged before `moment`."""
    batches = StreamBatch.objects.numbered().filter(session_id=session_id, created_at__lt=moment)
    return batches.aggregate(last=Max("last_seq"))["last"]


def forget_through(session_id: str, seq: int) -> None:
    """Prune the stream log up to and including number `seq`."""
    StreamBatch.objects.filter(session_id=session_id, last_seq__lte=seq).delete()

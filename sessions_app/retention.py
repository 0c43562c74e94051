"""Pruning the stream log and the keys of requests. Messages and events are the lasting record; frames are kept for
resuming, keys for repeating.
"""

from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Exists, OuterRef
from django.db.models.functions import Now
from django.utils import timezone

from events_app import log
from events_app.models import StreamBatch
from sessions_app.models import IdempotencyRecord, Session, Turn

SESSIONS_AT_ONCE = 200
RECORDS_AT_ONCE = 1_000
# How long a request may be repeated under its key.
KEEP_RECORDS = timedelta(hours=24)


def prune_streams() -> int:
    """Forget frames older than STREAM_KEEP_HOURS of sessions in which nothing is unfinished; how many sessions had any.

    What is pruned is always the beginning of a stream, so that one number tells what is gone.
    """
    before = timezone.now() - timedelta(hours=settings.STREAM_KEEP_HOURS)
    unfinished = Turn.objects.unfinished().filter(session_id=OuterRef("session_id"))
    old = StreamBatch.objects.numbered().filter(~Exists(unfinished), created_at__lt=before)
    session_ids = list(old.order_by().values_list("session_id", flat=True).distinct()[:SESSIONS_AT_ONCE])
    for session_id in session_ids:
        with transaction.atomic():
            session = Session.objects.locked().get(pk=session_id)
            last = log.last_before(session_id, before)
            if last is not None and not session.turns.unfinished().exists():
                log.forget_through(session_id, last)
                Session.objects.filter(pk=session_id).update(pruned_seq=last)
    return len(session_ids)


def prune_records() -> int:
    """Forget requests that were made longer ago than they may be repeated; how many."""
    old = IdempotencyRecord.objects.filter(created_at__lt=Now() - KEEP_RECORDS).order_by("created_at")
    with transaction.atomic():
        # One that is being repeated at this moment is left for the next time.
        ids = list(old.select_for_update(skip_locked=True).values_list("pk", flat=True)[:RECORDS_AT_ONCE])
        IdempotencyRecord.objects.filter(pk__in=ids).delete()
    return len(ids)

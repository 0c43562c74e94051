"""What the process that prunes forgets, in as many transactions as it takes."""

import asyncio
from datetime import timedelta

import pytest
from django.db.models.functions import Now
from django.utils import timezone

from events_app.models import StreamBatch
from messages_app import runner
from sessions_app import retention
from sessions_app.models import Account, IdempotencyRecord, Session

pytestmark = pytest.mark.django_db(transaction=True)


def test_frames_and_keys_are_forgotten_however_many_there_are() -> None:
    account, long_ago = Account.objects.create(name="pruned"), timezone.now() - timedelta(days=30)
    sessions = [Session(pk=f"s{n}", account=account, next_seq=2) for n in range(retention.SESSIONS_AT_ONCE + 1)]
    Session.objects.bulk_create(sessions)
    StreamBatch.objects.bulk_create(
        StreamBatch(session_id=session.pk, origin="", first_seq=1, last_seq=1, frames=[[1, ""]], created_at=long_ago)
        for session in sessions
    )
    IdempotencyRecord.objects.bulk_create(
        IdempotencyRecord(account=account, caller="tests", key=f"k{n}") for n in range(retention.RECORDS_AT_ONCE + 1)
    )
    IdempotencyRecord.objects.update(created_at=Now() - 2 * retention.KEEP_RECORDS)

    asyncio.run(runner.prune())

    assert not StreamBatch.objects.exists()
    assert not IdempotencyRecord.objects.exists()

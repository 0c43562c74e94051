"""Taking turns to run, keeping them, giving them back: the database side of every runner."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from django.db import transaction
from django.db.models.functions import Now
from django.utils import timezone

from events_app import log
from events_app.chunks import Restarted, TurnStarted, encode
from events_app.frames import Frame
from events_app.models import StreamBatch
from messages_app.turn_stream import BLOCK
from sessions_app import lifecycle
from sessions_app.models import Claim, Session, Turn, lease_end

CLAIMS_AT_ONCE = 20


def claim_turns(owner: str, limit: int) -> list[tuple[Claim, list[Frame]]]:
    """Take up to `limit` turns that nobody runs, each with the frames that tell its followers so.

    One transaction for all of them: with SQLite each costs a sync of the disk.
    """
    candidates = list(Turn.objects.claimable().values_list("pk", "session_id")[: min(limit, CLAIMS_AT_ONCE)])
    if not candidates:
        return []
    with transaction.atomic():
        sessions = Session.objects.locked().order_by("pk").in_bulk([session_id for _, session_id in candidates])
        turns = Turn.objects.claimable().filter(pk__in=[pk for pk, _ in candidates])
        return [_begin(turn, sessions[turn.session_id], owner) for turn in turns if turn.claim(owner)]


def _begin(turn: Turn, session: Session, owner: str) -> tuple[Claim, list[Frame]]:
    is_takeover = turn.status == Turn.Status.RUNNING
    first = session.reserve_numbers(BLOCK)
    numbers = iter(range(first, first + BLOCK))
    frames = log.number_waiting(session.pk, lambda: next(numbers))
    origin = str(turn.pk)
    chunk = Restarted(origin, turn.settled_seq) if is_takeover else TurnStarted(origin)
    frame = Frame.of(next(numbers), origin, encode(chunk))
    log.append(session.pk, [frame])
    Turn.objects.filter(pk=turn.pk).update(settled_seq=frame.seq)
    lifecycle.record(
        session,
        "agent.processing.started",
        turn_id=turn.pk,
        agent=turn.requested_agent or session.current_agent,
        attempt=turn.attempt + 1,
    )
    claim = Claim(
        turn.pk, session.pk, session.account_id, owner, turn.attempt + 1, frame.seq + 1, first + BLOCK, frame.seq
    )
    return claim, [*frames, frame]


@dataclass(frozen=True, slots=True)
class Unlogged:
    """One turn's part of a group commit."""

    claim: Claim
    frames: Sequence[Frame]
    wants_numbers: bool


def write_batches(owner: str, parts: Sequence[Unlogged]) -> dict[uuid.UUID, tuple[int, int] | None]:
    """The group commit: the unlogged frames of many turns in one transaction.

    Returns the turns whose frames are logged, with a new block of numbers for those that asked for one. A turn that is
    missing there is no longer this runner's.
    """
    now = timezone.now()
    with transaction.atomic():
        short = [part.claim.session_id for part in parts if part.wants_numbers]
        sessions = Session.objects.locked().order_by("pk").in_bulk(short) if short else {}
        # Locked, so that nobody takes a turn over between this look and the commit.
        held = set(
            Turn.objects.select_for_update()
            .held_by(owner)
            .filter(lease_until__gt=Now(), pk__in=[part.claim.turn_id for part in parts])
            .values_list("pk", "attempt")
        )
        batches = []
        logged: dict[uuid.UUID, tuple[int, int] | None] = {}
        for part in parts:
            if (part.claim.turn_id, part.claim.attempt) not in held:
                continue
            batches.append(log.batch_of(part.claim.session_id, part.frames, now))
            logged[part.claim.turn_id] = None
            if part.wants_numbers:
                first = sessions[part.claim.session_id].reserve_numbers(BLOCK)
                logged[part.claim.turn_id] = (first, first + BLOCK)
        # A commit that was reported as failed may have happened; its rows are the same, and are not written twice.
        StreamBatch.objects.bulk_create(batches, ignore_conflicts=True)
    return logged


def renew_leases(owner: str) -> set[str]:
    """Keep every turn of this runner that it still holds; the sessions in which somebody left it something."""
    held = Turn.objects.held_by(owner)
    held.filter(lease_until__gt=Now()).update(lease_until=lease_end())
    waiting = StreamBatch.objects.unnumbered().values("session_id")
    return {
        *held.filter(cancel_requested_at__isnull=False).values_list("session_id", flat=True),
        *held.filter(session_id__in=waiting).values_list("session_id", flat=True),
    }


def give_back(claim: Claim) -> None:
    """Let the lease run out now, so that another runner need not wait for it."""
    Turn.mine(claim).update(lease_until=Now())

"""Taking turns to run, keeping them, giving them back: the database side of every runner."""

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from django.db import InterfaceError, OperationalError, transaction
from django.db.models.functions import Now

from agents_app import team
from events_app import log
from events_app.chunks import ErrorShown, Restarted, TurnFinished, TurnStarted, encode
from events_app.frames import Frame
from events_app.models import Event, StreamBatch
from messages_app.turn_stream import BLOCK
from sessions_app import lifecycle
from sessions_app.models import Claim, Session, Turn, lease_end

logger = logging.getLogger(__name__)

CLAIMS_AT_ONCE = 20
Begun = tuple[Claim, list[Frame]]


def claim_turns(owner: str, limit: int) -> list[Begun]:
    """Take up to `limit` turns that nobody runs, each with the frames that tell its followers so.

    One transaction for all of them: with SQLite each costs a sync of the disk.
    """
    candidates = list(Turn.objects.claimable().values_list("pk", "session_id")[: min(limit, CLAIMS_AT_ONCE)])
    try:
        return _claim_together(owner, candidates)
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        logger.exception("claim_failed", extra={"turns": len(candidates)})
    # A row that cannot be worked with must not keep the others waiting behind it.
    return [begun for candidate in candidates for begun in _claim_alone(owner, candidate)]


def _claim_alone(owner: str, candidate: tuple[uuid.UUID, str]) -> list[Begun]:
    try:
        return _claim_together(owner, [candidate])
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        logger.exception("turn_not_claimable", extra={"turn_id": str(candidate[0])})
    _park(*candidate)
    return []


@transaction.atomic
def _park(turn_id: uuid.UUID, session_id: str) -> None:
    """Fail a turn whose claim fails, and end the answer that its client waits for."""
    session = Session.objects.locked().get(pk=session_id)
    turn = Turn.objects.get(pk=turn_id)
    if not turn.fail_unclaimed("internal_error"):
        return  # somebody else could work with it
    origin = str(turn_id)
    finished = TurnFinished(origin, Turn.Status.FAILED, "internal_error", turn.usage)
    lifecycle.emit(
        session, ErrorShown("Something went wrong on the server.", "internal_error"), finished, origin=origin
    )


def _claim_together(owner: str, candidates: Sequence[tuple[uuid.UUID, str]]) -> list[Begun]:
    if not candidates:
        return []
    with transaction.atomic():
        sessions = Session.objects.locked().order_by("pk").in_bulk([session_id for _, session_id in candidates])
        left = set(
            StreamBatch.objects.unnumbered().filter(session_id__in=sessions).values_list("session_id", flat=True)
        )
        pin = cache(team.pin)
        claimed = []
        for turn in Turn.objects.claimable().filter(pk__in=[pk for pk, _ in candidates]):
            session = sessions[turn.session_id]
            version = pin() if turn.team_version is None else turn.team_version
            begun = _begin(turn, session, owner, version, waiting=session.pk in left)
            if begun is not None:
                claimed.append(begun)
        # Those that were left by others are logged already.
        begins = [(claim, frames[-1:]) for claim, frames in claimed if frames and frames[-1].seq == claim.settled_seq]
        StreamBatch.objects.bulk_create(log.batch_of(claim.session_id, frames) for claim, frames in begins)
        log.record(*[_started(claim, sessions[claim.session_id]) for claim, _ in claimed])
        return claimed


def _begin(turn: Turn, session: Session, owner: str, version: int, *, waiting: bool) -> Begun | None:
    """Claim one turn and reserve its numbers; with the frames that others left, and last the one that says it begins.

    It runs under this version of the team to its end. A turn that goes on after it waited has begun before, and says
    nothing.
    """
    is_takeover, has_waited = turn.status == Turn.Status.RUNNING, turn.round_count > 0
    first, left = session.next_seq, StreamBatch.objects.unnumbered().filter(session_id=session.pk)
    seq = first + (left.count() if waiting else 0)
    is_silent = has_waited and not is_takeover
    settled = seq - 1 if is_silent else seq
    if not turn.claim(owner, settled_seq=settled, team_version=version):
        return None
    session.reserve_numbers(BLOCK)
    numbers = iter(range(first, seq))
    frames = log.number_waiting(session.pk, lambda: next(numbers)) if waiting else []
    if not is_silent:
        origin = str(turn.pk)
        chunk = Restarted(origin, turn.settled_seq) if is_takeover else TurnStarted(origin)
        frames.append(Frame.of(seq, origin, encode(chunk)))
    claim = Claim(
        turn.pk,
        session.pk,
        session.account_id,
        owner,
        turn.attempt + 1,
        settled + 1,
        first + BLOCK,
        settled,
        turn.requested_agent,
        turn.ran_ms,
        version,
    )
    return claim, frames


def _started(claim: Claim, session: Session) -> Event:
    agent = claim.requested_agent or session.current_agent
    return lifecycle.fact(
        session, "agent.processing.started", turn_id=claim.turn_id, agent=agent, attempt=claim.attempt
    )


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
    with transaction.atomic():
        short = [part.claim.session_id for part in parts if part.wants_numbers]
        sessions = Session.objects.locked().order_by("pk").in_bulk(short) if short else {}
        # Locked, so that nobody takes a turn over between this look and the commit.
        turns = Turn.objects.lock_live([part.claim.turn_id for part in parts], owner)
        held = set(turns.values_list("pk", "attempt"))
        batches = []
        logged: dict[uuid.UUID, tuple[int, int] | None] = {}
        for part in parts:
            if (part.claim.turn_id, part.claim.attempt) not in held:
                continue
            batches.append(log.batch_of(part.claim.session_id, part.frames))
            logged[part.claim.turn_id] = None
            if part.wants_numbers:
                first = sessions[part.claim.session_id].reserve_numbers(BLOCK)
                logged[part.claim.turn_id] = (first, first + BLOCK)
        # A commit that was reported as failed may have happened; its rows are the same, and are not written twice.
        StreamBatch.objects.bulk_create(batches, ignore_conflicts=True)
    return logged


def renew_leases(owner: str, turn_ids: Sequence[uuid.UUID]) -> set[str]:
    """Keep the turns that this runner works on and still holds; the sessions in which somebody left it something.

    Only those it names: one that it has given up on is still its own by name, and has to reach the end of its lease.
    """
    with transaction.atomic():
        Turn.objects.lock_live(turn_ids, owner).update(lease_until=lease_end())
    held = Turn.objects.held_by(owner).filter(pk__in=turn_ids)
    waiting = StreamBatch.objects.unnumbered().values("session_id")
    return {
        *held.filter(cancel_requested_at__isnull=False).values_list("session_id", flat=True),
        *held.filter(session_id__in=waiting).values_list("session_id", flat=True),
    }


def give_back(claim: Claim) -> None:
    """Let the lease run out now, so that another runner need not wait for it."""
    Turn.mine(claim).update(lease_until=Now())

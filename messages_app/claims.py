"""Taking turns to run, keeping them, giving them back: the database side of every runner."""

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import NamedTuple

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction
from django.db.models import Exists, OuterRef
from django.db.models.functions import Now

from agents_app import approvals, team
from agents_app.approvals import Verdict
from events_app import log
from events_app.chunks import ErrorShown, Restarted, TurnFinished, TurnStarted, encode
from events_app.frames import Frame
from events_app.log import Fact
from events_app.models import StreamBatch
from events_app.prepared import Rows
from messages_app import steps
from messages_app.steps import Scene
from messages_app.turn_stream import BLOCK
from sessions_app import lifecycle
from sessions_app.models import (
    RUNNER_LOST,
    Claim,
    Session,
    Turn,
    TurnQuerySet,
    lease_end,
    live_attempts,
    most_lost_turn,
    numbers_reserved,
    trusted_turns,
)

logger = logging.getLogger(__name__)

CLAIMS_AT_ONCE = 250
# Of so many suspect turns one runs at a time.
SUSPECTS_TO_ONE = 20
SERVER_FAULT = ErrorShown("Something went wrong on the server.", "internal_error")
RUNNERS_LOST = ErrorShown("The server failed each time it worked on this message. It is not tried again.", RUNNER_LOST)


class Begun(NamedTuple):
    """A turn that was claimed, the frames that tell its followers so, and what its first model step starts from, if
    that was read: in a list, from which whoever runs it takes it, for it may be long and is needed once.
    """

    claim: Claim
    frames: list[Frame]
    opening: list[Scene]


def claim_turns(owner: str, limit: int) -> list[Begun]:
    """Take up to `limit` turns that nobody runs.

    A few transactions for all of them: with SQLite each costs a sync of the disk.
    """
    # Asked for first, in one query: mostly there is nothing, or nothing suspect, and with SQLite the transaction that
    # claims locks everybody out.
    worst = most_lost_turn.first()
    if worst is None:
        return []
    has_suspects = worst.losses >= settings.TURN_MAX_LOSSES - 1  # type: ignore[attr-defined]
    begun = _claim_suspects(owner, limit) if has_suspects else []
    room, trusted = min(limit - len(begun), CLAIMS_AT_ONCE), Turn.objects.claimable().trusted()
    try:
        return begun + _claim(owner, trusted, room, locked=trusted_turns(room, settings.TURN_MAX_LOSSES))
    except (OperationalError, InterfaceError):
        if not begun:
            raise
        logger.exception("claim_failed", extra={"turns": room})
        return begun


def claim_in(owner: str, session_ids: Sequence[str]) -> tuple[dict[str, Begun], set[str]]:
    """The same for the turns of these sessions that may run now, one of each; for a suspect one perhaps another.

    Also returns the sessions that somebody else had locked: each is asked for with `claim_waiting`.
    """
    free = Turn.objects.claimable().filter(session__in=session_ids)
    ready = dict(free.values_list("session_id", "losses"))  # type: ignore[misc]
    of_suspects = [session_id for session_id, losses in ready.items() if losses >= settings.TURN_MAX_LOSSES - 1]
    of_trusted = ready.keys() - of_suspects
    begun = {each.claim.session_id: each for each in _claim(owner, free.trusted(), len(of_trusted))}
    locked = of_trusted - begun.keys()
    if of_suspects:
        try:
            begun |= dict(zip(of_suspects, _claim_suspects(owner, len(of_suspects)), strict=False))
        except (OperationalError, InterfaceError):
            if not begun:
                raise
            # `recover` has them claimed again; what is claimed here is to be run.
            logger.exception("claim_failed", extra={"turns": len(of_suspects)})
    return begun, locked


def claim_waiting(owner: str, session_id: str) -> Begun | None:
    """The same for one session, whose lock is waited for: there is no next look for a job that names it."""
    with transaction.atomic():
        Session.objects.locked().filter(pk=session_id).first()
        begun = _claim(owner, Turn.objects.claimable().filter(session=session_id).trusted(), 1)
    return begun[0] if begun else None


def _claim_suspects(owner: str, limit: int) -> list[Begun]:
    """Of the turns that one more death would condemn, as many as this runner may try at a time.

    A process that dies takes all its turns along, and each of them may have killed it. So those that were there each
    time run one after another, beside any number of others: the next death tells which of them it was. Many go in
    groups, lest they wait for hours; a death leaves the group that it hit, which is small enough the next time.
    """
    for candidate in Turn.objects.claimable().condemned().values_list("pk", "session_id"):
        _park(*candidate, RUNNERS_LOST, among=Turn.objects.claimable().condemned())
    suspects = list(Turn.objects.claimable().suspect().values_list("losses", flat=True))  # type: ignore[misc]
    if not suspects:
        return []
    on_trial = Turn.objects.held_by(owner).suspected()
    if on_trial.filter(is_singled_out=True).exists():
        return []
    running, worst = on_trial.count(), suspects.count(suspects[0])
    at_once = max((running + worst) // SUSPECTS_TO_ONE, 1)
    room = min(at_once - running, worst, limit, CLAIMS_AT_ONCE)
    return _claim(owner, Turn.objects.claimable().suspect(), room, singled_out=at_once == 1)


def _claim(
    owner: str,
    among: TurnQuerySet,
    room: int,
    *,
    singled_out: bool = False,
    locked: Callable[[], list[Turn]] | None = None,
) -> list[Begun]:
    """Claim the first of these turns, but for those that somebody else is at. `locked`: a quicker way to lock them.

    A row that cannot be worked with must not keep the others waiting: it is looked for by halves, and parked.
    """
    if room <= 0:
        return []
    try:
        return _claim_together(owner, locked or partial(_locked, among, room), singled_out=singled_out)
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        logger.exception("claim_failed", extra={"turns": room})
    candidates = list(among.values_list("pk", "session_id")[:room])
    if len(candidates) == 1:
        _park(*candidates[0], SERVER_FAULT, among=among)
        return []
    half = len(candidates) // 2
    return [
        begun
        for part in (candidates[:half], candidates[half:])
        for begun in _claim(
            owner, among.filter(pk__in=[turn_id for turn_id, _ in part]), len(part), singled_out=singled_out
        )
    ]


@transaction.atomic
def _park(turn_id: uuid.UUID, session_id: str, why: ErrorShown, *, among: TurnQuerySet) -> None:
    """Fail a turn that is not to be claimed again, and end the answer that its client waits for."""
    session = Session.objects.locked().get(pk=session_id)
    turn = among.filter(pk=turn_id).first()
    if turn is None or not turn.fail_unclaimed(why.code):
        return  # somebody else could work with it
    _close_calls(session, turn)
    origin = str(turn_id)
    log.record(
        lifecycle.fact(
            session,
            "agent.error.occurred",
            turn_id=turn_id,
            agent=session.current_agent,
            error_message=why.message,
            error_type=why.code,
        )
    )
    lifecycle.emit(session, why, TurnFinished(origin, Turn.Status.FAILED, why.code, turn.usage), origin=origin)
    lifecycle.wake_runner(session_id)  # for what is queued behind it
    logger.error("turn_parked", extra={"turn_id": origin, "session_id": session_id, "code": why.code})


def _close_calls(session: Session, turn: Turn) -> None:
    """Answer what is open of a turn that is parked. Rows that somebody damaged stay open: it is parked in any case."""
    try:
        with transaction.atomic():
            approvals.close_calls(session, turn, Verdict.CANCELLED, approvals.system(session))
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        logger.exception("calls_not_closed", extra={"turn_id": str(turn.pk), "session_id": session.pk})


def _locked(among: TurnQuerySet, room: int) -> list[Turn]:
    return list(among[:room].locked_with_sessions())


def claim_new(turn: Turn, owner: str) -> Begun:
    """Take a turn within the transaction that opens it; the caller holds its session's lock, and has reserved BLOCK
    numbers.
    """
    (begun,) = _take(owner, [turn], singled_out=False)
    return begun


def _claim_together(owner: str, locked: Callable[[], list[Turn]], *, singled_out: bool) -> list[Begun]:
    """What somebody else has locked is about to change, or about to be claimed: it is looked at the next time."""
    with transaction.atomic():
        turns = locked()
        if not turns:
            return []
        numbers_reserved.many([{"id": turn.session_id, "count": BLOCK} for turn in turns])
        begun = _take(owner, turns, singled_out=singled_out)
    find_openings(turns, begun)
    return begun


def find_openings(turns: Sequence[Turn], begun: Sequence[Begun]) -> None:
    """After the commit: nobody's lock is held for it, and the turns are claimed whatever comes of it."""
    if connection.in_atomic_block:
        return  # of a caller: an error would undo what it does
    scenes = steps.opening_scenes([(turn, each.claim.team_version) for turn, each in zip(turns, begun, strict=True)])
    for each, scene in zip(begun, scenes, strict=True):
        if scene is not None:
            each.opening.append(scene)


def _take(owner: str, turns: Sequence[Turn], *, singled_out: bool) -> list[Begun]:
    """The same few statements for any number of turns: with one for each, a thousand took seconds."""
    session_ids = [turn.session_id for turn in turns]
    left = {session_id for (session_id,) in _waiting_in(session_ids=session_ids)}
    pin = cache(team.pin)
    begun = [
        _begin(
            turn,
            owner,
            pin() if turn.team_version is None else turn.team_version,
            waiting=turn.session_id in left,
        )
        for turn in turns
    ]
    Turn.claim([claim for claim, _ in begun], singled_out=singled_out)
    # Those that were left by others are logged already.
    log.append_runs(
        [(claim.session_id, frames[-1:]) for claim, frames in begun if frames and frames[-1].seq == claim.settled_seq]
    )
    log.record(*[_started(claim, turn.session) for turn, (claim, _) in zip(turns, begun, strict=True)])
    return [Begun(claim, frames, []) for claim, frames in begun]


def _begin(turn: Turn, owner: str, version: int, *, waiting: bool) -> tuple[Claim, list[Frame]]:
    """How a turn begins to run: with the frames that others left, and last the one that says so.

    It runs under this version of the team to its end. A turn that goes on after it waited has begun before, and says
    nothing.
    """
    session, is_takeover, has_waited = turn.session, turn.status == Turn.Status.RUNNING, turn.round_count > 0
    first = session.next_seq
    numbers = count(first)
    frames = log.number_waiting(session.pk, lambda: next(numbers)) if waiting else []
    settled = first + len(frames) - 1
    if is_takeover or not has_waited:
        origin = str(turn.pk)
        chunk = Restarted(origin, turn.settled_seq) if is_takeover else TurnStarted(origin)
        settled += 1
        frames.append(Frame.of(settled, origin, encode(chunk)))
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


def _started(claim: Claim, session: Session) -> Fact:
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
        held = live_attempts([part.claim.turn_id for part in parts], owner)
        runs = []
        logged: dict[uuid.UUID, tuple[int, int] | None] = {}
        for part in parts:
            if held.get(part.claim.turn_id) != part.claim.attempt:
                continue
            runs.append((part.claim.session_id, part.frames))
            logged[part.claim.turn_id] = None
            if part.wants_numbers:
                first = sessions[part.claim.session_id].reserve_numbers(BLOCK)
                logged[part.claim.turn_id] = (first, first + BLOCK)
        log.append_runs(runs, again=True)
    return logged


def renew_leases(owner: str, turn_ids: Sequence[uuid.UUID], given_up: Sequence[uuid.UUID]) -> None:
    """Keep the turns that this runner works on and still holds, and let go of those that it has without knowing.

    One that it has given up on is still its own by name, and has to reach the end of its lease.
    """
    if turn_ids:
        with transaction.atomic():
            Turn.objects.lock_live(turn_ids, owner).update(lease_until=lease_end())
    strays = Turn.objects.stray(owner, [*turn_ids, *given_up])
    if strays.exists():
        number = strays.update(owner="", lease_until=Now())
        logger.warning("turns_released", extra={"turns": number})


def release(claim: Claim) -> None:
    """Leave a turn to whoever claims it next. Raises LostClaim."""
    with transaction.atomic():
        Turn.release(claim)
        lifecycle.wake_runner(claim.session_id)


_cancelled = Rows(
    Turn,
    lambda slot: (
        Turn.objects.held_by(slot("owner"))
        .filter(cancel_requested_at__isnull=False)
        .values_list("session_id")
        .order_by()
    ),
)
_waiting_in = Rows(
    StreamBatch,
    lambda slot: (
        StreamBatch.objects.unnumbered()
        .filter(session_id__in=slot("session_id", "session_ids", many=True))
        .order_by()
        .values_list("session_id")
    ),
)
# Asked of each of these sessions: to list all frames that wait, SQLite reads the whole log.
_left_behind = Rows(
    Turn,
    lambda slot: (
        Turn.objects.held_by(slot("owner"))
        .filter(Exists(StreamBatch.objects.unnumbered().filter(session_id=OuterRef("session_id"))))
        .values_list("session_id")
        .order_by()
    ),
)


def wishes(owner: str) -> set[str]:
    """The sessions in which somebody left something to a turn that this runner works on: a frame, a wish to cancel."""
    return {session_id for found in (_cancelled, _left_behind) for (session_id,) in found(owner=owner)}

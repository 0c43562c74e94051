"""Turns that somebody ends from outside: cancelled, superseded by a new message, deleted with their session."""

import uuid

from django.db import transaction
from django.db.models.functions import Now

from agents_app import approvals
from agents_app.approvals import Verdict
from events_app import log
from events_app.chunks import TurnFinished
from events_app.feed import feed
from events_app.log import Fact
from sessions_app import lifecycle
from sessions_app.callers import Caller
from sessions_app.models import Session, Turn, TurnMoved


@transaction.atomic
def delete(caller: Caller, session_id: str) -> None:
    """Take the session out of everybody's sight; its turns are cancelled, its id stays taken, its facts stay."""
    session = lifecycle.locked_for(caller, session_id)
    for turn in session.turns.select_for_update().unfinished().order_by("position"):
        _cancel(session, turn, caller)
    Session.objects.filter(pk=session.pk).update(deleted_at=Now(), is_active=False)
    log.record(lifecycle.fact(session, "session.deleted", deleted_by=caller.name))
    transaction.on_commit(lambda: feed.close(session.pk))


@transaction.atomic
def cancel(caller: Caller, session_id: str) -> uuid.UUID | None:
    """Cancel the session's open turn and return its id, None when there is none. Messages queued behind it go on.

    A turn that is running ends a moment later by its runner's hand; after this it can end in no other way. Raises
    TurnMoved when it was neither held nor free, which the session's lock should not allow.
    """
    session = lifecycle.locked_for(caller, session_id)
    turn = session.turns.select_for_update().unfinished().order_by("position").first()
    if turn is None:
        return None
    _cancel(session, turn, caller)
    log.record(_cancelled(session, turn, caller))
    return turn.pk


def interrupt(session: Session, by: Caller) -> list[Turn]:
    """Cancel every turn that is queued or running, because a new message takes their place; the caller holds the
    session's lock. Returns those that end a moment later by their runner's hand.
    """
    turns = list(session.turns.select_for_update().unfinished().order_by("position"))
    log.record(*[_cancelled(session, turn, by) for turn in turns])
    return [turn for turn in turns if not _cancel(session, turn, by)]


def supersede(session: Session, turn: Turn, by: Caller) -> None:
    """End a turn that waits, because the user goes on without it; the caller holds the session's lock."""
    _end(session, turn, Verdict.SUPERSEDED, by)


def _cancel(session: Session, turn: Turn, by: Caller) -> bool:
    """Whether the turn has ended by it; otherwise its runner was told to end it."""
    if turn.request_cancel():
        transaction.on_commit(lambda: feed.poke(session.pk))
        return False
    _end(session, turn, Verdict.CANCELLED, by)
    return True


def _cancelled(session: Session, turn: Turn, by: Caller) -> Fact:
    return lifecycle.fact(session, "session.updated", turn_id=turn.pk, cancelled_by=by.name)


def _end(session: Session, turn: Turn, verdict: Verdict, by: Caller) -> None:
    approvals.close_calls(session, turn, verdict, by)
    if not turn.end_unheld(Turn.Status.CANCELLED, verdict):
        raise TurnMoved("The turn moved on while it was being ended.")
    chunk = TurnFinished(str(turn.pk), Turn.Status.CANCELLED, verdict, turn.usage)
    lifecycle.emit(session, chunk, origin=str(turn.pk))
    lifecycle.wake_runner(session.pk)

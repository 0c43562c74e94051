"""Rows with plain defaults, made the way the product makes them."""

from datetime import timedelta

from django.db.models.functions import Now

from messages_app import acceptance, claims
from messages_app.inbound import UserMessage
from messages_app.models import Message
from sessions_app import lifecycle
from sessions_app.callers import FIRST_ACCOUNT, Caller
from sessions_app.models import Claim, Session, Turn

CALLER = Caller(FIRST_ACCOUNT, "tests")


def make_session(session_id: str = "s", *, agent: str = "coder") -> Session:
    session = lifecycle.create(CALLER, session_id)
    Session.objects.filter(pk=session.pk).update(current_agent=agent)
    session.refresh_from_db()
    return session


def make_turn(session: Session, content: str = "hello") -> Turn:
    """A queued turn, as a user message opens it."""
    accepted = acceptance.user_message(UserMessage(session.pk, content), CALLER)
    return Turn.objects.get(pk=accepted.origin)


def make_answered_turn(session: Session, content: str, answer: str | None) -> Turn:
    """A turn of the past; without an answer, one that failed."""
    turn = make_turn(session, content)
    if answer is not None:
        Message.objects.create(
            session=session, turn=turn, turn_position=turn.position, role="assistant", content=answer, agent="coder"
        )
    status = Turn.Status.FAILED if answer is None else Turn.Status.COMPLETED
    Turn.objects.filter(pk=turn.pk).update(status=status, finished_at=Now())
    return turn


def claim(turn: Turn, owner: str = "runner") -> Claim:
    claimed = {each.turn_id: each for each, _ in claims.claim_turns(owner, 100)}
    return claimed[turn.pk]


def let_lease_run_out(turn: Turn) -> None:
    Turn.objects.filter(pk=turn.pk).update(lease_until=Now() - timedelta(seconds=1))

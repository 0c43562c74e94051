"""Storing what a client sent, in one transaction, before anything is said about it."""

import uuid
from dataclasses import dataclass

from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now

from agents_app import handoffs
from events_app import log
from events_app.feed import feed
from messages_app.inbound import UserMessage
from messages_app.models import Message
from orchestrator_site.errors import TooMany
from sessions_app import lifecycle
from sessions_app.callers import Caller
from sessions_app.models import Session

TITLE_CHARS = 500


class QueueFull(TooMany):
    code = "queue_full"


@dataclass(frozen=True, slots=True)
class Accepted:
    """Where the answer is to be looked for: the session's stream past number `after`, frames of `turn_id`."""

    session_id: str
    turn_id: uuid.UUID
    after: int


@transaction.atomic
def user_message(message: UserMessage, caller: Caller) -> Accepted:
    """Store the message and queue the turn that it opens.

    Raises UnknownAgent, UnknownSession for another account's session, QueueFull.
    """
    if message.agent_type is not None:
        handoffs.ensure_known(message.agent_type)
    session = lifecycle.locked_or_created(caller, message.session_id)
    # One that is being worked on and TURN_QUEUE_LENGTH behind it.
    unfinished = session.turns.unfinished().count()
    if unfinished > settings.TURN_QUEUE_LENGTH:
        raise QueueFull("This session has as many messages waiting as it may.", Retry_After="5")
    requested = message.agent_type or ""
    if requested and session.turn_count == 0 and session.switch_count == 0:
        # A session that has had nothing yet starts on the agent asked for, without a handoff (section 4, row 3).
        Session.objects.filter(pk=session.pk).update(current_agent=requested)
        requested = ""
    turn = session.turns.create(position=session.turn_count + 1, requested_agent=requested)
    Message.objects.create(
        session=session, turn=turn, turn_position=turn.position, role=Message.Role.USER, content=message.content
    )
    Session.objects.filter(pk=session.pk).update(
        turn_count=turn.position,
        message_count=session.message_count + 1,
        last_activity=Now(),
        title=session.title if session.title is not None else message.content.strip()[:TITLE_CHARS],
    )
    log.record(lifecycle.fact(session, "session.message.added", turn_id=turn.pk, role="user", sent_by=caller.name))
    transaction.on_commit(feed.wake_runner)
    return Accepted(session.pk, turn.pk, lifecycle.position(session) if unfinished else session.next_seq - 1)

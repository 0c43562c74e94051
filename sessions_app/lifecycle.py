"""What happens to a session beside its turns: made, found, renamed, spoken to.

Whoever changes a session or gives numbers of its stream takes the lock of its row first; so all of it has one order.
"""

import re
import uuid
from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import OuterRef, Subquery
from django.db.models.functions import Coalesce

from events_app import log
from events_app.chunks import Chunk, encode
from events_app.feed import feed
from events_app.frames import Frame
from events_app.log import Fact
from events_app.models import StreamBatch
from orchestrator_site.errors import Invalid
from orchestrator_site.http import SESSION_ID
from sessions_app import jobs
from sessions_app.callers import Caller
from sessions_app.models import Session, SessionIdTaken, Turn, UnknownSession, locked_session, new_id


def valid_session_id(session_id: str) -> str:
    """The id as given. Raises Invalid for one that the server could not serve in a path."""
    if not re.fullmatch(SESSION_ID, session_id):
        raise Invalid("Has to be 1 to 128 letters, digits, '.', '_' or '-'.", "body", "session_id", kind="pattern")
    return session_id


def fact(session: Session, event_type: str, *, turn_id: uuid.UUID | None = None, **data: Any) -> Fact:
    """One thing that happened in a session, to be recorded in the transaction in which it does."""
    account_id, turn = session.account_id, str(turn_id or "")
    return log.fact(event_type, account_id=account_id, session_id=session.pk, turn_id=turn, **data)


def create(caller: Caller, session_id: str | None = None) -> Session:
    """Make a session of the caller's account. Raises SessionIdTaken whoever has it, deleted or not."""
    try:
        with transaction.atomic():
            session = Session.objects.create(pk=session_id or new_id(), account_id=caller.account_id)
            log.record(fact(session, "session.created", created_by=caller.name))
    except IntegrityError:
        raise SessionIdTaken("This session id is taken.") from None
    return session


def locked_for(caller: Caller, session_id: str) -> Session:
    """The session with its row locked, inside the caller's transaction. Raises UnknownSession."""
    return Session.objects.locked().one_visible_to(caller, session_id)


def locked_or_created(caller: Caller, session_id: str) -> Session:
    """The same for messages that make the session on first use. Never another account's: that one is unknown."""
    session = locked_session.first(id=session_id)
    if session is None:
        try:
            session = create(caller, session_id)
        except SessionIdTaken:  # by somebody who was faster
            session = Session.objects.locked().get(pk=session_id)
    if session.deleted_at is not None or session.account_id != caller.account_id:
        raise UnknownSession(f"Session {session_id} not found")
    return session


def position(session: Session) -> int:
    """The number past which everything said from now on will be found; the caller holds the session's lock.

    While a runner holds a block of numbers, what comes may lie within it.
    """
    live = session.live_turn()
    return live.settled_seq if live is not None else session.next_seq - 1


def rejoining(session: Session) -> tuple[int, uuid.UUID | None]:
    """Where somebody who comes back goes on reading, past which number, and the open turn.

    One query without a lock: between two a runner might take a block of numbers, or give it back.
    """
    turns = Turn.objects.filter(session=OuterRef("pk"))
    # Also of a runner whose lease has run out: without a lock nobody can tell whether it is being renewed.
    live = turns.filter(status=Turn.Status.RUNNING).values("settled_seq")[:1]
    oldest = turns.unfinished().order_by("position").values("pk")[:1]
    found = Session.objects.annotate(settled=Subquery(live), open_turn=Subquery(oldest)).get(pk=session.pk)
    return found.next_seq - 1 if found.settled is None else found.settled, found.open_turn


def newest(session_ids: Sequence[str]) -> list[tuple[str, int, bool]]:
    """Of each of these sessions its id, the number of the last frame in its log, and whether it was deleted."""
    logged = StreamBatch.objects.numbered().filter(session_id=OuterRef("pk")).order_by("-last_seq").values("last_seq")
    found = Session.objects.filter(pk__in=session_ids).annotate(last=Coalesce(Subquery(logged[:1]), 0))
    return [
        (pk, last, deleted_at is not None) for pk, last, deleted_at in found.values_list("pk", "last", "deleted_at")
    ]


def wake_runner(session_id: str) -> None:
    """Have the session's next turn run, in the transaction that lets it: a wake-up here, or a job for a worker."""
    if settings.TURN_RUNNER == "procrastinate":
        jobs.run_turns(session_id)
    else:
        transaction.on_commit(feed.wake_runner)


def emit(session: Session, *chunks: Chunk, origin: str, closes: bool = True) -> None:
    """Say something on a session's stream in the transaction that holds the session's lock; the last chunk perhaps
    `closes` the answer that it belongs to.

    A live runner owns the numbers: the frames are left to it. With none, the numbers come from the session's row.
    """
    bodies = [encode(chunk) for chunk in chunks]
    last = len(bodies) - 1
    if session.live_turn() is not None:
        for index, body in enumerate(bodies):
            log.leave_unnumbered(session.pk, origin, body, closes=closes and index == last)
    else:
        # What was left to a runner that died was said earlier.
        log.number_waiting(session.pk, lambda: session.reserve_numbers(1))
        first = session.reserve_numbers(len(bodies))
        frames = [
            Frame.of(first + index, origin, body, closes=closes and index == last) for index, body in enumerate(bodies)
        ]
        log.append(session.pk, frames)
    transaction.on_commit(lambda: feed.poke(session.pk))


@transaction.atomic
def rename(caller: Caller, session_id: str, title: str) -> Session:
    session = locked_for(caller, session_id)
    Session.objects.filter(pk=session.pk).update(title=title)
    session.title = title
    log.record(fact(session, "session.updated", title=title, updated_by=caller.name))
    return session

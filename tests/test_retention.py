"""Pruning the stream log, and what a reader who asks for the pruned part is told."""

from datetime import timedelta

import pytest
from django.db.models import F

from events_app import log
from events_app.chunks import AssistantText
from events_app.models import StreamBatch
from messages_app.turn_stream import Step, TurnStream
from sessions_app import following, retention
from sessions_app.models import Session, Turn
from tests.factories import CALLER, claim, make_session, make_turn

pytestmark = pytest.mark.django_db


def finish_a_turn(session: Session) -> None:
    stream = TurnStream(claim(make_turn(session)))

    def finish(step: Step) -> None:
        step.say(AssistantText("done"))
        step.end(Turn.Status.COMPLETED)

    stream.write(finish)


def make_old() -> None:
    StreamBatch.objects.update(created_at=F("created_at") - timedelta(days=30))


def test_old_frames_are_pruned_and_a_reader_of_them_is_reset_to_the_oldest_kept() -> None:
    session = make_session()
    finish_a_turn(session)
    old = [frame.seq for frame in log.page("s", 0)[0]]
    make_old()
    finish_a_turn(session)
    kept = log.page("s", old[-1])[0][0].seq

    retention.prune_streams()

    assert not StreamBatch.objects.filter(last_seq__in=old).exists()
    start = following.resumed(CALLER, "s", old[0], None)
    assert start.reset is not None
    assert start.reset.seq == start.after == kept - 1
    assert f'"from":{kept}' in start.reset.body
    assert following.resumed(CALLER, "s", 0, None).reset is None, "0 is the oldest kept frame, without a word"


def test_nothing_of_a_session_with_an_unfinished_turn_is_pruned() -> None:
    session = make_session()
    finish_a_turn(session)
    make_turn(session)
    make_old()

    assert retention.prune_streams() == 0
    assert StreamBatch.objects.count() == 2


def test_when_nothing_is_kept_the_reset_names_the_next_number_to_come() -> None:
    session = make_session()
    for _ in range(2):
        finish_a_turn(session)
    make_old()

    retention.prune_streams()

    session.refresh_from_db()
    start = following.resumed(CALLER, "s", session.pruned_seq - 1, None)
    assert start.reset is not None
    assert start.reset.seq == start.after == session.next_seq - 1
    assert f'"from":{session.next_seq}' in start.reset.body
    last_pruned = following.resumed(CALLER, "s", session.pruned_seq, None)
    assert last_pruned.reset is None, "nothing is missing"

"""Pruning the stream log, and what a reader who asks for the pruned part is told."""

from datetime import timedelta

import pytest
from django.db.models import F

from events_app import log
from events_app.chunks import AssistantText
from events_app.models import StreamBatch
from messages_app.turn_stream import Step, TurnStream
from sessions_app import retention
from sessions_app.models import Session, Turn
from sessions_app.views import _starting_point
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
    after, reset = _starting_point(CALLER, "s", old[0], None)
    assert reset is not None
    assert reset.seq == after == kept - 1
    assert f'"from":{kept}' in reset.body
    assert _starting_point(CALLER, "s", 0, None)[1] is None, "no position: from the oldest kept frame, without a word"


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
    after, reset = _starting_point(CALLER, "s", session.pruned_seq - 1, None)
    assert reset is not None
    assert reset.seq == after == session.next_seq - 1
    assert f'"from":{session.next_seq}' in reset.body
    assert _starting_point(CALLER, "s", session.pruned_seq, None)[1] is None, (
        "the last pruned number: nothing is missing"
    )

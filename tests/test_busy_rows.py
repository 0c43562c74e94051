"""What a message finds and what becomes of it, as rows: turns that are queued, running, waiting, or left behind."""

from dataclasses import replace

import pytest

from events_app.models import Event
from messages_app import acceptance, ending
from messages_app.acceptance import TurnRunning
from messages_app.inbound import Busy, ToolResult, UserMessage
from messages_app.models import Message
from sessions_app.models import CancelRequested, Turn
from tests.factories import CALLER, claim, complete, let_lease_run_out, make_calls, make_session, make_turn, run, wanted

pytestmark = pytest.mark.django_db

AGAIN = UserMessage("s", "again")
REJECT, INTERRUPT = replace(AGAIN, busy=Busy.REJECT), replace(AGAIN, busy=Busy.INTERRUPT)


def turns() -> list[tuple[str, str]]:
    return list(Turn.objects.order_by("position").values_list("status", "code"))


@pytest.mark.parametrize("state", ["queued", "running", "left behind", "going on"])
def test_every_turn_that_is_queued_or_running_is_in_the_way(state: str) -> None:
    session = make_session()
    if state == "going on":
        (call,) = make_calls(session, wanted("read_file"))
        acceptance.tool_result(ToolResult("s", call.pk, "done"), CALLER)
    else:
        turn = make_turn(session)
        if state != "queued":
            claim(turn)
        if state == "left behind":
            let_lease_run_out(turn)
    before = turns()

    with pytest.raises(TurnRunning) as refused:
        acceptance.user_message(REJECT, CALLER)

    assert (refused.value.status, refused.value.code) == (409, "turn_running")
    assert turns() == before
    assert Message.objects.filter(role="user").count() == 1


def test_what_waits_before_a_queued_turn_is_not_superseded_by_what_is_refused() -> None:
    session = make_session()
    (call,) = make_calls(session, wanted("read_file"))
    Turn.objects.create(session=session, position=2)

    with pytest.raises(TurnRunning):
        acceptance.user_message(REJECT, CALLER)

    assert turns() == [("waiting", ""), ("queued", "")]
    call.refresh_from_db()
    assert call.is_open


def test_an_interrupted_turn_can_end_in_no_other_way_and_the_next_one_waits_for_its_end() -> None:
    session = make_session()
    running = run(make_turn(session))
    make_turn(session, "behind")

    accepted = acceptance.user_message(INTERRUPT, CALLER)

    assert turns() == [("running", ""), ("cancelled", "cancelled"), ("queued", "")]
    with pytest.raises(CancelRequested):
        complete(running)
    assert not Turn.objects.claimable().exists()
    ending_turn = Turn.objects.get(position=1)
    assert ending_turn.cancel_requested_at is not None
    assert Turn.objects.get(pk=accepted.origin).position == 3


def test_an_interrupted_turn_without_a_runner_ends_at_once() -> None:
    session = make_session()
    turn = make_turn(session)
    claim(turn)
    let_lease_run_out(turn)

    accepted = acceptance.user_message(INTERRUPT, CALLER)

    assert turns() == [("cancelled", "cancelled"), ("queued", "")]
    assert str(Turn.objects.claimable().get().pk) == accepted.origin


def test_two_interruptions_leave_one_turn_behind_the_one_that_is_ended() -> None:
    session = make_session()
    claim(make_turn(session))

    for _ in range(2):
        acceptance.user_message(INTERRUPT, CALLER)

    assert turns() == [("running", ""), ("cancelled", "cancelled"), ("queued", "")]


def test_it_is_written_down_who_interrupted_what() -> None:
    session = make_session()
    claim(make_turn(session))
    acceptance.user_message(INTERRUPT, CALLER)

    (fact,) = Event.objects.filter(event_type="session.updated")
    assert fact.data == {"cancelled_by": "tests"}
    assert fact.correlation_id == str(Turn.objects.get(position=1).pk)
    assert ending.cancel(CALLER, "s") == Turn.objects.get(position=1).pk

"""Where a client that comes back goes on reading: `position` and `open_turn` of `open-calls`."""

import pytest
from rest_framework.test import APIRequestFactory, force_authenticate

from agents_app.approval_views import OpenCallsView
from sessions_app import lifecycle
from tests.factories import CALLER, claim, complete, let_lease_run_out, make_calls, make_session, make_turn, run, wanted

pytestmark = pytest.mark.django_db


def test_a_session_that_was_never_spoken_to_is_read_from_its_beginning() -> None:
    assert lifecycle.rejoining(make_session()) == (0, None)


def test_a_turn_that_waits_has_said_all_it_will_until_somebody_decides() -> None:
    session = make_session()
    [asked] = make_calls(session, wanted())
    session.refresh_from_db()

    request = APIRequestFactory().get("/")
    force_authenticate(request, user=CALLER)  # type: ignore[arg-type]
    shown = OpenCallsView.as_view()(request, session_id="s").data

    assert (shown["position"], shown["open_turn"]) == (session.next_seq - 1, str(asked.turn_id))
    assert [call["call_id"] for call in shown["open_calls"]] == [asked.pk]


def test_the_unfinished_text_of_a_turn_that_runs_is_behind_the_position() -> None:
    session = make_session()
    turn = make_turn(session)
    assert lifecycle.rejoining(session) == (0, turn.pk)

    claimed = claim(turn)

    assert lifecycle.rejoining(session) == (claimed.settled_seq, turn.pk)
    assert claimed.settled_seq < claimed.first_seq < claimed.block_end


def test_a_runner_whose_lease_has_run_out_may_be_renewing_it_and_is_taken_for_alive() -> None:
    session = make_session()
    turn = make_turn(session)
    claimed = claim(turn)

    let_lease_run_out(turn)

    assert lifecycle.rejoining(session) == (claimed.settled_seq, turn.pk)


def test_a_turn_that_is_over_is_not_open() -> None:
    session = make_session()
    complete(run(make_turn(session)))
    session.refresh_from_db()

    assert lifecycle.rejoining(session) == (session.next_seq - 1, None)

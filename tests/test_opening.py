"""What a turn's first model step starts from, read with the claim itself."""

from typing import Any

import pytest
from django.db.models.functions import Now

from agents_app.models import Agent
from messages_app import claims, steps, transcript
from messages_app.claims import Begun
from sessions_app.models import Session, Turn
from tests.factories import (
    act,
    let_lease_run_out,
    make_answered_turn,
    make_session,
    make_turn,
    run,
    wanted,
)

pytestmark = pytest.mark.django_db


def begun(owner: str = "runner") -> dict[str, Begun]:
    return {each.claim.session_id: each for each in claims.claim_turns(owner, 100)}


def test_it_is_what_a_look_finds() -> None:
    long_ago = make_session("answered")
    make_answered_turn(long_ago, "one", "first")
    make_answered_turn(long_ago, "two", None)
    with_tools = make_session("tools")
    earlier = run(make_turn(with_tools))
    act(earlier, wanted("read_file"))
    Turn.objects.filter(session=with_tools).update(status=Turn.Status.COMPLETED, finished_at=Now())
    routed = make_session("routed")
    Session.objects.filter(pk=routed.pk).update(current_agent="orchestrator")
    for session in (long_ago, with_tools, routed, make_session("new")):
        make_turn(session, f"hello {session.pk}")
    make_turn(with_tools, "not yet")

    claimed = begun()

    assert claimed.keys() == {"answered", "tools", "routed", "new"}
    for each in claimed.values():
        assert each.scene is not None
        assert each.scene == steps.look(each.claim)
    assert claimed["routed"].scene is not None
    assert claimed["routed"].scene.user_text == "hello routed"


def test_any_number_of_them_costs_one_query(django_assert_max_num_queries: Any) -> None:
    def cost(number: int) -> int:
        for index in range(number):
            make_turn(make_session(f"{number} {index}"))
        with django_assert_max_num_queries(100) as queries:
            assert all(each.scene is not None for each in begun().values())
        return len(queries)

    cost(1)  # pins the team
    assert cost(20) == cost(2)


def test_a_long_conversation_is_left_to_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "SHORT", 1)
    session = make_session()
    make_answered_turn(session, "one", "first")
    Session.objects.filter(pk=session.pk).update(message_count=2)
    make_turn(session, "two")

    assert begun()["s"].scene is None


def test_so_is_what_has_begun_before() -> None:
    taken_over = make_turn(make_session("taken over"))
    begun("one")
    let_lease_run_out(taken_over)
    asked_for = make_turn(make_session("asked for"))
    Turn.objects.filter(pk=asked_for.pk).update(requested_agent="architect")

    found = begun("two")

    assert {name: each.scene for name, each in found.items()} == {"taken over": None, "asked for": None}


def test_one_that_cannot_be_told_keeps_no_other_from_being_claimed() -> None:
    odd = make_session("odd")
    Session.objects.filter(pk=odd.pk).update(current_agent="nobody")
    for session in (odd, make_session("fine")):
        make_turn(session)

    found = begun()

    assert found["odd"].scene is None
    assert found["fine"].scene is not None


def test_the_team_is_that_of_the_claim() -> None:
    make_turn(make_session())

    (each,) = begun().values()
    Agent.objects.filter(name="coder").update(prompt="Another prompt.")

    assert each.scene is not None
    assert each.scene == steps.look(each.claim)
    assert each.scene.messages[0]["content"] != "Another prompt."

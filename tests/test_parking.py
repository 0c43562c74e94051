"""A turn that kills its runners is found among its neighbours and parked; the rest goes on."""

import uuid
from collections.abc import Callable
from datetime import timedelta

import pytest
from django.db.models.functions import Now

from events_app import log
from events_app.models import Event
from messages_app import claims, ending, steps
from messages_app.turn_stream import TurnStream
from sessions_app.models import Claim, Turn
from tests.factories import CALLER, act, claim, complete, make_session, make_turn, wanted

pytestmark = pytest.mark.django_db


def die(owner: str) -> None:
    """The runner is gone, and its leases have run out."""
    Turn.objects.held_by(owner).update(lease_until=Now() - timedelta(seconds=1))


def lose(turn: Turn, times: int) -> None:
    for number in range(times):
        claim(turn, f"dead-{number}")
        die(f"dead-{number}")


def claimed_by(owner: str) -> list[Claim]:
    """All that a runner with enough room gets."""
    got: list[Claim] = []
    while begun := claims.claim_turns(owner, 1_000):
        got += [each for each, *_ in begun]
    return got


def serve(kills: Callable[[Claim], bool]) -> tuple[int, int]:
    """Run everything to its end, in processes that die whenever `kills` says so of a turn, before any other has settled
    a step. How often they died, and how many rounds of answers it took."""
    deaths = rounds = 0
    while True:
        owner = f"runner-{deaths}"
        if not (running := claimed_by(owner)):
            return deaths, rounds
        if any(kills(each) for each in running):
            die(owner)
            deaths += 1
            assert deaths < 20, "it is not found"
        else:
            rounds += 1
            for each in running:
                complete(TurnStream(each))


def test_a_turn_that_killed_its_runner_three_times_is_parked_and_its_session_goes_on() -> None:
    session = make_session()
    poisoned, behind = make_turn(session), make_turn(session)
    lose(poisoned, 3)
    other = make_turn(make_session("other"))

    got = claimed_by("next")

    poisoned.refresh_from_db()
    assert (poisoned.status, poisoned.code, poisoned.lost_count) == ("failed", "runner_lost", 3)
    assert {each.turn_id for each in got} == {other.pk, behind.pk}


def test_whoever_waits_for_a_parked_turn_reads_why_and_the_end() -> None:
    turn = make_turn(make_session())
    lose(turn, 3)

    claims.claim_turns("next", 10)

    *_, error, finished = log.page("s", 0)[0]
    assert '"code":"runner_lost"' in error.body
    assert '"type":"turn_finished"' in finished.body
    assert '"status":"failed"' in finished.body
    assert finished.closes
    told = Event.objects.get(event_type="agent.error.occurred")
    assert (told.correlation_id, told.data["error_type"]) == (str(turn.pk), "runner_lost")


def test_twice_is_not_enough() -> None:
    turn = make_turn(make_session())
    lose(turn, 2)

    complete(TurnStream(claim(turn)))

    turn.refresh_from_db()
    assert turn.status == "completed"


def test_deaths_at_different_steps_are_no_pattern() -> None:
    turn = make_turn(make_session())
    for step in range(4):
        lose(turn, 2)
        stream = TurnStream(claim(turn))
        act(stream, wanted("switch_mode", {"mode": "ask" if step % 2 else "debug"}))
        stream.write(steps.release)

    assert [each.turn_id for each in claimed_by("last")] == [turn.pk]


def test_what_is_committed_between_two_steps_is_no_progress() -> None:
    turn = make_turn(make_session())
    lose(turn, 1)

    TurnStream(claim(turn)).write(lambda step: None)

    turn.refresh_from_db()
    assert turn.lost_count == 1


def test_a_release_is_no_loss() -> None:
    turn = make_turn(make_session())

    for number in range(5):
        TurnStream(claim(turn, f"stopped-{number}")).write(steps.release)

    assert [each.turn_id for each in claimed_by("next")] == [turn.pk]
    turn.refresh_from_db()
    assert turn.lost_count == 0


def test_the_poisoned_turn_is_told_from_twenty_neighbours_by_its_third_death() -> None:
    turns = [make_turn(make_session(f"s{number}")) for number in range(21)]
    poisoned = turns[13]

    deaths, _ = serve(lambda each: each.turn_id == poisoned.pk)

    poisoned.refresh_from_db()
    assert (deaths, poisoned.code) == (3, "runner_lost")
    assert Turn.objects.filter(status="completed").count() == 20


def test_two_poisoned_turns_are_both_found() -> None:
    turns = [make_turn(make_session(f"s{number}")) for number in range(21)]
    poisoned = {turns[0].pk, turns[20].pk}

    deaths, _ = serve(lambda each: each.turn_id in poisoned)

    assert deaths == 4, "each dies twice with all the others, then each alone"
    assert set(Turn.objects.filter(code="runner_lost").values_list("pk", flat=True)) == poisoned
    assert Turn.objects.filter(status="completed").count() == 19


def test_many_suspects_go_in_groups_and_the_innocent_are_spared() -> None:
    turns = [make_turn(make_session(f"s{number}")) for number in range(200)]
    poisoned = turns[150]

    deaths, rounds = serve(lambda each: each.turn_id == poisoned.pk)

    poisoned.refresh_from_db()
    assert poisoned.code == "runner_lost"
    assert Turn.objects.filter(status="completed").count() == 199
    assert deaths == 4, "twice with all, once in its group, once alone"
    assert rounds < 100, "one after the other, 199 rounds"


def test_a_suspect_keeps_nobody_waiting_but_other_suspects() -> None:
    suspects = [make_turn(make_session(f"suspect{number}")) for number in range(3)]
    for owner in ("dead-0", "dead-1"):
        claimed_by(owner)
        die(owner)
    others = [make_turn(make_session(f"other{number}")) for number in range(3)]

    got = {each.turn_id for each in claimed_by("next")}

    assert got == {suspects[0].pk, *(turn.pk for turn in others)}


def test_the_next_suspect_begins_when_one_has_settled_a_step() -> None:
    first, second = (make_turn(make_session(name)) for name in "ab")
    for owner in ("dead-0", "dead-1"):
        claimed_by(owner)
        die(owner)
    (begun,) = claimed_by("next")
    assert begun.turn_id == first.pk

    act(TurnStream(begun), wanted("switch_mode", {"mode": "ask"}))

    assert [each.turn_id for each in claimed_by("next")] == [second.pk]


def test_nobody_joins_the_suspect_that_runs_alone_however_many_come() -> None:
    alone = make_turn(make_session())
    lose(alone, 2)
    claim(alone, "next")
    for number in range(2 * claims.SUSPECTS_TO_ONE):
        make_turn(make_session(f"s{number}"))
    for owner in ("dead-0", "dead-1"):
        claimed_by(owner)
        die(owner)

    assert claimed_by("next") == []


def test_each_process_tries_a_suspect_of_its_own() -> None:
    turns = [make_turn(make_session(name)) for name in "ab"]
    for owner in ("dead-0", "dead-1"):
        claimed_by(owner)
        die(owner)

    got = [each.turn_id for owner in ("one", "two") for each in claimed_by(owner)]

    assert got == [turn.pk for turn in turns]


def test_a_turn_that_is_to_be_cancelled_ends_cancelled_however_often_it_was_lost() -> None:
    turn = make_turn(make_session())
    lose(turn, 2)
    claim(turn, "dead-2")
    ending.cancel(CALLER, "s")
    die("dead-2")

    assert [each.turn_id for each in claimed_by("next")] == [turn.pk]


def test_a_turn_that_moved_on_in_the_meantime_is_not_parked() -> None:
    turn = make_turn(make_session())
    lose(turn, 3)
    seen: tuple[uuid.UUID, str] = (turn.pk, "s")
    ending.cancel(CALLER, "s")

    claims._park(*seen, claims.RUNNERS_LOST, among=Turn.objects.claimable().condemned())

    turn.refresh_from_db()
    assert turn.status == "cancelled"

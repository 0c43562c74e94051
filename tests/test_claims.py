"""Claims, leases and fences: of two runners only one can write."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.models.functions import Now
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from events_app import log
from events_app.chunks import AgentSwitched, encode
from events_app.frames import Frame
from events_app.models import StreamBatch
from messages_app import claims, ending, steps
from messages_app.turn_stream import BLOCK, Step, TurnStream
from sessions_app import lifecycle
from sessions_app.models import CancelRequested, LostClaim, Session, Turn, TurnMoved
from tests.factories import CALLER, claim, let_lease_run_out, make_session, make_turn

pytestmark = pytest.mark.django_db


def test_a_turn_is_claimed_once() -> None:
    turn = make_turn(make_session())

    first, second = claims.claim_turns("one", 10), claims.claim_turns("two", 10)

    assert [each.turn_id for each, *_ in first] == [turn.pk]
    assert second == []


def test_of_two_runners_that_saw_the_same_turn_one_gets_it() -> None:
    turn = make_turn(make_session())
    first = claim(turn, "one")

    with pytest.raises(TurnMoved):
        Turn.claim([replace(first, owner="two")])

    turn.refresh_from_db()
    assert turn.owner == "one"


def test_only_the_oldest_unfinished_turn_of_a_session_may_run() -> None:
    session = make_session()
    first, second = make_turn(session), make_turn(session)

    assert [each.turn_id for each, *_ in claims.claim_turns("one", 10)] == [first.pk]
    assert claims.claim_turns("one", 10) == []
    Turn.objects.filter(pk=first.pk).update(status=Turn.Status.WAITING)
    assert claims.claim_turns("one", 10) == []
    Turn.objects.filter(pk=first.pk).update(status=Turn.Status.COMPLETED)
    assert [each.turn_id for each, *_ in claims.claim_turns("one", 10)] == [second.pk]


def test_the_database_refuses_two_active_turns_in_one_session() -> None:
    session = make_session()
    make_turn(session)
    make_turn(session)

    with pytest.raises(IntegrityError), transaction.atomic():
        session.turns.update(status=Turn.Status.RUNNING)


def test_a_turn_whose_lease_ran_out_is_taken_over_with_numbers_above_all_that_were_given() -> None:
    turn = make_turn(make_session())
    lost = claim(turn, "one")
    let_lease_run_out(turn)

    (taken, frames, _), *_ = claims.claim_turns("two", 10)

    assert (taken.owner, taken.attempt) == ("two", lost.attempt + 1)
    assert taken.first_seq > lost.block_end - 1
    assert '"type":"restarted"' in frames[0].body
    assert f'"discard_after":{lost.settled_seq}' in frames[0].body


def test_a_runner_that_lost_its_claim_can_write_nothing() -> None:
    turn = make_turn(make_session())
    lost = claim(turn, "one")
    let_lease_run_out(turn)
    claim(turn, "two")

    for write in (
        lambda: Turn.progress(lost, handoff_count=9),
        lambda: Turn.finish(lost, Turn.Status.COMPLETED),
        lambda: Turn.finish(lost, Turn.Status.CANCELLED),
        lambda: Turn.ensure_running(lost),
        lambda: Turn.release(lost),
    ):
        with pytest.raises(LostClaim):
            write()

    turn.refresh_from_db()
    assert (turn.owner, turn.status, turn.handoff_count) == ("two", "running", 0)
    assert Turn.objects.filter(lease_until__gt=Now()).exists()


def test_a_lease_that_ran_out_is_lost_even_before_somebody_takes_over() -> None:
    turn = make_turn(make_session())
    held = claim(turn)
    let_lease_run_out(turn)

    claims.renew_leases(held.owner, [turn.pk], [])

    with pytest.raises(LostClaim):
        Turn.progress(held, handoff_count=1)


def test_what_is_read_while_the_claim_is_lost_is_not_sent_to_a_model() -> None:
    turn = make_turn(make_session())
    held = claim(turn)

    def slept(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        """The process was paused before it read the messages, and its lease ran out."""
        if 'FROM "messages_app_message"' in sql:
            Turn.objects.filter(pk=turn.pk).update(lease_until=Now() - timedelta(seconds=1))
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(slept), pytest.raises(LostClaim):
        steps.look(held)


def test_a_released_turn_is_claimed_at_once_and_its_unfinished_step_is_void() -> None:
    turn = make_turn(make_session())
    stream = TurnStream(claim(turn, "one"))

    stream.write(steps.release)

    turn.refresh_from_db()
    assert (turn.status, turn.owner) == ("running", ""), "the unfinished step is known as such"
    (taken, frames, _), *_ = claims.claim_turns("two", 10)
    assert (taken.turn_id, taken.owner) == (turn.pk, "two")
    assert f'"discard_after":{stream.claim.settled_seq}' in frames[0].body
    with pytest.raises(LostClaim):
        Turn.progress(stream.claim, handoff_count=9)


def test_a_cancelled_turn_is_released_like_any_other() -> None:
    turn = make_turn(make_session())
    stream = TurnStream(claim(turn, "one"))
    ending.cancel(CALLER, "s")

    stream.write(steps.release)

    assert [each.turn_id for each, *_ in claims.claim_turns("two", 10)] == [turn.pk]


def test_a_step_of_a_lost_claim_leaves_no_trace() -> None:
    session = make_session()
    turn = make_turn(session)
    stream = TurnStream(claim(turn, "one"))
    let_lease_run_out(turn)
    claim(turn, "two")
    before = StreamBatch.objects.count()

    with pytest.raises(LostClaim):
        stream.write(lambda step: step.end(Turn.Status.COMPLETED))

    assert StreamBatch.objects.count() == before
    turn.refresh_from_db()
    assert turn.status == "running"


def test_the_group_commit_logs_only_turns_that_are_still_held() -> None:
    kept, lost = make_turn(make_session("a")), make_turn(make_session("b"))
    claimed = {each.turn_id: each for each, *_ in claims.claim_turns("one", 10)}
    held, gone = claimed[kept.pk], claimed[lost.pk]
    let_lease_run_out(lost)
    claim(lost, "somebody else")
    frames = {c.turn_id: [Frame.of(c.first_seq, str(c.turn_id), "data:{}\n\n")] for c in (held, gone)}

    logged = claims.write_batches(
        held.owner, [claims.Unlogged(c, frames[c.turn_id], wants_numbers=True) for c in (held, gone)]
    )

    assert list(logged) == [kept.pk]
    first, end = logged[kept.pk] or (0, 0)
    assert first >= held.block_end
    assert end - first == BLOCK
    assert not StreamBatch.objects.filter(session_id="b", first_seq=gone.first_seq).exists()


def test_a_cancelled_turn_can_end_in_no_other_way() -> None:
    turn = make_turn(make_session())
    held = claim(turn)

    assert ending.cancel(CALLER, "s") == turn.pk

    with pytest.raises(CancelRequested):
        Turn.finish(held, Turn.Status.COMPLETED)
    with pytest.raises(CancelRequested):
        Turn.progress(held, handoff_count=1)
    Turn.finish(held, Turn.Status.CANCELLED, code="cancelled")
    turn.refresh_from_db()
    assert turn.status == "cancelled"


def test_cancelling_a_queued_turn_says_so_on_the_stream() -> None:
    session = make_session()
    turn = make_turn(session)

    ending.cancel(CALLER, "s")

    frames, _ = log.page("s", 0)
    assert [frame.origin for frame in frames] == [str(turn.pk)]
    assert frames[0].closes
    assert '"status":"cancelled"' in frames[0].body
    assert claims.claim_turns("one", 10) == []


def test_a_frame_left_to_a_runner_that_died_is_numbered_by_the_next() -> None:
    session = make_session()
    turn = make_turn(session)
    claim(turn, "one")
    with transaction.atomic():
        locked = Session.objects.locked().get(pk="s")
        lifecycle.emit(locked, _switched(), origin="the switch")
    assert StreamBatch.objects.unnumbered().count() == 1
    let_lease_run_out(turn)

    claims.claim_turns("two", 10)

    assert StreamBatch.objects.unnumbered().count() == 0
    origins = [frame.origin for frame in log.page("s", 0)[0]]
    assert origins == [str(turn.pk), "the switch", str(turn.pk)]


def test_numbers_go_on_in_a_new_block_when_one_runs_out() -> None:
    turn = make_turn(make_session())
    held = claim(turn)
    stream = TurnStream(held)
    stream._next = stream._end  # all given

    stream.write(lambda step: step.say(_switched()))

    assert log.page("s", held.block_end - 1)[0][0].seq >= held.block_end
    assert Turn.objects.get(pk=turn.pk).settled_seq >= held.block_end


def test_numbers_reserved_in_a_transaction_that_fails_are_not_used() -> None:
    turn = make_turn(make_session())
    stream = TurnStream(claim(turn))
    stream._next = stream._end  # all given: the next step reserves a block
    taken = Session.objects.get(pk="s").next_seq
    StreamBatch.objects.create(
        session_id="s", origin="x", first_seq=taken, last_seq=taken, frames=[], created_at=timezone.now()
    )

    with pytest.raises(IntegrityError), transaction.atomic():
        stream.write(lambda step: step.say(_switched()))

    assert (stream._next, stream._spare) == (stream._end, None), "nothing is given of a block that may not be ours"


def test_a_number_given_in_a_commit_that_failed_is_not_given_again() -> None:
    turn = make_turn(make_session())
    stream = TurnStream(claim(turn))
    given = stream.last_given() + 1

    def write(step: Step) -> None:
        step.say(_switched())
        Turn.objects.filter(pk=turn.pk).update(lease_until=Now())  # so that the step's own update fails, at its end

    with pytest.raises(LostClaim):
        stream.write(write)

    assert stream.last_given() == given


def test_only_turns_that_somebody_works_on_keep_their_leases() -> None:
    kept, given_up = make_turn(make_session("a")), make_turn(make_session("b"))
    claims.claim_turns("one", 10)
    almost_over = Turn.objects.filter(pk=given_up.pk).values_list("lease_until", flat=True)
    before = almost_over.get()

    claims.renew_leases("one", [kept.pk], [])

    assert almost_over.get() == before
    kept.refresh_from_db()
    assert kept.lease_until > before  # type: ignore[operator]


def test_a_turn_that_bears_a_runners_name_without_its_knowledge_is_let_go_before_its_lease_runs_out(
    settings: Any,
) -> None:
    stray, given_up, fresh = (make_turn(make_session(name)) for name in "abc")
    claims.claim_turns("one", 10)
    missed = settings.TURN_LEASE_SECONDS - 2 * settings.TURN_LEASE_RENEWAL_SECONDS - 0.1
    Turn.objects.exclude(pk=fresh.pk).update(lease_until=Now() + timedelta(seconds=missed))

    claims.renew_leases("one", [], [given_up.pk])

    assert set(Turn.objects.held_by("one").values_list("pk", flat=True)) == {given_up.pk, fresh.pk}
    ((again, *_),) = claims.claim_turns("two", 10)
    stray.refresh_from_db()
    assert (again.turn_id, stray.lost_count) == (stray.pk, 0), "nobody has died"


def test_a_lease_that_ran_out_while_its_runner_could_not_renew_it_is_released_as_nobodys_death() -> None:
    turn = make_turn(make_session())
    held = claim(turn, "one")
    Turn.objects.filter(pk=turn.pk).update(lease_until=Now() - timedelta(seconds=1))

    claims.release(held)

    claim(turn, "two")
    turn.refresh_from_db()
    assert (turn.attempt, turn.lost_count) == (2, 0)
    with pytest.raises(LostClaim):
        claims.release(held)


def test_what_is_claimed_is_run_also_when_the_rest_of_the_claim_fails() -> None:
    suspect = make_turn(make_session("suspect"))
    Turn.objects.filter(pk=suspect.pk).update(lost_count=2)
    make_turn(make_session("trusted"))

    with failing_for("trusted"):
        begun = claims.claim_turns("one", 10)

    assert [claim.turn_id for claim, *_ in begun] == [suspect.pk]


@contextmanager
def failing_for(session_id: str) -> Iterator[None]:
    """Statements that write of a session fail, as when one takes too long."""

    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith(("UPDATE", "INSERT")) and session_id in str(params):
            raise OperationalError("canceling statement due to statement timeout")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(fail):
        yield


def test_a_row_that_cannot_be_worked_with_fails_its_turn_and_keeps_nobody_waiting() -> None:
    broken, healthy = make_turn(make_session("broken")), make_turn(make_session("healthy"))
    damage("broken")

    claimed = claims.claim_turns("one", 10)

    assert [each.turn_id for each, *_ in claimed] == [healthy.pk]
    broken.refresh_from_db()
    assert (broken.status, broken.code) == ("failed", "internal_error")
    said = log.page("broken", 0)[0]
    assert [frame.closes for frame in said] == [False, True], "whoever waits for its answer gets an end"
    assert '"type":"turn_finished"' in said[-1].body


def test_a_frame_that_cannot_be_read_keeps_no_turn_waiting() -> None:
    turn = make_turn(make_session())
    StreamBatch.objects.create(session_id="s", origin="x", frames=[], created_at=timezone.now())

    claim(turn)

    turn.refresh_from_db()
    assert turn.status == "running"
    assert not StreamBatch.objects.unnumbered().exists()


def test_what_was_left_to_a_turn_that_nobody_can_run_is_said_before_its_end() -> None:
    session = make_session()
    turn = make_turn(session)
    log.leave_unnumbered("s", "the switch", encode(_switched()), closes=True)
    damage("s")

    claims.claim_turns("one", 10)

    assert [frame.origin for frame in log.page("s", 0)[0]] == ["the switch", str(turn.pk), str(turn.pk)]


def test_turns_of_many_sessions_cost_hardly_more_statements_than_one(
    django_assert_max_num_queries: DjangoAssertNumQueries,
) -> None:
    turns = [make_turn(make_session(f"s{number}")) for number in range(20)]

    with django_assert_max_num_queries(30):
        begun, locked = claims.claim_in("one", [turn.session_id for turn in turns])

    assert {claim.turn_id for claim, *_ in begun.values()} == {turn.pk for turn in turns}
    assert locked == set()


def damage(session_id: str) -> None:
    """Make the session's turn one that cannot be claimed."""
    # PostgreSQL lets no text into a column of numbers, and SQLite's have no largest one.
    broken = "attempt = 2147483647" if connection.vendor == "postgresql" else "round_count = 'x'"
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE sessions_app_turn SET {broken} WHERE session_id = %s", [session_id])  # noqa: S608


def _switched() -> AgentSwitched:
    return AgentSwitched("coder", "ask", "because", is_final=True)

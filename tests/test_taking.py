"""A message of no crowd: its turn is stored and claimed in one transaction, by the runner of the same process."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, cast

import pytest
from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from agents_app import team
from agents_app.models import Agent
from events_app.database import store
from events_app.feed import feed
from messages_app import acceptance, claims
from messages_app.acceptance import Accepted
from messages_app.claims import Begun
from messages_app.inbound import UserMessage
from messages_app.runner import TAKEN_AT_ONCE, EmbeddedRunner, here
from sessions_app.idempotency import Key
from sessions_app.models import Account, IdempotencyRecord, Turn
from tests.factories import CALLER, make_session, make_turn

pytestmark = pytest.mark.django_db(transaction=True)


class Taker:
    owner = "taker"
    is_stopping = False

    def __init__(self) -> None:
        self.taken: list[Begun] = []
        self.abandoned: list[Begun] = []

    def take_new(self, begun: Begun) -> None:
        assert Turn.objects.get().owner == self.owner, "before the commit"
        self.taken.append(begun)

    def abandon(self, begun: Begun) -> None:
        self.abandoned.append(begun)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Gone after another test that commits."""
    Account.objects.get_or_create(pk=1)
    Agent.objects.get_or_create(pk="orchestrator", defaults={"position": 99, "prompt": "You choose."})


def accept(taker: Taker | None) -> Accepted:
    return acceptance.user_message(UserMessage("s", "hello"), CALLER, taker=taker)


def test_it_is_claimed_as_it_is_stored() -> None:
    taker = Taker()

    accepted = accept(taker)

    ((claim, frames, _),) = taker.taken
    turn = Turn.objects.get()
    assert (turn.status, turn.attempt, str(turn.pk)) == ("running", 1, accepted.origin)
    assert [frame.seq for frame in frames] == [accepted.after + 1]
    assert Turn.ensure_running(claim) == turn


def test_behind_another_it_is_queued() -> None:
    make_turn(make_session())
    taker = Taker()

    accept(taker)

    assert taker.taken == []
    assert list(Turn.objects.values_list("status", flat=True)) == ["queued", "queued"]


def test_what_cannot_be_claimed_is_accepted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "pin", lambda: 1 / 0)
    taker = Taker()

    accept(taker)

    assert taker.taken == []
    assert Turn.objects.get().status == "queued"


def test_a_database_that_fails_has_stored_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise OperationalError

    monkeypatch.setattr(team, "pin", fail)

    with pytest.raises(OperationalError):
        accept(Taker())
    assert not Turn.objects.exists()


# --- Which runner takes it -------------------------------------------------------------------------------------------


def test_by_a_runner_that_stops_it_is_not_claimed() -> None:
    taker = Taker()
    taker.is_stopping = True

    accept(taker)

    assert (taker.taken, Turn.objects.get().status) == ([], "queued")


def test_what_may_have_been_committed_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    taker, wrapper = Taker(), cast(Any, BaseDatabaseWrapper)
    commit = wrapper._commit

    def commit_and_fail(self: Any) -> None:
        commit(self)
        raise OperationalError("the connection broke")

    with monkeypatch.context() as broken:
        broken.setattr(wrapper, "_commit", commit_and_fail)
        with pytest.raises(OperationalError):
            accept(taker)

    ((claim, *_),) = taker.abandoned
    assert taker.taken == []
    assert claim.turn_id == Turn.objects.get().pk


def test_what_is_stored_under_a_key_is_what_every_version_knows() -> None:
    said = UserMessage("s", "hello")
    accepted = [acceptance.user_message(said, CALLER, Key(CALLER, "k", "f"), taker=Taker()) for _ in range(2)]

    record = IdempotencyRecord.objects.get()
    stored = json.loads(record.outcome_text)
    assert set(stored) == {"session_id", "origin", "after", "has_frames", "lost", "begins"}
    assert [each.is_new for each in accepted] == [True, False]
    record.outcome_text = json.dumps({**stored, "of_a_later_version": 1})
    record.save()
    assert acceptance.user_message(said, CALLER, Key(CALLER, "k", "f")) == accepted[0]


async def has_looked(runner: EmbeddedRunner) -> None:
    """Until it knows that nothing waits."""
    async with asyncio.timeout(10):
        while runner._has_backlog:  # noqa: ASYNC110 (nothing else tells)
            await asyncio.sleep(0.01)


def with_runner(play: Callable[[EmbeddedRunner], Coroutine[Any, Any, None]]) -> None:
    async def played() -> None:
        feed.attach(asyncio.get_running_loop(), on_wake=lambda: None)
        runner = EmbeddedRunner()
        runner.start()
        await has_looked(runner)
        try:
            await play(runner)
        finally:
            await runner.stop()
            feed.detach()

    asyncio.run(played())


def test_some_are_taken_and_of_a_crowd_only_the_first() -> None:
    async def play(runner: EmbeddedRunner) -> None:
        with ExitStack() as stored:
            takers = [stored.enter_context(here.taking()) for _ in range(TAKEN_AT_ONCE + 2)]
            assert takers == [*[runner] * TAKEN_AT_ONCE, None, None]
        with here.taking() as later:
            assert later is runner

    with_runner(play)


def test_nothing_is_taken_beyond_the_places_that_there_are(settings: Any) -> None:
    async def play(runner: EmbeddedRunner) -> None:
        settings.TURNS_AT_ONCE = 0
        with here.taking() as taker:
            assert taker is None

    with_runner(play)


def test_nothing_is_taken_where_no_runner_is() -> None:
    with here.taking() as taker:
        assert taker is None


def test_what_is_being_stored_when_the_runner_is_told_to_stop_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    is_claiming, may_go_on = threading.Event(), threading.Event()
    claim_new = claims.claim_new

    def held(*args: Any) -> Begun:
        is_claiming.set()
        may_go_on.wait(10)
        return claim_new(*args)

    monkeypatch.setattr(claims, "claim_new", held)

    async def play(runner: EmbeddedRunner) -> None:
        async def send() -> None:
            with here.taking() as taker:
                await store(acceptance.user_message, UserMessage("s", "hello"), CALLER, taker=taker)

        sending = asyncio.create_task(send())
        await asyncio.to_thread(is_claiming.wait, 10)
        stopping = asyncio.create_task(runner.stop())
        await asyncio.sleep(0)
        may_go_on.set()
        await asyncio.gather(sending, stopping)

    with_runner(play)

    turn = Turn.objects.get()
    assert (turn.status, turn.owner, turn.attempt, turn.lost_count) == ("running", "", 1, 0)

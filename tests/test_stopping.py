"""What a runner does that is told to stop; its database work is committed on other threads."""

import asyncio

import pytest

from events_app.feed import feed
from messages_app.runner import Runner
from sessions_app.models import Account
from tests.factories import make_session, make_turn


@pytest.mark.django_db(transaction=True)
def test_a_session_that_comes_to_a_stopping_runner_is_told_to_another() -> None:
    Account.objects.get_or_create(pk=1)  # seeded, but gone after another test that commits
    turn = make_turn(make_session())
    told: list[bool] = []

    async def stopped() -> None:
        feed.attach(asyncio.get_running_loop(), on_wake=lambda: told.append(True))
        runner = Runner()
        runner.begin_stopping()
        await runner.take_up("s")
        await asyncio.sleep(0)
        feed.detach()

    asyncio.run(stopped())

    turn.refresh_from_db()
    assert (turn.status, told) == ("queued", [True])

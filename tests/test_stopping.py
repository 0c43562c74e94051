"""What a runner does that is told to stop; its database work is committed on other threads."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from agents_app.binding import args_hash
from agents_app.llm import get_model
from agents_app.models import Agent
from agents_app.server_tools import ServerCall, ServerTool, registered
from events_app.feed import feed
from messages_app import claims
from messages_app.engine import run_turn
from messages_app.runner import EmbeddedRunner, Runner
from messages_app.turn_stream import Stopping
from sessions_app.models import Account, ToolCall, Turn
from tests.factories import make_session, make_turn, run


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


def make_released_call() -> ToolCall:
    """One that the server has to execute, of a turn that waits for a runner."""
    Account.objects.get_or_create(pk=1)
    turn = make_turn(make_session())
    Turn.objects.filter(pk=turn.pk).update(round_count=1)
    call = ToolCall(session_id="s", turn=turn, round=1, position=0, agent="coder", tool_name="pay")
    call.on_server, call.status, call.arguments_text = True, ToolCall.Status.RELEASED, "{}"
    call.args_hash = args_hash("s", call.pk, "pay", 0, "{}")
    call.save()
    return call


@pytest.mark.django_db(transaction=True)
def test_a_runner_that_stops_begins_to_execute_nothing() -> None:
    call = make_released_call()
    stream = run(call.turn)
    stream.interrupt(Stopping())

    with pytest.raises(Stopping):
        asyncio.run(run_turn(stream, get_model(), []))

    call.refresh_from_db()
    assert (call.status, call.begun_at) == ("released", None)


@pytest.mark.django_db(transaction=True)
def test_a_runner_that_stops_waits_a_little_for_what_it_executes(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_released_call()
    stream = run(call.turn)

    async def pay(executed: ServerCall) -> str:
        stream.interrupt(Stopping())
        for _ in range(100):  # of the loop's rounds, in one of which it is seen
            await asyncio.sleep(0)
        return "paid"

    monkeypatch.setitem(registered, "pay", ServerTool("pay", "", {}, pay, is_repeatable=False, deadline_seconds=None))

    with pytest.raises(Stopping):
        asyncio.run(run_turn(stream, get_model(), []))

    call.refresh_from_db()
    assert (call.outcome, call.answer) == ("ok", "paid")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("way", ["a job", "what waits at the start", "the embedded runner"])
def test_a_turn_that_was_being_claimed_when_its_runner_was_told_to_stop_is_released(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Account.objects.get_or_create(pk=1)
    Agent.objects.get_or_create(pk="coder", defaults={"position": 99, "prompt": "You are the coder."})
    turn = make_turn(make_session())
    is_claiming, may_go_on = threading.Event(), threading.Event()

    def held(claim: Callable[..., Any]) -> Callable[..., Any]:
        def claim_held(*args: Any) -> Any:
            is_claiming.set()
            may_go_on.wait(10)
            return claim(*args)

        return claim_held

    for name in ("claim_in", "claim_turns"):
        monkeypatch.setattr(claims, name, held(getattr(claims, name)))

    async def stop_while_it_claims() -> None:
        feed.attach(asyncio.get_running_loop(), on_wake=lambda: None)
        runner = EmbeddedRunner() if way == "the embedded runner" else Runner()
        runner.start()
        taking_up = {"a job": runner.take_up("s"), "what waits at the start": runner.take_up_all()}
        tasks = [asyncio.create_task(each) for name, each in taking_up.items() if name == way]
        for name, each in taking_up.items():
            if name != way:
                each.close()
        await asyncio.to_thread(is_claiming.wait, 10)
        stopping = asyncio.create_task(runner.stop())
        await asyncio.sleep(0)
        may_go_on.set()
        await asyncio.gather(stopping, *tasks)
        feed.detach()

    asyncio.run(stop_while_it_claims())

    turn.refresh_from_db()
    assert (turn.status, turn.owner, turn.attempt, turn.lost_count) == ("running", "", 1, 0)

"""What followers in one process see of a turn that runs in another, whatever the layer between them loses."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import pytest

from events_app import log
from events_app.chunks import encode_delta
from events_app.database import hop
from events_app.feed import QUEUE_FRAMES, Batch, feed
from events_app.frames import Frame
from events_app.stream import follow

pytestmark = pytest.mark.django_db(transaction=True)

Follower = AsyncGenerator[list[Frame], None]


def frame(seq: int) -> Frame:
    return Frame.of(seq, "turn 1", encode_delta(f"frame {seq}"))


def batch(*numbers: int, prev: int, logged: int) -> Batch:
    """Frames with these numbers as the relay hands them over."""
    return Batch([frame(seq) for seq in numbers], prev, logged)


def following(scenario: Callable[[Follower], Awaitable[None]]) -> None:
    """Run a scenario with somebody who follows session `s` and has read its log, which holds frame 1."""

    async def run() -> None:
        await hop(log.append, "s", [frame(1)])
        async with aclosing(follow("s", after=0)) as follower:
            assert [each.seq for each in await anext(follower)] == [1]
            await scenario(follower)

    asyncio.run(run())


async def numbers_of(follower: Follower, count: int) -> list[int]:
    """The numbers of the next `count` frames."""
    seen: list[int] = []
    while len(seen) < count:
        seen += [each.seq for each in await asyncio.wait_for(anext(follower), 10)]
    return seen


def test_frames_of_another_process_are_shown_without_the_log() -> None:
    async def scenario(follower: Follower) -> None:
        feed.deliver("s", batch(2, 3, prev=1, logged=1))
        feed.deliver("s", batch(4, prev=3, logged=1))

        assert await numbers_of(follower, 3) == [2, 3, 4]

    following(scenario)


def test_a_frame_that_the_layer_lost_is_waited_for_until_it_is_in_the_log() -> None:
    async def scenario(follower: Follower) -> None:
        feed.deliver("s", batch(3, prev=2, logged=1))
        coming = asyncio.ensure_future(numbers_of(follower, 3))
        done, _ = await asyncio.wait([coming], timeout=0.3)
        assert not done

        await hop(log.append, "s", [frame(2)])
        feed.deliver("s", batch(4, prev=3, logged=2))

        assert await coming == [2, 3, 4]

    following(scenario)


def test_numbers_that_nobody_was_given_hold_nobody_up() -> None:
    async def scenario(follower: Follower) -> None:
        feed.deliver("s", batch(4_001, 4_002, prev=4_000, logged=4_000))

        assert await numbers_of(follower, 2) == [4_001, 4_002]

    following(scenario)


def test_what_a_dead_runner_did_not_log_is_passed_over_when_the_next_one_begins() -> None:
    async def scenario(follower: Follower) -> None:
        feed.deliver("s", batch(3, prev=2, logged=1))  # frame 2 was lost twice: by the layer, and with its runner
        coming = asyncio.ensure_future(numbers_of(follower, 1))
        done, _ = await asyncio.wait([coming], timeout=0.3)
        assert not done

        await hop(log.append, "s", [frame(4_001)])
        feed.deliver("s", batch(4_001, prev=4_000, logged=4_000))

        assert await coming == [4_001]

    following(scenario)


def test_frames_that_come_twice_or_late_are_shown_once() -> None:
    async def scenario(follower: Follower) -> None:
        for each in (batch(2, prev=1, logged=1), batch(2, prev=1, logged=1), batch(3, prev=2, logged=1)):
            feed.deliver("s", each)
        assert await numbers_of(follower, 2) == [2, 3]

        feed.deliver("s", batch(2, 3, prev=1, logged=1))
        feed.deliver("s", batch(4, prev=3, logged=1))
        assert await numbers_of(follower, 1) == [4]

    following(scenario)


def test_a_follower_that_cannot_keep_up_finds_the_rest_in_the_log() -> None:
    async def scenario(follower: Follower) -> None:
        many = [frame(seq) for seq in range(2, QUEUE_FRAMES + 12)]
        for each in many:
            feed.deliver("s", Batch([each], each.seq - 1, 1))
        await hop(log.append, "s", many)

        assert await numbers_of(follower, len(many)) == [each.seq for each in many]

    following(scenario)


def test_a_follower_is_asked_to_read_again_where_the_log_is_ahead_of_it() -> None:
    async def scenario(follower: Follower) -> None:
        coming = asyncio.ensure_future(numbers_of(follower, 1))
        await hop(log.append, "s", [frame(2)])
        assert feed.followed() == {"s": 1}

        feed.look("s")

        assert await coming == [2]

    following(scenario)

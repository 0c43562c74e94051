"""A follower reads every frame once and in order, whatever order the bus hands them over in."""

import asyncio
from contextlib import aclosing

import pytest

from events_app import log
from events_app.chunks import encode_delta
from events_app.database import hop
from events_app.feed import feed
from events_app.frames import Frame
from events_app.stream import follow


def frame(seq: int, origin: str = "turn 1", *, closes: bool = False) -> Frame:
    return Frame.of(seq, origin, encode_delta(f"frame {seq}"), closes=closes)


@pytest.mark.django_db(transaction=True)
def test_the_end_of_an_answer_that_is_published_after_the_next_turn_began_is_not_lost() -> None:
    async def scenario() -> None:
        whole = follow("s", after=0)
        async with aclosing(follow("s", after=0, until="turn 1")) as answer, aclosing(whole) as everything:
            # What is not in the log can only have come over the bus: both read live then.
            reading = [asyncio.ensure_future(anext(stream)) for stream in (answer, everything)]
            await asyncio.sleep(0)  # each has subscribed, which is the first thing it does
            feed.publish("s", [frame(1)], prev=0, logged=0)
            assert [frames[0].seq for frames in await asyncio.gather(*reading)] == [1, 1]

            # Two commits, of which the second is published first.
            await hop(log.append, "s", [frame(2), frame(3, closes=True)])
            await hop(log.append, "s", [frame(4, "turn 2")])
            reading = [asyncio.ensure_future(anext(stream)) for stream in (answer, everything)]
            feed.publish("s", [frame(4, "turn 2")], prev=3, logged=3)
            feed.publish("s", [frame(2), frame(3, closes=True)], prev=1, logged=1)

            ended, seen = await asyncio.wait_for(asyncio.gather(*reading), 10)
            assert [each.seq for each in ended] == [2, 3]
            assert [each.seq for each in seen] == [2, 3, 4]
            with pytest.raises(StopAsyncIteration):
                await anext(answer)

    asyncio.run(scenario())


@pytest.mark.django_db(transaction=True)
def test_readers_that_replay_together_read_everything_and_one_that_leaves_holds_up_nobody() -> None:
    """Further pages of the log are read one after the other."""
    count = 5 * log.PAGE // 2

    async def read_all() -> list[int]:
        seen: list[int] = []
        async with aclosing(follow("long", after=0)) as batches:
            while not seen or seen[-1] < count:
                seen += [frame.seq for frame in await anext(batches)]
        return seen

    async def scenario() -> None:
        for number in range(1, count + 1):
            await hop(log.append, "long", [frame(number)])
        readers = [asyncio.create_task(read_all()) for _ in range(20)]
        leaving = [asyncio.create_task(read_all()) for _ in range(5)]
        await asyncio.wait([*readers, *leaving], timeout=0.05)
        for task in leaving:
            task.cancel()

        assert await asyncio.wait_for(asyncio.gather(*readers), 30) == [list(range(1, count + 1))] * 20

    asyncio.run(scenario())

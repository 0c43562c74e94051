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

"""What it costs to carry frames between processes: by the relay as it is, and by a group for each session.

    .venv/bin/python benchmarks/carrying.py

One process publishes tokens of 100 sessions; of three others one follows all of them, one a tenth, one none. The relay
puts what waits into one message to one group, which everybody hears. The other way sends each frame to its session's
group, which only those hear who follow it. Prints the CPU µs of each process for a frame that was published.
"""

import argparse
import asyncio
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from machine import ROOT, cpu_seconds, environment
from tables import print_markdown, spread

sys.path.insert(0, str(ROOT))
from orchestrator_site.local_services import Redis

SESSIONS = [f"bench-{number:032}" for number in range(100)]
FOLLOWERS = {"follows all": SESSIONS, "follows a tenth": SESSIONS[::10], "follows none": []}
PUBLISHER = "publishes"
PACKED, SINGLE, NOTHING = "one group, packed", "a group for each session", "nothing is carried"
TURN = "00000000-0000-4000-8000-000000000000"
SETTLING_SECONDS = 0.5


@dataclass(frozen=True)
class Used:
    cpu_seconds: float
    frames: int


def in_process(role: Callable[..., Coroutine[Any, Any, Used]], pipe: Connection, *arguments: Any) -> None:
    """A role in a process of its own: says when it is ready, begins when it is told to, says what it used."""
    import django

    django.setup()
    pipe.send(uvloop.run(role(pipe, *arguments)))


async def publish(pipe: Connection, how: str, rate: float, seconds: float) -> Used:
    """Tokens of all sessions, each published alone, as they come from a model."""
    from channels.layers import get_channel_layer

    from events_app.feed import Batch, feed
    from events_app.frames import Frame
    from events_app.relay import Relay

    waiting = asyncio.Queue[tuple[str, Batch]]()

    class Single:
        def carry(self, session_id: str, batch: Batch) -> None:
            waiting.put_nowait((session_id, batch))

        def poke(self, session_id: str) -> None: ...

        def close(self, session_id: str) -> None: ...

    async def send_each() -> None:
        while True:
            session_id, batch = await waiting.get()
            frames = [(frame.seq, frame.origin, frame.wire, frame.is_delta, frame.closes) for frame in batch.frames]
            message = {"type": "frames", "of": session_id, "prev": batch.prev, "logged": batch.logged, "frames": frames}
            await get_channel_layer().group_send(session_id, message)
            waiting.task_done()

    if how == PACKED:
        Relay(lambda session_ids: []).start()
    elif how == SINGLE:
        feed.relay = Single()
        sender = asyncio.create_task(send_each())
    pipe.send("ready")
    pipe.recv()
    used, began, published = time.process_time(), time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        while published < passed * rate:
            session_id = SESSIONS[published % len(SESSIONS)]
            seq = published // len(SESSIONS) + 1
            body = f'data:{{"type":"assistant_message","token":"{seq}:{time.monotonic_ns()} ","is_final":false}}\n\n'
            feed.publish(session_id, (Frame.of(seq, TURN, body),), prev=seq - 1, logged=0)
            published += 1
        await asyncio.sleep(0.001)
    await waiting.join()
    if how == SINGLE:
        sender.cancel()
    await asyncio.sleep(SETTLING_SECONDS)
    return Used(time.process_time() - used, published)


async def follow(pipe: Connection, how: str, followed: list[str]) -> Used:
    """Take the frames of some sessions until told to end."""
    from channels.layers import get_channel_layer

    from events_app.feed import Batch, feed
    from events_app.frames import Frame
    from events_app.relay import Relay

    taken = 0

    async def take(session_id: str) -> None:
        nonlocal taken
        after = 0
        with feed.subscribe(session_id, ends_with_session=True) as live:
            while True:
                await live.news()
                for frame in live.take(after):
                    after, taken = frame.seq, taken + 1

    async def hear_each() -> None:
        layer = get_channel_layer()
        channel = await layer.new_channel()
        for session_id in followed:
            await layer.group_add(session_id, channel)
        while True:
            heard = await layer.receive(channel)
            frames = [Frame(*frame) for frame in heard["frames"]]
            feed.deliver(heard["of"], Batch(frames, heard["prev"], heard["logged"]))

    tasks = [asyncio.create_task(take(session_id)) for session_id in followed]
    if how == PACKED:
        Relay(lambda session_ids: []).start()
    elif how == SINGLE:
        tasks.append(asyncio.create_task(hear_each()))
    await asyncio.sleep(SETTLING_SECONDS)
    pipe.send("ready")
    pipe.recv()
    used = time.process_time()
    await asyncio.to_thread(pipe.recv)
    return Used(time.process_time() - used, taken)


def measure(how: str, redis: Redis, rate: float, seconds: float) -> dict[str, float]:
    """CPU µs of each process for a frame that was published."""
    assert redis.process is not None
    context = multiprocessing.get_context("spawn")
    roles: dict[str, tuple[Any, ...]] = {name: (follow, how, followed) for name, followed in FOLLOWERS.items()}
    roles[PUBLISHER] = (publish, how, rate, seconds)
    pipes: dict[str, Connection[Any, Any]] = {}
    with ExitStack() as end:
        for name, (role, *arguments) in roles.items():
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=in_process, args=(role, theirs, *arguments))
            process.start()
            theirs.close()
            end.callback(process.join)
            end.callback(pipes[name].close)  # whoever still waits there ends
        for pipe in pipes.values():
            pipe.recv()
        before = cpu_seconds(redis.process.pid)
        for pipe in pipes.values():
            pipe.send("begin")
        published: Used = pipes[PUBLISHER].recv()
        used = {"Redis": cpu_seconds(redis.process.pid) - before, PUBLISHER: published.cpu_seconds}
        for name, followed in FOLLOWERS.items():
            pipes[name].send("end")
            of_follower: Used = pipes[name].recv()
            used[name] = of_follower.cpu_seconds
            expected = published.frames * len(followed) // len(SESSIONS)
            if how != NOTHING and abs(of_follower.frames - expected) > len(SESSIONS):
                raise RuntimeError(f"{how}: who {name} has read {of_follower.frames} frames of {expected}")
    return {name: 1e6 * value / published.frames for name, value in used.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2_000, help="frames per second, of all sessions together")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-"))
    redis = Redis(folder)
    redis.start()
    os.environ |= environment(folder, REDIS_URL=redis.url, DJANGO_SETTINGS_MODULE="orchestrator_site.settings")
    rounds: dict[str, list[dict[str, float]]] = {how: [] for how in (PACKED, SINGLE, NOTHING)}
    try:
        for _ in range(arguments.rounds):
            for how, measured in rounds.items():
                measured.append(measure(how, redis, arguments.rate, arguments.seconds))
    finally:
        redis.stop()
        shutil.rmtree(folder)
    print(f"{arguments.rate:g} frames/s; medians of {arguments.rounds} rounds (lowest to highest)\n")
    lines = [
        (name, *[spread([one[name] for one in measured], "µs", 1) for measured in rounds.values()])
        for name in (PUBLISHER, "Redis", *FOLLOWERS)
    ]
    print_markdown([("CPU for each frame", *rounds), *lines])


if __name__ == "__main__":
    main()

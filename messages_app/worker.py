"""A worker's process: Procrastinate fetches jobs, our runner runs the turns that they name, the relay shows them."""

import asyncio
import logging
import signal
import sys
from typing import Any

from procrastinate import App

from events_app import collector
from events_app.clock import end_in_time
from events_app.database import close_threads
from events_app.feed import feed
from events_app.relay import Relay
from messages_app.runner import Runner
from sessions_app import lifecycle
from sessions_app.jobs import DEAD_AFTER_SECONDS, HEARTBEAT_SECONDS

logger = logging.getLogger(__name__)

REST_SECONDS = 2.0
JOBS_SECONDS = 8.0


async def work(app: App, **options: Any) -> None:
    """Run turns until SIGTERM or SIGINT, then hand over those that run. A second signal ends the process at once.

    What ends Procrastinate's worker from inside, mostly a database that is away, is survived: it begins again.
    """
    relay, runner, told = Relay(lifecycle.newest), Runner(), asyncio.Event()
    feed.attach(asyncio.get_running_loop(), on_wake=lambda: None)
    relay.start()
    runner.start()
    collector.settle()
    _obey_signals(told)
    fetching = asyncio.create_task(_fetch_for_ever(app, runner, options))
    taking_up = asyncio.create_task(_take_up_all(runner))
    telling = asyncio.create_task(told.wait())
    await asyncio.wait([fetching, telling], return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    # Before the jobs: it waits for those that run, which is for their turns, and takes no other.
    fetching.cancel()
    await runner.stop()
    taking_up.cancel()
    # What is left are the jobs' own rows. A database that is away must not hold up the end; `recover` finds them.
    await asyncio.wait([fetching], timeout=JOBS_SECONDS)
    await relay.stop()
    feed.detach()
    close_threads()


def _obey_signals(told: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        end_in_time()
        sys.stdout.write("Stopping. The turns that run here go on elsewhere.\n")
        sys.stdout.flush()
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


async def _take_up_all(runner: Runner) -> None:
    try:
        await runner.take_up_all()
    except Exception:
        # `recover` and the jobs find the rest.
        logger.exception("claim_failed")


async def _fetch_for_ever(app: App, runner: Runner, options: dict[str, Any]) -> None:
    while not runner.is_stopping:
        try:
            await app.run_worker_async(
                install_signal_handlers=False,
                additional_context={"runner": runner},
                update_heartbeat_interval=HEARTBEAT_SECONDS,
                stalled_worker_timeout=DEAD_AFTER_SECONDS,
                **options,
            )
        except Exception:
            logger.exception("worker_interrupted")
        else:
            if not options.get("wait", True):
                await runner.finish()
                return  # told to run what there is and no more
            logger.warning("worker_interrupted")  # its connection broke; it has said so
        await asyncio.sleep(REST_SECONDS)

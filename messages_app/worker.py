"""A worker's process: Procrastinate fetches jobs, our runner runs the turns that they name, the relay shows them."""

import asyncio
import logging
import signal
import sys
from contextlib import suppress
from typing import Any

from procrastinate import App

from events_app.database import close_threads
from events_app.feed import feed
from events_app.relay import Relay
from messages_app.runner import Runner
from sessions_app import lifecycle
from sessions_app.jobs import DEAD_AFTER_SECONDS, HEARTBEAT_SECONDS

logger = logging.getLogger(__name__)

REST_SECONDS = 2.0


async def work(app: App, **options: Any) -> None:
    """Run turns until SIGTERM or SIGINT, then hand over those that run. A second signal ends the process at once.

    What ends Procrastinate's worker from inside, mostly a database that is away, is survived: it begins again.
    """
    relay, runner = Relay(lifecycle.newest), Runner()
    feed.attach(asyncio.get_running_loop(), on_wake=lambda: None)
    relay.start()
    runner.start()
    fetching = asyncio.create_task(_fetch_for_ever(app, runner, options))
    with suppress(asyncio.CancelledError):
        await _until_told(fetching, runner)
    await runner.stop()
    await relay.stop()
    feed.detach()
    close_threads()


async def _until_told(fetching: asyncio.Task[None], runner: Runner) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        sys.stdout.write("Stopping. The turns that run here go on elsewhere.\n")
        runner.begin_stopping()
        fetching.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await fetching


async def _fetch_for_ever(app: App, runner: Runner, options: dict[str, Any]) -> None:
    while True:
        try:
            await app.run_worker_async(
                install_signal_handlers=False,
                additional_context={"runner": runner},
                update_heartbeat_interval=HEARTBEAT_SECONDS,
                stalled_worker_timeout=DEAD_AFTER_SECONDS,
                **options,
            )
            return  # told to run what there is and no more
        except Exception:
            logger.exception("worker_interrupted")
        await asyncio.sleep(REST_SECONDS)

"""What the server imports: Django and the sockets behind the guard, and what runs beside them on the same loop."""

import asyncio
import os
from collections.abc import MutableMapping
from typing import Any

from channels.routing import ProtocolTypeRouter
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orchestrator_site.settings")
pages = get_asgi_application()

from django.conf import settings  # noqa: E402 (needs the apps)

from events_app import collector  # noqa: E402
from events_app.clock import every  # noqa: E402
from events_app.database import close_threads, read  # noqa: E402
from events_app.feed import feed  # noqa: E402
from events_app.relay import Relay  # noqa: E402
from messages_app.runner import EmbeddedRunner  # noqa: E402
from orchestrator_site.api import Http  # noqa: E402
from orchestrator_site.guard import App, Guard, Receive, Send  # noqa: E402
from orchestrator_site.readiness import MISSING, OK, Probe, readiness  # noqa: E402
from orchestrator_site.sockets import sockets  # noqa: E402
from sessions_app import jobs, lifecycle  # noqa: E402


class Beside:
    """What runs beside the requests: the relay, the heartbeats of the streams, and the runner where it is embedded."""

    def __init__(self) -> None:
        self.relay = Relay(lifecycle.newest)
        self.runner = EmbeddedRunner() if settings.TURN_RUNNER == "embedded" else None
        # Well within the longest silence that is promised: a beat may come late.
        self._heartbeat = every(settings.STREAM_HEARTBEAT_SECONDS * 2 / 3, feed.heartbeat)

    def start(self) -> None:
        feed.attach(asyncio.get_running_loop(), on_wake=self.runner.wake if self.runner else _nobody)
        self.relay.start()
        self._beating = asyncio.create_task(self._heartbeat)
        if self.runner is not None:
            self.runner.start()

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.stop()
        self._beating.cancel()
        await self.relay.stop()
        feed.detach()


def _nobody() -> None:
    """Turns are run by workers, who learn of them from the database."""


class Application:
    """Starts what runs beside it with the server's lifespan, or with the first request where there is none (daphne)."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.beside: Beside | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        self._ensure_started()
        await self.app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._ensure_started()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self.beside is not None:
            await self.beside.stop()
            close_threads()
        await send({"type": "lifespan.shutdown.complete"})

    async def runner_state(self) -> str:
        if self.beside is None:
            return MISSING
        runner = self.beside.runner
        is_there = runner.is_alive if runner is not None else await read(jobs.has_worker)
        return OK if is_there else MISSING

    async def layer_state(self) -> str:
        return self.beside.relay.state if self.beside is not None else MISSING

    def _ensure_started(self) -> None:
        if self.beside is None:
            self.beside = Beside()
            self.beside.start()
            collector.settle()


application = Application(Guard(ProtocolTypeRouter({"http": Http(pages), "websocket": sockets})))
readiness.probes |= {"runner": Probe(application.runner_state), "layer": Probe(application.layer_state)}

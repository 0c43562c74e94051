"""What the server imports: Django and the sockets behind the guard, and the embedded runner on the same event loop."""

import gc
import os
from collections.abc import MutableMapping
from typing import Any

from channels.routing import ProtocolTypeRouter
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orchestrator_site.settings")
django_application = get_asgi_application()

from events_app.database import close_threads  # noqa: E402 (needs the apps)
from messages_app.runner import EmbeddedRunner  # noqa: E402
from orchestrator_site.guard import App, Guard, Receive, Send  # noqa: E402
from orchestrator_site.readiness import MISSING, OK, Probe, readiness  # noqa: E402
from orchestrator_site.sockets import sockets  # noqa: E402


class Application:
    """Starts the runner with the server's lifespan, or with the first request where the server has none (daphne)."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.runner: EmbeddedRunner | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        self._ensure_runner()
        await self.app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._ensure_runner()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self.runner is not None:
            await self.runner.stop()
            close_threads()
        await send({"type": "lifespan.shutdown.complete"})

    async def runner_state(self) -> str:
        return OK if self.runner is not None and self.runner.is_alive else MISSING

    def _ensure_runner(self) -> None:
        if self.runner is None:
            self.runner = EmbeddedRunner()
            self.runner.start()
            # What start-up made lives as long as the process. Left to the collector, each full collection walked all of
            # it and stopped every stream for 57 to 76 ms.
            gc.collect()
            gc.freeze()


application = Application(Guard(ProtocolTypeRouter({"http": django_application, "websocket": sockets})))
readiness.probes["runner"] = Probe(application.runner_state)

"""A web process that only serves: it makes no secrets, migrates nothing and shows nothing.

    python -m orchestrator_site.web

Any number of them serve the same sessions. `make run` serves by the same code.
"""

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from orchestrator_site.socket_protocol import BoundedSocketProtocol

# Those who keep a connection to a process that stops have so long to use it once more, and to hear that it closes.
# The proxy of docs/deployment/nginx.conf keeps those that it does not use for half of that.
LINGER_SECONDS = 2.0
# Requests that are answered have so long to end, then they are cut.
ANSWER_SECONDS = 10
QUEUE_OF_CONNECTIONS = 2048
# A database thread that computes lets the event loop wait for so long, again and again (Python's own: 5 ms).
SWITCH_SECONDS = 0.001


def main() -> None:
    # Nearly all that a start makes stays. To look through it again and again while it grows took a fifth of the start;
    # `Application` turns the collector on when it is over.
    gc.disable()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orchestrator_site.settings")
    os.umask(0o077)
    import django

    from events_app import startup

    with startup.refusals_in_one_line():
        django.setup()
        from django.conf import settings

        listener = bound(settings.HOST, settings.PORT)
        with startup.database_needed():
            startup.ensure_migrated()
        startup.look_for_redis()
    sys.stdout.write(f"Countersign {settings.VERSION} serves on {settings.HOST}, port {settings.PORT}.\n")
    sys.stdout.flush()
    serve(listener, linger_seconds=LINGER_SECONDS)


def bound(host: str, port: int) -> socket.socket:
    """The socket to serve on. Nobody is kept waiting on it while the process prepares itself. Raises CannotStart."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _port_needed(host, port):
        listener.bind((host, port))
    return listener


@contextmanager
def _port_needed(host: str, port: int) -> Iterator[None]:
    from events_app.startup import CannotStart

    try:
        yield
    except OSError as error:
        raise CannotStart(f"HOST {host}, PORT {port}: {error.strerror or 'no such address'}.") from None


def serve(listener: socket.socket, *, linger_seconds: float = 0) -> None:
    """Serve until SIGINT or SIGTERM: streams end at once, to be resumed, and turns that run here are handed over.

    A second signal ends the process at once.
    """
    from django.conf import settings

    from events_app.startup import refusals_in_one_line

    sys.setswitchinterval(SWITCH_SECONDS)
    with refusals_in_one_line(), _port_needed(settings.HOST, settings.PORT):
        listener.setblocking(False)
        listener.listen(QUEUE_OF_CONNECTIONS)  # fails when another process prepared itself beside this one
    # Each stream is one, each turn has one to its model; the rest are the database's, log files, requests.
    allowed = allow_open_files(settings.STREAMS_AT_ONCE + settings.TURNS_AT_ONCE + 200)
    if allowed is not None:
        sys.stdout.write(f"  Only {allowed} files may be open (ulimit -n): too few for STREAMS_AT_ONCE streams.\n\n")
        sys.stdout.flush()
    config = uvicorn.Config(
        "orchestrator_site.asgi:application",
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        http="orchestrator_site.protocol:BoundedHeadProtocol",
        ws="orchestrator_site.socket_protocol:BoundedSocketProtocol",
        # Up to the first bound a message that is too large is refused, beyond this one the connection is closed.
        ws_max_size=2 * settings.MAX_BODY_BYTES,
        # A peer that is gone without a word answers no ping.
        ws_ping_interval=settings.STREAM_HEARTBEAT_SECONDS,
        ws_ping_timeout=settings.STREAM_STALL_SECONDS,
        # What is not inflated cannot burst.
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=QUEUE_OF_CONNECTIONS,
        # A forged X-Forwarded-For is not believed.
        proxy_headers=bool(settings.TRUSTED_PROXIES),
        forwarded_allow_ips=settings.TRUSTED_PROXIES,
        timeout_graceful_shutdown=ANSWER_SECONDS,
    )
    # uvicorn, when it has ended, raises the signal again that it obeyed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        Server(config, listener, linger_seconds).run(sockets=[listener])


def allow_open_files(wanted: int) -> int | None:
    """Let this process open so many files, sockets among them; if it may not, how many it may."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return raised if raised < wanted else None


class Server(uvicorn.Server):
    """uvicorn's server, whose stop loses no request."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, linger_seconds: float) -> None:
        super().__init__(config)
        self._listener = listener
        self._linger_seconds = linger_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        from django.conf import settings

        from events_app.changes import watch
        from events_app.clock import end_in_time
        from events_app.feed import feed
        from orchestrator_site.readiness import readiness

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if settings.TURN_RUNNER == "embedded":
            sys.stdout.write("\nStopping. A turn that is running goes on with the next start.\n")
        else:
            sys.stdout.write("\nStopping. Streams go on with another process.\n")
        sys.stdout.flush()
        end_in_time()
        readiness.is_stopping = True
        feed.close_all()
        watch.close_all()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._stop_listening()
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedSocketProtocol):
                connection.shutdown()
        await self._linger()
        await super().shutdown(sockets)

    async def _stop_listening(self) -> None:
        """Nobody can connect any more; who has connected is served, also those whom the loop has not seen yet: they may
        have sent their request, and would not know what became of it."""
        connected = []
        with suppress(BlockingIOError):
            while True:
                connected.append(self._listener.accept()[0])
        for server in self.servers:
            server.close()
        for connection in connected:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        http: type[asyncio.Protocol] = self.config.http_protocol_class
        return http(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]

    async def _linger(self) -> None:
        """Tell those who keep a connection that it ends, with their next answer, instead of closing it under a request
        that is on its way."""
        self.server_state.default_headers.append((b"connection", b"close"))
        ends = time.monotonic() + self._linger_seconds
        for connection in list(self.server_state.connections):
            while connection in self.server_state.connections and time.monotonic() < ends:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # uvicorn tells nobody of its end


if __name__ == "__main__":
    main()

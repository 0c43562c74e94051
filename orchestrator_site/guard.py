"""The plain ASGI guard around everything: what a request may weigh, how long it may take, how slow its reader."""

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from django.conf import settings

from orchestrator_site.errors import RETRY_AFTER, APIError, BadRequest, TooLarge, UnsupportedMedia, body_of

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[..., Awaitable[None]]


class HeadersTooLarge(APIError):
    status = 431
    code = "headers_too_large"


class BodyTimeout(APIError):
    status = 408
    code = "body_timeout"


class _Gone(Exception):
    """The client left before its body was complete: nobody to answer."""


class _Stalled(Exception):
    """The reader of a response takes nothing any more."""


class Guard:
    """Reads the whole body within its bounds before the application sees the request: a refusal comes first."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._open(scope, receive, send)
            return
        try:
            _check_head(scope)
            async with asyncio.timeout(settings.MAX_BODY_SECONDS):
                body = await _read(receive)
        except _Gone:
            return
        except TimeoutError:
            await refuse(send, BodyTimeout("The body took too long."))
        except APIError as error:
            await refuse(send, error)
        else:
            await self._serve(scope, _replay(body, receive), send)

    async def _open(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """A socket, whose application raises APIError as long as it has not accepted."""
        try:
            _check_head(scope)
            await self.app(scope, receive, send)
        except APIError as error:
            await receive()
            await _refuse_socket(scope, send, error)

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Cut a reader that takes nothing for STREAM_STALL_SECONDS; it resumes where it was."""
        watch = _StallWatch(send, settings.STREAM_STALL_SECONDS)
        try:
            await self.app(scope, receive, watch.send)
        except _Stalled:
            logger.warning("reader_stalled", extra={"path": scope["path"]})
            if (abort := scope.get("state", {}).get("abort")) is not None:
                abort()
                await receive()  # until it is
        finally:
            watch.stop()


def _check_head(scope: MutableMapping[str, Any]) -> None:
    size, hosts, encoding, length = 0, 0, b"identity", b""
    for name, value in scope["headers"]:
        size += len(name) + len(value) + 4
        if name == b"host":
            hosts += 1
        elif name == b"content-encoding":
            encoding = value.strip().lower()
        elif name == b"content-length":
            length = value
    if size > settings.MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"Headers may have {settings.MAX_HEADER_BYTES} bytes.")
    # Django would take its own address for a missing one.
    if hosts > 1 or (hosts == 0 and scope.get("http_version") != "1.0"):
        raise BadRequest("A request has one Host header.")
    if encoding not in (b"", b"identity"):
        raise UnsupportedMedia("Compressed bodies are not read.")
    if length.isdigit() and int(length[:20]) > settings.MAX_BODY_BYTES:
        raise _too_large()


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > settings.MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body"):
            return bytes(body)


def _too_large() -> TooLarge:
    return TooLarge(f"A body may have {settings.MAX_BODY_BYTES} bytes.")


def _replay(body: bytes, receive: Receive) -> Receive:
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return parts.pop() if parts else await receive()

    return replay


class _StallWatch:
    """Ends a `send` that waits too long for its reader, with one timer for a response instead of one for each token."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._is_sending = False
        self._since = 0.0
        self._fired = False
        self._timer = self._loop.call_later(seconds, self._look)

    async def send(self, message: Message) -> None:
        if self._task is None:
            # All of a response comes from one task, which need not be the one that made this.
            self._task = asyncio.current_task()
        self._since = self._loop.time()
        self._is_sending = True
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if not self._fired or self._task is None:
                raise
            self._task.uncancel()
            raise _Stalled from None
        finally:
            self._is_sending = False

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        waited = self._loop.time() - self._since if self._is_sending else 0.0
        if waited >= self._seconds and self._task is not None:
            self._fired = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds - waited, self._look)


async def _refuse_socket(scope: MutableMapping[str, Any], send: Send, error: APIError) -> None:
    if "websocket.http.response" in scope.get("extensions", {}):
        await refuse(send, error, "websocket.http.response")
    else:  # daphne: a bare 403
        await send({"type": "websocket.close"})


async def refuse(send: Send, error: APIError, answer: str = "http.response") -> None:
    request_id = uuid.uuid4().hex
    body = json.dumps(body_of(error, request_id)).encode()
    own = {"Retry-After": RETRY_AFTER, **error.headers} if error.status in (429, 503) else error.headers
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode()),
        # What was not read of the request must not be taken for another one.
        (b"connection", b"close"),
        *((name.lower().encode(), value.encode()) for name, value in own.items()),
    ]
    await send({"type": f"{answer}.start", "status": error.status, "headers": headers})
    await send({"type": f"{answer}.body", "body": body})

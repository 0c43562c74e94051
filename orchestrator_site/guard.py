"""The plain ASGI guard around everything: what an HTTP request may weigh, how long it may take, how slow its reader."""

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from django.conf import settings

from orchestrator_site.errors import APIError, TooLarge, UnsupportedMedia, body_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class HeadersTooLarge(APIError):
    status = 431
    code = "headers_too_large"


class BodyTimeout(APIError):
    status = 408
    code = "body_timeout"


class _Gone(Exception):
    """The client left before its body was complete: nobody to answer."""


class Guard:
    """Reads the whole body within its bounds before the application sees the request: a refusal comes first."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            _check_head(scope)
            async with asyncio.timeout(settings.MAX_BODY_SECONDS):
                body = await _read(receive)
        except _Gone:
            return
        except TimeoutError:
            await _refuse(send, BodyTimeout("The body took too long."))
        except APIError as error:
            await _refuse(send, error)
        else:
            await self.app(scope, _replay(body, receive), _bounded(send))


def _check_head(scope: MutableMapping[str, Any]) -> None:
    size, encoding, length = 0, b"identity", b""
    for name, value in scope["headers"]:
        size += len(name) + len(value) + 4
        if name == b"content-encoding":
            encoding = value.strip().lower()
        elif name == b"content-length":
            length = value
    if size > settings.MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"Headers may have {settings.MAX_HEADER_BYTES} bytes.")
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


def _bounded(send: Send) -> Send:
    """Cut a reader that takes nothing for STREAM_STALL_SECONDS; it resumes where it was."""

    async def bounded(message: Message) -> None:
        async with asyncio.timeout(settings.STREAM_STALL_SECONDS):
            await send(message)

    return bounded


async def _refuse(send: Send, error: APIError) -> None:
    body = json.dumps(body_of(error, uuid.uuid4().hex)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # What was not read of the request must not be taken for another one.
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

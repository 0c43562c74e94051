"""The server as a client meets it: JSON over HTTP, and frames of event streams. It knows nothing of conversations."""

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CONNECT_SECONDS = 5
ANSWER_SECONDS = 60
# Three heartbeats of a server with the default settings; after that it is taken for gone.
SILENCE_SECONDS = 45
MAX_FRAME_BYTES = 16 * 1024 * 1024


class Unreachable(Exception):
    """No answer, or one that says to try again; the text is for the user."""


class Refused(Exception):
    """The server does not do what it was asked for; the text is the server's."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stream; `kind` is its chunk's type, "done" for the end marker and "" for a heartbeat."""

    number: int | None = None
    kind: str = ""
    data: dict[str, Any] = field(default_factory=dict)


class Connection:
    def __init__(self, server: str, key: str) -> None:
        self.server = server.rstrip("/")
        self._headers = {"X-Internal-Auth": key}
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    async def get(self, path: str) -> dict[str, Any]:
        """The answer. Raises Refused, Unreachable."""
        return await self._ask("GET", path)

    async def post(self, path: str, *, key: str | None = None) -> dict[str, Any]:
        """The same. What is asked under one key is done once, however often it is asked for."""
        return await self._ask("POST", path, {}, key=key)

    async def send(self, session_id: str, message: dict[str, Any]) -> Frame | None:
        """Send a message; the first frame of its answer, None when the connection broke after it was accepted.

        The rest of the answer is read on the session's stream. Raises Refused, also for a refusal within the stream,
        and Unreachable, when nobody knows whether it was accepted.
        """
        body = {"session_id": session_id, "message": message}
        async with self._answer("POST", "/agent/message/stream", body, total=None) as answer:
            try:
                first = await anext(aiter(_frames(answer)), None)
            except Unreachable:
                return None
        if first is not None and first.kind == "error" and first.number is None:
            code = text_at(object_at(first.data, "metadata"), "code")
            raise Refused(200, code, text_at(first.data, "content"))
        return first

    @asynccontextmanager
    async def follow(self, session_id: str, after: int) -> AsyncIterator[AsyncIterator[Frame]]:
        """The frames of a session's stream past a number. Raises Refused and Unreachable, these frames too."""
        headers = {"Last-Event-ID": str(after)} if after else {}
        async with self._answer("GET", f"/sessions/{session_id}/stream", total=None, headers=headers) as answer:
            yield _frames(answer)

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, key: str | None = None
    ) -> dict[str, Any]:
        headers = {"Idempotency-Key": key} if key else {}
        async with self._answer(method, path, body, total=ANSWER_SECONDS, headers=headers) as answer:
            try:
                told = json.loads(await answer.read())
            except ValueError:
                told = None
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Unreachable(_words(error)) from None
        if not isinstance(told, dict):
            raise Unreachable(f"{self.server} does not answer as Countersign does.")
        return told

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        total: float | None,
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._http is None:
            # Here, because it belongs to the loop that runs.
            self._http = aiohttp.ClientSession(headers=self._headers)
        timeout = aiohttp.ClientTimeout(total=total, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        # Without redirects: another address would be told the key.
        asking = self._http.request(
            method, self.server + path, json=body, headers=headers, timeout=timeout, allow_redirects=False
        )
        try:
            answer = await asking
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(_words(error)) from None
        try:
            if answer.status >= 300:
                raise await _refusal(answer)
            yield answer
        finally:
            answer.close()


async def _refusal(answer: aiohttp.ClientResponse) -> Refused | Unreachable:
    try:
        told = json.loads(await answer.content.read(64 * 1024))
    except (ValueError, aiohttp.ClientError, TimeoutError, OSError):
        told = None
    if not isinstance(told, dict):
        told = {}
    detail = told.get("detail")
    if isinstance(detail, list):  # of 422
        detail = "; ".join(text_at(one, "msg") for one in objects_at(told, "detail"))
    message = detail if isinstance(detail, str) else f"The server answered {answer.status}."
    if answer.status >= 500:
        return Unreachable(message)
    return Refused(answer.status, str(told.get("code")), message)


async def _frames(answer: aiohttp.ClientResponse) -> AsyncIterator[Frame]:
    """Up to the end of the stream. Raises Unreachable when it breaks, or is none."""
    buffer = b""
    try:
        async for piece in answer.content.iter_any():
            *blocks, buffer = (buffer + piece).split(b"\n\n")
            for block in blocks:
                yield _frame_of(block)
            if len(buffer) > MAX_FRAME_BYTES:
                raise Unreachable("The server sends frames without an end.")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Unreachable(_words(error)) from None


def _frame_of(block: bytes) -> Frame:
    number, event, data = None, "", b""
    for name, value in _fields(block):
        if name == b"id" and value.isdigit():
            number = int(value)
        elif name == b"event":
            event = value.decode("utf-8", "replace")
        elif name == b"data":
            data += value
    if not data:
        return Frame()
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        raise Unreachable("The server sends what is no JSON.") from None
    if not isinstance(told, dict):
        raise Unreachable("The server sends what is no object.")
    return Frame(number, "done" if event == "done" else str(told.get("type")), told)


def _fields(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        yield name, value.removeprefix(b" ")


def _words(error: Exception) -> str:
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "unknown host"
        case TimeoutError():
            return "no answer in time"
        case aiohttp.ClientConnectorError(os_error=OSError(errno=int(number))) if number > 0:
            return os.strerror(number).lower()
        case aiohttp.ClientConnectorError():
            return "cannot connect"
        case _:
            return "the connection broke"


def text_at(data: dict[str, Any], key: str) -> str:
    """A text within what the server sent; an empty one where there is something else."""
    value = data.get(key)
    return value if isinstance(value, str) else ""


def number_at(data: dict[str, Any], key: str) -> int:
    value = data.get(key)
    return value if isinstance(value, int) else 0


def object_at(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def objects_at(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = data.get(key)
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []

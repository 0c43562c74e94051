"""The WebSocket of a session: what the gateway was for the IDE, message for message (protocol 9.1 and 3.3)."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings

from messages_app.inbound import Inbound, typed
from messages_app.orchestration import MessageOrchestrationService
from orchestrator_site.errors import APIError, TooLarge
from orchestrator_site.http import read_json
from sessions_app.callers import Caller

logger = logging.getLogger(__name__)

WAITING_MESSAGES = 16
SHOWN_CHARS = 50
UNSUPPORTED_DATA = 1003


@dataclass(frozen=True, slots=True)
class Field:
    """What the gateway asks of a field: an optional one may be null or absent."""

    kind: type = str
    required: bool = True
    one_of: tuple[str, ...] = ()

    def complaint(self, value: Any) -> str | None:
        if value is None:
            return "is required" if self.required else None
        if not isinstance(value, self.kind):
            return "has to be a text" if self.kind is str else "has to be an object"
        if self.one_of and value not in self.one_of:
            return f"has to be one of {', '.join(self.one_of)}"
        return None


TEXT, TEXT_OR_NULL, OBJECT_OR_NULL = Field(), Field(required=False), Field(dict, required=False)
FIELDS = {
    "user_message": {"content": TEXT, "role": Field(one_of=("user", "assistant", "system", "tool"))},
    "tool_result": {"call_id": TEXT, "error": TEXT_OR_NULL},
    "switch_agent": {"agent_type": TEXT, "content": TEXT, "reason": TEXT_OR_NULL},
    "hitl_decision": {
        "call_id": TEXT,
        "decision": Field(one_of=("approve", "edit", "reject")),
        "modified_arguments": OBJECT_OR_NULL,
        "feedback": TEXT_OR_NULL,
    },
}


class Unreadable(Exception):
    """A message that the gateway would not have handed on; the text is for its sender."""


class Gone(Exception):
    """The client takes nothing any more."""


class SessionConsumer(AsyncWebsocketConsumer):
    """Answers one message after the other, in their order; whoever leaves stops no turn.

    A task of its own answers, because Channels hands over one event at a time: a handler that follows a turn would keep
    the news that the client has left from arriving. `refusal_of` is what HTTP answers to an exception; it logs
    those that nobody foresaw.
    """

    def __init__(self, session_id: str, caller: Caller, refusal_of: Callable[[Exception], APIError]) -> None:
        super().__init__()
        self._session_id = session_id
        self._service = MessageOrchestrationService(caller)
        self._refusal_of = refusal_of
        self._waiting: asyncio.Queue[str] = asyncio.Queue(WAITING_MESSAGES)
        self._accepting = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def send_or_leave(event: Any) -> None:
            try:
                async with asyncio.timeout(settings.STREAM_STALL_SECONDS):
                    await send(event)
            except TimeoutError:
                logger.warning("reader_stalled", extra={"path": scope["path"]})
                raise Gone from None
            except OSError:
                raise Gone from None

        try:
            # Together: neither outlives the other.
            async with asyncio.TaskGroup() as tasks:
                self._worker = tasks.create_task(self._answer_all())
                await super().__call__(scope, receive, send_or_leave)
                await self._stop_answering()
        except* Gone:
            pass

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if self._worker.cancelling():
            return  # closed already; what was under way still comes in
        if text_data is None:
            await self._stop_answering()
            # Daphne's library sends no code but 1000, and fails when it is asked to.
            takes_codes = "websocket.http.response" in self.scope.get("extensions", {})
            await self.close(UNSUPPORTED_DATA if takes_codes else None)
            return
        try:
            # No more of one that is too large than shows that it is.
            self._waiting.put_nowait(text_data[: settings.MAX_BODY_BYTES + 1])
        except asyncio.QueueFull:
            await self.send(text_data=_error("Streaming error: too many messages at once"))

    async def _stop_answering(self) -> None:
        """Follow no further. What is about to be stored is stored first: who says something and leaves has said it."""
        async with self._accepting:
            self._worker.cancel()

    async def _answer_all(self) -> None:
        while True:
            text = await self._waiting.get()
            async with aclosing(self._answer(text)) as answer:
                async for message in answer:
                    await self.send(text_data=message)

    async def _answer(self, text: str) -> AsyncGenerator[str, None]:
        """The messages that answer one message; it raises nothing."""
        try:
            async with self._accepting:
                frames = self._service.receive(read(text, self._session_id))
                await anext(frames)
        except Unreadable as problem:
            yield _error(str(problem))
            return
        except Exception as exception:
            yield _error(f"Agent error: {self._refusal_of(exception).status}")
            return
        try:
            async with aclosing(frames):
                async for ready in frames:
                    for frame in ready:
                        if (chunk := frame.forwarded) is not None:
                            yield chunk
        except Exception as exception:
            self._refusal_of(exception)
            yield _error("Streaming error: the answer was interrupted")


def read(text: str, session_id: str) -> Inbound:
    """The message in a text frame. Raises Unreadable where the gateway refuses, APIError where the endpoint does."""
    body = text.encode()
    if len(body) > settings.MAX_BODY_BYTES:
        raise TooLarge(f"A message may have {settings.MAX_BODY_BYTES} bytes.")
    try:
        message = read_json(body, "application/json")
    except APIError as error:
        raise Unreadable(f"Invalid JSON message: {error.message}") from None
    if not isinstance(message, dict):
        raise Unreadable("Invalid JSON message: it has to be an object")
    kind = message.get("type")
    fields = FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        shown = kind if isinstance(kind, str) else json.dumps(kind)
        raise Unreadable(f"Unknown message type: {shown[:SHOWN_CHARS]}")
    for name, field in fields.items():
        if complaint := field.complaint(message.get(name)):
            raise Unreadable(f"Invalid JSON message: {name} {complaint}")
    return typed(session_id, message)


def _error(text: str) -> str:
    return json.dumps({"type": "error", "content": text}, separators=(",", ":"))

"""The WebSocket of a session: what the gateway was for the IDE, message for message (protocol 9.1 and 3.3).

Who asks for more in the address gets it: token deltas, or everything that happens in the session.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings

from events_app import database
from events_app.chunks import StreamPosition, encode
from events_app.frames import Frame
from events_app.stream import follow
from messages_app.inbound import Inbound, busy_in, typed
from messages_app.orchestration import MessageOrchestrationService
from orchestrator_site.errors import APIError, TooLarge
from orchestrator_site.http import read_json
from sessions_app.callers import Caller
from sessions_app.following import Start
from sessions_app.models import Session, UnknownSession

logger = logging.getLogger(__name__)

WAITING_MESSAGES = 16
SHOWN_CHARS = 50
UNSUPPORTED_DATA, COME_AGAIN, SESSION_GONE = 1003, 1012, 4404


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

    With `live_from`, the socket shows the whole session from there on, the answers to its own messages included: those
    are then only stored, and another task is the one follower.
    """

    # Followers hear of everything through the feed: a queue in the layer for each socket would hold nothing.
    channel_layer_alias = None

    def __init__(
        self,
        session_id: str,
        caller: Caller,
        refusal_of: Callable[[Exception], APIError],
        *,
        tokens: bool = False,
        live_from: Start | None = None,
    ) -> None:
        super().__init__()
        self._session_id = session_id
        self._caller = caller
        self._service = MessageOrchestrationService(caller, follows=live_from is None)
        self._refusal_of = refusal_of
        self._tokens = tokens
        self._live_from = live_from
        self._waiting: asyncio.Queue[str] = asyncio.Queue(WAITING_MESSAGES)
        self._accepting = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None

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
            async with asyncio.TaskGroup() as self._tasks:
                self._worker = self._tasks.create_task(self._answer_all())
                await super().__call__(scope, receive, send_or_leave)
                await self._stop()
        except* Gone:
            pass

    async def connect(self) -> None:
        await self.accept()
        if self._live_from is not None:
            self._follower = self._tasks.create_task(self._show_all(self._live_from))

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if self._worker.cancelling():
            return  # closed already; what was under way still comes in
        if text_data is None:
            await self._end(UNSUPPORTED_DATA)
            return
        try:
            # No more of one that is too large than shows that it is.
            self._waiting.put_nowait(text_data[: settings.MAX_BODY_BYTES + 1])
        except asyncio.QueueFull:
            await self.send(text_data=_error("Streaming error: too many messages at once"))

    async def _end(self, code: int) -> None:
        await self._stop()
        # Daphne's library sends none of the protocol's own codes but 1000, and fails when it is asked to.
        takes_codes = code >= 3000 or "websocket.http.response" in self.scope.get("extensions", {})
        await self.close(code if takes_codes else None)

    async def _stop(self) -> None:
        """Follow no further. What is about to be stored is stored first: who says something and leaves has said it."""
        async with self._accepting:
            self._worker.cancel()
        if self._follower is not None and self._follower is not asyncio.current_task():
            self._follower.cancel()

    # --- the answers to its own messages ---

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
                        if frame.forwarded is not None or (self._tokens and frame.concerns_deltas):
                            yield self._message(frame)
        except Exception as exception:
            self._refusal_of(exception)
            yield _error("Streaming error: the answer was interrupted")

    def _message(self, frame: Frame) -> str:
        """A chunk as the gateway said it; who has asked for more than that reads its number too."""
        return frame.numbered if self._tokens or self._live_from is not None else frame.data

    # --- all that happens in the session ---

    async def _show_all(self, start: Start) -> None:
        """Show the session from there on, and close the socket when no more is to come, or none for this caller."""
        code = COME_AGAIN
        try:
            await self._show([start.reset or Frame.of(start.after, "", encode(StreamPosition()))])
            is_known = start.is_known
            async with aclosing(follow(self._session_id, after=start.after)) as batches:
                async for frames in batches:
                    if frames and not is_known:
                        # Somebody has made it since, who may be anybody.
                        await self._ensure_visible()
                        is_known = True
                    await self._show(frames)
            await self._ensure_visible()
        except UnknownSession:
            code = SESSION_GONE
        except Gone:
            raise
        except Exception as exception:
            self._refusal_of(exception)
        await self._end(code)

    async def _ensure_visible(self) -> None:
        await database.read(Session.objects.one_visible_to, self._caller, self._session_id)

    async def _show(self, frames: list[Frame]) -> None:
        for frame in frames:
            if self._tokens or not frame.is_delta:
                await self.send(text_data=self._message(frame))


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
    return typed(session_id, message, busy_in(message))


def _error(text: str) -> str:
    return json.dumps({"type": "error", "content": text}, separators=(",", ":"))

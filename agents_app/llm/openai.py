"""A thin streaming client for OpenAI-compatible chat completions (OpenAI, vLLM, Ollama, LiteLLM, OpenRouter, ...)."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import StringIO
from itertools import count
from typing import Any

import aiohttp
import orjson

from .base import (
    MAX_ARGUMENT_BYTES,
    CallWanted,
    FinishedStep,
    ModelError,
    ModelRequest,
    TextDelta,
    Usage,
    clean,
)
from .breaker import Breaker

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504, 529})
LONGEST_WAIT = 60.0
ERROR_BODY_BYTES = 64 * 1024
# After [DONE] only the end of the body is missing. Waiting a moment for it lets the connection go back to the pool.
LINGER = 0.25

# How many tools one answer may ask for.
MAX_CALLS = 128
# What is kept of an id and of a name. No tool of ours has a longer name, and a database column holds as much.
KEPT_CHARS = 200

REPLACED = "\ufffd"  # what `clean` puts for what it takes away

TEXTS = {
    "model_unreachable": "The model could not be reached.",
    "model_rate_limited": "The model is receiving too many requests. Try again in a moment.",
    "model_unavailable": "The model is unavailable at the moment.",
    "model_rejected": "The model did not accept the request.",
    "model_timeout": "The model did not answer in time.",
    "model_interrupted": "The model's answer broke off.",
    "model_bad_response": "The model's answer could not be understood.",
    "model_empty_answer": "The model's answer was empty.",
    "output_limit": "The answer was longer than this server allows.",
}


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Where the model is and how long to wait for it (seconds). `base_url` usually ends in `/v1`."""

    base_url: str
    api_key: str = field(default="", repr=False)
    connect_timeout: float = 5.0
    first_token_timeout: float = 120.0
    token_timeout: float = 60.0
    retries: int = 3
    retry_delay: float = 0.5
    max_output_chars: int = 200_000
    # All calls of an answer together: their ids, names and arguments.
    max_call_chars: int = 4 * 1024 * 1024
    # Some servers send all calls in one event, or the answer as one body; JSON makes them longer than they are.
    max_event_bytes: int = 16 * 1024 * 1024


class TemporaryError(ModelError):
    """A failure that another attempt may well not meet, as long as nothing of the answer has arrived."""

    def __init__(self, code: str, *, retry_after: float = 0.0) -> None:
        super().__init__(code, TEXTS[code])
        self.retry_after = retry_after


class OpenAIModel:
    """Streams model steps over one shared connection pool. Belongs to the event loop that first uses it."""

    def __init__(
        self,
        settings: ClientSettings,
        *,
        breaker: Breaker | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        self._breaker = breaker or Breaker()
        self._sleep = sleep
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close the connection pool; the next step would open a new one."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def stream(self, request: ModelRequest) -> AsyncGenerator[TextDelta | FinishedStep, None]:
        """Stream one model step. Tries again after temporary failures, but never once part of an answer arrived."""
        with self._breaker.step():
            for attempt in count():
                answer = Answer(self._settings)
                try:
                    async with self._asked(request, answer) as (content, patience):
                        while not answer.done and (data := await patience.with_read(content)):
                            progress = answer.progress
                            for text in answer.feed(data):
                                yield TextDelta(text)
                            # Only tokens move the deadline. Keep-alive comments and single bytes do not.
                            if answer.progress > progress:
                                patience.begin_again(self._settings.token_timeout)
                        if answer.done:
                            patience.begin_again(LINGER)
                            await patience.with_read(content)
                    for text in answer.close():
                        yield TextDelta(text)
                    break
                except TemporaryError as error:
                    exhausted = attempt >= self._settings.retries or error.retry_after > LONGEST_WAIT
                    if answer.progress or exhausted:
                        raise
                    backoff = min(LONGEST_WAIT, self._settings.retry_delay * 2**attempt)
                    wait = error.retry_after + random.uniform(0, backoff)  # noqa: S311 - no secret, only spreads the crowd
                await self._sleep(wait)
            step = answer.finish()
        # Yielded outside the breaker: a caller that stops at the finished step has seen a success, not a cancellation.
        yield step

    @asynccontextmanager
    async def _asked(
        self, request: ModelRequest, answer: "Answer"
    ) -> AsyncIterator[tuple[aiohttp.StreamReader, "_Patience"]]:
        """One attempt: the body, and the patience to read it with. What breaks it off is told as a ModelError, unless
        the answer is complete.
        """
        patience = _Patience(self._settings.first_token_timeout)
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout_at(patience.deadline):
                response = await self._post(request)
            await self._check(response)
            if response.content_type == "application/json":
                answer.expect_whole()
            yield response.content, patience
        except (TimeoutError, aiohttp.ClientError, UnicodeError) as error:
            if not answer.complete:
                raise self._translated(error) from None
        finally:
            patience.end()
            if response is not None:
                response.close()

    async def _post(self, request: ModelRequest) -> aiohttp.ClientResponse:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": request.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.tools:
            # Left out rather than empty: some providers refuse an empty list.
            body["tools"] = request.tools
        if self._session is None:
            self._session = self._open_session()
        return await self._session.post(self._url, data=orjson.dumps(body), allow_redirects=False)

    def _open_session(self) -> aiohttp.ClientSession:
        # A compressing proxy would hold tokens back until it has enough of them to compress.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._settings.api_key:
            headers["Authorization"] = f"Bearer {self._settings.api_key}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=self._settings.connect_timeout),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raise the error that an answer other than 200 stands for."""
        status = response.status
        if status < 300 and response.content_type != "text/html":
            return
        body = b""
        with suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(self._settings.connect_timeout):
                body = await response.content.read(ERROR_BODY_BYTES)
        _log(self._settings, f"status {status}, {response.content_type}", body)
        if status in RETRIED_STATUSES:
            code = "model_rate_limited" if status == 429 else "model_unavailable"
            raise TemporaryError(code, retry_after=_seconds(response.headers.get("Retry-After", "")))
        if status < 300:
            raise _failure("model_bad_response")
        raise _failure("model_rejected" if status < 500 else "model_unavailable")

    def _translated(self, error: Exception) -> ModelError:
        # Never its repr: that of some aiohttp errors holds the request's headers, and so the key.
        _log(self._settings, type(error).__name__, str(error).encode())
        # A UnicodeError is a host name that cannot be one.
        if isinstance(error, aiohttp.InvalidURL | aiohttp.ClientSSLError | UnicodeError):
            return _failure("model_unreachable")
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return TemporaryError("model_unreachable")
        if isinstance(error, TimeoutError):
            return _failure("model_timeout")
        if isinstance(error, aiohttp.ClientResponseError):
            return _failure("model_bad_response")
        return TemporaryError("model_interrupted")


class _Patience:
    """Ends a read that lasts beyond `deadline`, with one timer for an answer instead of one for each read.

    The reads alone count: whoever is slow to take what was read is no slow model. Belongs to the task that makes it.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.deadline = self._loop.time() + seconds
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task else 0
        self._is_reading = self._is_over = False
        self._timer: asyncio.TimerHandle | None = None

    async def with_read(self, content: aiohttp.StreamReader) -> bytes:
        """What there is, or what comes next. Raises TimeoutError."""
        if self._timer is None:
            self._timer = self._loop.call_at(self.deadline, self._look)
        self._is_reading = True
        try:
            return await content.readany()
        except asyncio.CancelledError:
            # Somebody else's wish to end the task counts as such, also in the same moment.
            if self._is_over and self._task is not None and self._task.uncancel() <= self._cancelling:
                raise TimeoutError from None
            raise
        finally:
            self._is_reading = False

    def begin_again(self, seconds: float) -> None:
        """Between two reads: the deadline is so far away from now on."""
        deadline = self._loop.time() + seconds
        if deadline < self.deadline:
            self.end()  # its timer would be too late
        self.deadline = deadline

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._is_reading or self._task is None:
            return  # the next read sets the timer
        if self._loop.time() >= self.deadline:
            self._is_over = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(self.deadline, self._look)


class Answer:
    """One answer on its way: takes bytes, gives text, and is a finished step in the end."""

    def __init__(self, settings: ClientSettings) -> None:
        self.done = False
        self.progress = 0  # tokens of any kind so far
        self._settings = settings
        self._body: EventSplitter | WholeBody = EventSplitter(settings.max_event_bytes)
        self._text: list[str] = []
        self._high_surrogate = ""
        self._calls: list[Call] = []
        self._call_at: dict[int | None, Call] = {}
        self._text_chars = 0
        self._call_chars = 0
        self._finish_reason: str | None = None
        self._usage = Usage()

    def expect_whole(self) -> None:
        """The server ignores that we want a stream: the body will be one JSON completion."""
        self._body = WholeBody(self._settings.max_event_bytes)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, should the connection end here."""
        return self.done or self._finish_reason is not None

    def feed(self, data: bytes) -> Iterator[str]:
        """The text that the events ending in `data` add. Raises `ModelError` where they are no answer."""
        for event in self._body.feed(data):
            if text := self._take(event):
                yield text

    def close(self) -> Iterator[str]:
        """The text that only the end of the body completes. Raises `ModelError` if the answer was cut off."""
        try:
            for event in self._body.end():
                if text := self._take(event):
                    yield text
        except ModelError:
            # What is left of a stream may be half an event: then it was cut off, which is told below.
            if isinstance(self._body, WholeBody):
                raise
        if not self.complete and isinstance(self._body, EventSplitter):
            raise TemporaryError("model_interrupted")
        if self._high_surrogate:
            self._text.append("\ufffd")
            yield "\ufffd"

    def finish(self) -> FinishedStep:
        """The finished step. Raises `ModelError` if there is nothing in it."""
        text = "".join(self._text)
        # Blanks are no answer either: providers refuse them when they come back in the history.
        if not text.strip() and not self._calls:
            raise _failure("model_empty_answer")
        calls = [call.wanted() for call in self._calls]
        return FinishedStep(text=text, tool_calls=calls, finish_reason=self._finish_reason, usage=self._usage)

    def _take(self, event: bytes) -> str:
        """Note what the event says; the text it adds."""
        if self.done:
            return ""
        if event.startswith(b"[DONE]"):
            self.done = True
            return ""
        try:
            chunk = _parsed(event)
            if chunk.get("error"):
                raise ValueError("an error in the stream")
            if usage := chunk.get("usage"):
                self._usage = _usage(usage)
            choices = chunk.get("choices")
            if not choices:
                return ""
            choice = choices[0]
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            delta = choice.get("delta") or choice.get("message") or {}
            for position, piece in enumerate(delta.get("tool_calls") or ()):
                self._merge(piece, position)
            content = delta.get("content")
            if content:
                return self._add_text(content)
            # Thinking is no text of ours, but it shows that the model is at work.
            if any(value for key, value in delta.items() if key != "role"):
                self.progress += 1
            return ""
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            # Whatever is not shaped like a chunk ends up here, so that the good case needs no checks.
            _log(self._settings, f"{type(error).__name__} in a chunk", event)
            raise _failure("model_bad_response") from None

    def _add_text(self, content: str) -> str:
        self.progress += 1
        self._text_chars += len(content)
        if self._text_chars > self._settings.max_output_chars:
            raise _failure("output_limit")
        text = self._high_surrogate + content
        self._high_surrogate = ""
        if "\ud800" <= text[-1] <= "\udbff":
            # Some servers cut a character outside the BMP in two: its other half comes with the next delta.
            text, self._high_surrogate = text[:-1], text[-1]
        text = clean(text)
        self._text.append(text)
        return text

    def _merge(self, piece: dict[str, Any], position: int) -> None:
        self.progress += 1
        index = piece.get("index", position)
        function = piece.get("function") or {}
        call_id, name, arguments = piece.get("id") or "", function.get("name") or "", function.get("arguments") or ""
        # Also fails for what is no text. An empty piece counts as well, or they could come for ever.
        self._call_chars += len(call_id + name + arguments) or 1
        call = self._call_at.get(index)
        # Some servers give every parallel call the index 0. Another id together with a name is another call.
        if call is None or (call_id and name and call.name and call_id != call.id):
            call = self._call_at[index] = Call()
            self._calls.append(call)
        if self._call_chars > self._settings.max_call_chars or len(self._calls) > MAX_CALLS:
            raise _failure("output_limit")
        call.id = call.id or call_id
        call.name = call.name or name
        call.arguments.write(arguments)


@dataclass(slots=True)
class Call:
    """A tool call as its pieces come in."""

    id: str = ""
    name: str = ""
    arguments: StringIO = field(default_factory=StringIO)

    def wanted(self) -> CallWanted:
        """The whole call, cut where it is longer than what is kept."""
        raw = self.arguments.getvalue()
        arguments = clean(raw)
        is_damaged = arguments.count(REPLACED) > raw.count(REPLACED)
        # A character that the cut halves is left out.
        kept = arguments.encode()[:MAX_ARGUMENT_BYTES].decode(errors="ignore")
        provider_id, name = clean(self.id)[:KEPT_CHARS], clean(self.name)[:KEPT_CHARS]
        return CallWanted(provider_id, name, kept, is_cut=len(kept) < len(arguments), is_damaged=is_damaged)


class EventSplitter:
    """Cuts an event stream into the data of its events, wherever the network cut it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._line: list[bytes] = []
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that `data` completes."""
        if not self._held and not self._data and data.endswith(b"\n\n") and data.startswith(b"data: "):
            # As nearly all of them come: whole events of one line each.
            events = data[6:-2].split(b"\n\ndata: ")
            if not any(b"\n" in event or b"\r" in event for event in events):
                yield from events
                return
        self._line.append(data)
        if b"\n" in data:
            *lines, rest = b"".join(self._line).split(b"\n")
            self._line = [rest]
            for line in lines:
                if line.endswith(b"\r"):
                    line = line[:-1]
                if line.startswith(b"data:"):
                    self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                elif not line and self._data:
                    event = b"\n".join(self._data)
                    self._data.clear()
                    yield event
            self._held = len(rest) + sum(map(len, self._data))
        else:
            self._held += len(data)
        if self._held > self._max_bytes:
            raise _failure("output_limit")

    def end(self) -> Iterator[bytes]:
        """The last event, if the body ended without the blank line that completes it."""
        return self.feed(b"\n\n")


class WholeBody:
    """A body that is one JSON document."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._body = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Nothing, before the body is whole."""
        self._body += data
        if len(self._body) > self._max_bytes:
            raise _failure("output_limit")
        return iter(())

    def end(self) -> Iterator[bytes]:
        """The document."""
        return iter((bytes(self._body),))


def _failure(code: str) -> ModelError:
    return ModelError(code, TEXTS[code])


def _log(settings: ClientSettings, what: str, detail: bytes) -> None:
    shown = detail.decode(errors="replace")
    if settings.api_key:
        # Some providers repeat the key they refuse.
        shown = shown.replace(settings.api_key, "***")
    logger.warning("Model step failed: %s: %r", what, shown[:500])


def _parsed(event: bytes) -> Any:
    try:
        return orjson.loads(event)
    except orjson.JSONDecodeError:
        # orjson refuses escaped lone surrogates, the other parser takes them; both refuse broken UTF-8.
        return json.loads(event.decode())


def _usage(reported: dict[str, Any]) -> Usage:
    prompt, completion = _tokens(reported, "prompt_tokens"), _tokens(reported, "completion_tokens")
    return Usage(prompt, completion, _tokens(reported, "total_tokens") or prompt + completion)


def _tokens(reported: dict[str, Any], name: str) -> int:
    """A count that a database column holds, whatever the provider says."""
    return min(max(int(reported.get(name) or 0), 0), 100_000_000)


def _seconds(retry_after: str) -> float:
    """How long a Retry-After header asks to wait, given as seconds or as a date; 0 if it says nothing sensible."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0

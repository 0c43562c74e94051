"""JSON in, strictly; JSON out; query parameters (imports nothing of ours but the errors)."""

import json
import math
import re
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime
from functools import wraps
from itertools import accumulate
from typing import Any

from django.http import HttpRequest, QueryDict
from django.http.response import HttpResponseBase
from django.urls import register_converter
from django.urls.converters import StringConverter
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import BaseParser
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request

from orchestrator_site.errors import APIError, BadRequest, Invalid, MethodNotAllowed, TooLarge, UnsupportedMedia

SESSION_ID = "[A-Za-z0-9._-]{1,128}"
SESSION_PATH = "<session_id:session_id>"
CALL_ID = "call_[A-Za-z0-9]{22}"
CALL_PATH = "<call_id:call_id>"
MAX_DEPTH = 64
MAX_KEYS = 10_000
# Two plain patterns that cannot fail half-way: one for whole strings tries every quote of an open one, in squared time.
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"?')
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - set(_STEPS))
_SURROGATE = re.compile("[\ud800-\udfff]")


class SessionIdConverter(StringConverter):
    """A path with an id that no session can have is a path that does not exist."""

    regex = SESSION_ID


class CallIdConverter(StringConverter):
    regex = CALL_ID


register_converter(SessionIdConverter, "session_id")
register_converter(CallIdConverter, "call_id")


class InvalidJSON(BadRequest):
    code = "invalid_json"


class AlwaysJSON(BaseContentNegotiation):
    """There is one form of answer; an `Accept` header that asks for another gets it all the same."""

    def select_parser(self, request: Request, parsers: Iterable[BaseParser]) -> BaseParser:
        return next(iter(parsers))

    def select_renderer(
        self, request: Request, renderers: Iterable[BaseRenderer], format_suffix: str | None = None
    ) -> tuple[BaseRenderer, str]:
        renderer = next(iter(renderers))
        return renderer, renderer.media_type


def json_body(request: Request) -> Any:
    """What a REST request says. Unlike `request.data`, no body is no JSON, and a chunked one is a body."""
    return read_json(request._request.body, request._request.headers.get("Content-Type", ""))


def read_json(body: bytes, content_type: str) -> Any:
    """The JSON value of a request body, read in the only way it can be read.

    Raises UnsupportedMedia for another media type or charset, InvalidJSON for what is not RFC 8259 JSON in UTF-8 (NaN,
    1e999, 5,000-digit numbers, more than MAX_DEPTH levels), TooLarge past MAX_KEYS keys, Invalid for a repeated key,
    a NUL or half a surrogate pair: PostgreSQL stores neither.
    """
    media_type, _, parameters = content_type.partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\";\s]+)", parameters, re.IGNORECASE)
    if media_type.strip().lower() != "application/json" or (charset and charset[1].lower() not in ("utf-8", "utf8")):
        raise UnsupportedMedia("The body has to be application/json in UTF-8.")
    _check_depth(body)
    keys = 0

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal keys
        keys += len(pairs)
        if keys > MAX_KEYS:
            raise TooLarge(f"A body may have {MAX_KEYS} keys.")
        unique = dict(pairs)
        if len(unique) != len(pairs):
            raise Invalid("An object names a key twice.", "body", kind="duplicate_key")
        return unique

    try:
        # Decoded first: json.loads alone would also take UTF-16 and UTF-32.
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=once, parse_constant=_refuse, parse_float=_finite)
    except APIError:
        raise
    except (ValueError, RecursionError):
        raise InvalidJSON("The body is not valid JSON.") from None
    if "\\u" in text or "\x00" in text:
        _check_text(value)
    return value


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", _ESCAPE.sub(b"", body)).translate(None, _NO_BRACKETS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise InvalidJSON(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _check_text(value: Any) -> None:
    """Escapes can spell what UTF-8 cannot: a NUL, half a surrogate pair."""
    if isinstance(value, str):
        if "\x00" in value or _SURROGATE.search(value):
            raise Invalid("A text has a NUL or half a surrogate pair.", "body", kind="invalid_text")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("too large for a number")
    return number


def whole_number(query: QueryDict, name: str, default: int, *, at_least: int, at_most: int | None = None) -> int:
    """A query parameter of ASCII digits. 422 when it is no integer, 400 when it is out of range (protocol 2.6)."""
    raw = _single(query, name)
    if raw is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,30}", raw):
        raise Invalid("Has to be an integer.", "query", name, kind="int_parsing")
    number = int(raw)
    if number < at_least or (at_most is not None and number > at_most):
        limits = f"from {at_least} to {at_most}" if at_most is not None else f"at least {at_least}"
        raise BadRequest(f"{name} has to be {limits}.")
    # SQL has no larger integer; a page out there is refused rather than looked for.
    if number >= 2**63:
        raise Invalid("Is too large.", "query", name, kind="int_too_large")
    return number


def boolean(query: QueryDict, name: str, default: bool) -> bool:
    raw = _single(query, name)
    if raw is None:
        return default
    if raw.lower() not in ("true", "false", "1", "0"):
        raise Invalid("Has to be true or false.", "query", name, kind="bool_parsing")
    return raw.lower() in ("true", "1")


def text(query: QueryDict, name: str) -> str | None:
    """A filter: at most 200 characters that a database can hold; None when it is absent."""
    raw = _single(query, name)
    if raw is not None and (len(raw) > 200 or "\x00" in raw or _SURROGATE.search(raw)):
        raise Invalid("Is too long or no text.", "query", name, kind="invalid_text")
    return raw


def _single(query: QueryDict, name: str) -> str | None:
    values = query.getlist(name)
    if len(values) > 1:
        raise Invalid("Is given twice.", "query", name, kind="repeated")
    return values[0] if values else None


def wire_time(moment: datetime) -> str:
    """ISO 8601 in UTC with an offset, never naive (protocol 1.5)."""
    return moment.astimezone(UTC).isoformat()


def caller_in(request: Request) -> Any:
    """Who sent a DRF request: the caller that the middleware found, which is no user of Django's."""
    return request.user


AsyncView = Callable[..., Coroutine[Any, Any, HttpResponseBase]]


def allow(*methods: str) -> Callable[[AsyncView], AsyncView]:
    """For the stream views, which are no DRF views: 405 in our shape for every other method."""

    def decorate(view: AsyncView) -> AsyncView:
        @wraps(view)
        async def checked(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            if request.method not in methods:
                raise MethodNotAllowed("Method Not Allowed", Allow=", ".join(methods))
            return await view(request, *args, **kwargs)

        return checked

    return decorate

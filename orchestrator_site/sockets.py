"""Who may open a WebSocket, and on which session: the handshake, before anything is accepted."""

import ipaddress
import re
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Self

from django.conf import settings
from django.core.exceptions import TooManyFieldsSent
from django.http import QueryDict
from django.http.request import split_domain_port, validate_host
from django.utils.datastructures import CaseInsensitiveMapping

from events_app.database import read
from events_app.feed import feed
from events_app.stream import Place
from messages_app.consumers import SessionConsumer
from orchestrator_site import logs
from orchestrator_site.errors import APIError, BadRequest, Invalid, NotFound
from orchestrator_site.guard import Receive, Send
from orchestrator_site.http import SESSION_ID, boolean, text
from orchestrator_site.middleware import InvalidHost, as_api_error
from sessions_app import following
from sessions_app.callers import FIRST_ACCOUNT, Caller, caller_of, shown_key
from sessions_app.following import Start

PATH = re.compile(rf"(?:/api/v1)?/ws/({SESSION_ID})")
# Where a socket would be, had its id been one.
IN_VAIN = re.compile("(?:/api/v1)?/ws/")
ORIGIN = re.compile(r"https?://([^/?#@]+)")
# Each is a sign of a proxy, behind which every client seems to be on this machine.
PROXIED = re.compile(r"x-forwarded-.*|forwarded|x-real-ip|via")


class ForeignOrigin(APIError):
    status = 403
    code = "foreign_origin"


async def sockets(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Every WebSocket. Raises APIError as long as it has not accepted; afterwards nothing."""
    request_id = uuid.uuid4().hex
    logs.request_id.set(request_id)  # each socket has its own context
    headers = _headers(scope)
    if not _is_served(headers.get("host", "")):
        raise InvalidHost("This host is not served here.")
    _check_origin(headers.get("origin"))
    caller = _caller(headers, scope["client"][0] if scope.get("client") else "", request_id)
    path = PATH.fullmatch(scope["path"])
    if path is None:
        if IN_VAIN.match(scope["path"]):
            raise NotFound("Not Found")
        raise BadRequest("This path takes no WebSocket.")
    wanted = Wanted.of(scope.get("query_string", b""))
    with Place():
        start = await _start(caller, path[1], wanted) if wanted.live else None
        consumer = SessionConsumer(path[1], caller, as_api_error, tokens=wanted.tokens, live_from=start)
        await consumer(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks for in the address beyond what the gateway said: nothing, by default."""

    tokens: bool
    live: bool
    after: int | None

    @classmethod
    def of(cls, query_string: bytes) -> Self:
        try:
            query = QueryDict(query_string)
        except TooManyFieldsSent as exception:
            raise as_api_error(exception) from None
        tokens, live, after = boolean(query, "tokens", False), boolean(query, "live", False), text(query, "after")
        if after is not None and not live:
            raise Invalid("Only a live socket goes on from a position.", "query", "after")
        return cls(tokens, live, None if after is None else following.position(after))


async def _start(caller: Caller, session_id: str, wanted: Wanted) -> Start:
    try:
        return await read(following.joined, caller, session_id, wanted.after, feed.last_given(session_id))
    except Exception as exception:
        raise as_api_error(exception) from None


def _headers(scope: MutableMapping[str, Any]) -> Mapping[str, str]:
    """As Django has them for a request: one that came twice is one with a comma, so two keys are a wrong one."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return CaseInsensitiveMapping(headers)


def _is_served(host: str) -> bool:
    domain, _ = split_domain_port(host)
    return bool(domain) and validate_host(domain, settings.ALLOWED_HOSTS)


def _check_origin(origin: str | None) -> None:
    """A browser lets any page open a socket to any server, and names the page's origin; other clients name none."""
    if origin is None:
        return
    page = ORIGIN.fullmatch(origin.lower())
    if page is None or not _is_served(page[1]):
        raise ForeignOrigin("Pages of this origin may not connect.")


def _caller(headers: Mapping[str, str], address: str, request_id: str) -> Caller:
    """Raises Unauthorized. A key that is shown has to be the right one, whoever may come without."""
    if shown_key(headers) is None and _may_come_without_key(headers, address):
        return Caller(FIRST_ACCOUNT, "socket-without-key", "socket", request_id, address)
    return caller_of(headers, channel="socket", request_id=request_id, address=address)


def _may_come_without_key(headers: Mapping[str, str], address: str) -> bool:
    if settings.WS_WITHOUT_KEY == "loopback":
        return _is_loopback(address) and not any(PROXIED.fullmatch(name) for name in headers)
    return bool(settings.WS_WITHOUT_KEY == "always")


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    # How a server that listens on `::` sees a client of IPv4.
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback

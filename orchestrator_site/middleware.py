"""Around every request: its id, who is calling, and every error in the one JSON shape."""

import logging
import re
import uuid
from collections.abc import Awaitable, Callable

from asgiref.sync import markcoroutinefunction
from django.core.exceptions import BadRequest as DjangoBadRequest
from django.core.exceptions import DisallowedHost, SuspiciousOperation, TooManyFieldsSent
from django.db import Error as DatabaseError
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.http.response import HttpResponseBase

from orchestrator_site import logs
from orchestrator_site.errors import RETRY_AFTER, APIError, BadRequest, Invalid, NotFound, Unavailable, body_of
from sessions_app.callers import caller_of

logger = logging.getLogger(__name__)

OPEN_PATHS = {"/health", "/api/v1/health", "/healthz", "/readyz", "/docs", "/schema", "/favicon.ico", "/admin"}
OPEN_PREFIXES = ("/admin/", "/static/")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class InvalidHost(BadRequest):
    code = "invalid_host"


class RequestMiddleware:
    """Async alone, so that a stream costs no thread hop here."""

    async_capable = True
    sync_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], Awaitable[HttpResponseBase]]) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        shown = request.headers.get("X-Request-ID", "")
        request.request_id = shown if REQUEST_ID.fullmatch(shown) else uuid.uuid4().hex  # type: ignore[attr-defined]
        logs.request_id.set(request.request_id)  # type: ignore[attr-defined]  # each request has its own context
        response = await self._respond(request)
        response["X-Request-ID"] = request.request_id  # type: ignore[attr-defined]
        response.setdefault("X-Content-Type-Options", "nosniff")
        # Without it the server sends chunks. An answer without content must not have one.
        if isinstance(response, HttpResponse) and response.status_code not in (204, 304):
            response.setdefault("Content-Length", str(len(response.content)))
        return response

    async def _respond(self, request: HttpRequest) -> HttpResponseBase:
        path = request.path_info
        if path.startswith(OPEN_PREFIXES):
            # Both are looked up as they come, and PostgreSQL takes no NUL.
            if any("\0" in text for text in (path, *request.COOKIES.values())):
                return readable(BadRequest("An address or a cookie has a NUL."))
            return await self.get_response(request)
        try:
            _check_host(request)
            if path == "/" and _is_browser(request):
                return HttpResponseRedirect("/admin/")
            if path not in OPEN_PATHS:
                request.caller = caller_of(  # type: ignore[attr-defined]
                    request.headers,
                    request_id=request.request_id,  # type: ignore[attr-defined]
                    address=request.META.get("REMOTE_ADDR") or "",
                )
        except APIError as error:
            return answer(request, error)
        return await self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponseBase | None:
        """What a view raised. The admin keeps Django's own pages, but for the refusals that we foresee."""
        if not request.path_info.startswith(OPEN_PREFIXES):
            return answer(request, as_api_error(exception))
        if isinstance(exception, APIError) or is_unavailable(exception):
            return readable(as_api_error(exception))
        return None


def as_api_error(exception: Exception) -> APIError:
    """The refusal for anything a view may raise; what nobody foresaw is logged, and its text stays there."""
    match exception:
        case APIError():
            return exception
        case Http404():
            return NotFound("Not Found")
        case _ if is_unavailable(exception):
            logger.error("database_unavailable", exc_info=exception)
            return Unavailable("The database does not answer at the moment.")
        case TooManyFieldsSent():
            return Invalid("Has too many parameters.", "query", kind="too_long")
        case DjangoBadRequest() | SuspiciousOperation():
            return BadRequest("Bad Request")
    logger.error("request_failed", exc_info=exception)
    return internal_error()


def is_unavailable(exception: Exception) -> bool:
    """Whether it is the database's fault, for which one tries again. A refused value or a broken constraint is ours."""
    if isinstance(exception, OperationalError | InterfaceError):
        return True
    # What PostgreSQL says after a failover, and of a transaction that it has ended.
    states = ("25006", "25P03")
    return isinstance(exception, DatabaseError) and getattr(exception.__cause__, "sqlstate", None) in states


def internal_error() -> APIError:
    error = APIError("Internal server error")
    error.status, error.code = 500, "internal_error"
    return error


def answer(request: HttpRequest, error: APIError) -> JsonResponse:
    body = body_of(error, request.request_id)  # type: ignore[attr-defined]
    response = JsonResponse(body, status=error.status, headers=error.headers)
    if error.status in (429, 503):
        response.setdefault("Retry-After", RETRY_AFTER)
    return response


def readable(error: APIError) -> HttpResponse:
    """A refusal for a person with a browser."""
    response = HttpResponse(error.message, status=error.status, content_type="text/plain; charset=utf-8")
    if error.status in (429, 503):
        response["Retry-After"] = RETRY_AFTER
    return response


def _is_browser(request: HttpRequest) -> bool:
    """Somebody who typed the server's address. For a client there is nothing at its root."""
    return request.method in ("GET", "HEAD") and "text/html" in request.headers.get("Accept", "")


def _check_host(request: HttpRequest) -> None:
    try:
        request.get_host()
    except DisallowedHost:
        raise InvalidHost("This host is not served here.") from None

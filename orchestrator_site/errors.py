"""The errors we foresee, and the one JSON shape that every refusal has (imports nothing of ours)."""

from typing import Any

from django.http import HttpResponse
from django.utils.functional import Promise
from rest_framework import exceptions, status
from rest_framework.response import Response

RETRY_AFTER = "5"  # seconds, where a 429 or 503 does not say it itself


class APIError(Exception):
    """A refusal with a status, a stable `code` for programs and a text for people.

    `detail` is a text, or the list that protocol 1.4 has for a body or query that does not fit its schema. `more` are
    further keys of the body.
    """

    status: int = status.HTTP_400_BAD_REQUEST
    code = "bad_request"

    def __init__(self, detail: str | list[dict[str, Any]], **headers: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.more: dict[str, Any] = {}

    @property
    def message(self) -> str:
        """The text for people, of the first field where there are several."""
        return self.detail if isinstance(self.detail, str) else self.detail[0]["msg"]


class BadRequest(APIError):
    pass


class Unauthorized(APIError):
    status = status.HTTP_401_UNAUTHORIZED
    code = "unauthorized"


class Forbidden(APIError):
    status = status.HTTP_403_FORBIDDEN
    code = "forbidden"


class NotFound(APIError):
    status = status.HTTP_404_NOT_FOUND
    code = "not_found"


class MethodNotAllowed(APIError):
    status = status.HTTP_405_METHOD_NOT_ALLOWED
    code = "method_not_allowed"


class Conflict(APIError):
    status = status.HTTP_409_CONFLICT
    code = "conflict"


class TooLarge(APIError):
    status = status.HTTP_413_REQUEST_ENTITY_TOO_LARGE
    code = "too_large"


class UnsupportedMedia(APIError):
    status = status.HTTP_415_UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_media_type"


class Invalid(APIError):
    """JSON of the wrong shape; `field` says where."""

    status = status.HTTP_422_UNPROCESSABLE_ENTITY
    code = "invalid"

    detail: list[dict[str, Any]]

    def __init__(self, message: str, *field: str | int, kind: str = "value_error") -> None:
        super().__init__([{"type": kind, "loc": list(field), "msg": message, "input": None}])


class TooMany(APIError):
    status = status.HTTP_429_TOO_MANY_REQUESTS
    code = "too_many_requests"


class Unavailable(APIError):
    status = status.HTTP_503_SERVICE_UNAVAILABLE
    code = "unavailable"


def body_of(error: APIError, request_id: str) -> dict[str, Any]:
    return {"detail": error.detail, "code": error.code, "request_id": request_id, **error.more}


def to_response(exception: Exception, context: dict[str, Any]) -> HttpResponse | Response | None:
    """DRF's exception handler: what DRF raises itself takes our shape; everything else is the middleware's."""
    if not isinstance(exception, exceptions.APIException):
        return None
    # Views run before Django rolls back what a failing request wrote; ours open their own transactions.
    if isinstance(exception, exceptions.ValidationError):
        raise from_validation(exception, "body")
    error = APIError("Method Not Allowed" if exception.status_code == 405 else str(exception.detail))
    error.status = exception.status_code
    error.code = str(exception.default_code)
    allowed = getattr(context["view"], "allowed_methods", None)
    if exception.status_code == 405 and allowed:
        # DRF counts OPTIONS among them, which nothing answers here.
        error.headers["Allow"] = ", ".join(method for method in allowed if method != "OPTIONS")
    raise error


def from_validation(exception: exceptions.ValidationError, where: str) -> APIError:
    """A serializer's complaints in the form of protocol 1.4: `[{"type", "loc", "msg", "input"}]`."""
    error = APIError(list(_flatten(exception.get_full_details(), [where])))
    error.status = 422
    error.code = "invalid"
    return error


def _flatten(details: Any, loc: list[str | int]) -> Any:
    if isinstance(details, dict) and set(details) == {"message", "code"}:
        message = details["message"]
        yield {
            "type": details["code"],
            "loc": loc,
            "msg": str(message) if isinstance(message, Promise | str) else "",
            "input": None,
        }
    elif isinstance(details, dict):
        for key, value in details.items():
            yield from _flatten(value, loc if key == "non_field_errors" else [*loc, key])
    else:
        for value in details:
            yield from _flatten(value, loc)

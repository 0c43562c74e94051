"""Who is calling: the key of a request becomes a caller, and a caller sees the rows of one account."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.http import HttpRequest
from rest_framework.authentication import BaseAuthentication
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from orchestrator_site.errors import Unauthorized

# Seeded by a migration; until keys have owners every row and every caller belongs to it.
FIRST_ACCOUNT = 1


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who showed a valid key, or who was let in without one; `name` is what the records say.

    `channel`, `request_id` and `address` say by which way, in which request and from where, for the audit entries. An
    operator is a person who logged in to decide; everybody else drives sessions, and so asks for what is decided on.
    """

    account_id: int
    name: str
    channel: str = "api"
    request_id: str = ""
    address: str = ""
    is_operator: bool = False


def shown_key(headers: Mapping[str, str]) -> str | None:
    """The key in `X-Internal-Auth: <key>` or else `Authorization: Bearer <key>`; None when there is neither header."""
    shown = headers.get("X-Internal-Auth")
    if shown is None and "Authorization" in headers:
        scheme, _, token = headers["Authorization"].partition(" ")
        shown = token.strip() if scheme.lower() == "bearer" else ""
    return shown


def caller_of(headers: Mapping[str, str], *, channel: str = "api", request_id: str = "", address: str = "") -> Caller:
    """Who sent these headers (their names in any case). Raises Unauthorized, the same for a missing, an empty and a
    wrong key.
    """
    # Compared as bytes: compare_digest refuses text beyond ASCII, which any client can send.
    expected = settings.INTERNAL_API_KEY.encode()
    shown = shown_key(headers) or ""
    if not expected or not hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), expected):
        raise Unauthorized("unauthorized")
    return Caller(FIRST_ACCOUNT, "internal", channel, request_id, address)


def person(request: HttpRequest) -> Caller:
    """Who is logged in to the admin, as the records name them."""
    return Caller(
        FIRST_ACCOUNT,
        request.user.get_username(),
        channel="admin",
        request_id=request.request_id,  # type: ignore[attr-defined]
        address=request.META.get("REMOTE_ADDR") or "",
        is_operator=True,
    )


class CallerAuthentication(BaseAuthentication):
    """Hands DRF what the middleware found out."""

    def authenticate(self, request: Request) -> tuple[Any, None] | None:
        caller = getattr(request._request, "caller", None)
        return (caller, None) if caller else None


class IsCaller(BasePermission):
    def has_permission(self, request: Request, view: Any) -> bool:
        return isinstance(request.user, Caller)

"""Who is calling: the key of a request becomes a caller, and a caller sees the rows of one account."""

import hmac
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
    """Somebody who showed a valid key; `name` is what the records say."""

    account_id: int
    name: str


def caller_of(request: HttpRequest) -> Caller:
    """Who sent the request, by `X-Internal-Auth: <key>` or else `Authorization: Bearer <key>`.

    Raises Unauthorized, the same for a missing, an empty and a wrong key.
    """
    shown = request.headers.get("X-Internal-Auth")
    if shown is None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        shown = token.strip() if scheme.lower() == "bearer" else ""
    # Compared as bytes: compare_digest refuses text beyond ASCII, which any client can send.
    expected = settings.INTERNAL_API_KEY.encode()
    if not expected or not hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), expected):
        raise Unauthorized("unauthorized")
    return Caller(FIRST_ACCOUNT, "internal")


class CallerAuthentication(BaseAuthentication):
    """Hands DRF what the middleware found out."""

    def authenticate(self, request: Request) -> tuple[Any, None] | None:
        caller = getattr(request._request, "caller", None)
        return (caller, None) if caller else None


class IsCaller(BasePermission):
    def has_permission(self, request: Request, view: Any) -> bool:
        return isinstance(request.user, Caller)

"""Health, and the answers to what no view takes."""

import sys
from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.views import defaults
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from orchestrator_site.errors import RETRY_AFTER, BadRequest, NotFound
from orchestrator_site.http import allow
from orchestrator_site.middleware import (
    OPEN_PREFIXES,
    answer,
    as_api_error,
    internal_error,
    is_unavailable,
    readable,
)
from orchestrator_site.readiness import UNAVAILABLE, readiness


class HealthView(APIView):
    """GET /health: open, without the database."""

    authentication_classes = ()
    permission_classes = ()

    def get(self, request: Request) -> Response:
        return Response({"status": "healthy", "service": "agent-runtime", "version": settings.VERSION})


@allow("GET", "HEAD")
async def healthz(request: HttpRequest) -> HttpResponseBase:
    """GET /healthz: the process answers, whatever else is broken."""
    return JsonResponse({"status": "alive"})


@allow("GET", "HEAD")
async def readyz(request: HttpRequest) -> HttpResponseBase:
    """GET /readyz: whether it can serve, and what is missing."""
    seen = await readiness.look()
    if seen["status"] == UNAVAILABLE:
        return JsonResponse(seen, status=503, headers={"Retry-After": RETRY_AFTER})
    return JsonResponse(seen)


@allow("GET", "HEAD")
async def favicon(request: HttpRequest) -> HttpResponseBase:
    """GET /favicon.ico: there is none. Browsers ask without being told to, and need not ask again all day."""
    return HttpResponse(status=204, headers={"Cache-Control": "max-age=86400"})


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    if request.path_info.startswith(OPEN_PREFIXES):
        return defaults.bad_request(request, exception)
    return answer(request, BadRequest("Bad Request"))


def not_found(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    if request.path_info.startswith(OPEN_PREFIXES):
        return defaults.page_not_found(request, exception)
    return answer(request, NotFound("Not Found"))


def server_error(request: HttpRequest, **_: Any) -> HttpResponseBase:
    # Of what a middleware raised, such as that of the admin's sessions; views are asked elsewhere.
    exception = sys.exc_info()[1]
    if isinstance(exception, Exception) and is_unavailable(exception):
        return readable(as_api_error(exception))
    if request.path_info.startswith(OPEN_PREFIXES):
        return defaults.server_error(request)
    return answer(request, internal_error())

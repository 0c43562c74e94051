"""Django's middleware for people with a browser, run under /admin/ alone.

Each of these hops to a thread and back for every request that passes through, also for a stream of tokens.
"""

from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.messages.middleware import MessageMiddleware
from django.contrib.sessions.middleware import SessionMiddleware
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.middleware.clickjacking import XFrameOptionsMiddleware
from django.middleware.common import CommonMiddleware
from django.middleware.csrf import CsrfViewMiddleware
from django.middleware.security import SecurityMiddleware
from django.utils.deprecation import MiddlewareMixin

CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)


class _UnderAdmin:
    get_response: Any

    async def __acall__(self, request: HttpRequest) -> Any:
        if not request.path_info.startswith("/admin/"):
            return await self.get_response(request)
        return await super().__acall__(request)  # type: ignore[misc]


class AdminSecurityMiddleware(_UnderAdmin, SecurityMiddleware):
    pass


class AdminSessionMiddleware(_UnderAdmin, SessionMiddleware):
    pass


class AdminCommonMiddleware(_UnderAdmin, CommonMiddleware):
    pass


class AdminCsrfMiddleware(_UnderAdmin, CsrfViewMiddleware):
    async def process_view(  # type: ignore[override]
        self, request: HttpRequest, callback: Any, args: Any, kwargs: Any
    ) -> Any:
        # The API authenticates every request by its key and knows no cookie, so there is nothing to forge there.
        if not request.path_info.startswith("/admin/"):
            return None
        return await sync_to_async(super().process_view)(request, callback, args, kwargs)


class AdminAuthenticationMiddleware(_UnderAdmin, AuthenticationMiddleware):
    pass


class AdminMessageMiddleware(_UnderAdmin, MessageMiddleware):
    pass


class AdminFrameMiddleware(_UnderAdmin, XFrameOptionsMiddleware):
    pass


class AdminContentPolicyMiddleware(MiddlewareMixin):
    """What a page of the admin may load and run: files of this server, and nothing written into the page.

    'unsafe-eval' because unfold's Alpine compiles the expressions in its attributes; styles are written into
    attributes by Alpine, htmx and Chart.js.
    """

    async def __acall__(self, request: HttpRequest) -> Any:
        return self.process_response(request, await self.get_response(request))  # type: ignore[misc]

    def process_response(self, request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
        if request.path_info.startswith("/admin/"):
            response.headers["Content-Security-Policy"] = CONTENT_POLICY
        return response

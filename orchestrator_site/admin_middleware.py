"""Django's middleware for people with a browser, run under /admin/ alone.

Each of these hops to a thread and back for every request that passes through, also for a stream of tokens.
"""

from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.messages.middleware import MessageMiddleware
from django.contrib.sessions.middleware import SessionMiddleware
from django.http import HttpRequest
from django.middleware.clickjacking import XFrameOptionsMiddleware
from django.middleware.common import CommonMiddleware
from django.middleware.csrf import CsrfViewMiddleware
from django.middleware.security import SecurityMiddleware


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

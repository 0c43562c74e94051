"""How a request of the API gets its answer: Django's requests, paths and views, without what its own handler adds.

That one makes an operating-system thread for each request, for signal handlers that close a connection which nobody
opened, renders on it, and has each request pass through the middleware of the admin: two thirds of what a request cost.
"""

import asyncio
from collections.abc import MutableMapping
from contextlib import aclosing
from functools import lru_cache
from inspect import isawaitable
from io import BytesIO
from typing import Any, cast

from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.urls import resolve
from rest_framework.response import Response

from events_app.stream import EventStream
from orchestrator_site.errors import BadRequest
from orchestrator_site.guard import App, Receive, Send, refuse
from orchestrator_site.middleware import RequestMiddleware, answer, as_api_error

# Pages and files for people with a browser, which Django's own handler serves with its middleware.
PAGES = ("/admin/", "/static/")
# More than a slow reader is given at once, it does not take.
PIECE = 64 * 1024


class Http:
    """Gives pages to Django's handler, and everything else to the API."""

    def __init__(self, pages: App) -> None:
        self.pages = pages
        self.api = Api()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path = scope["path"]
        app = self.pages if path == "/admin" or path.startswith(PAGES) else self.api
        await app(scope, receive, send)


class Api:
    def __init__(self) -> None:
        self._respond = RequestMiddleware(_call)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        message = await receive()  # the guard has read all of the body
        try:
            request = ASGIRequest(scope, BytesIO(message["body"]))
        except UnicodeDecodeError:
            await refuse(send, BadRequest("Bad Request"))
            return
        async with _Leaving(receive) as leaving:
            response = await self._respond(request)
            try:
                await _send(response, send, leaving)
            finally:
                # Not `close`: it has signal handlers close the connections of this thread, which has none.
                for close in response._resource_closers:  # type: ignore[attr-defined]
                    close()


class _Leaving:
    """Ends the request's task within the block when its client leaves: what has not begun for it never does."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False

    async def __aenter__(self) -> "_Leaving":
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._watch = asyncio.create_task(self._until_left())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.no_more()
        if self._has_left and kind is asyncio.CancelledError:
            self._task.uncancel()
            return True
        return False

    def no_more(self) -> None:
        """The rest is sent in any case. Who is told the end of an answer leaves, as far as the server is concerned."""
        self._watch.cancel()

    async def _until_left(self) -> None:
        await self._receive()
        self._has_left = True
        self._task.cancel()


# To find a path costs as much as to answer a small request, and most requests have the same.
_found = lru_cache(maxsize=256)(resolve)


async def _call(request: HttpRequest) -> HttpResponseBase:
    try:
        found = _found(request.path_info)
        request.resolver_match = found
        response = found.func(request, *found.args, **found.kwargs)
        # All but one go to the database or wait for something.
        if isawaitable(response):
            response = await response
        if isinstance(response, Response):
            response.render()
        return cast(HttpResponseBase, response)
    except Exception as exception:
        return answer(request, as_api_error(exception))


async def _send(response: HttpResponseBase, send: Send, leaving: _Leaving) -> None:
    headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in response.items()]
    start = {"type": "http.response.start", "status": response.status_code, "headers": headers}
    if isinstance(response, EventStream):
        await send(start)
        async with aclosing(response.parts) as parts:
            async for part in parts:
                if body := response.wire(part):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        leaving.no_more()
        await send({"type": "http.response.body"})
        return
    leaving.no_more()
    await send(start)
    content = cast(HttpResponse, response).content
    for first in range(0, max(len(content), 1), PIECE):
        is_last = first + PIECE >= len(content)
        await send({"type": "http.response.body", "body": content[first : first + PIECE], "more_body": not is_last})

"""uvicorn's HTTP protocol, where it would read any head whole before anybody sees it, or wait for a reader for ever."""

import asyncio
import time
from typing import Any

from django.conf import settings
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class BoundedHeadProtocol(HttpToolsProtocol):
    """Cuts a connection whose request head grows past its bound: without it, 64 MiB of header were kept in memory.

    A head that is complete although it is too long is answered by the guard with 431.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._head_bytes = 0
        self._boundaries = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # For the guard: one that is closed waits for ever for its reader to take the rest.
        self.app_state = {**self.app_state, "abort": transport.abort}

    def data_received(self, data: bytes) -> None:
        # Before anything else has its turn on the loop: those that come in one moment have nearly the same time.
        self.app_state["arrived_at"] = time.monotonic()
        boundaries = self._boundaries
        super().data_received(data)
        # Only what is all head counts: data that ends a head or a body may hold much of a body.
        if self._is_in_head and self._boundaries == boundaries:
            self._head_bytes += len(data)
            if self._head_bytes > settings.MAX_HEADER_BYTES:
                self.transport.abort()

    def on_headers_complete(self) -> None:
        self._pass_boundary(into_head=False)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._pass_boundary(into_head=True)
        super().on_message_complete()

    def _pass_boundary(self, *, into_head: bool) -> None:
        self._is_in_head, self._head_bytes = into_head, 0
        self._boundaries += 1

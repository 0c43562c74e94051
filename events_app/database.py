"""How async code reaches the database: one hop to a small pool of threads is one function, mostly one transaction."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from django.db import connections
from django.http import HttpRequest
from django.http.response import HttpResponseBase

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
_executor = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="database")


async def hop(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on a database thread. Cancelling the caller does not stop what has begun there."""
    context = contextvars.copy_context()  # the log lines of a request carry its id on every thread
    work = partial(context.run, _run, function, args, kwargs)
    return await asyncio.get_running_loop().run_in_executor(_executor, work)


def on_database_thread(view: Callable[..., HttpResponseBase]) -> Callable[..., Any]:
    """A synchronous view for an ASGI server, run where the connections are.

    Django would run it on a thread made for this request, with a connection opened for this request.
    """

    @wraps(view)
    async def hopping(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        return await hop(view, request, *args, **kwargs)

    return hopping


def close_threads() -> None:
    """At the end of the process: every thread closes its connection; the last one folds SQLite's log into its file."""
    together = threading.Barrier(THREADS)

    def close() -> None:
        with suppress(threading.BrokenBarrierError):
            together.wait(5)  # so that no thread closes twice and another not at all
        connections.close_all()

    for closing in [_executor.submit(close) for _ in range(THREADS)]:
        closing.result()
    _executor.shutdown()


def _run(function: Callable[..., T], args: Any, kwargs: Any) -> T:
    try:
        return function(*args, **kwargs)
    finally:
        for connection in connections.all(initialized_only=True):
            # A SQLite connection is cheap to keep and costs a checkpoint to close; one that broke is not kept.
            connection.close_at = None
            connection.close_if_unusable_or_obsolete()

"""How async code reaches the database: one hop to a small pool of threads is one function, mostly one transaction.

On SQLite each thread keeps its connection; on PostgreSQL each hop takes one of the pool's and gives it back.
"""

import asyncio
import contextvars
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from django.db import OperationalError, connection, connections
from django.http import HttpRequest
from django.http.response import HttpResponseBase

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
_writers = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="database-write")
# SQLite's readers wait for nobody; in one queue with the writers they would wait for their lock.
_readers = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="database-read")
# When one of their threads last waited in vain: for a connection, or for SQLite's lock.
_refused_at: dict[ThreadPoolExecutor, float] = {}


async def hop(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on a database thread. Cancelling the caller does not stop what has begun there."""
    return await _submit(_writers, function, args, kwargs)


async def read(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `hop`, for what writes nothing."""
    return await _submit(_readers, function, args, kwargs)


async def _submit(executor: ThreadPoolExecutor, function: Callable[..., T], args: Any, kwargs: Any) -> T:
    context = contextvars.copy_context()  # the log lines of a request carry its id on every thread
    work = partial(context.run, _run, executor, function, args, kwargs, time.monotonic())
    return await asyncio.get_running_loop().run_in_executor(executor, work)


def on_database_thread(view: Callable[..., HttpResponseBase]) -> Callable[..., Any]:
    """A synchronous view for an ASGI server, run where the connections are.

    Django would run it on a thread made for this request, with a connection opened for this request.
    """

    @wraps(view)
    async def hopping(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        run = read if request.method in ("GET", "HEAD") else hop
        return await run(view, request, *args, **kwargs)

    return hopping


def close_threads() -> None:
    """At the end of the process: every thread closes its connection; the last one folds SQLite's log into its file."""
    for executor in (_readers, _writers):
        together = threading.Barrier(THREADS)
        for closing in [executor.submit(_close, together) for _ in range(THREADS)]:
            closing.result()
        executor.shutdown()


def _close(together: threading.Barrier) -> None:
    with suppress(threading.BrokenBarrierError):
        together.wait(5)  # so that no thread closes twice and another not at all
    connections.close_all()


def _run(executor: ThreadPoolExecutor, function: Callable[..., T], args: Any, kwargs: Any, asked_at: float) -> T:
    if asked_at < _refused_at.get(executor, 0.0):
        # Those that stood in the queue meanwhile do not wait as long once more, one after the other.
        raise OperationalError("the database answered nobody before")
    try:
        return function(*args, **kwargs)
    except OperationalError as error:
        if _has_waited_in_vain(error):
            _refused_at[executor] = time.monotonic()
        raise
    finally:
        for each in connections.all(initialized_only=True):
            if each.vendor == "sqlite":
                # Cheap to keep, and closing it costs a checkpoint; one that broke is not kept.
                each.close_at = None
                each.close_if_unusable_or_obsolete()
            else:
                each.close()


def _has_waited_in_vain(error: OperationalError) -> bool:
    if connection.vendor == "sqlite":
        return getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
    from psycopg_pool import PoolTimeout

    return isinstance(error.__cause__, PoolTimeout)

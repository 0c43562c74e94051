"""How async code reaches the database: one hop to a small pool of threads is one function, mostly one transaction."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from django.db import connections

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
_executor = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="database")


async def hop(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on a database thread. Cancelling the caller does not stop what has begun there."""
    return await asyncio.get_running_loop().run_in_executor(_executor, partial(_run, function, args, kwargs))


def _run(function: Callable[..., T], args: Any, kwargs: Any) -> T:
    try:
        return function(*args, **kwargs)
    finally:
        for connection in connections.all(initialized_only=True):
            # A SQLite connection is cheap to keep and costs a checkpoint to close; one that broke is not kept.
            connection.close_at = None
            connection.close_if_unusable_or_obsolete()

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
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from django.db import OperationalError, connection, connections
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.template.response import SimpleTemplateResponse

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
# SQLite lets one writer in at a time, and in no order: of several threads one may lose the lock to the others.
WRITERS = 1 if connection.vendor == "sqlite" else THREADS
_writers = ThreadPoolExecutor(max_workers=WRITERS, thread_name_prefix="database-write")
# SQLite's readers wait for nobody; in one queue with the writers they would wait for their lock.
_readers = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="database-read")
# What must not be late stands behind nothing else.
_keeper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database-keep")
# A server that is frozen acknowledges what it is sent, and its own time limits stand still with it.
SILENCE_SECONDS = 4.5
# When one of their threads last waited in vain, for a connection or for SQLite's lock; when any last came back.
_refused_at: dict[ThreadPoolExecutor, float] = {}
_answered_at = 0.0
# A writer that takes longer waits for somebody else's lock, or for the database.
LONG_SECONDS = 0.2
# Since when each thread writes; until when one of them was last held up so.
_writing_since: dict[int, float] = {}
_held_up_until = 0.0


def held_up_until() -> float:
    """Until when writers were last held up by something other than work; now, if one is. By the monotonic clock."""
    now = time.monotonic()
    return now if any(now - since > LONG_SECONDS for since in list(_writing_since.values())) else _held_up_until


async def hop(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` on a database thread. Cancelling the caller does not stop what has begun there."""
    return await _submit(_writers, function, args, kwargs)


async def keep(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `hop`, for what has to happen in time however much there is to do: leases."""
    return await _submit(_keeper, function, args, kwargs)


async def store(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `hop`, for a caller who is told that it did not work rather than kept waiting.

    Raises OperationalError when the database answers nobody any more. What had begun by then is rolled back at its next
    statement; only what was being committed may still happen.
    """
    given_up = threading.Event()

    def stop(execute: Callable[..., Any], sql: str, parameters: Any, many: bool, context: Any) -> Any:
        if given_up.is_set():
            raise OperationalError("nobody waits for this any more")
        return execute(sql, parameters, many, context)

    def unless_given_up(*args: Any, **kwargs: Any) -> T:
        with connection.execute_wrapper(stop):
            return function(*args, **kwargs)

    try:
        return await _unless_silent(_submit(_writers, unless_given_up, args, kwargs))
    except OperationalError:
        given_up.set()
        raise


async def read(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `store`, for what writes nothing."""
    return await _unless_silent(_submit(_readers, function, args, kwargs))


def _submit(executor: ThreadPoolExecutor, function: Callable[..., T], args: Any, kwargs: Any) -> "asyncio.Future[T]":
    context = contextvars.copy_context()  # the log lines of a request carry its id on every thread
    work = partial(context.run, _run, executor, function, args, kwargs, time.monotonic())
    return asyncio.get_running_loop().run_in_executor(executor, work)


async def _unless_silent(work: "asyncio.Future[T]") -> T:
    silence = _Silence(work)
    try:
        return await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if silence.is_over and task is not None and not task.cancelling():
            raise OperationalError("the database answers nobody") from None
        raise
    finally:
        silence.end()
        work.cancel()  # what has not begun never does


class _Silence:
    """Ends the wait for some work when the database has answered nobody for SILENCE_SECONDS."""

    def __init__(self, work: "asyncio.Future[Any]") -> None:
        self.is_over = False
        self._work = work
        self._asked_at = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(SILENCE_SECONDS, self._look)

    def _look(self) -> None:
        patience = max(self._asked_at, _answered_at) + SILENCE_SECONDS - time.monotonic()
        if patience > 0:
            self._timer = asyncio.get_running_loop().call_later(patience, self._look)
        elif not self._work.done():
            self.is_over = True
            self._work.cancel()

    def end(self) -> None:
        self._timer.cancel()


def on_database_thread(view: Callable[..., HttpResponseBase]) -> Callable[..., Any]:
    """A synchronous view for an ASGI server, run where the connections are, and its answer rendered there.

    Django would run it on a thread made for this request, with a connection opened for this request.
    """

    def rendered(*args: Any, **kwargs: Any) -> HttpResponseBase:
        response = view(*args, **kwargs)
        return response.render() if isinstance(response, SimpleTemplateResponse) else response

    @wraps(view)
    async def hopping(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        run = read if request.method in ("GET", "HEAD") else store
        return await run(rendered, request, *args, **kwargs)

    return hopping


def close_threads() -> None:
    """At the end of the process: every thread closes its connection; the last one folds SQLite's log into its file."""
    for executor, number in ((_readers, THREADS), (_writers, WRITERS), (_keeper, 1)):
        together = threading.Barrier(number)
        for closing in [executor.submit(_close, together) for _ in range(number)]:
            closing.result()
        executor.shutdown()


def _close(together: threading.Barrier) -> None:
    with suppress(threading.BrokenBarrierError):
        together.wait(5)  # so that no thread closes twice and another not at all
    connections.close_all()


def _run(executor: ThreadPoolExecutor, function: Callable[..., T], args: Any, kwargs: Any, asked_at: float) -> T:
    global _answered_at, _held_up_until
    if asked_at < _refused_at.get(executor, 0.0):
        # Those that stood in the queue meanwhile do not wait as long once more, one after the other.
        raise OperationalError("the database answered nobody before")
    _ensure_not_made_anew()
    began_at = time.monotonic()
    if executor is _writers:
        _writing_since[threading.get_ident()] = began_at
    try:
        outcome = function(*args, **kwargs)
        _answered_at = time.monotonic()
        return outcome
    except OperationalError as error:
        if _has_waited_in_vain(error):
            _refused_at[executor] = time.monotonic()
        raise
    finally:
        if executor is _writers:
            del _writing_since[threading.get_ident()]
            if time.monotonic() - began_at > LONG_SECONDS:
                _held_up_until = time.monotonic()
        for each in connections.all(initialized_only=True):
            if each.vendor == "sqlite":
                # Cheap to keep, and closing it costs a checkpoint; one that broke is not kept.
                each.close_at = None
                each.close_if_unusable_or_obsolete()
            else:
                each.close()


def _ensure_not_made_anew() -> None:
    """SQLite makes the file that a connection does not find; one that somebody took away is not to come back empty."""
    if connection.vendor == "sqlite" and connection.connection is None:
        file = Path(connection.settings_dict["NAME"])
        # One in memory has a name that is no path.
        if file.is_absolute() and not file.exists():
            raise OperationalError("the database file is gone")


def _has_waited_in_vain(error: OperationalError) -> bool:
    if connection.vendor == "sqlite":
        return getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
    from psycopg_pool import PoolTimeout

    return isinstance(error.__cause__, PoolTimeout)

"""The tools that the server itself executes: Python callables, registered with a JSON schema of their arguments.

    @server_tool("look_up_order", description="Look an order up.", parameters={"type": "object", …})
    async def look_up_order(call: ServerCall) -> Any:
        return await orders.find(call.arguments["number"], idempotency_key=call.call_id)

The modules that register them are named by SERVER_TOOLS; `migrate` makes a row of `Tool` for each, which agents are
allowed to use and rules are about as any other.
"""

import asyncio
import inspect
import json
import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from queue import SimpleQueue
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from agents_app.llm.base import clean
from events_app.chunks import Chunk
from sessions_app.models import Session, ToolCall, Turn

logger = logging.getLogger(__name__)

Outcome = ToolCall.Outcome
Schema = dict[str, Any]
Run = Callable[["ServerCall"], Any]
# What a model is to read of one result; the rest is left out.
MAX_RESULT_CHARS = 256 * 1024
MAX_DEADLINE_SECONDS = 86_400
UNKNOWN = "Whether it took effect is not known."
NO_RESULT = "Tool executed successfully"


class ToolFailed(Exception):
    """What a tool raises when it could not do what it was asked for; the text is for the model."""


@dataclass(frozen=True, slots=True)
class ServerCall:
    """What is to be executed. A call that is executed again, after its server died, has the same `call_id`: the key
    under which a tool makes sure that its effect happens once.
    """

    call_id: str
    tool_name: str
    arguments: dict[str, Any]
    agent: str
    session_id: str
    turn_id: str
    account_id: int
    deadline_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class ServerTool:
    """A tool that is executed outside any transaction, at least once; one that is not repeatable only if an operator
    says so when nobody knows whether it was executed.
    """

    name: str
    description: str
    parameters: Schema
    run: Run
    is_repeatable: bool
    deadline_seconds: int | None


@dataclass(frozen=True, slots=True)
class Performed:
    """What a `StepTool` did: the text that the model reads, and what is said of it on the stream."""

    text: str
    outcome: ToolCall.Outcome = Outcome.OK
    chunks: tuple[Chunk, ...] = ()


@dataclass(frozen=True, slots=True)
class StepTool:
    """A tool that changes records of this server alone: executed in the transaction that releases the call, so once.

    `perform` gets the session, locked, the turn, the arguments and the name of the agent. What it raises fails a
    running turn.
    """

    name: str
    perform: Callable[[Session, Turn, dict[str, Any], str], Performed]


class Threads(Executor):
    """Some threads that a process which ends does not wait for, as it would for a ThreadPoolExecutor's."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._started = 0
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Called by the event loop alone."""
        future: Future[Any] = Future()
        self._work.put((future, partial(work, *args, **kwargs)))
        if self._started < self._number:
            self._started += 1
            threading.Thread(target=self._serve, name=f"server-tool-{self._started}", daemon=True).start()
        return future

    def _serve(self) -> None:
        while True:
            future, work = self._work.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)


registered: dict[str, ServerTool | StepTool] = {}
_threads = Threads(settings.SERVER_TOOL_THREADS)


def server_tool(
    name: str,
    *,
    description: str,
    parameters: Schema,
    is_repeatable: bool = True,
    deadline_seconds: int | None = 60,
) -> Callable[[Run], Run]:
    """Register a function, async or not, under the name that models call it by.

    It returns the result: text, or what JSON can hold; raises ToolFailed with a text for the model, and anything else
    when it is broken, which the log alone is told. `is_repeatable=False`: never executed again by the server's own
    choice. `deadline_seconds`: for how long it may run at first; admins may change that. Raises ImproperlyConfigured
    for a name that is taken or none.
    """

    def register(run: Run) -> Run:
        _register(ServerTool(name, description, parameters, run, is_repeatable, deadline_seconds))
        return run

    if deadline_seconds is not None and not 1 <= deadline_seconds <= MAX_DEADLINE_SECONDS:
        raise ImproperlyConfigured(f"the deadline of the server tool {name!r} has to be 1 to {MAX_DEADLINE_SECONDS} s")
    return register


def step_tool(name: str) -> Callable[[Callable[..., Performed]], Callable[..., Performed]]:
    """Register what is executed within the transaction of a step (see `StepTool`)."""

    def register(perform: Callable[..., Performed]) -> Callable[..., Performed]:
        _register(StepTool(name, perform))
        return perform

    return register


def load(modules: list[str]) -> None:
    """Import the modules that register tools. Raises ImproperlyConfigured for one that cannot be imported."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ImproperlyConfigured(f"SERVER_TOOLS: {module} cannot be imported: {error}") from error


def step_tool_named(name: str) -> StepTool | None:
    tool = registered.get(name)
    return tool if isinstance(tool, StepTool) else None


def is_repeatable(name: str) -> bool:
    """Whether a call that may have been executed already may be executed again; not known of a tool that is gone."""
    tool = registered.get(name)
    return isinstance(tool, ServerTool) and tool.is_repeatable


async def execute(call: ServerCall) -> tuple[str, ToolCall.Outcome]:
    """Execute a call, and what the model reads of it. Whatever the tool raises is an outcome like any other.

    Cancelling it cancels a coroutine; a thread goes on, and what comes of it is lost.
    """
    tool = registered.get(call.tool_name)
    if not isinstance(tool, ServerTool):
        return f"Error: this server does not have {call.tool_name} at the moment.", Outcome.ERROR
    ids = {"tool": call.tool_name, "call_id": call.call_id, "session_id": call.session_id}
    try:
        async with asyncio.timeout(call.deadline_seconds) as patience:
            return as_text(await _run(tool, call)), Outcome.OK
    except ToolFailed as failed:
        return f"Error: {clean(str(failed))[:MAX_RESULT_CHARS]}", Outcome.ERROR
    except Exception as error:
        if isinstance(error, TimeoutError) and patience.expired():
            logger.warning("server_tool_timed_out", extra={**ids, "seconds": call.deadline_seconds})
            message = f"{call.tool_name} did not end within {call.deadline_seconds} s. {UNKNOWN}"
            told = {"status": Outcome.TIMED_OUT, "tool_name": call.tool_name, "message": message}
            return json.dumps(told, ensure_ascii=False), Outcome.TIMED_OUT
        logger.exception("server_tool_failed", extra=ids)
        return f"Error: {call.tool_name} failed on the server. {UNKNOWN}", Outcome.ERROR


def as_text(result: Any) -> str:
    """A result as the model reads it (protocol 4). Raises TypeError or ValueError for what JSON cannot hold."""
    if result is None:
        return NO_RESULT
    text = clean(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, allow_nan=False))
    if not text.strip():
        return NO_RESULT  # providers refuse what is blank
    if len(text) > MAX_RESULT_CHARS:
        return f"{text[:MAX_RESULT_CHARS]}\n… {len(text) - MAX_RESULT_CHARS:,} more characters were left out."
    return text


async def _run(tool: ServerTool, call: ServerCall) -> Any:
    """What the tool returns. What it raises that would end the turn's task, or the server, ends the tool alone."""
    try:
        if inspect.iscoroutinefunction(tool.run):
            return await tool.run(call)
        result = await asyncio.get_running_loop().run_in_executor(_threads, _on_thread, tool.run, call)
        # A wrapper that is no coroutine function itself may return a coroutine.
        return await result if inspect.isawaitable(result) else result
    except (SystemExit, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # not by itself: its deadline, or the turn
        raise RuntimeError(f"{call.tool_name} raised {type(error).__name__}") from error


def _on_thread(run: Run, call: ServerCall) -> Any:
    try:
        return run(call)
    except StopIteration as error:
        raise RuntimeError(f"{call.tool_name} raised StopIteration") from error  # no future can hold it
    finally:
        connections.close_all()  # a tool may use the database


def _register(tool: ServerTool | StepTool) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool.name):
        raise ImproperlyConfigured(f"{tool.name!r} cannot be the name of a server tool")
    if tool.name in registered:
        raise ImproperlyConfigured(f"two server tools are called {tool.name}")
    registered[tool.name] = tool

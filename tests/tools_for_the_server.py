"""Server tools of a test server: what they did stands in files of TOOLS_FOLDER, which is also how a test holds them."""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

from django.db import connection

from agents_app.server_tools import ServerCall, ToolFailed, server_tool

NOTE = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "held": {"type": "boolean"}},
    "required": ["text"],
    "additionalProperties": False,
}


def _folder() -> Path:
    return Path(os.environ["TOOLS_FOLDER"])


def _write_down(name: str, call: ServerCall) -> None:
    with (_folder() / name).open("a") as file:
        file.write(f"{call.call_id} {call.arguments['text']}\n")


async def _note(name: str, call: ServerCall) -> Any:
    _write_down(name, call)
    try:
        while call.arguments.get("held") and not (_folder() / "open").exists():  # noqa: ASYNC110 (by another process)
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        _write_down(f"{name}-cancelled", call)
        raise
    return {"noted": call.arguments["text"], "agent": call.agent}


@server_tool("add_note", description="Keep a note.", parameters=NOTE)
async def add_note(call: ServerCall) -> Any:
    return await _note("notes", call)


@server_tool("pay", description="Pay what is due.", parameters=NOTE, is_repeatable=False)
async def pay(call: ServerCall) -> Any:
    return await _note("payments", call)


@server_tool("count_notes", description="How many notes there are.", parameters={"type": "object"})
def count_notes(call: ServerCall) -> int:
    """Not a coroutine: on a thread."""
    return len((_folder() / "notes").read_text().splitlines())


@server_tool("break", description="Fail.", parameters=NOTE)
def break_(call: ServerCall) -> Any:
    match call.arguments["text"]:
        case "kindly":
            raise ToolFailed("There is nothing to break.")
        case "badly":
            raise RuntimeError("secret of the inside")
        case "without json":
            return {1, 2}
        case "in silence":
            return None
        case text:
            return text * 300_000


@server_tool("wait", description="Wait for ever.", parameters=NOTE, deadline_seconds=1)
async def wait(call: ServerCall) -> None:
    await asyncio.Event().wait()


@server_tool("hang", description="Wait for ever, on a thread.", parameters=NOTE, deadline_seconds=1)
def hang(call: ServerCall) -> None:
    threading.Event().wait()


@server_tool("hold_connection", description="Take long, with the database.", parameters=NOTE)
def hold_connection(call: ServerCall) -> None:
    connection.ensure_connection()
    _write_down("notes", call)
    while not (_folder() / "open").exists():
        time.sleep(0.02)

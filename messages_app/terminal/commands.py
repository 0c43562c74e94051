"""The tool that runs commands. They are not held inside the workspace: whoever calls `execute_command` has asked the
user."""

import asyncio
import os
import shlex
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from agents_app.llm.base import clean
from messages_app.terminal.files import ToolError

HEAD_BYTES = 16 * 1024
TAIL_BYTES = 48 * 1024
# Countersign's own secrets and settings, which this process was started with, are no command's business.
OWN_VARIABLES = frozenset(
    {
        "SECRET_KEY",
        "INTERNAL_API_KEY",
        "LLM_API_KEY",
        "DJANGO_SUPERUSER_USERNAME",
        "DJANGO_SUPERUSER_PASSWORD",
        "DATABASE_URL",
        "DJANGO_SETTINGS_MODULE",
    }
)


class Output:
    """What is kept of a stream: its beginning and its end."""

    def __init__(self) -> None:
        self._head = b""
        self._tail = b""
        self._left_out = 0

    async def collect(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(64 * 1024):
            room = HEAD_BYTES - len(self._head)
            self._head += chunk[:room]
            self._tail += chunk[room:] if room > 0 else chunk
            surplus = max(0, len(self._tail) - TAIL_BYTES)
            self._left_out += surplus
            self._tail = self._tail[surplus:]

    def text(self) -> str:
        gap = f"\n[... {self._left_out:,} bytes are left out ...]\n".encode() if self._left_out else b""
        return clean((self._head + gap + self._tail).decode("utf-8", "replace"))


async def execute_command(
    folder: Path,
    *,
    command: str,
    cwd: str = ".",
    timeout: int = 60,  # noqa: ASYNC109 (what the tool calls it)
    shell: bool = False,
) -> dict[str, Any]:
    """Run a command in `folder`, which is what `cwd` leads to, in a process group of its own, which is killed when the
    time is over or the caller is cancelled. Raises ToolError for a command that cannot be started."""
    words = ["/bin/sh", "-c", command] if shell else split(command)
    environment = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *words,
            cwd=folder,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    )
    try:
        # To its end even when the caller is cancelled: asyncio waits for ever for a process that it was to give up
        # while it started, and kills no more than the process itself.
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        with suppress(OSError, ValueError):
            process = await starting
            await _kill(process.pid, asyncio.ensure_future(process.wait()))
        raise
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it cannot be passed on"
        raise ToolError(f"{words[0]}: {why}") from None
    assert process.stdout is not None and process.stderr is not None  # noqa: S101 (they are pipes)
    output, errors = Output(), Output()
    reading = asyncio.gather(output.collect(process.stdout), errors.collect(process.stderr), process.wait())
    is_late = False
    try:
        # To the end of its output, also what it leaves in the background: that would be lost.
        await asyncio.wait_for(asyncio.shield(reading), timeout)
    except TimeoutError:
        is_late = True
    finally:
        if not reading.done():
            await _kill(process.pid, reading)
    result = {"exit_code": process.returncode, "stdout": output.text(), "stderr": errors.text()}
    if is_late:
        result["timed_out"] = f"It was killed after {timeout} seconds."
    return result


def split(command: str) -> list[str]:
    """The words of a command as a shell would part them. Raises ToolError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ToolError(f"The command cannot be parted into words: {error}") from None
    if not words:
        raise ToolError("The command is empty.")
    return words


async def _kill(group: int, reading: "asyncio.Future[Any]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    # Somebody who has left the group may hold the output open.
    await asyncio.wait([reading], timeout=1)
    if not reading.done():
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading

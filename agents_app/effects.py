"""What a tool call would do, told from its arguments for whoever decides on it (guarantees 3.5).

Everything here is taken from stored rows: nothing that the model says about its call.
"""

import difflib
import json
import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import Q

from agents_app.approvals import EXECUTED_OTHERWISE
from agents_app.tools import EXECUTE, WRITE
from sessions_app.models import ToolCall

Outcome = ToolCall.Outcome
READ = "read_file"
# Arguments that name what a call is about, in the order in which they are told.
ABOUT = ("command", "path", "source", "destination", "query", "mode")
# Comparing is more than linear: beyond so many changed lines a difference is told as a whole replaced by another.
COMPARED_LINES = 3_000
CONTEXT_LINES = 3
# What a client may say of a file that it has read to the end.
WHOLE = {"success", "content", "truncated", "lines_read", "total_lines", "path", "encoding", "size"}
# So many calls on files of the same name are looked through for the content that a file had last.
LOOKED_THROUGH = 20


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a unified difference: `kind` is added, removed, same or place."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Change:
    """One argument that an edit gave another value."""

    name: str
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class KnownContent:
    """What a file held when the session last read or wrote it."""

    text: str
    call_id: str
    is_written: bool
    at: datetime | None


def touched(arguments: dict[str, Any]) -> str:
    """The command, file or text that a call is about; empty when its arguments tell none."""
    about = [value for name in ABOUT if isinstance(value := arguments.get(name), str) and value]
    if not about:
        about = [value for value in arguments.values() if isinstance(value, str) and value][:1]
    return " → ".join(about)


def command_words(arguments: dict[str, Any]) -> list[str] | None:
    """The words that a command without a shell is run with, as POSIX splits them; None where that cannot be told."""
    command = arguments.get("command")
    if not isinstance(command, str) or arguments.get("shell"):
        return None
    try:
        return shlex.split(command)
    except ValueError:  # an open quote
        return None


def is_command(tool_name: str, arguments: dict[str, Any]) -> bool:
    return tool_name == EXECUTE and isinstance(arguments.get("command"), str)


def replaces_content(tool_name: str, arguments: dict[str, Any]) -> bool:
    return tool_name == WRITE and isinstance(arguments.get("path"), str) and isinstance(arguments.get("content"), str)


def known_content(call: ToolCall, path: str) -> KnownContent | None:
    """What the file at `path` held when the call's session last wrote it, or read the whole of it, before the call."""
    # Narrowed down by the file's name, then compared as paths: "./a.py" is "a.py".
    name = json.dumps(posixpath.basename(_normal(path)), ensure_ascii=False)[1:-1]
    named = Q(arguments_text__contains=name) | Q(released_text__contains=name)
    # A write of which nobody knows whether it happened leaves a content that nobody knows.
    told = Q(tool_name__in=(READ, WRITE), outcome=Outcome.OK)
    perhaps = Q(tool_name=WRITE, outcome__in=(Outcome.TIMED_OUT, Outcome.IN_DOUBT))
    earlier = ToolCall.objects.filter(
        named, told | perhaps, session_id=call.session_id, answered_at__lte=call.created_at
    )
    # Answers may be large and are read of the one call alone that tells the content.
    for one in earlier.order_by("-answered_at").defer("answer")[:LOOKED_THROUGH]:
        arguments = one.final_arguments
        if _normal(str(arguments.get("path", ""))) != _normal(path):
            continue
        if one.outcome != Outcome.OK or EXECUTED_OTHERWISE in one.answer:
            return None
        text = _as_written(one, arguments) if one.tool_name == WRITE else _as_read(one, arguments)
        if text is not None:
            return KnownContent(text, one.pk, one.tool_name == WRITE, one.answered_at)
    return None


def difference(before: str, after: str) -> list[Line]:
    """The unified difference of two texts, empty when they are equal."""
    old, new = _lines(before), _lines(after)
    start = _common(old, new)
    end = _common(old[start:][::-1], new[start:][::-1])
    if max(len(old), len(new)) - start - end > COMPARED_LINES:
        return [
            Line("place", f"Too much changed to be compared: lines {start + 1} to {len(old) - end} of {len(old)} go,"),
            Line("place", f"lines {start + 1} to {len(new) - end} of {len(new)} come in their place."),
        ]
    first = max(0, start - CONTEXT_LINES)
    left = max(0, end - CONTEXT_LINES)
    return list(_unified(old[first : len(old) - left], new[first : len(new) - left], skipped=first))


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """What an edit does to arguments, argument by argument."""
    names = [*before, *(name for name in after if name not in before)]
    return [
        Change(name, difference(_told(before, name), _told(after, name)))
        for name in names
        if name not in before or name not in after or before[name] != after[name]
    ]


def client_result(call: ToolCall) -> str:
    """What the client reported, without what the model is told around it when the arguments were edited."""
    told = _object(call.answer) if call.released_text else {}
    return told["result"] if isinstance(told.get("result"), str) else call.answer


def _told(arguments: dict[str, Any], name: str) -> str:
    if name not in arguments:
        return ""
    value = arguments[name]
    return value if isinstance(value, str) and value else json.dumps(value, indent=2, ensure_ascii=False)


def _unified(old: list[str], new: list[str], *, skipped: int) -> Iterator[Line]:
    matcher = difflib.SequenceMatcher(None, old, new)
    for group in matcher.get_grouped_opcodes(CONTEXT_LINES):
        (_, from_old, _, from_new, _), (_, _, to_old, _, to_new) = group[0], group[-1]
        old_range = f"{skipped + from_old + 1},{to_old - from_old}"
        yield Line("place", f"@@ -{old_range} +{skipped + from_new + 1},{to_new - from_new} @@")
        for tag, a_from, a_to, b_from, b_to in group:
            if tag == "equal":
                yield from (Line("same", _whole(line)) for line in old[a_from:a_to])
                continue
            yield from (Line("removed", _whole(line)) for line in old[a_from:a_to])
            yield from (Line("added", _whole(line)) for line in new[b_from:b_to])


def _lines(text: str) -> list[str]:
    """By newlines alone: `splitlines` knows ten more line ends, which a text could hide a line behind."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _whole(line: str) -> str:
    return line.removesuffix("\n") if line.endswith("\n") else f"{line} (no line end)"


def _common(one: list[str], other: list[str]) -> int:
    """How many lines two lists have in common from their beginning."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def _as_read(call: ToolCall, arguments: dict[str, Any]) -> str | None:
    """The content that a client reported for a whole file: a text, or an object that holds it."""
    if arguments.get("start_line") is not None or arguments.get("end_line") is not None:
        return None
    result = client_result(call)
    told = _object(result)
    if not told:
        return result
    # Clients say in their own ways that this is not all of it: only what says nothing else is taken for the whole.
    content = told.get("content")
    is_whole = set(told) <= WHOLE and told.get("success", True) is True and not told.get("truncated")
    lines = told.get("lines_read")
    return content if isinstance(content, str) and is_whole and lines == told.get("total_lines") else None


def _as_written(call: ToolCall, arguments: dict[str, Any]) -> str | None:
    """What a write left in the file, unless its client says that it failed."""
    content = arguments.get("content")
    told = _object(client_result(call))
    return content if isinstance(content, str) and told.get("success", True) is True and "error" not in told else None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _normal(path: str) -> str:
    return posixpath.normpath(path.replace("\\", "/"))

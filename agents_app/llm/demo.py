"""The model that answers when none is configured: offline, and the same answer every time."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from agents_app.keywords import classify

from .base import CallWanted, FinishedStep, ModelRequest, TextDelta, Usage, clean

SHOWN_CHARS = 200

# What each agent is for, continuing "With a real model, the <agent> agent would now ".
WORK = {
    "coder": "write or change the code for this, asking you before any file is touched",
    "architect": "think through the design and write it down as a plan",
    "debug": "look for the cause and explain what goes wrong",
    "ask": "explain this and answer your question",
    "universal": "work on this from the first idea to the finished code",
}

# Words that speak of a tool.
RUN = re.compile(r"\b(?:run|execute)\b", re.IGNORECASE)
RUNNABLE = re.compile(r"\b(?:command|tests)\b", re.IGNORECASE)
WRITE = re.compile(r"\b(?:(?:over|re)?write|create|change|save|edit|modify|update|append)\b", re.IGNORECASE)
READ = re.compile(r"\b(?:read|show|display|print|open|view|see|look)\b", re.IGNORECASE)
FILE = re.compile(r"\bfiles?\b", re.IGNORECASE)
QUOTED = re.compile(r"`([^`\n]{1,200})`")
# Only known endings, for "example.com" and "os.path" are no files; and no part of a longer word, such as an address.
PATH = re.compile(
    r"(?<![\w./~:-])[\w./~-]{0,200}\w\."
    r"(?:c|cfg|conf|cpp|css|csv|dart|go|h|html|ini|java|js|json|jsx|kt|log|md|php|py|rb|rs|sh|sql|toml|ts|tsx|txt|xml"
    r"|yaml|yml)(?![\w/-]|\.\w)",
    re.IGNORECASE,
)
# What stands before a file that is to be read: "read a.md and write b.md", "a summary of a.md in b.md".
SOURCE = re.compile(
    rf"(?:{READ.pattern}|\b(?:of|from|about)\b)(?:\s+(?:at|me|the|files?|contents?|in|of))*\s+[`\"']?$", re.IGNORECASE
)
HEADING = re.compile(r"^#{1,6}[ \t]+(\S.*)$", re.MULTILINE)
SHOWN_HEADINGS = 8


class DemoModel:
    """Says that it is a demo, asks for a tool when the words of a message speak of one, and routes by keywords.

    A message that names a file to read and one to write leads to two calls, every other one to one at most.

    Usage is estimated: one token a word.
    """

    def __init__(self, *, delay: float = 0.03) -> None:
        self._delay = delay

    async def aclose(self) -> None:
        """Nothing is held."""

    async def stream(self, request: ModelRequest) -> AsyncGenerator[TextDelta | FinishedStep, None]:
        """Stream the demo answer word by word; a routing request gets its JSON in one piece."""
        system = _text_of(request.messages[0]) if request.messages else ""
        calls: list[CallWanted] = []
        if request.purpose == "routing" or system.startswith("Classify"):
            answer = _routing(request.messages)
            yield TextDelta(answer)
        else:
            answer, calls = _answer(system, request)
            for number, word in enumerate(re.findall(r"\S+\s*", answer)):
                if number:
                    await asyncio.sleep(self._delay)
                yield TextDelta(word)
        prompt_tokens = sum(len(_text_of(message).split()) for message in request.messages)
        completion_tokens = len(answer.split()) + sum(len(f"{call.name} {call.arguments}".split()) for call in calls)
        usage = Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)
        yield FinishedStep(answer, calls, finish_reason="tool_calls" if calls else "stop", usage=usage)


def _routing(messages: list[dict[str, Any]]) -> str:
    agent = classify(_said(messages))
    return json.dumps({"agent": agent, "confidence": "high", "reasoning": f"The words of the message suggest {agent}."})


def _answer(system: str, request: ModelRequest) -> tuple[str, list[CallWanted]]:
    """The text and the calls: at most one a step and two a turn, so that no turn goes on for ever."""
    speaker = re.match(r"You are the (\w+)", system)
    agent = speaker[1].lower() if speaker else "assistant"
    said = clean(_said(request.messages))
    offered = {tool["function"]["name"] for tool in request.tools}
    results = _results(request.messages)
    tool, arguments = _next_wish(said, results) if results else _wish(said)
    if tool in offered:
        again = f" again. {_outcome(results[-1])}" if results else "."
        text = f"This is the {agent} agent, played by the demo model{again} {_announcement(tool, arguments)}"
        return clean(text), [CallWanted("", tool, json.dumps(arguments, ensure_ascii=False))]
    if results:
        return clean(f"The demo model again, as the {agent} agent. {_outcome(results[-1])}"), []
    missing = f"That would take the tool {tool}, which this agent is not offered: a coder would do it.\n\n"
    return _words_only(agent, said, missing if tool and offered else ""), []


def _words_only(agent: str, said: str, missing: str) -> str:
    heard = f"You said: “{_beginning(said)}”" if said.strip() else "You have not said anything yet."
    return (
        f"Hello! This is the {agent} agent, played by the demo model: it works offline, no provider was asked.\n\n"
        f"{heard}\n\n"
        f"{missing}"
        f"With a real model, the {agent} agent would now {WORK.get(agent, 'answer you')}. "
        "To connect one, set LLM_BASE_URL (any OpenAI-compatible address), LLM_API_KEY and LLM_MODEL, and start the "
        "server again. Until then, ask for code, a design, the cause of an error or an explanation in a new session: "
        "each goes to another agent."
    )


def _wish(said: str) -> tuple[str, dict[str, str]]:
    """The tool that the words of a message speak of, and its arguments; an empty name if they speak of none."""
    # "tests/run.py" speaks of a file, not of running tests.
    words = PATH.sub(" ", said)
    found = PATH.search(said)
    path = found[0] if found else ""
    # Of "in `a.py` run `pytest`" the command is what is no path.
    command = min(QUOTED.findall(said), key=_is_path, default="").strip()
    writes = WRITE.search(words) and (path or FILE.search(words))
    speaks_of_a_command = RUNNABLE.search(words) or (command and not _is_path(command))
    # "Write tests in a.py" and "write `x` to a.md" are about the file.
    if RUN.search(words) or (speaks_of_a_command and not writes):
        return "execute_command", {"command": command or "ls"}
    source, target = _plan(said)
    if writes and not target:
        content = f"Written by the demo model, because somebody said: {_beginning(said)}\n"
        return "write_file", {"path": path or "demo.md", "content": content}
    if path or (READ.search(words) and FILE.search(words)):
        return "read_file", {"path": source or path or "README.md"}
    return "", {}


def _plan(said: str) -> tuple[str, str]:
    """The file to read and the one to write after it, where a message speaks of both; else two empty names."""
    sources: list[str] = []
    targets: list[str] = []
    for found in PATH.finditer(said):
        before = said[max(0, found.start() - 100) : found.start()]
        (sources if SOURCE.search(before) else targets).append(found[0])
    if sources and targets and sources[0] != targets[0] and WRITE.search(PATH.sub(" ", said)):
        return sources[0], targets[0]
    return "", ""


def _next_wish(said: str, results: list[str]) -> tuple[str, dict[str, str]]:
    """What follows the results of a turn: once a file was read, what was to be written by it."""
    source, target = _plan(said)
    read = _text_read(results[0]) if len(results) == 1 else ""
    if not (target and read) or _wish(said)[0] != "read_file":
        return "", {}
    return "write_file", {"path": target, "content": _summary(source, clean(read))}


def _summary(path: str, text: str) -> str:
    headings = [f"- {_beginning(heading)}" for heading in HEADING.findall(text)[:SHOWN_HEADINGS]]
    return "\n".join(
        [
            f"# Summary of {path}",
            "",
            f"By the demo model, which counts but does not understand: {len(text.split()):,} words in "
            f"{len(text.splitlines()):,} lines.",
            "",
            f"It begins: {_beginning(text)}",
            *(["", "Its headings:", "", *headings] if headings else []),
            "",
        ]
    )


def _announcement(tool: str, arguments: dict[str, str]) -> str:
    wish = {
        "execute_command": "run `{command}`",
        "write_file": "write to {path}, in place of what it holds",
        "read_file": "read {path}",
    }[tool].format_map(arguments)
    return f"Your message suggests a tool, so I ask to {wish}. The rules say whether a person approves that first."


def _outcome(content: str) -> str:
    """What became of a call, told by its tool message: an object where a person stepped in, else a text."""
    match _loaded(content):
        case {"status": "rejected", "feedback": str(feedback)}:
            return f"The call was rejected, so nothing was done. The feedback: “{_beginning(feedback)}”"
        case {"status": "rejected"}:
            return "The call was rejected, so nothing was done."
        case {"status": "timed_out" | "in_doubt", "message": str(message)}:
            return _beginning(message)
        case {"status": "approved_with_edits", "result": result}:
            shown = result if isinstance(result, str) else content
            return f"The call was approved with edited arguments. {_result(shown)}"
        case {"content": str(text)}:
            return _result(text)
        case _:
            return _result(content)


def _text_read(content: str) -> str:
    """What a call that reads a file has read; nothing if it failed or was not let do so."""
    match _loaded(content):
        case {"status": "approved_with_edits", "result": str(result)}:
            return _text_read(result)
        case {"status": "rejected" | "timed_out" | "in_doubt"}:
            return ""
        case {"content": str(text)}:
            return text
    return "" if content.startswith("Error:") else content


def _loaded(content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _result(result: str) -> str:
    shown = _beginning(result)
    if shown.startswith("Error:"):
        return f"The call failed: “{shown}”"
    return f"The call has its result: “{shown}”" if shown else "The call has its result, which is empty."


def _beginning(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1].rstrip() + "…"


def _is_path(text: str) -> bool:
    return PATH.fullmatch(text) is not None


def _said(messages: list[dict[str, Any]]) -> str:
    """What the user said last."""
    return next((_text_of(message) for message in reversed(messages) if message.get("role") == "user"), "")


def _results(messages: list[dict[str, Any]]) -> list[str]:
    """The tool messages since the user spoke, oldest first."""
    results = []
    for message in reversed(messages):
        if message.get("role") == "user":
            break
        if message.get("role") == "tool":
            results.append(_text_of(message))
    return results[::-1]


def _text_of(message: dict[str, Any]) -> str:
    return message.get("content") or ""

"""What the user sees. Everything a server or a model wrote is made visible first: to a terminal, text is commands."""

import difflib
import json
from typing import Any, TextIO

from events_app.display import clipped, visible

STYLES = {"quiet": "2", "bold": "1", "good": "32", "bad": "31", "attention": "33", "agent": "1;36"}
SHOWN_LINES = 12
LINE_CHARS = 400
# What a call is about comes before its options.
FIRST = ("path", "command", "query", "mode")
DIFF_LINES = 30
# Comparing takes the square of it.
COMPARED_LINES = 2_000


class Screen:
    """Lines of the client's own stand at the left; text of a model has a bar before each of its lines, so that it can
    write whatever it wants without being taken for the client."""

    def __init__(self, out: TextIO, *, colours: bool) -> None:
        self._out = out
        self._colours = colours
        # What is shown of a text that is not whole yet, the number of its last piece, and whether a line of it is open.
        self._text: list[str] = []
        self._text_number = 0
        self._is_open = False

    def line(self, text: str = "", style: str = "") -> None:
        """One line of the client's own, whatever is in the text."""
        self._end_line()
        self._write(self._styled(visible(" ".join(text.split("\n"))), style) + "\n")

    def prompt(self, text: str) -> None:
        """What a line is about to be read for."""
        self._end_line()
        self._write(visible(text))

    def block(self, text: str, style: str = "quiet", *, limit: int | None = SHOWN_LINES) -> None:
        """Somebody else's text, apart from the client's lines."""
        self._end_line()
        lines = text.split("\n")
        shown = lines if limit is None or len(lines) <= limit + 1 else lines[:limit]
        for line in shown:
            text = visible(line) if limit is None or not line else clipped(line, LINE_CHARS)
            self._write(self._styled(f"    | {text}", style) + "\n")
        if len(shown) < len(lines):
            self._write(self._styled(f"    | … {len(lines) - len(shown):,} more lines", style) + "\n")

    def piece(self, agent: str, text: str, number: int) -> None:
        """A piece of what an agent says."""
        if not self._is_open:
            self._write(self._styled(visible(agent), "agent") + "\n│ ")
            self._is_open = True
        self._text.append(text)
        self._text_number = number
        self._write(visible(text).replace("\n", "\n│ "))

    def whole(self, agent: str, text: str, number: int) -> None:
        """The whole of what an agent said: what is not shown of it yet."""
        shown = "".join(self._text)
        if not text.startswith(shown):
            self.line("What is above is not what was said:", "attention")
            shown = ""
        if rest := text[len(shown) :]:
            self.piece(agent, rest, number)
        self.end()

    def void(self, after: int) -> None:
        """The server begins the unfinished answer again: what was shown of it past a number is void."""
        if self._text and self._text_number > after:
            self._text = []
            self.line(
                "[The text above is void: the server was interrupted, and begins this answer again.]", "attention"
            )
        else:
            self.line("[The server was interrupted, and goes on.]", "quiet")

    def end(self) -> None:
        """Nothing more comes of a text that is not whole."""
        self._end_line()
        self._text = []

    def call(self, agent: str, tool: str, arguments: dict[str, Any], *, limit: int | None = SHOWN_LINES) -> None:
        """What an agent asks for: short arguments in the line, the rest below it."""
        short, long = _parted(arguments)
        self.line(f"{agent} asks for {tool}{'  ' if short else ''}{'  '.join(short)}", "bold")
        for name, text in long:
            self.block(f"{name}:\n{text}", limit=limit)

    def changes(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """What an operator made of a call's arguments."""
        old, new = _lines_of(before), _lines_of(after)
        if len(old) + len(new) > COMPARED_LINES:
            self.line("    (too long to compare here)", "quiet")
            return
        # The first two lines name files.
        changed = list(difflib.unified_diff(old, new, n=1, lineterm=""))[2:]
        for line in changed[:DIFF_LINES]:
            self.block(line, {"+": "good", "-": "bad"}.get(line[:1], "quiet"))
        if len(changed) > DIFF_LINES:
            self.line(f"    | … {len(changed) - DIFF_LINES:,} more lines", "quiet")

    def _end_line(self) -> None:
        if self._is_open:
            self._is_open = False
            self._write("\n")

    def _styled(self, text: str, style: str) -> str:
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and self._colours else text

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def told(outcome: dict[str, Any]) -> str:
    """What became of a call, in one line."""
    if "error" in outcome:
        return clipped(f"Error: {outcome['error']}", 300)
    result = outcome["result"]
    match result:
        case {"lines_read": read, "total_lines": total}:
            return f"{read:,} of {total:,} lines"
        case {"bytes_written": written, "path": path, **more}:
            kept = f", what it held is in {more['backup_path']}" if "backup_path" in more else ""
            return f"{written:,} bytes are in {path}{kept}"
        case {"total_count": total}:
            return f"{total:,} entries"
        case {"created": created, "path": path}:
            return f"{path} was made" if created else f"{path} was there already"
        case {"total_matches": total, "truncated": truncated}:
            return f"{total:,} matches{' and more' if truncated else ''}"
        case {"exit_code": code, "stdout": output, "stderr": errors, **more}:
            how = more.get("timed_out", f"exit code {code}")
            return clipped(f"{how}  {' '.join((output or errors).split())}", 300)
        case _:
            return clipped(json.dumps(result, ensure_ascii=False), 300)


def _parted(arguments: dict[str, Any]) -> tuple[list[str], list[tuple[str, str]]]:
    short, long = [], []
    for name, value in sorted(arguments.items(), key=lambda item: (item[0] not in FIRST, item[0])):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if "\n" in text or len(text) > 80:
            long.append((name, text))
        else:
            short.append(f"{name}={text}")
    return short, long


def _lines_of(arguments: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in sorted(arguments.items()):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        first, *others = text.split("\n")
        lines += [f"{name}: {first}", *(f"  {line}" for line in others)]
    return lines

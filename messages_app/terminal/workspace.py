"""The tools that work on files: inside one directory and nowhere else.

A path is resolved first, and has to end inside; then it is walked from the directory's descriptor, name by name,
without following any link. So a link that somebody puts there in between leads to an error, and never out.
"""

import inspect
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Any

from agents_app.llm.base import clean
from messages_app.terminal.files import (
    DIRECTORY,
    Found,
    ToolError,
    file_at,
    keep_copy,
    new_file,
    opened,
    status_of,
    walk,
)

# What is read of a file in one piece, and what of it is told in one result: a model has to be able to read it.
MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_TOLD_BYTES = 128 * 1024
MAX_SEARCHED_BYTES = 2 * 1024 * 1024
MAX_ITEMS = 1_000
MAX_LINE_CHARS = 300
MAX_SECONDS = 20
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
LINES = re.compile(r"[^\n]*\n|[^\n]+")


class Workspace:
    """One directory. Every method but `run` is a tool, and returns what the model reads as its result."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError for what is no directory, or cannot be opened."""
        self.root = Path(os.path.realpath(directory, strict=True))
        self._root = os.open(self.root, DIRECTORY)

    def close(self) -> None:
        os.close(self._root)

    def run(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Use a tool by its name. Raises ToolError."""
        method = TOOLS.get(tool)
        if method is None:
            raise ToolError(f"This client has no tool {tool}. It has {', '.join(TOOLS)} and execute_command.")
        check_arguments(method, arguments)
        try:
            # What writes is not interrupted: it would have happened, and be told as if it had not.
            with time_limit(MAX_SECONDS) if tool in READING else nullcontext():
                return method(self, **arguments)
        except OSError as error:
            raise ToolError(f"{arguments.get('path', '.')}: {error.strerror or 'cannot be used'}") from None
        except RecursionError:
            raise ToolError("This is nested too deep.") from None

    # --- tools ---

    def read_file(
        self, *, path: str, encoding: str = "utf-8", start_line: int = 1, end_line: int | None = None
    ) -> dict[str, Any]:
        data = self._bytes_of(path)
        try:
            text = data.decode(encoding)
        except (LookupError, ValueError) as error:
            raise ToolError(f"{path} is no text in {encoding}: {_first_line(error)}") from None
        _ensure_text(text, path)
        lines = LINES.findall(text)
        if start_line > max(len(lines), 1):
            raise ToolError(f"{path} has only {len(lines):,} lines.")
        if end_line is not None and end_line < start_line:
            raise ToolError("end_line is before start_line.")
        wanted = lines[start_line - 1 : end_line]
        told = _fitting(wanted)
        result = {
            "success": True,
            "content": "".join(told),
            "lines_read": len(told),
            "total_lines": len(lines),
        }
        left_out = len("".join(wanted).encode()) - len("".join(told).encode())
        if left_out:
            result["left_out"] = (
                f"The last {left_out:,} bytes of what was asked for are left out. "
                f"Read on from start_line {start_line + len(told)}."
            )
        return result

    def write_file(
        self, *, path: str, content: str, encoding: str = "utf-8", create_dirs: bool = False, backup: bool = True
    ) -> dict[str, Any]:
        try:
            data = content.encode(encoding)
        except (LookupError, ValueError) as error:
            raise ToolError(f"The content cannot be written in {encoding}: {_first_line(error)}") from None
        parts = self._parts_of_file(path)
        with self._folder(parts[:-1], create=create_dirs) as folder:
            before = file_at(folder, parts[-1], path)
            result: dict[str, Any] = {"success": True, "path": "/".join(parts), "bytes_written": len(data)}
            if before is not None and not os.access(parts[-1], os.W_OK, dir_fd=folder):
                raise ToolError(f"{path} may not be written.")
            if before is not None and backup:
                kept = keep_copy(folder, parts[-1], path)
                result["backup_path"] = "/".join([*parts[:-1], kept])
            # Without setuid and the like, as the kernel drops them from a file that is written to.
            mode = None if before is None else stat.S_IMODE(before.st_mode) & 0o777
            with new_file(folder, data, mode) as made:
                os.replace(made, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        return result

    def list_files(
        self, *, path: str, recursive: bool = False, include_hidden: bool = False, pattern: str = "*"
    ) -> dict[str, Any]:
        parts = self._parts(path)
        items: list[dict[str, Any]] = []
        total = size = 0
        with self._folder(parts) as folder:
            for found in walk(folder, "/".join(parts), hidden=include_hidden, deep=recursive):
                if fnmatchcase(found.entry.name, pattern):
                    total += 1
                    size += len(found.path)
                    if total <= MAX_ITEMS and size <= MAX_TOLD_BYTES:
                        items.append(_item(found))
        result = {"success": True, "path": "/".join(parts) or ".", "items": items, "total_count": total}
        if left_out := total - len(items):
            result["left_out"] = f"{left_out:,} more are left out. List a directory below, or use pattern."
        return result

    def create_directory(self, *, path: str, recursive: bool = True) -> dict[str, Any]:
        parts = self._parts(path)
        existed = True
        if parts:
            with self._folder(parts[:-1], create=recursive) as folder:
                try:
                    os.mkdir(parts[-1], dir_fd=folder)
                    existed = False
                except FileExistsError:
                    # Opened, because what is there may be something else.
                    os.close(os.open(parts[-1], DIRECTORY, dir_fd=folder))
        return {"success": True, "path": "/".join(parts) or ".", "created": not existed, "already_exists": existed}

    def search_in_code(
        self,
        *,
        query: str,
        path: str = ".",
        file_pattern: str = "*",
        case_sensitive: bool = False,
        regex: bool = False,
        max_results: int = 100,
    ) -> dict[str, Any]:
        try:
            wanted = re.compile(query if regex else re.escape(query), 0 if case_sensitive else re.IGNORECASE)
        except (re.error, OverflowError) as error:
            raise ToolError(f"The regular expression cannot be used: {error}") from None
        matches: list[dict[str, Any]] = []
        size = skipped = 0
        truncated = False
        for name, text in self._texts(path, file_pattern):
            if text is None:
                skipped += 1
                continue
            for number, line in enumerate(text.split("\n"), start=1):
                if not wanted.search(line):
                    continue
                match = {"path": name, "line": number, "text": _clipped(line.strip())}
                size += len(str(match).encode("utf-8", "replace"))
                truncated = len(matches) == max_results or size > MAX_TOLD_BYTES
                if truncated:
                    break
                matches.append(match)
            if truncated:
                break
        result = {"query": query, "matches": matches, "total_matches": len(matches), "truncated": truncated}
        if truncated:
            result["left_out"] = "There are more matches. Search for something rarer, or in fewer files."
        if skipped:
            result["not_searched"] = f"{skipped:,} files: no text in UTF-8, not readable or larger than 2 MiB"
        return result

    # --- finding the way ---

    def directory(self, path: str) -> Path:
        """The real path of a directory inside. Raises ToolError."""
        parts = self._parts(path)
        try:
            with self._folder(parts):
                return self.root.joinpath(*parts)
        except OSError as error:
            raise ToolError(f"{path}: {error.strerror}") from None

    def _parts(self, path: str) -> list[str]:
        """The names that lead from the root to a path, links resolved. Raises ToolError for a path that leads out."""
        if not path or CONTROLS.search(path) or "\\" in path or path.startswith("~"):
            raise ToolError("A path is names with / between them, without control characters, backslashes or ~.")
        if ".." in path.split("/"):
            raise ToolError(f"{path} has '..' in it. Name paths from the workspace down.")
        try:
            real = os.path.realpath(self.root / path)
            return list(Path(real).relative_to(self.root).parts)
        except (ValueError, RecursionError):
            raise ToolError(f"{path} leads out of the workspace.") from None

    def _parts_of_file(self, path: str) -> list[str]:
        parts = self._parts(path)
        if not parts or path.endswith("/"):
            raise ToolError(f"{path} is a directory.")
        return parts

    @contextmanager
    def _folder(self, parts: list[str], *, create: bool = False) -> Iterator[int]:
        """The descriptor of a directory, reached without following links."""
        folder = os.dup(self._root)
        try:
            for part in parts:
                try:
                    below = os.open(part, DIRECTORY, dir_fd=folder)
                except FileNotFoundError:
                    if not create:
                        raise ToolError(f"The directory {'/'.join(parts)} does not exist.") from None
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=folder)
                    below = os.open(part, DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = below
            yield folder
        finally:
            os.close(folder)

    def _bytes_of(self, path: str) -> bytes:
        parts = self._parts_of_file(path)
        with self._folder(parts[:-1]) as folder:
            if file_at(folder, parts[-1], path) is None:
                raise ToolError(f"{path} does not exist.")
            with opened(folder, parts[-1], path) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ToolError(f"{path} has more than {MAX_FILE_BYTES:,} bytes. Have a command print a part of it.")
        return data

    def _texts(self, path: str, file_pattern: str) -> Iterator[tuple[str, str | None]]:
        """The files to be searched, by their paths; no text for one that cannot be."""
        parts = self._parts(path)
        if parts:
            with self._folder(parts[:-1]) as folder:
                found = status_of(folder, parts[-1])
            if found is not None and stat.S_ISREG(found.st_mode):
                yield "/".join(parts), clean(self._bytes_of(path).decode("utf-8", "replace"))
                return
        with self._folder(parts) as folder:
            for found_file in walk(folder, "/".join(parts), hidden=False, deep=True):
                entry = found_file.entry
                if entry.is_file(follow_symlinks=False) and fnmatchcase(entry.name, file_pattern):
                    yield found_file.path, _searched(found_file)


TOOLS: dict[str, Callable[..., dict[str, Any]]] = {
    "read_file": Workspace.read_file,
    "write_file": Workspace.write_file,
    "list_files": Workspace.list_files,
    "create_directory": Workspace.create_directory,
    "search_in_code": Workspace.search_in_code,
}
# They change nothing: to execute one twice is to execute it once.
READING = frozenset({"read_file", "list_files", "search_in_code"})


def check_arguments(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Raises ToolError for arguments that a tool does not take: to pass over one is to do something else than was
    asked for, and the server's schema of a tool is edited by people."""
    known = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY
    }
    for name, value in arguments.items():
        if name not in known:
            raise ToolError(f"This client's {function.__name__} takes no {name}. It takes {', '.join(known)}.")
        kind = known[name].annotation
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ToolError(f"{name} is of the wrong type.")
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ToolError(f"{name} has to be at least 1.")
    missing = [name for name, one in known.items() if one.default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise ToolError(f"{function.__name__} needs {', '.join(missing)}.")


class TimeUp(BaseException):
    """No Exception: whoever passes over a file that cannot be read must not pass over this."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ToolError for whatever takes longer: a regular expression may take for ever, a tree may be endless."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TimeUp:
        raise ToolError(
            f"This took longer than {seconds:g} seconds. Look in fewer files, or for something simpler."
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _item(found: Found) -> dict[str, Any]:
    # A name that is no UTF-8 cannot be sent as it is.
    item: dict[str, Any] = {"path": clean(os.fsencode(found.path).decode("utf-8", "replace"))}
    if found.entry.is_symlink():
        return {**item, "type": "link"}
    if found.entry.is_dir(follow_symlinks=False):
        return {**item, "type": "directory"}
    if not found.entry.is_file(follow_symlinks=False):
        return {**item, "type": "other"}
    with suppress(OSError):
        item["size"] = found.entry.stat(follow_symlinks=False).st_size
    return {**item, "type": "file"}


def _searched(found: Found) -> str | None:
    try:
        with opened(found.folder, found.entry.name, found.path) as file:
            data = file.read(MAX_SEARCHED_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError, ToolError):
        return None
    return None if len(data) > MAX_SEARCHED_BYTES or "\0" in text else text


def _fitting(lines: list[str]) -> list[str]:
    """As many of the first lines as a result may hold; of a single one that is longer, its beginning."""
    size = 0
    told: list[str] = []
    for line in lines:
        size += len(line.encode())
        if size > MAX_TOLD_BYTES:
            return told or [line.encode()[:MAX_TOLD_BYTES].decode(errors="ignore")]
        told.append(line)
    return told


def _ensure_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ToolError(f"{path} has halves of characters, which cannot be sent.") from None
    if "\0" in text:
        raise ToolError(f"{path} is no text: it has NUL characters.")


def _clipped(line: str) -> str:
    return line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]}… {len(line) - MAX_LINE_CHARS:,} more"


def _first_line(error: Exception) -> str:
    return clean(str(error)).partition("\n")[0][:200]

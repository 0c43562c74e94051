"""The terminal client's tools on files, and its journal: what they do, and that nothing leads out of the directory."""

import asyncio
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from messages_app.terminal import workspace as limits
from messages_app.terminal.commands import execute_command
from messages_app.terminal.files import ToolError
from messages_app.terminal.journal import InUse, Journal
from messages_app.terminal.workspace import Workspace

SECRET = "not for agents"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture
def root(tmp_path: Path, outside: Path) -> Path:
    """A workspace with everything in it that might lead out."""
    folder = tmp_path / "inside"
    (folder / "src").mkdir(parents=True)
    (folder / "a.md").write_text("one\ntwo\nthree\n")
    (folder / "src" / "app.py").write_text("print('Hello')\n")
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "twice").symlink_to("linked")
    (folder / "up").symlink_to("..")
    (folder / "src" / "up2").symlink_to("../../outside")
    (folder / "loop").symlink_to("loop")
    (folder / "to_null").symlink_to("/dev/null")
    (folder / "dangling").symlink_to(outside / "new.txt")
    (folder / "inner").symlink_to("src")
    (folder / "inner.md").symlink_to("a.md")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture
def workspace(root: Path) -> Iterator[Workspace]:
    opened = Workspace(root)
    yield opened
    opened.close()


def refused(workspace: Workspace, tool: str, **arguments: Any) -> str:
    with pytest.raises(ToolError) as error:
        workspace.run(tool, arguments)
    return str(error.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- nothing leads out ---

ESCAPES = [
    "..",
    "../outside/secret.txt",
    "./../outside/secret.txt",
    "src/../../outside/secret.txt",
    "src/../a.md",
    "a.md/..",
    "{outside}/secret.txt",
    "{outside}",
    "/etc/passwd",
    "/",
    "//etc/passwd",
    "/dev/null",
    "/dev/zero",
    "/proc/self/environ",
    "~/.ssh/id_rsa",
    "~root",
    "link.txt",
    "linked",
    "linked/secret.txt",
    "linked/new/deep.txt",
    "twice/secret.txt",
    "up",
    "up/outside/secret.txt",
    "inner/up2/secret.txt",
    "src/up2/secret.txt",
    "to_null",
    "dangling",
    "..\\outside\\secret.txt",
    "a\0.md",
    "a\n.md",
    "a\x1b[2J.md",
    "a\x85.md",
    "\ud83d.md",
    "",
]


@pytest.mark.parametrize("tool", ["read_file", "write_file", "list_files", "create_directory", "search_in_code"])
@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leads_out(workspace: Workspace, outside: Path, root: Path, tool: str, path: str) -> None:
    before = contents(outside), contents(root)
    needed: dict[str, dict[str, Any]] = {
        "write_file": {"content": "mine", "create_dirs": True},
        "search_in_code": {"query": "agents"},
    }

    message = refused(workspace, tool, path=path.format(outside=outside), **needed.get(tool, {}))

    assert re.search(r"leads out|'\.\.' in it|control characters", message) and SECRET not in message
    assert (contents(outside), contents(root)) == before
    assert [path.name for path in outside.iterdir()] == ["secret.txt"]


ODD = [
    ("read_file", "loop", {}, "symbolic links|link in the meantime|Not a directory"),
    ("read_file", "pipe", {}, "no regular file"),
    ("write_file", "pipe", {"content": "x"}, "no regular file"),
    ("search_in_code", "pipe", {"query": "x"}, "Not a directory"),
    ("list_files", "pipe", {}, "Not a directory"),
    ("read_file", "src", {}, "is a directory"),
    ("read_file", ".", {}, "is a directory"),
    ("write_file", "src", {"content": "x"}, "is a directory"),
    ("write_file", "src/", {"content": "x"}, "is a directory"),
    ("write_file", "new/", {"content": "x"}, "is a directory"),
    ("read_file", "none.md", {}, "does not exist"),
    ("read_file", "none/none.md", {}, "does not exist"),
    ("write_file", "none/b.md", {"content": "x"}, "does not exist"),
    ("read_file", "a.md/b.md", {}, "Not a directory"),
    ("write_file", "a.md/b.md", {"content": "x", "create_dirs": True}, "Not a directory"),
    ("create_directory", "a.md", {}, "Not a directory"),
    ("create_directory", "none/below", {"recursive": False}, "does not exist"),
    ("read_file", "x" * 300, {}, "too long"),
    ("write_file", "x" * 300, {"content": "x"}, "too long"),
    ("read_file", "x/" * 3_000 + "a.md", {}, "does not exist|too long"),
]


@pytest.mark.parametrize(("tool", "path", "more", "why"), ODD)
def test_what_is_no_file_or_directory_is_refused(
    workspace: Workspace, root: Path, tool: str, path: str, more: dict[str, Any], why: str
) -> None:
    before = contents(root)

    message = refused(workspace, tool, path=path, **more)

    assert re.search(why, message), message
    assert contents(root) == before


def test_a_socket_and_a_device_are_no_files(workspace: Workspace, root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(root)  # its address may have a hundred characters
        try:
            bound.bind("socket")
        finally:
            os.chdir(here)

        assert "no regular file" in refused(workspace, "read_file", path="socket")
        assert "no regular file" in refused(workspace, "write_file", path="socket", content="x")


@pytest.mark.parametrize("tool", ["read_file", "write_file", "create_directory"])
def test_a_link_that_is_put_there_after_the_look_leads_nowhere(
    workspace: Workspace, root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    real = os.path.realpath

    def look_then_swap(path: Any, **how: Any) -> str:
        found = real(path, **how)
        (root / "src").rename(root / "moved")
        (root / "src").symlink_to(outside)
        return found

    monkeypatch.setattr(os.path, "realpath", look_then_swap)
    more = {"write_file": {"content": "mine"}}.get(tool, {})
    message = refused(workspace, tool, path="src/secret.txt", **more)

    assert "Not a directory" in message or "symbolic links" in message
    assert contents(outside) == {"secret.txt": SECRET.encode()}


def test_a_file_that_becomes_a_link_after_the_look_is_not_read(
    workspace: Workspace, root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def look_then_swap(path: Any, **how: Any) -> os.stat_result:
        found = real(path, **how)
        if path == "a.md":
            (root / "a.md").unlink()
            (root / "a.md").symlink_to(outside / "secret.txt")
        return found

    monkeypatch.setattr(os, "stat", look_then_swap)
    message = refused(workspace, "read_file", path="a.md")

    assert "symbolic links" in message


def test_what_is_written_over_a_link_made_meanwhile_replaces_the_link(
    workspace: Workspace, root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def swap_then_replace(*paths: Any, **how: Any) -> None:
        (root / "a.md").unlink()
        (root / "a.md").symlink_to(outside / "secret.txt")
        real(*paths, **how)

    monkeypatch.setattr(os, "replace", swap_then_replace)
    workspace.run("write_file", {"path": "a.md", "content": "new", "backup": False})

    assert (root / "a.md").read_text() == "new" and not (root / "a.md").is_symlink()
    assert contents(outside) == {"secret.txt": SECRET.encode()}


def test_links_that_stay_inside_are_followed(workspace: Workspace, root: Path) -> None:
    assert workspace.run("read_file", {"path": "inner/app.py"})["content"] == "print('Hello')\n"

    workspace.run("write_file", {"path": "inner.md", "content": "new", "backup": False})

    assert (root / "inner.md").is_symlink() and (root / "a.md").read_text() == "new"


def test_an_absolute_path_inside_is_a_path(workspace: Workspace, root: Path) -> None:
    assert workspace.run("read_file", {"path": str(root / "a.md")})["lines_read"] == 3


def test_a_walk_follows_no_link_and_waits_for_no_pipe(workspace: Workspace) -> None:
    found = workspace.run("list_files", {"path": ".", "recursive": True})
    searched = workspace.run("search_in_code", {"query": "agents"})

    kinds = {item["path"]: item["type"] for item in found["items"]}
    assert kinds["linked"] == kinds["link.txt"] == kinds["loop"] == "link" and kinds["pipe"] == "other"
    assert not any(path.startswith(("linked/", "up/", "inner/")) for path in kinds)
    assert searched["matches"] == []


@pytest.mark.parametrize(
    ("tool", "arguments", "why"),
    [
        ("delete_file", {"path": "a.md"}, "has no tool delete_file"),
        ("run", {}, "has no tool run"),
        ("read_file", {}, "needs path"),
        ("read_file", {"path": 1}, "wrong type"),
        ("read_file", {"path": None}, "wrong type"),
        ("read_file", {"path": "a.md", "start_line": True}, "wrong type"),
        ("read_file", {"path": "a.md", "start_line": 0}, "at least 1"),
        ("write_file", {"path": "b.md", "content": "x", "backup": 1}, "wrong type"),
        ("write_file", {"path": "b.md", "content": "x", "dry_run": True}, "takes no dry_run"),
        ("write_file", {"path": "b.md", "content": "x", "self": 1}, "takes no self"),
    ],
)
def test_other_tools_and_arguments_are_refused(
    workspace: Workspace, root: Path, tool: str, arguments: dict[str, Any], why: str
) -> None:
    assert why in refused(workspace, tool, **arguments)
    assert not (root / "b.md").exists() and (root / "a.md").exists()


# --- reading ---


@pytest.mark.parametrize(
    ("arguments", "content"),
    [
        ({}, "one\ntwo\nthree\n"),
        ({"start_line": 2}, "two\nthree\n"),
        ({"end_line": 2}, "one\ntwo\n"),
        ({"start_line": 2, "end_line": 2}, "two\n"),
        ({"start_line": 3, "end_line": 99}, "three\n"),
    ],
)
def test_lines_of_a_file_are_read(workspace: Workspace, arguments: dict[str, Any], content: str) -> None:
    result = workspace.run("read_file", {"path": "a.md", **arguments})

    assert result["content"] == content and result["total_lines"] == 3 and result["lines_read"] == content.count("\n")
    assert "left_out" not in result


@pytest.mark.parametrize(
    ("arguments", "why"),
    [({"start_line": 4}, "has only 3 lines"), ({"start_line": 3, "end_line": 1}, "end_line is before start_line")],
)
def test_lines_that_are_not_there_are_an_error(workspace: Workspace, arguments: dict[str, Any], why: str) -> None:
    assert why in refused(workspace, "read_file", path="a.md", **arguments)


def test_line_ends_and_the_last_line_stay_as_they_are(workspace: Workspace, root: Path) -> None:
    (root / "odd.txt").write_bytes("a\r\nb\x0bc\u2028d".encode())
    (root / "empty.txt").write_bytes(b"")

    odd, empty = (workspace.run("read_file", {"path": name}) for name in ("odd.txt", "empty.txt"))

    assert (odd["content"], odd["lines_read"]) == ("a\r\nb\x0bc\u2028d", 2)
    assert (empty["content"], empty["lines_read"]) == ("", 0)


@pytest.mark.parametrize(
    ("data", "encoding", "why"),
    [
        (b"\xff\xfe\x00", "utf-8", "no text in utf-8"),
        (b"text\x00more", "utf-8", "NUL"),
        (b"caf\xe9", "utf-8", "no text in utf-8"),
        (b"x", "no-such-encoding", "unknown encoding"),
        (b"x", "hex", "no text in hex"),
        (b"\\ud83d", "unicode_escape", "halves of characters"),
    ],
)
def test_what_is_no_text_is_an_error(workspace: Workspace, root: Path, data: bytes, encoding: str, why: str) -> None:
    (root / "data").write_bytes(data)

    assert why in refused(workspace, "read_file", path="data", encoding=encoding)


def test_other_encodings_are_read_and_written(workspace: Workspace, root: Path) -> None:
    workspace.run("write_file", {"path": "latin.txt", "content": "café", "encoding": "latin-1"})

    assert (root / "latin.txt").read_bytes() == b"caf\xe9"
    assert workspace.run("read_file", {"path": "latin.txt", "encoding": "latin-1"})["content"] == "café"
    assert "cannot be written in ascii" in refused(
        workspace, "write_file", path="latin.txt", content="é", encoding="ascii"
    )


def test_a_long_file_is_read_in_parts_that_say_how_to_go_on(workspace: Workspace, root: Path) -> None:
    lines = [f"line {number} {'x' * 90}\n" for number in range(1, 5_001)]
    (root / "long.txt").write_text("".join(lines))

    read, start, parts = "", 1, 0
    while read != "".join(lines):
        result = workspace.run("read_file", {"path": "long.txt", "start_line": start})
        read, start, parts = read + result["content"], start + result["lines_read"], parts + 1
        assert len(result["content"]) <= limits.MAX_TOLD_BYTES
        assert ("left_out" in result) == (read != "".join(lines))
        assert "left_out" not in result or f"start_line {start}" in result["left_out"]
    assert parts == 4


def test_a_single_line_that_is_too_long_is_cut(workspace: Workspace, root: Path) -> None:
    (root / "line.txt").write_text("ä" * 200_000)

    result = workspace.run("read_file", {"path": "line.txt"})

    assert result["content"] == "ä" * (limits.MAX_TOLD_BYTES // 2)
    assert f"{400_000 - limits.MAX_TOLD_BYTES:,} bytes" in result["left_out"]


def test_a_huge_file_is_refused(workspace: Workspace, root: Path) -> None:
    with (root / "huge").open("wb") as file:
        file.truncate(10**12)

    assert "more than" in refused(workspace, "read_file", path="huge")


# --- writing ---


def test_a_file_is_replaced_whole_with_its_mode_and_a_copy_of_what_was_there(workspace: Workspace, root: Path) -> None:
    (root / "a.md").chmod(0o640)
    seen = os.open(root / "a.md", os.O_RDONLY)

    first = workspace.run("write_file", {"path": "a.md", "content": "new\n"})
    second = workspace.run("write_file", {"path": "a.md", "content": "newer\n"})

    assert (root / "a.md").read_text() == "newer\n"
    assert os.read(seen, 100) == b"one\ntwo\nthree\n", "whoever has the old file open keeps it whole"
    os.close(seen)
    assert [first["backup_path"], second["backup_path"]] == ["a.md.bak", "a.md.bak1"]
    assert (root / "a.md.bak").read_text() == "one\ntwo\nthree\n" and (root / "a.md.bak1").read_text() == "new\n"
    assert {stat.S_IMODE((root / name).stat().st_mode) for name in ("a.md", "a.md.bak", "a.md.bak1")} == {0o640}
    assert first["bytes_written"] == 4 and not list(root.glob(".countersign-*"))


def test_no_copy_is_kept_where_none_is_wanted_or_nothing_was_there(workspace: Workspace, root: Path) -> None:
    made = workspace.run("write_file", {"path": "new.md", "content": "x"})
    replaced = workspace.run("write_file", {"path": "a.md", "content": "x", "backup": False})

    assert "backup_path" not in made | replaced and not list(root.glob("*.bak"))


def test_missing_directories_are_made_when_asked_for(workspace: Workspace, root: Path) -> None:
    workspace.run("write_file", {"path": "deep/er/b.md", "content": "x", "create_dirs": True})

    assert (root / "deep/er/b.md").read_text() == "x"


def test_a_file_that_cannot_be_written_is_left_as_it_was(
    workspace: Workspace, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = refused(workspace, "write_file", path="a.md", content="new", backup=False)

    assert message == "a.md: No space left on device"
    assert (root / "a.md").read_text() == "one\ntwo\nthree\n" and not list(root.glob(".countersign-*"))


def test_setuid_does_not_survive_new_content(workspace: Workspace, root: Path) -> None:
    (root / "a.md").chmod(0o4755)

    workspace.run("write_file", {"path": "a.md", "content": "x"})

    assert stat.S_IMODE((root / "a.md").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("arguments", "created"),
    [({"path": "new"}, True), ({"path": "x/y/z"}, True), ({"path": "src"}, False), ({"path": "."}, False)],
)
def test_a_directory_is_made_or_was_there(
    workspace: Workspace, root: Path, arguments: dict[str, Any], created: bool
) -> None:
    result = workspace.run("create_directory", arguments)

    assert (root / arguments["path"]).is_dir()
    assert (result["created"], result["already_exists"]) == (created, not created)


# --- listing and searching ---


@pytest.fixture
def tree(root: Path) -> Path:
    for name in ("src/deep/b.py", "src/deep/c.txt", ".hidden/d.py", ".env", "src/.e.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("Find me\nand FIND ME, too\n")
    return root


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        ({"path": "src"}, ["src/app.py", "src/deep", "src/up2"]),
        ({"path": "src", "recursive": True}, ["src/app.py", "src/deep", "src/deep/b.py", "src/deep/c.txt", "src/up2"]),
        ({"path": "src", "recursive": True, "pattern": "*.py"}, ["src/app.py", "src/deep/b.py"]),
        ({"path": "src", "include_hidden": True, "pattern": "*.py"}, ["src/.e.py", "src/app.py"]),
        ({"path": ".", "recursive": True, "pattern": "d.py"}, []),
        ({"path": ".", "recursive": True, "pattern": "d.py", "include_hidden": True}, [".hidden/d.py"]),
    ],
)
def test_a_directory_is_listed(workspace: Workspace, tree: Path, arguments: dict[str, Any], paths: list[str]) -> None:
    result = workspace.run("list_files", arguments)

    assert [item["path"] for item in result["items"]] == paths and result["total_count"] == len(paths)


def test_a_long_list_says_what_is_left_out(workspace: Workspace, root: Path) -> None:
    (root / "many").mkdir()
    for number in range(limits.MAX_ITEMS + 5):
        (root / "many" / f"{number}.txt").touch()
    (root / "many" / os.fsdecode(b"caf\xe9")).touch()

    result = workspace.run("list_files", {"path": "many"})

    assert len(result["items"]) == limits.MAX_ITEMS and result["total_count"] == limits.MAX_ITEMS + 6
    assert result["left_out"].startswith("6 more")
    assert workspace.run("list_files", {"path": "many", "pattern": "caf*"})["items"][0]["path"] == "many/caf\ufffd"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (
            {"query": "find me"},
            [("src/deep/b.py", 1), ("src/deep/b.py", 2), ("src/deep/c.txt", 1), ("src/deep/c.txt", 2)],
        ),
        ({"query": "find me", "case_sensitive": True}, []),
        ({"query": "Find me", "case_sensitive": True, "path": "src/deep/c.txt"}, [("src/deep/c.txt", 1)]),
        ({"query": "^and.*too$", "regex": True, "file_pattern": "*.py"}, [("src/deep/b.py", 2)]),
        ({"query": "^and.*too$"}, []),
        ({"query": "find", "path": ".hidden", "max_results": 1}, [(".hidden/d.py", 1)]),
    ],
)
def test_files_are_searched(
    workspace: Workspace, tree: Path, arguments: dict[str, Any], found: list[tuple[str, int]]
) -> None:
    result = workspace.run("search_in_code", arguments)

    assert [(match["path"], match["line"]) for match in result["matches"]] == found
    assert result["truncated"] == ("max_results" in arguments)


def test_a_search_is_bounded(workspace: Workspace, root: Path) -> None:
    (root / "long.txt").write_text(f"{'x' * 10_000}\n" * 150)
    (root / "binary").write_bytes(b"x\0x")
    (root / "large").write_bytes(b"x\n" * limits.MAX_SEARCHED_BYTES)

    result = workspace.run("search_in_code", {"query": "x", "max_results": 1_000, "file_pattern": "*[tye]"})
    default = workspace.run("search_in_code", {"query": "x", "path": "long.txt"})

    assert len(result["matches"]) == 150 and not result["truncated"]
    assert result["matches"][0]["text"] == f"{'x' * 300}… 9,700 more"
    assert result["not_searched"].startswith("2 files")
    assert len(default["matches"]) == 100 and default["truncated"] and "more matches" in default["left_out"]


def test_a_regular_expression_that_takes_for_ever_is_stopped(
    workspace: Workspace, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.2)
    (root / "evil.txt").write_text("a" * 40 + "!")
    started = time.monotonic()

    message = refused(workspace, "search_in_code", query="(a+)+$", regex=True)

    assert "took longer" in message and time.monotonic() - started < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert "cannot be used" in refused(workspace, "search_in_code", query="(", regex=True)


# --- commands ---


def execute(folder: Path, command: str, *, by_shell: bool = False, timeout: int = 60) -> dict[str, Any]:
    return asyncio.run(execute_command(folder, command=command, shell=by_shell, timeout=timeout))


def test_a_command_is_run_without_a_shell_or_with_one(root: Path) -> None:
    plain = execute(root, "echo '$HOME' ; ls")
    shell = execute(root, "echo out; echo err >&2; exit 3", by_shell=True)

    assert plain == {"exit_code": 0, "stdout": "$HOME ; ls\n", "stderr": ""}
    assert shell == {"exit_code": 3, "stdout": "out\n", "stderr": "err\n"}


def test_a_command_has_its_directory_no_input_and_none_of_our_secrets(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNAL_API_KEY", "the-key")
    monkeypatch.setenv("MINE", "kept")

    result = execute(root / "src", 'pwd; cat; echo "$MINE,$INTERNAL_API_KEY,$SECRET_KEY"', by_shell=True)

    assert result["stdout"] == f"{root / 'src'}\nkept,,\n"


@pytest.mark.parametrize("steps", range(1, 11))
def test_a_command_that_is_cancelled_at_any_moment_is_killed_with_its_children(root: Path, steps: int) -> None:
    async def cancelled() -> None:
        running = asyncio.create_task(execute_command(root, command="sleep 300; true", shell=True))  # noqa: S604 (ours)
        for _ in range(steps):
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            # A child that is left holds the pipes, and asyncio waits for it.
            async with asyncio.timeout(10):
                await running

    asyncio.run(cancelled())


@pytest.mark.parametrize(
    ("command", "why"),
    [("none-such", "No such file"), ("echo 'open", "parted"), ("   ", "empty"), ("./a.md", "Permission denied")],
)
def test_a_command_that_cannot_be_started_is_an_error(root: Path, command: str, why: str) -> None:
    with pytest.raises(ToolError, match=why):
        execute(root, command)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_command_that_takes_too_long_is_killed_with_all_it_started(root: Path) -> None:
    started = time.monotonic()

    result = execute(root, "sleep 60 & echo $!; trap '' TERM; sleep 60", by_shell=True, timeout=1)

    assert result["exit_code"] == -signal.SIGKILL and "killed after 1 seconds" in result["timed_out"]
    assert not is_running(int(result["stdout"])) and time.monotonic() - started < 10


def test_long_output_keeps_its_beginning_and_its_end(root: Path) -> None:
    result = execute(root, "seq 100000")

    output = result["stdout"]
    assert output.startswith("1\n2\n3\n") and output.endswith("99999\n100000\n") and len(output) < 70_000
    assert f"{588_895 - 64 * 1024:,} bytes are left out" in output


def test_output_that_is_no_text_can_be_sent(root: Path) -> None:
    assert execute(root, r"printf 'a\377\000b'", by_shell=True)["stdout"] == "a\ufffd\ufffdb"


# --- the journal ---


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "countersign"


def journal(workspace: str = "/work", session_id: str = "s") -> Journal:
    return Journal.of("http://localhost", session_id, Path(workspace))


def test_a_journal_knows_what_a_client_before_it_did(state: Path) -> None:
    first = journal()
    assert not first.is_known
    first.settle(set())
    first.begin("call_cut")
    first.begin("call_done")
    first.end("call_done", {"result": "done"})
    first.close()

    second = journal()

    assert second.is_known and second.outcomes == {"call_done": {"result": "done"}}
    assert second.was_cut("call_cut") and not second.was_cut("call_done") and not second.was_cut("call_new")
    second.close()


def test_a_journal_is_emptied_once_everything_is_reported(state: Path) -> None:
    first = journal()
    for call_id in ("call_1", "call_2"):
        first.begin(call_id)
        first.end(call_id, {"result": "x" * 10_000})
    first.forget("call_1")
    first.forget("call_2")
    first.close()

    [file] = state.iterdir()
    assert file.stat().st_size < 100 and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    second = journal()
    assert second.is_known and second.outcomes == {}
    second.close()


def test_a_line_that_was_cut_spoils_no_other(state: Path) -> None:
    first = journal()
    first.settle(set())
    first.begin("call_1")
    first.close()
    [file] = state.iterdir()
    with file.open("ab") as cut:
        cut.write(b'{"ended": "call_1", "outc')

    second = journal()
    second.begin("call_2")
    second.close()
    third = journal()

    assert third.was_cut("call_1") and third.was_cut("call_2") and third.is_known
    third.close()


def test_a_session_has_one_client_at_a_time_on_a_machine(state: Path) -> None:
    first, other = journal(), journal(session_id="other")

    with pytest.raises(InUse):
        journal()

    for one in (first, other):
        one.close()
    journal().close()


def test_a_journal_of_another_directory_is_not_known(state: Path) -> None:
    here = journal("/work")
    here.settle(set())
    here.close()

    # However often it is opened before somebody has looked at what is open, and afterwards for those calls.
    for _ in range(2):
        moved = journal("/elsewhere")
        assert not moved.is_known
        moved.close()
    moved = journal("/elsewhere")
    moved.settle({"call_1", "call_2"})
    moved.forget("call_1")
    moved.close()
    again = journal("/elsewhere")
    assert again.is_known and again.strange == {"call_2"}
    again.close()

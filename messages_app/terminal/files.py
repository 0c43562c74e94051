"""Files below an open directory, by descriptors: no path is walked twice, and no link is followed."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

MAX_DEPTH = 64
MAX_BACKUPS = 1_000
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK a pipe that nobody writes to would be waited for.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class ToolError(Exception):
    """What the model reads in place of a result."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a walk comes by: an entry of an open folder, and its path in the workspace."""

    entry: os.DirEntry[str]
    folder: int
    path: str


def status_of(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def file_at(folder: int, name: str, path: str) -> os.stat_result | None:
    """The file of that name, None if there is none. Raises ToolError for anything else."""
    found = status_of(folder, name)
    if found is not None:
        _ensure_file(found, path)
    return found


def _ensure_file(found: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise ToolError(f"{path} is a directory.")
    if stat.S_ISLNK(found.st_mode):
        raise ToolError(f"{path} has become a link in the meantime.")
    if not stat.S_ISREG(found.st_mode):
        raise ToolError(f"{path} is no regular file, but a device, a pipe or a socket.")


@contextmanager
def opened(folder: int, name: str, path: str) -> Iterator[BinaryIO]:
    with os.fdopen(os.open(name, READ, dir_fd=folder), "rb") as file:
        # Again, on what was opened: it may be another one than the one looked at.
        _ensure_file(os.fstat(file.fileno()), path)
        yield file


@contextmanager
def new_file(folder: int, data: bytes, mode: int | None) -> Iterator[str]:
    """A finished file under a name of its own, which is gone at the end unless it was given another."""
    name = f".countersign-{secrets.token_hex(8)}"
    try:
        with os.fdopen(os.open(name, CREATE, 0o666, dir_fd=folder), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def keep_copy(folder: int, name: str, path: str) -> str:
    """Copy a file beside itself, under a name that nothing has, and return that name."""
    with opened(folder, name, path) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o777
        for number in range(MAX_BACKUPS):
            kept = f"{name}.bak{number or ''}"
            try:
                descriptor = os.open(kept, CREATE, mode, dir_fd=folder)
            except FileExistsError:
                continue
            with os.fdopen(descriptor, "wb") as copy:
                os.fchmod(descriptor, mode)
                shutil.copyfileobj(file, copy)
                copy.flush()
                os.fsync(descriptor)
            return kept
    raise ToolError(f"{path} has {MAX_BACKUPS:,} copies already. Remove some.")


def walk(folder: int, path: str, *, hidden: bool, deep: bool, depth: int = 1) -> Iterator[Found]:
    """What lies in an open folder and, if `deep`, below it, by name; what may not be read is passed over."""
    with os.scandir(folder) as entries:
        inside = sorted((entry for entry in entries if hidden or not entry.name.startswith(".")), key=lambda e: e.name)
    for entry in inside:
        below = f"{path}/{entry.name}" if path else entry.name
        yield Found(entry, folder, below)
        if deep and depth < MAX_DEPTH and entry.is_dir(follow_symlinks=False):
            try:
                descriptor = os.open(entry.name, DIRECTORY, dir_fd=folder)
            except OSError:
                continue
            try:
                yield from walk(descriptor, below, hidden=hidden, deep=deep, depth=depth + 1)
            finally:
                os.close(descriptor)

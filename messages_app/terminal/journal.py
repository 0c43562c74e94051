"""What this client has executed of a session, on disk, so that no call is executed twice by a client that died."""

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

Outcome = dict[str, Any]  # {"result": ...} or {"error": ...}, as it is sent


class InUse(Exception):
    """Another client works on this session."""


class Journal:
    """One file for each session, held as long as the client runs.

    Each line is flushed to the disk before what it announces is done. Once the server has every outcome, the file is as
    good as empty again.
    """

    def __init__(self, file: int, workspace: Path) -> None:
        """Takes over a descriptor that is locked."""
        self._file = file
        self._begun: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}
        self._workspace = str(workspace)
        # Calls that were asked for when another directory was the workspace, or none that is known.
        self.strange: set[str] = set()
        told_workspace = None
        for line in self._lines():
            told_workspace = line.get("workspace", told_workspace)
            self._take(line)
        # Whether it was this directory that the session's open calls were asked for.
        self.is_known = told_workspace == self._workspace

    @classmethod
    def of(cls, server: str, session_id: str, workspace: Path) -> Self:
        """Raises InUse, and OSError where there is no place for it."""
        folder = state_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = hashlib.sha256(f"{server}\n{session_id}".encode()).hexdigest()[:32]
        file = os.open(folder / f"{name}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise InUse(f"Another terminal works on session {session_id}.") from None
        return cls(file, workspace)

    def close(self) -> None:
        os.close(self._file)

    def settle(self, found: set[str]) -> None:
        """From now on calls are asked for this directory; those `found` open before were not, unless it was known."""
        if not self.is_known:
            self.strange |= found
            self._tell_workspace()
            self.is_known = True

    def begin(self, call_id: str) -> None:
        """Said before a call is executed. Raises OSError: then it must not be."""
        self._append({"begun": call_id})
        self._begun.add(call_id)

    def end(self, call_id: str, outcome: Outcome) -> None:
        self._outcomes[call_id] = outcome
        self._append({"ended": call_id, "outcome": outcome})

    def forget(self, call_id: str) -> None:
        """The server has the outcome, or wants none any more."""
        self._outcomes.pop(call_id, None)
        self._begun.discard(call_id)
        self.strange.discard(call_id)
        if not self._begun and not self._outcomes:
            os.ftruncate(self._file, 0)
            self._tell_workspace()

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """Those that the server perhaps does not have yet, by their calls."""
        return dict(self._outcomes)

    def was_cut(self, call_id: str) -> bool:
        """Whether it was begun and never ended."""
        return call_id in self._begun and call_id not in self._outcomes

    def _tell_workspace(self) -> None:
        for call_id in self.strange:
            self._append({"strange": call_id})
        self._append({"workspace": self._workspace})

    def _append(self, line: dict[str, Any]) -> None:
        # On a line of its own, also after one in the middle of which a client died.
        text = b"\n" + json.dumps(line).encode() + b"\n"
        if os.write(self._file, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file)

    def _take(self, line: dict[str, Any]) -> None:
        match line:
            case {"begun": str(call_id)}:
                self._begun.add(call_id)
            case {"strange": str(call_id)}:
                self.strange.add(call_id)
            case {"ended": str(call_id), "outcome": dict(outcome)}:
                self._outcomes[call_id] = outcome

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        with os.fdopen(os.dup(self._file), "rb") as file:
            for line in file:
                try:
                    told = json.loads(line)
                except ValueError:
                    continue
                if isinstance(told, dict):
                    lines.append(told)
        return lines


def state_folder() -> Path:
    """Where programs of a user keep such things."""
    # No setting of the server, but of the user's desktop.
    home = os.environ.get("XDG_STATE_HOME", "")
    return Path(home if home.startswith("/") else Path.home() / ".local/state") / "countersign"

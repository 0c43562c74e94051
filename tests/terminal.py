"""The terminal client as a process of its own, on pipes or on a terminal; and a proxy between it and the server."""

import fcntl
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests import preloaded
from tests.server import KEY, ROOT, Server

PATIENCE = 20.0


class Chat:
    """`manage.py chat`, begun at once. It is given no database: it has the API alone."""

    def __init__(
        self,
        server: Server | str,
        workspace: Path,
        *options: str,
        state: Path | None = None,
        on_terminal: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._session_id = options[options.index("--session") + 1] if "--session" in options else None
        address = server if isinstance(server, str) else server.url
        everything = {
            "PATH": os.environ["PATH"],
            "HOME": str(workspace.parent),
            "XDG_STATE_HOME": str(state or workspace.parent / "state"),
            "TERM": "xterm",
            "SECRET_KEY": "s" * 50,
            "INTERNAL_API_KEY": KEY,
            "DATABASE_URL": "sqlite:////nowhere/none.sqlite3",
            "SSL_CERT_FILE": os.devnull,
            **(environment or {}),
        }
        command = ["chat", "--workspace", str(workspace), "--server", address, *options]
        self._seen = ""
        self._expected = 0
        self._changed = threading.Condition()
        self._is_over = False
        if on_terminal:
            self._ours, theirs = pty.openpty()
            self.process: subprocess.Popen[bytes] | preloaded.Process = subprocess.Popen(
                [sys.executable, "manage.py", *command],
                cwd=ROOT,
                env=everything,
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
                # Its controlling terminal, or Ctrl-C would reach nobody.
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
            os.close(theirs)
            self._writes = self._ours
        else:
            its_input, self._writes = os.pipe()
            self._ours, its_output = os.pipe()
            self.process = preloaded.start("manage", *command, environment=everything, reads=its_input, out=its_output)
            os.close(its_input)
            os.close(its_output)
        self._open = {self._writes, self._ours}
        self._on_terminal = on_terminal
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        for number in self._open:
            os.close(number)

    @property
    def seen(self) -> str:
        """Everything that it has written."""
        return self._seen

    def say(self, line: str) -> None:
        os.write(self._writes, f"{line}\n".encode())

    def press(self, key: bytes) -> None:
        os.write(self._writes, key)

    def leave(self) -> int:
        """The end of the input, and how it ended then."""
        if self._on_terminal:
            self.press(b"\x04")
        else:
            self._open.remove(self._writes)
            os.close(self._writes)
        return self.end()

    def end(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def expect(self, text: str) -> str:
        """Wait until it writes this, after what was expected before; what it wrote up to then."""
        with self._changed:
            found = self._changed.wait_for(lambda: text in self._seen[self._expected :] or self._is_over, PATIENCE)
            assert found and text in self._seen[self._expected :], (
                f"{text!r} is not in {self._seen[self._expected :]!r}"
            )
            end = self._seen.index(text, self._expected) + len(text)
            passed, self._expected = self._seen[self._expected : end], end
            return passed

    @property
    def session_id(self) -> str:
        if self._session_id is None:
            with self._changed:
                assert self._changed.wait_for(lambda: "/help tells more." in self._seen, PATIENCE), self._seen
                self._session_id = self._seen.split("Session ")[1].split(",")[0]
        return self._session_id

    def _read(self) -> None:
        received = b""
        while True:
            try:
                piece = os.read(self._ours, 64 * 1024)
            except OSError:  # a terminal that nobody is at any more
                piece = b""
            received += piece
            with self._changed:
                self._seen = received.decode(errors="ignore")
                self._is_over = not piece
                self._changed.notify_all()
            if not piece:
                return


class Proxy:
    """Hands everything on. `lose` drops the answers to so many messages; `rewrite` changes what the server says."""

    def __init__(self, server: Server) -> None:
        self.lose = 0
        self.lost = 0
        self.rewrite: Callable[[bytes], bytes] = lambda data: data
        self._server = server
        self._open: list[socket.socket] = [socket.create_server(("127.0.0.1", 0))]
        self._threads: list[threading.Thread] = []
        self.url = f"http://127.0.0.1:{self._open[0].getsockname()[1]}"
        self._begin(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _shut(*self._open)
        for thread in self._threads:
            thread.join(PATIENCE)
        for one in self._open:
            one.close()

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._open[0].accept()
                self._open.append(client)
                upstream = socket.create_connection(("127.0.0.1", self._server.port))
                self._open.append(upstream)
                loses = threading.Event()
                self._begin(self._ask, client, upstream, loses)
                self._begin(self._answer, client, upstream, loses)

    def _ask(self, client: socket.socket, upstream: socket.socket, loses: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(64 * 1024):
                if self.lose and data.startswith(b"POST /agent/message/stream"):
                    self.lose -= 1
                    loses.set()
                upstream.sendall(data)
        _shut(client, upstream)

    def _answer(self, client: socket.socket, upstream: socket.socket, loses: threading.Event) -> None:
        with suppress(OSError):
            while data := upstream.recv(64 * 1024):
                if loses.is_set():
                    self.lost += 1
                    break
                client.sendall(self.rewrite(data))
        _shut(client, upstream)


def _shut(*sockets: socket.socket) -> None:
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)

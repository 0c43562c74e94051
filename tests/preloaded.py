"""Processes of ours that start in a third of the time.

Two thirds of a start go into importing libraries, and the tests start some hundred processes. So each process that
runs tests has one that has imported them, and nothing of ours: it forks, and the fork runs the program, with the
environment, the settings and the database that it is given, in a process of its own that tests may kill.
What a start takes and what it imports is checked with `python -m` itself, in test_startup.py and test_make_scaled.py.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

# Those that take long and read no settings.
LIBRARIES = """
    asyncio asgiref.sync channels.layers django.contrib.admin.filters django.contrib.postgres.forms
    django.core.handlers.asgi django.core.management django.db.backends.sqlite3.base django.db.migrations.executor
    gripcontrol httptools httpx jsonschema jwt logging.config procrastinate psycopg pygments requests rest_framework
    uvicorn.main uvicorn.protocols.websockets.websockets_sansio_impl uvloop yaml
"""
MESSAGE_BYTES = 64 * 1024


class Process:
    """What subprocess.Popen is to a child, to the child of the process that forks."""

    def __init__(self, reports: socket.socket) -> None:
        self._reports = reports
        self.pid = int(self._next_report())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(TimeoutError, BlockingIOError):
            return self.wait(0)
        return None

    def wait(self, timeout: float) -> int:
        """How it ended: minus the signal that killed it. Raises TimeoutError."""
        if self.returncode is None:
            self._reports.settimeout(timeout)
            self.returncode = int(self._next_report())
            self._reports.close()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _next_report(self) -> bytes:
        report = self._reports.recv(MESSAGE_BYTES)
        assert report, "the process that forks has ended"
        return report


def start(
    module: str,
    *arguments: str,
    environment: dict[str, str],
    out: int | IO[Any],
    err: int | IO[Any] | None = None,
    reads: int | IO[Any] | None = None,
) -> Process:
    """`python -m module arguments` in the project's folder; without `err`, `out` takes the errors too."""
    reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, Path(os.devnull).open() as nothing:
        request = json.dumps([[module, *arguments], environment]).encode()
        assert len(request) < MESSAGE_BYTES
        files = (theirs, nothing if reads is None else reads, out, out if err is None else err)
        handed = [file if isinstance(file, int) else file.fileno() for file in files]
        socket.send_fds(_forking(), [request], handed)
    return Process(reports)


def run(module: str, *arguments: str, environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(module, *arguments, environment=environment, out=out, err=err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
        return subprocess.CompletedProcess([module, *arguments], code, *said)


_started: list[socket.socket] = []


def _forking() -> socket.socket:
    """The way to this process's own; started when it is first needed, ends with it."""
    if not _started:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # What Python itself reads of the environment is what it is given here, for all of them.
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())],
                cwd=Path(__file__).resolve().parent.parent,
                env={"PATH": os.environ["PATH"], "SSL_CERT_FILE": os.devnull},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

        def end() -> None:
            ours.close()
            process.wait()

        atexit.register(end)
        _started.append(ours)
    return _started[0]


# --- In the process that forks -------------------------------------------------------------------------------------


def fork_as_told(told: socket.socket) -> list[str]:
    """Fork for each request. Returns in each fork, with what it is to run; ends with whoever runs the tests."""
    # A Ctrl-C is for all of its group, and for this one the end comes from above.
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([told.fileno(), *running], [], [])
        for ended in set(ready) & running.keys():
            process_id, reports = running.pop(ended)
            _, status = os.waitpid(process_id, 0)
            os.close(ended)
            with reports, suppress(BrokenPipeError):
                reports.send(str(os.waitstatus_to_exitcode(status)).encode())
        if told.fileno() not in ready:
            continue
        request, handed, _, _ = socket.recv_fds(told, MESSAGE_BYTES, 4)
        if not request:
            for process_id, _ in running.values():
                os.kill(process_id, signal.SIGKILL)
            sys.exit()
        reports = socket.socket(fileno=handed[0])
        process_id = os.fork()
        if not process_id:
            with ExitStack() as end:
                end.callback(told.close)
                for watched, (_, others) in running.items():
                    end.callback(os.close, watched)
                    end.callback(others.close)
                reports.close()
            signal.signal(signal.SIGINT, interrupted)
            return become(json.loads(request), *handed[1:])
        for file in handed[1:]:
            os.close(file)
        running[os.pidfd_open(process_id)] = process_id, reports
        reports.send(str(process_id).encode())


def become(request: list[Any], *files: int) -> list[str]:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # Made anew: the ones that there are believe to be what they were before.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False, errors=sys.stdout.errors)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors=sys.stderr.errors, buffering=1)
    command, environment = request
    os.environ.clear()
    os.environ.update(environment)
    gc.enable()
    return list(command)


if __name__ == "__main__":
    gc.disable()
    for library in LIBRARIES.split():
        importlib.import_module(library)
    gc.freeze()
    command = fork_as_told(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)

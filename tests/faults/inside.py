"""The server of `make run` with faults planted inside, for tests alone: no code of the product knows of it.

    FAULT_PLAN=<file> python -m tests.faults.inside

Every write, commit, model chunk and published frame is a point. The file says what happens at which point, counted
from when it was written (`crash 17`), or by part of its name (`cut ...`). It may be written anew at any time.
The points that were passed, and those at which something was done, are appended to the files beside it.
"""

import os
import re
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

CRASH = "crash"  # at any point: the process is gone, as by kill -9
COMMITTED = "committed"  # at a commit: it happens, and is reported as failed
CUT = "cut"  # the same, and the connection is gone
REFUSED = "refused"  # at a commit: it fails
KILLED = 137
DONE = "0"  # no point has this number
OURS = ("orchestrator_site", "messages_app", "agents_app", "sessions_app", "events_app")
WRITE = re.compile(r'(INSERT|UPDATE|DELETE)\b[^"]*"(\w+)"')
# What every fact and frame passes through says nothing of who wrote it.
PASSED_THROUGH = ("events_app/log.py", "events_app/database.py", "events_app/prepared.py")


class Plan:
    """What is to happen at which point; read again when its file has changed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stamp = 0
        self._act, self._at, self._passed = "", DONE, 0
        self._points = file.with_suffix(".points").open("a", buffering=1)
        self._acted = file.with_suffix(".acted").open("a", buffering=1)

    def passes(self, *acts: str, label: str) -> str:
        """Note that a point at which one of `acts` could happen was reached; the one that is to happen now, or ''."""
        with self._lock:
            self._read()
            if self._act not in acts:
                return ""
            self._passed += 1
            self._points.write(f"{label}\n")
            if self._passed != int(self._at) if self._at.isdigit() else self._at not in label:
                return ""
            self._acted.write(f"{label}\n")
            self._at = DONE
            return self._act

    def _read(self) -> None:
        try:
            stamp = self._file.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if stamp != self._stamp:
            self._act, _, self._at = self._file.read_text().partition(" ")
            self._stamp, self._passed = stamp, 0


class Points:
    """The points of this process, as Django, the model and the feed are wrapped to tell of them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._here = threading.local()

    def plant(self) -> None:
        """Once Django is set up, before it connects to anything."""
        from django.db.backends.base.base import BaseDatabaseWrapper
        from django.db.backends.signals import connection_created

        from agents_app.llm.openai import OpenAIModel
        from events_app.feed import Feed

        connection_created.connect(self._watch, weak=False)
        BaseDatabaseWrapper._commit = self._committing(BaseDatabaseWrapper._commit)  # type: ignore[attr-defined]
        BaseDatabaseWrapper._rollback = self._rolling_back(BaseDatabaseWrapper._rollback)  # type: ignore[attr-defined]
        OpenAIModel.stream = self._streaming(OpenAIModel.stream)  # type: ignore[method-assign]
        Feed.publish = self._publishing(Feed.publish)  # type: ignore[method-assign]

    def _crash(self, label: str) -> None:
        if self._plan.passes(CRASH, label=label):
            os._exit(KILLED)

    def _watch(self, connection: Any, **_: Any) -> None:
        if self._write not in connection.execute_wrappers:
            connection.execute_wrappers.append(self._write)

    def _write(self, execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any) -> Any:
        found = WRITE.match(sql)
        if found is None:
            return execute(sql, params, many, context)
        label = f"{found[1]} {found[2]} ({_whose()})"
        self._crash(f"before {label}")
        outcome = execute(sql, params, many, context)
        self._crash(f"after {label}")
        self._written.append(label)
        if not context["connection"].in_atomic_block:
            # Committed by itself.
            self._fail(context["connection"], COMMITTED, CUT)
        return outcome

    @property
    def _written(self) -> list[str]:
        """What this thread has written since it last committed."""
        try:
            return self._here.written
        except AttributeError:
            self._here.written = []
            return self._here.written

    def _committing(self, commit: Callable[[Any], None]) -> Callable[[Any], None]:
        def committing(connection: Any) -> None:
            if not self._written:
                return commit(connection)
            label = f"commit of {self._written[0]} ... {self._written[-1]}"
            self._crash(f"before {label}")
            self._fail(connection, REFUSED)
            commit(connection)
            self._crash(f"after {label}")
            return self._fail(connection, COMMITTED, CUT)

        return committing

    def _rolling_back(self, rollback: Callable[[Any], None]) -> Callable[[Any], None]:
        def rolling_back(connection: Any) -> None:
            self._written.clear()
            rollback(connection)

        return rolling_back

    def _fail(self, connection: Any, *acts: str) -> None:
        from django.db import OperationalError

        act = self._plan.passes(*acts, label="; ".join(self._written))
        if act == CUT:
            connection.connection.close()
        if act or COMMITTED in acts:
            self._written.clear()
        if act:
            raise OperationalError(f"planted: {act}")

    def _streaming(self, stream: Callable[..., AsyncGenerator[Any, None]]) -> Any:
        async def streaming(model: Any, request: Any) -> AsyncGenerator[Any, None]:
            self._crash(f"before asking the model ({request.purpose})")
            async with aclosing(stream(model, request)) as outputs:
                async for output in outputs:
                    self._crash(f"{type(output).__name__} of the model ({request.purpose})")
                    yield output

        return streaming

    def _publishing(self, publish: Callable[..., None]) -> Any:
        def publishing(feed: Any, session_id: str, frames: Any, **how: Any) -> None:
            what = "delta" if frames[-1].is_delta else "frames"
            self._crash(f"before a {what} is published ({_whose()})")
            publish(feed, session_id, frames, **how)
            self._crash(f"after a {what} was published ({_whose()})")

        return publishing


def _whose() -> str:
    """The innermost function of ours that leads to this point."""
    frame = sys._getframe(2)
    root = str(Path(__file__).resolve().parents[2]) + "/"
    while frame.f_back is not None:
        file = frame.f_code.co_filename.removeprefix(root)
        if file.startswith(OURS) and file not in PASSED_THROUGH:
            return f"{file}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "nobody of ours"


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orchestrator_site.settings")
    import django

    django.setup()
    if plan := os.environ.get("FAULT_PLAN"):
        Points(Plan(Path(plan))).plant()
    if bug := os.environ.get("PLANTED_BUG"):
        from tests.faults import bugs

        getattr(bugs, bug)()
    from orchestrator_site import serve

    serve.main()


if __name__ == "__main__":
    main()

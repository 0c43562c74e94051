"""The user's end: lines typed or piped in, questions, Ctrl-C. Between two lines nothing runs, and nothing is missed."""

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from agents_app.llm.base import clean
from messages_app.terminal.calls import Calls, Question
from messages_app.terminal.connection import Connection, Refused, Unreachable
from messages_app.terminal.conversation import Conversation
from messages_app.terminal.journal import InUse, Journal, state_folder
from messages_app.terminal.patience import GaveUp
from messages_app.terminal.screen import Screen
from messages_app.terminal.workspace import Workspace

HELP = """\
Type a message; a line that begins with a blank is sent even if a / follows.
  /agent NAME   pass the session to another agent (orchestrator, coder, architect, debug, ask)
  /help         this
  /quit         leave, as Ctrl-D does; the session stays
Ctrl-C cancels the turn that runs or waits, Ctrl-\\ leaves it as it is, and the client."""


class Failure(Exception):
    """Why the client ends, in one line, and with which exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def chat(*, server: str, key: str, directory: str, session_id: str | None, colours: bool) -> None:
    """Hold a conversation until the user leaves. Raises Failure."""
    if not server.startswith(("http://", "https://")):
        raise Failure(f"--server has to begin with http:// or https://, and {server} does not.", 2)
    if not key:
        raise Failure("There is no key: set INTERNAL_API_KEY, or give one with --key.", 2)
    if not key.isascii() or not key.isprintable():
        raise Failure("The key has characters that no key has.", 2)
    workspace = _workspace(directory)
    for stream in (sys.stdin, sys.stdout):
        # What a terminal cannot show, or a file cannot mean, ends no conversation.
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # Raised, so that a command that runs is killed on the way out.
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    screen = Screen(sys.stdout, colours=colours)
    with asyncio.Runner() as runner:
        connection = Connection(server, key)
        try:
            Client(runner, connection, workspace, screen).run(session_id)
        except Unreachable as trouble:
            raise Failure(f"No server at {server}: {trouble}. `make run` starts one, --server names one.") from None
        except GaveUp as trouble:
            raise Failure(str(trouble)) from None
        except Refused as refused:
            raise Failure(_why(refused)) from None
        except InUse as in_use:
            raise Failure(str(in_use)) from None
        finally:
            runner.run(connection.close())
            workspace.close()


class Client:
    def __init__(self, runner: asyncio.Runner, connection: Connection, workspace: Workspace, screen: Screen) -> None:
        self._runner = runner
        self._connection = connection
        self._workspace = workspace
        self._screen = screen
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if self._is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 (gives `input` its keys)

    def run(self, session_id: str | None) -> None:
        if session_id is None:
            made = self._runner.run(self._connection.post("/sessions"))
            session_id = str(made.get("id"))
            self._screen.line(f"Session {session_id}, working in {self._workspace.root}. /help tells more.", "quiet")
        else:
            self._screen.line(f"Session {session_id} again, working in {self._workspace.root}.", "quiet")
        try:
            journal = Journal.of(self._connection.server, session_id, self._workspace.root)
        except OSError as error:
            raise Failure(f"{state_folder()} cannot be used: {error.strerror}.") from None
        try:
            calls = Calls(self._connection, session_id, self._workspace, journal, self._screen)
            self._talk(Conversation(self._connection, session_id, calls, self._screen))
        finally:
            journal.close()
            self._screen.line(f"The session stays; --session {session_id} goes on with it.", "quiet")

    def _talk(self, conversation: Conversation) -> None:
        self._do(conversation, conversation.attach())
        while True:
            try:
                line = self._read("> ")
            except KeyboardInterrupt:
                self._screen.line()
                self._screen.line("Ctrl-D leaves.", "quiet")
                continue
            if line is None or line.split() == ["/quit"]:
                return
            if line.startswith("/"):
                self._command(conversation, line)
            elif line.strip():
                self._do(conversation, conversation.say(line))

    def _command(self, conversation: Conversation, line: str) -> None:
        match line.split():
            case ["/agent", agent]:
                self._do(conversation, conversation.switch(agent))
            case ["/help"]:
                for text in HELP.split("\n"):
                    self._screen.line(text, "quiet")
            case [command, *_]:
                self._screen.line(f"There is no {command}, or not like this. /help tells what there is.", "attention")

    def _do(self, conversation: Conversation, beginning: Coroutine[Any, Any, None]) -> None:
        """Begin something, and see it through; Ctrl-C cancels the turn. A refusal ends what was begun and no more."""
        try:
            self._runner.run(beginning)
            self._see_through(conversation)
        except KeyboardInterrupt:
            self._screen.line()
            self._screen.line("Cancelling the turn. Ctrl-C again leaves at once.", "attention")
            try:
                self._runner.run(conversation.cancel())
                self._see_through(conversation)
            except KeyboardInterrupt:
                sys.exit(130)
        except Refused as refused:
            if refused.status in (401, 404):
                raise
            self._screen.line(refused.message, "bad")

    def _see_through(self, conversation: Conversation) -> None:
        while question := self._runner.run(conversation.advance()):
            conversation.answer(question, yes=self._asks(question))

    def _asks(self, question: Question) -> bool:
        """Whether the user says yes. What was asked is shown whole: nobody agrees to what they did not see."""
        call = question.call
        if question.folder is not None:
            how = "by a shell" if call.arguments.get("shell") else "without a shell"
            limit = call.arguments.get("timeout", 60)
            self._screen.line(f"To be run in {question.folder}, {how}, for at most {limit} seconds:", "attention")
            self._screen.block(call.arguments["command"], "bold", limit=None)
        else:
            self._screen.call("An agent", call.tool, call.arguments, limit=None)
        answer = self._read(f"{question.why} [y/N] ", forget_typed=True)
        return answer is not None and answer.strip().lower() in ("y", "yes")

    def _read(self, prompt: str, *, forget_typed: bool = False) -> str | None:
        """A line of the user's, None at the end of the input."""
        if self._is_terminal:
            if forget_typed:
                _forget_typed()
            try:
                return clean(input(prompt))
            except EOFError:
                self._screen.line()
                return None
        self._screen.prompt(prompt)
        line = clean(sys.stdin.readline())
        # A terminal shows what is typed, a pipe does not.
        self._screen.line(line.rstrip("\r\n"), "bold")
        return line.rstrip("\r\n") if line else None


def _workspace(directory: str) -> Workspace:
    """Raises Failure."""
    try:
        workspace = Workspace(Path(directory).expanduser())
    except NotADirectoryError:
        raise Failure(f"{directory} is no directory.", 2) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no path"
        raise Failure(f"{directory} cannot be the workspace: {reason}.", 2) from None
    journals = Path(os.path.realpath(state_folder()))
    if journals.is_relative_to(workspace.root):
        workspace.close()
        raise Failure(f"{workspace.root} has the client's own files in it ({journals}). Choose another directory.", 2)
    return workspace


def _why(refused: Refused) -> str:
    if refused.status == 401:
        return "The server refuses this key: set INTERNAL_API_KEY to its key, or give it with --key."
    if refused.code == "session_not_found":
        return f"{refused.message}. Without --session a new one begins."
    return refused.message


def _forget_typed() -> None:
    """What was typed before a question was asked is no answer to it."""
    import termios

    with suppress(termios.error):
        termios.tcflush(sys.stdin, termios.TCIFLUSH)

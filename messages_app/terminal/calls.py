"""The tool calls of a session that this client has to execute: each once, and nothing else than what was announced."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents_app.llm.base import clean
from messages_app.terminal.commands import execute_command
from messages_app.terminal.connection import Connection, Refused, Unreachable, object_at, objects_at, text_at
from messages_app.terminal.files import ToolError
from messages_app.terminal.journal import Journal, Outcome
from messages_app.terminal.screen import Screen, told
from messages_app.terminal.workspace import READING, Workspace, check_arguments

EXECUTE = "execute_command"
CUT = "The client stopped while it executed this call. Whether it took effect is not known."
DECLINED = "User rejected this call on the terminal."
INTERRUPTED = "The user interrupted it."
ANNOUNCED_OTHERWISE = "What the server has open is not what it announced. Nothing was executed."


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as the server tells it; `tool` is empty where only its arguments are told."""

    call_id: str
    tool: str
    arguments: dict[str, Any]
    args_hash: str

    @classmethod
    def of(cls, data: dict[str, Any], args_hash: str) -> "Call":
        return cls(text_at(data, "call_id"), text_at(data, "tool_name"), object_at(data, "arguments"), args_hash)

    def is_announced_by(self, other: "Call") -> bool:
        same_tool = other.tool in ("", self.tool)
        return same_tool and (self.arguments, self.args_hash) == (other.arguments, other.args_hash)


@dataclass(frozen=True, slots=True)
class Question:
    """What only the user can answer, with yes or no, before a call is executed. A command has its folder."""

    call: Call
    why: str
    folder: Path | None = None


class Calls:
    """What was announced, what is due, and what came of it. A call that waits for a person is never answered here."""

    def __init__(
        self, connection: Connection, session_id: str, workspace: Workspace, journal: Journal, screen: Screen
    ) -> None:
        self._connection = connection
        self._session_id = session_id
        self._workspace = workspace
        self._journal = journal
        self._screen = screen
        self._waiting: dict[str, Call] = {}
        # To execute or to report, with what was announced of them: of what is found open, nothing was.
        self._due: dict[str, Call | None] = {}
        self._outcomes: dict[str, Outcome] = journal.outcomes
        self._reported: set[str] = set()
        self._answers: dict[str, tuple[Call, bool]] = {}

    @property
    def are_due(self) -> bool:
        return bool(self._due)

    async def open(self) -> dict[str, Any]:
        """What the server says of the session's open calls. Raises Refused, Unreachable."""
        return await self._connection.get(f"/sessions/{self._session_id}/open-calls")

    def find(self, standing: dict[str, Any]) -> list[tuple[Call, bool]]:
        """Take over what is open, in place of what was known; each call, and whether it waits for a person."""
        self._waiting, self._due = {}, {}
        found = []
        for one in objects_at(standing, "open_calls"):
            call, waits = Call.of(one, text_at(one, "args_hash")), one.get("state") == "waiting"
            if call.call_id in self._reported or not (waits or one.get("state") == "released"):
                continue
            if waits:
                self._waiting[call.call_id] = call
            else:
                self._due[call.call_id] = None
            found.append((call, waits))
        self._journal.settle({call.call_id for call, _ in found})
        return found

    def announce(self, call: Call, *, waits: bool) -> None:
        self._journal.settle(set())
        if waits:
            self._waiting[call.call_id] = call
        elif call.call_id not in self._reported:
            self._due[call.call_id] = call

    def decide(self, call_id: str, made: dict[str, Any]) -> Call | None:
        """Somebody has decided; the call as it was asked for, where that is known."""
        asked = self._waiting.pop(call_id, None)
        if made.get("decision") in ("approve", "edit") and call_id not in self._reported:
            tool = asked.tool if asked else ""
            self._due[call_id] = Call(call_id, tool, object_at(made, "arguments"), text_at(made, "args_hash"))
        return asked

    def close(self) -> None:
        """The turn is over, and with it every call."""
        self._waiting.clear()
        for call_id in list(self._due):
            self._forget(call_id)

    def answer(self, question: Question, *, yes: bool) -> None:
        self._answers[question.call.call_id] = question.call, yes

    async def settle(self) -> Question | None:
        """Execute and report what is due; a question where the user has to be asked first.

        Raises Refused, Unreachable.
        """
        while self._due:
            call_id = next(iter(self._due))
            if call_id not in self._outcomes:
                call = await self._released(call_id)
                if call is None:  # closed in the meantime
                    self._forget(call_id)
                    continue
                if question := self._question_about(call):
                    return question
                await self._execute(call)
            await self._report(call_id)
        return None

    async def _released(self, call_id: str) -> Call | None:
        """The call as the server has it now, if it may be executed."""
        for one in objects_at(await self.open(), "open_calls"):
            if one.get("call_id") == call_id and one.get("state") == "released":
                return Call.of(one, text_at(one, "args_hash"))
        return None

    def _question_about(self, call: Call) -> Question | None:
        answered = self._answers.get(call.call_id)
        if call.tool in READING or (answered and answered[0] == call) or self._is_otherwise(call):
            return None
        folder = None
        if call.tool == EXECUTE:
            try:
                folder = self._folder_for(call.arguments)
            except ToolError:
                return None  # it cannot be executed, whatever the answer
        if self._journal.was_cut(call.call_id):
            return Question(call, "It had begun when this client stopped. Execute it again?", folder)
        if call.call_id in self._journal.strange:
            return Question(call, f"It was asked for elsewhere. Execute it here, in {self._workspace.root}?", folder)
        return Question(call, "Run it?", folder) if folder else None

    async def _execute(self, call: Call) -> None:
        """Have an outcome of the call, which is kept until the server has it."""
        _, yes = self._answers.pop(call.call_id, (call, True))
        outcome: Outcome
        if self._is_otherwise(call):
            outcome = {"error": ANNOUNCED_OTHERWISE}
        elif not yes:
            outcome = {"error": CUT if self._journal.was_cut(call.call_id) else DECLINED}
        else:
            try:
                outcome = {"result": await self._run(call)}
            except ToolError as error:
                outcome = {"error": clean(str(error))}
            except asyncio.CancelledError:
                self._keep(call, {"error": INTERRUPTED})
                raise
        self._keep(call, outcome)
        self._screen.line(f"  → {told(outcome)}", "bad" if "error" in outcome else "quiet")

    async def _run(self, call: Call) -> dict[str, Any]:
        if call.tool not in READING:
            try:
                self._journal.begin(call.call_id)
            except OSError as error:
                raise ToolError(f"The journal cannot be written: {error.strerror}. Nothing was executed.") from None
        if call.tool != EXECUTE:
            return self._workspace.run(call.tool, call.arguments)
        return await execute_command(self._folder_for(call.arguments), **call.arguments)

    def _folder_for(self, arguments: dict[str, Any]) -> Path:
        check_arguments(execute_command, arguments)
        return self._workspace.directory(arguments.get("cwd") or ".")

    def _is_otherwise(self, call: Call) -> bool:
        announced = self._due[call.call_id]
        return announced is not None and not call.is_announced_by(announced)

    def _keep(self, call: Call, outcome: Outcome) -> None:
        self._outcomes[call.call_id] = {**outcome, "args_hash": call.args_hash}
        if call.tool not in READING:
            try:
                self._journal.end(call.call_id, self._outcomes[call.call_id])
            except OSError as error:
                self._screen.line(f"The journal cannot be written: {error.strerror}", "bad")

    async def _report(self, call_id: str) -> None:
        """Give the server the outcome. What breaks is repeated, with the same outcome. Raises Refused, Unreachable."""
        try:
            await self._send(call_id, self._outcomes[call_id])
        except Refused as refused:
            if refused.status in (401, 404):
                raise
            if refused.status in (409, 429):
                raise Unreachable(refused.message) from None
            self._screen.line(f"The server does not take the result: {refused.message}", "bad")
            if refused.status != 200:
                # The model has to learn something, or the call stays open.
                await self._send(call_id, {"error": f"The result could not be sent: {refused.message}"[:1_000]})
        self._reported.add(call_id)
        self._forget(call_id)

    async def _send(self, call_id: str, outcome: Outcome) -> None:
        message = {"type": "tool_result", "call_id": call_id, **outcome}
        if await self._connection.send(self._session_id, message) is None:
            raise Unreachable("the connection broke")

    def _forget(self, call_id: str) -> None:
        self._due.pop(call_id, None)
        self._outcomes.pop(call_id, None)
        self._answers.pop(call_id, None)
        self._journal.forget(call_id)

"""The conversation: what is sent, what the session's stream tells, and how what breaks is taken up again.

What the user reads comes from the session's stream alone, resumed by number, so that nothing is missing and nothing is
shown twice. What runs comes from `open-calls` alone, and has to be what the stream announced.
"""

import asyncio
import uuid
from typing import Any

from messages_app.terminal.calls import Call, Calls, Question
from messages_app.terminal.connection import (
    Connection,
    Frame,
    Refused,
    Unreachable,
    number_at,
    object_at,
    objects_at,
    text_at,
)
from messages_app.terminal.patience import FIRST_DELAY, Patience
from messages_app.terminal.screen import Screen

QUEUE = "/admin/agents_app/pendingapproval/"
PAST_MESSAGES = 6
# A turn that was sent and whose id is not known yet.
UNKNOWN = ""
VERDICTS = {
    "approve": ("approved", "good"),
    "edit": ("approved with edited arguments", "attention"),
    "reject": ("rejected", "bad"),
}


class StreamLost(Exception):
    """The place in the stream is gone: what was shown may be incomplete."""


class Conversation:
    def __init__(self, connection: Connection, session_id: str, calls: Calls, screen: Screen) -> None:
        self._connection = connection
        self._session_id = session_id
        self._calls = calls
        self._screen = screen
        self._path = f"/sessions/{session_id}"
        self._agent = "orchestrator"
        # The last number of the stream that was shown, and one that has to be reached.
        self._last = self._awaited = 0
        # The turn whose end is waited for.
        self._turn: str | None = None

    # --- what the user does ---

    async def attach(self) -> None:
        """Show where the session stands, and go on from there. Raises Refused, Unreachable."""
        self._screen.end()
        # In this order: what happens in between is shown twice then, and not never.
        standing = await self._calls.open()
        history = await self._connection.get(f"{self._path}/history")
        self._agent = text_at(history, "current_agent") or self._agent
        for message in objects_at(history, "messages")[-PAST_MESSAGES:]:
            self._show_past(message)
        for call, waits in self._calls.find(standing):
            self._show_call(call, waits=waits)
        self._last = self._awaited = number_at(standing, "position")
        self._turn = text_at(standing, "open_turn") or None

    async def say(self, content: str) -> None:
        """Send a message: once, whatever breaks. Raises Refused, GaveUp."""
        self._turn = UNKNOWN
        # By its id the server knows a message that it has stored already.
        message = {"type": "user_message", "content": content, "message_id": str(uuid.uuid4())}
        patience = Patience(self._screen)
        try:
            while True:
                try:
                    first = await self._connection.send(self._session_id, message)
                    if first is not None and first.kind == "turn_started":
                        self._turn = text_at(first.data, "turn_id")
                    break
                except Unreachable as trouble:
                    await patience.wait(trouble)
        except Refused:
            self._turn = None
            raise
        patience.over()

    async def switch(self, agent: str) -> None:
        """Pass the session to another agent. Raises Refused, Unreachable."""
        first = await self._connection.send(self._session_id, {"type": "switch_agent", "agent_type": agent})
        if first is not None and first.number is not None:
            self._awaited = first.number

    async def cancel(self) -> None:
        """Cancel the turn; `advance` shows how it ends. Raises Refused, GaveUp."""
        patience, key = Patience(self._screen), str(uuid.uuid4())
        while True:
            try:
                answer = await self._connection.post(f"{self._path}/cancel", key=key)
                break
            except Unreachable as trouble:
                await patience.wait(trouble)
        patience.over()
        self._awaited = self._last
        self._turn = text_at(answer, "cancelled_turn") or None
        if self._turn is None:
            self._calls.close()

    def answer(self, question: Question, *, yes: bool) -> None:
        self._calls.answer(question, yes=yes)

    # --- what the server does ---

    async def advance(self) -> Question | None:
        """Follow the session and execute what is released, up to the end of the turn or a question for the user.

        Raises Refused, GaveUp.
        """
        patience, is_lost = Patience(self._screen), False
        while True:
            try:
                if is_lost:
                    await self.attach()
                    is_lost = False
                async with self._connection.follow(self._session_id, self._last) as frames:
                    question = await self._calls.settle()
                    patience.over()
                    if question or not self._goes_on:
                        return question
                    async for frame in frames:
                        self._take(frame)
                        question = await self._calls.settle()
                        if question or not self._goes_on:
                            return question
                # At its maximum age a stream ends, and is resumed.
                await asyncio.sleep(FIRST_DELAY)
            except StreamLost:
                self._screen.line("[The stream was lost: what is above may be incomplete. It stands so:]", "attention")
                is_lost = True
            except Unreachable as trouble:
                await patience.wait(trouble)

    @property
    def _goes_on(self) -> bool:
        return self._turn is not None or self._calls.are_due or self._last < self._awaited

    def _take(self, frame: Frame) -> None:
        if frame.kind == "stream_reset":
            raise StreamLost
        if frame.number is None or frame.number <= self._last:
            return
        self._last = frame.number
        data, metadata = frame.data, object_at(frame.data, "metadata")
        match frame.kind:
            case "turn_started" if self._turn == UNKNOWN:
                self._turn = text_at(data, "turn_id")
            case "assistant_message" if "token" in data:
                self._screen.piece(self._agent, text_at(data, "token"), frame.number)
            case "assistant_message":
                self._screen.whole(self._agent, text_at(data, "content"), frame.number)
            case "agent_switched":
                self._agent = text_at(data, "to_agent")
                self._screen.line(f"{text_at(data, 'from_agent')} → {self._agent}: {text_at(data, 'reason')}", "agent")
            case "tool_call":
                call, waits = Call.of(data, text_at(metadata, "args_hash")), bool(data.get("requires_approval"))
                self._show_call(call, waits=waits)
                self._calls.announce(call, waits=waits)
            case "server_call":
                self._show_server_call(data, Call.of(data, text_at(metadata, "args_hash")))
            case "approval_resolved":
                self._take_decision(text_at(data, "call_id"), metadata)
            case "error":
                self._screen.line(f"{text_at(data, 'content')} ({text_at(metadata, 'code')})", "bad")
            case "restarted":
                self._screen.void(number_at(metadata, "discard_after"))
            case "turn_finished":
                self._take_end(data)

    def _take_decision(self, call_id: str, made: dict[str, Any]) -> None:
        asked = self._calls.decide(call_id, made)
        decision, feedback = text_at(made, "decision"), text_at(made, "feedback")
        what, style = VERDICTS.get(decision, (decision, "quiet"))
        said = f"{asked.tool if asked else 'A call'} was {what} by {text_at(made, 'decided_by')}"
        self._screen.line(said + (":" if feedback else "."), style)
        if feedback:
            self._screen.block(feedback, style)
        if decision == "edit":
            self._screen.changes(asked.arguments if asked else {}, object_at(made, "arguments"))

    def _take_end(self, data: dict[str, Any]) -> None:
        self._screen.end()
        status, code, usage = text_at(data, "status"), text_at(data, "code"), object_at(data, "usage")
        if status == "completed":
            self._screen.line(f"({number_at(usage, 'total_tokens'):,} tokens)", "quiet")
        else:
            why = f" ({code})" if code not in ("", status) else ""
            self._screen.line(f"The turn {'failed' if status == 'failed' else f'was {status}'}{why}.", "attention")
        # A session has open calls of one turn only.
        self._calls.close()
        if self._turn == text_at(data, "turn_id"):
            self._turn = None

    # --- what is shown ---

    def _show_call(self, call: Call, *, waits: bool) -> None:
        self._screen.call(self._agent, call.tool, call.arguments)
        if waits:
            self._screen.line(f"  It waits for an operator: {self._connection.server}{QUEUE}", "attention")

    def _show_server_call(self, data: dict[str, Any], call: Call) -> None:
        """A call that is none of this client's: the server executes it, perhaps once a person has said so."""
        match text_at(data, "state"):
            case "waiting":
                self._show_call(call, waits=True)
                self._calls.announce(call, waits=True)
            case "executing":
                self._screen.call(self._agent, call.tool, call.arguments)
            case outcome:
                self._screen.line(f"  → {outcome}, on the server", "quiet" if outcome == "ok" else "bad")

    def _show_past(self, message: dict[str, Any]) -> None:
        content = text_at(message, "content")
        if content:
            self._screen.line(f"{text_at(message, 'name') or text_at(message, 'role')}:", "quiet")
            self._screen.block(content)

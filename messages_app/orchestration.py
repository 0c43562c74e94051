"""The four ways in. Each stores what came, then follows the session's stream; none of them owns the turn."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from agents_app import handoffs
from events_app.chunks import ErrorShown
from events_app.database import hop, read
from events_app.frames import Frame
from events_app.stream import follow
from messages_app import acceptance
from messages_app.inbound import HitlDecision, Inbound, SwitchAgent, ToolResult, UserMessage
from sessions_app.callers import Caller
from sessions_app.models import Session

Frames = AsyncGenerator[list[Frame], None]

DECISIONS = ("approve", "edit", "reject")


class Refused(Exception):
    """A refusal that the contract puts into the stream: for this request alone, nothing stored."""

    def __init__(self, chunk: ErrorShown) -> None:
        super().__init__(chunk.code)
        self.chunk = chunk


class MessageOrchestrationService:
    """What a caller may say to a session. Each way in is an async generator of numbered chunks.

    The first thing it yields is an empty list, when the message is accepted: until then it raises APIError or Refused,
    afterwards nothing. Whoever stops listening stops nothing.
    """

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    def receive(self, message: Inbound) -> Frames:
        """The way in for a message."""
        match message:
            case UserMessage():
                return self.process_message(message)
            case SwitchAgent():
                return self.switch_agent(message)
            case ToolResult():
                return self.process_tool_result(message)
            case HitlDecision():
                return self.process_hitl_decision(message)

    async def process_message(self, message: UserMessage) -> Frames:
        """Open a turn; its frames up to the end of the answer."""
        accepted = await hop(acceptance.user_message, message, self.caller)
        yield []
        async with aclosing(follow(accepted.session_id, after=accepted.after, until=str(accepted.turn_id))) as frames:
            async for ready in frames:
                yield ready

    async def switch_agent(self, message: SwitchAgent) -> Frames:
        """Pass the session to another agent at once; exactly one frame."""
        after, origin = await hop(
            handoffs.switch_by_message, self.caller, message.session_id, message.agent_type, reason=message.reason
        )
        yield []
        async with aclosing(follow(message.session_id, after=after, until=origin)) as frames:
            async for ready in frames:
                yield ready

    async def process_tool_result(self, message: ToolResult) -> Frames:
        """No tool is offered to a model yet, so no call waits for a result (section 4, rows 11 and 13)."""
        await self._ensure_not_a_strangers(message.session_id)
        raise Refused(ErrorShown(f"No pending tool call {message.call_id}", "unknown_call"))
        yield []  # an async generator like the others

    async def process_hitl_decision(self, message: HitlDecision) -> Frames:
        """No call waits for a decision yet (section 4, rows 15 and 17)."""
        await self._ensure_not_a_strangers(message.session_id)
        if message.decision not in DECISIONS:
            raise Refused(ErrorShown(f"Invalid HITL decision: {message.decision}", "invalid_decision"))
        raise Refused(ErrorShown(f"No pending approval found for request_id={message.call_id}", "unknown_call"))
        yield []  # an async generator like the others

    async def _ensure_not_a_strangers(self, session_id: str) -> None:
        """Raise UnknownSession for a session that exists and is not the caller's; one that never was may be named."""
        if await read(lambda: Session.objects.filter(pk=session_id).exists()):
            await read(Session.objects.one_visible_to, self.caller, session_id)

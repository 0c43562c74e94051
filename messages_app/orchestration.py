"""The four ways in. Each stores what came, then follows the session's stream; none of them owns the turn."""

from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from functools import partial

from events_app.admission import entrance
from events_app.database import store
from events_app.feed import feed
from events_app.frames import DONE, Frame
from events_app.stream import follow
from messages_app import acceptance
from messages_app.acceptance import Accepted, Refused
from messages_app.inbound import HitlDecision, Inbound, SwitchAgent, ToolResult, UserMessage, own_key
from messages_app.runner import here
from sessions_app.callers import Caller
from sessions_app.idempotency import Key

Frames = AsyncGenerator[list[Frame], None]


class MessageOrchestrationService:
    """What a caller may say to a session. Each way in is an async generator of numbered chunks.

    The first thing it yields is an empty list, when the message is accepted: until then it raises APIError, afterwards
    nothing. A later empty list is a heartbeat. A complete answer ends with `DONE`; one that does not was cut short by a
    server that stops, and is resumed on the session's stream. Whoever stops listening stops nothing.

    One that `follows` nothing is for callers that read the session's stream already: it yields what is said to this
    message alone, and ends.
    """

    def __init__(self, caller: Caller, *, follows: bool = True, arrived_at: float | None = None) -> None:
        self.caller = caller
        self._arrived_at = arrived_at
        self._follows = follows

    def receive(self, message: Inbound, key: Key | None = None) -> Frames:
        """The way in for a message; under the key of its request, or else its own id, it is stored once."""
        key = key or own_key(message, self.caller)
        match message:
            case UserMessage():
                return self.process_message(message, key)
            case SwitchAgent():
                return self.switch_agent(message, key)
            case ToolResult():
                return self.process_tool_result(message, key)
            case HitlDecision():
                return self.process_hitl_decision(message, key)

    def process_message(self, message: UserMessage, key: Key | None) -> Frames:
        """Open a turn; its frames up to the end of the answer, or to the calls that it waits for.

        Raises Overloaded: of all that is said, only this is work that nobody has begun.
        """
        return self._answer(
            partial(acceptance.user_message, message, self.caller, key), opens_turn_of=message.session_id
        )

    def switch_agent(self, message: SwitchAgent, key: Key | None) -> Frames:
        """Pass the session to another agent at once; exactly one frame."""
        return self._answer(partial(acceptance.switch_agent, message, self.caller, key))

    def process_tool_result(self, message: ToolResult, key: Key | None) -> Frames:
        """Answer a tool call; when no other is open, the frames of the turn that goes on."""
        return self._answer(partial(acceptance.tool_result, message, self.caller, key))

    def process_hitl_decision(self, message: HitlDecision, key: Key | None) -> Frames:
        """Decide on a tool call that waits; how it was resolved, and the turn when it goes on by that."""
        return self._answer(partial(acceptance.hitl_decision, message, self.caller, key))

    async def _answer(self, accept: Callable[..., Accepted], *, opens_turn_of: str = "") -> Frames:
        with ExitStack() as until_left:
            newcomer = live = None
            if opens_turn_of:
                newcomer = entrance.admit(self._arrived_at)
                until_left.callback(newcomer.has_left)
                from_before = until_left.enter_context(ExitStack())
                live = from_before.enter_context(feed.subscribe(opens_turn_of, ends_with_session=False))
            try:
                accepted = await (_store_new(accept) if opens_turn_of else store(accept))
            except Refused as refused:
                # For this request alone, nothing stored: the contract puts these refusals into the stream.
                yield []
                yield [Frame.unnumbered(refused.chunk), DONE]
                return
            yield []
            if not self._follows:
                return
            if live is not None and not accepted.is_new:
                from_before.close()  # what it repeats was said before
                live = None
            if newcomer is not None and not accepted.begins:
                newcomer.has_left()
            if accepted.lost is not None:
                yield [accepted.lost]
            elif accepted.has_frames:
                is_complete = False
                following = follow(accepted.session_id, after=accepted.after, until=accepted.origin, live=live)
                async with aclosing(following) as frames:
                    async for ready in frames:
                        if newcomer is not None and ready:
                            newcomer.has_begun()
                            newcomer = None
                        is_complete = bool(ready) and ready[-1].closes
                        yield ready
                if not is_complete:
                    return
            yield [DONE]


async def _store_new(accept: Callable[..., Accepted]) -> Accepted:
    """A turn that may begin at once is taken by this process as it is stored, if it has a place for it."""
    with here.taking() as taker:
        return await store(accept, taker=taker)

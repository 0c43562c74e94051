"""The turn loop: transcript, model step, store, say; until the answer is final. It knows nothing of HTTP."""

import asyncio
import logging
import time
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from django.conf import settings

from agents_app import routing, server_tools
from agents_app.llm import FinishedStep, Model, ModelError, ModelRequest
from agents_app.routing import Route
from agents_app.server_tools import ServerCall
from events_app.database import read
from messages_app import steps
from messages_app.steps import Scene, Spent
from messages_app.turn_stream import Stopping, TimeIsUp, TurnStream
from sessions_app.models import ORCHESTRATOR, CancelRequested, ToolCall

logger = logging.getLogger(__name__)

# How long a server that stops waits for the tools that it is executing.
GRACE_SECONDS = 4.0
Executed = tuple[str, ToolCall.Outcome]


async def run_turn(stream: TurnStream, model: Model, opening: list[Scene]) -> str:
    """Advance the claimed turn until it ends, or waits for its tool calls, and return what became of it. From `opening`
    is taken what its first step starts from, if it was read already.

    Raises LostClaim when another runner has it, Stopping when the server stops; database errors pass through. In all
    three cases the turn is left as it is, for whoever claims it next.
    """
    return await _Run(stream, model, opening).to_the_end()


class _Run:
    """One claim's run: what it has said of the unfinished step, what that step cost so far."""

    def __init__(self, stream: TurnStream, model: Model, opening: list[Scene]) -> None:
        self.stream = stream
        self.model = model
        self.opening = opening
        self.started = time.monotonic() - stream.claim.ran_ms / 1000  # had it never waited
        self.deadline = asyncio.get_running_loop().time() + settings.TURN_MAX_SECONDS - stream.claim.ran_ms / 1000
        self.agent = ORCHESTRATOR
        self.said: list[str] = []
        self.spent: Spent | None = None

    async def to_the_end(self) -> str:
        try:
            return await self._loop()
        except CancelRequested:
            return await self._cancel()
        except ModelError as error:
            return await self._fail(error.code, error.message)
        except TimeIsUp:
            return await self._fail("turn_timeout", "The turn took longer than a turn may.")

    async def _loop(self) -> str:
        if self.stream.claim.requested_agent:
            await self.stream.commit(steps.obey)
        while True:
            scene = self.opening.pop() if self.opening else await read(steps.look, self.stream.claim)
            if scene is None:
                if (outcome := await self._execute()) is not None:
                    return outcome
                continue
            self.agent = scene.agent
            if scene.agent == ORCHESTRATOR:
                chosen = await self._choose(scene)
                await self.stream.commit(partial(steps.route, chosen=chosen, scene=scene, spent=self.spent))
            elif (outcome := await self._answer(scene)) is not None:
                return outcome
            # Written with the commit.
            self.spent, self.said = None, []

    async def _answer(self, scene: Scene) -> str | None:
        """One model step and what it leads to; None when the model has to be asked again."""
        finished = await self._ask(scene, "answer", scene.messages, scene.temperature)
        if not finished.tool_calls:
            complete = partial(steps.complete, text=finished.text, agent=scene.agent, spent=self.spent)
            return await self.stream.commit(complete)
        asked = await read(steps.weigh, finished, scene)
        act = partial(steps.act, finished=finished, asked=asked, scene=scene, spent=self.spent, ran_ms=self._ran_ms())
        return await self.stream.commit(act)

    def _ran_ms(self) -> int:
        return round((time.monotonic() - self.started) * 1000)

    async def _execute(self) -> str | None:
        """Execute what the server has to, each result stored as soon as it is there; what became of the turn, None when
        it goes on.
        """
        begun: list[ServerCall] = []
        async with self.stream.interruptible(self.deadline):
            pass  # a server that stops would have to leave what it begins, perhaps in doubt
        outcome: str | None = await self.stream.commit(partial(steps.begin, begun=begun, ran_ms=self._ran_ms()))
        executing = {asyncio.create_task(server_tools.execute(call)): call for call in begun}
        try:
            while executing:
                async with self.stream.interruptible(self.deadline):
                    await asyncio.wait(executing, return_when=asyncio.FIRST_COMPLETED)
                outcome = await self._store_executed(executing)
        except Stopping:
            # What ends soon need not be repeated, or be in doubt.
            await asyncio.wait(executing, timeout=GRACE_SECONDS)
            outcome = await self._store_executed(executing)
            if outcome is None:
                raise
        finally:
            for task in executing:
                task.cancel()
        return outcome

    async def _store_executed(self, executing: "dict[asyncio.Task[Executed], ServerCall]") -> str | None:
        """Store the results that are there; what became of the turn by the last of them."""
        outcome = None
        for task in [task for task in executing if task.done()]:
            call = executing.pop(task)
            text, how = task.result()
            outcome = await self.stream.commit(
                partial(steps.store, call_id=call.call_id, text=text, outcome=how, ran_ms=self._ran_ms())
            )
        return outcome

    async def _choose(self, scene: Scene) -> Route:
        """Who takes the message. A router that fails in any way is replaced by keywords."""
        if not settings.MULTI_AGENT_MODE:
            return routing.SINGLE_AGENT
        chosen = None
        try:
            finished = await self._ask(scene, "routing", routing.question(scene.user_text), 0.3)
            chosen = routing.read_answer(finished.text)
        except ModelError as error:
            logger.warning("routing_failed", extra={"turn_id": self.stream.origin, "code": error.code})
        return chosen or routing.fallback(scene.user_text)

    async def _ask(
        self,
        scene: Scene,
        purpose: Literal["answer", "routing"],
        messages: list[dict[str, Any]],
        temperature: float | None,
    ) -> FinishedStep:
        """One model step, the pieces of an answer shown, its cost kept in `self.spent` however it ends."""
        self.spent = spent = Spent(scene.agent, scene.model, purpose)
        started, is_shown = time.monotonic(), purpose == "answer"
        try:
            offered = scene.toolbox.offered() if is_shown else []
            request = ModelRequest(scene.model, messages, purpose, temperature, offered)
            async with self.stream.interruptible(self.deadline), aclosing(self.model.stream(request)) as outputs:
                async for output in outputs:
                    if isinstance(output, FinishedStep):
                        spent.prompt_tokens = output.usage.prompt_tokens
                        spent.completion_tokens = output.usage.completion_tokens
                        spent.total_tokens = output.usage.total_tokens
                        spent.has_tool_calls = bool(output.tool_calls)
                        return output
                    if is_shown:
                        self.said.append(output.text)
                        if not self.stream.has_shown(output.text):
                            await self.stream.delta(output.text)
        except ModelError as error:
            spent.error = error.code
            raise
        except TimeIsUp:
            spent.error = "turn_timeout"
            raise
        except CancelRequested:
            spent.error = "cancelled"
            raise
        finally:
            spent.duration_ms = round((time.monotonic() - started) * 1000)
        raise ModelError("model_interrupted", "The model stopped in the middle of its answer.")

    async def _fail(self, code: str, message: str) -> str:
        logger.warning("turn_failing", extra={"turn_id": self.stream.origin, "agent": self.agent, "code": code})
        try:
            await self.stream.commit(
                partial(steps.fail, code=code, message=message, agent=self.agent, spent=self.spent)
            )
        except CancelRequested:
            return await self._cancel()
        return code

    async def _cancel(self) -> str:
        await self.stream.commit(partial(steps.cancel, said="".join(self.said), agent=self.agent, spent=self.spent))
        return "cancelled"


async def give_up(stream: TurnStream) -> None:
    """End a turn that met a fault of ours, with a fixed text; the log has the rest."""
    code, message = "internal_error", "Something went wrong on the server."
    await stream.commit(partial(steps.fail, code=code, message=message, agent=ORCHESTRATOR, spent=None))

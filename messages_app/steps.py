"""What a running turn writes: each function is the body of one transaction, called by `TurnStream.commit`."""

from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db.models import F
from django.db.models.functions import Now
from django.utils import timezone

from agents_app import handoffs
from agents_app.llm import ModelError
from agents_app.models import Agent
from agents_app.routing import Route
from events_app.chunks import AssistantText, ErrorShown, TurnFinished
from events_app.models import ModelCall
from messages_app import transcript
from messages_app.models import Message
from messages_app.turn_stream import Step
from sessions_app import lifecycle
from sessions_app.models import Session, Turn


class TooManyHandoffs(ModelError):
    def __init__(self) -> None:
        super().__init__("too_many_handoffs", "The agents passed the message on too many times.")


@dataclass(frozen=True, slots=True)
class Scene:
    """What the next model step starts from."""

    agent: str
    model: str
    temperature: float | None
    messages: list[dict[str, Any]]

    @property
    def user_text(self) -> str:
        """The latest thing that the user said."""
        return str(self.messages[-1]["content"])


@dataclass(slots=True)
class Spent:
    """One model step's cost, filled in while it runs; the row is written with what the step leads to."""

    agent: str
    model: str
    purpose: str
    duration_ms: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    has_tool_calls: bool = False
    error: str = ""


def look(step: Step) -> Scene:
    """Obey the agent that the message asked for, then see who is to act and what the model is to read.

    Raises CancelRequested, TooManyHandoffs, ModelError when the conversation does not fit the model.
    """
    Turn.ensure_running(step.claim)
    turn = Turn.objects.get(pk=step.claim.turn_id)
    if turn.handoff_count > settings.TURN_MAX_HANDOFFS:
        raise TooManyHandoffs
    if turn.requested_agent:
        Turn.progress(step.claim, requested_agent="")
        if turn.requested_agent != step.session.current_agent:
            _hand_over(step, Route(turn.requested_agent, "User requested", "high"), by="user")
    agent = Agent.objects.get(pk=step.session.current_agent)
    return Scene(
        agent.name,
        agent.model or settings.LLM_MODEL,
        agent.temperature,
        transcript.of(turn, prompt=agent.prompt, context_tokens=settings.LLM_CONTEXT_TOKENS),
    )


def route(step: Step, chosen: Route, scene: Scene, spent: Spent | None) -> None:
    """The orchestrator hands the session to a specialist, unless somebody switched it away in the meantime."""
    _book(step, spent)
    if step.session.current_agent == scene.agent:
        _hand_over(step, chosen, by=scene.agent)


def complete(step: Step, text: str, agent: str, spent: Spent | None) -> None:
    """The answer is whole: stored, counted and said, and the turn is over."""
    _book(step, spent)
    _store_answer(step, text, agent)
    _finish(step, Turn.Status.COMPLETED)


def fail(step: Step, code: str, message: str, agent: str, spent: Spent | None) -> None:
    """The turn ends with an error; the session stays usable."""
    _book(step, spent)
    lifecycle.record(
        step.session,
        "agent.error.occurred",
        turn_id=step.claim.turn_id,
        agent=agent,
        error_message=message,
        error_type=code,
    )
    step.say(ErrorShown(message, code))
    _finish(step, Turn.Status.FAILED, code)


def cancel(step: Step, said: str, agent: str, spent: Spent | None) -> None:
    """The turn ends because somebody wished so; what was said until then is kept."""
    _book(step, spent)
    if said.strip():
        _store_answer(step, said, agent)
    _finish(step, Turn.Status.CANCELLED, "cancelled")


def _hand_over(step: Step, to: Route, *, by: str) -> None:
    Turn.progress(step.claim, handoff_count=F("handoff_count") + 1)
    step.say(
        handoffs.hand_over(
            step.session, to.agent, reason=to.reason, confidence=to.confidence, by=by, turn_id=step.claim.turn_id
        )
    )


def _store_answer(step: Step, text: str, agent: str) -> None:
    position = Turn.objects.values_list("position", flat=True).get(pk=step.claim.turn_id)
    Message.objects.create(
        session=step.session,
        turn_id=step.claim.turn_id,
        turn_position=position,
        role=Message.Role.ASSISTANT,
        content=text,
        agent=agent,
    )
    Session.objects.filter(pk=step.session.pk).update(message_count=F("message_count") + 1, last_activity=Now())
    lifecycle.record(step.session, "session.message.added", turn_id=step.claim.turn_id, role="assistant", agent=agent)
    step.say(AssistantText(text))


def _book(step: Step, spent: Spent | None) -> None:
    """Write down what a model step cost, and add it to the turn's bill."""
    if spent is None:
        return
    turn_id = step.claim.turn_id
    ModelCall.objects.create(
        account_id=step.claim.account_id,
        session_id=step.claim.session_id,
        turn_id=str(turn_id),
        agent=spent.agent,
        model=spent.model,
        purpose=spent.purpose,
        duration_ms=spent.duration_ms,
        prompt_tokens=spent.prompt_tokens,
        completion_tokens=spent.completion_tokens,
        total_tokens=spent.total_tokens,
        has_tool_calls=spent.has_tool_calls,
        error=spent.error,
        created_at=timezone.now(),
    )
    Turn.mine(step.claim).update(
        prompt_tokens=F("prompt_tokens") + spent.prompt_tokens,
        completion_tokens=F("completion_tokens") + spent.completion_tokens,
        total_tokens=F("total_tokens") + spent.total_tokens,
    )
    lifecycle.record(
        step.session,
        "agent.processing.completed",
        turn_id=turn_id,
        agent=spent.agent,
        duration_ms=spent.duration_ms,
        success=not spent.error,
    )


def _finish(step: Step, status: Turn.Status, code: str = "") -> None:
    Turn.finish(step.claim, status, code=code)
    usage = Turn.objects.values(*lifecycle.NO_USAGE).get(pk=step.claim.turn_id)
    step.say(TurnFinished(str(step.claim.turn_id), status, code or None, usage))

"""What a running turn reads and writes: `look` reads, each other function is the body of one `TurnStream.commit`."""

from dataclasses import asdict, dataclass
from typing import Any

from django.conf import settings
from django.db.models import F
from django.db.models.functions import Now
from django.utils import timezone

from agents_app import handoffs
from agents_app.llm import ModelError
from agents_app.models import Agent
from agents_app.routing import Route
from events_app.chunks import AssistantText, ErrorShown
from events_app.models import ModelCall
from messages_app import transcript
from messages_app.models import Message
from messages_app.turn_stream import Step
from sessions_app.models import Claim, Session, Turn


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
    user_text: str


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


def obey(step: Step) -> None:
    """Pass the session to the agent that the message asked for, when the turn's time has come."""
    asked = step.turn.requested_agent
    step.change(requested_agent="")
    if asked != step.session.current_agent:
        _hand_over(step, Route(asked, "User requested", "high"), by="user")


def look(claim: Claim) -> Scene:
    """Who is to act, and what the model is to read. Reads only.

    Raises LostClaim, CancelRequested, TooManyHandoffs, ModelError when the conversation does not fit the model.
    """
    turn = Turn.ensure_running(claim)
    if turn.handoff_count > settings.TURN_MAX_HANDOFFS:
        raise TooManyHandoffs
    agent = Agent.objects.get(pk=turn.session.current_agent)
    return Scene(
        agent.name,
        agent.model_used,
        agent.temperature,
        transcript.of(turn, prompt=agent.prompt, context_tokens=settings.LLM_CONTEXT_TOKENS),
        # What opened this turn: the transcript joins it with messages before it that got no answer.
        turn.messages.get(role=Message.Role.USER).content,
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
    step.end(Turn.Status.COMPLETED)


def fail(step: Step, code: str, message: str, agent: str, spent: Spent | None) -> None:
    """The turn ends with an error; the session stays usable."""
    _book(step, spent)
    step.record("agent.error.occurred", agent=agent, error_message=message, error_type=code)
    step.say(ErrorShown(message, code))
    step.end(Turn.Status.FAILED, code)


def cancel(step: Step, said: str, agent: str, spent: Spent | None) -> None:
    """The turn ends because somebody wished so; what was said until then is kept."""
    _book(step, spent)
    if said.strip():
        _store_answer(step, said, agent)
    step.end(Turn.Status.CANCELLED, "cancelled")


def _hand_over(step: Step, to: Route, *, by: str) -> None:
    step.change(handoff_count=step.turn.handoff_count + 1)
    step.say(
        handoffs.hand_over(
            step.session, to.agent, reason=to.reason, confidence=to.confidence, by=by, turn_id=step.turn.pk
        )
    )


def _store_answer(step: Step, text: str, agent: str) -> None:
    Message.objects.create(
        session=step.session,
        turn=step.turn,
        turn_position=step.turn.position,
        role=Message.Role.ASSISTANT,
        content=text,
        agent=agent,
    )
    Session.objects.filter(pk=step.session.pk).update(message_count=F("message_count") + 1, last_activity=Now())
    step.record("session.message.added", role="assistant", agent=agent)
    step.say(AssistantText(text))


def _book(step: Step, spent: Spent | None) -> None:
    """Write down what a model step cost, and add it to the turn's bill."""
    if spent is None:
        return
    ModelCall.objects.create(
        account_id=step.claim.account_id,
        session_id=step.claim.session_id,
        turn_id=str(step.turn.pk),
        created_at=timezone.now(),
        **asdict(spent),
    )
    step.change(**{name: number + getattr(spent, name) for name, number in step.turn.usage.items()})
    step.record("agent.processing.completed", agent=spent.agent, duration_ms=spent.duration_ms, success=not spent.error)

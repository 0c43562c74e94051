"""What a running turn reads and writes: `look` reads, each other function is the body of one `TurnStream.commit`."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from django.conf import settings
from django.db.models import F
from django.db.models.functions import Now
from django.utils import timezone

from agents_app import approvals, handoffs, policy, schemas, team, tools
from agents_app.approvals import Verdict
from agents_app.binding import args_hash, canonical
from agents_app.llm import CallWanted, FinishedStep, ModelError
from agents_app.policy import Outcome, Ruling
from agents_app.routing import Route
from agents_app.tools import ON_THE_SERVER, CallRefused, Toolbox
from events_app.chunks import AssistantText, ErrorShown, ToolCalled
from events_app.models import ModelCall
from messages_app import transcript
from messages_app.models import Message
from messages_app.turn_stream import Step
from sessions_app import lifecycle
from sessions_app.models import Claim, Session, ToolCall, Turn, deadline

# So many calls of one session may wait for a person at once; a flood would have people sign without reading.
PENDING_PER_SESSION = 20


class TooManyRounds(ModelError):
    def __init__(self) -> None:
        super().__init__("too_many_rounds", "The agent asked for tools again and again without coming to an end.")


@dataclass(frozen=True, slots=True)
class Scene:
    """What the next model step starts from."""

    agent: str
    model: str
    temperature: float | None
    messages: list[dict[str, Any]]
    user_text: str
    toolbox: Toolbox


@dataclass(slots=True)
class Asked:
    """A call as the model asks for it, and what can be said of it whatever the rules say."""

    wanted: CallWanted
    arguments: dict[str, Any] = field(default_factory=dict)
    unusable: str = ""
    tool_version: int = 0
    deadline_seconds: int | None = None
    refused: CallRefused | None = None


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

    Raises LostClaim, CancelRequested, TooManyRounds, UnknownToTeam, ModelError when the conversation does not fit
    the model.
    """
    turn = Turn.ensure_running(claim)
    if turn.round_count >= settings.TURN_MAX_ROUNDS:
        raise TooManyRounds
    toolbox = team.toolbox_of(claim.team_version, turn.session.current_agent)
    agent = toolbox.agent
    return Scene(
        agent.name,
        agent.model_used,
        agent.temperature,
        transcript.of(turn, prompt=agent.prompt, context_tokens=settings.LLM_CONTEXT_TOKENS),
        # What opened this turn: the transcript joins it with messages before it that got no answer.
        turn.messages.get(role=Message.Role.USER).content,
        toolbox,
    )


def route(step: Step, chosen: Route, scene: Scene, spent: Spent | None) -> None:
    """The orchestrator hands the session to a specialist, unless somebody switched it away in the meantime.

    Raises TooManyHandoffs.
    """
    _book(step, spent)
    if step.session.current_agent == scene.agent:
        _hand_over(step, chosen, by=scene.agent)


def complete(step: Step, text: str, agent: str, spent: Spent | None) -> None:
    """The answer is whole: stored, counted and said, and the turn is over."""
    _book(step, spent)
    _store_answer(step, text, agent)
    step.end(Turn.Status.COMPLETED)


def weigh(finished: FinishedStep, scene: Scene) -> list[Asked]:
    """What the model asks for, held against its tools and their schemas.

    Before the transaction that stores it: a check may take a while, and the session's lock is everybody's.
    """
    with schemas.limited_time():
        return [_weighed(wanted, scene.toolbox) for wanted in finished.tool_calls]


def _weighed(wanted: CallWanted, toolbox: Toolbox) -> Asked:
    asked = Asked(wanted)
    try:
        asked.arguments = tools.read_arguments(wanted)
    except CallRefused as refused:
        asked.refused, asked.unusable = refused, wanted.arguments
    try:
        tool = toolbox.tool_named(wanted.name)
        if asked.refused is None:
            asked.tool_version, asked.deadline_seconds = tool.version, tool.deadline_seconds
            toolbox.check(tool, asked.arguments)
    except CallRefused as refused:
        asked.refused = refused
    return asked


def act(step: Step, finished: FinishedStep, asked: list[Asked], scene: Scene, spent: Spent | None, ran_ms: int) -> None:
    """The answer asks for tools: each call is stored, and released, held, executed or refused on its own.

    With a call open the turn waits; with none, the model is asked again. Raises TooManyHandoffs.
    """
    _book(step, spent)
    step.change(round_count=step.turn.round_count + 1, ran_ms=ran_ms)
    _store_answer(step, finished.text, scene.agent, round=step.turn.round_count)
    # Rules that became stricter since the turn began hold at once.
    toolbox = replace(scene.toolbox, rules_now=policy.rules_in_force())
    # The user has gone on already: the turn may not begin to wait (design 3, items 1 and 8).
    is_late = step.session.turns.filter(status=Turn.Status.QUEUED).exists()
    calls: list[ToolCall] = []
    for position, each in enumerate(asked):
        waiting = sum(call.status == ToolCall.Status.WAITING for call in calls)
        calls.append(_judged(step, toolbox, each, position, is_late=is_late, waiting=waiting))
    if any(call.outcome == ToolCall.Outcome.SUPERSEDED for call in calls):
        step.end(Turn.Status.CANCELLED, Verdict.SUPERSEDED)
    elif any(call.is_open for call in calls):
        step.wait()


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


def release(step: Step) -> None:
    """The server stops: what was shown is logged, and the turn is free for another runner."""
    Turn.release(step.claim)
    lifecycle.wake_runner(step.session.pk)


def _hand_over(step: Step, to: Route, *, by: str) -> None:
    step.say(
        handoffs.hand_over(step.session, to.agent, reason=to.reason, confidence=to.confidence, by=by, turn=step.turn)
    )


def _store_answer(step: Step, text: str, agent: str, *, round: int = 0) -> None:
    Message.objects.create(
        session=step.session,
        turn=step.turn,
        turn_position=step.turn.position,
        role=Message.Role.ASSISTANT,
        content=text,
        agent=agent,
        round=round,
    )
    Session.objects.filter(pk=step.session.pk).update(message_count=F("message_count") + 1, last_activity=Now())
    step.record("session.message.added", role="assistant", agent=agent)
    if text.strip():
        step.say(AssistantText(text, is_final=not round))


def _judged(step: Step, toolbox: Toolbox, asked: Asked, position: int, *, is_late: bool, waiting: int) -> ToolCall:
    """One call of an answer, stored in the state that it gets at once, with what is to be said of it."""
    call = ToolCall(
        session=step.session,
        turn=step.turn,
        round=step.turn.round_count,
        position=position,
        agent=toolbox.agent.name,
        tool_name=asked.wanted.name,
        tool_version=asked.tool_version,
        provider_id=asked.wanted.provider_id,
        # As they came, usable or not: also a call that may not be made stays what it was.
        arguments_text=canonical(asked.arguments),
        unusable_arguments=asked.unusable,
        deadline_seconds=asked.deadline_seconds,
    )
    if asked.tool_version:
        call.args_hash = args_hash(step.session.pk, call.pk, call.tool_name, call.tool_version, call.arguments_text)
    named = {"tool_name": call.tool_name, "call_id": call.pk}
    step.record("tool.execution.requested", agent=call.agent, **named)
    try:
        if asked.refused is not None:
            raise asked.refused
        ruling = toolbox.rule(call.tool_name)
        if ruling.outcome == Outcome.ASK and waiting >= PENDING_PER_SESSION:
            raise CallRefused(
                "too_many_approvals", "Too many calls wait for a person already. Ask for fewer at a time."
            )
    except CallRefused as refused:
        if refused.is_shown:
            step.say(ErrorShown(refused.message, refused.code, {"call_id": call.pk}))
        _close(step, call, f"Error: {refused.message}", ToolCall.Outcome.REFUSED)
        step.record("tool.execution.failed", error_message=refused.message, error_type=refused.code, **named)
    else:
        _let_go(step, call, asked.arguments, ruling, is_late=is_late)
    return call


def _let_go(step: Step, call: ToolCall, arguments: dict[str, Any], ruling: Ruling, *, is_late: bool) -> None:
    """A call that may be made: by the server at once, by the client, or by either once a person has said so."""
    named = {"tool_name": call.tool_name, "call_id": call.pk}
    waits = ruling.outcome == Outcome.ASK
    on_the_server = call.tool_name in ON_THE_SERVER and not waits
    if is_late and not on_the_server:
        _close(step, call, *approvals.closing(call.tool_name, Verdict.SUPERSEDED))
        return
    if waits:
        call.requires_approval, call.status = True, ToolCall.Status.WAITING
        call.save(force_insert=True)
        approvals.request(call, ruling)
        step.record("tool.approval.required", reason=ruling.reason or None, arguments=arguments, **named)
    else:
        step.record("tool.execution.started", **named)
        if on_the_server:
            text, outcome, chunks = handoffs.switch_mode(step.session, step.turn, arguments, by=call.agent)
            for chunk in chunks:
                step.say(chunk)
            _close(step, call, text, outcome)
            step.facts.append(approvals.executed(step.session, call, text))
            return
        call.status, call.released_at = ToolCall.Status.RELEASED, Now()
        call.deadline_at = deadline(call.deadline_seconds)
        call.save(force_insert=True)
    step.say(ToolCalled(call.pk, call.tool_name, arguments, call.requires_approval, call.args_hash))


def _close(step: Step, call: ToolCall, answer: str, outcome: ToolCall.Outcome) -> None:
    """Store a call together with its answer."""
    call.status, call.outcome, call.answer, call.answered_at = (
        ToolCall.Status.ANSWERED,
        outcome,
        answer,
        timezone.now(),
    )
    call.save(force_insert=True)
    Session.objects.filter(pk=step.session.pk).update(message_count=F("message_count") + 1)


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

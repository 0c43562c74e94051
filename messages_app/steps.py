"""What a running turn reads and writes: `look` reads, each other function is the body of one `TurnStream.commit`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from django.conf import settings
from django.db.models.functions import Now
from django.utils import timezone

from agents_app import approvals, handoffs, policy, schemas, server_tools, team, tools
from agents_app.approvals import Verdict
from agents_app.binding import args_hash, canonical
from agents_app.llm import CallWanted, FinishedStep, ModelError
from agents_app.policy import Outcome, Ruling
from agents_app.routing import Route
from agents_app.server_tools import ServerCall
from agents_app.tools import CallRefused, Toolbox
from events_app import log
from events_app.chunks import AssistantText, Chunk, ErrorShown, ServerCallMoved, ToolCalled
from events_app.models import ModelCall
from events_app.prepared import Insert
from messages_app import transcript
from messages_app.models import Message, say
from messages_app.transcript import Said
from messages_app.turn_stream import Step
from sessions_app import lifecycle
from sessions_app.models import ORCHESTRATOR, Claim, ToolCall, Turn, deadline

logger = logging.getLogger(__name__)

# So many messages are read for the turns that are claimed together.
OPENING_MESSAGES = 1_000
# So many calls of one session may wait for a person at once; a flood would have people sign without reading.
PENDING_PER_SESSION = 20


IN_DOUBT = "tool_in_doubt"


class TooManyRounds(ModelError):
    def __init__(self) -> None:
        super().__init__("too_many_rounds", "The agent asked for tools again and again without coming to an end.")


class ArgumentsTampered(ModelError):
    """The arguments of a released call are no longer those that were hashed: the turn fails, nothing is executed."""

    def __init__(self) -> None:
        super().__init__(
            approvals.ArgumentsChanged.code, "The arguments of a tool call were changed. It was not executed."
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """What the next model step starts from."""

    agent: str
    model: str
    temperature: float | None
    messages: list[dict[str, Any]]
    user_text: str  # for the orchestrator alone
    toolbox: Toolbox


@dataclass(slots=True)
class Asked:
    """A call as the model asks for it, and what can be said of it whatever the rules say."""

    wanted: CallWanted
    arguments: dict[str, Any] = field(default_factory=dict)
    unusable: str = ""
    tool_version: int = 0
    deadline_seconds: int | None = None
    on_server: bool = False
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


COST = tuple(each.name for each in fields(Spent))
_booked = Insert(ModelCall, "account_id", "session_id", "turn_id", "created_at", *COST)


def obey(step: Step) -> None:
    """Pass the session to the agent that the message asked for, when the turn's time has come."""
    asked = step.turn.requested_agent
    step.change(requested_agent="")
    if asked != step.session.current_agent:
        _hand_over(step, Route(asked, "User requested", "high"), by="user")


def look(claim: Claim) -> Scene | None:
    """Who is to act, and what the model is to read; None while a call is open, which comes first. Reads only.

    Raises LostClaim, CancelRequested, TooManyRounds, UnknownToTeam, ModelError when the conversation does not fit
    the model.
    """
    turn = Turn.ensure_running(claim)
    if turn.round_count and turn.calls.open().exists():
        return None
    if turn.round_count >= settings.TURN_MAX_ROUNDS:
        raise TooManyRounds
    scene = _scene(turn, claim.team_version)
    # A process that slept between these reads has parts of what another runner made of the turn.
    Turn.ensure_still_running(claim)
    return scene


def opening_scenes(turns: Sequence[tuple[Turn, int]]) -> list[Scene | None]:
    """The same for turns that were claimed just now, each with its version of the team, if their first model step comes
    first and is quickly told: one query for all of them. None for the others, and for what cannot be told.
    """
    # Within a bound, whatever there is to be claimed.
    room = OPENING_MESSAGES
    short = []
    for turn, _ in turns:
        is_new = turn.status == Turn.Status.QUEUED and not turn.round_count and not turn.requested_agent
        if is_new and turn.session.message_count <= min(transcript.SHORT, room):
            short.append(turn.session_id)
            room -= turn.session.message_count
    try:
        messages = transcript.whole(short) if short else {}
    except Exception:
        # Each turn of them meets it again by itself, and tells its client.
        logger.exception("opening_unread", extra={"turns": len(short)})
        return [None] * len(turns)
    return [_opening_scene(turn, version, messages.get(turn.session_id), len(turns)) for turn, version in turns]


def _opening_scene(turn: Turn, version: int, messages: Sequence[Said] | None, among: int) -> Scene | None:
    # Calls are read with a query for each session.
    if messages is None or (among > 1 and any(said.round for said in messages)):
        return None
    try:
        return _scene(turn, version, messages)
    except Exception:
        return None  # as above


def _scene(turn: Turn, version: int, messages: Sequence[Said] | None = None) -> Scene:
    toolbox = team.toolbox_of(version, turn.session.current_agent)
    agent = toolbox.agent
    return Scene(
        agent.name,
        agent.model_used,
        agent.temperature,
        transcript.of(turn, prompt=agent.prompt, context_tokens=settings.LLM_CONTEXT_TOKENS, messages=messages),
        _opening(turn, messages) if agent.name == ORCHESTRATOR else "",
        toolbox,
    )


def _opening(turn: Turn, messages: Sequence[Said] | None) -> str:
    """What opened this turn: the transcript joins it with messages before it that got no answer."""
    if messages is None:
        return turn.messages.get(role=Message.Role.USER).content
    (opened,) = (
        said.content for said in messages if said.turn_position == turn.position and said.role == Message.Role.USER
    )
    return opened


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
            asked.on_server = tools.is_on_server(tool)
            toolbox.check(tool, asked.arguments)
    except CallRefused as refused:
        asked.refused = refused
    return asked


def act(step: Step, finished: FinishedStep, asked: list[Asked], scene: Scene, spent: Spent | None, ran_ms: int) -> None:
    """The answer asks for tools: each call is stored, and released, held, executed or refused on its own.

    What the server is to execute comes next; else the turn waits for what is open, or the model is asked again. Raises
    TooManyHandoffs.
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
    to_be_executed = [call for call in calls if call.is_to_be_executed]
    if any(call.outcome == ToolCall.Outcome.SUPERSEDED for call in calls):
        for call in to_be_executed:
            call.answer_with(*approvals.closing(call.tool_name, Verdict.SUPERSEDED))
        step.end(Turn.Status.CANCELLED, Verdict.SUPERSEDED)
    elif any(call.is_open for call in calls) and not to_be_executed:
        step.wait()


def begin(step: Step, begun: list[ServerCall], ran_ms: int) -> None:
    """Mark what the server is to execute now, and add it to `begun`. What an earlier runner may have executed already
    and may not be executed twice is in doubt, as is what this server does not have: an operator is asked.

    Raises ArgumentsTampered.
    """
    # A tool that kills its server comes after this: the runners that died of it are not forgotten yet.
    step.change(lost_count=step.turn.lost_count)
    for call in step.turn.calls.to_be_executed().in_order():
        if not approvals.is_sound(call):
            raise ArgumentsTampered
        if call.tool_name not in server_tools.registered:
            _doubt(step, call, f"This server does not have {call.tool_name} at the moment.")
        elif call.begun_at is None or server_tools.is_repeatable(call.tool_name):
            call.begin()
            begun.append(_for_the_server(step, call))
            step.say(_moved(call, call.state))
        else:
            _doubt(step, call, f"The server ended while it executed {call.tool_name}.")
    if not begun:
        _settle(step, ran_ms)


def store(step: Step, call_id: str, text: str, outcome: ToolCall.Outcome, ran_ms: int) -> None:
    """What came of a call that the server executed; with none left the turn waits for what is open, or goes on."""
    call = step.turn.calls.get(pk=call_id)
    approvals.answer(step.session, call, approvals.Result(text, outcome))
    step.say(_moved(call, outcome))
    _settle(step, ran_ms)


def fail(step: Step, code: str, message: str, agent: str, spent: Spent | None) -> None:
    """The turn ends with an error; the session stays usable."""
    _book(step, spent)
    _close_open(step)
    step.record("agent.error.occurred", agent=agent, error_message=message, error_type=code)
    step.say(ErrorShown(message, code))
    step.end(Turn.Status.FAILED, code)


def cancel(step: Step, said: str, agent: str, spent: Spent | None) -> None:
    """The turn ends because somebody wished so; what was said until then is kept."""
    _book(step, spent)
    if said.strip():
        _store_answer(step, said, agent)
    _close_open(step)
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
    say(step.turn, Message.Role.ASSISTANT, text, agent=agent, round=round)
    step.messages += 1
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
        on_server=asked.on_server,
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
    # The user has gone on: nothing is left to wait for.
    if is_late and (waits or not call.on_server):
        _close(step, call, *approvals.closing(call.tool_name, Verdict.SUPERSEDED))
        return
    if waits:
        call.requires_approval, call.status = True, ToolCall.Status.WAITING
        call.save(force_insert=True)
        approvals.request(call, ruling)
        step.record("tool.approval.required", reason=ruling.reason or None, arguments=arguments, **named)
        step.say(_asked_for(call, arguments))
        return
    step.record("tool.execution.started", **named)
    if (tool := server_tools.step_tool_named(call.tool_name)) is not None:
        done = tool.perform(step.session, step.turn, arguments, call.agent)
        for chunk in done.chunks:
            step.say(chunk)
        _close(step, call, done.text, done.outcome)
        step.facts.append(approvals.executed(step.session, call, done.text))
        return
    call.status, call.released_at = ToolCall.Status.RELEASED, Now()
    if not call.on_server:
        call.deadline_at = deadline(call.deadline_seconds)
        step.say(_asked_for(call, arguments))
    call.save(force_insert=True)


def _asked_for(call: ToolCall, arguments: dict[str, Any]) -> Chunk:
    """A client that was told of it as a tool call would execute it."""
    if call.on_server:
        return ServerCallMoved(call.pk, call.tool_name, arguments, call.status, call.args_hash)
    return ToolCalled(call.pk, call.tool_name, arguments, call.requires_approval, call.args_hash)


def _moved(call: ToolCall, state: str) -> Chunk:
    return ServerCallMoved(call.pk, call.tool_name, call.final_arguments, state, call.args_hash)


def _for_the_server(step: Step, call: ToolCall) -> ServerCall:
    return ServerCall(
        call.pk,
        call.tool_name,
        call.final_arguments,
        call.agent,
        step.session.pk,
        str(step.turn.pk),
        step.session.account_id,
        call.deadline_seconds,
    )


def _doubt(step: Step, call: ToolCall, why: str) -> None:
    """Leave a call to an operator."""
    call.doubt()
    log.audit(
        approvals.system(step.session),
        "call.in_doubt",
        session_id=step.session.pk,
        target=call.pk,
        reason=why,
        tool_name=call.tool_name,
    )
    message = f"{why} An operator has to say what becomes of the call."
    step.record("agent.error.occurred", agent=call.agent, error_message=message, error_type=IN_DOUBT)
    step.say(ErrorShown(message, IN_DOUBT, {"call_id": call.pk}))


def _settle(step: Step, ran_ms: int) -> None:
    """When nothing is left for the server to execute: wait for what is open, unless the user has gone on already."""
    still_open = list(step.turn.calls.open())
    if not still_open or any(call.is_to_be_executed for call in still_open):
        return
    step.change(ran_ms=ran_ms)
    if step.session.turns.filter(status=Turn.Status.QUEUED).exists():
        approvals.close_calls(step.session, step.turn, Verdict.SUPERSEDED, approvals.system(step.session))
        step.end(Turn.Status.CANCELLED, Verdict.SUPERSEDED)
    else:
        step.wait()


def _close_open(step: Step) -> None:
    """Answer what is open of a turn that ends while the server executes for it."""
    approvals.close_calls(step.session, step.turn, Verdict.CANCELLED, approvals.system(step.session))


def _close(step: Step, call: ToolCall, answer: str, outcome: ToolCall.Outcome) -> None:
    """Store a call together with its answer."""
    call.status, call.outcome, call.answer, call.answered_at = (
        ToolCall.Status.ANSWERED,
        outcome,
        answer,
        timezone.now(),
    )
    call.save(force_insert=True)
    step.messages += 1


def _book(step: Step, spent: Spent | None) -> None:
    """Write down what a model step cost, and add it to the turn's bill."""
    if spent is None:
        return
    cost = [getattr(spent, name) for name in COST]
    _booked([(step.claim.account_id, step.claim.session_id, str(step.turn.pk), timezone.now(), *cost)])
    step.change(**{name: number + getattr(spent, name) for name, number in step.turn.usage.items()})
    step.record("agent.processing.completed", agent=spent.agent, duration_ms=spent.duration_ms, success=not spent.error)

"""The checker itself: of a sound record it complains of nothing; of each tampered one it does."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.faults import checker
from tests.faults.checker import INVARIANTS, check
from tests.faults.evidence import Evidence, Outage, SessionNow
from tests.faults.harness import LLM_KEY, Trial, faulty, message
from tests.faults.record import Answered, Decided, Opened, Reported, Said, Seen, Stuck
from tests.scripted_llm import ScriptedLLM

Tampering = Callable[[Evidence], None]

pytestmark = pytest.mark.sqlite


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Evidence:
    """What is known after some conversations in which nothing went wrong."""
    with ScriptedLLM() as llm, faulty(tmp_path_factory.mktemp("sound"), migrated, llm) as server:
        trial = Trial("none", [server], llm, seed=2)
        for _ in range(4):
            one = trial.talker()
            for number in range(2):
                one.converse(**message(number))
            one.close()
        return trial.evidence()


@pytest.fixture
def evidence(recorded: Evidence) -> Evidence:
    return deepcopy(recorded)


def first(evidence: Evidence, kind: type[Any], **like: Any) -> Any:
    """The first fact of a kind with these values."""
    return next(
        fact
        for fact in evidence.facts
        if isinstance(fact, kind) and all(getattr(fact, name) == value for name, value in like.items())
    )


def frame(evidence: Evidence, kind: str) -> Seen:
    return next(fact for fact in evidence.facts if isinstance(fact, Seen) and fact.data.get("type") == kind)


def home(evidence: Evidence, fact: Any) -> SessionNow:
    return evidence.sessions[fact.session_id]


def result_of(evidence: Evidence, fact: Reported) -> dict[str, Any]:
    return next(one for one in home(evidence, fact).history if one.get("tool_call_id") == fact.call_id)


def released(evidence: Evidence) -> Reported:
    """A result that was acknowledged of a call that nobody rejected."""
    rejected = {call_id for call_id, verdict in evidence.decisions if verdict == "reject"}
    return next(
        fact
        for fact in evidence.facts
        if isinstance(fact, Reported) and fact.is_acknowledged and fact.call_id not in rejected
    )


def without_event(evidence: Evidence, session_id: str, kind: str) -> None:
    gone = next(event for event in evidence.events if event[:2] == (session_id, kind))
    evidence.events.remove(gone)


# --- one tampering after the other ----------------------------------------------------------------------------------


def a_session_is_gone(evidence: Evidence) -> None:
    home(evidence, first(evidence, Said)).exists = False


def a_message_is_lost(evidence: Evidence) -> None:
    said = first(evidence, Said)
    now = home(evidence, said)
    now.history = [one for one in now.history if one["content"] != said.content]


def two_messages_change_places(evidence: Evidence) -> None:
    users = [one for one in home(evidence, first(evidence, Said)).history if one["role"] == "user"]
    users[0]["content"], users[1]["content"] = users[1]["content"], users[0]["content"]


def a_result_is_lost(evidence: Evidence) -> None:
    reported = released(evidence)
    home(evidence, reported).history.remove(result_of(evidence, reported))


def a_result_is_another(evidence: Evidence) -> None:
    result_of(evidence, released(evidence))["content"] = "something else"


def a_decision_is_lost(evidence: Evidence) -> None:
    decided = first(evidence, Decided)
    home(evidence, decided).approvals[decided.call_id]["decision"] = None


def a_decision_is_somebody_elses(evidence: Evidence) -> None:
    decided = first(evidence, Decided)
    home(evidence, decided).approvals[decided.call_id]["decided_by"] = "mallory"


def a_request_is_lost(evidence: Evidence) -> None:
    decided = first(evidence, Decided)
    del home(evidence, decided).approvals[decided.call_id]


def a_frame_is_lost(evidence: Evidence) -> None:
    seen = frame(evidence, "tool_call")
    home(evidence, seen).replay.remove((seen.number, seen.data))


def an_answer_is_not_stored(evidence: Evidence) -> None:
    whole = next(
        fact
        for fact in evidence.facts
        if isinstance(fact, Seen) and fact.data["type"] == "assistant_message" and not fact.is_delta
    )
    for one in home(evidence, whole).history:
        one["content"] = one["content"].replace(whole.data["content"], "")


def a_call_is_not_stored(evidence: Evidence) -> None:
    seen = frame(evidence, "tool_call")
    for one in home(evidence, seen).history:
        one.pop("tool_calls", None)


def a_turn_ended_otherwise(evidence: Evidence) -> None:
    evidence.turns[0].status = "failed"


def a_message_has_no_event(evidence: Evidence) -> None:
    without_event(evidence, first(evidence, Said).session_id, "session.message.added")


def a_decision_has_no_event(evidence: Evidence) -> None:
    without_event(evidence, first(evidence, Decided).session_id, "hitl.decision.made")


def a_result_has_no_event(evidence: Evidence) -> None:
    session_id = released(evidence).session_id
    for _ in range(sum(event[:2] == (session_id, "tool.execution.completed") for event in evidence.events)):
        without_event(evidence, session_id, "tool.execution.completed")


def a_number_goes_back(evidence: Evidence) -> None:
    one, *_, last = [fact for fact in evidence.facts if isinstance(fact, Seen) and fact.stream == 1]
    last.number = one.number


def a_stream_begins_before_its_position(evidence: Evidence) -> None:
    opened = first(evidence, Opened, stream=1)
    opened.after = 10**6


def a_replay_goes_back(evidence: Evidence) -> None:
    replay = home(evidence, first(evidence, Said)).replay
    replay[3], replay[4] = replay[4], replay[3]


def a_number_is_used_for_two_frames(evidence: Evidence) -> None:
    seen = first(evidence, Seen)
    evidence.facts.append(Seen(session_id=seen.session_id, stream=1, number=seen.number, data={"type": "restarted"}))


def a_delta_has_the_number_of_a_frame_in_the_log(evidence: Evidence) -> None:
    seen = frame(evidence, "tool_call")
    seen.data = {"type": "assistant_message", "token": "Half "}


def a_call_is_released_twice(evidence: Evidence) -> None:
    seen = frame(evidence, "tool_call")
    home(evidence, seen).replay.append((10**6, seen.data))


def a_call_has_two_results(evidence: Evidence) -> None:
    reported = released(evidence)
    home(evidence, reported).history.append(deepcopy(result_of(evidence, reported)))


def a_request_has_two_decisions(evidence: Evidence) -> None:
    evidence.decisions.append(evidence.decisions[0])


def a_call_was_started_twice(evidence: Evidence) -> None:
    started = next(event for event in evidence.events if event[1] == "tool.execution.started")
    evidence.events.append(started)


def a_turn_ends_twice(evidence: Evidence) -> None:
    end = frame(evidence, "turn_finished")
    home(evidence, end).replay.append((end.number + 1, end.data))


def a_call_of_the_server_was_never_executed(evidence: Evidence) -> None:
    del evidence.executed[0]


def something_was_executed_that_nobody_asked_for(evidence: Evidence) -> None:
    evidence.executed.append("call_of_nobody")


def a_call_comes_under_another_number(evidence: Evidence) -> None:
    seen = frame(evidence, "tool_call")
    evidence.facts.append(Seen(session_id=seen.session_id, stream=seen.stream, number=10**6, data=seen.data))


def a_decision_is_confirmed_otherwise(evidence: Evidence) -> None:
    decided = deepcopy(first(evidence, Decided))
    decided.verdict = "reject" if decided.verdict != "reject" else "approve"
    evidence.facts.append(decided)


def a_message_is_stored_twice(evidence: Evidence) -> None:
    now = home(evidence, first(evidence, Said))
    now.history += deepcopy(now.history[:1])


def a_turn_runs_for_ever(evidence: Evidence) -> None:
    evidence.turns[0].status = "running"


def a_turn_waits_for_nothing(evidence: Evidence) -> None:
    evidence.turns[0].status = "waiting"


def somebody_waited_in_vain(evidence: Evidence) -> None:
    evidence.facts.append(Stuck(session_id="s", what="an answer"))


def a_call_is_unanswered(evidence: Evidence) -> None:
    a_result_is_lost(evidence)


def an_answer_comes_twice(evidence: Evidence) -> None:
    now = home(evidence, first(evidence, Said))
    last = next(number for number, one in enumerate(now.history) if one["role"] == "assistant" and one["content"])
    now.history.insert(last, {"role": "assistant", "content": "Said twice."})


def the_model_was_sent_nonsense(evidence: Evidence) -> None:
    evidence.refused_by_the_model.append("message 3 (tool): answers no open tool call")


def a_decision_is_not_audited(evidence: Evidence) -> None:
    evidence.audited.pop()


def an_audit_entry_is_made_up(evidence: Evidence) -> None:
    evidence.audited.append(("call_of_nobody", "approve"))


def a_decision_was_confirmed_and_is_not_stored(evidence: Evidence) -> None:
    made = next(made for made in evidence.decisions if made[0] == first(evidence, Decided).call_id)
    evidence.decisions.remove(made)
    evidence.audited.remove(made)


def health_took_too_long(evidence: Evidence) -> None:
    evidence.back_within = 10
    evidence.outages.append(Outage("F0", 10.1))


def health_never_came_back(evidence: Evidence) -> None:
    evidence.outages.append(Outage("F0", None))


def a_request_was_answered_500(evidence: Evidence) -> None:
    first(evidence, Answered).status = 500


def a_refusal_did_not_say_when_to_come_back(evidence: Evidence) -> None:
    first(evidence, Answered).status = 503


def a_stream_said_internal_error(evidence: Evidence) -> None:
    first(evidence, Seen).data = {"type": "error", "metadata": {"code": "internal_error"}}


def a_key_was_logged(evidence: Evidence) -> None:
    evidence.log += f'{{"event": "asked the model with Bearer {LLM_KEY}"}}\n'


TAMPERINGS: list[tuple[Tampering, Callable[[Evidence], Any]]] = [
    (a_session_is_gone, checker.sessions_are_there),
    (a_message_is_lost, checker.messages_are_in_history),
    (two_messages_change_places, checker.messages_are_in_history),
    (a_result_is_lost, checker.results_are_in_history),
    (a_result_is_another, checker.results_are_in_history),
    (a_decision_is_lost, checker.decisions_stand),
    (a_decision_is_somebody_elses, checker.decisions_stand),
    (a_request_is_lost, checker.decisions_stand),
    (a_frame_is_lost, checker.frames_are_replayed),
    (an_answer_is_not_stored, checker.what_frames_told_is_so),
    (a_call_is_not_stored, checker.what_frames_told_is_so),
    (a_turn_ended_otherwise, checker.what_frames_told_is_so),
    (a_message_has_no_event, checker.facts_are_recorded),
    (a_decision_has_no_event, checker.facts_are_recorded),
    (a_result_has_no_event, checker.facts_are_recorded),
    (a_number_goes_back, checker.numbers_increase),
    (a_stream_begins_before_its_position, checker.numbers_increase),
    (a_replay_goes_back, checker.numbers_increase),
    (a_number_is_used_for_two_frames, checker.numbers_are_used_once),
    (a_delta_has_the_number_of_a_frame_in_the_log, checker.numbers_are_used_once),
    (a_call_is_released_twice, checker.calls_happen_once),
    (a_call_has_two_results, checker.calls_happen_once),
    (a_request_has_two_decisions, checker.calls_happen_once),
    (a_call_was_started_twice, checker.calls_happen_once),
    (a_call_of_the_server_was_never_executed, checker.servers_calls_were_executed),
    (something_was_executed_that_nobody_asked_for, checker.servers_calls_were_executed),
    (a_turn_ends_twice, checker.turns_end_once),
    (a_call_comes_under_another_number, checker.calls_are_told_under_one_number),
    (a_decision_is_confirmed_otherwise, checker.decisions_are_confirmed_alike),
    (a_message_is_stored_twice, checker.messages_are_stored_once),
    (a_turn_runs_for_ever, checker.turns_are_over),
    (a_turn_waits_for_nothing, checker.turns_are_over),
    (somebody_waited_in_vain, checker.nobody_waited_in_vain),
    (a_call_is_unanswered, checker.histories_are_acceptable),
    (a_call_has_two_results, checker.histories_are_acceptable),
    (an_answer_comes_twice, checker.histories_are_acceptable),
    (the_model_was_sent_nonsense, checker.the_model_refused_none),
    (a_decision_is_not_audited, checker.decisions_are_audited),
    (an_audit_entry_is_made_up, checker.decisions_are_audited),
    (a_decision_was_confirmed_and_is_not_stored, checker.decisions_are_audited),
    (health_took_too_long, checker.health_comes_back),
    (health_never_came_back, checker.health_comes_back),
    (a_request_was_answered_500, checker.refusals_say_when_to_come_back),
    (a_refusal_did_not_say_when_to_come_back, checker.refusals_say_when_to_come_back),
    (a_stream_said_internal_error, checker.refusals_say_when_to_come_back),
    (a_key_was_logged, checker.no_secret_is_logged),
]


def test_of_what_is_sound_nothing_is_complained_of(evidence: Evidence) -> None:
    assert check(evidence) == []


@pytest.mark.parametrize(
    ("tamper", "finds"), TAMPERINGS, ids=[f"{tamper.__name__}-{finds.__name__}" for tamper, finds in TAMPERINGS]
)
def test_each_tampering_is_found(evidence: Evidence, tamper: Tampering, finds: Callable[[Evidence], Any]) -> None:
    tamper(evidence)

    assert list(finds(evidence)) != []


def test_no_part_of_the_checker_is_untried() -> None:
    assert {holds for _, holds in INVARIANTS} == {finds for _, finds in TAMPERINGS}


@pytest.mark.parametrize("secret", range(5))
def test_every_secret_is_looked_for(evidence: Evidence, secret: int) -> None:
    evidence.log += f"... {evidence.secrets[secret]} ..."

    assert {complaint.invariant for complaint in check(evidence)} == {"I9"}

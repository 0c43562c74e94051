"""Bugs planted in a running server are found from end to end: driven, killed, checked."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.faults import bugs
from tests.faults.checker import check
from tests.faults.conversation import have_a_conversation, killed_at
from tests.faults.harness import FaultyServer, Trial, faulty, message, second, signal_to
from tests.pausing import pause_in_a_turn
from tests.scripted_llm import Gate, ScriptedLLM, hold, say
from tests.server import until

pytestmark = pytest.mark.sqlite

WithBug = Callable[[Callable[[], None]], AbstractContextManager[FaultyServer]]


@pytest.fixture
def with_bug(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> WithBug:
    return lambda bug: faulty(tmp_path, migrated, llm, PLANTED_BUG=bug.__name__)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def found(trial: Trial) -> set[str]:
    return {complaint.invariant for complaint in check(trial.evidence())}


def test_a_server_without_a_bug_is_complained_of_by_nobody(server: FaultyServer, llm: ScriptedLLM) -> None:
    trial = Trial("none", [server], llm)
    have_a_conversation(trial.talker())

    assert found(trial) == set()


@pytest.mark.parametrize(
    ("bug", "invariant"), [(bugs.forgets_the_audit_entry, "I6"), (bugs.logs_who_calls_with_what, "I9")]
)
def test_bugs_that_need_no_fault(with_bug: WithBug, llm: ScriptedLLM, bug: Callable[[], None], invariant: str) -> None:
    with with_bug(bug) as server:
        trial = Trial("none", [server], llm)
        have_a_conversation(trial.talker())

        assert found(trial) == {invariant}


def test_an_answer_that_begins_before_the_message_is_stored(with_bug: WithBug, llm: ScriptedLLM) -> None:
    with with_bug(bugs.says_yes_before_it_has_stored) as server:
        trial = Trial("F1a", [server], llm)
        killed_at(trial, server, 1)

        assert "I1" in found(trial)


def test_numbers_that_are_given_again_by_who_takes_over(with_bug: WithBug, llm: ScriptedLLM, gate: Gate) -> None:
    with with_bug(bugs.gives_numbers_that_it_has_not_reserved) as server:
        trial = Trial("F1a", [server], llm)
        llm.default = hold("Half a ", "sentence.", gate=gate)
        with server.streaming({"type": "user_message", **message(0)}, "s") as frames:
            trial.record.saw("s", until(frames, "assistant_message"))
            server.kill()
        gate.open()
        trial.restart()

        assert "I2" in found(trial)


def test_a_paused_runner_whose_writes_count_when_it_wakes_up(
    with_bug: WithBug, llm: ScriptedLLM, gate: Gate, tmp_path: Path
) -> None:
    with with_bug(bugs.lets_who_slept_write) as sleeper, second(sleeper, tmp_path) as other:
        other.start()
        trial = Trial("F4", [other, sleeper], llm)
        replies = iter([hold("From the ", "sleeper.", gate=gate)])
        llm.default = lambda _: next(replies, say("From the other one."))
        with sleeper.streaming({"type": "user_message", **message(1)}, "s") as frames:
            seen = until(frames, "assistant_message")
            pause_in_a_turn(sleeper)
            with other.following("s") as followed:
                until(followed, "turn_finished")
            signal_to(sleeper, signal.SIGCONT)
            gate.open()
            trial.record.saw("s", [*seen, *until(frames, "turn_finished")])

        assert "I3" in found(trial)
